"""Stage `features`: what the untouched classifier says about every cached view (the soft targets of all steps)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from towers import pixels_to_input, resize
from views import Views

log = logging.getLogger("gram-mini.features")


def traced(trunk: nn.Module, size: int) -> nn.Module:
    """The trunk as a frozen traced module: about twice as fast for inference."""
    example = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return torch.jit.freeze(torch.jit.trace(trunk.eval(), example))  # type: ignore[no-any-return, no-untyped-call]


@torch.inference_mode()
def trunk_features(trunk: nn.Module, pixels: NDArray[np.uint8], size: int, *, batch: int = 64) -> Tensor:
    """(M, 1280) pooled features of (M, S, S, 3) uint8 pixels seen at `size`."""
    out, start = [], time.monotonic()
    for at in range(0, len(pixels), batch):
        out.append(trunk(resize(pixels_to_input(pixels[at : at + batch]), size)).half())
        if at % (batch * 100) == 0 and at:
            log.info("%d of %d, %.0f images/s", at, len(pixels), at / (time.monotonic() - start))
    return torch.cat(out)


def build_features(trunk: nn.Module, views: Views, size: int, out: Path) -> None:
    """Write features.npy, (M, 1280) float16."""
    features = trunk_features(traced(trunk, size), views.pixels, size)
    np.save(out / "features.partial.npy", features.numpy())
    (out / "features.partial.npy").rename(out / "features.npy")


class Classifier1000:
    """The classifier's last layer: features to probabilities of the 1,000 ImageNet classes, in WordNet-id order."""

    def __init__(self, weights: dict[str, NDArray[np.float32]]) -> None:
        last = max(n[:-2] for n in weights if n.endswith("_w"))
        self.weight = torch.from_numpy(np.float32(weights[f"{last}_w"])).flatten(1)[1:]
        self.bias = torch.from_numpy(np.float32(weights[f"{last}_b"]))[1:]

    def __call__(self, features: Tensor) -> Tensor:
        return torch.softmax(features.float() @ self.weight.T + self.bias, dim=-1)
