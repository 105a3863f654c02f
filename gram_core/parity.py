"""Whether this installation, on this device, gives open_clip's zero-shot numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gram_core.backbone import Reference, load
from gram_core.text import START_TEMPLATE, TextEncoder

TOLERANCE = 1e-5  # float32; the same arithmetic in another order stays near 1e-7
NAMES = (
    "cat",
    "a dog",
    "fire engine",
    "oystercatcher",
    "Brandenburg Gate at night",
    "3 1/2 inch floppy disk",
    "\u00e9clair",
)
SIZES = ((224, 224), (97, 310), (640, 48), (33, 33))


def parity(model: str = "gram-mini", *, device: str = "auto", model_dir: Path | None = None) -> float:
    """The largest difference, in float32, of class features and zero-shot cosines from open_clip's own on a CPU.

    Four pictures of noise and seven names go both ways. Needs memory for the model twice.
    """
    backbone = load(model, device=device, precision="fp32", model_dir=model_dir)
    texts = TextEncoder(backbone)
    pixels = torch.stack([backbone.preprocess(_noise(seed, size)) for seed, size in enumerate(SIZES)])
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        words = texts.features(texts.class_set(NAMES)).float().cpu()
        images = backbone.encode_images(pixels).cpu()
    their_images, their_words = Reference(model, model_dir).features(pixels, [_text(name) for name in NAMES])
    pairs = ((words, their_words), (images @ words.T, their_images @ their_words.T))
    return max(float((ours - theirs).abs().max().nan_to_num(torch.inf)) for ours, theirs in pairs)


def _text(name: str) -> str:
    return START_TEMPLATE.replace("{}", name)


def _noise(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
