"""Views of images that the towers were not fitted on: what meta-training sees instead of pixels.

A regulator that is trained on images which the towers know by heart learns nothing that helps at test time
(docs/method.md). `build` computes mild views of chosen pairs, as they are and restyled, once; `ViewCache` reads them.
It knows nothing of classes, trees or captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gram_core.errors import FingerprintMismatch, InvalidData

__all__ = ["PLAIN", "ViewCache"]

FORMAT = 1
HEADER, ROWS, VIEWS = "header.json", "rows.jsonl", "views.f16"
PLAIN = "plain"  # the domain of images as they are

Halves = NDArray[np.float16]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ViewCache:
    """R rows, each the V views of one image in one domain.

    Args:
        fingerprint: the model whose features these are.
        keys: (R,) key of the pair that the image belongs to; the same key stands in several domains.
        domains: (R,) `plain` or a name of `domains.DOMAINS`.
        features: (R, V, D) half-precision features, view 0 of the original; memory-mapped when opened from disk.
    """

    fingerprint: str
    keys: tuple[str, ...]
    domains: tuple[str, ...]
    features: Halves

    def __post_init__(self) -> None:
        shape = self.features.shape
        if len(shape) != 3 or not len(self.keys) == len(self.domains) == shape[0] or 0 in shape:
            raise InvalidData(
                f"{len(self.keys)} keys, {len(self.domains)} domains and views of shape {shape} are no view cache; "
                "expected (rows, views, dimension) with a key and a domain for every row. Build it again."
            )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dimension(self) -> int:
        return int(self.features.shape[2])

    def views(self, rows: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, V, D) float32 of unit norm."""
        return _unit(self.features[np.asarray(rows, np.int64)])

    def originals(self, rows: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, D) float32 of unit norm: view 0."""
        return _unit(self.features[np.asarray(rows, np.int64), 0])

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None) -> ViewCache:
        """The finished cache in `folder`, made for the model `fingerprint` (None: for any).

        Raises FingerprintMismatch, or InvalidData in words when it is missing, unfinished, cut off or damaged.
        """
        path = folder / HEADER
        try:
            header = json.loads(path.read_bytes())
            stored, complete, form = str(header["fingerprint"]), header["complete"], header["format"]
            shape = tuple(int(header[name]) for name in ("rows", "views", "dimension"))
        except OSError as error:
            raise InvalidData(f"{folder} is no view cache: {path} can't be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{path} is damaged ({error!r}). Delete {folder} and build it again.") from None
        if form != FORMAT:
            raise InvalidData(f"{path} has format {form!r}, this version reads {FORMAT}. Build it again.")
        if complete is not True:
            raise InvalidData(f"the view cache in {folder} is unfinished. Run the step that makes it to its end.")
        if fingerprint is not None and stored != fingerprint:
            raise FingerprintMismatch(
                f"the view cache in {folder} is of model {stored[:16]}, expected {fingerprint[:16]}. "
                "Name another folder, or load that model."
            )
        views, wanted = folder / VIEWS, int(np.prod(shape)) * 2
        if not views.is_file() or views.stat().st_size != wanted:
            size = views.stat().st_size if views.is_file() else 0
            raise InvalidData(f"{views} has {size} bytes, expected {wanted}: it is cut off. Build {folder} again.")
        try:
            rows = [json.loads(line) for line in (folder / ROWS).read_bytes().splitlines()]
            keys, domains = (tuple(str(row[name]) for row in rows) for name in ("key", "domain"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{folder / ROWS} can't be read ({error!r}). Build {folder} again.") from None
        return cls(stored, keys, domains, np.memmap(views, "<f2", "r", shape=shape))


def _unit(features: Halves) -> Floats:
    wide = features.astype(np.float32)
    unit: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return unit
