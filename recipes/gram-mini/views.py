"""Stage `views`: every kept training image, its crops and its restylings, decoded once to one uint8 file.

A restyled view points to the clean view it was made from (`parent`), whose classifier output is its target.
"""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from restyle import RESTYLES
from settings import Settings
from sources import SOURCES, Bytes, Source, decode_square

log = logging.getLogger("gram-mini.views")
FULL, CROP, FIRST_RESTYLE = 0, 1, 2
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Views:
    """M views: pixels (M, S, S, 3) uint8 (memory-mapped), and for each its source, item, kind and parent view."""

    pixels: Bytes
    source: Ints
    item: Ints
    kind: Ints
    parent: Ints

    def of(self, name: str) -> NDArray[np.int64]:
        """Positions of the views of one source."""
        return np.flatnonzero(self.source == SOURCES.index(name))


def _crop(image: Bytes, rng: np.random.Generator) -> Bytes:
    size = image.shape[0]
    side = round(size * float(rng.uniform(0.45, 0.85)))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    patch = np.ascontiguousarray(image[top : top + side, left : left + side])
    return np.asarray(cv2.resize(patch, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _make(job: tuple[bytes, int, int, int, tuple[int, ...]]) -> tuple[list[Bytes], list[int], list[int]]:
    """All views of one image; parents are positions inside the returned list."""
    data, size, crops, restyles, seed = job
    rng = np.random.default_rng(seed)
    out, kinds, parents = [decode_square(data, size)], [FULL], [0]
    for _ in range(crops):
        out.append(_crop(out[0], rng))
        kinds.append(CROP)
        parents.append(len(out) - 1)
    names = list(RESTYLES)
    for which in rng.permutation(len(names))[:restyles]:
        base = int(rng.integers(0, crops + 1)) if rng.random() < 0.4 else 0
        out.append(RESTYLES[names[which]](out[base], rng))
        kinds.append(FIRST_RESTYLE + int(which))
        parents.append(base)
    return out, kinds, parents


def build_views(sources: dict[str, Source], settings: Settings, out: Path) -> None:
    """Write the cache: `views.npy` (pixels) and `views-index.npz`."""
    cfg = settings.images
    plan = {
        "flickr8k": (cfg.crops_flickr, cfg.restyles_flickr),
        "imagenet-samples": (cfg.crops_imagenet, cfg.restyles_imagenet),
        "tiny-imagenet-train": (0, cfg.restyles_tiny),
        "cifar10-train": (0, 0),
        "noto-emoji": (0, cfg.restyles_emoji),
    }
    jobs, where = [], []
    for number, name in enumerate(SOURCES):
        crops, restyles = plan[name]
        for item, data in enumerate(sources[name].files):
            jobs.append((data, cfg.size, crops, restyles, (settings.seed, number, item)))
            where.append((number, item, 1 + crops + restyles))
    total = sum(n for _, _, n in where)
    pixels = np.lib.format.open_memmap(
        out / "views.partial.npy", mode="w+", dtype=np.uint8, shape=(total, cfg.size, cfg.size, 3)
    )
    index = np.zeros((4, total), np.int32)
    at = 0
    with ProcessPoolExecutor(2) as pool:
        for (number, item, count), (images, kinds, parents) in zip(
            where, pool.map(_make, jobs, chunksize=64), strict=True
        ):
            pixels[at : at + count] = np.stack(images)
            index[:, at : at + count] = [[number] * count, [item] * count, kinds, [at + p for p in parents]]
            at += count
    pixels.flush()
    source, item_, kind, parent = index
    np.savez(out / "views-index.npz", source=source, item=item_, kind=kind, parent=parent)
    (out / "views.partial.npy").rename(out / "views.npy")
    log.info("%d views of %d images", total, len(jobs))


def load_views(work: Path) -> Views:
    """Map the cache of `build_views`."""
    index = np.load(work / "views-index.npz")
    pixels = np.load(work / "views.npy", mmap_mode="r")
    return Views(pixels, index["source"], index["item"], index["kind"], index["parent"])
