"""What clustering leaves behind for test time, read and written as safetensors and JSON.

The root is one unit image feature that joins a request's class marginal as rehearsal; the bank holds prototypes of
every level of the tree, searched by faiss (docs/method.md). Both are made of one model's features: see `fingerprint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from prototypes import complexity, store
from prototypes.cache import FeatureCache
from prototypes.cluster import Space
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, ROOT, THEME, Hierarchy
from prototypes.team import ALONE, Team
from prototypes.vectors import Floats, Ints, by_first, group_means, nearest, partition, spherical_kmeans, unit

ARRAYS, HEADER = "root.safetensors", "root.json"
FORMAT = 1
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Root:
    """The root prototype: `visual` (D,) float32 of unit norm, made from `count` pairs of `source`."""

    visual: NDArray[np.float32]
    fingerprint: str
    count: int
    source: str

    def __post_init__(self) -> None:
        check_unit(self.visual)


def check_unit(visual: NDArray[np.float32]) -> None:
    """Refuse anything that is not one finite float32 vector of unit norm."""
    if visual.ndim != 1 or visual.size == 0:
        raise ValueError(f"a root is one vector (D,), got an array of shape {visual.shape}; rebuild it.")
    if visual.dtype != np.float32:
        raise ValueError(f"a root is float32, got {visual.dtype}; convert it or rebuild it.")
    if not np.isfinite(visual).all():
        raise ValueError("the root holds values that are not finite; rebuild it.")
    norm = float(np.linalg.norm(visual.astype(np.float64)))
    if abs(norm - 1.0) > UNIT_TOLERANCE:
        raise ValueError(f"the root has norm {norm:.4f}, expected 1; normalise it or rebuild it.")


def save_root(path_dir: Path, root: Root) -> None:
    """Write `root.safetensors` and `root.json` into a model's folder."""
    path_dir.mkdir(parents=True, exist_ok=True)
    save_file({"visual": np.ascontiguousarray(root.visual)}, path_dir / ARRAYS)
    (path_dir / ARRAYS).chmod(0o644)  # safetensors writes for the owner alone
    header = {
        "format": FORMAT,
        "fingerprint": root.fingerprint,
        "dimension": int(root.visual.shape[0]),
        "count": root.count,
        "source": root.source,
    }
    (path_dir / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def load_root(path_dir: Path, *, fingerprint: str) -> Root | None:
    """The root beside a model's weights, or None when it has none.

    Raises ValueError in words when the root was made for another model, or is damaged.
    """
    arrays, header_path = path_dir / ARRAYS, path_dir / HEADER
    if not arrays.exists() and not header_path.exists():
        return None
    for path in (arrays, header_path):
        if not path.exists():
            raise ValueError(f"the root in {path_dir} lacks {path.name}; restore it, or remove both files.")
    try:
        header = json.loads(header_path.read_text(encoding="utf-8"))
        stored, dimension = str(header["fingerprint"]), int(header["dimension"])
        count, source, form = int(header["count"]), str(header["source"]), header["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{header_path} is not a root's header ({error!r}); rebuild the root.") from error
    if form != FORMAT:
        raise ValueError(f"{header_path} has format {form!r}, this version reads {FORMAT}; rebuild the root.")
    if stored != fingerprint:
        raise ValueError(
            f"the root in {path_dir} was made for model {stored[:16]}, the loaded model is {fingerprint[:16]}; "
            "rebuild the root for this model, or remove it."
        )
    visual = _read_visual(arrays)
    if visual.shape != (dimension,):
        raise ValueError(f"{arrays} holds shape {visual.shape}, its header says ({dimension},); rebuild the root.")
    return Root(visual=visual, fingerprint=stored, count=count, source=source)


def _read_visual(path: Path) -> NDArray[np.float32]:
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type, which is not part of its typed interface
        raise ValueError(f"{path} is not a readable safetensors file ({error}); rebuild the root.") from error
    if "visual" not in tensors:
        raise ValueError(f"{path} has no tensor 'visual'; rebuild the root.")
    return tensors["visual"]


BANK, KIND, BANK_FORMAT = "bank", "prototype bank", 1
FLAT_BELOW = 65_536  # prototypes of one level from which an inverted file takes over from comparing all
RECALL, RECALL_QUERIES, RECALL_NEIGHBOURS = 0.99, 256, 10
PROTOTYPES = {THEME: (1, 2), CONCEPT: (1, 4), MODE: (1, 8)}  # fewest and most of one node, by complexity
MEMBERS_EACH = 4  # pairs that a prototype of a mode stands for, at least, when there are two


@dataclass(frozen=True, kw_only=True, eq=False)
class PrototypeBank:
    """M prototypes, level after level from the root (row 0) down; immutable and safe under threads.

    Args:
        visual, text: (M, D) raw unit centres of the image and the caption features.
        concentration: (M,) PCL's phi, scaled to mean 1 inside a level and clipped at its 10th and 90th percentiles.
        kappa: (M,) complexity of the node.
        parent: (M,) row of the prototype above; -1 for the root.
        level: (M,) 0 root, 1 theme, 2 concept, 3 mode.
        node: (M,) node of the hierarchy that it stands for.
        count: (M,) pairs that it is the centre of.
        visual_mean, text_mean: (D,) what relations subtract (`centre`).
        names: M names; prototypes of one concept share its name.
        medoids: M keys of the pair whose image is nearest to the centre; "" above the modes.
        fingerprint: the model; source: the pairs.
        flat_below: prototypes of one level from which search uses an inverted file.
    """

    visual: Floats
    text: Floats
    concentration: Floats
    kappa: Floats
    parent: Ints
    level: Ints
    node: Ints
    count: Ints
    visual_mean: Floats
    text_mean: Floats
    names: tuple[str, ...]
    medoids: tuple[str, ...]
    fingerprint: str
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    flat_below: int = FLAT_BELOW

    def __post_init__(self) -> None:
        _check_bank(self)
        centred = self.centre(self.visual)
        indices = {level: _index(centred[self.rows(level)], self.flat_below) for level in range(len(LEVELS))}
        object.__setattr__(self, "_indices", indices)

    @property
    def dimension(self) -> int:
        return int(self.visual.shape[1])

    @property
    def root(self) -> Root:
        """The root of docs/method.md: the normalised mean of the modes' raw visual centres."""
        return Root(np.ascontiguousarray(self.visual[0]), self.fingerprint, int(self.count[0]), self.source)

    def rows(self, level: int) -> Ints:
        """Rows of one level's prototypes: consecutive."""
        return np.flatnonzero(self.level == level).astype(np.int64)

    def centre(self, image: Floats) -> Floats:
        """Raw image features (..., D) as relations use them: norm(v - mean v)."""
        return unit(image - self.visual_mean)

    def centre_text(self, text: Floats) -> Floats:
        """Raw text features (..., D) as relations use them: norm(t - mean t)."""
        return unit(text - self.text_mean)

    def search(self, queries: Floats, k: int, *, level: int = MODE) -> tuple[Floats, Ints]:
        """Cosines and bank rows, both (n, min(k, prototypes of the level)), nearest first.

        `queries` (n, D) are raw image features; they and the centres are compared after `centre`.
        """
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(
                f"queries have shape {queries.shape}, the bank holds dimension {self.dimension}; "
                f"give (n, {self.dimension}) features of model {self.fingerprint[:16]}."
            )
        if not np.isfinite(queries).all():
            raise ValueError("queries hold values that are not finite; check the images that they come from.")
        if level not in range(len(LEVELS)) or k < 1:
            raise ValueError(f"got level {level} and k {k}; level is 0 (root) to 3 (modes), k at least 1.")
        index: faiss.Index = self._indices[level]  # type: ignore[attr-defined]  # set on the frozen object when it is made
        scores, ids = index.search(np.ascontiguousarray(self.centre(queries)), min(k, index.ntotal))
        return np.asarray(scores, np.float32), np.where(ids >= 0, ids + self.rows(level)[0], -1).astype(np.int64)

    @classmethod
    def build(
        cls,
        tree: Hierarchy,
        cache: FeatureCache,
        *,
        bounds: Mapping[int, tuple[int, int]] = PROTOTYPES,
        seed: int = 0,
        flat_below: int = FLAT_BELOW,
        team: Team = ALONE,
    ) -> PrototypeBank:
        """Prototypes of a hierarchy from the cache it was grown from; every process of `team` gets the same ones.

        A mode gets k-means centres of its images, as many as its complexity says; levels above get k-means over
        the centres below them (HCSC, Guo et al. 2022, bottom-up), so that every prototype has one parent.
        """
        if cache.fingerprint != tree.fingerprint:
            raise ValueError(
                f"the tree is of model {tree.fingerprint[:16]}, the cache of {cache.fingerprint[:16]}; "
                "use the cache that the tree was grown from."
            )
        levels = [_of_modes(tree, Space(cache, cache.rows(tree.keys), team=team), bounds[MODE], seed)]
        parents: list[Ints] = []
        for level in (CONCEPT, THEME, ROOT):
            above, parent = _above(tree, levels[0], level, bounds.get(level, (1, 1)), seed, team)
            levels, parents = [above, *levels], [parent, *parents]
        sizes = [len(level.node) for level in levels]
        starts = np.cumsum([0, *sizes])
        node = np.concatenate([level.node for level in levels])
        # The root's centre is the mean over the modes' prototypes, whatever lies between.
        levels[0].visual[0] = unit(levels[-1].visual.mean(axis=0, dtype=np.float64))
        return cls(
            visual=np.concatenate([level.visual for level in levels]),
            text=np.concatenate([level.text for level in levels]),
            concentration=np.concatenate([_rescaled(level.concentration) for level in levels]),
            kappa=tree.kappa[node],
            parent=np.concatenate([[-1], *(parent + start for parent, start in zip(parents, starts, strict=False))]),
            level=np.repeat(np.arange(len(LEVELS)), sizes),
            node=node,
            count=np.concatenate([level.count for level in levels]),
            visual_mean=tree.visual_mean,
            text_mean=tree.text_mean,
            names=tuple(tree.names[i] for i in node),
            medoids=("",) * (len(node) - sizes[-1]) + tuple(levels[-1].medoids),
            fingerprint=tree.fingerprint,
            source=str(tree.facts.get("source", "")),
            facts=tree.facts,
            flat_below=flat_below,
        )


@dataclass(frozen=True, eq=False)
class _Level:
    """Prototypes of one level while a bank is built."""

    visual: Floats
    text: Floats
    concentration: Floats
    node: Ints
    count: Ints
    medoids: Sequence[str] = ()


def _of_modes(tree: Hierarchy, space: Space, bounds: tuple[int, int], seed: int) -> _Level:
    """k-means of every mode's images; each prototype has at least MEMBERS_EACH members where its mode has two."""
    nodes, groups, team = tree.nodes(MODE), tree.groups(MODE), space.team
    wanted = complexity.prototypes(tree.kappa[nodes], *bounds)
    own, counts = np.zeros(len(tree.keys), np.int64), np.zeros(len(nodes), np.int64)
    for i in team.deal([len(group) * int(k) for group, k in zip(groups, wanted, strict=True)]):
        own[groups[i]] = partition(space.image, groups[i], int(wanted[i]), MEMBERS_EACH, seed, team.alone)
        counts[i] = own[groups[i]].max() + 1
    team.add(own)
    team.add(counts)
    number = int(counts.sum())
    label = own + (np.cumsum(counts) - counts)[tree.label[MODE - 1] - nodes[0]]
    visual, text = (group_means(take, label, number, team) for take in (space.raw_image, space.raw_text))
    order, sizes = np.argsort(label, kind="stable"), np.bincount(label)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    phi, medoids = np.zeros(number), np.zeros(number, np.int64)
    for i in team.deal(sizes):
        phi[i] = complexity.concentration(space.image(parts[i]))
        medoids[i] = parts[i][int(np.argmax(space.raw_image(parts[i]) @ visual[i]))]
    team.add(phi)
    team.add(medoids)
    keys = [tree.keys[i] for i in medoids]
    node = np.repeat(nodes, counts)
    return _Level(visual, text, phi.astype(np.float32), node, sizes.astype(np.int64), keys)


def _above(
    tree: Hierarchy, below: _Level, level: int, bounds: tuple[int, int], seed: int, team: Team
) -> tuple[_Level, Ints]:
    """Prototypes of `level` over the centres right below, and which of them each of those belongs to."""
    centred = unit(below.visual - tree.visual_mean)
    weight = below.count.astype(np.float32)
    nodes, above = tree.nodes(level), tree.parent[below.node]  # children of one node are together
    families = np.split(np.arange(len(above)), np.searchsorted(above, nodes[1:]))
    wanted = complexity.prototypes(tree.kappa[nodes], *bounds)
    own, counts = np.zeros(len(above), np.int64), np.zeros(len(nodes), np.int64)
    for i in team.deal([len(family) for family in families]):
        family, k = families[i], int(min(wanted[i], len(families[i])))
        if k > 1:
            centres = spherical_kmeans(centred[family], k, seed, weight[family])
            own[family] = by_first(nearest(centred[family], centres)[1][:, 0])
        counts[i] = own[family].max() + 1
    team.add(own)
    team.add(counts)
    parent = own + (np.cumsum(counts) - counts)[above - nodes[0]]
    node = np.repeat(nodes, counts)
    m, d = len(node), below.visual.shape[1]
    sums = np.zeros((2, m, d))
    for i, x in enumerate((below.visual, below.text)):
        np.add.at(sums[i], parent, x * weight[:, None].astype(np.float64))
    count = np.bincount(parent, weights=below.count).astype(np.int64)
    return _Level(unit(sums[0]), unit(sums[1]), tree.concentration[node], node, count), parent


def _rescaled(phi: Floats) -> Floats:
    """Concentrations of one level (m,): mean 1, clipped at the 10th and 90th percentiles; 1 where all are 0."""
    wide = phi.astype(np.float64)
    wide = wide.clip(*np.percentile(wide, [10, 90]))
    mean = wide.mean()
    if mean <= 1e-9:
        return np.ones(len(phi), np.float32)
    scaled: Floats = np.maximum(wide / mean, 0.05).astype(np.float32)  # identical images: sharp, not a division by 0
    return scaled


def _index(vectors: Floats, flat_below: int) -> faiss.Index:
    """An index over centred centres (m, D): exact below `flat_below`, else an inverted file whose recall is checked."""
    m, d = vectors.shape
    vectors = np.ascontiguousarray(vectors)
    if m < flat_below:
        flat = faiss.IndexFlatIP(d)
        flat.add(vectors)
        return flat
    lists = max(1, int(np.sqrt(m)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.cp.seed = 0
    index.train(vectors)
    index.add(vectors)
    rng = np.random.default_rng(0)
    pairs = rng.integers(m, size=(2, RECALL_QUERIES))
    queries = unit(vectors[pairs[0]] + 0.5 * vectors[pairs[1]])
    k = min(RECALL_NEIGHBOURS, m)
    exact = nearest(queries, vectors, k)[0][:, -1:]
    index.nprobe = max(1, lists // 64)
    while index.nprobe < lists and float((index.search(queries, k)[0] >= exact - 1e-5).mean()) < RECALL:
        index.nprobe = min(lists, 2 * index.nprobe)
    return index


_ARRAYS = ("visual", "text", "concentration", "kappa", "parent", "level", "node", "count", "visual_mean", "text_mean")
_WHOLE = ("parent", "level", "node", "count")


def _check_bank(bank: PrototypeBank) -> None:
    """Refuse what is no bank, in words."""
    m = len(bank.names)
    d = bank.visual.shape[-1] if bank.visual.ndim == 2 else 0
    _require(m >= len(LEVELS) and d > 0, f"it has {m} prototypes of dimension {d}")
    shapes = dict.fromkeys(_ARRAYS, (m,)) | dict.fromkeys(("visual", "text"), (m, d))
    shapes |= dict.fromkeys(("visual_mean", "text_mean"), (d,))
    for name, shape in shapes.items():
        array = getattr(bank, name)
        kind = np.int64 if name in _WHOLE else np.float32
        _require(
            array.shape == shape and array.dtype == kind,
            f"`{name}` is {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape}",
        )
        _require(bool(np.isfinite(array).all()), f"`{name}` holds values that are not finite")
    for name in ("visual", "text"):
        norms = np.linalg.norm(getattr(bank, name).astype(np.float64), axis=1)
        worst = float(np.abs(norms - 1.0).max())
        _require(worst <= UNIT_TOLERANCE, f"`{name}` holds a centre whose norm is off by {worst:.3g}")
    _require(len(bank.medoids) == m, f"it has {len(bank.medoids)} medoids for {m} prototypes")
    _require(bool(bank.fingerprint), "it has no fingerprint")
    _require(bank.flat_below >= 1, f"flat_below is {bank.flat_below}, expected at least 1")
    levels = bank.level.tolist()
    _require(levels == sorted(levels) and set(levels) == set(range(len(LEVELS))), "its levels are not root to modes")
    _require(levels.count(ROOT) == 1 and bank.parent[0] == -1, "only its first prototype may be the root")
    _require(bool(((bank.parent[1:] >= 0) & (bank.parent[1:] < m)).all()), "a parent is not among the prototypes")
    _require(bool((bank.level[bank.parent[1:]] == bank.level[1:] - 1).all()), "a parent is not one level above")
    _require(bool((bank.kappa >= 0).all() and (bank.kappa <= 1).all()), "a complexity is outside [0, 1]")
    _require(bool((bank.concentration > 0).all()), "a concentration is not positive")
    _require(bool((bank.count > 0).all()), "a prototype stands for no pair")


def _require(kept: bool, what: str) -> None:
    if not kept:
        raise ValueError(f"this is no prototype bank: {what}; build it again.")


def save_bank(path_dir: Path, bank: PrototypeBank) -> None:
    """Write `bank.safetensors` and `bank.json`: vectors, no index."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(bank, name) for name in _ARRAYS}
    header = {
        "kind": KIND,
        "format": BANK_FORMAT,
        "fingerprint": bank.fingerprint,
        "dimension": bank.dimension,
        "prototypes": {LEVELS[level]: len(bank.rows(level)) for level in range(len(LEVELS))},
        "flat_below": bank.flat_below,
        "source": bank.source,
        "facts": dict(bank.facts),
        "names": list(bank.names),
        "medoids": list(bank.medoids),
    }
    store.write(path_dir, BANK, arrays, header)


def load_bank(path_dir: Path, *, fingerprint: str | None) -> PrototypeBank | None:
    """The bank in a model's folder, its index built anew; None when the folder has none.

    Raises ValueError in words when it was made for another model than `fingerprint` (None: any), or is damaged.
    """
    if not any((path_dir / f"{BANK}.{kind}").exists() for kind in ("safetensors", "json")):
        return None
    arrays, header = store.read(path_dir, BANK, kind=KIND, format=BANK_FORMAT, fingerprint=fingerprint)
    missing = set(_ARRAYS) - set(arrays)
    if missing:
        raise ValueError(f"the prototype bank in {path_dir} lacks {', '.join(sorted(missing))}; build it again.")
    return PrototypeBank(
        **{name: arrays[name] for name in _ARRAYS},
        names=tuple(str(name) for name in header["names"]),
        medoids=tuple(str(key) for key in header["medoids"]),
        fingerprint=str(header["fingerprint"]),
        source=str(header["source"]),
        facts=header["facts"],
        flat_below=int(header["flat_below"]),
    )
