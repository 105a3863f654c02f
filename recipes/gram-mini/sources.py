"""The training images: read from their archives, split once, and never mixed up again.

Every source is split by a seeded draw over its sorted file keys; the held-out part is written to
`held_out.json` and is not even decoded by the stages that train towers.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
SOURCES = ("flickr8k", "imagenet-samples", "tiny-imagenet-train", "cifar10-train", "noto-emoji")


@dataclass(frozen=True)
class Source:
    """One training source: encoded images by key, with captions or a label (WordNet id) where it has them."""

    name: str
    keys: tuple[str, ...]
    files: tuple[bytes, ...]
    captions: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ()

    def take(self, keep: Sequence[int]) -> Source:
        """The same source with only the items at these positions."""
        return Source(
            self.name,
            tuple(self.keys[i] for i in keep),
            tuple(self.files[i] for i in keep),
            tuple(self.captions[i] for i in keep) if self.captions else (),
            tuple(self.labels[i] for i in keep) if self.labels else (),
        )


def require(path: Path, what: str) -> Path:
    """The path if it exists, else a sentence that names the missing ingredient."""
    if not path.exists():
        raise FileNotFoundError(f"{what} is missing: expected {path}. Give the folder that holds it.")
    return path


def split_keys(name: str, keys: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions (kept, held out): a draw that depends on the source's name, its keys and the seed only."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shuffled = [order[i] for i in rng.permutation(len(order))]
    cut = round(len(order) * fraction)
    return sorted(shuffled[cut:]), sorted(shuffled[:cut])


def _read_shards(name: str, paths: Sequence[Path]) -> Source:
    images: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                handle = tar.extractfile(member)
                if handle is None:
                    continue
                key, _, suffix = member.name.rpartition(".")
                if suffix == "jpg":
                    images[key] = handle.read()
                elif suffix == "txt":
                    texts[key] = handle.read().decode("utf-8")
    keys = sorted(images)
    captions = tuple(tuple(x.strip() for x in texts[k].splitlines() if x.strip()) for k in keys)
    return Source(name, tuple(keys), tuple(images[k] for k in keys), captions)


def _read_zip(name: str, path: Path, prefix: str, *, labelled: bool) -> Source:
    with zipfile.ZipFile(path) as archive:
        keys = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".jpg"))
        files = tuple(archive.read(k) for k in keys)
    labels = tuple(k[len(prefix) :].split("/")[0].split("-")[0] for k in keys) if labelled else ()
    return Source(name, tuple(keys), files, labels=labels)


def read_source(name: str, data: Path) -> Source:
    """Read one source whole (held-out part included)."""
    if name == "flickr8k":
        shards = sorted(require(data / "flickr8k", "Flickr8k").glob("flickr8k-*.tar"))
        if not shards:
            raise FileNotFoundError(f"Flickr8k is missing: no flickr8k-*.tar in {data / 'flickr8k'}.")
        return _read_shards(name, shards)
    if name == "noto-emoji":
        return _read_shards(name, [require(data / "noto-emoji.tar", "Noto emoji")])
    if name == "imagenet-samples":
        return _read_zip(name, require(data / "imagenet-samples.zip", name), "", labelled=True)
    if name == "tiny-imagenet-train":
        return _read_zip(name, require(data / "tiny-imagenet-32.zip", name), "train/", labelled=True)
    if name == "cifar10-train":
        return _read_zip(name, require(data / "cifar10.zip", name), "train/", labelled=False)
    raise ValueError(f"no training source {name!r}; choose one of {', '.join(SOURCES)}.")


def decode_square(data: bytes, size: int) -> Bytes:
    """Decode to (size, size, 3): short side to `size`, bicubic, centre crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    w, h = image.size
    scale = size / min(w, h)
    if scale != 1.0:
        image = image.resize((round(w * scale), round(h * scale)), Image.Resampling.BICUBIC)
        w, h = image.size
    left, top = (w - size) // 2, (h - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
