"""Cross-modal hierarchical clustering: from a feature cache to the tree of themes, concepts and modes.

Language decides labels (concepts are clusters of captions), vision decides domains (modes are clusters of images), the
joint space decides themes. How far a node is split follows from its complexity and the number of pairs
(docs/method.md). Seeded; the tree depends on keys and features, never on the order of rows, nor on how many processes
of a `Team` share the work: rows of large nodes are dealt to them, and small nodes whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prototypes import complexity
from prototypes.cache import FeatureCache
from prototypes.cleaning import clean
from prototypes.hierarchy import CONCEPT, MODE, ROOT, THEME, Hierarchy
from prototypes.naming import Phrasebook
from prototypes.team import ALONE, Team
from prototypes.vectors import Floats, Ints, Take, blocks, group_means, partition, total, unit

__all__ = ["KINDS", "ClusterConfig", "Sizes", "Space", "grow"]

KINDS: dict[str, tuple[str, str, str]] = {  # what splits root, themes and concepts
    "full": ("joint", "text", "image"),
    "random": ("joint", "text", "image"),  # the full tree's pairs and sizes, dealt out at random
    "flat": ("none", "joint", "none"),  # one theme, concepts straight from the joint space, no modes
    "image": ("image", "image", "image"),
    "text": ("text", "text", "text"),
}
MEASURED = 4_096  # members of a node that its complexity is measured on
PCA_ROWS = 65_536
PER_ROW = 8  # what a row of a node costs besides its children, in children
LARGE = 0.25  # of a process's fair share: nodes that cost more are split by all processes together
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many children a node may have, and how many pairs they need at least."""

    themes: int
    concepts: tuple[int, int]
    modes: tuple[int, int]
    smallest_concept: int
    smallest_mode: int

    def __post_init__(self) -> None:
        for name, (low, high) in (("concepts", self.concepts), ("modes", self.modes)):
            if not 1 <= low <= high:
                raise ValueError(f"{name} may have between {low} and {high} children; give 1 <= low <= high.")
        for name in ("themes", "smallest_concept", "smallest_mode"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @classmethod
    def of(cls, pairs: int) -> Sizes:
        """Power laws through the sizes of docs/method.md at about 9 thousand, 200 thousand and 2 million pairs."""
        x = max(pairs, 1) / 9_000.0
        each = 9.4 * x**0.265  # concepts of a theme of middling complexity
        modes = 2.7 * x**0.1
        return cls(
            themes=max(2, round(16 * x**0.385)),
            concepts=(int(np.clip(round(each / 2), 4, 32)), int(np.clip(round(each * 2), 8, 64))),
            modes=(2, int(np.clip(round(modes**2 / 2), 2, 12))),
            smallest_concept=int(np.clip(round(12 * x**0.316), 3, 32)),
            smallest_mode=int(np.clip(round(4 * x**0.224), 2, 8)),
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What is dropped, how the tree is cut, and which ablation it is."""

    kind: str = "full"
    complexity: str = "measured"  # or a control of prototypes.complexity
    seed: int = 0
    quantile: float = 0.2  # of agreement, below which pairs are dropped
    duplicate: float = 0.97  # image cosine above which the later pair is dropped
    leak: float = 0.95  # image cosine to the user's test images above which a pair is dropped
    logit_scale: float = 100.0  # CLIP's
    components: int = 128  # of the joint space
    sizes: Sizes | None = None  # None: from the number of pairs

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if self.complexity not in complexity.CONTROLS:
            raise ValueError(f"complexity is {self.complexity!r}; choose one of {', '.join(complexity.CONTROLS)}.")
        if not 0.0 <= self.quantile < 1.0:
            raise ValueError(f"quantile is {self.quantile}; it must lie in [0, 1).")
        if self.seed < 0 or self.components < 1 or self.logit_scale <= 0:
            raise ValueError("seed must be at least 0, components at least 1, logit_scale above 0.")


class Space:
    """Features of n kept pairs by position, modality gap removed; reads blocks of the cache, holds means only."""

    def __init__(self, cache: FeatureCache, rows: Ints, components: int = 128, team: Team = ALONE) -> None:
        self.cache, self.rows, self.team = cache, rows, team
        self.visual_mean, self.text_mean = self._mean(self.raw_image), self._mean(self.raw_text)
        self.components = components
        self._components: tuple[Floats, Floats] | None = None

    def _found(self) -> tuple[Floats, Floats]:
        """Centre (2 D,) and axes (2 D, components) of the joint space, from an even sample of the pairs."""
        sample = np.arange(len(self.rows))
        if len(self.rows) > PCA_ROWS:
            sample = np.linspace(0, len(self.rows) - 1, PCA_ROWS).astype(np.int64)
        d, parts = 2 * self.cache.dimension, list(blocks(len(sample)))
        sums, moments = np.zeros((len(parts), d)), np.zeros((len(parts), d, d))
        for i in range(self.team.rank, len(parts), self.team.size):
            z = self._both(sample[parts[i]])
            sums[i], moments[i] = z.sum(axis=0, dtype=np.float64), z.T @ z
        self.team.add(sums)
        self.team.add(moments)
        centre = sums.sum(axis=0) / len(sample)
        values, vectors = np.linalg.eigh(moments.sum(axis=0) / len(sample) - np.outer(centre, centre))
        largest = values > 1e-7 * max(float(values[-1]), 1e-12)
        return centre.astype(np.float32), vectors[:, largest][:, ::-1][:, : self.components].astype(np.float32)

    def _mean(self, take: Take) -> Floats:
        return (total(take, len(self.rows), self.team) / len(self.rows)).astype(np.float32)

    def _both(self, at: Ints) -> Floats:
        return np.concatenate([self.image(at), self.text(at)], axis=1) * np.float32(np.sqrt(0.5))

    def raw_image(self, at: Ints) -> Floats:
        return np.asarray(self.cache.image[self.rows[at]], np.float32)

    def raw_text(self, at: Ints) -> Floats:
        return np.asarray(self.cache.caption[self.rows[at]], np.float32)

    def image(self, at: Ints) -> Floats:
        """norm(v - mean v) (n, D)."""
        return unit(self.raw_image(at) - self.visual_mean)

    def text(self, at: Ints) -> Floats:
        """norm(t - mean t) (n, D)."""
        return unit(self.raw_text(at) - self.text_mean)

    def take(self, modality: str) -> Take:
        """`image`, `text`, or the first principal components of [image; text], of unit norm (n, components).

        All processes of the team ask for it, since they find the components together.
        """
        if modality in ("image", "text"):
            return self.image if modality == "image" else self.text
        centre, axes = self._components = self._components or self._found()
        return lambda at: unit((self._both(at) - centre) @ axes)


def grow(
    cache: FeatureCache,
    config: ClusterConfig | None = None,
    *,
    leaks: Floats | None = None,
    report: Report = lambda _: None,
    team: Team = ALONE,
) -> Hierarchy:
    """Cluster a cache into a hierarchy; `leaks` (L, D) are features of images that must not be in it.

    Every process of `team` gets the same one, bit for bit that of one process alone (on processors of one kind, with
    as many threads each).
    Raises ValueError in words when the cache is damaged or leaves too few pairs.
    """
    config = config or ClusterConfig()
    report(f"reading {len(cache):,} pairs")
    kept = clean(
        cache,
        quantile=config.quantile,
        duplicate=config.duplicate,
        leak=config.leak,
        leaks=leaks,
        seed=config.seed,
        team=team,
    )
    sizes = config.sizes or Sizes.of(len(kept.rows))
    if len(kept.rows) < sizes.smallest_concept:
        raise ValueError(
            f"{len(kept.rows)} of {len(cache)} pairs are left after cleaning ({_told(kept.dropped)}), fewer than the "
            f"{sizes.smallest_concept} of the smallest concept; give more pairs, or lower quantile and sizes."
        )
    report(f"{len(kept.rows):,} pairs kept ({_told(kept.dropped)})")
    space = Space(cache, kept.rows, config.components, team)
    growth = _Growth(space, sizes, config)
    label = growth.split(report)
    book = Phrasebook.of(cache, kept.rows)
    names, inside = _named(space, label, book)
    if not inside.any():
        raise ValueError(
            "no concept's name tells its images from its siblings' better than twice chance: images and captions "
            "of this cache don't fit each other, or the model does not know them. Check the cache."
        )
    report(f"{int((~inside).sum()):,} pairs dropped with concepts whose names don't fit their images")
    stay = np.flatnonzero(inside).astype(np.int64)
    label, book = label[:, stay], Phrasebook.of(cache, kept.rows[stay])
    final = Space(cache, kept.rows[stay], config.components, team) if len(stay) < len(inside) else space
    if config.kind == "random":
        label = label[:, np.random.default_rng([config.seed, 1]).permutation(label.shape[1])]
        label = np.stack([np.unique(row, return_inverse=True)[1] for row in label])
        names, _ = _named(final, label, book)
    facts: dict[str, Any] = {
        "source": cache.source,
        "model": cache.model,
        "read": len(cache),
        "dropped": {**kept.dropped, "unfit names": int((~inside).sum())},
        "config": {**asdict(config), "sizes": asdict(sizes)},
    }
    return _finish(final, label, names, book, config, tuple(kept.keys[i] for i in stay), facts)


def _told(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) + " dropped"


class _Growth:
    """The three splits, each from the complexity of the level above."""

    def __init__(self, space: Space, sizes: Sizes, config: ClusterConfig) -> None:
        self.space, self.sizes, self.config = space, sizes, config
        self.by = KINDS[config.kind]

    def split(self, report: Report) -> Ints:
        """(3, n) theme, concept and mode of each position; numbers are distinct inside a level."""
        n, s = len(self.space.rows), self.sizes
        theme = np.zeros(n, np.int64)
        if self.by[0] != "none":
            themes = max(1, min(s.themes, n // s.smallest_concept))
            take, team = self.space.take(self.by[0]), self.space.team
            theme = partition(take, np.arange(n), themes, s.smallest_concept, self.config.seed, team)
        report(f"{theme.max() + 1:,} themes")
        concepts = s.concepts
        if self.config.kind == "flat":  # as many as a tree of middling complexity would have
            concepts = (1, max(2, s.themes * round(float(np.sqrt(concepts[0] * concepts[1])))))
        concept = self._below(theme, np.zeros(n, np.int64), self.by[1], concepts, s.smallest_concept)
        report(f"{concept.max() + 1:,} concepts")
        if self.by[2] == "none":
            return np.stack([theme, concept, concept])
        mode = self._below(concept, theme, self.by[2], s.modes, s.smallest_mode)
        report(f"{mode.max() + 1:,} modes")
        return np.stack([theme, concept, mode])

    def _below(self, label: Ints, above: Ints, modality: str, bounds: tuple[int, int], smallest: int) -> Ints:
        """Labels of the children of every node of `label` (n,), whose parents are `above` (n,)."""
        groups = _groups(label)
        if self.config.kind == "flat":
            wanted = np.array([min(bounds[1], len(label) // smallest)])
        else:
            text = group_means(self.space.raw_text, label, len(groups), self.space.team)
            kappa = _measure(self.space, label, above, text, modality, self.config)[3]
            wanted = complexity.children(kappa, [len(g) for g in groups], *bounds, smallest)
            if bounds[1] == 1:
                wanted[:] = 1
        take, team = self.space.take(modality), self.space.team
        child, counts = np.zeros(len(label), np.int64), np.zeros(len(groups), np.int64)

        def split(i: int, team: Team) -> None:
            own = partition(take, groups[i], int(wanted[i]), smallest, self.config.seed + i + 1, team)
            if team.rank == 0:
                child[groups[i]], counts[i] = own, own.max() + 1

        costs = np.array([len(group) for group in groups]) * (wanted + PER_ROW)
        shared = team.size * costs > costs.sum() * LARGE
        for i in np.flatnonzero(shared):
            split(int(i), team)
        for i in team.deal(np.where(shared, 0, costs)):
            if not shared[i]:
                split(int(i), team.alone)
        team.add(child)
        team.add(counts)
        return child + (np.cumsum(counts) - counts)[label]


def _groups(label: Ints) -> list[Ints]:
    """Positions of every label 0..k-1, in order."""
    order = np.argsort(label, kind="stable").astype(np.int64)
    return np.split(order, np.searchsorted(label[order], np.arange(1, label.max() + 1)))


def _measure(
    space: Space, label: Ints, above: Ints, text: Floats, modality: str, config: ClusterConfig
) -> tuple[NDArray[np.float64], ...]:
    """Concentration, effective rank, confusion and kappa, each (k,), of the nodes `label` with parents `above`.

    `text` (k, D) are the nodes' raw mean caption features; children of one parent have consecutive numbers.
    """
    groups = _groups(label)
    parent = np.array([above[group[0]] for group in groups])
    take, found = space.take(modality), np.zeros((3, len(groups)))
    for i in space.team.deal([min(len(group), MEASURED) for group in groups]):
        group = groups[i]
        if len(group) > MEASURED:
            group = group[np.linspace(0, len(group) - 1, MEASURED).astype(np.int64)]
        x = take(group)
        first, end = np.searchsorted(parent, parent[i]), np.searchsorted(parent, parent[i], side="right")
        found[0, i] = complexity.concentration(x)
        found[1, i] = complexity.effective_rank(x)
        found[2, i] = complexity.confusion(space.raw_image(group), text[first:end], int(i - first), config.logit_scale)
    space.team.add(found)
    kappa = complexity.control(complexity.kappa(*found), config.complexity, config.seed)
    return (*found, kappa)


def _named(space: Space, label: Ints, book: Phrasebook) -> tuple[list[str], NDArray[np.bool_]]:
    """A name for every concept, and (n,) whether it tells a pair's images from its siblings' at twice chance."""
    theme, concept = label[0], label[1]
    groups, sibling = _groups(theme), np.full(len(theme), -1, np.int64)
    pages = book.split(theme, len(groups))
    number, inside = np.zeros(int(concept.max()) + 1, np.int64), np.zeros(len(theme), np.int64)
    for i in space.team.deal([len(members) for members in groups]):
        members = groups[i]
        numbers, local, sizes = np.unique(concept[members], return_inverse=True, return_counts=True)
        k = len(numbers)
        sibling[members] = local
        # mypy has no type for a lambda with a default, which binds this turn's members
        text = group_means(lambda at, m=members: space.raw_text(m[at]), local, k)  # type: ignore[misc]
        phrase = pages[i].choose(sibling, sizes, text, space.text_mean)
        sibling[members] = -1
        number[numbers] = phrase
        inside[members] = 1
        if k < 2:
            continue
        right = np.zeros(k)
        for part in blocks(len(members)):
            logits = space.raw_image(members[part]) @ book.feature[phrase].T
            logits[:, phrase < 0] = -np.inf
            right += np.bincount(local[part], weights=logits.argmax(axis=1) == local[part], minlength=k)
        # Of two or three siblings twice chance would ask for (nearly) every image: half of them is enough.
        inside[members] = (right / sizes >= min(2.0 / k, 0.5))[local]
    space.team.add(number)
    space.team.add(inside)
    names = [""] * len(number)
    for members in groups:
        numbers = np.unique(concept[members])
        for each, name in zip(numbers, book.words_of(number[numbers], "concept"), strict=True):
            names[each] = name
    return names, inside.astype(bool)


def _finish(
    space: Space,
    label: Ints,
    concepts: list[str],
    book: Phrasebook,
    config: ClusterConfig,
    keys: tuple[str, ...],
    facts: dict[str, Any],
) -> Hierarchy:
    """Number the nodes that are left and measure them; `concepts` are names by the numbers in `label`."""
    n = label.shape[1]
    local, parents = [np.zeros(n, np.int64)], [np.array([-1])]
    for row in label:  # number by parent, then by first member
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        above = local[-1][first]
        rank = np.empty(len(first), np.int64)
        order = np.lexsort((first, above))
        rank[order] = np.arange(len(first))
        local.append(rank[inverse])
        parents.append(above[order])
    counts = np.array([len(p) for p in parents])
    offset = np.concatenate([[0], np.cumsum(counts)[:-1]])
    by = (*KINDS[config.kind], "image")
    visual, text = (
        [group_means(take, local[level], int(counts[level]), space.team) for level in range(4)]
        for take in (space.raw_image, space.raw_text)
    )
    measures = [
        np.stack(_measure(space, local[level], local[max(level - 1, 0)], text[level], by[level], config))
        for level in (ROOT, THEME, CONCEPT, MODE)
    ]
    measured = np.concatenate(measures, axis=1).astype(np.float32)
    sizes = np.bincount(local[THEME])
    themes = book.words_of(book.choose(local[THEME], sizes, text[THEME], space.text_mean), "theme")
    _, first = np.unique(local[2], return_index=True)
    named = [concepts[label[1, i]] for i in first]
    names = [["everything"], themes, named, [named[p] for p in parents[3]]]
    return Hierarchy(
        level=np.repeat(np.arange(4), counts),
        parent=np.concatenate([parents[0], *(parents[level] + offset[level - 1] for level in (1, 2, 3))]),
        label=np.stack([local[level] + offset[level] for level in (1, 2, 3)]),
        visual=np.concatenate(visual),
        text=np.concatenate(text),
        concentration=measured[0],
        rank=measured[1],
        confusion=measured[2],
        kappa=measured[3],
        visual_mean=space.visual_mean,
        text_mean=space.text_mean,
        names=tuple(name for level in names for name in level),
        keys=keys,
        fingerprint=space.cache.fingerprint,
        facts=facts,
    )
