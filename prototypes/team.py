"""The processes that share the work of clustering: who does what, and how their parts become a whole.

Nothing here starts or connects processes: `gram_core/train.py` does that, over `torch.distributed`, by giving `add` a
meaning. A whole never depends on how many share it. Parts that are added have one process each (0 from the others),
or are whole numbers; neither is rounded, so the order of additions is of no matter.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ALONE", "Team"]


@dataclass(frozen=True)
class Team:
    """This process, `rank` of `size`, and the number of the GPU that faiss may use in it; one alone by default.

    All processes of a team make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    gpu: int = 0

    @property
    def alone(self) -> Team:
        """This process, for work that it does not share."""
        return Team(gpu=self.gpu)

    def add(self, values: NDArray[np.float64] | NDArray[np.int64]) -> None:  # noqa: ARG002 (for those that share)
        """Replace `values` by their sum over all processes; who connects several gives it its meaning."""
        if self.size > 1:
            raise NotImplementedError("a team of several processes needs an `add` of its own")

    def deal(self, costs: ArrayLike) -> NDArray[np.int64]:
        """This process's share of tasks 0..n-1, in order: the dearest first, each to who has the least to do."""
        costs = np.asarray(costs, np.float64)
        if self.size == 1:
            return np.arange(len(costs))
        loads, mine = [(0.0, rank) for rank in range(self.size)], []
        for task in np.argsort(-costs, kind="stable").tolist():
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + float(costs[task]), rank))
            if rank == self.rank:
                mine.append(task)
        return np.sort(np.array(mine, np.int64))


ALONE = Team()
