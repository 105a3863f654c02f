"""The root prototype: written and read back bit for bit, refused in words when it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prototypes.bank import ARRAYS, HEADER, Root, load_root, save_root

FINGERPRINT = "ab" * 32


@pytest.fixture
def root() -> Root:
    visual = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    return Root(visual / np.linalg.norm(visual), FINGERPRINT, 7, "seven pairs")


def test_a_saved_root_is_read_back_bit_for_bit(tmp_path: Path, root: Root) -> None:
    save_root(tmp_path, root)
    again = load_root(tmp_path, fingerprint=FINGERPRINT)
    assert again is not None
    np.testing.assert_array_equal(again.visual, root.visual)
    assert (again.fingerprint, again.count, again.source) == (FINGERPRINT, 7, "seven pairs")


def test_a_model_without_a_root_has_none(tmp_path: Path) -> None:
    assert load_root(tmp_path, fingerprint=FINGERPRINT) is None


def test_a_root_of_another_model_is_refused_in_words(tmp_path: Path, root: Root) -> None:
    save_root(tmp_path, root)
    with pytest.raises(ValueError, match="rebuild the root for this model"):
        load_root(tmp_path, fingerprint="cd" * 32)


@pytest.mark.parametrize("name", [ARRAYS, HEADER])
def test_half_a_root_is_refused_by_the_name_of_the_missing_file(tmp_path: Path, root: Root, name: str) -> None:
    save_root(tmp_path, root)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_root(tmp_path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((2, 16), np.float32), "one vector"),
        (np.full(32, 1 / np.sqrt(32), np.float64), "float32"),
        (np.full(32, np.nan, np.float32), "not finite"),
        (np.full(32, 1.0, np.float32), "norm"),
    ],
)
def test_what_is_not_a_unit_vector_is_refused(values: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Root(values, FINGERPRINT, 1, "made up")


def test_a_damaged_file_on_disk_is_refused(tmp_path: Path, root: Root) -> None:
    save_root(tmp_path, root)
    save_file({"visual": 2.0 * root.visual}, tmp_path / ARRAYS)
    with pytest.raises(ValueError, match="norm 2"):
        load_root(tmp_path, fingerprint=FINGERPRINT)
    save_file({"visual": root.visual[:16]}, tmp_path / ARRAYS)
    with pytest.raises(ValueError, match="shape"):
        load_root(tmp_path, fingerprint=FINGERPRINT)
    save_file({"other": root.visual}, tmp_path / ARRAYS)
    with pytest.raises(ValueError, match="no tensor 'visual'"):
        load_root(tmp_path, fingerprint=FINGERPRINT)
    (tmp_path / ARRAYS).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable"):
        load_root(tmp_path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": 1}'])
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, root: Root, text: str) -> None:
    save_root(tmp_path, root)
    (tmp_path / HEADER).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not a root's header"):
        load_root(tmp_path, fingerprint=FINGERPRINT)


def test_a_future_format_is_refused(tmp_path: Path, root: Root) -> None:
    save_root(tmp_path, root)
    header = json.loads((tmp_path / HEADER).read_text(encoding="utf-8"))
    (tmp_path / HEADER).write_text(json.dumps({**header, "format": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="format 99"):
        load_root(tmp_path, fingerprint=FINGERPRINT)
