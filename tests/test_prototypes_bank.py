"""Hierarchy and bank: invariants held at construction, search equal to brute force, files whole or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prototypes import bank as bank_module
from prototypes import complexity
from prototypes.bank import PrototypeBank, load_bank, save_bank
from prototypes.cache import FeatureCache
from prototypes.cluster import grow
from prototypes.hierarchy import CONCEPT, MODE, ROOT, THEME, Hierarchy, load_hierarchy, pack, save_hierarchy, unpack
from prototypes.vectors import unit
from tests.prototypes_fixtures import CONFIG, FINGERPRINT, D, plant


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return plant().write(tmp_path_factory.mktemp("cache"), source="<planted>")


@pytest.fixture(scope="module")
def tree(cache: FeatureCache) -> Hierarchy:
    return grow(cache, CONFIG)


@pytest.fixture(scope="module")
def bank(tree: Hierarchy, cache: FeatureCache) -> PrototypeBank:
    return PrototypeBank.build(tree, cache)


def test_every_pair_is_in_exactly_one_node_of_every_level(tree: Hierarchy) -> None:
    for level in (ROOT, THEME, CONCEPT, MODE):
        members = np.concatenate([tree.members(int(node)) for node in tree.nodes(level)])
        assert sorted(members.tolist()) == list(range(len(tree.keys)))
        for group, node in zip(tree.groups(level), tree.nodes(level), strict=True):
            np.testing.assert_array_equal(group, tree.members(int(node)))
            assert tree.sizes[node] == len(group)


def test_children_partition_their_parent(tree: Hierarchy) -> None:
    for node in np.flatnonzero(tree.level < MODE):
        below = np.concatenate([tree.members(int(child)) for child in tree.children(int(node))])
        np.testing.assert_array_equal(np.sort(below), tree.members(int(node)))


def test_centroids_are_the_unit_means_of_the_members(tree: Hierarchy, cache: FeatureCache) -> None:
    rows = cache.rows(tree.keys)
    for node in range(len(tree.level)):
        mine = rows[tree.members(node)]
        # float32 sums of at most 300 unit rows: well below 1e-5
        np.testing.assert_allclose(tree.visual[node], unit(cache.image[mine].mean(axis=0)), atol=1e-5)
        np.testing.assert_allclose(tree.text[node], unit(cache.caption[mine].mean(axis=0)), atol=1e-5)


def test_a_saved_hierarchy_is_read_back_bit_for_bit(tmp_path: Path, tree: Hierarchy) -> None:
    save_hierarchy(tmp_path, tree)
    again = load_hierarchy(tmp_path, fingerprint=FINGERPRINT)
    for name in ("level", "parent", "label", "visual", "text", "kappa", "rank", "confusion", "visual_mean"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tree, name))
    assert (again.names, again.keys, again.fingerprint) == (tree.names, tree.keys, tree.fingerprint)
    assert again.facts == json.loads(json.dumps(dict(tree.facts)))


def changed(array: np.ndarray, where: Any, value: Any) -> np.ndarray:
    copy = array.copy()
    copy[where] = value
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"parent": changed(t.parent, 5, 0)}, "one level above|not together"),
        (lambda t: {"parent": changed(t.parent, 0, 0)}, "root"),
        (lambda t: {"label": changed(t.label, (1, 0), t.nodes(CONCEPT)[-1])}, "not in its parent"),
        (lambda t: {"label": changed(t.label, (2, 0), 1)}, "not among the modes"),
        (lambda t: {"label": changed(t.label, (2, 0), 10_000)}, "does not exist"),
        (lambda t: {"label": t.label[:, :-1]}, "`label` is"),
        (lambda t: {"visual": 2 * t.visual}, "norm"),
        (lambda t: {"text": changed(t.text, (0, 0), np.nan)}, "not finite"),
        (lambda t: {"kappa": changed(t.kappa, 0, 1.5)}, "complexity"),
        (lambda t: {"kappa": t.kappa.astype(np.float64)}, "`kappa` is float64"),
        (lambda t: {"concentration": changed(t.concentration, 0, -1.0)}, "negative"),
        (lambda t: {"names": ("same",) * len(t.names)}, "same name"),
        (lambda t: {"names": ("", *t.names[1:])}, "no name"),
        (lambda t: {"names": t.names[1:]}, "names for"),
        (lambda t: {"keys": t.keys[::-1]}, "sorted"),
        (lambda t: {"keys": (t.keys[0], *t.keys[:-1])}, "distinct"),
        (lambda _: {"fingerprint": ""}, "fingerprint"),
        (lambda t: {"level": changed(t.level, -1, 2)}, "order of their levels"),
    ],
)
def test_what_is_no_tree_is_refused_at_construction(
    tree: Hierarchy, change: Callable[[Hierarchy], dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(tree, **change(tree))


def test_a_key_with_a_line_end_is_refused_and_others_come_back() -> None:
    assert unpack(pack(["a/ä", "b c"])) == ("a/ä", "b c")
    with pytest.raises(ValueError, match="line end"):
        pack(["a\nb"])


def test_every_node_has_as_many_prototypes_as_its_complexity_allows(tree: Hierarchy, bank: PrototypeBank) -> None:
    of_mode = np.bincount(bank.node[bank.rows(MODE)], minlength=len(tree.level))[tree.nodes(MODE)]
    wanted = complexity.prototypes(tree.kappa[tree.nodes(MODE)])
    room = np.maximum(1, tree.sizes[tree.nodes(MODE)] // bank_module.MEMBERS_EACH)
    assert (of_mode >= 1).all()
    assert (of_mode <= np.minimum(wanted, room)).all()
    assert set(bank.node.tolist()) == set(range(len(tree.level)))
    for level in (ROOT, THEME, CONCEPT, MODE):
        assert bank.count[bank.rows(level)].sum() == len(tree.keys)


def test_a_prototype_s_parent_stands_for_the_node_above(tree: Hierarchy, bank: PrototypeBank) -> None:
    np.testing.assert_array_equal(tree.parent[bank.node[1:]], bank.node[bank.parent[1:]])
    assert [bank.names[i] for i in range(len(bank.names))] == [tree.names[node] for node in bank.node]


def test_the_root_is_the_mean_of_the_modes_raw_centres(bank: PrototypeBank) -> None:
    mean = unit(bank.visual[bank.rows(MODE)].mean(axis=0))
    np.testing.assert_allclose(bank.root.visual, mean, atol=1e-6)
    assert bank.root.fingerprint == FINGERPRINT


def test_medoids_are_members_of_their_mode(tree: Hierarchy, bank: PrototypeBank) -> None:
    where = {key: i for i, key in enumerate(tree.keys)}
    for row in bank.rows(MODE):
        assert tree.label[2, where[bank.medoids[row]]] == bank.node[row]
    assert set(bank.medoids[: len(bank.names) - len(bank.rows(MODE))]) == {""}


def test_concentrations_have_mean_one_in_every_level(bank: PrototypeBank) -> None:
    for level in (THEME, CONCEPT, MODE):
        assert bank.concentration[bank.rows(level)].mean() == pytest.approx(1.0, abs=1e-3)


def test_identical_members_leave_a_positive_concentration() -> None:
    assert bank_module._rescaled(np.zeros(5, np.float32)).tolist() == [1.0] * 5
    assert bank_module._rescaled(np.array([0, 0, 0, 0, 0, 1, 1], np.float32)).min() > 0


@pytest.mark.parametrize("level", [ROOT, THEME, CONCEPT, MODE])
def test_search_equals_brute_force(bank: PrototypeBank, level: int) -> None:
    queries = unit(np.random.default_rng(0).standard_normal((40, D)))
    k = min(7, len(bank.rows(level)))
    scores, rows = bank.search(queries, 7, level=level)
    cosine = bank.centre(queries) @ bank.centre(bank.visual[bank.rows(level)]).T
    np.testing.assert_array_equal(rows, bank.rows(level)[np.argsort(-cosine, axis=1, kind="stable")[:, :k]])
    np.testing.assert_allclose(scores, -np.sort(-cosine, axis=1)[:, :k], atol=1e-5)  # float32 dot products of length 64


def synthetic(modes: int, flat_below: int) -> PrototypeBank:
    """A chain of one root, theme and concept over `modes` random prototypes."""
    x = unit(np.random.default_rng(0).standard_normal((modes + 3, D)))
    level = np.concatenate([[0, 1, 2], np.full(modes, 3)])
    return PrototypeBank(
        visual=x,
        text=x,
        concentration=np.ones(len(x), np.float32),
        kappa=np.zeros(len(x), np.float32),
        parent=np.concatenate([[-1, 0, 1], np.full(modes, 2)]),
        level=level,
        node=np.arange(len(x)),
        count=np.ones(len(x), np.int64),
        visual_mean=np.zeros(D, np.float32),
        text_mean=np.zeros(D, np.float32),
        names=("x",) * len(x),
        medoids=("",) * len(x),
        fingerprint=FINGERPRINT,
        flat_below=flat_below,
    )


def test_an_inverted_file_recalls_what_brute_force_finds() -> None:
    flat, inverted = synthetic(4000, 10_000), synthetic(4000, 1000)
    assert type(inverted._indices[MODE]).__name__ == "IndexIVFFlat"  # type: ignore[attr-defined]
    # Random directions are the hardest case: the bank raises its probes until its own check passes 0.99.
    queries = unit(flat.visual[3:503] + 0.5 * flat.visual[-500:])
    expected, found = flat.search(queries, 10)[1], inverted.search(queries, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected.tolist(), found.tolist(), strict=True)])
    assert recall >= 0.97  # 5,000 neighbours around 0.99: four standard errors are 0.006


@pytest.mark.parametrize(
    ("queries", "k", "level", "words"),
    [
        (np.ones((2, 3), np.float32), 1, MODE, "dimension 64"),
        (np.ones(D, np.float32), 1, MODE, "dimension 64"),
        (np.full((1, D), np.nan, np.float32), 1, MODE, "not finite"),
        (np.ones((1, D), np.float32), 0, MODE, "at least 1"),
        (np.ones((1, D), np.float32), 1, 4, "level 4"),
    ],
)
def test_a_wrong_query_is_refused_in_words(
    bank: PrototypeBank, queries: np.ndarray, k: int, level: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        bank.search(queries, k, level=level)


def test_a_saved_bank_gives_the_same_answers(tmp_path: Path, bank: PrototypeBank) -> None:
    save_bank(tmp_path, bank)
    again = load_bank(tmp_path, fingerprint=FINGERPRINT)
    assert again is not None
    queries = unit(np.random.default_rng(1).standard_normal((20, D)))
    for a, b in zip(bank.search(queries, 9), again.search(queries, 9), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (again.names, again.medoids, again.source) == (bank.names, bank.medoids, "<planted>")
    np.testing.assert_array_equal(again.concentration, bank.concentration)


def test_a_folder_without_a_bank_has_none(tmp_path: Path) -> None:
    assert load_bank(tmp_path, fingerprint=FINGERPRINT) is None


def test_another_model_s_tree_and_bank_are_refused_in_words(
    tmp_path: Path, tree: Hierarchy, bank: PrototypeBank
) -> None:
    save_hierarchy(tmp_path, tree)
    save_bank(tmp_path, bank)
    for load in (load_hierarchy, load_bank):
        with pytest.raises(ValueError, match=r"was made for model abab.*, the loaded model is cdcd"):
            load(tmp_path, fingerprint="cd" * 32)


def test_a_bank_is_not_built_from_another_model_s_cache(tmp_path: Path, tree: Hierarchy) -> None:
    with pytest.raises(ValueError, match="use the cache"):
        PrototypeBank.build(tree, plant().write(tmp_path, fingerprint="cd" * 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: {"visual": b.visual[:, :8]}, "`text` is"),
        (lambda b: {"visual": b.visual.astype(np.float64)}, "float64"),
        (lambda b: {"visual": 2 * b.visual}, "norm"),
        (lambda b: {"parent": changed(b.parent, 3, 10**6)}, "not among"),
        (lambda b: {"parent": changed(b.parent, -1, 0)}, "one level above"),
        (lambda b: {"concentration": 0 * b.concentration}, "not positive"),
        (lambda _: {"medoids": ()}, "medoids"),
        (lambda _: {"flat_below": 0}, "flat_below"),
        (lambda b: {"level": b.level[::-1].copy()}, "levels"),
    ],
)
def test_what_is_no_bank_is_refused_at_construction(
    bank: PrototypeBank, change: Callable[[PrototypeBank], dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(bank, **change(bank))


@pytest.mark.parametrize("what", ["tree", "bank"])
def test_two_hundred_corrupted_files_are_each_refused_cleanly(
    tmp_path: Path, tree: Hierarchy, bank: PrototypeBank, what: str
) -> None:
    save_hierarchy(tmp_path, tree)
    save_bank(tmp_path, bank)
    load = load_hierarchy if what == "tree" else load_bank
    whole = {path: path.read_bytes() for path in (tmp_path / f"{what}.safetensors", tmp_path / f"{what}.json")}
    rng = np.random.default_rng(0)
    for i in range(200):
        path = list(whole)[i % 2]
        data = bytearray(whole[path])
        at = int(rng.integers(len(data)))
        if i % 4 < 2:
            data[at] ^= int(rng.integers(1, 256))
        elif i % 8 < 6:
            del data[at:]
        else:
            data[at:at] = rng.bytes(int(rng.integers(1, 64)))
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"build it again|restore it"):
            load(tmp_path, fingerprint=FINGERPRINT)
        path.write_bytes(whole[path])
    assert load(tmp_path, fingerprint=FINGERPRINT) is not None


@pytest.mark.parametrize("name", ["bank.json", "bank.safetensors"])
def test_half_a_bank_is_refused_by_the_name_of_the_missing_file(tmp_path: Path, bank: PrototypeBank, name: str) -> None:
    save_bank(tmp_path, bank)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_bank(tmp_path, fingerprint=FINGERPRINT)


def test_the_arrays_of_another_bank_are_refused(tmp_path: Path, bank: PrototypeBank) -> None:
    save_bank(tmp_path / "one", bank)
    save_bank(tmp_path / "other", dataclasses.replace(bank, visual=np.roll(bank.visual, 1, axis=0)))
    (tmp_path / "other" / "bank.safetensors").replace(tmp_path / "one" / "bank.safetensors")
    with pytest.raises(ValueError, match="checksum"):
        load_bank(tmp_path / "one", fingerprint=FINGERPRINT)
