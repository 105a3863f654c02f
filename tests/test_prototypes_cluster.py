"""Clustering: planted trees recovered exactly, whatever the order of rows; bad caches refused or survived."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from prototypes.cache import FeatureCache
from prototypes.cleaning import clean, distinct
from prototypes.cluster import KINDS, ClusterConfig, Sizes, grow
from prototypes.hierarchy import CONCEPT, MODE, THEME, Hierarchy
from prototypes.vectors import partition, spherical_kmeans, unit
from tests.prototypes_fixtures import (
    CONCEPTS,
    CONFIG,
    EACH,
    FINGERPRINT,
    MODES,
    SIZES,
    THEMES,
    Planted,
    plant,
    same_grouping,
)


def truth(planted: Planted, tree: Hierarchy) -> tuple[np.ndarray, ...]:
    where = {key: i for i, key in enumerate(planted.keys)}
    rows = np.array([where[key] for key in tree.keys])
    return planted.theme[rows], planted.concept[rows], planted.mode[rows]


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_tree_of_three_levels_is_recovered_exactly(tmp_path: Path, seed: int) -> None:
    planted = plant(seed)
    tree = grow(planted.write(tmp_path), CONFIG)
    assert len(tree.keys) == len(planted.keys)
    for found, true in zip(tree.label, truth(planted, tree), strict=True):
        assert same_grouping(found, true)


def test_a_planted_tree_without_modes_is_recovered_exactly(tmp_path: Path) -> None:
    planted = plant(3, modes=1)
    config = ClusterConfig(
        quantile=0.0,
        duplicate=1.1,
        sizes=Sizes(themes=THEMES, concepts=(CONCEPTS,) * 2, modes=(1, 1), smallest_concept=5, smallest_mode=3),
    )
    tree = grow(planted.write(tmp_path), config)
    theme, concept, _ = truth(planted, tree)
    assert same_grouping(tree.label[0], theme)
    assert same_grouping(tree.label[1], concept)
    assert same_grouping(tree.label[2], concept)


def test_every_concept_gets_the_name_of_its_captions(tmp_path: Path) -> None:
    planted = plant()
    tree = grow(planted.write(tmp_path), CONFIG)
    concept = truth(planted, tree)[1]
    for node in tree.nodes(CONCEPT):
        (true,) = set(concept[tree.members(int(node))].tolist())
        assert tree.names[node] == f"thing {true}"
    for node in tree.nodes(MODE):
        assert tree.names[node] == tree.names[tree.parent[node]]


def test_the_tree_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    planted = plant()
    config = ClusterConfig(quantile=0.1, sizes=SIZES)
    one = grow(planted.write(tmp_path / "one"), config)
    order = np.random.default_rng(5).permutation(len(planted.keys))
    other = grow(planted.write(tmp_path / "other", order), config)
    assert one.keys == other.keys
    assert one.names == other.names
    for name in ("label", "parent", "visual", "text", "kappa", "concentration"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_same_seed_gives_the_same_tree(tmp_path: Path) -> None:
    cache = plant(noise=0.2).write(tmp_path)
    one, other = (grow(cache, ClusterConfig(seed=3, quantile=0.0, duplicate=1.1, sizes=SIZES)) for _ in range(2))
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_array_equal(one.visual, other.visual)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree_is_a_tree_over_its_pairs(tmp_path: Path, kind: str) -> None:
    planted = plant()
    config = ClusterConfig(kind=kind, quantile=0.0, duplicate=1.1, sizes=SIZES)
    tree = grow(planted.write(tmp_path), config)
    assert tree.facts["config"]["kind"] == kind
    assert tree.sizes[tree.nodes(CONCEPT)].min() >= SIZES.smallest_concept
    assert (len(tree.nodes(THEME)) == 1) == (kind == "flat")
    recovered = same_grouping(tree.label[1], truth(planted, tree)[1])
    assert recovered == (kind in ("full", "text", "flat")) or kind == "image"


def test_a_random_tree_has_the_sizes_of_the_full_one(tmp_path: Path) -> None:
    cache = plant().write(tmp_path)
    full, random = (
        grow(cache, ClusterConfig(kind=kind, quantile=0.0, duplicate=1.1, sizes=SIZES)) for kind in ("full", "random")
    )
    for level in (THEME, CONCEPT, MODE):
        assert sorted(full.sizes[full.nodes(level)]) == sorted(random.sizes[random.nodes(level)])


def test_complexity_decides_how_far_a_node_is_split(tmp_path: Path) -> None:
    planted = plant(noise=0.1)
    sizes = Sizes(themes=3, concepts=(2, 8), modes=(2, 4), smallest_concept=4, smallest_mode=2)
    trees = [
        grow(planted.write(tmp_path / how), ClusterConfig(complexity=how, quantile=0.0, duplicate=1.1, sizes=sizes))
        for how in ("measured", "fixed")
    ]
    children = [[len(tree.children(int(node))) for node in tree.nodes(THEME)] for tree in trees]
    assert len(set(children[0])) > 1
    assert trees[1].kappa[trees[1].nodes(THEME)].tolist() == [0.5] * 3


def test_sizes_follow_the_number_of_pairs_as_the_method_says() -> None:
    # docs/method.md: about 16 themes at 9 thousand pairs, 48-64 at 200 thousand, 128 at 2 million.
    assert Sizes.of(9_000).themes == 16
    assert 48 <= Sizes.of(200_000).themes <= 64
    assert 120 <= Sizes.of(2_000_000).themes <= 136
    assert (Sizes.of(9_000).smallest_concept, Sizes.of(9_000).smallest_mode) == (12, 4)
    assert (Sizes.of(10**7).smallest_concept, Sizes.of(10**7).smallest_mode) == (32, 8)
    assert Sizes.of(10**7).concepts[1] == 64
    assert Sizes.of(10**7).modes == (2, 12)
    grid = [Sizes.of(int(n)) for n in np.logspace(0, 8, 60)]
    assert all(a.themes <= b.themes and a.concepts <= b.concepts for a, b in itertools.pairwise(grid))


def test_low_agreement_and_near_duplicates_are_dropped_by_rule(tmp_path: Path) -> None:
    planted = plant()
    image, caption = planted.image.copy(), planted.caption.copy()
    first, second = np.argsort(planted.keys)[[3, 200]]
    image[second], caption[second] = image[first], caption[first]
    cache = planted.write(tmp_path, image=image, caption=caption)
    kept = clean(cache, quantile=0.2, duplicate=0.999999, leak=0.95, leaks=None, seed=0)
    agreement = (image * caption).sum(axis=1)
    assert kept.dropped["low agreement"] == int((agreement < np.quantile(agreement, 0.2)).sum())
    assert kept.dropped["near-duplicates"] == 1
    assert planted.keys[first] in kept.keys
    assert planted.keys[second] not in kept.keys


def test_images_of_the_test_data_are_kept_out(tmp_path: Path) -> None:
    planted = plant()
    kept = clean(
        planted.write(tmp_path), quantile=0.0, duplicate=1.1, leak=0.9999, leaks=planted.image[[0, 7, 9]], seed=0
    )
    assert kept.dropped["test images"] == 3
    assert not {planted.keys[i] for i in (0, 7, 9)} & set(kept.keys)


def test_leaks_of_another_dimension_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected finite"):
        grow(plant().write(tmp_path), CONFIG, leaks=np.ones((2, 3), np.float32))


def test_the_search_for_duplicates_equals_the_greedy_rule() -> None:
    rng = np.random.default_rng(0)
    x = unit(np.repeat(rng.standard_normal((600, 16)), 5, axis=0) + 0.25 * rng.standard_normal((3000, 16)))
    stay: list[int] = []
    for i in range(len(x)):
        if not stay or (x[stay] @ x[i]).max() <= 0.97:
            stay.append(i)
    assert 600 < len(stay) < 2900
    assert distinct(lambda at: x[at], len(x), 0.97, 0).tolist() == stay


def test_duplicates_of_a_large_set_are_found_cell_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prototypes.cleaning.CELL", 1000)
    rng = np.random.default_rng(0)
    x = np.tile(unit(rng.standard_normal((2000, 32))), (2, 1))
    assert distinct(lambda at: x[at], len(x), 0.97, 0).tolist() == list(range(2000))


def test_a_partition_respects_its_smallest_size_and_starts_at_the_first_member() -> None:
    rng = np.random.default_rng(0)
    x = unit(np.repeat(np.eye(5, 8), [40, 2, 30, 1, 20], axis=0) + 0.02 * rng.standard_normal((93, 8)))
    labels = partition(lambda at: x[at], np.arange(93), 5, 6, 0)
    assert np.bincount(labels).min() >= 6
    assert labels[0] == 0
    first = [int(np.flatnonzero(labels == i)[0]) for i in range(labels.max() + 1)]
    assert first == sorted(first)


def test_identical_rows_stay_one_group() -> None:
    x = np.repeat(unit(np.ones((1, 8))), 50, axis=0)
    assert partition(lambda at: x[at], np.arange(50), 4, 2, 0).tolist() == [0] * 50


def test_more_centres_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows for 4 centres"):
        spherical_kmeans(np.eye(3, dtype=np.float32), 4, 0)


def test_a_cluster_of_identical_images_is_survived(tmp_path: Path) -> None:
    planted = plant()
    image = planted.image.copy()
    same = planted.concept == 2
    image[same] = image[np.flatnonzero(same)[0]]
    tree = grow(planted.write(tmp_path / "kept", image=image), CONFIG)
    assert same_grouping(tree.label[1], truth(planted, tree)[1])
    dropped = grow(planted.write(tmp_path / "dropped", image=image), ClusterConfig(quantile=0.0, sizes=SIZES))
    assert dropped.facts["dropped"]["near-duplicates"] >= int(same.sum()) - 1


def test_fewer_pairs_than_clusters_give_a_smaller_tree(tmp_path: Path) -> None:
    planted = plant()
    few = np.arange(0, len(planted.keys), EACH)  # 24 pairs for 40 themes
    cache = planted.write(tmp_path, few)
    sizes = Sizes(themes=40, concepts=(4, 64), modes=(2, 12), smallest_concept=3, smallest_mode=2)
    tree = grow(cache, ClusterConfig(quantile=0.0, duplicate=1.1, sizes=sizes))
    assert 1 <= len(tree.nodes(THEME)) <= 8
    assert tree.sizes[tree.nodes(CONCEPT)].min() >= 3


def test_too_few_pairs_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 2 pairs are left after cleaning.*give more pairs"):
        grow(plant().write(tmp_path, np.array([0, 40])), CONFIG)


@pytest.mark.parametrize("which", ["image", "caption"])
@pytest.mark.parametrize(("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (3.0, "norm")])
def test_a_bad_feature_is_refused_by_its_key(tmp_path: Path, which: str, value: float, words: str) -> None:
    planted = plant()
    broken = getattr(planted, which).copy()
    broken[17, 5] = value
    with pytest.raises(ValueError, match=f"{which} feature of '{planted.keys[17]}' has .*{words}"):
        grow(planted.write(tmp_path, **{which: broken}), CONFIG)


def test_pairs_without_captions_are_dropped_and_counted(tmp_path: Path) -> None:
    planted = plant()
    captions: list[list[str]] = [["a thing"] for _ in planted.keys]
    captions[4], captions[5] = [], ["  "]
    caption = planted.caption.copy()
    caption[[4, 5]] = np.nan
    tree = grow(planted.write(tmp_path, captions=captions, caption=caption), CONFIG)
    assert tree.facts["dropped"]["no caption"] == 2
    assert not {planted.keys[4], planted.keys[5]} & set(tree.keys)


def test_a_cache_without_phrases_is_refused_in_words(tmp_path: Path) -> None:
    cache = plant().write(tmp_path, phrase=np.empty((0, 64), np.float32), phrases=[], phrase_rows=[])
    with pytest.raises(ValueError, match="no phrases"):
        grow(cache, CONFIG)


def test_a_phrase_that_is_not_finite_is_refused_by_its_words(tmp_path: Path) -> None:
    planted = plant()
    phrase = planted.phrase.copy()
    phrase[3, 0] = np.nan
    with pytest.raises(ValueError, match="'thing 3' is not finite"):
        grow(planted.write(tmp_path, phrase=phrase), CONFIG)


def test_concepts_whose_names_do_not_fit_their_images_are_dropped(tmp_path: Path) -> None:
    planted = plant()
    image = planted.image.copy()
    lost = planted.concept == 0  # its images look like those of its sibling 1
    image[lost] = image[planted.concept == 1]
    tree = grow(planted.write(tmp_path, image=image), CONFIG)
    assert tree.facts["dropped"]["unfit names"] == int(lost.sum())
    assert "thing 0" not in tree.names
    assert "thing 1" in tree.names


def test_images_that_no_name_fits_are_refused_in_words(tmp_path: Path) -> None:
    planted = plant()
    shifted = (planted.concept // CONCEPTS) * CONCEPTS + (planted.concept + 1) % CONCEPTS
    image = np.stack([planted.image[planted.concept == c][0] for c in shifted])
    with pytest.raises(ValueError, match="no concept's name"):
        grow(planted.write(tmp_path, image=image), CONFIG)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "tall"}, "choose one of full"),
        ({"complexity": "x"}, "choose one of measured"),
        ({"quantile": 1.0}, "quantile"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_wrong_option_is_refused_at_construction(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClusterConfig(**changes)  # type: ignore[arg-type]


def test_a_cache_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    planted = plant()
    cache = planted.write(tmp_path)
    np.testing.assert_array_equal(cache.image, planted.image)
    assert tuple(cache.keys()) == planted.keys
    assert cache.captions(0) == ["a thing 0"]
    assert cache.rows([planted.keys[7], planted.keys[2]]).tolist() == [7, 2]
    assert cache.phrases()[:2] == ["thing 0", "thing 1"]
    with pytest.raises(ValueError, match="lacks pair 'nobody'"):
        cache.rows(["nobody"])


def header(folder: Path, **changes: object) -> None:
    path = folder / "header.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"complete": False}, "unfinished"),
        ({"format": 2}, "format 2"),
        ({"dtype": "float16"}, "float16"),
        ({"pairs": 0}, "counts 0 pairs"),
        ({"pairs": 10}, "bytes"),
        ({"fingerprint": "cd" * 32}, "is of model cdcd"),
    ],
)
def test_a_cache_that_does_not_fit_its_header_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    plant().write(tmp_path)
    header(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        FeatureCache.open(tmp_path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("name", ["header.json", "image.f32", "keys.jsonl", "phrases.jsonl", "phrase_rows.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_damaged_cache_is_refused_in_words(tmp_path: Path, name: str, damage: str) -> None:
    plant().write(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\xff\x00" * 99)
    with pytest.raises(ValueError, match=r"[.]$"):
        grow(FeatureCache.open(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("phrase_rows.jsonl", "[0, 999999]", "outside"),
        ("phrase_rows.jsonl", '{"a": 1}', "no list of pair rows"),
        ("keys.jsonl", '{"key": "a", "captions": ["b"]}', "twice"),
        ("keys.jsonl", "[]", "has no 'key'"),
    ],
)
def test_a_wrong_line_is_refused_in_words(tmp_path: Path, name: str, line: str, words: str) -> None:
    plant().write(tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([line, line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=words):
        grow(FeatureCache.open(tmp_path), CONFIG)


def test_modes_and_themes_are_as_many_as_planted(tmp_path: Path) -> None:
    tree = grow(plant().write(tmp_path), CONFIG)
    counts = [len(tree.nodes(level)) for level in (THEME, CONCEPT, MODE)]
    assert counts == [THEMES, THEMES * CONCEPTS, THEMES * CONCEPTS * MODES]
