"""Folders of images through a client: found, sent one request after the other, and told as rows in their order.

One request is in memory and under way at a time, so that a run never makes the server shed its own adaptation.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.answers import EMPTY
from server.client import AROUND, AsyncGramClient, GramError, pieces
from server.sheets import Sheet, changed
from server.sorting import Sorter

MAGIC_BYTES = 12
NUMBERED = re.compile(r"^image \d+\b")
ONE_REQUEST = frozenset({408, 413, 429, 500, 503, 504})  # refusals that say nothing about the requests to come
PATIENCE = 5  # times the server's longest deadline: a request and its retries


@dataclass(frozen=True)
class Found:
    """Image files in their order, and files in folders that are no images by their first bytes."""

    images: list[Path]
    left_out: list[Path]


@dataclass
class Tally:
    """The counts of a run."""

    images: int = 0
    failed: int = 0
    unsorted: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row."""
        self.images += 1
        if row["error"] is not None:
            self.failed += 1
            return
        self.labels[row["label"]] += 1
        self.changed[row["label"]] += changed(row)

    def told(self) -> dict[str, int]:
        """As JSON."""
        return {"images": self.images, "failed": self.failed, "changed": self.changed.total()}


@dataclass(frozen=True)
class Part:
    """The rows of one request, and its answer; None if there was none."""

    rows: list[dict[str, Any]]
    answer: Mapping[str, Any] | None


def find(paths: Iterable[Path], besides: Path | None = None) -> Found:
    """Files as they are named, and below folders all JPEG, PNG and WEBP files; not what lies in `besides`.

    Raises FileNotFoundError for a path that is not there.
    """
    found = Found([], [])
    seen: set[Path] = set()
    skipped = None if besides is None else besides.resolve()
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(path)
            _add(found.images, path, seen)
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if skipped is None or Path(folder, name).resolve() != skipped)
            for file in (Path(folder, name) for name in sorted(names)):
                if file.is_file():
                    _add(found.images if is_image(file) else found.left_out, file, seen)
    return found


def is_image(file: Path) -> bool:
    """Whether the first bytes are a JPEG's, PNG's or WEBP's; a file that can't be read is one, to be told as failed."""
    try:
        with file.open("rb") as opened:
            first = opened.read(MAGIC_BYTES)
    except OSError:
        return True
    return first.startswith((b"\xff\xd8", b"\x89PNG\r\n\x1a\n")) or (first[:4] == b"RIFF" and first[8:] == b"WEBP")


async def classify(
    client: AsyncGramClient,
    images: Sequence[Path],
    classes: Sequence[str],
    options: Mapping[str, Any],
    batch: int | None = None,
) -> AsyncIterator[Part]:
    """Requests of at most `batch` images, or of as many as the server takes, with their answers as they come.

    An image without an answer has an error of the server's or of ours; a refusal that would meet every request is
    raised. With `batch` given and scope `batch` the requests are exactly that: too many are the server's error.
    """
    limits = (await client.info())["limits"]
    exact = batch is not None and options.get("scope") == "batch"
    most = min(batch or math.inf, math.inf if exact else limits["max_images"])
    if batch is None and images:
        most = math.ceil(len(images) / math.ceil(len(images) / most))  # about equal: none is adapted to alone
    room = math.inf if exact else limits["max_body_bytes"] - AROUND - 8 * sum(map(len, classes))
    for piece in pieces(images, lambda path: _size(path) + AROUND, int(most), room):
        async for part in _answered(client, piece, classes, options, limits, divisible=not exact):
            yield part


async def run(
    client: AsyncGramClient,
    images: Sequence[Path],
    classes: Sequence[str],
    options: Mapping[str, Any],
    *,
    batch: int | None,
    sheet: Sheet,
    sorter: Sorter | None,
    tally: Tally,
) -> AsyncIterator[int]:
    """Write, sort and count every row; yields how many came. The sheet is complete, however this ends."""
    begun = False
    try:
        async for part in classify(client, images, classes, options, batch):
            if not begun:
                sheet.begin(part.answer)
                begun = True
            for row in part.rows:
                row["index"] = tally.images
                sheet.write(row)
                tally.add(row)
                if sorter is not None and row["error"] is None:
                    try:
                        await asyncio.to_thread(sorter.put, Path(row["path"]), row["label"])
                    except OSError:
                        tally.unsorted += 1
            yield len(part.rows)
    finally:
        if not begun:
            sheet.begin(None)
        sheet.end(tally.told())


async def _answered(
    client: AsyncGramClient,
    piece: Sequence[Path],
    classes: Sequence[str],
    options: Mapping[str, Any],
    limits: Mapping[str, int],
    *,
    divisible: bool,
) -> AsyncIterator[Part]:
    bodies = await asyncio.to_thread(_read, piece, limits["max_image_bytes"])
    refused = [body for body in bodies if not isinstance(body, bytes)]
    if refused and options.get("errors") == "fail":
        raise GramError(0, refused[0][0], None, refused[0][1])
    good = [body for body in bodies if isinstance(body, bytes)]
    answer: Any = None
    failure: tuple[str, str] | None = None
    if good:
        longest_ms = limits["max_timeout_ms"]
        try:
            answer = await client.classify(
                good, classes, timeout_ms=longest_ms, timeout=PATIENCE * longest_ms / 1000, **options
            )
        except GramError as error:
            if error.status == 413 and divisible and len(good) > 1:
                half = len(piece) // 2
                for rest in (piece[:half], piece[half:]):
                    async for part in _answered(client, rest, classes, options, limits, divisible=True):
                        yield part
                return
            if error.status not in ONE_REQUEST and error.code != "timeout":
                raise
            failure = error.code, error.message
    results = iter(answer["results"] if answer is not None else ())
    rows = []
    for path, body in zip(piece, bodies, strict=True):
        if isinstance(body, bytes) and failure is None:
            row = {"path": str(path), **next(results)}
            if row["error"] is not None:  # which counts images of its request
                row["error"] = {**row["error"], "message": NUMBERED.sub("the image", row["error"]["message"], count=1)}
            rows.append(row)
        else:
            code, message = failure if isinstance(body, bytes) and failure else body
            rows.append(
                {"path": str(path), "index": 0, "id": None, **EMPTY, "error": {"code": code, "message": message}}
            )
    yield Part(rows, answer)


def _read(paths: Sequence[Path], most: int) -> list[bytes | tuple[str, str]]:
    """The bytes of each file, or the code and the sentence of its error."""
    found: list[bytes | tuple[str, str]] = []
    for path in paths:
        try:
            size = path.stat().st_size
            if size > most:
                sentence = f"the file has {size} bytes, the limit is {most} (GRAM_MAX_IMAGE_BYTES). Compress it."
                found.append(("image_too_large", sentence))
            else:
                found.append(path.read_bytes())
        except OSError:
            found.append(("unreadable", "the file can't be read. Check that it is still there, and its permissions."))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _add(files: list[Path], file: Path, seen: set[Path]) -> None:
    if file not in seen:
        seen.add(file)
        files.append(file)
