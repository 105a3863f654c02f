"""The tree that clustering leaves: themes, concepts, modes under one root; every kept pair in one node per level.

Centroids are raw unit features (nothing subtracted); `visual_mean` and `text_mean` are what relations subtract.
Kept as `tree.safetensors` and `tree.json`; knows neither models nor the features it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.tree import Tree

from prototypes import store
from prototypes.vectors import Floats, Ints

__all__ = ["CONCEPT", "LEVELS", "MODE", "ROOT", "THEME", "Hierarchy", "load_hierarchy", "save_hierarchy"]

LEVELS = ("root", "themes", "concepts", "modes")
ROOT, THEME, CONCEPT, MODE = range(4)
NAME, KIND, FORMAT = "tree", "hierarchy", 1
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchy:
    """M nodes, root first, level after level, children of one parent together; N kept pairs sorted by key.

    Args:
        level: (M,) 0 root, 1 theme, 2 concept, 3 mode.
        parent: (M,) node above; -1 for the root.
        label: (3, N) the theme, concept and mode (node numbers) of each kept pair.
        visual, text: (M, D) raw unit centroids of the members' image and caption features.
        concentration, rank, confusion: (M,) the three measures of structure complexity; kappa: (M,) in [0, 1].
        names: M names; siblings have different ones, a mode has its concept's.
        keys: N keys of the kept pairs, sorted.
        visual_mean, text_mean: (D,) means of the kept features, not normalised: the modality gap.
        fingerprint: the model whose features these are.
        facts: what was read, dropped and asked for (JSON values).
    """

    level: Ints
    parent: Ints
    label: Ints
    visual: Floats
    text: Floats
    concentration: Floats
    rank: Floats
    confusion: Floats
    kappa: Floats
    visual_mean: Floats
    text_mean: Floats
    names: tuple[str, ...]
    keys: tuple[str, ...]
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def dimension(self) -> int:
        return int(self.visual.shape[1])

    @cached_property
    def sizes(self) -> Ints:
        """(M,) members of each node."""
        counts = np.bincount(self.label.ravel(), minlength=len(self.level))
        counts[0] = len(self.keys)
        return counts.astype(np.int64)

    def nodes(self, level: int) -> Ints:
        """The nodes of one level."""
        return np.flatnonzero(self.level == level).astype(np.int64)

    def children(self, node: int) -> Ints:
        """The nodes right below `node`."""
        return np.flatnonzero(self.parent == node).astype(np.int64)

    def members(self, node: int) -> Ints:
        """Positions in `keys` of the pairs in `node`, in order."""
        level = int(self.level[node])
        if level == ROOT:
            return np.arange(len(self.keys))
        return np.flatnonzero(self.label[level - 1] == node).astype(np.int64)

    def groups(self, level: int) -> list[Ints]:
        """`members` of every node of one level at once, in the order of `nodes(level)`."""
        if level == ROOT:
            return [self.members(0)]
        labels = self.label[level - 1]
        order = np.argsort(labels, kind="stable").astype(np.int64)
        starts = np.searchsorted(labels[order], self.nodes(level))
        return np.split(order, starts[1:])

    def path(self, node: int) -> tuple[str, ...]:
        """Names from the theme down to `node`; empty for the root."""
        names: list[str] = []
        while node > 0:
            names.append(self.names[node])
            node = int(self.parent[node])
        return tuple(reversed(names))

    def tree(self, *, depth: int = MODE) -> Tree:
        """The tree for a terminal: names, sizes, complexity, down to level `depth`."""
        sizes = self.sizes
        counts = ", ".join(f"{len(self.nodes(level)):,} {LEVELS[level]}" for level in (THEME, CONCEPT, MODE))
        top = Tree(f"[bold]{len(self.keys):,} pairs[/bold]: {counts}")
        branches = {0: top}
        number = 0
        for node in range(1, len(self.level)):
            level, parent = int(self.level[node]), int(self.parent[node])
            if level > depth:
                break
            number = number + 1 if parent == self.parent[node - 1] else 1
            if level == MODE:
                alone = len(self.children(parent)) == 1
                name = "one mode" if alone else f"mode {number}"
            else:
                name = f"[bold]{escape(self.names[node])}[/bold]" if level == THEME else escape(self.names[node])
            line = f"{name}  [dim]{sizes[node]:,} pairs, complexity {self.kappa[node]:.2f}[/dim]"
            branches[node] = branches[parent].add(line)
        return top


def _check(tree: Hierarchy) -> None:
    """Refuse what is not a tree over its pairs, in words."""
    m, n = len(tree.level), len(tree.keys)
    _require(m >= 4 and n >= 1, f"it has {m} nodes and {n} pairs; it needs at least a root, theme, concept and mode")
    d = tree.visual.shape[-1]
    shapes: dict[str, tuple[int, ...]] = {"level": (m,), "parent": (m,), "label": (3, n)}
    shapes |= {"visual": (m, d), "text": (m, d), "visual_mean": (d,), "text_mean": (d,)}
    shapes |= dict.fromkeys(("concentration", "rank", "confusion", "kappa"), (m,))
    for name, shape in shapes.items():
        array = getattr(tree, name)
        kind = np.int64 if name in ("level", "parent", "label") else np.float32
        _require(
            array.shape == shape and array.dtype == kind,
            f"`{name}` is {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape}",
        )
        _require(bool(np.isfinite(array).all()), f"`{name}` holds values that are not finite")
    for name in ("visual", "text"):
        norms = np.linalg.norm(getattr(tree, name).astype(np.float64), axis=1)
        worst = float(np.abs(norms - 1.0).max())
        _require(worst <= UNIT_TOLERANCE, f"`{name}` holds a centroid whose norm is off by {worst:.3g}")
    _require(len(tree.names) == m, f"it has {len(tree.names)} names for {m} nodes")
    _require(all(name.strip() for name in tree.names), "a node has no name")
    _require(bool(tree.fingerprint), "it has no fingerprint")
    _require(list(tree.level) == sorted(tree.level), "its nodes are not in the order of their levels")
    _require(set(tree.level.tolist()) == set(range(4)) and (tree.level == 0).sum() == 1, "it lacks a level or its root")
    _require(tree.parent[0] == -1 and bool((tree.parent[1:] >= 0).all()), "only its first node may be a root")
    _require(bool((tree.parent[1:] < m).all()), "a parent is not among the nodes")
    _require(bool((tree.level[tree.parent[1:]] == tree.level[1:] - 1).all()), "a node's parent is not one level above")
    _require(list(tree.parent) == sorted(tree.parent), "children of one parent are not together")
    _require(bool(((tree.label >= 0) & (tree.label < m)).all()), "a pair is in a node that does not exist")
    for row, level in enumerate((THEME, CONCEPT, MODE)):
        _require(bool((tree.level[tree.label[row]] == level).all()), f"a pair's node is not among the {LEVELS[level]}")
        above = np.zeros(n, np.int64) if row == 0 else tree.label[row - 1]
        _require(bool((tree.parent[tree.label[row]] == above).all()), "a pair is in a node but not in its parent")
    _require(bool((tree.sizes > 0).all()), "a node has no members")
    _require(bool((tree.kappa >= 0).all() and (tree.kappa <= 1).all()), "a complexity is outside [0, 1]")
    _require(bool((tree.concentration >= 0).all()), "a concentration is negative")
    named = tree.level < MODE
    siblings = set(zip(tree.parent[named].tolist(), tree.names, strict=False))
    _require(len(siblings) == int(named.sum()), "two siblings have the same name")
    _require(all(a < b for a, b in zip(tree.keys, tree.keys[1:], strict=False)), "its keys are not sorted and distinct")


def _require(kept: bool, what: str) -> None:
    if not kept:
        raise ValueError(f"this is no hierarchy: {what}; build it again.")


_ARRAYS = tuple(f.name for f in fields(Hierarchy) if f.name not in ("names", "keys", "fingerprint", "facts"))


def save_hierarchy(folder: Path, tree: Hierarchy) -> None:
    """Write `tree.safetensors` and `tree.json` into `folder`."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(tree, name) for name in _ARRAYS}
    arrays["keys"] = pack(tree.keys)
    header = {
        "kind": KIND,
        "format": FORMAT,
        "fingerprint": tree.fingerprint,
        "dimension": tree.dimension,
        "pairs": len(tree.keys),
        "nodes": len(tree.level),
        "facts": dict(tree.facts),
        "names": list(tree.names),
    }
    store.write(folder, NAME, arrays, header)


def load_hierarchy(folder: Path, *, fingerprint: str | None) -> Hierarchy:
    """The hierarchy in `folder`, made for the model `fingerprint` (None: for any). Raises ValueError in words."""
    arrays, header = store.read(folder, NAME, kind=KIND, format=FORMAT, fingerprint=fingerprint)
    missing = {*_ARRAYS, "keys"} - set(arrays)
    if missing:
        raise ValueError(f"the hierarchy in {folder} lacks {', '.join(sorted(missing))}; build it again.")
    return Hierarchy(
        **{name: arrays[name] for name in _ARRAYS},
        names=tuple(str(name) for name in header.get("names", ())),
        keys=unpack(arrays["keys"]),
        fingerprint=str(header["fingerprint"]),
        facts=header.get("facts", {}),
    )


def pack(words: Sequence[str]) -> NDArray[np.uint8]:
    """Words without line ends as one array of bytes."""
    for word in words:
        if "\n" in word:
            raise ValueError(f"a key may hold no line end, got {word!r}; rename it.")
    return np.frombuffer("\n".join(words).encode(), np.uint8)


def unpack(array: NDArray[np.uint8]) -> tuple[str, ...]:
    """What `pack` was given (at least one word)."""
    return tuple(np.asarray(array, np.uint8).tobytes().decode("utf-8").split("\n"))
