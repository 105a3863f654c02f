"""Restylings of a photo: the same content in another visual domain, for free.

Each takes and returns (H, W, 3) uint8 and draws its strength from the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Restyle = Callable[[Bytes, np.random.Generator], Bytes]


def _grey(image: Bytes) -> Bytes:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _rgb(grey: NDArray[np.float32]) -> Bytes:
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def sketch(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Pencil: colour dodge of the grey image with its blurred negative."""
    grey = _grey(image).astype(np.float32)
    blurred = cv2.GaussianBlur(255.0 - grey, (0, 0), float(rng.uniform(1.5, 5.0)))
    dodge = np.minimum(255.0, grey * 255.0 / (256.0 - np.asarray(blurred, dtype=np.float32)))
    return _rgb((255.0 * (dodge / 255.0) ** float(rng.uniform(1.0, 3.0))).astype(np.float32))


def edges(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Thin dark contours on white, as in a quick drawing."""
    smooth = cv2.GaussianBlur(_grey(image), (0, 0), float(rng.uniform(0.8, 2.2)))
    low = float(rng.uniform(20, 60))
    lines = cv2.Canny(smooth, low, low * 2.5)
    if rng.random() < 0.5:
        lines = cv2.dilate(lines, np.ones((2, 2), np.uint8))
    return _rgb(255.0 - np.asarray(cv2.GaussianBlur(lines, (0, 0), 0.6), dtype=np.float32))


def ink(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Ink drawing: a thresholded difference of Gaussians (XDoG)."""
    grey = _grey(image).astype(np.float32) / 255.0
    sigma = float(rng.uniform(0.7, 1.8))
    near, far = cv2.GaussianBlur(grey, (0, 0), sigma), cv2.GaussianBlur(grey, (0, 0), 1.6 * sigma)
    dog = near - float(rng.uniform(0.94, 0.99)) * far
    level = float(rng.uniform(-0.01, 0.02))
    out = np.where(dog > level, 1.0, 1.0 + np.tanh(float(rng.uniform(15, 60)) * (dog - level)))
    return _rgb((255.0 * out).astype(np.float32))


def cartoon(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Flat colours with dark outlines."""
    flat = image
    for _ in range(3):
        flat = np.asarray(cv2.bilateralFilter(flat, 7, 40, 7), dtype=np.uint8)
    levels = int(rng.integers(4, 9))
    step = 256 // levels
    flat = (flat // step * step + step // 2).astype(np.uint8)
    hsv = cv2.cvtColor(flat, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 1] *= float(rng.uniform(1.0, 1.8))
    flat = np.asarray(cv2.cvtColor(np.clip(hsv, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB), dtype=np.uint8)
    lines = cv2.adaptiveThreshold(
        cv2.medianBlur(_grey(image), 5), 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 9, float(rng.uniform(4, 9))
    )
    return np.asarray(cv2.bitwise_and(flat, flat, mask=lines), dtype=np.uint8)


def painting(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Brush-like patches of one colour, a canvas grain and a shifted palette."""
    out = cv2.pyrMeanShiftFiltering(image, int(rng.integers(4, 9)), int(rng.integers(18, 40)), maxLevel=1)
    out = cv2.medianBlur(out, int(rng.choice([3, 5]))).astype(np.float32)
    gain = rng.uniform(0.8, 1.2, size=(1, 1, 3))
    grain = rng.normal(0.0, rng.uniform(2, 8), size=(*image.shape[:2], 1))
    return np.clip(out * gain + grain, 0, 255).astype(np.uint8)


def low_resolution(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Down to 24-48 pixels and back."""
    side = int(rng.integers(24, 49))
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


RESTYLES: dict[str, Restyle] = {
    "sketch": sketch,
    "edges": edges,
    "ink": ink,
    "cartoon": cartoon,
    "painting": painting,
    "low_resolution": low_resolution,
}
