"""From frozen features to tuned logits: what each method does to one request, or to several in one pass.

Knows hosts, objectives and the regulator; knows no images, no HTTP and no clock but the one it is given. Whatever
speaks against an outcome is said in `Tuned.reason`, and the answer is then zero-shot (`docs/method.md`, "do no harm").
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gram_core import baselines, gram, objectives
from gram_core.adapt import Regulate, identity
from gram_core.backbone import Backbone
from gram_core.device import is_broken
from gram_core.gram import Structure
from gram_core.learned import Learned, TuneConfig
from gram_core.memory import WINDOW
from gram_core.prompts import PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.types import Params, Plan

log = logging.getLogger("gram_core.tuner")

ENTROPY_SLACK = 0.01  # nats by which tuning may raise the entropy it is meant to lower


Stop = Callable[[], str | None]
"""Asked before every step: why this request's tuning must end now, or None."""


def never() -> str | None:
    """No reason to stop."""
    return None


@dataclass(frozen=True, eq=False)
class Seen:
    """Frozen features of B images: `views` (B, V, D) with the original first, the images' hashes, and the
    milliseconds that cutting their crops took (on a CUDA device: that starting to cut them took)."""

    views: Tensor
    sha256: tuple[bytes, ...]
    cut_ms: float = 0.0

    @property
    def originals(self) -> Tensor:
        """(B, D)."""
        return self.views[:, 0]


@dataclass(frozen=True, eq=False)
class Tuned:
    """Outcome of one tuning over n images; `logits` (n, K) before the temperature, `accepted` (n,).

    `steps` were taken; `stopped` says why no more were, where more were asked for.
    """

    logits: Tensor
    accepted: Tensor
    reason: str | None
    kept: int
    temperature: float
    ms: float
    steps: int
    stopped: str | None = None
    chosen: frozenset[int] | None = None
    variables: Params | None = None
    rho: float | None = None
    trust: float | None = None
    skew: float | None = None
    share: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One request to tune: its features, its zero-shot cosines (B, K), and what is asked.

    `remembered` are images of earlier requests of the same session, and `known` (M, K) their cosines: they get no
    outcome. Those that are `balanced` are tuned along; the latest (of the lowest `age`) fill the request up to WINDOW
    images that say which classes come now and which images are near.
    """

    seen: Seen
    cosines: Tensor
    classes: ClassSet
    plan: Plan
    stop: Stop = never
    remembered: Seen | None = None
    known: Tensor | None = None
    balanced: tuple[bool, ...] = ()
    age: tuple[int, ...] = ()


class _Watch:
    """Asks before every step whether each episode goes on; remembers how far it came, and why it ended early."""

    def __init__(self, stops: Sequence[Stop]) -> None:
        self._stops = stops
        self.steps = [0] * len(stops)
        self.reasons: list[str | None] = [None] * len(stops)

    def __call__(self, _: int) -> Tensor | None:
        for i, stop in enumerate(self._stops):
            if self.reasons[i] is None:
                self.reasons[i] = stop()
            self.steps[i] += self.reasons[i] is None
        if not any(self.reasons):
            return None
        return torch.tensor([reason is None for reason in self.reasons])


@dataclass(eq=False)
class Tuner:
    """Hosts, methods and weights of one model; pure in all of them.

    Images that are tuned one at a time share passes of the text tower, `group` of them in each, where their class set
    has few enough names that a pass holds no more than `together` texts. The last pass is padded: in a fixed shape an
    image's answer does not depend on its neighbours, bit for bit on a CPU (measured, and looked at again by
    `Classifier.warm_up`).
    """

    backbone: Backbone
    texts: TextEncoder
    hosts: Mapping[str, PromptMethod]
    kept: Mapping[str, Params]
    configs: Mapping[str, TuneConfig]
    root: Tensor | None
    kl_cap: float
    learned: Learned | None = None
    weights: Params | None = None
    structure: Structure | None = None
    group: int = 1
    together: int = 0

    def group_of(self, classes: ClassSet) -> int:
        """How many images share a pass."""
        return self.group if self.group * len(classes) <= self.together else 1

    def tune(self, tasks: Sequence[Task]) -> list[list[tuple[Tuned, int]] | Exception]:
        """For every task the outcome and the row in it of each of its images, or what went wrong with it alone.

        Images that are tuned one at a time share passes of the text tower where their class sets, hosts and steps
        agree, whichever request they belong to. Raises what concerns the device, nothing else.
        """
        done: list[list[tuple[Tuned, int]] | Exception] = []
        shared: dict[object, list[tuple[int, int]]] = {}
        for n, task in enumerate(tasks):
            plan = task.plan
            if plan.scope == "image" and plan.method != "gram":
                key = (plan.host, plan.method, plan.steps, task.seen.views.shape[1], task.classes.id)
                shared.setdefault(key, []).extend((n, i) for i in range(len(task.seen.views)))
                done.append([])
                continue
            try:
                done.append(self._alone(task))
            except Exception as error:  # a bug: this request alone falls back to zero-shot
                done.append(_told(error))
        for places in shared.values():
            size = self.group_of(tasks[places[0][0]].classes)
            for start in range(0, len(places), size):
                self._share(tasks, places[start : start + size], done)
        return done

    def _share(
        self,
        tasks: Sequence[Task],
        places: Sequence[tuple[int, int]],
        done: list[list[tuple[Tuned, int]] | Exception],
    ) -> None:
        """Tune the images (task, row) at `places` in one pass, and put the outcomes where they belong."""
        first = tasks[places[0][0]]
        filled = [*places, *[places[0]] * (self.group_of(first.classes) - len(places))]
        try:
            features = torch.stack([tasks[n].seen.views[i] for n, i in filled])
            cosines = torch.stack([tasks[n].cosines[i] for n, i in filled])
            stops = [tasks[n].stop for n, _ in places]
            tuned = self._tune_images(features, cosines, first.classes, first.plan, stops)
        except Exception as error:  # the same, for those that shared the pass
            for n, _ in places:
                done[n] = _told(error)
            return
        for (n, _), own in zip(places, tuned, strict=True):
            mine = done[n]
            if isinstance(mine, list):
                mine.append((own, 0))

    def _alone(self, task: Task) -> list[tuple[Tuned, int]]:
        seen, plan = task.seen, task.plan
        count = len(seen.views)
        if plan.scope == "image":  # gram on each image: a request of one
            rows = [slice(n, n + 1) for n in range(count)]
            return [
                (self._tune_gram(seen.views[r], seen.originals[r], task.cosines[r], task.classes, plan, task.stop), 0)
                for r in rows
            ]
        features, cosines, hashes = seen.views, task.cosines, list(seen.sha256)
        if task.remembered is not None and task.known is not None:
            features = torch.cat([features, task.remembered.views])
            cosines = torch.cat([cosines, task.known])
            hashes += task.remembered.sha256
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        index = torch.tensor(order, device=features.device)
        joint = [n < count or task.balanced[n - count] for n in order]
        now = [n < count or 0 <= task.age[n - count] < WINDOW - count for n in order]
        if plan.method == "gram":
            batch = self._tune_gram(
                features[index], features[index, 0], cosines[index], task.classes, plan, task.stop, joint, now
            )
            shown = [n for n, here in zip(order, now, strict=True) if here]
        else:
            own = index[torch.tensor(joint, device=index.device)]
            batch = self._tune_batch(features[own], features[own, 0], cosines[own], task.classes, plan, task.stop)
            shown = [n for n, here in zip(order, joint, strict=True) if here]
        place = {n: at for at, n in enumerate(shown)}
        return [(batch, place[n]) for n in range(count)]

    def _joint(
        self, features: Tensor, originals: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan, watch: _Watch
    ) -> tuple[Tensor, baselines.Joint, str | None]:
        """Joint tuning of one variable on `features` (B, V, D) of all images: the originals' logits, and what speaks
        against it."""
        assert plan.host is not None
        assert self.root is not None
        host, config = self.hosts[plan.host], self.configs[plan.method]
        start = host.start(self.kept[plan.host], classes, 1)
        regulate: Regulate = identity
        if plan.method == "gram":
            assert self.learned is not None
            assert self.weights is not None
            assert self.structure is not None
            texts, name = self.texts.features(classes), self.learned.checkpoint.regulator
            start = gram.start(self.weights, texts)
            if name != "identity":
                near = gram.relate(self.structure, originals)
                scale = self.backbone.logit_scale
                regulate = gram.regulate(name, self.weights, self.structure, near, texts, start, scale)
        joint = baselines.infomax(
            host,
            classes,
            start,
            features[None],
            root=self.root if config.root else None,
            lr=config.lr[plan.host],
            steps=plan.steps,
            update=config.update,
            regulate=regulate,
            active=watch,
        )
        before = objectives.entropy(joint.before.softmax(-1).mean(2)).mean()
        after = objectives.entropy(joint.after.softmax(-1).mean(2)).mean()
        logits = host.logits(joint.params, originals[None], classes)[0]
        return logits, joint, self._distrust(logits, cosines, float(before), float(after))

    def _tune_batch(
        self, features: Tensor, originals: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan, stop: Stop
    ) -> Tuned:
        """Information maximisation, with the guards of docs/method.md."""
        started, watch = time.perf_counter(), _Watch([stop])
        logits, joint, reason = self._joint(features, originals, cosines, classes, plan, watch)
        accepted = objectives.accepted(cosines * self.backbone.logit_scale, logits, originals)
        settled = self._settle(logits, cosines, accepted, reason, plan.views, started, watch)
        return replace(settled, variables=joint.params, rho=joint.rho)

    def _tune_gram(
        self,
        features: Tensor,
        originals: Tensor,
        cosines: Tensor,
        classes: ClassSet,
        plan: Plan,
        stop: Stop,
        tuned_on: Sequence[bool] | None = None,
        now: Sequence[bool] | None = None,
    ) -> Tuned:
        """GRAM: the joint tuning, and how far the answer goes along it and along what the request's relations say.

        Where the request is far from every prototype this is `_tune_batch`, bit for bit. In a session the rows that are
        `tuned_on` are those of the joint tuning, and the outcome is of the rows that are `now`, whose relations count.
        """
        assert self.weights is not None
        assert self.structure is not None
        started, watch = time.perf_counter(), _Watch([stop])
        scale, structure = self.backbone.logit_scale, self.structure
        if tuned_on is None or now is None or (all(tuned_on) and all(now)):
            logits, joint, reason = self._joint(features, originals, cosines, classes, plan, watch)
        else:
            rows = torch.tensor(tuned_on, device=features.device)
            _, joint, reason = self._joint(features[rows], originals[rows], cosines[rows], classes, plan, watch)
            rows = torch.tensor(now, device=features.device)
            features, originals, cosines = features[rows], originals[rows], cosines[rows]
            assert plan.host is not None
            logits = self.hosts[plan.host].logits(joint.params, originals[None], classes)[0]
        base = cosines * scale
        guarded = objectives.accepted(base, logits, originals)
        plain = self._settle(logits, cosines, guarded, reason, plan.views, started, watch)
        plain = replace(plain, variables=joint.params, rho=joint.rho, trust=0.0)
        relation = gram.relate(structure, originals)
        trust = gram.trust(relation.novelty, self.weights["trust.least"][0, 0])
        if reason is not None or float(trust) == 0.0 or watch.steps[0] == 0:
            return plain
        texts = self.texts.features(classes)
        seen = gram.context(structure, relation, originals, texts, scale)
        along = gram.directions(structure, features, texts, base, logits, scale)
        amounts = gram.amounts(self.weights, seen)
        moved, log_prior = gram.move(base, along, amounts)
        before = torch.where(plain.accepted[:, None], logits / plain.temperature, base)
        answer = gram.settle(base, before, moved, trust)
        reason = self._distrust(answer, cosines, 0.0, 0.0)
        accepted = gram.accepted(base, answer, self.weights["accept.margin"][0, 0])
        if reason is not None:
            accepted = torch.zeros_like(accepted)
        added = trust * (moved - base - amounts["tuned"] * along["tuned"])
        theirs, own = added.norm(dim=-1), (answer - base - added).norm(dim=-1)
        return replace(
            plain,
            logits=answer,
            accepted=accepted,
            reason=reason,
            temperature=1.0,
            ms=(time.perf_counter() - started) * 1000,
            trust=float(trust),
            skew=float((1 - objectives.entropy(log_prior.softmax(-1)) / np.log(len(classes))).clamp(0, 1)),
            share=theirs / (own + theirs).clamp_min(1e-12),
        )

    def _tune_images(
        self, features: Tensor, cosines: Tensor, classes: ClassSet, plan: Plan, stops: Sequence[Stop]
    ) -> list[Tuned]:
        """TPT on each of E images by itself, in one pass; `features` (E, V, D), originals first, `cosines` (E, K).

        Outcomes of the first images, as many as there are `stops`; the others only fill the pass.
        """
        assert plan.host is not None
        started, watch = time.perf_counter(), _Watch([*stops, *[_filler] * (len(features) - len(stops))])
        host, config = self.hosts[plan.host], self.configs[plan.method]
        base = self.backbone.logit_scale * features @ self.texts.features(classes).T
        kept = objectives.confident(base, config.keep)  # (E, M)
        each = torch.arange(len(features), device=features.device)[:, None]
        chosen = features[each, kept]
        params = baselines.marginal(
            host,
            classes,
            host.start(self.kept[plan.host], classes, len(features)),
            chosen,
            lr=config.lr[plan.host],
            update=config.update,
            steps=plan.steps,
            active=watch,
        )
        # one text pass answers both: the kept views for the check, the original for the answer
        final = host.logits(params, torch.cat([chosen, features[:, :1]], dim=1), classes)
        before = objectives.marginal_entropy(base[each, kept]).tolist()
        after = objectives.marginal_entropy(final[:, :-1]).tolist()
        made = []
        for e in range(len(stops)):
            logits, own = final[e, -1:], cosines[e : e + 1]
            reason = self._distrust(logits, own, before[e], after[e])
            always = torch.ones(1, dtype=torch.bool, device=logits.device)
            settled = self._settle(logits, own, always, reason, kept.shape[1], started, watch, e)
            mine = {name: p[e : e + 1] for name, p in params.items()}
            made.append(replace(settled, variables=mine, chosen=frozenset(kept[e].tolist())))
        each_ms = (time.perf_counter() - started) * 1000 / len(made)
        return [replace(own, ms=each_ms) for own in made]

    def _distrust(self, logits: Tensor, cosines: Tensor, before: float, after: float) -> str | None:
        """Why a tuning is discarded, or None (api.md section 3)."""
        if not bool(logits.isfinite().all()) or not np.isfinite(after):
            return "not_finite"
        if after > before + ENTROPY_SLACK:
            return "diverged"
        distance = objectives.kl(logits, cosines * self.backbone.logit_scale).mean()
        return "kl_cap" if float(distance) > self.kl_cap else None

    def _settle(
        self,
        logits: Tensor,
        cosines: Tensor,
        accepted: Tensor,
        reason: str | None,
        kept: int,
        started: float,
        watch: _Watch,
        episode: int = 0,
    ) -> Tuned:
        """Give the accepted answers, as a group, the mean confidence that zero-shot has on the same images."""
        sharpness = 1.0
        if reason is not None:
            accepted = torch.zeros_like(accepted)
        elif bool(accepted.any()):
            confidence = (cosines[accepted] * self.backbone.logit_scale).softmax(-1).amax(-1).mean()[None]
            sharpness = float(objectives.temperature(logits[accepted][None], confidence))
        ms = (time.perf_counter() - started) * 1000
        steps, stopped = watch.steps[episode], watch.reasons[episode]
        return Tuned(logits, accepted, reason, kept, sharpness, ms, steps, stopped)


def _filler() -> str | None:
    """An image that only fills a pass keeps no one waiting."""
    return "filler"


def _told(error: Exception) -> Exception:
    """A bug is logged where it happens; running out of memory is not a bug; a broken device is everyone's."""
    if is_broken(error):
        raise error
    if not isinstance(error, torch.OutOfMemoryError):
        log.error("a tuning failed", exc_info=error)
    return error
