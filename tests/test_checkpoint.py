"""gram_core.checkpoint: what is kept comes back bit for bit; anything else is refused in words."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gram_core.checkpoint import ARRAYS, FORMAT, HEADER, KIND, NAME, Checkpoint, load_checkpoint, save_checkpoint
from gram_core.errors import FingerprintMismatch, InvalidCheckpoint
from gram_core.regulators import REGULATORS
from prototypes import store

FINGERPRINT = "ab" * 32


def checkpoint(**changes: Any) -> Checkpoint:
    made = REGULATORS["gram"].init({"residual": (None, 16)}, torch.Generator().manual_seed(0))
    whole = {
        "params": {f"regulator.{name}": w for name, w in made.items()} | {"policy.rho": torch.tensor([[0.1]])},
        "regulator": "gram",
        "settings": {"host": "residual", "steps": 20, "view_scale": [0.85, 1.0]},
        "fingerprint": FINGERPRINT,
        "bank_sha256": "cd" * 32,
        "facts": {"seed": 3, "held_out": {"loss": [1.5, 0.1]}, "caption": "naïve"},
    }
    return Checkpoint(**(whole | changes))


def test_a_checkpoint_comes_back_bit_for_bit_with_the_digest_of_its_tensors(tmp_path: Path) -> None:
    given = checkpoint()
    saved = save_checkpoint(tmp_path, given)
    loaded = load_checkpoint(tmp_path, fingerprint=FINGERPRINT)
    assert loaded is not None
    assert loaded.sha256 == saved.sha256 == hashlib.sha256((tmp_path / ARRAYS).read_bytes()).hexdigest()
    assert loaded.params.keys() == given.params.keys()
    assert all(torch.equal(loaded.params[name], w) for name, w in given.params.items())
    same = ("regulator", "settings", "fingerprint", "bank_sha256", "facts")
    assert [getattr(loaded, name) for name in same] == [getattr(given, name) for name in same]
    assert set(loaded.part("policy")) == {"rho"}
    assert {"residual.u", "residual.v"} <= set(loaded.part("regulator"))
    assert not loaded.part("reg")


def test_equal_checkpoints_are_equal_files_and_a_newer_one_takes_the_place_of_the_older(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_checkpoint(tmp_path / folder, checkpoint())
    first = [(tmp_path / "a" / name).read_bytes() for name in (ARRAYS, HEADER)]
    assert first == [(tmp_path / "b" / name).read_bytes() for name in (ARRAYS, HEADER)]
    save_checkpoint(tmp_path / "a", checkpoint(regulator="identity", params={"start.u": torch.ones(1, 2)}))
    newer = load_checkpoint(tmp_path / "a", fingerprint=None)
    assert newer is not None
    assert (newer.regulator, set(newer.params)) == ("identity", {"start.u"})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [HEADER, ARRAYS]


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, fingerprint=FINGERPRINT) is None
    assert load_checkpoint(tmp_path / "nowhere", fingerprint=FINGERPRINT) is None


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    with pytest.raises(FingerprintMismatch, match=r"made for model abababababababab, the loaded model is efefef"):
        load_checkpoint(tmp_path, fingerprint="ef" * 32)
    assert load_checkpoint(tmp_path, fingerprint=None) is not None


@pytest.mark.parametrize("name", [ARRAYS, HEADER])
def test_a_checkpoint_that_lost_half_of_itself_is_refused(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, checkpoint())
    (tmp_path / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=rf"lacks {name}; train it again \(python -m gram_core.train\)"):
        load_checkpoint(tmp_path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("name", [ARRAYS, HEADER])
def test_a_file_cut_off_or_changed_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, checkpoint())
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 1, len(whole) // 2, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]:
        (tmp_path / name).write_bytes(whole[:at])
        with pytest.raises(InvalidCheckpoint, match="train it again"):
            load_checkpoint(tmp_path, fingerprint=FINGERPRINT)
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path / name).write_bytes(bytes(changed))
        with pytest.raises(InvalidCheckpoint, match="train it again"):
            load_checkpoint(tmp_path, fingerprint=FINGERPRINT)
    (tmp_path / name).write_bytes(whole)
    assert load_checkpoint(tmp_path, fingerprint=FINGERPRINT) is not None


def header(**changes: Any) -> dict[str, Any]:
    whole = {"kind": KIND, "format": FORMAT, "fingerprint": FINGERPRINT, "bank_sha256": "", "regulator": "gram",
             "settings": {}, "facts": {}}  # fmt: skip
    return {key: value for key, value in (whole | changes).items() if value != "left out"}


@pytest.mark.parametrize(
    ("arrays", "changes", "said"),
    [
        ({}, {"format": 2}, r"of format 2, this version reads a GRAM checkpoint of format 1; train it again"),
        ({}, {"kind": "prototype bank"}, "is a 'prototype bank'"),
        ({}, {"regulator": "pilot"}, "its regulator is 'pilot', this version knows gram, identity"),
        ({}, {"settings": "left out"}, "not a checkpoint's header"),
        ({}, {"facts": 3}, "not a checkpoint's header"),
        ({}, {"fingerprint": ""}, "no fingerprint"),
        ({"start.u": np.full((1, 2), np.nan, np.float32)}, {}, "`start.u` holds values that are not finite"),
        ({"start.u": np.full((1, 2), np.inf, np.float32)}, {}, "`start.u` holds values that are not finite"),
        ({"start.u": np.ones((1, 2))}, {}, r"`start.u` is float64 \(1, 2\), expected float32 with a leading 1"),
        ({"start.u": np.ones((2, 2), np.float32)}, {}, r"`start.u` is float32 \(2, 2\)"),
    ],
)
def test_whole_files_with_the_wrong_content_are_refused(
    tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    store.write(tmp_path, NAME, arrays, header(**changes))
    with pytest.raises(InvalidCheckpoint, match=said):
        load_checkpoint(tmp_path, fingerprint=FINGERPRINT)


def test_a_foreign_tensors_file_under_our_header_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    save_file({"start.u": np.ones((1, 2), np.float32)}, tmp_path / ARRAYS)
    with pytest.raises(InvalidCheckpoint, match="does not match the checksum"):
        load_checkpoint(tmp_path, fingerprint=FINGERPRINT)


def test_what_can_not_be_weights_is_not_even_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="not finite"):
        checkpoint(params={"start.u": torch.tensor([[torch.nan]])})
    with pytest.raises(InvalidCheckpoint, match="expected float32 with a leading 1"):
        replace(checkpoint(), params={"start.u": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path / "never", checkpoint(facts={"loss": float("nan")}))
    assert not (tmp_path / "never").exists()


def test_the_header_is_json_for_a_person(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    shown = json.loads((tmp_path / HEADER).read_text(encoding="utf-8"))["header"]
    assert shown["facts"]["caption"] == "naïve"
    assert shown["settings"]["steps"] == 20
