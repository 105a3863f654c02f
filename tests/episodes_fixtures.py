"""A made-up tree with its bank and view cache: no clustering and no model, so that a tree may have any shape."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gram_core.episodes import Episode
from gram_core.unseen import PLAIN, ViewCache
from prototypes.bank import PrototypeBank
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, THEME, Hierarchy
from prototypes.vectors import unit

FINGERPRINT = "ab" * 32
D, V = 16, 3
DOMAINS = (PLAIN, "cartoon", "pencil")
EACH = 2  # prototypes of a mode
Shape = Sequence[Sequence[Sequence[int]]]  # images of every mode of every concept of every theme
SHAPE: Shape = [[[8, 8]] * 4, [[8, 8, 8]] * 5, [[12, 6]] * 3, [[9]] * 2, [[8, 8]] * 6, [[10, 5, 5]]]


@dataclass(frozen=True)
class World:
    tree: Hierarchy
    bank: PrototypeBank
    views: ViewCache


def world(shape: Shape = SHAPE, *, seed: int = 0, shared: bool = True, restyled: float = 0.5) -> World:
    """Random directions for every node and image. Every third pair was seen by the towers, so it has no views; of the
    others a share is restyled. With `shared` the first concepts of all themes have one name."""
    rng = np.random.default_rng(seed)
    level, parent, names, label = [0], [-1], ["root"], []
    themes = range(1, 1 + len(shape))
    for theme in themes:
        level, parent, names = [*level, THEME], [*parent, 0], [*names, f"theme {theme}"]
    concepts = []
    for theme, own in zip(themes, shape, strict=True):
        for number, modes in enumerate(own):
            concepts.append((theme, len(level), modes))
            name = "water" if shared and number == 0 else f"thing {theme}.{number}"
            level, parent, names = [*level, CONCEPT], [*parent, theme], [*names, name]
    for theme, concept, modes in concepts:
        for count in modes:
            label += [(theme, concept, len(level))] * count
            level, parent, names = [*level, MODE], [*parent, concept], [*names, names[concept]]
    m, n = len(level), len(label)
    labels = np.array(label, np.int64)[rng.permutation(n)].T
    visual = unit(rng.standard_normal((m, D)))
    zeros = np.zeros(m, np.float32)
    tree = Hierarchy(
        level=np.array(level, np.int64),
        parent=np.array(parent, np.int64),
        label=np.ascontiguousarray(labels),
        visual=visual,
        text=unit(rng.standard_normal((m, D))),
        concentration=zeros,
        rank=zeros,
        confusion=zeros,
        kappa=rng.random(m).astype(np.float32),
        visual_mean=(0.01 * rng.standard_normal(D)).astype(np.float32),
        text_mean=np.zeros(D, np.float32),
        names=tuple(names),
        keys=tuple(f"shard/{i:05d}" for i in range(n)),
        fingerprint=FINGERPRINT,
    )
    return World(tree, bank_of(tree), views_of(tree, rng, restyled))


def bank_of(tree: Hierarchy) -> PrototypeBank:
    """A prototype of every node, `EACH` of every mode."""
    node = np.repeat(np.arange(len(tree.level)), np.where(tree.level == MODE, EACH, 1)).astype(np.int64)
    first = np.searchsorted(node, np.arange(len(tree.level)))
    ones = np.ones(len(node), np.int64)
    return PrototypeBank(
        visual=tree.visual[node],
        text=tree.text[node],
        concentration=ones.astype(np.float32),
        kappa=tree.kappa[node],
        parent=np.where(node > 0, first[tree.parent[node]], -1).astype(np.int64),
        level=tree.level[node],
        node=node,
        count=ones,
        visual_mean=tree.visual_mean,
        text_mean=tree.text_mean,
        names=tuple(tree.names[u] for u in node),
        medoids=("",) * len(node),
        fingerprint=FINGERPRINT,
    )


def views_of(tree: Hierarchy, rng: np.random.Generator, restyled: float) -> ViewCache:
    rows = []
    for i, key in enumerate(tree.keys):
        if i % 3:
            rows += [(key, domain) for domain in DOMAINS[: None if rng.random() < restyled else 1]]
    features = unit(rng.standard_normal((len(rows), V, D))).astype(np.float16)
    keys, domains = zip(*rows, strict=True)
    return ViewCache(FINGERPRINT, keys, domains, features)


def chain(tree: Hierarchy, nodes: np.ndarray) -> np.ndarray:
    """(len(nodes), 4) the ancestors of each node by level, itself included; -1 below it."""
    found = np.full((len(nodes), len(LEVELS)), -1, np.int64)
    for i, node in enumerate(nodes.tolist()):
        while node >= 0:
            found[i, tree.level[node]] = node
            node = int(tree.parent[node])
    return found


def digest(episode: Episode) -> str:
    """A hash of all that an episode holds."""
    words = [episode.index, episode.seed, episode.kind, episode.names, episode.domain, episode.node, episode.keys]
    arrays = [episode.classes, episode.support, episode.support_labels, episode.masked, episode.concepts]
    for query in episode.queries:
        words += [query.names, query.gap, query.domain, query.keys]
        arrays += [query.features, query.labels, query.classes]
    made = hashlib.sha256(repr(words).encode())
    for array in arrays:
        made.update(np.asarray(array).tobytes())
    return made.hexdigest()
