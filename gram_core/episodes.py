"""Tasks for meta-training, drawn from the tree: a support set, queries across a gap, and what the task may not see.

An episode is either a supervised task of K_S shots or a simulated request of unlabeled images (docs/method.md,
"Episodes of meta-training"). It holds features, class names and masks; the model that made them and the learner that
uses them are none of its business. `Tasks.episode(i, progress)` is a pure function: any process may draw any episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gram_core import draws
from gram_core.config import option
from gram_core.draws import Indices
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData
from gram_core.unseen import PLAIN, ViewCache
from prototypes import complexity
from prototypes.bank import PrototypeBank
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, THEME, Hierarchy
from prototypes.vectors import unit

__all__ = ["KINDS", "SUPERVISED", "Episode", "EpisodeConfig", "Gap", "Query", "Tasks"]

SUPERVISED = "supervised"
KINDS = (SUPERVISED, *draws.KINDS)
Gap = Literal["in", "mode", "branch"]

FEWEST = 2  # images of a concept in a restyled domain: one to tune on, one to ask about
SMALLEST_WAY, LARGEST_WAY = 2, 48  # classes of a simulated request
EVERY_NAME = 0.1  # share of the simulated requests that name everything there is to name


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """How episodes are drawn; shares and probabilities lie in [0, 1]."""

    seed: int = option(0, "seed of the split into themes and of every episode")
    held_out: float = option(0.2, "share of the themes that only validation draws from, at least one")
    least: int = option(4, "unseen images that a concept needs to take part")
    complexity: str = option("measured", "structure complexity: measured, or a control: fixed, permuted, inverted")
    unlabeled: float = option(0.5, "share of simulated requests at the start; rises to all of them half way")
    sizes: tuple[int, ...] = option((1, 4, 8, 16, 32, 64), "images of a simulated request")
    plain: float = option(0.5, "probability that an episode's images are as they are, not restyled")
    query: int = option(4, "images of each class in a query at most")
    restyled: float = option(0.5, "probability that the mode gap is another domain instead of a visual mode")
    branch: tuple[float, ...] = option((0.2, 0.5), "probability of a branch query at the start and at the end")
    branch_way: int = option(16, "classes of a branch query at most")
    mask_concepts: float = option(0.5, "probability that the prototypes of the episode's own concepts are masked")
    mask_themes: float = option(0.25, "probability that those of their whole themes are masked instead")
    dropout: float = option(0.3, "probability that any other prototype is masked")

    def __post_init__(self) -> None:
        shares = ("unlabeled", "plain", "restyled", "mask_concepts", "mask_themes", "dropout")
        each = [(name, getattr(self, name)) for name in shares] + [("branch", value) for value in self.branch]
        for name, value in [*each, ("mask_concepts + mask_themes", self.mask_concepts + self.mask_themes)]:
            if not 0.0 <= value <= 1.0:
                raise InvalidConfig(f"{name} is {value}; a probability lies between 0 and 1.")
        if not 0.0 < self.held_out < 1.0:
            raise InvalidConfig(f"held_out is {self.held_out}; it must lie between 0 and 1, both excluded.")
        if len(self.branch) != 2:
            raise InvalidConfig(f"branch has {len(self.branch)} values; give one for the start and one for the end.")
        if not self.sizes:
            raise InvalidConfig("sizes is empty; name how many images a request may have.")
        least = {"seed": 0, "least": 2, "query": 1, "branch_way": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if min(self.sizes) < 1:
            raise InvalidConfig(f"sizes holds {min(self.sizes)}; a request has at least 1 image.")
        if self.complexity not in complexity.CONTROLS:
            raise InvalidConfig(f"complexity is {self.complexity!r}; choose from {', '.join(complexity.CONTROLS)}.")


@dataclass(frozen=True, eq=False)
class Query:
    """Labelled images across a gap from the support: `in` the same task, another visual `mode`, another `branch`.

    Args:
        names: (K,) class names; classes: (K,) int64 their rows in `Tasks.names`.
        features: (Q, D) float32 features of the originals, unit norm; labels: (Q,) int64 into `names`.
        domain: `plain` or how all of these images are restyled; keys: (Q,) the pairs that they belong to.
    """

    names: tuple[str, ...]
    features: Tensor
    labels: Tensor
    gap: Gap
    classes: Tensor
    domain: str = PLAIN
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Episode:
    """One task: what is tuned on, what is asked afterwards, and what must not be seen.

    Args:
        index: number of the episode; seed: for whatever its learner draws.
        kind: one of `KINDS`; only for `supervised` may the inner loss use the labels.
        names: (K,) distinct class names, shown or not; classes: (K,) int64 their rows in `Tasks.names`.
        support: (B, V, D) float32 views of B images of one domain, unit norm; support_labels: (B,) int64.
        queries: those that aren't empty, at most one of each gap.
        masked: (M,) bool over the bank's rows: prototypes that this episode must not see; never the root.
        node: the theme it was drawn from; concepts: (K,) nodes of the classes; keys: (B,) pairs of the support.
    """

    index: int
    seed: int
    kind: str
    names: tuple[str, ...]
    classes: Tensor
    support: Tensor
    support_labels: Tensor
    domain: str
    queries: tuple[Query, ...]
    masked: NDArray[np.bool_]
    node: int
    concepts: Indices
    keys: tuple[str, ...]


class Tasks:
    """Episodes over the themes of one side: training, or held out for validation.

    Raises InvalidData when the views and the tree have too little in common, FingerprintMismatch when tree, bank and
    views aren't of one model.
    """

    def __init__(
        self, tree: Hierarchy, bank: PrototypeBank, views: ViewCache, config: EpisodeConfig, *, held_out: bool
    ) -> None:
        for what, theirs in (("bank", bank.fingerprint), ("view cache", views.fingerprint)):
            if theirs != tree.fingerprint:
                raise FingerprintMismatch(
                    f"the tree is of model {tree.fingerprint[:16]}, the {what} of {theirs[:16]}. "
                    "Build both with one model."
                )
        if int(bank.node.max()) >= len(tree.level):
            raise InvalidData("the bank names nodes that the tree doesn't have. Build it again from this tree.")
        self.tree, self.views, self.config, self.held_out = tree, views, config, held_out
        self.names = tuple(dict.fromkeys(tree.names[c] for c in tree.nodes(CONCEPT)))
        self._class = {name: row for row, name in enumerate(self.names)}
        self._kappa = tree.kappa.astype(np.float64)
        for level in range(len(LEVELS)):
            nodes = tree.nodes(level)
            self._kappa[nodes] = complexity.control(tree.kappa[nodes], config.complexity, config.seed)
        self._rows = _rows(tree, views)
        self._images = _images(tree, self._rows, config.least)
        self.themes = self._side()
        self._concepts = {domain: self._of_themes(images) for domain, images in self._images.items()}
        self.domains = tuple(d for d, themes in self._concepts.items() if self._distinct(d, themes) >= SMALLEST_WAY)
        concept, self._bank_theme = (_ancestors(tree, bank.node, level) for level in (CONCEPT, THEME))
        self._bank_class = np.array([self._class[tree.names[c]] if c >= 0 else -1 for c in concept.tolist()], np.int64)

    @property
    def facts(self) -> dict[str, Any]:
        """What there is to draw from (JSON values): a record of the split."""
        concepts = self._concepts[PLAIN]
        images = {d: [len(self._images[d][c]) for t in self._concepts[d].values() for c in t] for d in self.domains}
        return {
            "held_out": self.held_out,
            "themes": [self.tree.names[theme] for theme in self.themes],
            "nodes": list(self.themes),
            "concepts": sum(map(len, concepts.values())),
            "images": {domain: sum(counts) for domain, counts in images.items()},
        }

    def episode(self, index: int, progress: float) -> Episode:
        """Episode `index` (>= 0) at `progress` in [0, 1] of the training: the same one whoever draws it, and when."""
        if index < 0 or not 0.0 <= progress <= 1.0:
            raise ValueError(f"got episode {index} at progress {progress}; expected 0 or more, and 0 to 1.")
        config = self.config
        rng = np.random.default_rng([config.seed, int(self.held_out), index])
        seed = int(rng.integers(2**63))
        kind = self._kind(rng, progress)
        domain = self._domain(rng)
        themes = np.array(list(self._concepts[domain]), np.int64)
        visited = complexity.sampling(self._kappa[themes], self.tree.sizes[themes], progress)
        node = int(rng.choice(themes, p=visited))
        low, high = config.branch
        others = [int(t) for t in rng.permutation(themes[themes != node])]
        kept = self._kept_back(domain, node, others) if rng.random() < low + (high - low) * progress else []
        concepts, shots = self._task(kind, domain, node, [t for t in others if t not in kept], rng)
        looks = rng.random() >= config.restyled or len(self.domains) == 1
        away = self._away(domain, concepts, rng) if looks else {}
        own = [self._images[domain][c] for c in concepts]
        near = [
            p[self.tree.label[MODE - 1, p] != away[c]] if c in away else p for c, p in zip(concepts, own, strict=True)
        ]
        support = self._support(kind, [self._reserve(p, rng) for p in near], shots, rng)
        left = [np.setdiff1d(p, support) for p in near]
        asked: list[tuple[Gap, str, list[int], list[Indices]]] = [("in", domain, concepts, left)]
        if away:
            far = [np.setdiff1d(p, q) for p, q in zip(own, near, strict=True)]
            asked.append(("mode", domain, concepts, far))
        else:
            asked.append(self._restyled(domain, concepts, support, rng))
        new = self._chosen(domain, [*kept, *others], config.branch_way, rng, taken=concepts) if kept else []
        new = new if len(new) >= SMALLEST_WAY else []
        if new:
            asked.append(("branch", domain, new, [self._images[domain][c] for c in new]))
        return Episode(
            index=index,
            seed=seed,
            kind=kind,
            names=self._names_of(concepts),
            classes=self._classes_of(concepts),
            support=torch.from_numpy(self.views.views(self._rows[domain][support])),
            support_labels=self._labels(concepts, support),
            domain=domain,
            queries=tuple(q for q in (self._query(*each, rng=rng) for each in asked) if q is not None),
            masked=self._masked([*concepts, *new], rng),
            node=node,
            concepts=np.array(concepts, np.int64),
            keys=tuple(self.tree.keys[p] for p in support),
        )

    # ---- the parts of an episode, in the order in which they are drawn ----

    def _kind(self, rng: np.random.Generator, progress: float) -> str:
        share = self.config.unlabeled + (1.0 - self.config.unlabeled) * min(1.0, 2.0 * progress)
        unlabeled, which = rng.random() < share, int(rng.integers(len(draws.KINDS)))
        return draws.KINDS[which] if unlabeled else SUPERVISED

    def _domain(self, rng: np.random.Generator) -> str:
        restyled = [domain for domain in self.domains if domain != PLAIN]
        if rng.random() < self.config.plain or not restyled:
            return PLAIN
        return restyled[int(rng.integers(len(restyled)))]

    def _kept_back(self, domain: str, node: int, others: Sequence[int]) -> list[int]:
        """The first of `others` for a branch query, where enough names are left for the task without it."""
        kept = list(others[:1])
        return kept if self._distinct(domain, [node, *others[1:]]) >= SMALLEST_WAY else []

    def _task(
        self, kind: str, domain: str, node: int, siblings: Sequence[int], rng: np.random.Generator
    ) -> tuple[list[int], int]:
        """The concepts of the task and its shots: harder nodes get more ways; sibling themes join a small theme."""
        there = self._distinct(domain, [node, *siblings])
        way, shots = (int(x[0]) for x in complexity.task_shape([self._kappa[node]], [there], [complexity.SUPPORT]))
        if kind != SUPERVISED:  # a list of names that a caller gives may be far shorter, or longer
            low, high = max(SMALLEST_WAY, way // 4), max(SMALLEST_WAY, min(LARGEST_WAY, 2 * way))
            way = round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
            if rng.random() < EVERY_NAME:
                way = there
        chosen = self._chosen(domain, [node, *siblings], max(way, SMALLEST_WAY), rng)
        return [chosen[i] for i in rng.permutation(len(chosen))], shots

    def _chosen(
        self, domain: str, themes: Iterable[int], way: int, rng: np.random.Generator, taken: Iterable[int] = ()
    ) -> list[int]:
        """Up to `way` concepts of `themes`, in their order, with distinct names that no concept in `taken` has."""
        taken = list(taken)
        names = {self.tree.names[c] for c in taken}
        used = {int(self.tree.parent[c]) for c in taken}
        chosen: list[int] = []
        for theme in dict.fromkeys(themes):
            if theme in used:
                continue
            for concept in rng.permutation(self._concepts[domain][theme]):
                if len(chosen) == way:
                    return chosen
                if self.tree.names[concept] not in names:
                    names.add(self.tree.names[concept])
                    chosen.append(int(concept))
        return chosen

    def _away(self, domain: str, concepts: Sequence[int], rng: np.random.Generator) -> dict[int, int]:
        """Concept -> the visual mode that is kept for the query: the farthest with probability kappa, else any."""
        away: dict[int, int] = {}
        for concept in concepts:
            own = self.tree.label[MODE - 1, self._images[domain][concept]]
            modes, counts = np.unique(own, return_counts=True)
            farthest, any_ = rng.random() < self._kappa[concept], int(rng.integers(max(1, len(modes))))
            if len(modes) < 2:
                continue
            centres = unit(self.tree.visual[modes] - self.tree.visual_mean)
            pick = int((centres @ centres.sum(axis=0)).argmin()) if farthest else any_
            if len(own) - counts[pick] >= FEWEST:
                away[concept] = int(modes[pick])
        return away

    def _reserve(self, images: Indices, rng: np.random.Generator) -> Indices:
        """The images of a class that the support may take: some are kept for the query of the same task."""
        kept = min(self.config.query, max(1, len(images) // 3)) if len(images) >= FEWEST else 0
        return rng.permutation(images)[kept:]

    def _support(self, kind: str, own: list[Indices], shots: int, rng: np.random.Generator) -> Indices:
        """Positions of the support's images. A size that the images can't fill is not drawn."""
        if kind == SUPERVISED:
            return np.concatenate([images[:shots] for images in own])
        most = max(map(len, own)) if kind == "single" else sum(map(len, own))
        sizes = [size for size in self.config.sizes if size <= most] or [most]
        size = int(rng.choice(sizes))
        if kind == "single":
            own = [images for images in own if len(images) >= size]
        return draws.request(kind, own, size, rng)

    def _restyled(
        self, domain: str, concepts: list[int], support: Indices, rng: np.random.Generator
    ) -> tuple[Gap, str, list[int], list[Indices]]:
        """The same classes in another domain, without the pairs of the support."""
        others = [other for other in self.domains if other != domain]
        if not others:
            return "mode", domain, concepts, []
        other = others[int(rng.integers(len(others)))]
        every = [self._images[other].get(c, np.zeros(0, np.int64)) for c in concepts]
        return "mode", other, concepts, [np.setdiff1d(images, support) for images in every]

    def _query(
        self, gap: Gap, domain: str, concepts: list[int], images: list[Indices], *, rng: np.random.Generator
    ) -> Query | None:
        asked = [draws.some(own, self.config.query, rng) for own in images]
        if not sum(map(len, asked)):
            return None
        positions = np.concatenate(asked)
        return Query(
            names=self._names_of(concepts),
            features=torch.from_numpy(self.views.originals(self._rows[domain][positions])),
            labels=self._labels(concepts, positions),
            gap=gap,
            classes=self._classes_of(concepts),
            domain=domain,
            keys=tuple(self.tree.keys[p] for p in positions),
        )

    def _masked(self, concepts: Sequence[int], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Guards: at test time the sample's own concept is not in the bank, so here it often isn't either.

        Concepts elsewhere that have the name of a masked one go with it; the root always stays.
        """
        drawn, dropped = rng.random(), rng.random(len(self._bank_class)) < self.config.dropout
        if drawn < self.config.mask_concepts + self.config.mask_themes:
            dropped |= np.isin(self._bank_class, self._classes_of(concepts).numpy())
            if drawn >= self.config.mask_concepts:
                dropped |= np.isin(self._bank_theme, self.tree.parent[list(concepts)])
        dropped[0] = False
        return dropped

    # ---- lookups ----

    def _side(self) -> tuple[int, ...]:
        """The themes of this side: a seeded split of those that have concepts to draw."""
        names: dict[int, set[str]] = {}
        for concept in self._images[PLAIN]:
            names.setdefault(int(self.tree.parent[concept]), set()).add(self.tree.names[concept])

        def enough(themes: Iterable[int]) -> bool:
            return len(set().union(*(names[t] for t in themes))) >= SMALLEST_WAY

        order = np.random.default_rng([self.config.seed, len(names)]).permutation(sorted(names)).tolist()
        wanted = max(1, round(self.config.held_out * len(order)))
        held: list[int] = []
        for theme in list(order):
            rest = [t for t in order if t != theme]
            if (len(held) < wanted or not enough(held)) and enough(rest):
                held, order = [*held, theme], rest
        if not enough(held) or not enough(order):
            raise InvalidData(
                f"{len(self._images[PLAIN])} concepts in {len(names)} themes have {self.config.least} unseen images; "
                "training and validation need two each, in different themes. Give more images that the towers were not "
                "fitted on, or a tree of the pairs that they belong to."
            )
        return tuple(sorted(held if self.held_out else order))

    def _of_themes(self, images: Mapping[int, Indices]) -> dict[int, list[int]]:
        """Theme -> its concepts with enough images, for the themes of this side that have one."""
        found: dict[int, list[int]] = {}
        for concept in sorted(images):
            theme = int(self.tree.parent[concept])
            if theme in self.themes:
                found.setdefault(theme, []).append(concept)
        return dict(sorted(found.items()))

    def _distinct(self, domain: str, themes: Iterable[int]) -> int:
        return len({self.tree.names[c] for t in themes for c in self._concepts[domain][t]})

    def _names_of(self, concepts: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.tree.names[c] for c in concepts)

    def _classes_of(self, concepts: Iterable[int]) -> Tensor:
        return torch.tensor([self._class[self.tree.names[c]] for c in concepts], dtype=torch.int64)

    def _labels(self, concepts: Sequence[int], positions: Indices) -> Tensor:
        place = {concept: k for k, concept in enumerate(concepts)}
        return torch.tensor([place[int(c)] for c in self.tree.label[CONCEPT - 1, positions]], dtype=torch.int64)


def _rows(tree: Hierarchy, views: ViewCache) -> dict[str, Indices]:
    """Domain -> (N,) row in the view cache of each pair of the tree, -1 where there is none; `plain` first."""
    position = {key: i for i, key in enumerate(tree.keys)}
    found = {domain: np.full(len(tree.keys), -1, np.int64) for domain in (PLAIN, *sorted({*views.domains} - {PLAIN}))}
    for row, (key, domain) in enumerate(zip(views.keys, views.domains, strict=True)):
        if key in position:
            found[domain][position[key]] = row
    return found


def _images(tree: Hierarchy, rows: Mapping[str, Indices], least: int) -> dict[str, dict[int, Indices]]:
    """Domain -> concept -> positions of its unseen images, for concepts with `least` plain ones."""
    found: dict[str, dict[int, Indices]] = {}
    concepts = [int(c) for c in tree.nodes(CONCEPT)]
    for domain, own in rows.items():
        fewest = least if domain == PLAIN else FEWEST
        members = zip(concepts, tree.groups(CONCEPT), strict=True)
        there = {c: positions[own[positions] >= 0] for c, positions in members}
        found[domain] = {
            c: p for c, p in there.items() if len(p) >= fewest and (domain == PLAIN or c in found[PLAIN])
        }  # fmt: skip
    return found


def _ancestors(tree: Hierarchy, nodes: Indices, level: int) -> Indices:
    """The node of `level` above each of `nodes` (or itself); -1 for nodes that are above that level."""
    found = nodes.copy()
    for _ in range(len(LEVELS)):
        deeper = tree.level[found] > level
        found = np.where(deeper, tree.parent[found], found)
    return np.where(tree.level[found] == level, found, -1)
