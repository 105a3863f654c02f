"""Arithmetic of unit vectors: seeding, spherical k-means, partitions with a smallest size, means of groups.

Everything is seeded and reads features block by block through a `Take`, so that memory-mapped input of any
length costs one block of rows (and one k-means sample) of memory. faiss does the searching, on a GPU if it has any.
What takes a `Team` is shared by its processes, and has the same bits whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from prototypes.team import ALONE, Team

__all__ = [
    "BLOCK",
    "Floats",
    "Ints",
    "Take",
    "assign",
    "blocks",
    "by_first",
    "group_means",
    "nearest",
    "partition",
    "spherical_kmeans",
    "total",
    "unit",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Take = Callable[[Ints], Floats]
"""Positions (n,) -> their features (n, D), float32, unit norm."""

BLOCK = 16_384  # rows held as float32 at once
PIECE = 256  # rows whose float64 copy stays in a core's cache
POINTS_PER_CENTRE = 256  # k-means trains on at most this many rows per centre, as faiss does
SEEDS_PER_CENTRE = 32  # greedy seeding looks at fewer: it costs several passes per centre
ITERATIONS = 25
SMALL = 200_000_000  # multiplications of one pass below which k-means may restart
RESTARTS = 3
TOGETHER = 1_000_000_000  # multiplications of one pass from which k-means is ours, and shared, rather than faiss's
WHOLE = 2.0**30  # features are added as whole numbers of its inverse: 63 bits hold the sum of 2^32 unit rows
GPU_FROM = 10_000_000_000  # multiplications of one pass from which moving it to a GPU pays


def blocks(count: int, size: int = BLOCK, team: Team = ALONE) -> Iterator[slice]:
    """Consecutive slices that cover range(count); this process's of them."""
    for start in range(team.rank * size, count, team.size * size):
        yield slice(start, min(start + size, count))


def unit(x: NDArray[np.floating] | Ints) -> Floats:
    """Rows of `x` (..., D) scaled to norm 1 as float32; a zero row stays zero."""
    scaled = np.empty(x.shape, np.float32)
    rows, into = x.reshape(-1, x.shape[-1]), scaled.reshape(-1, x.shape[-1])
    for part in blocks(len(rows), PIECE):
        wide = rows[part].astype(np.float64)
        into[part] = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return scaled


def nearest(x: Floats, centres: Floats, k: int = 1, *, team: Team = ALONE) -> tuple[Floats, Ints]:
    """Scores and indices (n, k) of the centres with the largest inner product, best first. Not shared."""
    x, centres = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(centres, np.float32)
    if faiss.get_num_gpus() and x.size * len(centres) >= GPU_FROM:
        own, metric = faiss.StandardGpuResources(), faiss.METRIC_INNER_PRODUCT
        scores, ids = faiss.knn_gpu(own, x, centres, k, metric=metric, device=team.gpu)
    else:
        with _threads(x.size * len(centres)):
            scores, ids = faiss.knn(x, centres, k, metric=faiss.METRIC_INNER_PRODUCT)
    return np.asarray(scores, np.float32), np.asarray(ids, np.int64)


def spherical_kmeans(x: Floats, k: int, seed: int, weights: Floats | None = None, *, team: Team = ALONE) -> Floats:
    """Centres (k, D) of unit norm for the rows of `x` (n, D), n >= k: greedy k-means++ seeds, then Lloyd's rounds.

    Of a few restarts (one only, where a pass is expensive) the one with the largest similarity wins. Rounds that are
    expensive are shared by `team`.
    """
    n, dimension = x.shape
    if not 1 <= k <= n:
        raise ValueError(f"k-means got {n} rows for {k} centres; it needs at least one row for each centre.")
    x = np.ascontiguousarray(x, np.float32)
    work = n * k * dimension
    best, best_score = np.empty((0, dimension), np.float32), -np.inf
    for attempt in range(RESTARTS if work < SMALL else 1):
        rng = np.random.default_rng([seed, attempt])
        own = int(rng.integers(2**31 - 1))
        start = x[_seeds(x, k, rng)]
        if work >= TOGETHER and weights is None:
            return _lloyd(x, start, team)
        clustering = faiss.Kmeans(
            dimension,
            k,
            niter=ITERATIONS,
            spherical=True,
            seed=own,
            min_points_per_centroid=1,
            max_points_per_centroid=max(POINTS_PER_CENTRE, -(-n // k)),
        )
        with _threads(work):
            clustering.train(x, weights=weights, init_centroids=start)
            centres = unit(np.asarray(clustering.centroids))
            scores = nearest(x, centres, team=team)[0][:, 0].astype(np.float64)
        score = float(scores.sum() if weights is None else scores @ weights)
        if score > best_score:
            best, best_score = centres, score
    return best


def _lloyd(x: Floats, centres: Floats, team: Team) -> Floats:
    """Lloyd's rounds from `centres` (k, D), every process with its blocks of `x`; a centre without rows stays.

    Sums are of whole numbers, so that they are the same bits in whatever order, by whatever number of processes.
    """
    for _ in range(ITERATIONS):
        sums = np.zeros(centres.shape, np.int64)
        for part in blocks(len(x), BLOCK // 4, team):
            rows = np.rint(x[part].astype(np.float64) * WHOLE).astype(np.int64)
            _add(sums, nearest(x[part], centres, team=team)[1][:, 0], rows)
        team.add(sums)
        centres = np.where(sums.any(axis=1, keepdims=True), unit(sums), centres)
    return np.ascontiguousarray(centres)


def _add(sums: NDArray[Any], labels: Ints, x: NDArray[Any]) -> None:
    """Add the rows of `x` (n, D) to those of `sums` (groups, D) that `labels` (n,) name, in order of rows."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    for group, rows in zip(present, np.split(order, starts[1:]), strict=True):
        sums[group] += x[rows].sum(axis=0, dtype=sums.dtype)  # as np.add.reduceat, 3 to 15 times as fast


@contextmanager
def _threads(work: int) -> Iterator[None]:
    """One faiss thread for small work: waking the others costs more than they help, far more on a busy machine."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if work < SMALL // 4 else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _seeds(x: Floats, k: int, rng: np.random.Generator) -> Ints:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of a few candidates drawn by distance, the most helpful."""
    pool = np.arange(len(x))
    if len(x) > SEEDS_PER_CENTRE * k:
        pool = np.sort(rng.choice(len(x), SEEDS_PER_CENTRE * k, replace=False))
    points = x[pool]
    trials = 2 + int(np.log(k))
    chosen = [int(rng.integers(len(points)))]
    distance = np.maximum(1.0 - points @ points[chosen[0]], 0.0).astype(np.float64)  # half the squared distance
    while len(chosen) < k:
        total = distance.sum()
        if total <= 1e-9:  # fewer distinct points than centres: any others will do
            rest = np.setdiff1d(np.arange(len(points)), chosen)
            chosen += [int(i) for i in rest[: k - len(chosen)]]
            break
        candidates = np.searchsorted(np.cumsum(distance), rng.random(trials) * total).clip(max=len(points) - 1)
        closer = np.minimum(distance[:, None], np.maximum(1.0 - points @ points[candidates].T, 0.0))
        best = int(np.argmin(closer.sum(axis=0)))
        chosen.append(int(candidates[best]))
        distance = closer[:, best]
    seeds: Ints = pool[np.array(chosen)].astype(np.int64)
    return seeds


def partition(take: Take, members: Ints, k: int, smallest: int, seed: int, team: Team = ALONE) -> Ints:
    """Labels (n,) of the positions `members`: at most `k` groups of at least `smallest`, numbered by first member.

    Groups that come out too small are dissolved, smallest first, into the nearest that are left.
    """
    k = min(k, len(members) // max(smallest, 1))
    if k < 2:
        return np.zeros(len(members), np.int64)
    sample = members
    if len(members) > POINTS_PER_CENTRE * k:
        rng = np.random.default_rng([seed, len(members)])
        sample = members[np.sort(rng.choice(len(members), POINTS_PER_CENTRE * k, replace=False))]
    centres = spherical_kmeans(take(sample), k, seed, team=team)
    labels = assign(take, members, centres, team)
    alive = np.arange(k)
    while True:
        sizes = np.bincount(labels, minlength=k)[alive]
        if len(alive) == 1 or sizes.min() >= smallest:
            break
        gone = alive[int(np.argmin(sizes))]
        alive = alive[alive != gone]
        moved = np.flatnonzero(labels == gone)
        if len(moved):
            labels[moved] = alive[nearest(take(members[moved]), centres[alive], team=team)[1][:, 0]]
    return by_first(labels)


def assign(take: Take, members: Ints, centres: Floats, team: Team = ALONE) -> Ints:
    """The nearest centre (n,) of every one of the positions `members`."""
    labels = np.zeros(len(members), np.int64)
    for part in blocks(len(members), team=team):
        labels[part] = nearest(take(members[part]), centres, team=team)[1][:, 0]
    team.add(labels)
    return labels


def by_first(labels: Ints) -> Ints:
    """The same grouping, its groups numbered 0, 1, ... in the order of their first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def total(take: Take, count: int, team: Team = ALONE) -> NDArray[np.float64]:
    """The sum (D,) of the features of positions 0..count-1: each block's, added in their order."""
    parts = list(blocks(count))
    sums = np.zeros((len(parts), take(np.arange(1)).shape[1]))
    for i in range(team.rank, len(parts), team.size):
        sums[i] = take(np.arange(parts[i].start, parts[i].stop)).sum(axis=0, dtype=np.float64)
    team.add(sums)
    whole: NDArray[np.float64] = sums.cumsum(axis=0)[-1]
    return whole


def group_means(take: Take, labels: Ints, groups: int, team: Team = ALONE) -> Floats:
    """Unit means (groups, D) of the features of positions 0..n-1, where `labels` (n,) says each one's group."""
    if groups == 1:
        return unit(total(take, len(labels), team)[None])
    mine = np.zeros(groups, bool)
    mine[team.deal(np.bincount(labels, minlength=groups))] = True
    sums = np.zeros((groups, take(np.arange(1)).shape[1]))
    for part in blocks(len(labels)):
        at = part.start + np.flatnonzero(mine[labels[part]])
        _add(sums, labels[at], take(at))
    team.add(sums)
    return unit(sums)
