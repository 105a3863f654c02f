"""The learner of gram_core.meta: what it tunes is what is served, and what it learns from is the step alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core import baselines, meta
from gram_core.adapt import Grad, Loss
from gram_core.backbone import Backbone
from gram_core.episodes import Episode, Gap, Query
from gram_core.errors import InvalidConfig
from gram_core.meta import LearnerConfig, MetaConfig, Optimizer, ResidualLearner, World, outer_step
from gram_core.prompts import Residual
from gram_core.text import TextEncoder
from gram_core.types import Params

NAMES = tuple(f"thing {i}" for i in range(12))
D = 32


def unit(gen: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=gen), dim=-1)


def learner(**options: Any) -> ResidualLearner:
    gen = torch.Generator().manual_seed(5)
    config = LearnerConfig(**({"regulator": "gram", "steps": 2, "rank": 4, "lr": 1e-2} | options))
    return ResidualLearner(texts=unit(gen, len(NAMES), D), root=unit(gen, D), scale=20.0, config=config)


def episode(kind: str = "iid", gaps: tuple[Gap, ...] = ("in", "mode", "branch"), number: int = 0) -> Episode:
    """Six images of five classes in three views, and queries of four images each."""
    gen = torch.Generator().manual_seed(number)
    own, new = torch.arange(5), torch.arange(6, 10)
    made = []
    for gap in gaps:
        classes = new if gap == "branch" else own
        names = tuple(NAMES[i] for i in classes)
        labels = torch.randint(len(classes), (4,), generator=gen)
        made.append(Query(names, unit(gen, 4, D), labels, gap, classes))
    return Episode(
        index=number,
        seed=0,
        kind=kind,
        names=tuple(NAMES[i] for i in own),
        classes=own,
        support=unit(gen, 6, 3, D),
        support_labels=torch.randint(5, (6,), generator=gen),
        domain="plain",
        queries=tuple(made),
        masked=np.zeros(4, bool),
        node=1,
        concepts=np.arange(5),
        keys=tuple("abcdef"),
    )


def weights(of: ResidualLearner, spread: float = 0.0, dtype: torch.dtype = torch.float32) -> Params:
    """A start, moved by noise so that nothing is zero by chance."""
    gen = torch.Generator().manual_seed(1)
    made = of.init(gen)
    return {n: (w + spread * torch.randn(w.shape, generator=gen)).to(dtype) for n, w in made.items()}


class Episodes:
    """A stand-in for `episodes.Tasks`."""

    def episode(self, i: int, progress: float) -> Episode:
        assert 0 <= progress <= 1
        return episode(("iid", "supervised", "single", "sorted")[i % 4], number=i)


# ---- what is tuned


@pytest.mark.parametrize("root", [True, False])
def test_a_fresh_learner_tunes_a_request_as_the_server_does(tiny: Backbone, root: bool) -> None:
    texts = TextEncoder(tiny)
    classes = texts.class_set(["cat", "dog", "red boat"])
    gen = torch.Generator().manual_seed(0)
    support, top = unit(gen, 9, 4, D), unit(gen, D)
    config = LearnerConfig(steps=5, lr=1e-2, root=root)
    mine = ResidualLearner(texts=texts.features(classes), root=top, scale=tiny.logit_scale, config=config)
    host = Residual(texts)
    served = baselines.infomax(
        host, classes, host.start({}, classes, 1), support[None], root=top if root else None, lr=1e-2, steps=5
    )
    request = replace(
        episode(), classes=torch.arange(3), support=support, support_labels=torch.zeros(9).long(), queries=()
    )
    ((name, tuned, zero_shot, _),) = mine._asked(mine.init(gen), request)
    assert name == "support"
    # psi is the identity up to 1e-6 of a step's length, 5 steps of 1e-2; logits are scaled by 20
    torch.testing.assert_close(tuned, served.after[0, :, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(zero_shot, served.before[0, :, 0], rtol=0, atol=1e-5)
    assert not torch.allclose(tuned, zero_shot, atol=1e-2)


def test_a_supervised_task_is_tuned_on_its_labels_and_asked_about_its_queries() -> None:
    of = learner(steps=20)
    params = weights(of)
    task = episode("supervised")
    loss, metrics = of.loss(params, task)
    plain = F.cross_entropy(20.0 * task.support[:, 0] @ of.texts[:5].T, task.support_labels)
    assert metrics["support"] < float(plain) - 0.1
    assert float(loss) == pytest.approx((metrics["in"] + metrics["mode"] + metrics["branch"]) / 3, rel=1e-5)
    alone = of.loss(params, episode("supervised", gaps=()))
    assert float(alone[0]) == pytest.approx(alone[1]["support"])


def test_a_request_is_asked_about_its_own_images_as_well() -> None:
    of = learner()
    loss, metrics = of.loss(weights(of), episode("iid", gaps=("in",)))
    assert float(loss) == pytest.approx((metrics["support"] + metrics["in"]) / 2, rel=1e-5)


def test_the_labels_of_a_request_change_nothing_that_is_tuned() -> None:
    of = learner()
    request = episode("iid")
    turned = replace(request, support_labels=(request.support_labels + 1) % 5)
    for one, other in zip(of._asked(weights(of), request), of._asked(weights(of), turned), strict=True):
        assert torch.equal(one[1], other[1])


def test_new_names_are_answered_by_the_start_alone() -> None:
    of = learner()
    params = weights(of, 0.1)
    asked = {part[0]: part for part in of._asked(params, episode())}
    query = next(q for q in episode().queries if q.gap == "branch")
    base = of.texts[query.classes]
    texts = F.normalize(base + base @ params["start.v"][0] @ params["start.u"][0].T, dim=-1)
    torch.testing.assert_close(asked["branch"][1], 20.0 * query.features @ texts.T, rtol=0, atol=1e-4)


def test_what_is_measured_starts_at_zero_shot_and_the_raw_gradient() -> None:
    of = learner(steps=0)
    seen = of.measure(of.init(torch.Generator().manual_seed(0)), episode())
    assert {"loss", "support", "in", "mode", "branch", "cosine", "support gain", "mode gain"} <= seen.keys()
    assert [seen[f"{part} gain"] for part in ("support", "in", "mode", "branch")] == [0.0] * 4
    assert seen["cosine"] == pytest.approx(0, abs=1e-5)
    assert "cosine" not in of.measure(of.init(torch.Generator()), episode(gaps=("in",)))


# ---- what is learned


@pytest.mark.parametrize("regulator", ["gram", "structure", "supmer", "meta_curvature", "meta_sgd", "prometar"])
@pytest.mark.parametrize("kind", ["iid", "supervised"])
def test_the_outer_gradient_equals_finite_differences_when_inner_gradients_are_constants(
    regulator: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = learner(regulator=regulator)
    of = replace(of, texts=of.texts.double(), root=of.root.double() if of.root is not None else None)
    params = {name: w.requires_grad_() for name, w in weights(of, 0.05, torch.float64).items()}
    task = episode(kind)
    task = replace(task, support=task.support.double())
    kept: list[Params] = []
    plain = meta.of

    def recording(loss: Loss) -> Grad:
        def grad(p: Params) -> Params:
            kept.append(plain(loss)(p))
            return kept[-1]

        return grad

    monkeypatch.setattr(meta, "of", recording)
    loss = of.loss(params, task)[0]
    grads = dict(
        zip(
            params,
            torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True),
            strict=True,
        )
    )
    assert len(kept) == 2
    assert any(bool(g.any()) for name, g in grads.items() if name.startswith("start."))
    if regulator not in ("structure", "prometar"):  # without a reference or trust these are the identity
        assert any(bool(g.any()) for name, g in grads.items() if name.startswith("regulator."))

    def replayed() -> float:
        constants = iter(kept)
        monkeypatch.setattr(meta, "of", lambda _: lambda p: next(constants))  # noqa: ARG005 (the gradient is kept)
        return float(of.loss({name: w.detach() for name, w in params.items()}, task)[0])

    gen = torch.Generator().manual_seed(3)
    for name, w in params.items():
        toward = torch.randn(w.shape, generator=gen, dtype=torch.float64)
        toward /= toward.norm()
        whole, step = w.detach().clone(), 1e-5
        ends = []
        for sign in (1, -1):
            w.data = whole + sign * step * toward
            ends.append(replayed())
        w.data = whole
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((grads[name] * toward).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_one_outer_step_moves_start_and_regulator_and_leaves_the_towers_alone(tiny: Backbone) -> None:
    texts = TextEncoder(tiny)
    of = replace(learner(), texts=texts.features(texts.class_set(NAMES)))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def towers() -> list[Tensor]:
        return [tiny.encode_images(pixels), TextEncoder(tiny).sentences(["a photo of a cat."])]

    before = [*towers(), of.texts.clone()]
    params = {name: w.requires_grad_() for name, w in of.init(torch.Generator().manual_seed(0)).items()}
    start = {name: w.detach().clone() for name, w in params.items()}
    config = MetaConfig(steps=10, episodes=4)
    told = outer_step(of, Episodes(), params, Optimizer(params, of.groups(), config), 0, World())
    moved = {name.partition(".")[0] for name, w in params.items() if not torch.equal(w, start[name])}
    assert moved == {"start", "regulator"}
    assert {"loss", "support", "in", "mode", "branch", "gradient start", "gradient regulator"} <= told.keys()
    assert all(torch.equal(a, b) for a, b in zip(before, [*towers(), of.texts], strict=True))


def test_training_lowers_the_loss_of_the_episodes_it_sees() -> None:
    of = learner(steps=1, start_rate=1e-2, regulator_rate=1e-2)
    params = {name: w.requires_grad_() for name, w in of.init(torch.Generator().manual_seed(0)).items()}
    optimizer = Optimizer(params, of.groups(), MetaConfig(steps=60, episodes=4))

    class Same(Episodes):
        def episode(self, i: int, progress: float) -> Episode:
            return super().episode(i % 4, progress)

    losses = [outer_step(of, Same(), params, optimizer, step, World())["loss"] for step in range(60)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"regulator": "pilot"}, "regulator is 'pilot'; choose one of gram"),
        ({"update": "adam"}, "update is 'adam'; choose one of rms"),
        ({"rank": 0}, "rank 0"),
        ({"lr": -1.0}, "must be at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        LearnerConfig(**wrong)


@pytest.mark.parametrize("regulator", ["identity", "prograd"])
def test_a_regulator_without_weights_leaves_the_start_to_learn(regulator: str) -> None:
    of = learner(regulator=regulator)
    assert {name.partition(".")[0] for name in of.init(torch.Generator())} == {"start"}
