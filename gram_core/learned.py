"""How the methods tune, and what meta-training left beside a model: weights, and the prototypes they go with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gram_core import gram
from gram_core.adapt import UPDATES
from gram_core.backbone import file_sha256
from gram_core.checkpoint import Checkpoint, load_checkpoint
from gram_core.errors import InvalidCheckpoint
from gram_core.prompts import METHODS
from prototypes.bank import PrototypeBank, load_bank


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How a method steps and sees: one configuration for all data."""

    steps: int
    views: int
    lr: Mapping[str, float]
    update: str
    view_scale: tuple[float, float]
    keep: float = 1.0
    root: bool = True  # rehearsed in the joint loss


# Chosen on the choosing sets (benchmarks/RESULTS.md): mild crops, small steps; strong crops and 1e-3 lost on CIFAR-10.
INFOMAX = TuneConfig(steps=20, views=8, lr={"residual": 2e-4, "coop": 2e-3}, update="rms", view_scale=(0.85, 1.0))
TPT = TuneConfig(
    steps=1, views=64, lr={"coop": 5e-3, "residual": 1e-3}, update="sign", view_scale=(0.08, 1.0), keep=0.1
)


@dataclass(frozen=True, eq=False)
class Learned:
    """What meta-training left: weights, and the prototypes they were learned with."""

    checkpoint: Checkpoint
    bank: PrototypeBank


def load_learned(folder: Path, fingerprint: str) -> tuple[Learned | None, str | None]:
    """Checkpoint and bank in `folder`, or the reason why there are none.

    Raises InvalidCheckpoint or FingerprintMismatch when they are there and can't be used.
    """
    checkpoint = load_checkpoint(folder, fingerprint=fingerprint)
    if checkpoint is None:
        return None, "no GRAM checkpoint lies beside this model"
    try:
        bank = load_bank(folder, fingerprint=fingerprint)
    except ValueError as error:
        raise InvalidCheckpoint(f"the prototype bank of the checkpoint can't be used: {error}") from error
    if bank is None:
        raise InvalidCheckpoint(f"{folder} holds a checkpoint without its prototype bank; restore bank.safetensors.")
    if file_sha256(folder / "bank.safetensors") != checkpoint.bank_sha256:
        raise InvalidCheckpoint(f"the checkpoint in {folder} was trained with another prototype bank; restore that.")
    first = checkpoint.params.get("amounts.hidden")
    for name, w in gram.init(hidden=gram.HIDDEN if first is None else first.shape[-1]).items():
        got = checkpoint.params.get(name)
        if got is None or got.shape != w.shape:
            raise InvalidCheckpoint(f"the checkpoint in {folder} lacks `{name}`, or has another shape; train it again.")
    return Learned(checkpoint, bank), None


def config_of(checkpoint: Checkpoint) -> TuneConfig:
    """How the checkpoint was trained to tune; raises InvalidCheckpoint where its header doesn't say, or where that is
    not what `Classifier` does."""
    try:
        s: Any = checkpoint.settings
        scale = (float(s["view_scale"][0]), float(s["view_scale"][1]))
        lr = {str(s["host"]): float(s["lr"])}
        _ = METHODS[str(s["host"])], UPDATES[str(s["update"])]
        return TuneConfig(
            steps=int(s["steps"]),
            views=int(s["views"]),
            lr=lr,
            update=str(s["update"]),
            view_scale=scale,
            root=bool(s.get("root", True)),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidCheckpoint(f"the checkpoint's settings can't be read ({error!r}); train it again.") from error
