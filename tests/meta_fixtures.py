"""A small world for the outer loop: the toy of docs/method.md, and a command that trains on it and can be killed.

python -m tests.meta_fixtures OUT [STEPS [PAUSE]]
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gram_core import meta
from gram_core.adapt import adapt, of, sgd
from gram_core.meta import MetaConfig, Metrics, State, train
from gram_core.regulators import REGULATORS, Context, Identity, Regulator, bind
from gram_core.types import Params

WIDTH, SHARED = 32, 24  # the other 8 dimensions differ between the domains of support and query


@dataclass(frozen=True)
class Toy:
    """Optima (E, 1, 32) of support and query tasks: one shared part, two domain parts of twice its spread."""

    number: int
    support: Tensor
    query: Tensor


@dataclass(frozen=True)
class ToyTasks:
    """Episodes from their number alone; `pause` seconds each, so that a kill finds the run at work."""

    seed: int = 0
    together: int = 16
    pause: float = 0.0

    def episode(self, i: int, progress: float) -> Toy:
        assert 0 <= progress <= 1
        time.sleep(self.pause)
        gen = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))).Q
        shared = torch.randn(self.together, 1, SHARED, generator=gen)
        domains = 2 * torch.randn(2, self.together, 1, WIDTH - SHARED, generator=gen)
        support, query = (torch.cat([shared, domain], dim=-1) @ turn for domain in domains)
        return Toy(i, support, query)


@dataclass(frozen=True)
class ToyLearner:
    """One plain step on the support, regulated; outer loss: distance to the optimum of the other domain."""

    regulator: Regulator = REGULATORS["gram"]
    rate: float = 1e-2

    def init(self, generator: torch.Generator) -> Params:
        made = self.regulator.init({"x": (None, WIDTH)}, generator)
        return {"start.x": torch.zeros(1, 1, WIDTH)} | {f"regulator.{name}": w for name, w in made.items()}

    def groups(self) -> Mapping[str, float]:
        return {"start": 0.1 * self.rate, "regulator": self.rate}

    def step(self, params: Params, toy: Toy, regulator: Regulator) -> Tensor:
        def loss(p: Params) -> Tensor:
            return (p["x"] - toy.support).square().sum((1, 2)) / 2

        start = {"x": params["start.x"].expand_as(toy.support)}
        weights = {key.removeprefix("regulator."): w for key, w in params.items() if key.startswith("regulator.")}
        regulate = bind(regulator, weights, Context())
        return adapt(of(loss), start, regulate=regulate, update=sgd, lr=1.0, steps=1)["x"]

    def loss(self, params: Params, toy: Toy) -> tuple[Tensor, Metrics]:
        made = self.step(params, toy, self.regulator)
        cosine = F.cosine_similarity(made.flatten(1), toy.query.flatten(1)).mean()
        return (made - toy.query).square().sum((1, 2)).mean() / 2, {"cosine": float(cosine.detach())}

    def measure(self, params: Params, toy: Toy) -> Metrics:
        loss, metrics = self.loss(params, toy)
        raw = self.step(params, toy, Identity())
        return metrics | {"loss": float(loss.detach()), "raw": float((raw - toy.query).square().sum((1, 2)).mean() / 2)}


def config(**changes: Any) -> MetaConfig:
    small = {"steps": 12, "episodes": 4, "validate_every": 5, "validate_episodes": 6, "keep_every": 3}
    return MetaConfig(**(small | changes))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def run(
    folder: Path, *, learner: Any = None, tasks: Any = None, console: Console | None = None, **changes: Any
) -> State:
    """Train the toy in `folder`, or go on."""
    return train(
        learner or ToyLearner(),
        tasks or ToyTasks(),
        ToyTasks(seed=1),
        config(**changes),
        folder,
        made_from="the toy",
        console=console or quiet(),
    )


def main() -> None:
    torch.set_num_threads(1)
    folder, steps, pause = Path(sys.argv[1]), int((sys.argv[2:] or ["12"])[0]), float((sys.argv[3:] or ["0"])[0])
    with meta.joined():
        run(folder, tasks=ToyTasks(pause=pause), steps=steps)
        assert meta.World.here().size == int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main()
