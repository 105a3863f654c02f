"""Augmentation of whole batches as tensors: crop and flip, colour, blur by low resolution, grey, noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def augment(x: Tensor, size: int, rng: np.random.Generator, *, smallest: float = 0.7) -> Tensor:
    """(B, 3, S, S) in [-1, 1] to (B, 3, size, size): each image gets its own draw, then the range is clipped."""
    x = _crop_and_flip(x, size, rng, smallest)
    count = len(x)
    gain = _draw(rng, count, 0.7, 1.3)
    tint = torch.from_numpy(rng.uniform(0.88, 1.12, size=(count, 3, 1, 1)).astype(np.float32))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = ((x - mean) * gain + mean) * tint + _draw(rng, count, -0.25, 0.25)
    grey = x.mean(dim=1, keepdim=True)
    saturation = _draw(rng, count, 0.3, 1.5) * torch.from_numpy((rng.random((count, 1, 1, 1)) > 0.1).astype(np.float32))
    x = grey + (x - grey) * saturation
    for i in np.flatnonzero(rng.random(count) < 0.2):
        side = int(rng.integers(28, 80))
        small = F.interpolate(x[i : i + 1], size=(side, side), mode="bilinear", antialias=True)
        x[i] = F.interpolate(small, size=(size, size), mode="bicubic")[0]
    noisy = torch.from_numpy((rng.random((count, 1, 1, 1)) < 0.15).astype(np.float32))
    if noisy.any():
        x = x + 0.06 * noisy * torch.randn_like(x)
    return x.clamp_(-1.0, 1.0).contiguous(memory_format=torch.channels_last)


def _draw(rng: np.random.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, size=(count, 1, 1, 1)).astype(np.float32))


def _crop_and_flip(x: Tensor, size: int, rng: np.random.Generator, smallest: float) -> Tensor:
    """One affine resampling: area at least `smallest`, aspect within 4:5, small rotation, mirror half the time."""
    count = len(x)
    area = rng.uniform(smallest, 1.0, count)
    aspect = np.exp(rng.uniform(-0.22, 0.22, count))
    wide, high = np.sqrt(area * aspect).clip(max=1.0), np.sqrt(area / aspect).clip(max=1.0)
    angle = rng.normal(0.0, math.radians(5.0), count)
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = wide * np.cos(angle) * mirror, -high * np.sin(angle)
    theta[:, 1, 0], theta[:, 1, 1] = wide * np.sin(angle) * mirror, high * np.cos(angle)
    theta[:, 0, 2] = rng.uniform(-1.0, 1.0, count) * (1.0 - wide)
    theta[:, 1, 2] = rng.uniform(-1.0, 1.0, count) * (1.0 - high)
    grid = F.affine_grid(torch.from_numpy(theta), [count, 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
