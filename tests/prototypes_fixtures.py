"""A planted tree of image-text features: themes, concepts in captions, modes in images, far apart for their noise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from prototypes import cache
from prototypes.cluster import ClusterConfig, Sizes
from prototypes.team import Team
from prototypes.vectors import unit

FINGERPRINT = "ab" * 32
T = TypeVar("T")
THEMES, CONCEPTS, MODES, EACH, D = 3, 4, 2, 12, 64
SIZES = Sizes(themes=THEMES, concepts=(CONCEPTS,) * 2, modes=(MODES,) * 2, smallest_concept=5, smallest_mode=3)
CONFIG = ClusterConfig(quantile=0.0, duplicate=1.1, sizes=SIZES)  # nothing is dropped


@dataclass(frozen=True)
class Planted:
    """Features (N, D) with their true theme, concept and mode (N,), each numbered over the whole tree."""

    image: np.ndarray
    caption: np.ndarray
    phrase: np.ndarray
    theme: np.ndarray
    concept: np.ndarray
    mode: np.ndarray
    keys: tuple[str, ...]

    def write(self, folder: Path, order: np.ndarray | None = None, **changes: object) -> cache.FeatureCache:
        """As a cache, its rows in `order`."""
        order = np.arange(len(self.keys)) if order is None else order
        concept = self.concept[order]
        whole: dict[str, object] = {
            "image": self.image[order],
            "caption": self.caption[order],
            "phrase": self.phrase,
            "keys": [self.keys[i] for i in order],
            "captions": [[f"a thing {c}"] for c in concept],
            "phrases": [f"thing {c}" for c in range(len(self.phrase))],
            "phrase_rows": [np.flatnonzero(concept == c).tolist() for c in range(len(self.phrase))],
            "fingerprint": FINGERPRINT,
        }
        return cache.write(folder, **{**whole, **changes})  # type: ignore[arg-type]


def plant(seed: int = 0, modes: int = MODES, noise: float = 0.05) -> Planted:
    """Orthogonal directions for every node and for the modality gap; noise of norm `noise` * sqrt(D)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0].T
    cuts = np.cumsum([2, THEMES, THEMES * CONCEPTS, THEMES * CONCEPTS * modes])
    gaps, themes, concepts, looks, _ = np.split(basis, cuts)
    mode = np.repeat(np.arange(len(looks)), EACH)
    concept = mode // modes
    theme = concept // CONCEPTS
    n = len(mode)
    meaning = 1.5 * themes[theme] + concepts[concept]
    image = unit(gaps[0] + meaning + looks[mode] + noise * rng.standard_normal((n, D)))
    caption = unit(gaps[1] + meaning + noise * rng.standard_normal((n, D)))
    phrase = unit(gaps[1] + 1.5 * np.repeat(themes, CONCEPTS, 0) + concepts)
    keys = tuple(f"shard/{number:06d}" for number in rng.permutation(n))
    return Planted(image, caption, phrase, theme, concept, mode, keys)


def same_grouping(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labelings cut alike."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


class Together(Team):
    """The processes of a team as threads of this one; what they add meets in `board`, one array for each."""

    board: list[np.ndarray | None]
    barrier: threading.Barrier

    def add(self, values: np.ndarray) -> None:
        self.board[self.rank] = values.copy()
        self.barrier.wait(20)
        order = np.random.default_rng(len(values)).permutation(self.size)  # an all-reduce has an order of its own
        values[...] = sum(self.board[rank] for rank in order)  # type: ignore[arg-type]  # all have put theirs there
        self.barrier.wait(20)


def together(size: int, work: Callable[[Team], T]) -> list[T]:
    """What every process of a team of `size` gets from `work`."""
    board, barrier = [None] * size, threading.Barrier(size)
    teams = [Together(rank, size) for rank in range(size)]
    for team in teams:
        object.__setattr__(team, "board", board)
        object.__setattr__(team, "barrier", barrier)

    def one(team: Team) -> T:
        try:
            return work(team)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, team) for team in teams]]
