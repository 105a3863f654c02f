"""What GRAM's meta-training learns: how a request's answer is regulated, on top of a residual's start and regulator.

An episode that simulates a request is answered as the server would answer it, with unlabeled images alone, and then
judged by its labels: on its own images and, for the parts that move the residual, across a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core import gram, objectives
from gram_core.adapt import UPDATES, Regulate, adapt, of
from gram_core.episodes import SUPERVISED, Episode
from gram_core.gram import Structure
from gram_core.meta import Metrics, ResidualLearner, Tasks, World
from gram_core.prompts.residual import shifted
from gram_core.types import Params

# of acceptance, the laxest first; at the last one a new label among eight images has to lead by 0.8
MARGINS = (0.0, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4, 3.2, 4.8, 6.4)
LEAST = 0.05  # share of simulated requests that lie below the novelty at which trust is a half
CONSTANT, UNHEEDED = 1e-4, 1e6  # a context that deviates by less than the one is measured by the other


@dataclass(frozen=True, eq=False)
class Told:
    """What one simulated request comes to: logits (n, K) of zero-shot, of the plain tuning and of GRAM."""

    base: Tensor
    plain: Tensor
    answer: Tensor
    context: Tensor
    novelty: Tensor


@dataclass(frozen=True, eq=False)
class GramLearner(ResidualLearner):
    """`amounts` of `gram_core.gram`, and the start and the regulator of `ResidualLearner` where they are asked for.

    The loss of a request is the cross-entropy of its own images, plus `harm` times what it exceeds zero-shot's by;
    requests of equally frequent classes count `even` times, since they have most to lose. Class names are unevenly
    liked by a model: `bias` moves class features along the root, at random, so that this is learned as well.
    `surveyed` holds the statistics that `survey` found; they are part of the start and do not move.
    """

    structure: Structure
    surveyed: Params = field(default_factory=dict)

    def init(self, generator: torch.Generator) -> Params:
        made = super().init(generator)
        if not self.config.start:
            made = {name: w for name, w in made.items() if not name.startswith("start.")}
        made |= gram.init(generator, self.config.hidden) | self.surveyed
        return {name: w.to(self.texts.device) for name, w in made.items()}

    def groups(self) -> Mapping[str, float]:
        fixed = dict.fromkeys(("context", "trust", "accept"), 0.0)
        return {**super().groups(), **fixed, "amounts": self.config.amounts_rate}

    def loss(self, params: Params, episode: Episode) -> tuple[Tensor, Metrics]:
        residual = any(name.startswith(("start.", "regulator.")) for name in params)
        total, metrics = super().loss(params, episode) if residual else (torch.zeros(()), {})
        if episode.kind == SUPERVISED:
            return total, metrics
        told = self.tell(params, episode)
        labels = episode.support_labels.to(told.base.device)
        own, before = F.cross_entropy(told.answer, labels), F.cross_entropy(told.base, labels)
        weight = self.config.even if episode.kind == "iid" else 1.0
        request = weight * (own + self.config.harm * (own - before).clamp_min(0))
        return total.to(request) + request, metrics | {"request": float(own.detach()), "zero-shot": float(before)}

    def measure(self, params: Params, episode: Episode) -> Metrics:
        residual = any(name.startswith(("start.", "regulator.")) for name in params)
        metrics = super().measure(params, episode) if residual else {}
        if episode.kind == SUPERVISED:
            return metrics
        told = self.tell(params, episode)
        labels = episode.support_labels.to(told.base.device)
        taken = gram.accepted(told.base, told.answer, params["accept.margin"][0, 0])
        answer = torch.where(taken[:, None], told.answer, told.base)
        right = {n: 100 * float((x.argmax(-1) == labels).double().mean()) for n, x in
                 (("zero-shot", told.base), ("plain", told.plain), ("gram", answer))}  # fmt: skip
        metrics |= {f"{episode.kind} gain": right["gram"] - right["zero-shot"],
                    f"{episode.kind} plain gain": right["plain"] - right["zero-shot"]}  # fmt: skip
        before, own = F.cross_entropy(told.base, labels), F.cross_entropy(told.answer, labels)
        return metrics | {"gain": right["gram"] - right["zero-shot"], "request": float(own), "zero-shot": float(before)}

    def _regulate(self, params: Params, episode: Episode, texts: Tensor | None = None) -> Regulate:
        texts = self._texts(episode.classes) if texts is None else texts
        relation = gram.relate(self.structure, episode.support[:, 0].to(texts), episode.masked)
        first = self._start(params, texts)
        return gram.regulate(self.config.regulator, params, self.structure, relation, texts, first, self.scale)

    def tell(self, params: Params, episode: Episode) -> Told:
        """Answer a simulated request as the server does; differentiable in `params` but for the joint tuning."""
        views = episode.support.to(self.texts)
        originals = views[:, 0]
        base_texts = self._biased(episode)
        structure = self.structure
        with torch.no_grad():
            base = self.scale * originals @ base_texts.T
            tuned = self._tuned(params, episode, base_texts, views)
            plain = objectives.guarded(base, tuned, originals)[0]
            relation = gram.relate(structure, originals, episode.masked)
            seen = gram.context(structure, relation, originals, base_texts, self.scale)
            along = gram.directions(structure, views, base_texts, base, tuned, self.scale)
        moved, _ = gram.move(base, along, gram.amounts(params, seen))
        sure = gram.trust(relation.novelty, params["trust.least"][0, 0])
        return Told(base, plain, gram.settle(base, plain, moved, sure), seen, relation.novelty)

    def _tuned(self, params: Params, episode: Episode, texts: Tensor, views: Tensor) -> Tensor:
        """Logits (n, K) of the originals after the joint tuning that is served."""
        weights = {name: w.detach() for name, w in params.items()}
        b, v, d = views.shape
        seen = views.reshape(b * v, d)
        start = self._start(weights, texts)
        before = self.scale * seen @ shifted(texts, start["residual"])[0].T
        rho = objectives.rehearsal_weight(before.softmax(-1).mean(0, keepdim=True), b)
        root = self.root if self.config.root else None

        def loss(p: Params) -> Tensor:
            own = shifted(texts, p["residual"])
            logits = self.scale * (seen @ own.mT).reshape(1, b, v, -1)
            return objectives.infomax(logits, None if root is None else self.scale * root @ own.mT, rho)

        tuned = adapt(
            of(loss),
            start,
            regulate=self._regulate(weights, episode, texts),
            update=UPDATES[self.config.update],
            lr=self.config.lr,
            steps=self.config.steps,
        )
        return self.scale * views[:, 0] @ shifted(texts, tuned["residual"])[0].T

    def _biased(self, episode: Episode) -> Tensor:
        """(K, D) class features, each moved along the root by a draw of its own in half of the episodes."""
        texts = self._texts(episode.classes)
        if not self.config.bias:
            return texts
        generator = torch.Generator().manual_seed(episode.seed % 2**63)
        often, size = torch.rand(2, generator=generator).tolist()
        if often < 0.5:
            return texts
        draws = torch.randn(len(texts), 1, generator=generator).to(texts)
        return F.normalize(texts + self.config.bias * size * draws * self.structure.root, dim=-1)


def survey(learner: GramLearner, params: Params, tasks: Tasks[Episode], count: int, world: World) -> Params:
    """The statistics of `count` simulated requests: what contexts are measured by, and from where on to trust.

    A number of the context that is the same in all of them says nothing, in whatever request is served later: what
    `amounts` makes of it has not been trained.
    """
    rows: list[list[Any]] = []
    with torch.no_grad():
        for i in world.share(range(count)):
            episode = tasks.episode(i, 1.0)
            if episode.kind != SUPERVISED:
                told = learner.tell(params, episode)
                rows.append([i, told.context.tolist(), float(told.novelty)])
    rows = sorted(row for part in world.gather(rows) for row in part)
    contexts = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    novelty = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    spread = contexts.std(0)
    return {
        "context.mean": contexts.mean(0)[None].float(),
        "context.spread": torch.where(spread < CONSTANT, UNHEEDED, spread)[None].float(),
        "trust.least": novelty.quantile(LEAST).reshape(1, 1).float(),
    }


def margin(learner: GramLearner, params: Params, tasks: Tasks[Episode], numbers: range, world: World) -> Tensor:
    """The smallest of MARGINS (1, 1) with which simulated requests of equally frequent classes lose at most
    `config.loss` points on average; the largest of them if none is enough.

    Such requests have nothing to gain from the estimated shares, so what they lose is the price of the gains on others.
    """
    rows: list[list[Any]] = []
    with torch.no_grad():
        for i in world.share(numbers):
            episode = tasks.episode(i, 1.0)
            if episode.kind != "iid":
                continue
            told = learner.tell(params, episode)
            labels = episode.support_labels.to(told.base.device)
            gains = []
            for each in MARGINS:
                taken = gram.accepted(told.base, told.answer, each)
                new = torch.where(taken, told.answer.argmax(-1), told.base.argmax(-1))
                gains.append(float(((new == labels).double() - (told.base.argmax(-1) == labels).double()).mean()))
            rows.append([i, *gains])
    rows = sorted(row for part in world.gather(rows) for row in part)
    allowed = len(rows) * (learner.config.loss / 100 + 1e-9)  # shares of thirds and tenths don't cancel exactly
    for place, each in enumerate(MARGINS):
        if sum(row[1 + place] for row in rows) >= -allowed:
            return torch.full((1, 1), each)
    return torch.full((1, 1), MARGINS[-1])
