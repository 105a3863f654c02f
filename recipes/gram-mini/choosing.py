"""The choosing sets, as pixels and class names: CIFAR-10 test, Imagenette, Tiny-ImageNet val (seeded subsets)."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from sources import Bytes, decode_square, require
from torch import Tensor, nn
from torch.nn import functional as F
from towers import encode_text, pixels_to_input, resize

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Labelled:
    """Images (M, S, S, 3) uint8, their class positions and the class names."""

    name: str
    pixels: Bytes
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def list_zip(path: Path, prefix: str) -> tuple[list[str], list[str]]:
    """File names below a prefix and the folder each lies in."""
    with zipfile.ZipFile(path) as archive:
        files = sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".jpg"))
    return files, [n[len(prefix) :].split("/")[0] for n in files]


def class_name(folder: str) -> str:
    """The name a user would type for a folder of a measuring set: no WordNet id, no underscores."""
    if folder[:1] == "n" and folder[1:9].isdigit():
        folder = folder[10:]
    return folder.replace("_", " ")


def read_labelled(name: str, path: Path, prefix: str, *, size: int, limit: int, seed: int) -> Labelled:
    """A seeded subset of at most `limit` images."""
    files, folders = list_zip(require(path, name), prefix)
    classes = sorted(set(folders))
    keep: Sequence[int] = range(len(files))
    if len(files) > limit:
        keep = sorted(np.random.default_rng(seed).permutation(len(files))[:limit].tolist())
    with zipfile.ZipFile(path) as archive:
        pixels = np.stack([decode_square(archive.read(files[i]), size) for i in keep])
    labels = np.array([classes.index(folders[i]) for i in keep])
    return Labelled(name, pixels, labels, tuple(class_name(c) for c in classes))


def choosing_sets(data: Path, *, size: int, limit: int, seed: int) -> list[Labelled]:
    """The three sets on which anything may be chosen."""
    spec = [("cifar10", "cifar10.zip", "test/"), ("imagenette", "imagenette.zip", ""),
            ("tiny-imagenet-val", "tiny-imagenet-32.zip", "val/")]  # fmt: skip
    return [read_labelled(n, data / f, p, size=size, limit=limit, seed=seed) for n, f, p in spec]


@torch.inference_mode()
def image_features(model: nn.Module, pixels: Bytes, size: int, *, batch: int = 64) -> Tensor:
    """(M, D) unit features of (M, S, S, 3) pixels."""
    model.eval()
    parts = []
    for at in range(0, len(pixels), batch):
        x = resize(pixels_to_input(pixels[at : at + batch]), size)
        parts.append(F.normalize(model.visual(x).float(), dim=-1))
    return torch.cat(parts)


@torch.inference_mode()
def text_logits(model: nn.Module, images: list[Tensor], sets: list[Labelled], context: int) -> list[Tensor]:
    """Cosines of the images of each set to its classes in the one template."""
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    texts = [encode_text(model, tokenizer([TEMPLATE.replace("{}", c) for c in s.classes])) for s in sets]
    return [i @ t.T for i, t in zip(images, texts, strict=True)]


def accuracies(sets: list[Labelled], logits: list[Tensor]) -> str:
    """Top-1 in per cent, as a line for the log."""
    shares = [(x.argmax(dim=1).numpy() == s.labels).mean() for s, x in zip(sets, logits, strict=True)]
    return ", ".join(f"{s.name} {100 * a:.1f}" for s, a in zip(sets, shares, strict=True))


def best_scale(sets: list[Labelled], cosines: list[Tensor]) -> float:
    """The logit scale, at most 100, with the smallest mean log loss over the sets."""
    scales = [float(s) for s in np.geomspace(5.0, 100.0, 61)]
    labels = [torch.from_numpy(s.labels) for s in sets]
    losses = [sum(float(F.cross_entropy(k * x, y)) for x, y in zip(cosines, labels, strict=True)) for k in scales]
    return scales[int(np.argmin(losses))]
