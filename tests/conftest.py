"""Tiny real CLIPs, saved as open_clip directories and loaded back through the product's own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gram_core.backbone import Backbone, load
from gram_core.images import DecodedImage
from tests.process_fixtures import start

__all__ = ["start"]

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A seeded random open_clip model as `open_clip_config.json` + safetensors in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(body))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # open_clip starts biases at zero and norms at one; spread them so that a forgotten term shows
            if p.dim() <= 1 and "logit" not in name:
                p.add_(0.05 * torch.randn_like(p))
            if name.endswith(("positional_embedding", "token_embedding.weight")):
                p.mul_(10)
        model.logit_scale.fill_(3.0)
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def reference(folder: Path) -> torch.nn.Module:
    """The same directory through open_clip alone."""
    return open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", TINY)


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Backbone:
    return load(str(tiny_dir), device="cpu")


@pytest.fixture(scope="session")
def make_image() -> Callable[..., DecodedImage]:
    """A seeded textured image of a colour, as the decoder would give it."""

    def make(seed: int = 0, size: tuple[int, int] = (48, 40), colour: int | None = None) -> DecodedImage:
        rng = np.random.default_rng(seed)
        base = np.full(3, 128) if colour is None else np.eye(3)[colour % 3] * 200
        array = np.clip(base + rng.normal(0, 40, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        return DecodedImage(
            rgb=Image.fromarray(array),
            width=size[0],
            height=size[1],
            format="png",
            notes=(),
            sha256=rng.bytes(32),
        )

    return make
