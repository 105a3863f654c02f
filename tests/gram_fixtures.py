"""What meta-training leaves beside a model, without the training: a tiny bank and weights drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gram_core import gram
from gram_core.backbone import Backbone, file_sha256
from gram_core.checkpoint import Checkpoint, save_checkpoint
from gram_core.classifier import Learned
from gram_core.types import Params
from prototypes.bank import PrototypeBank, load_root, save_bank, save_root
from prototypes.hierarchy import CONCEPT, MODE, ROOT, THEME
from prototypes.vectors import Floats, unit

THEMES, CONCEPTS, MODES = 2, 6, 12
CONCEPT_NAMES = tuple(f"thing {c}" for c in range(CONCEPTS))
STEPS, VIEWS = 4, 4


def tiny_bank(backbone: Backbone, seed: int = 0, names: Sequence[str] = CONCEPT_NAMES) -> PrototypeBank:
    """Two themes of three concepts of two modes; a mode is the mean feature of four noisy images of one colour."""
    rng = np.random.default_rng([seed, 1])
    side = backbone.image_size
    colours = rng.normal(0, 1, (MODES, 1, 3, 1, 1))
    pixels = (colours + rng.normal(0, 0.7, (MODES, 4, 3, side, side))).astype(np.float32)
    features = backbone.encode_images(torch.from_numpy(pixels.reshape(-1, 3, side, side))).float().cpu().numpy()
    modes = unit(features.reshape(MODES, 4, -1).mean(1))
    concepts, themes = (unit(modes.reshape(count, -1, modes.shape[1]).mean(1)) for count in (CONCEPTS, THEMES))
    visual: Floats = np.concatenate([unit(modes.mean(0))[None], themes, concepts, modes]).astype(np.float32)
    sizes = (1, THEMES, CONCEPTS, MODES)
    whole = len(visual)
    above = [0] * THEMES, [1 + c // 3 for c in range(CONCEPTS)], [1 + THEMES + m // 2 for m in range(MODES)]
    by_concept = [str(name) for name in names]
    return PrototypeBank(
        visual=visual,
        text=unit(rng.normal(0, 1, visual.shape)).astype(np.float32),
        concentration=np.ones(whole, np.float32),
        kappa=np.full(whole, 0.5, np.float32),
        parent=np.array([-1, *above[0], *above[1], *above[2]], np.int64),
        level=np.repeat([ROOT, THEME, CONCEPT, MODE], sizes).astype(np.int64),
        node=np.arange(whole, dtype=np.int64),
        count=np.repeat([4 * MODES // size for size in sizes], sizes).astype(np.int64),
        visual_mean=features.mean(0).astype(np.float32),
        text_mean=np.zeros(visual.shape[1], np.float32),
        names=("everything", *(f"theme {t}" for t in range(THEMES)), *by_concept, *np.repeat(by_concept, 2).tolist()),
        medoids=("",) * (whole - MODES) + tuple(f"tiny/{m:06d}" for m in range(MODES)),
        fingerprint=backbone.fingerprint,
        source="<noise>",
    )


def seeded_weights(seed: int = 0) -> Params:
    """`gram.init` with an output layer that is no longer zero: amounts depend on the request. Trusts every request."""
    generator = torch.Generator().manual_seed(seed)
    weights = gram.init(generator)
    for name in ("amounts.out", "amounts.out_bias", "amounts.hidden_bias"):
        weights[name] = weights[name] + 0.5 * torch.randn(weights[name].shape, generator=generator)
    return weights


def tiny_checkpoint(backbone: Backbone, seed: int = 0, bank_sha256: str = "") -> Checkpoint:
    """Seeded weights, with settings that take few steps and views."""
    settings = {
        "host": "residual",
        "steps": STEPS,
        "views": VIEWS,
        "lr": 2e-4,
        "update": "rms",
        "root": 0.5,
        "view_scale": [0.85, 1.0],
    }
    return Checkpoint(
        params=seeded_weights(seed),
        regulator="identity",
        settings=settings,  # type: ignore[arg-type]  # a list of numbers is JSON
        fingerprint=backbone.fingerprint,
        bank_sha256=bank_sha256,
        facts={"seed": seed},
    )


def tiny_learned(backbone: Backbone, seed: int = 0, names: Sequence[str] = CONCEPT_NAMES) -> Learned:
    """Checkpoint and bank in memory; the checkpoint has no digest."""
    return Learned(tiny_checkpoint(backbone, seed), tiny_bank(backbone, seed, names))


def write_checkpoint(
    folder: Path, backbone: Backbone, seed: int = 0, names: Sequence[str] = CONCEPT_NAMES
) -> Checkpoint:
    """Bank and checkpoint in `folder`, as training leaves them, and a root beside them if there is none."""
    bank = tiny_bank(backbone, seed, names)
    save_bank(folder, bank)
    if load_root(folder, fingerprint=backbone.fingerprint) is None:
        save_root(folder, bank.root)
    return save_checkpoint(folder, tiny_checkpoint(backbone, seed, file_sha256(folder / "bank.safetensors")))
