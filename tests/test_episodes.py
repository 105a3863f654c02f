"""gram_core.episodes: tasks of every kind, across gaps that are what they say, the same whoever draws them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.draws import Indices
from gram_core.episodes import KINDS, SUPERVISED, Episode, EpisodeConfig, Tasks
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData
from gram_core.evaluate.protocols import skew
from gram_core.unseen import PLAIN, ViewCache
from prototypes import complexity
from prototypes.hierarchy import CONCEPT, MODE, THEME, Hierarchy
from tests.episodes_fixtures import DOMAINS, SHAPE, D, V, World, chain, digest, world

ROOT = Path(__file__).parents[1]


@cache
def planted() -> World:
    return world()


def tasks(given: World | None = None, *, validation: bool = False, **options: Any) -> Tasks:
    given = given or planted()
    return Tasks(given.tree, given.bank, given.views, EpisodeConfig(**options), held_out=validation)


def drawn(count: int = 300, progress: float = 1.0, of: Tasks | None = None, **options: Any) -> list[Episode]:
    own = of or tasks(**options)
    return [own.episode(i, progress) for i in range(count)]


def theme_of(tree: Hierarchy, keys: tuple[str, ...]) -> Indices:
    return tree.label[THEME - 1, [tree.keys.index(key) for key in keys]]


def mode_of(tree: Hierarchy, keys: tuple[str, ...]) -> Indices:
    return tree.label[MODE - 1, [tree.keys.index(key) for key in keys]]


# ---- the same episode, whoever draws it


def test_an_episode_depends_on_seed_number_and_progress_alone() -> None:
    one, two = tasks(), tasks()
    forward = [digest(one.episode(i, 0.4)) for i in range(20)]
    backward = [digest(two.episode(i, 0.4)) for i in reversed(range(20))][::-1]
    assert forward == backward
    assert len(set(forward)) == 20
    assert digest(one.episode(3, 0.4)) == forward[3]
    assert [digest(one.episode(i, 0.9)) for i in range(20)] != forward
    assert digest(tasks(seed=1).episode(3, 0.4)) != forward[3]


def test_the_order_of_rows_in_the_cache_changes_nothing() -> None:
    given = planted()
    views, order = given.views, np.random.default_rng(0).permutation(len(given.views))
    keys, domains = (tuple(words[i] for i in order) for words in (views.keys, views.domains))
    shuffled = ViewCache(views.fingerprint, keys, domains, views.features[order])
    other = tasks(World(given.tree, given.bank, shuffled))
    assert [digest(e) for e in drawn(20)] == [digest(e) for e in drawn(20, of=other)]


def test_another_process_draws_the_same() -> None:
    code = """
from gram_core.episodes import EpisodeConfig, Tasks
from tests.episodes_fixtures import digest, world
own = Tasks(world().tree, world().bank, world().views, EpisodeConfig(), held_out=False)
print(*(digest(own.episode(i, 0.3)) for i in range(5)))
"""
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # sets of names have another order there
    environment = {**os.environ, "PYTHONHASHSEED": other, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.split() == [digest(e) for e in drawn(5, 0.3)], result.stderr


# ---- what holds for every episode of every tree

MODES = st.lists(st.integers(3, 9), min_size=1, max_size=3)
SHAPES = st.lists(st.lists(MODES, min_size=1, max_size=6), min_size=2, max_size=6)


def checked(given: World, own: Tasks, episode: Episode) -> None:
    tree, views = given.tree, given.views
    row = {both: i for i, both in enumerate(zip(views.keys, views.domains, strict=True))}
    b, k = len(episode.support), len(episode.names)
    assert episode.kind in KINDS
    assert 2 <= k <= 32
    assert len(set(episode.names)) == k
    assert episode.support.shape == (b, V, D)
    assert episode.support.dtype == torch.float32
    assert tuple(own.names[c] for c in episode.classes) == episode.names
    assert tuple(tree.names[c] for c in episode.concepts) == episode.names
    assert 1 <= b == len(episode.support_labels) == len(set(episode.keys))
    assert [episode.names[c] for c in episode.support_labels] == [tree.names[c] for c in concept_of(tree, episode.keys)]
    expected = views.views([row[key, episode.domain] for key in episode.keys])
    np.testing.assert_array_equal(episode.support.numpy(), expected)
    torch.testing.assert_close(episode.support.norm(dim=-1), torch.ones(b, V))
    assert episode.node in own.themes
    assert episode.node in tree.parent[episode.concepts]
    assert len({query.gap for query in episode.queries}) == len(episode.queries)
    used = set(tree.parent[episode.concepts].tolist())
    for query in episode.queries:
        q = len(query.labels)
        assert 1 <= q == len(query.features) == len(set(query.keys))
        assert not set(query.keys) & set(episode.keys)
        assert tuple(own.names[c] for c in query.classes) == query.names
        assert [query.names[c] for c in query.labels] == [tree.names[c] for c in concept_of(tree, query.keys)]
        expected = views.originals([row[key, query.domain] for key in query.keys])
        np.testing.assert_array_equal(query.features.numpy(), expected)
        if query.gap == "branch":
            assert 2 <= len(query.names) <= own.config.branch_way
            assert not set(query.names) & set(episode.names)
            assert not set(theme_of(tree, query.keys).tolist()) & used
        else:
            assert query.names == episode.names
        if query.gap == "in":
            assert query.domain == episode.domain
        if query.gap == "mode" and query.domain == episode.domain:
            shown = {*mode_of(tree, episode.keys).tolist()}
            shown |= {m for other in episode.queries if other.gap == "in" for m in mode_of(tree, other.keys).tolist()}
            assert not shown & set(mode_of(tree, query.keys).tolist())
        assert set(theme_of(tree, query.keys).tolist()) <= set(own.themes)
    assert set(theme_of(tree, episode.keys).tolist()) <= set(own.themes)
    assert episode.masked.shape == (len(given.bank.names),)
    assert episode.masked.dtype == np.bool_
    assert not episode.masked[0]
    law(episode, own)


def concept_of(tree: Hierarchy, keys: tuple[str, ...]) -> Indices:
    return tree.label[CONCEPT - 1, [tree.keys.index(key) for key in keys]]


def law(episode: Episode, own: Tasks) -> None:
    """What the labels of every kind have in common."""
    labels = episode.support_labels.tolist()
    runs = 1 + sum(a != b for a, b in pairwise(labels))
    if episode.kind == SUPERVISED:
        assert set(labels) == set(range(len(episode.names)))
        assert max(Counter(labels).values()) <= complexity.LARGEST_SHOTS
    elif episode.kind == "single":
        assert len(set(labels)) == 1
    elif episode.kind == "sorted":
        assert runs == len(set(labels))
    if episode.kind != SUPERVISED:
        assert len(labels) <= max(own.config.sizes)


@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    shared=st.booleans(),
    held_out=st.booleans(),
    restyled=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_episode_of_any_tree_keeps_its_promises(
    shape: list[list[list[int]]], seed: int, shared: bool, held_out: bool, restyled: float
) -> None:
    made = world(shape, seed=seed, shared=shared, restyled=restyled)
    try:
        own = tasks(made, validation=held_out, seed=seed)
    except InvalidData:  # too few concepts; its words have a test of their own
        return
    for i, progress in enumerate((0.0, 0.1, 0.2, 0.3, 0.5, 1.0)):
        checked(made, own, own.episode(i, progress))


def test_hundreds_of_episodes_keep_their_promises() -> None:
    for held_out in (False, True):
        own = tasks(validation=held_out)
        for i in range(200):
            checked(planted(), own, own.episode(i, i % 5 / 4))


# ---- themes


@given(seed=st.integers(0, 50), share=st.sampled_from([0.01, 0.2, 0.5, 0.99]))
@settings(max_examples=30, deadline=None)
def test_held_out_themes_are_never_in_training_episodes(seed: int, share: float) -> None:
    train, held = (tasks(seed=seed, validation=side, held_out=share) for side in (False, True))
    assert not set(train.themes) & set(held.themes)
    assert train.themes
    assert held.themes
    assert len(train.themes) + len(held.themes) == len(SHAPE)
    assert train.names == held.names
    assert train.facts["nodes"] == list(train.themes)


def test_a_share_of_the_themes_is_held_out_by_seed() -> None:
    splits = {tasks(seed=seed, validation=True).themes for seed in range(20)}
    assert len(splits) > 3
    assert tasks(validation=True).themes == tasks(validation=True).themes


def test_only_concepts_with_enough_unseen_images_take_part() -> None:
    made = world([[[9, 9], [3, 2], [9]], [[9], [9], [5]], [[9], [9], [4]]])
    unseen = Counter(made.tree.label[CONCEPT - 1, [made.tree.keys.index(k) for k in set(made.views.keys)]].tolist())
    few = {c for c, count in unseen.items() if count < 4}
    assert few
    for held_out in (False, True):
        for episode in drawn(50, of=tasks(made, validation=held_out)):
            assert not few & set(episode.concepts.tolist())
            for query in episode.queries:
                assert not few & set(concept_of(made.tree, query.keys).tolist())


def test_harder_themes_come_later_and_have_more_classes() -> None:
    made = world([[[9]] * 12 for _ in range(10)], shared=False)
    own = tasks(made)
    early, late = drawn(300, 0.0, own), drawn(300, 1.0, own)
    # the bell's centre moves from 0.25 to 0.75; 300 draws of a standard deviation of at most 0.3 move by 0.02
    assert np.mean(made.tree.kappa[[e.node for e in late]]) > np.mean(made.tree.kappa[[e.node for e in early]]) + 0.1
    supervised = [e for e in early if e.kind == SUPERVISED]
    assert len({e.node for e in supervised}) > 3
    for episode in supervised:
        way, shots = complexity.task_shape([made.tree.kappa[episode.node]], [99], [99])
        assert len(episode.names) == way[0]
        counts = Counter(episode.support_labels.tolist()).values()
        assert max(counts) <= shots[0]
        if episode.domain == PLAIN:  # four unseen images at least, one of them kept for the query
            assert min(counts) >= min(shots[0], 3)


def test_sibling_themes_join_where_a_theme_has_too_few_concepts() -> None:
    for episode in drawn(100):
        way = complexity.task_shape([planted().tree.kappa[episode.node]], [99], [99])[0][0]
        joined = set(planted().tree.parent[episode.concepts].tolist())
        if episode.kind == SUPERVISED and way > 6:  # no theme has more
            assert len(joined) > 1
    only = world([[[9]] * 3] * 2, shared=False)
    for episode in drawn(50, of=tasks(only)):
        assert set(only.tree.parent[episode.concepts].tolist()) == {episode.node}  # there is no sibling


# ---- kinds


def test_half_of_the_early_episodes_and_all_late_ones_are_requests_of_every_kind() -> None:
    # shares of 300 draws: a standard deviation of at most 0.03
    for progress, share in ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (1.0, 1.0)):
        kinds = Counter(e.kind for e in drawn(300, progress))
        assert kinds[SUPERVISED] / 300 == pytest.approx(1 - share, abs=0.1 if share < 1 else 0)
        for kind in KINDS[1:]:
            assert kinds[kind] / 300 == pytest.approx(share / 4, abs=0.09)
    assert {e.kind for e in drawn(50, 0.0, unlabeled=1.0)} == set(KINDS[1:])
    assert SUPERVISED in {e.kind for e in drawn(50, 0.2, unlabeled=0.0)}


def test_requests_show_fewer_classes_than_they_name_and_have_the_sizes_asked_for() -> None:
    requests = drawn(400)
    for episode in requests:
        assert len(episode.support) <= 64
        if episode.kind == "single":
            assert len(episode.names) >= 2
    sizes = Counter(len(e.support) for e in requests if e.kind in ("iid", "sorted"))
    assert {4, 8, 16, 32} <= set(sizes)
    assert sum(len(e.support_labels.unique()) < len(e.names) for e in requests) > 200
    spread = {kind: np.mean([skew(e.support_labels.numpy(), len(e.names)) for e in requests if e.kind == kind])
              for kind in KINDS[1:]}  # fmt: skip
    assert spread["iid"] < spread["imbalanced"] < spread["single"]
    assert spread["iid"] < spread["sorted"] < spread["single"]
    ways = [len(e.names) for e in requests]
    assert min(ways) <= 4
    assert max(ways) >= 10


def test_half_of_the_episodes_are_plain_and_the_others_of_one_restyled_domain() -> None:
    domains = Counter(e.domain for e in drawn(400))
    assert set(domains) == set(DOMAINS)
    assert domains[PLAIN] / 400 == pytest.approx(0.5, abs=0.1)  # four standard deviations
    assert {e.domain for e in drawn(30, plain=1.0)} == {PLAIN}
    assert PLAIN not in {e.domain for e in drawn(30, plain=0.0)}
    bare = world(restyled=0.0)
    for episode in drawn(50, of=tasks(bare)):
        assert episode.domain == PLAIN
        assert all(query.domain == PLAIN for query in episode.queries)


# ---- queries


def gaps(episodes: list[Episode]) -> Counter[str]:
    return Counter(query.gap for episode in episodes for query in episode.queries)


def test_branch_queries_become_more_frequent() -> None:
    early, late = gaps(drawn(200, 0.0, restyled=0.0)), gaps(drawn(200, 1.0, restyled=0.0))
    assert early["branch"] / 200 == pytest.approx(0.2, abs=0.09)
    assert late["branch"] / 200 == pytest.approx(0.5, abs=0.13)
    assert gaps(drawn(100, branch=(0.0, 0.0)))["branch"] == 0


def test_the_mode_gap_is_a_visual_mode_or_another_domain() -> None:
    modes = [q for e in drawn(200, restyled=0.0) for q in e.queries if q.gap == "mode" and q.domain == e.domain]
    assert len(modes) > 150
    for episode in drawn(200, restyled=1.0):
        for query in episode.queries:
            assert query.gap != "mode" or query.domain != episode.domain
    assert gaps(drawn(200, restyled=1.0))["mode"] > 150
    assert gaps(drawn(200, of=tasks(world(restyled=0.0))))["mode"] > 150  # there is no other domain


def test_a_complex_concept_asks_about_its_farthest_mode() -> None:
    made = world([[[9, 9, 9]] * 4] * 4)
    tree = replace(made.tree, kappa=np.ones_like(made.tree.kappa))
    centred = tree.visual - tree.visual_mean
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    seen = 0
    for episode in drawn(
        60, of=Tasks(tree, made.bank, made.views, EpisodeConfig(restyled=0.0, plain=1.0), held_out=False)
    ):
        query = next(q for q in episode.queries if q.gap == "mode")
        for mode in set(mode_of(tree, query.keys).tolist()):
            siblings = tree.children(int(tree.parent[mode]))
            near = {int(m): float(sum(centred[m] @ centred[o] for o in siblings if o != m)) for m in siblings}
            assert mode == min(near, key=near.__getitem__)
            seen += 1
    assert seen > 100


# ---- guards


def test_masks_cover_the_episodes_own_concepts_or_their_whole_themes() -> None:
    given = planted()
    above = chain(given.tree, given.bank.node)
    for options, whole in (({"mask_concepts": 1.0}, False), ({"mask_concepts": 0.0, "mask_themes": 1.0}, True)):
        for episode in drawn(60, dropout=0.0, **({"mask_themes": 0.0} | options)):
            names = set(episode.names).union(*(q.names for q in episode.queries))
            concepts = {int(c) for c in given.tree.nodes(CONCEPT) if given.tree.names[c] in names}
            expected = np.isin(above[:, CONCEPT], list(concepts))
            if whole:
                keys = sum((q.keys for q in episode.queries if q.gap == "branch"), ())
                themes = {*given.tree.parent[episode.concepts], *theme_of(given.tree, keys)}
                assert (episode.masked >= np.isin(above[:, THEME], list(themes))).all()
                expected |= np.isin(above[:, THEME], list(themes))
            assert (episode.masked >= expected).all()
            others = episode.masked & ~expected
            # a branch concept without a drawn image still belongs to the episode
            assert whole or not others.any()


def test_masks_are_as_frequent_as_asked_for() -> None:
    given = planted()
    above = chain(given.tree, given.bank.node)
    own = whole = 0
    for episode in drawn(400, dropout=0.0):
        hidden = set(above[episode.masked, CONCEPT].tolist())
        own += set(episode.concepts.tolist()) <= hidden
        whole += bool(episode.masked[above[:, CONCEPT] < 0].any())
    assert own / 400 == pytest.approx(0.75, abs=0.09)  # four standard deviations
    assert whole / 400 == pytest.approx(0.25, abs=0.09)
    assert not any(e.masked.any() for e in drawn(40, dropout=0.0, mask_concepts=0.0, mask_themes=0.0))
    dropped = np.mean([e.masked for e in drawn(200, mask_concepts=0.0, mask_themes=0.0)])
    assert dropped == pytest.approx(0.3, abs=0.02)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unlabeled": 1.5}, r"unlabeled is 1.5; a probability lies between 0 and 1"),
        ({"plain": float("nan")}, "plain is nan"),
        ({"mask_concepts": 0.8, "mask_themes": 0.3}, r"mask_concepts \+ mask_themes is 1.1"),
        ({"branch": (0.2,)}, "branch has 1 values"),
        ({"branch": (0.2, 1.2)}, "branch is 1.2"),
        ({"branch": (-0.2, 0.2)}, "branch is -0.2"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": (0, 4)}, "sizes holds 0"),
        ({"least": 1}, "least is 1; it must be at least 2"),
        ({"complexity": "random"}, "complexity is 'random'; choose from measured, fixed"),
    ],
)
def test_options_outside_their_range_are_errors_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        EpisodeConfig(**options)


def test_parts_that_do_not_belong_together_are_errors_in_words() -> None:
    given = planted()
    with pytest.raises(FingerprintMismatch, match="the view cache of cdcd"):
        tasks(replace(given, views=replace(given.views, fingerprint="cd" * 32)))
    with pytest.raises(FingerprintMismatch, match="the bank of cdcd"):
        tasks(replace(given, bank=replace(given.bank, fingerprint="cd" * 32)))
    with pytest.raises(InvalidData, match="names nodes that the tree doesn't have"):
        tasks(replace(world([[[9], [9]]] * 2), bank=given.bank))
    strangers = tuple(f"other/{i}" for i in range(len(given.views)))
    with pytest.raises(InvalidData, match="0 concepts in 0 themes have 4 unseen images"):
        tasks(replace(given, views=replace(given.views, keys=strangers)))
    with pytest.raises(InvalidData, match="need two each, in different themes"):
        tasks(world([[[9], [9]]]))
    for index, progress in ((-1, 0.0), (0, -0.1), (0, 1.1), (0, float("nan"))):
        with pytest.raises(ValueError, match="expected 0 or more, and 0 to 1"):
            tasks().episode(index, progress)
