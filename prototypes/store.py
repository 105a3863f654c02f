"""One way to keep arrays and a header on disk: `NAME.safetensors` beside `NAME.json`.

The header carries the SHA-256 of the arrays and of itself, so a file that is cut off, changed or of another origin is
refused in words before anything is built from it. Files are written beside and renamed, the header last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

__all__ = ["read", "write"]

MAX_HEADER_BYTES = 1 << 30


def write(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
    """Write `arrays` and `header` (JSON values) as `folder/name.*`; an older pair is replaced."""
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    text = _text({**header, "arrays_sha256": hashlib.sha256(data).hexdigest()})  # refuses what is no JSON, beforehand
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)  # no header, no pair: a stop in between leaves nothing to trust
    _replace(folder / f"{name}.safetensors", data)
    _replace(folder / f"{name}.json", text)


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    aside.replace(path)


def _text(body: Mapping[str, Any]) -> bytes:
    inner = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
    digest = hashlib.sha256(inner.encode()).hexdigest()
    return f'{{"sha256": "{digest}", "header": {inner}}}\n'.encode()


def read(
    folder: Path,
    name: str,
    *,
    kind: str,
    format: int,
    fingerprint: str | None,
    remake: str = "build it again (python -m prototypes build)",
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the header of `folder/name.*`, whole and made for the model `fingerprint` (None: any model).

    `kind` is what the refusals call it, `remake` what they advise. Raises ValueError in words.
    """
    paths = folder / f"{name}.safetensors", folder / f"{name}.json"
    for path in paths:
        if not path.is_file():
            raise ValueError(f"the {kind} in {folder} lacks {path.name}; {remake}.")
    arrays_path, header_path = paths
    again = f"it is cut off, changed or no {kind}; {remake}, or restore it."
    try:
        if header_path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is larger than any header")
        text = header_path.read_bytes()
        header = json.loads(text.decode("utf-8"))["header"]
        whole = isinstance(header, dict) and _text(header) == text
    except (UnicodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{header_path} can't be read ({error}): {again}") from error
    if not whole:
        raise ValueError(f"{header_path} does not match its own checksum: {again}")
    if header.get("kind") != kind or header.get("format") != format:
        raise ValueError(
            f"{header_path} is a {header.get('kind')!r} of format {header.get('format')!r}, "
            f"this version reads a {kind} of format {format}; {remake}."
        )
    stored = str(header.get("fingerprint"))
    if fingerprint is not None and stored != fingerprint:
        raise ValueError(
            f"the {kind} in {folder} was made for model {stored[:16]}, the loaded model is {fingerprint[:16]}; "
            f"{remake} from that model's features."
        )
    data = arrays_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != header.get("arrays_sha256"):
        raise ValueError(f"{arrays_path} does not match the checksum in {header_path.name}: {again}")
    try:
        return dict(load(data)), header
    except Exception as error:  # safetensors raises its own type, which is not part of its typed interface
        raise ValueError(f"{arrays_path} is not a readable safetensors file ({error}): {again}") from error
