"""gram_core.learner: what is trained is what is served, from unlabeled images alone, and its statistics are numpy's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core import gram
from gram_core.backbone import Backbone
from gram_core.classifier import Classifier, Seen
from gram_core.episodes import Episode, EpisodeConfig, Tasks
from gram_core.errors import InvalidConfig
from gram_core.gram import CONTEXT, OWN, Structure
from gram_core.learner import CONSTANT, MARGINS, UNHEEDED, GramLearner, Told, margin, survey
from gram_core.meta import LearnerConfig, MetaConfig, Optimizer, World, outer_step
from gram_core.regulators import REGULATORS
from gram_core.types import Params, Tuning
from prototypes.hierarchy import MODE
from tests.episodes_fixtures import D, world
from tests.test_classifier import NAMES as SERVED
from tests.test_classifier import bank_of, learned_of, root_of, weights_of

SMALL = world()
NAMES = tuple(f"thing {i}" for i in range(12))
STRUCTURE = Structure.of(SMALL.bank)
M = len(SMALL.bank.names)


def unit(gen: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=gen), dim=-1)


def learner(**options: Any) -> GramLearner:
    gen = torch.Generator().manual_seed(5)
    config = LearnerConfig(**({"steps": 2, "lr": 1e-2} | options))
    texts = unit(gen, len(NAMES), D)
    return GramLearner(texts=texts, root=STRUCTURE.root, scale=12.0, config=config, structure=STRUCTURE)


def episode(kind: str = "iid", number: int = 0, n: int = 10, masked: bool = False) -> Episode:
    """`n` images in three views, each near the feature of its class; of one class alone where `kind` is single."""
    gen = torch.Generator().manual_seed(number)
    classes = torch.randperm(len(NAMES), generator=gen)[:6]
    labels = torch.randint(6, (n,), generator=gen) if kind != "single" else torch.full((n,), number % 6)
    originals = F.normalize(learner().texts[classes][labels] + 1.2 * unit(gen, n, D), dim=-1)
    return Episode(
        index=number,
        seed=1000 + number,
        kind=kind,
        names=tuple(NAMES[i] for i in classes),
        classes=classes,
        support=F.normalize(originals[:, None] + 0.15 * unit(gen, n, 3, D), dim=-1),
        support_labels=labels,
        domain="plain",
        queries=(),
        masked=np.random.default_rng(number).random(M) < 0.4 * masked,
        node=1,
        concepts=np.arange(6),
        keys=tuple(map(str, range(n))),
    )


class Episodes:
    """A stand-in for `episodes.Tasks`."""

    def episode(self, i: int, progress: float) -> Episode:
        assert 0 <= progress <= 1
        return episode(("iid", "single", "sorted", "imbalanced")[i % 4], number=i, n=(1, 4, 8, 10)[i // 4 % 4])


def weights(of: GramLearner, spread: float = 0.5, dtype: torch.dtype = torch.float32) -> Params:
    """As after a training: the output layer is not zero."""
    gen = torch.Generator().manual_seed(1)
    made = of.init(gen)
    return {
        n: (w + spread * torch.randn(w.shape, generator=gen) if n.startswith("amounts") else w).to(dtype)
        for n, w in made.items()
    }


def leaves(of: GramLearner) -> Params:
    return {name: w.requires_grad_() for name, w in of.init(torch.Generator().manual_seed(0)).items()}


def tensors(told: Told) -> list[Tensor]:
    return [told.base, told.plain, told.answer, told.context, told.novelty]


# ---- training tells what serving answers ----


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("sure", ["wholly", "half", "not at all"])
def test_a_simulated_request_is_told_what_the_server_answers(tiny: Backbone, count: int, root: bool, sure: str) -> None:
    check_parity(tiny, count, root, sure)


@pytest.mark.parametrize("regulator", ["gram", "structure", "meta_sgd"])
@pytest.mark.parametrize("start", [False, True])
def test_a_learned_start_and_regulator_are_served_as_they_were_trained(
    tiny: Backbone, regulator: str, start: bool
) -> None:
    check_parity(tiny, 9, True, "wholly", regulator, start)


def check_parity(
    tiny: Backbone, count: int, root: bool, sure: str, regulator: str = "identity", start: bool = False
) -> None:
    bank, top = bank_of(tiny), root_of(tiny)
    structure = Structure.of(bank)
    gen = torch.Generator().manual_seed(count)
    served = Classifier(tiny, top)
    classes = served.class_set(SERVED)
    texts = served.texts.features(classes)
    labels = torch.randint(len(SERVED), (count,), generator=gen)
    originals = F.normalize(texts[labels] + 1.2 * unit(gen, count, texts.shape[1]), dim=-1)
    support = F.normalize(originals[:, None] + 0.1 * unit(gen, count, 4, texts.shape[1]), dim=-1)
    nu = float(gram.relate(structure, support[:, 0]).novelty)
    least = {"wholly": -2.0, "half": nu, "not at all": nu + 0.1}[sure]
    params = weights_of(seed=count, least=least, margin=0.2)
    params["context.mean"] = torch.randn(1, len(CONTEXT), generator=gen)
    params["context.spread"] = 0.5 + torch.rand(1, len(CONTEXT), generator=gen)
    config = LearnerConfig(steps=4, lr=1e-3, bias=0.0, root=root, regulator=regulator, start=start)
    width = texts.shape[1]
    made = REGULATORS[regulator].init({"residual": (None, width)}, gen)
    drawn = made | ({"u": torch.zeros(1, width, 3), "v": torch.zeros(1, width, 3)} if start else {})
    for name, w in drawn.items():  # away from the identity
        own = f"regulator.{name}" if name in made else f"start.{name}"
        params[own] = w + 0.3 * torch.randn(w.shape, generator=gen)
    mine = GramLearner(texts=texts, root=torch.from_numpy(top), scale=tiny.logit_scale, config=config,
                       structure=structure)  # fmt: skip
    shown = replace(
        episode(), classes=torch.arange(len(SERVED)), support=support, support_labels=labels,
        masked=np.zeros(len(bank.names), bool),
    )  # fmt: skip
    told = mine.tell(params, shown)
    expected = gram.accepted(told.base, told.answer, 0.2)

    left = learned_of(tiny, params, root=root)
    left = replace(left, checkpoint=replace(left.checkpoint, regulator=regulator))
    served = Classifier(tiny, top, learned=left)
    plan = served.plan(Tuning(method="gram", scope="image" if count == 1 else "batch"), count, classes)
    order = torch.randperm(count, generator=gen)
    answered = served.answer(Seen(support[order], tuple(bytes([i]) * 32 for i in order.tolist())), classes, plan)
    for i, result in zip(order.tolist(), answered, strict=True):
        np.testing.assert_allclose(result.baseline_scores("logit"), told.base[i], rtol=0, atol=1e-4)
        assert (result.adaptation.status, result.adaptation.steps) == ("completed", 4)
        if sure != "not at all":
            assert result.adaptation.accepted == bool(expected[i])
        if result.adaptation.accepted:
            np.testing.assert_allclose(result.scores("logit"), told.answer[i], rtol=0, atol=1e-4)
            assert result.cosines.argmax() == told.answer[i].argmax()
        else:
            assert (result.cosines == result.baseline_cosines).all()
    if sure == "not at all":
        assert torch.equal(told.answer, told.plain)
    elif count > 2:
        assert not torch.allclose(told.answer, told.plain, atol=1e-2)


def test_a_learner_without_the_structure_serves_what_it_trained() -> None:
    of = replace(learner(), structure=STRUCTURE.control("none"))
    found = survey(of, weights(of), Episodes(), 24, World())
    assert (found["context.spread"][0, len(OWN) :] == UNHEEDED).all()
    of = replace(of, surveyed=found)
    params = weights(of)
    request = episode(masked=True)
    trained = of.tell(params, request).context
    assert not trained[len(OWN) :].any()
    served = learner().tell(params, request).context  # what the server sees
    assert served[len(OWN) :].any()
    one, other = (gram.amounts(params, context).told for context in (trained, served))
    assert one == pytest.approx(other, rel=1e-4)
    elsewhere = replace(of, structure=Structure.of(world(seed=1).bank).control("none"))
    told, moved = (each.tell(params | {"trust.least": torch.tensor([[-2.0]])}, request) for each in (of, elsewhere))
    torch.testing.assert_close(told.context[len(OWN) :], moved.context[len(OWN) :])


def test_the_labels_of_a_request_change_nothing_that_it_is_told() -> None:
    of = learner()
    request = episode()
    turned = replace(request, support_labels=(request.support_labels + 1) % 6)
    for one, other in zip(tensors(of.tell(weights(of), request)), tensors(of.tell(weights(of), turned)), strict=True):
        assert torch.equal(one, other)
    assert float(of.loss(weights(of), request)[0]) != float(of.loss(weights(of), turned)[0])


def test_masked_prototypes_are_not_seen() -> None:
    of = learner()
    hidden = replace(episode(), masked=SMALL.bank.level == MODE)
    told = of.tell(weights(of) | {"trust.least": torch.tensor([[0.0]])}, hidden)
    assert float(told.novelty) == -1.0
    assert torch.equal(told.answer, told.plain)
    assert all(bool(x.isfinite().all()) for x in tensors(told))


@pytest.mark.parametrize("seed", range(6))
def test_the_bias_of_class_features_follows_from_the_seed_of_the_episode_alone(seed: int) -> None:
    of = learner(bias=0.3)
    request = replace(episode(), seed=2**63 - 1 - seed)
    got = of._biased(request)
    other = replace(episode("single", n=3), seed=request.seed, index=77, classes=request.classes)
    assert torch.equal(of._biased(other), got)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(6))
    plain = of.texts[request.classes]
    assert torch.equal(learner(bias=0.0)._biased(request), plain)
    beside = got - (got * plain).sum(-1, keepdim=True) * plain  # nothing but the root was added
    root = STRUCTURE.root - (plain @ STRUCTURE.root)[:, None] * plain
    torch.testing.assert_close(
        beside, (beside * root).sum(-1, keepdim=True) * root / root.square().sum(-1, keepdim=True), rtol=0, atol=1e-5
    )


def test_half_of_the_episodes_have_a_bias_and_each_its_own() -> None:
    of = learner(bias=0.3)
    moved = [of._biased(replace(episode(), seed=seed)) for seed in range(200)]
    plain = of.texts[episode().classes]
    biased = [x for x in moved if not torch.equal(x, plain)]
    assert 70 < len(biased) < 130
    assert len({x.numpy().tobytes() for x in biased}) == len(biased)


# ---- what is learned ----


def test_the_gradient_of_the_amounts_equals_finite_differences() -> None:
    of = learner(harm=3.0)
    levels = [{level: x.double() for level, x in each.items()} for each in (STRUCTURE.visual, STRUCTURE.width)]
    mean, root = STRUCTURE.mean.double(), STRUCTURE.root.double()
    structure = replace(STRUCTURE, visual=levels[0], width=levels[1], mean=mean, root=root)
    of = replace(of, texts=of.texts.double(), root=root, structure=structure)
    tests = [replace(e, support=e.support.double()) for e in (episode(masked=True), episode("single", 3, n=4))]
    least = float(of.tell(weights(of, dtype=torch.float64), tests[0]).novelty)  # where trust is neither 0 nor 1
    gen = torch.Generator().manual_seed(3)
    for request in tests:
        params = weights(of, dtype=torch.float64)
        params["trust.least"] = torch.full((1, 1), least, dtype=torch.float64)
        params = {name: w.requires_grad_() for name, w in params.items()}
        loss = of.loss(params, request)[0]
        names = [name for name in params if name.startswith("amounts.")]
        grads = torch.autograd.grad(loss, [params[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            assert bool(grad.any())
            toward = torch.randn(grad.shape, generator=gen, dtype=torch.float64)
            toward /= toward.norm()
            ends = [
                float(of.loss(params | {name: params[name].detach() + sign * 1e-5 * toward}, request)[0].detach())
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / 2e-5
            assert float((grad * toward).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("kind", "weight"), [("iid", 5.0), ("single", 1.0), ("sorted", 1.0)])
def test_the_loss_weighs_harm_and_even_requests(kind: str, weight: float) -> None:
    of = learner(harm=3.0, even=5.0)
    harmed = 0
    for number in range(6):
        request = episode(kind, number)
        if number % 2:  # what the images say is wrong
            request = replace(request, support_labels=(request.support_labels + 1) % 6)
        params = weights(of, spread=2.0)
        told = of.tell(params, request)
        own, before = (float(F.cross_entropy(x, request.support_labels)) for x in (told.answer, told.base))
        loss, metrics = of.loss(params, request)
        assert float(loss) == pytest.approx(weight * (own + 3.0 * max(0.0, own - before)), rel=1e-4)
        assert metrics == pytest.approx({"request": own, "zero-shot": before})
        harmed += own > before
    assert 0 < harmed < 6


def test_a_supervised_task_says_nothing_about_amounts() -> None:
    of = learner()
    task = episode("supervised")
    loss, metrics = of.loss(leaves(of), task)
    assert (float(loss), loss.requires_grad, metrics) == (0.0, False, {})
    assert of.measure(leaves(of), task) == {}
    whole = learner(start=True, regulator="gram", rank=4)
    loss, metrics = whole.loss(leaves(whole), task)
    assert loss.requires_grad
    assert "support" in metrics


@pytest.mark.parametrize("options", [{}, {"start": True, "regulator": "gram", "rank": 4}])
def test_training_lowers_the_loss_and_leaves_the_statistics_alone(options: dict[str, Any]) -> None:
    of = learner(amounts_rate=3e-2, bias=0.0, **options)
    of = replace(of, surveyed=survey(of, of.init(torch.Generator().manual_seed(0)), Episodes(), 16, World()))
    params = leaves(of)
    start = {name: w.detach().clone() for name, w in params.items()}
    assert all(torch.equal(start[name], w) for name, w in of.surveyed.items())
    steps = 40 if not options else 4
    optimizer = Optimizer(params, of.groups(), MetaConfig(steps=steps, episodes=8, weight_decay=0.1))

    class Same(Episodes):
        def episode(self, i: int, progress: float) -> Episode:
            return super().episode(i % 8, progress)

    losses = [outer_step(of, Same(), params, optimizer, step, World())["loss"] for step in range(steps)]
    moved = {name.partition(".")[0] for name, w in params.items() if not torch.equal(w, start[name])}
    assert moved == ({"amounts", "start", "regulator"} if options else {"amounts"})
    if not options:
        assert losses[-1] < 0.7 * losses[0]
        with torch.no_grad():
            before, after = ([of.measure(p, Episodes().episode(i, 1.0)) for i in range(32)] for p in (start, params))
        assert np.mean([m["request"] for m in after]) < np.mean([m["request"] for m in before])


def test_what_is_measured_is_accuracy_after_acceptance() -> None:
    of = learner()
    params = weights(of) | {"accept.margin": torch.full((1, 1), 0.6)}
    for number in range(5):
        request = episode("single", number)
        told = of.tell(params, request)
        taken = gram.accepted(told.base, told.answer, 0.6)
        labels = torch.where(taken, told.answer.argmax(-1), told.base.argmax(-1))
        right = [float((x == request.support_labels).float().mean()) for x in
                 (labels, told.plain.argmax(-1), told.base.argmax(-1))]  # fmt: skip
        seen = of.measure(params, request)
        assert seen["single gain"] == pytest.approx(100 * (right[0] - right[2]), abs=1e-4)
        assert seen["gain"] == seen["single gain"]
        assert seen["single plain gain"] == pytest.approx(100 * (right[1] - right[2]), abs=1e-4)


# ---- what is surveyed ----


def test_a_survey_is_numpys_statistics_whoever_shares_it() -> None:
    of = learner()
    params = of.init(torch.Generator().manual_seed(0))
    config = EpisodeConfig(sizes=(1, 4, 8), unlabeled=0.0)
    tasks = Tasks(SMALL.tree, SMALL.bank, SMALL.views, config, held_out=False)
    texts = unit(torch.Generator().manual_seed(2), len(tasks.names), D)
    of = replace(of, texts=texts)
    found = survey(of, params, tasks, 40, World())
    told = [of.tell(params, tasks.episode(i, 1.0)) for i in range(40)]
    contexts = np.stack([t.context.numpy() for t in told]).astype(np.float64)
    novelty = np.array([float(t.novelty) for t in told])
    deviation = contexts.std(0, ddof=1)
    np.testing.assert_allclose(found["context.mean"][0], contexts.mean(0), rtol=1e-5, atol=1e-6)
    expected = np.where(deviation < CONSTANT, UNHEEDED, deviation)
    np.testing.assert_allclose(found["context.spread"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(found["trust.least"], [[np.quantile(novelty, 0.05)]], rtol=1e-6)
    assert all(w.dtype == torch.float32 and w.shape == params[name].shape for name, w in found.items())

    class Two(World):
        """Two processes, one after the other."""

        def share(self, numbers: range) -> range:
            return cast("range", [*numbers[1::2], *numbers[0::2]])

    again = survey(of, params, tasks, 40, Two())
    assert all(torch.equal(again[name], w) for name, w in found.items())


class Answered(GramLearner):
    """Gives away answers that the episode has brought along in its views."""

    def tell(self, params: Params, episode: Episode) -> Told:  # noqa: ARG002 (the answers are there)
        base, answer = episode.support[:, 0], episode.support[:, 1]
        return Told(base, base, answer, torch.zeros(len(CONTEXT)), torch.zeros(()))


class Changes:
    """Requests of ten images, one of whose labels changes, by so much in probability, to the right or a wrong one."""

    def __init__(self, *changes: tuple[float, bool], kind: str = "iid", n: int = 10) -> None:
        self.changes, self.kind, self.n = changes, kind, n

    def episode(self, i: int, progress: float) -> Episode:
        assert progress == 1.0
        ahead, good = self.changes[i % len(self.changes)]
        base, answer = torch.zeros(2, self.n, 2)
        base[:, 0] = answer[1:, 0] = 1.0
        answer[0, 1] = 2 * np.arctanh(ahead)
        labels = torch.zeros(self.n, dtype=torch.int64)
        labels[0] = int(good)
        request = episode(self.kind, number=i, n=self.n)
        return replace(request, support=torch.stack([base, answer], 1), support_labels=labels)


def chosen(tasks: Changes, count: int = 12, loss: float = 0.0) -> float:
    of = learner(loss=loss)
    answered = Answered(texts=of.texts, root=of.root, scale=of.scale, config=of.config, structure=of.structure)
    found = margin(answered, {}, cast("Any", tasks), range(count), World())
    assert found.shape == (1, 1)
    return pytest.approx(float(found))  # type: ignore[no-any-return]  # compared with numbers alone


def test_the_margin_is_the_smallest_that_loses_no_more_than_it_may() -> None:
    assert chosen(Changes((0.3, True))) == 0.0
    assert chosen(Changes((0.3, True), (0.1, False))) == 0.0  # they break even
    assert chosen(Changes((0.3, True), (0.1, False), (0.1, False))) == 1.2  # 0.1 is ahead by 1 / n; next above it
    assert chosen(Changes((0.03, False))) == 0.4
    assert chosen(Changes((0.3, True), (0.5, False), (0.5, False))) == 6.4  # 0.5 is ahead by 5 / n
    assert chosen(Changes(*[(0.5, False)] * 3, *[(0.5, True)] * 3)) == 0.0  # though the sum is not quite 0
    assert chosen(Changes((0.9, False))) == MARGINS[-1]  # nothing is enough
    assert chosen(Changes((0.9, False), n=4)) == 4.8  # few images are held back more
    assert chosen(Changes((0.9, False), kind="single")) == 0.0  # only even requests are asked
    assert chosen(Changes((0.9, False)), count=0) == 0.0


def test_a_small_loss_is_the_price_of_gains_elsewhere_and_can_be_set() -> None:
    slightly_worse = Changes((0.9, False), *[(0.9, True), (0.9, False)] * 6)  # loses 1 / 13 of a tenth: 0.77 points
    assert chosen(slightly_worse, 13, loss=0.8) == 0.0
    assert chosen(slightly_worse, 13, loss=0.7) == MARGINS[-1]


@pytest.mark.parametrize(
    "wrong", [{"survey": 1}, {"hidden": 0}, {"harm": -1.0}, {"even": -0.1}, {"bias": -1.0}, {"settle": -1},
              {"amounts_rate": -1.0}, {"amounts_rate": float("nan")}]
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="must be at least"):
        LearnerConfig(**wrong)
