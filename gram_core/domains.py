"""Photographs restyled into other visual domains: pencil, contour and cartoon, with Pillow and numpy alone.

They give meta-training a gap that photographs lack. All are deterministic, and none of them is among the corruptions
that the harness measures on (gram_core/evaluate/corruptions.py), which stay unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

__all__ = ["DOMAINS", "Restyle", "cartoon", "contour", "pencil"]

Restyle = Callable[[Image.Image], Image.Image]
"""An RGB image to another of the same form, at least `SHORT` pixels on its short side."""

SHORT = 128  # strokes are a pixel or two wide: smaller images are enlarged first, or nothing but strokes is left
SHADE = 3.0  # radius of the pencil's blur
FINE, COARSE, SHARE = 1.0, 1.6, 0.97  # the two scales of the contour, and how much of the coarse one is subtracted
SLOPE = 40.0  # how fast ink darkens below the threshold
MODE, BITS, COLOUR = 5, 3, 1.6  # the cartoon's filter size, bits per channel, saturation


def pencil(image: Image.Image) -> Image.Image:
    """Grey strokes on white: the image divided by its blurred negative (colour dodge)."""
    grey = ImageOps.grayscale(_large(image))
    blurred = np.asarray(ImageChops.invert(grey).filter(ImageFilter.GaussianBlur(SHADE)), np.float32)
    dodged = np.minimum(255.0, np.asarray(grey, np.float32) * 255.0 / (256.0 - blurred))
    return _grey(np.square(dodged / 255.0))


def contour(image: Image.Image) -> Image.Image:
    """Ink lines on white where a difference of Gaussians is negative (XDoG, Winnemoeller et al. 2012)."""
    return _grey(_lines(_large(image)))


def cartoon(image: Image.Image) -> Image.Image:
    """Flat, few and strong colours inside dark contours."""
    image = _large(image)
    flat = ImageOps.posterize(image.filter(ImageFilter.ModeFilter(MODE)), BITS)
    strong = np.asarray(ImageEnhance.Color(flat).enhance(COLOUR), np.float32)
    return Image.fromarray((strong * np.where(_lines(image) > 0.5, 1.0, 0.1)[..., None]).astype(np.uint8))


DOMAINS: dict[str, Restyle] = {"pencil": pencil, "contour": contour, "cartoon": cartoon}


def _large(image: Image.Image) -> Image.Image:
    short = min(image.size)
    if short >= SHORT:
        return image
    width, height = (max(SHORT, round(side * SHORT / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _lines(image: Image.Image) -> NDArray[np.float32]:
    """(H, W) 1 on paper, towards 0 in ink."""
    grey = ImageOps.grayscale(image)
    fine, coarse = (np.asarray(grey.filter(ImageFilter.GaussianBlur(r)), np.float32) / 255.0 for r in (FINE, COARSE))
    edge = fine - SHARE * coarse
    lines: NDArray[np.float32] = np.where(edge > 0, 1.0, 1.0 + np.tanh(SLOPE * edge)).astype(np.float32)
    return lines


def _grey(values: NDArray[np.float32]) -> Image.Image:
    """(H, W) in [0, 1] as an RGB image."""
    return Image.fromarray((values * 255.0).clip(0, 255).astype(np.uint8)).convert("RGB")
