"""The feature cache on disk, read without a model: image, caption and phrase features of image-text pairs.

A folder: `header.json` (written last), `image.f32` and `caption.f32` (N, D), `phrase.f32` (P, D), little-endian
float32; `keys.jsonl`, `phrases.jsonl`, `phrase_rows.jsonl`, a line per pair or phrase. Arrays are memory-mapped.
`gram_core/pairs.py` writes such folders; `write` here is its small stand-in for tests and benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prototypes.vectors import Floats, Ints, blocks

__all__ = ["FeatureCache", "PhraseRows", "write"]

FORMAT = 1
HEADER = "header.json"
ROWS_PER_PHRASE = 1000  # `phrase_rows` is cut there


@dataclass(frozen=True, eq=False)
class PhraseRows:
    """Which pairs hold which phrase: entry i says that pair `row[i]` holds phrase `phrase[i]`, both (E,) int64.

    `weight` (P,) makes up for lists that were cut: occurrences divided by entries.
    """

    phrase: Ints
    row: Ints
    weight: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """N pairs and P phrases under one backbone; raw unit features, rows in the order of `keys`."""

    folder: Path
    fingerprint: str
    model: str
    source: str
    image: Floats  # (N, D), memory-mapped
    caption: Floats  # (N, D), memory-mapped
    phrase: Floats  # (P, D), memory-mapped

    @property
    def dimension(self) -> int:
        return int(self.image.shape[1])

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None = None) -> FeatureCache:
        """Open a finished cache, made for the model `fingerprint` (None: for any).

        Raises ValueError in words when it is missing, unfinished, cut off or of another model.
        """
        path = folder / HEADER
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {HEADER}: it is no feature cache, or an unfinished one. Finish it first."
            )
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            stored, form, complete = str(header["fingerprint"]), header["format"], header["complete"]
            n, p, d = (int(header[name]) for name in ("pairs", "phrases", "dimension"))
            kind, model, source = str(header["dtype"]), str(header["model"]), str(header.get("source", ""))
        except (UnicodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a feature cache's header ({error!r}); make the cache again.") from error
        if form != FORMAT or kind != "float32":
            raise ValueError(f"{path} has format {form!r} of {kind}, this version reads {FORMAT} of float32.")
        if complete is not True:
            raise ValueError(f"the feature cache in {folder} is unfinished; run the step that makes it to its end.")
        if fingerprint is not None and stored != fingerprint:
            raise ValueError(
                f"the feature cache in {folder} is of model {stored[:16]}, expected {fingerprint[:16]}; "
                "make it again with this model."
            )
        if n < 1 or d < 1 or p < 0:
            raise ValueError(
                f"{path} counts {n} pairs and {p} phrases of dimension {d}; a cache holds at least a pair."
            )
        shapes = {"image": (n, d), "caption": (n, d), "phrase": (p, d)}
        image, caption, phrase = (_map(folder / f"{name}.f32", shape) for name, shape in shapes.items())
        return cls(folder, stored, model, source, image, caption, phrase)

    def keys(self) -> list[str]:
        """The pairs' keys in row order; each occurs once."""
        return self._listed[0]

    def captioned(self) -> NDArray[np.bool_]:
        """(N,) whether a pair has a caption with words in it."""
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[list[str], NDArray[np.bool_]]:
        """What is read of `keys.jsonl`, once: it takes longer than many a pass over features."""
        keys, captioned = [], np.zeros(len(self), bool)
        for i, line in enumerate(self._lines("keys.jsonl", "key", len(self))):
            if i < len(self):  # more lines than pairs are refused once all are read
                keys.append(str(line["key"]))
                captioned[i] = any(str(c).strip() for c in line.get("captions") or ())
        if len(set(keys)) != len(keys):
            raise ValueError(f"{self.folder / 'keys.jsonl'} names a key twice; every pair needs a key of its own.")
        return keys, captioned

    def captions(self, row: int) -> list[str]:
        """The captions of one pair; reads the file up to it."""
        for i, line in enumerate(self._lines("keys.jsonl", "key", len(self))):
            if i == row:
                return [str(c) for c in line.get("captions") or ()]
        raise ValueError(f"the cache has {len(self)} pairs, got row {row}.")

    def phrases(self) -> list[str]:
        """The candidate phrases in row order of `phrase`."""
        return [str(line["phrase"]) for line in self._lines("phrases.jsonl", "phrase", len(self.phrase))]

    def phrase_rows(self) -> PhraseRows:
        """Which pairs hold which phrase."""
        path = self.folder / "phrase_rows.jsonl"
        p = len(self.phrase)
        counts = [int(line.get("count", 0)) for line in self._lines("phrases.jsonl", "phrase", p)]
        try:
            lists = [np.asarray(line, np.int64).reshape(-1) for line in self._values("phrase_rows.jsonl", p)]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} holds a line that is no list of pair rows ({error}); make the cache again."
            ) from error
        lengths = np.array([len(rows) for rows in lists], np.int64)
        row = np.concatenate([*lists, np.empty(0, np.int64)])
        if row.size and not (row.min() >= 0 and row.max() < len(self)):
            raise ValueError(f"{path} names a pair outside 0..{len(self) - 1}; make the cache again.")
        cut = lengths >= ROWS_PER_PHRASE
        weight = np.where(cut, np.maximum(np.array(counts, np.int64), lengths) / np.maximum(lengths, 1), 1.0)
        return PhraseRows(np.repeat(np.arange(p), lengths), row, weight)

    def rows(self, keys: Sequence[str]) -> Ints:
        """The rows (n,) of `keys`; a key that the cache lacks is refused by name."""
        where = {key: row for row, key in enumerate(self.keys())}
        try:
            return np.array([where[key] for key in keys], np.int64)
        except KeyError as error:
            raise ValueError(
                f"the cache in {self.folder} lacks pair {error.args[0]!r}; use the cache that the tree was built from."
            ) from error

    def _lines(self, name: str, field: str, count: int) -> Iterator[dict[str, Any]]:
        for number, value in enumerate(self._values(name, count), 1):
            if not isinstance(value, dict) or field not in value:
                raise ValueError(f"{self.folder / name}, line {number} has no {field!r}; make the cache again.")
            yield value

    def _values(self, name: str, count: int) -> Iterator[Any]:
        """The JSON value of every line; exactly `count` of them."""
        path, number = self.folder / name, 0
        if not path.is_file():
            raise ValueError(f"the feature cache in {self.folder} lacks {name}; make it again.")
        with path.open(encoding="utf-8") as lines:
            try:
                for line in lines:
                    number += 1
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} is no JSON about line {number} ({error}); make the cache again.") from error
        if number != count:
            raise ValueError(
                f"{path} has {number} lines, the header says {count}: it is cut off. Make the cache again."
            )


def _map(path: Path, shape: tuple[int, int]) -> Floats:
    if not path.is_file():
        raise ValueError(f"the feature cache in {path.parent} lacks {path.name}; make it again.")
    size, expected = path.stat().st_size, 4 * shape[0] * shape[1]
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, the header says {expected} for {shape}: cut off? Make it again.")
    if not expected:
        return np.empty(shape, np.float32)
    return np.memmap(path, dtype="<f4", mode="r", shape=shape)


def write(
    folder: Path,
    *,
    image: Floats,
    caption: Floats,
    phrase: Floats,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    phrases: Sequence[str],
    phrase_rows: Sequence[Sequence[int]],
    fingerprint: str,
    model: str = "made up",
    source: str = "made up",
) -> FeatureCache:
    """Write a finished cache from arrays (N, D), (N, D), (P, D) and lists, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("image", image), ("caption", caption), ("phrase", phrase)):
        with (folder / f"{name}.f32").open("wb") as out:
            for part in blocks(len(array)):
                np.ascontiguousarray(array[part], dtype="<f4").tofile(out)
    _write_lines(folder / "keys.jsonl", ({"key": k, "captions": list(c)} for k, c in zip(keys, captions, strict=True)))
    pairs = zip(phrases, phrase_rows, strict=True)
    _write_lines(folder / "phrases.jsonl", ({"phrase": text, "count": len(rows)} for text, rows in pairs))
    _write_lines(folder / "phrase_rows.jsonl", ([int(r) for r in rows[:ROWS_PER_PHRASE]] for rows in phrase_rows))
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "model": model,
        "dimension": int(image.shape[1]),
        "pairs": len(image),
        "phrases": len(phrase),
        "dtype": "float32",
        "source": source,
        "skipped": {},
        "complete": True,
    }
    aside = folder / f".{HEADER}"
    aside.write_text(json.dumps(header), encoding="utf-8")
    aside.replace(folder / HEADER)
    return FeatureCache.open(folder)


def _write_lines(path: Path, values: Iterator[Any]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for value in values:
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
