"""What meta-training leaves behind for the server: `gram.safetensors` beside `gram.json`.

The header says which model, bank, regulator and settings the weights belong to, and how they came about: a checkpoint
explains itself. Read back whole or not at all; the digest of the tensors file tells two checkpoints apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gram_core.backbone import file_sha256
from gram_core.errors import FingerprintMismatch, InvalidCheckpoint
from gram_core.regulators import REGULATORS
from gram_core.types import Params
from prototypes import store

NAME, KIND, FORMAT = "gram", "GRAM checkpoint", 1
ARRAYS, HEADER = f"{NAME}.safetensors", f"{NAME}.json"
REMAKE = "train it again (python -m gram_core.train)"

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that was learned, and what it needs to be used.

    Args:
        params: float32 tensors with a leading E of 1, named `part.name` ("regulator.residual.u", "start.u").
        regulator: a name in `regulators.REGULATORS`.
        settings: what the server needs to tune as in training: host, steps, views, view_scale, update, lr.
        fingerprint: the model; bank_sha256: the tensors file of the prototype bank that was trained with.
        facts: configuration, seeds, counts of the data and metrics on held-out themes, for a person.
        sha256: of the tensors file; filled in by `save_checkpoint` and `load_checkpoint`.
    """

    params: Params
    regulator: str
    settings: Mapping[str, JSON]
    fingerprint: str
    bank_sha256: str
    facts: Mapping[str, JSON] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.fingerprint), "it has no fingerprint")
        _require(
            self.regulator in REGULATORS,
            f"its regulator is {self.regulator!r}, this version knows {', '.join(REGULATORS)}",
        )
        for name, tensor in self.params.items():
            shape = tuple(tensor.shape)
            _require(
                tensor.dtype == torch.float32 and len(shape) > 1 and shape[0] == 1,
                f"`{name}` is {str(tensor.dtype).removeprefix('torch.')} {shape}, expected float32 with a leading 1",
            )
            _require(bool(tensor.isfinite().all()), f"`{name}` holds values that are not finite")

    def part(self, name: str) -> Params:
        """The weights of one part, by their names inside it."""
        return {key.removeprefix(f"{name}."): w for key, w in self.params.items() if key.startswith(f"{name}.")}


def _require(kept: bool, what: str) -> None:
    if not kept:
        raise InvalidCheckpoint(f"this is no {KIND}: {what}; {REMAKE}, or restore it.")


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write it into `folder`, in place of an older one, and give it back with its digest."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in checkpoint.params.items()}
    header: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "bank_sha256": checkpoint.bank_sha256,
        "regulator": checkpoint.regulator,
        "settings": dict(checkpoint.settings),
        "facts": dict(checkpoint.facts),
    }
    store.write(folder, NAME, arrays, header)
    return replace(checkpoint, sha256=file_sha256(folder / ARRAYS))


def load_checkpoint(folder: Path, *, fingerprint: str | None) -> Checkpoint | None:
    """The checkpoint in `folder`, made for the model `fingerprint` (None: any); None where the folder has none.

    Raises FingerprintMismatch for another model's, InvalidCheckpoint for what is cut off, changed, of another format,
    without its other half, or not finite.
    """
    if not any((folder / name).exists() for name in (ARRAYS, HEADER)):
        return None
    try:
        arrays, header = store.read(folder, NAME, kind=KIND, format=FORMAT, fingerprint=None, remake=REMAKE)
    except ValueError as error:
        raise InvalidCheckpoint(str(error)) from error
    try:
        made = Checkpoint(
            params={name: torch.from_numpy(array) for name, array in arrays.items()},
            regulator=str(header["regulator"]),
            settings=dict(header["settings"]),
            fingerprint=str(header["fingerprint"]),
            bank_sha256=str(header["bank_sha256"]),
            facts=dict(header["facts"]),
            sha256=str(header["arrays_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{folder / HEADER} is not a checkpoint's header ({error!r}); {REMAKE}.") from error
    if fingerprint is not None and made.fingerprint != fingerprint:
        raise FingerprintMismatch(
            f"the {KIND} in {folder} was made for model {made.fingerprint[:16]}, the loaded model is "
            f"{fingerprint[:16]}; {REMAKE} with this model, or remove it."
        )
    return made
