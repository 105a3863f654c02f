"""What clustering leaves behind for test time, read and written as safetensors and JSON.

So far that is the root of the prototype tree: one unit image feature that joins a request's class marginal
as rehearsal (docs/method.md). A root belongs to one model's features; its fingerprint says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

ARRAYS, HEADER = "root.safetensors", "root.json"
FORMAT = 1
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Root:
    """The root prototype: `visual` (D,) float32 of unit norm, made from `count` pairs of `source`."""

    visual: NDArray[np.float32]
    fingerprint: str
    count: int
    source: str

    def __post_init__(self) -> None:
        check_unit(self.visual)


def check_unit(visual: NDArray[np.float32]) -> None:
    """Refuse anything that is not one finite float32 vector of unit norm."""
    if visual.ndim != 1 or visual.size == 0:
        raise ValueError(f"a root is one vector (D,), got an array of shape {visual.shape}; rebuild it.")
    if visual.dtype != np.float32:
        raise ValueError(f"a root is float32, got {visual.dtype}; convert it or rebuild it.")
    if not np.isfinite(visual).all():
        raise ValueError("the root holds values that are not finite; rebuild it.")
    norm = float(np.linalg.norm(visual.astype(np.float64)))
    if abs(norm - 1.0) > UNIT_TOLERANCE:
        raise ValueError(f"the root has norm {norm:.4f}, expected 1; normalise it or rebuild it.")


def save_root(path_dir: Path, root: Root) -> None:
    """Write `root.safetensors` and `root.json` into a model's folder."""
    path_dir.mkdir(parents=True, exist_ok=True)
    save_file({"visual": np.ascontiguousarray(root.visual)}, path_dir / ARRAYS)
    (path_dir / ARRAYS).chmod(0o644)  # safetensors writes for the owner alone
    header = {
        "format": FORMAT,
        "fingerprint": root.fingerprint,
        "dimension": int(root.visual.shape[0]),
        "count": root.count,
        "source": root.source,
    }
    (path_dir / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def load_root(path_dir: Path, *, fingerprint: str) -> Root | None:
    """The root beside a model's weights, or None when it has none.

    Raises ValueError in words when the root was made for another model, or is damaged.
    """
    arrays, header_path = path_dir / ARRAYS, path_dir / HEADER
    if not arrays.exists() and not header_path.exists():
        return None
    for path in (arrays, header_path):
        if not path.exists():
            raise ValueError(f"the root in {path_dir} lacks {path.name}; restore it, or remove both files.")
    try:
        header = json.loads(header_path.read_text(encoding="utf-8"))
        stored, dimension = str(header["fingerprint"]), int(header["dimension"])
        count, source, form = int(header["count"]), str(header["source"]), header["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{header_path} is not a root's header ({error!r}); rebuild the root.") from error
    if form != FORMAT:
        raise ValueError(f"{header_path} has format {form!r}, this version reads {FORMAT}; rebuild the root.")
    if stored != fingerprint:
        raise ValueError(
            f"the root in {path_dir} was made for model {stored[:16]}, the loaded model is {fingerprint[:16]}; "
            "rebuild the root for this model, or remove it."
        )
    visual = _read_visual(arrays)
    if visual.shape != (dimension,):
        raise ValueError(f"{arrays} holds shape {visual.shape}, its header says ({dimension},); rebuild the root.")
    return Root(visual=visual, fingerprint=stored, count=count, source=source)


def _read_visual(path: Path) -> NDArray[np.float32]:
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type, which is not part of its typed interface
        raise ValueError(f"{path} is not a readable safetensors file ({error}); rebuild the root.") from error
    if "visual" not in tensors:
        raise ValueError(f"{path} has no tensor 'visual'; rebuild the root.")
    return tensors["visual"]
