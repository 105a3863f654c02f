"""Arithmetic of unit vectors: seeding, spherical k-means, partitions with a smallest size, means of groups.

Everything is seeded and reads features block by block through a `Take`, so that memory-mapped input of any
length costs one block of rows (and one k-means sample) of memory. faiss does the searching, on its GPUs if it has any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "Floats",
    "Ints",
    "Take",
    "blocks",
    "group_means",
    "nearest",
    "partition",
    "spherical_kmeans",
    "unit",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Take = Callable[[Ints], Floats]
"""Positions (n,) -> their features (n, D), float32, unit norm."""

BLOCK = 16_384  # rows held as float32 at once
POINTS_PER_CENTRE = 256  # k-means trains on at most this many rows per centre, as faiss does
SEEDS_PER_CENTRE = 32  # greedy seeding looks at fewer: it costs several passes per centre
ITERATIONS = 25
SMALL = 200_000_000  # multiplications of one pass below which k-means may restart
RESTARTS = 3
GPU_FROM = 10_000_000_000  # multiplications of one pass from which moving it to a GPU pays


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Consecutive slices that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def unit(x: NDArray[np.floating]) -> Floats:
    """Rows of `x` (..., D) scaled to norm 1 as float32; a zero row stays zero."""
    wide = np.asarray(x, np.float64)
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    scaled: Floats = (wide / np.maximum(norm, 1e-12)).astype(np.float32)
    return scaled


def nearest(x: Floats, centres: Floats, k: int = 1) -> tuple[Floats, Ints]:
    """Scores and indices (n, k) of the centres with the largest inner product, best first."""
    x, centres = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(centres, np.float32)
    if faiss.get_num_gpus() and x.size * len(centres) >= GPU_FROM:
        scores, ids = faiss.knn_gpu(faiss.StandardGpuResources(), x, centres, k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        with _threads(x.size * len(centres)):
            scores, ids = faiss.knn(x, centres, k, metric=faiss.METRIC_INNER_PRODUCT)
    return np.asarray(scores, np.float32), np.asarray(ids, np.int64)


def spherical_kmeans(x: Floats, k: int, seed: int, weights: Floats | None = None) -> Floats:
    """Centres (k, D) of unit norm for the rows of `x` (n, D), n >= k: greedy k-means++ seeds, then Lloyd's rounds.

    Of a few restarts (one only, where a pass is expensive) the one with the largest similarity wins.
    """
    n, dimension = x.shape
    if not 1 <= k <= n:
        raise ValueError(f"k-means got {n} rows for {k} centres; it needs at least one row for each centre.")
    x = np.ascontiguousarray(x, np.float32)
    work = n * k * dimension
    best, best_score = np.empty((0, dimension), np.float32), -np.inf
    for attempt in range(RESTARTS if work < SMALL else 1):
        rng = np.random.default_rng([seed, attempt])
        clustering = faiss.Kmeans(
            dimension,
            k,
            niter=ITERATIONS,
            spherical=True,
            seed=int(rng.integers(2**31 - 1)),
            min_points_per_centroid=1,
            max_points_per_centroid=max(POINTS_PER_CENTRE, -(-n // k)),
            gpu=bool(work >= GPU_FROM and faiss.get_num_gpus()),
        )
        with _threads(work):
            clustering.train(x, weights=weights, init_centroids=x[_seeds(x, k, rng)])
            centres = unit(np.asarray(clustering.centroids))
            scores = nearest(x, centres)[0][:, 0].astype(np.float64)
        score = float(scores.sum() if weights is None else scores @ weights)
        if score > best_score:
            best, best_score = centres, score
    return best


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


def partition(take: Take, members: Ints, k: int, smallest: int, seed: int) -> Ints:
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
    centres = spherical_kmeans(take(sample), k, seed)
    labels = np.empty(len(members), np.int64)
    for part in blocks(len(members)):
        labels[part] = nearest(take(members[part]), centres)[1][:, 0]
    alive = np.arange(k)
    while True:
        sizes = np.bincount(labels, minlength=k)[alive]
        if len(alive) == 1 or sizes.min() >= smallest:
            break
        gone = alive[int(np.argmin(sizes))]
        alive = alive[alive != gone]
        moved = np.flatnonzero(labels == gone)
        if len(moved):
            labels[moved] = alive[nearest(take(members[moved]), centres[alive])[1][:, 0]]
    return by_first(labels)


def by_first(labels: Ints) -> Ints:
    """The same grouping, its groups numbered 0, 1, ... in the order of their first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def group_means(take: Take, labels: Ints, groups: int) -> Floats:
    """Unit means (groups, D) of the features of positions 0..n-1, where `labels` (n,) says each one's group."""
    sums: NDArray[np.float64] | None = None
    for part in blocks(len(labels)):
        order = np.argsort(labels[part], kind="stable")
        x = take(part.start + order).astype(np.float64)
        present, starts = np.unique(labels[part][order], return_index=True)
        if sums is None:
            sums = np.zeros((groups, x.shape[1]))
        sums[present] += np.add.reduceat(x, starts, axis=0)
    assert sums is not None
    return unit(sums)
