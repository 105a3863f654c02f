"""Structure complexity: how hard a node of the tree is, and what that decides.

Three measures per node (concentration: PCL, Li et al. 2021, and HCSC, Guo et al. 2022; effective rank: Roy and
Vetterli 2007; cross-modal confusion with siblings: ours) become one number kappa in [0, 1], the mean of their
percentile ranks inside a level. kappa decides children, prototypes, task shape and how often a node is visited
(docs/method.md). Pure functions of arrays; every decision is monotone in kappa and bounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prototypes.vectors import Floats, Ints

__all__ = [
    "CONTROLS",
    "children",
    "concentration",
    "confusion",
    "control",
    "effective_rank",
    "kappa",
    "percentile_ranks",
    "prototypes",
    "sampling",
    "task_shape",
]

Doubles = NDArray[np.float64]

RANK_ROWS = 1024  # effective rank is read off at most this many rows: it costs n^3
CONTROLS = ("measured", "fixed", "permuted", "inverted")
SMALLEST_WAY, LARGEST_WAY = 5, 32
SUPPORT, LARGEST_SHOTS = 64, 16  # images of one support set; shots per concept


def concentration(features: Floats) -> float:
    """sigma = mean_i |f_i - mu| / log(n + 10) of one node's features (n, D); 0 for identical rows."""
    x = np.asarray(features, np.float64)
    distance = np.linalg.norm(x - x.mean(axis=0), axis=1).mean()
    return float(distance / np.log(len(x) + 10.0))


def effective_rank(features: Floats) -> float:
    """exp of the entropy of the normalised eigenvalues of Cov(f), f (n, D); from 1 to min(n - 1, D)."""
    x = np.asarray(features, np.float64)
    if len(x) > RANK_ROWS:
        x = x[np.linspace(0, len(x) - 1, RANK_ROWS).astype(np.int64)]
    x = x - x.mean(axis=0)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    values = np.linalg.eigvalsh(gram).clip(min=0.0)
    total = values.sum()
    if total <= 1e-12 * x.size:  # identical rows: no spread at all
        return 1.0
    share = values[values > 1e-12 * total] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def confusion(visual: Floats, siblings: Floats, own: int, scale: float) -> float:
    """1 - mean_i softmax_s(scale v_i . t_s)[own]: how often the images (n, D) look like the siblings' texts (S, D)."""
    if len(siblings) < 2:
        return 0.0
    logits = scale * (visual.astype(np.float64) @ siblings.astype(np.float64).T)
    logits -= logits.max(axis=1, keepdims=True)
    weight = np.exp(logits)
    return float(1.0 - (weight[:, own] / weight.sum(axis=1)).mean())


def percentile_ranks(values: ArrayLike) -> Doubles:
    """Ranks (m,) scaled to [0, 1], smallest first, ties sharing their mean rank; one value alone gets 1/2."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return np.full(len(x), 0.5)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    above = np.cumsum(counts)
    ranks: Doubles = (above - (counts + 1) / 2.0)[inverse] / (len(x) - 1)
    return ranks


def kappa(*measures: ArrayLike) -> Doubles:
    """Complexity (m,) in [0, 1] of the nodes of one level: the mean of the measures' percentile ranks."""
    mean: Doubles = np.stack([percentile_ranks(measure) for measure in measures]).mean(axis=0)
    return mean


def control(values: ArrayLike, how: str, seed: int) -> Doubles:
    """`values` (m,) as measured, or as one of the ablation's controls: all 1/2, permuted among nodes, 1 - kappa."""
    x = np.asarray(values, np.float64)
    if how == "measured":
        return x
    if how == "fixed":
        return np.full_like(x, 0.5)
    if how == "permuted":
        return np.random.default_rng([seed, len(x)]).permutation(x)
    if how == "inverted":
        return 1.0 - x
    raise ValueError(f"complexity is {how!r}; choose one of {', '.join(CONTROLS)}.")


def _between(values: ArrayLike, low: int, high: int) -> Ints:
    """round(low^(1-kappa) high^kappa)."""
    if not 1 <= low <= high:
        raise ValueError(f"the bounds are ({low}, {high}); they must satisfy 1 <= low <= high.")
    x = np.asarray(values, np.float64)
    if x.size and not (x.min() >= 0.0 and x.max() <= 1.0):
        raise ValueError(f"complexity spans {x.min():.3f} to {x.max():.3f}; it must lie in [0, 1].")
    return np.rint(float(low) ** (1.0 - x) * float(high) ** x).astype(np.int64)


def children(values: ArrayLike, sizes: ArrayLike, low: int, high: int, smallest: int) -> Ints:
    """How many children each node gets: at least `smallest` members for each; 1 means that it isn't split."""
    wanted = np.maximum(2, _between(values, low, high))
    return np.maximum(1, np.minimum(wanted, np.asarray(sizes, np.int64) // max(smallest, 1)))


def prototypes(values: ArrayLike, low: int = 1, high: int = 8) -> Ints:
    """How many prototypes each node gets."""
    return _between(values, low, high)


def task_shape(values: ArrayLike, concepts: ArrayLike, images: ArrayLike) -> tuple[Ints, Ints]:
    """(way, shots) of a task in each node: harder nodes get more ways and fewer shots, at constant compute.

    `concepts` is how many the task can draw from, `images` how many of each it can use for its support.
    """
    x = np.asarray(values, np.float64)
    way = np.clip(np.rint(5.0 + 27.0 * x).astype(np.int64), SMALLEST_WAY, LARGEST_WAY)
    way = np.maximum(1, np.minimum(way, np.asarray(concepts, np.int64)))
    shots = np.clip(SUPPORT // way, 1, LARGEST_SHOTS)
    return way, np.maximum(1, np.minimum(shots, np.asarray(images, np.int64)))


def sampling(
    values: ArrayLike, sizes: ArrayLike, progress: float, *, floor: float = 0.2, width: float = 0.25
) -> Doubles:
    """p_s(u), sums to 1: sqrt(n) times a bell around 0.25 + 0.5 progress (a curriculum), never below floor / nodes.

    `progress` = s / S of training, in [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must lie in [0, 1].")
    x, n = np.asarray(values, np.float64), np.asarray(sizes, np.float64)
    weight = np.sqrt(n) * np.exp(-((x - (0.25 + 0.5 * progress)) ** 2) / (2.0 * width**2))
    probability: Doubles = (1.0 - floor) * weight / weight.sum() + floor / len(x)
    return probability
