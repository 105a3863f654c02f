"""Does a regulated gradient agree better with another domain's than the raw one, on themes that training never saw?

    python benchmarks/mechanism.py --from OUT [--steps 300] [--seeds 3] [--episodes 300] > results/mechanism.json

OUT is the `--out` of `python -m gram_core.train recipes/gram-mini/meta.toml`. For every seed the low-rank regulators
(`gram` and `structure`) are meta-trained on the residual host alone: inner steps on the joint loss of unlabeled
requests, outer loss on their labels and on queries across a gap. Measured on held-out themes, with the prototypes of
the request's own themes masked: the change of the cosine between step and cross-domain query gradient,
cos(psi(g_S), g_Q) - cos(g_S, g_Q) (docs/method.md), and the query's cross-entropy after one step less that before it.
Intervals: 95 %, over episodes of all seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from gram_core import backbone as towers
from gram_core import meta
from gram_core.adapt import UPDATES, adapt, of
from gram_core.episodes import Episode, EpisodeConfig, Tasks
from gram_core.gram import Structure
from gram_core.learner import GramLearner, survey
from gram_core.meta import LearnerConfig, MetaConfig, Metrics, ResidualLearner, World
from gram_core.text import TextEncoder
from gram_core.types import Params
from gram_core.unseen import ViewCache
from prototypes.bank import load_bank
from prototypes.hierarchy import load_hierarchy

REGULATORS = ("gram", "structure")
STEP = 5e-3  # rms of the one step that is looked at


class Direction(GramLearner):
    """The gradient regulator alone: no amounts."""

    def loss(self, params: Params, episode: Episode) -> tuple[Tensor, Metrics]:
        return ResidualLearner.loss(self, params, episode)

    def measure(self, params: Params, episode: Episode) -> Metrics:
        query = next((query for query in episode.queries if query.gap == "mode"), None)
        if query is None:
            return {}
        base = self._texts(episode.classes)
        start = self._start(params, base)
        features, labels = query.features.to(base), query.labels.to(base.device)
        inner = of(self._inner(base, episode))
        regulate = self._regulate(params, episode)
        across = of(lambda p: F.cross_entropy(self._logits(base, p, features), labels))(start)["residual"].flatten()
        plain = inner(start)
        raw, turned = (g["residual"].flatten() for g in (plain, regulate(plain)))
        cosine = [float(F.cosine_similarity(g, across, dim=0)) for g in (raw, turned)]
        made = {"cosine": cosine[0], "cosine change": cosine[1] - cosine[0]}
        update = UPDATES[self.config.update]
        stepped = {
            "raw step": adapt(inner, start, update=update, lr=STEP, steps=1),
            "regulated step": adapt(inner, start, regulate=regulate, update=update, lr=STEP, steps=1),
        }
        loss = {n: float(F.cross_entropy(self._logits(base, p, features), labels)) for n, p in stepped.items()}
        before = float(F.cross_entropy(self._logits(base, start, features), labels))
        return made | {n: value - before for n, value in loss.items()} | {
            "regulated less raw": loss["regulated step"] - loss["raw step"]
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=300)
    given = parser.parse_args()
    backbone = towers.load("gram-mini")
    tree = load_hierarchy(given.source / "tree", fingerprint=backbone.fingerprint)
    bank = load_bank(given.source / "tree", fingerprint=backbone.fingerprint)
    assert bank is not None
    views = ViewCache.open(given.source / "views", fingerprint=backbone.fingerprint)
    texts = TextEncoder(backbone)
    console, world = Console(stderr=True), World()
    rows: dict[str, list[Metrics]] = {name: [] for name in REGULATORS}
    for seed in range(given.seeds):
        config = EpisodeConfig(unlabeled=1.0, seed=seed, sizes=(8, 16, 32, 64))
        strict = replace(config, mask_concepts=0.0, mask_themes=1.0)
        training = Tasks(tree, bank, views, config, held_out=False)
        held_out = Tasks(tree, bank, views, strict, held_out=True)
        for name in REGULATORS:
            learner = Direction(
                texts=texts.features(texts.class_set(training.names)),
                root=torch.from_numpy(bank.root.visual),
                scale=backbone.logit_scale,
                config=LearnerConfig(regulator=name, regulator_rate=1e-3),
                structure=Structure.of(bank),
            )
            first = learner.init(torch.Generator().manual_seed(seed))
            learner = replace(learner, surveyed=survey(learner, first, training, 128, world))
            outer = MetaConfig(
                steps=given.steps, episodes=4, validate_episodes=0, seed=seed, validate_every=given.steps
            )
            with tempfile.TemporaryDirectory() as folder:
                end = meta.train(learner, training, None, outer, Path(folder), made_from=name, console=console)
            with torch.no_grad():
                each = [learner.measure(end.params, held_out.episode(i, 1.0)) for i in range(given.episodes)]
            rows[name] += [one for one in each if one]
    told: dict[str, Any] = {
        "kind": "mechanism",
        "command": "python benchmarks/mechanism.py --from OUT",
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "steps": given.steps,
        "seeds": given.seeds,
        "step_rms": STEP,
        "rows": {name: meta.intervals(each) for name, each in rows.items()},
    }
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
