"""Seeded views of one image: crops and flips, made as tensors on the device from the decoded pixels.

View 0 is the original as the model's own preprocessing sees it; the others are random resized crops with a
horizontal flip half of the time. Every draw depends on (seed, SHA-256 of the encoded image, view) and on nothing
else, so equal images get equal views wherever they stand and whoever shares the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from gram_core.backbone import Backbone
from gram_core.images import DecodedImage

WORKING = 4  # short side of the pixels that crops are cut from, in tower inputs; a crop of 1/16 keeps full detail


@dataclass(frozen=True)
class Box:
    """One crop in pixels of the working image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image ready for the engine: the original's (3, size, size) float32 tensor and uint8 pixels (3, H, W)."""

    original: Tensor
    pixels: Tensor
    sha256: bytes
    width: int
    height: int
    format: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by the two tensors."""
        return self.original.numel() * 4 + self.pixels.numel()


def prepare(backbone: Backbone, image: DecodedImage) -> Prepared:
    """Preprocess on the CPU, from any thread. Images far larger than the tower needs are reduced once."""
    rgb = image.rgb
    short = min(rgb.size)
    limit = WORKING * backbone.image_size
    original = backbone.preprocess(rgb)
    if short > limit:
        ratio = limit / short
        rgb = rgb.resize((max(1, round(rgb.width * ratio)), max(1, round(rgb.height * ratio))), reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.uint8)).permute(2, 0, 1)  # channels last in memory
    return Prepared(original, pixels, image.sha256, image.width, image.height, image.format, image.notes)


def boxes(sha256: bytes, size: tuple[int, int], views: int, seed: int, scale: tuple[float, float]) -> list[Box]:
    """The crops of views 1..views-1 of an image of `size` (height, width).

    Area fraction uniform in `scale`, aspect ratio log-uniform in [3/4, 4/3], ten tries, else the largest centred
    crop of an allowed ratio (Szegedy et al., CVPR 2015; the defaults of random-resized-crop).
    """
    height, width = size
    words = np.frombuffer(sha256, dtype=np.uint32).tolist()
    return [_box(np.random.default_rng([seed, view, *words]), height, width, scale) for view in range(1, views)]


def _box(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> Box:
    flip = bool(rng.integers(2))
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, flip)
    h, w = height, width
    if w / h < 3 / 4:
        h = max(1, round(w * 4 / 3))
    elif w / h > 4 / 3:
        w = max(1, round(h * 4 / 3))
    return Box((height - h) // 2, (width - w) // 2, h, w, flip)


def cut(backbone: Backbone, image: Prepared, crops: list[Box]) -> Tensor:
    """(len(crops), 3, size, size) preprocessed views on the device, antialiased bilinear."""
    size = [backbone.image_size, backbone.image_size]
    pixels = image.pixels.to(backbone.device)
    made = []
    for box in crops:
        view = tv.resized_crop(
            pixels, box.top, box.left, box.height, box.width, size, InterpolationMode.BILINEAR, antialias=True
        )
        made.append(view.flip(-1) if box.flip else view)
    if not made:
        return torch.zeros(0, 3, *size, device=backbone.device)
    stacked = torch.stack(made).float() / 255
    mean = torch.tensor(backbone.mean, device=backbone.device)[:, None, None]
    std = torch.tensor(backbone.std, device=backbone.device)[:, None, None]
    return (stacked - mean) / std
