"""Which images arrive together in one request: the draws that the harness measures on and meta-training simulates.

Pure functions of positions grouped by class and a generator; nothing here knows a model, an image or a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Indices", "consecutive", "one_after_another", "request", "some"]

Indices = NDArray[np.int64]

KINDS = ("iid", "imbalanced", "sorted", "single")
SHARES = 0.3  # Dirichlet concentration of the class shares of an imbalanced request


def request(kind: str, own: Sequence[Indices], size: int, rng: np.random.Generator) -> Indices:
    """One request of a kind in `KINDS`, at most `size` positions; `own` are those of each class, none empty.

    Where a class or the set has too few images the request is shorter; none is repeated.
    """
    if kind == "iid":
        return some(np.concatenate(own), size, rng)
    if kind == "single":
        return some(own[int(rng.integers(len(own)))], size, rng)
    if kind == "imbalanced":
        wanted = rng.multinomial(size, rng.dirichlet(np.full(len(own), SHARES)))
        taken = [some(images, int(n), rng) for images, n in zip(own, wanted, strict=True) if n]
        return rng.permutation(np.concatenate(taken))
    if kind == "sorted":
        return consecutive(own, size, 1, rng)[0]
    raise ValueError(f"no kind of request {kind!r}; choose from {', '.join(KINDS)}.")


def some(images: Indices, size: int, rng: np.random.Generator) -> Indices:
    """At most `size` of the images, in random order."""
    return rng.permutation(images)[:size]


def consecutive(own: Sequence[Indices], size: int, count: int, rng: np.random.Generator) -> list[Indices]:
    """Requests cut from streams that show one class after another; each stream has its own order and offset."""
    made: list[Indices] = []
    while len(made) < count:
        stream = one_after_another(own, rng)
        size = min(size, len(stream))
        starts = range(int(rng.integers(min(size, len(stream) - size + 1))), len(stream) - size + 1, size)
        made += [stream[at : at + size] for at in starts]
    return [made[int(i)] for i in rng.permutation(len(made))[:count]]


def one_after_another(own: Sequence[Indices], rng: np.random.Generator) -> Indices:
    """All images, class after class, both in random order."""
    return np.concatenate([rng.permutation(own[int(c)]) for c in rng.permutation(len(own))])
