"""Several requests in one run: nobody's answer depends on the others, and what goes wrong goes wrong alone."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gram_core import baselines
from gram_core.adapt import adapt, of, sgd
from gram_core.backbone import Backbone
from gram_core.classifier import Classifier
from gram_core.errors import DeviceError, OutOfMemory
from gram_core.images import DecodedImage
from gram_core.tuner import Seen, Tuner
from gram_core.types import Answer, Tuning, Work
from tests.test_classifier import NAMES, gram_of, images, same

Make = Callable[..., DecodedImage]
Works = list[Work]
EPSILON = 1e-3  # of a score, between groups of different sizes


@pytest.fixture(scope="module")
def classifier(tiny: Backbone) -> Classifier:
    return gram_of(tiny)


def work(
    classifier: Classifier, make: Make, count: int, first: int = 0, names: Sequence[str] = NAMES, **tuning: Any
) -> Work:
    classes = classifier.class_set(names)
    batch = images(classifier, make, count, first)
    return Work(batch, classes, classifier.plan(Tuning(**tuning), count, classes), explain=first % 2 == 1)


@pytest.fixture
def works(classifier: Classifier, make_image: Make) -> Works:
    """Every method, host and scope, with shared and with other classes."""
    ask = [
        {"count": 8},
        {"count": 9, "method": "infomax", "steps": 3},
        {"count": 10, "method": "infomax", "host": "coop", "steps": 2, "names": ["x", "y", "z"]},
        {"count": 1, "method": "tpt", "views": 8},
        {"count": 3, "method": "tpt", "views": 8, "steps": 2},
        {"count": 2, "method": "tpt", "views": 8},
        {"count": 2, "method": "tpt", "views": 5, "host": "residual"},
        {"count": 4, "method": "none"},
        {"count": 2, "scope": "image", "method": "gram", "views": 4},
        {"count": 3},
        {"count": 1, "names": ["only"]},
    ]
    return [work(classifier, make_image, first=20 * n + n % 2, **own) for n, own in enumerate(ask)]


def answers(classifier: Classifier, works: Sequence[Work]) -> list[Answer]:
    made = classifier.run(works)
    assert all(isinstance(answer, Answer) for answer in made), made
    return [answer for answer in made if isinstance(answer, Answer)]


def test_no_answer_depends_on_the_company(classifier: Classifier, works: Works) -> None:
    """Bit for bit: whoever shares the passes, and wherever in them a request's images come to lie."""
    for own in works:
        classifier.texts.features(own.classes)
    alone = [answers(classifier, [own])[0] for own in works]
    rng = random.Random(0)
    for _ in range(4):
        company = rng.sample(range(len(works)), rng.randint(2, len(works)))
        for n, answer in zip(company, answers(classifier, [works[n] for n in company]), strict=True):
            assert all(same(a, b) for a, b in zip(answer.results, alone[n].results, strict=True)), n
            assert [a.explanation for a in answer.results] == [b.explanation for b in alone[n].results]
            assert answer.image_passes == alone[n].image_passes
            assert answer.text_passes == alone[n].text_passes


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10])
def test_an_image_tuned_beside_others_gets_the_bits_it_gets_alone(classifier: Classifier, count: int) -> None:
    classes = classifier.class_set([f"thing {n}" for n in range(count)])
    assert classifier.tuner.group_of(classes) == 4
    plan = classifier.plan(Tuning(method="tpt", views=6, steps=2), 1, classes)
    seen = classifier._noise(7, 6)
    rows = [Seen(seen.views[n : n + 1], seen.sha256[n : n + 1]) for n in range(7)]
    alone = [classifier.answer(row, classes, plan)[0].cosines for row in rows]
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(7)[: rng.integers(2, 8)]
        company = Seen(seen.views[torch.from_numpy(order)], tuple(seen.sha256[n] for n in order))
        for n, result in zip(order, classifier.answer(company, classes, plan), strict=True):
            assert (result.cosines == alone[n]).all()


def test_many_classes_are_tuned_one_image_at_a_time_since_sharing_would_only_cost(classifier: Classifier) -> None:
    assert classifier.tuner.group_of(classifier.class_set([f"thing {n}" for n in range(11)])) == 1


def test_the_size_of_a_group_moves_an_answer_by_rounding_alone(classifier: Classifier, make_image: Make) -> None:
    own = work(classifier, make_image, 3, method="tpt", views=8, steps=2)
    (grouped,) = answers(classifier, [own])
    single = copy.copy(classifier)
    single.tuner = dataclasses.replace(classifier.tuner, group=1)
    (alone,) = answers(single, [own])
    for a, b in zip(grouped.results, alone.results, strict=True):
        assert np.abs(a.scores() - b.scores()).max() <= EPSILON


def test_images_of_several_requests_share_passes_of_both_towers(
    classifier: Classifier, make_image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes: list[int] = []
    real = baselines.marginal

    def counted(host: Any, classes: Any, start: Any, chosen: torch.Tensor, **options: Any) -> Any:
        episodes.append(len(chosen))
        return real(host, classes, start, chosen, **options)

    monkeypatch.setattr(baselines, "marginal", counted)
    ask = [work(classifier, make_image, 1, first=n, method="tpt", views=8) for n in range(6)]
    answers(classifier, ask)
    assert episodes == [4, 4]
    episodes.clear()
    answers(classifier, [*ask, work(classifier, make_image, 1, names=["other", "names"], method="tpt", views=8)])
    assert episodes == [4, 4, 4]  # six in two passes, and one of other names, filled up


# ---- stopping ----


def counting(reason: str, after: int) -> Callable[[float], str | None]:
    """Lets `after` questions pass."""
    asked = iter(range(1000))
    return lambda seconds: reason if next(asked) >= after and seconds >= 0 else None


@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "infomax", "steps": 9},
        {"method": "infomax", "host": "coop", "steps": 9},
        {"method": "gram", "steps": 9},
        {"method": "tpt", "steps": 9, "views": 8},
    ],
)
def test_a_tuning_that_has_to_end_keeps_the_steps_it_took(
    classifier: Classifier, make_image: Make, tuning: dict[str, Any]
) -> None:
    whole = work(classifier, make_image, 8, **tuning)
    (plain,) = answers(classifier, [dataclasses.replace(whole, plan=dataclasses.replace(whole.plan, skip="budget"))])
    seen = set()
    for after in (0, 1, 9, 12, 15, 30):
        (cut,) = answers(classifier, [dataclasses.replace(whole, stop=counting("budget", after))])
        for n, result in enumerate(cut.results):
            report = result.adaptation
            seen.add((report.status, report.steps))
            if report.status == "skipped":
                assert (report.reason, report.steps) == ("budget", 0)
                assert (result.cosines == plain.results[n].cosines).all()
                continue
            shorter = dataclasses.replace(whole.plan, steps=report.steps)
            (short,) = answers(classifier, [dataclasses.replace(whole, plan=shorter)])
            if report.status == "partial":
                assert report.reason == "budget"
                assert (report.steps_requested, report.steps < 9) == (9, True)
            assert np.abs(result.scores() - short.results[n].scores()).max() <= EPSILON
    assert ("skipped", 0) in seen
    assert any(status == "partial" and 0 < steps < 9 for status, steps in seen)


def test_an_episode_that_stops_keeps_its_params_and_the_others_go_on() -> None:
    start = {"x": torch.ones(3, 2)}
    grad = of(lambda p: p["x"].square().sum(1))

    def going(step: int) -> torch.Tensor:
        return torch.tensor([step < 1, step < 2, True])

    made = adapt(grad, start, update=sgd, lr=0.25, steps=4, active=going)["x"]
    assert made[:, 0].tolist() == [0.5, 0.25, 0.0625]
    none = adapt(grad, start, update=sgd, lr=0.25, steps=4, active=lambda _: torch.zeros(3, dtype=torch.bool))
    assert torch.equal(none["x"], start["x"])


# ---- what goes wrong ----


class Broken(Tuner):
    """Fails on class sets that have a class `bad`, `times` times."""

    error: BaseException = ValueError("a bug")
    times = 10**9

    def _fails(self, classes: Any) -> None:
        if "bad" in classes.names and Broken.times > 0:
            Broken.times -= 1
            raise Broken.error

    def _tune_gram(self, *args: Any) -> Any:
        self._fails(args[3])
        return super()._tune_gram(*args)

    def _tune_images(self, *args: Any) -> Any:
        self._fails(args[2])
        return super()._tune_images(*args)


@pytest.fixture
def broken(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    made = copy.copy(classifier)
    fields = {f.name: getattr(classifier.tuner, f.name) for f in dataclasses.fields(Tuner)}
    made.tuner = Broken(**fields)
    monkeypatch.setattr(Broken, "times", 10**9)
    return made


@pytest.mark.parametrize("tuning", [{"count": 8}, {"count": 2, "method": "tpt", "views": 8}])
def test_a_bug_in_one_tuning_is_that_requests_baseline(
    broken: Classifier, classifier: Classifier, works: Works, make_image: Make, tuning: dict[str, Any]
) -> None:
    bad = work(classifier, make_image, first=300, names=[*NAMES, "bad"], **tuning)
    plain = dataclasses.replace(bad, plan=classifier.plan(Tuning(method="none"), len(bad.images), bad.classes))
    (expected,) = answers(classifier, [plain])
    got = answers(broken, [*works, bad])
    for result, zero_shot in zip(got[-1].results, expected.results, strict=True):
        assert (result.adaptation.status, result.adaptation.reason) == ("fallback", "internal")
        assert (result.cosines == zero_shot.cosines).all()
    for answer, alone in zip(got, [*answers(classifier, works)], strict=False):
        assert all(same(a, b) for a, b in zip(answer.results, alone.results, strict=True))


@pytest.mark.parametrize(("times", "status"), [(1, "completed"), (2, "fallback")])
def test_too_little_memory_is_tried_once_more_and_then_is_the_baseline(
    broken: Classifier,
    classifier: Classifier,
    make_image: Make,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    status: str,
) -> None:
    monkeypatch.setattr(Broken, "error", torch.OutOfMemoryError("no"))
    monkeypatch.setattr(Broken, "times", times)
    bad = work(classifier, make_image, 8, first=300, names=[*NAMES, "bad"])
    good = work(classifier, make_image, 8, first=400)
    first, second = answers(broken, [bad, good])
    assert {r.adaptation.status for r in first.results} == {status}
    if status == "fallback":
        assert {r.adaptation.reason for r in first.results} == {"out_of_memory"}
        assert all((r.cosines == r.baseline_cosines).all() for r in first.results)
    assert {r.adaptation.status for r in second.results} == {"completed"}


def test_texts_that_do_not_fit_fail_alone(
    classifier: Classifier, make_image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = work(classifier, make_image, 2, names=["bad", "texts"], method="none")
    good = work(classifier, make_image, 2, method="none")
    real = classifier.texts.features

    def features(classes: Any) -> torch.Tensor:
        if "bad" in classes.names:
            raise torch.OutOfMemoryError("no")
        return real(classes)

    monkeypatch.setattr(classifier.texts, "features", features)
    first, second = classifier.run([bad, good])
    assert isinstance(first, OutOfMemory)
    assert isinstance(second, Answer)
    with pytest.raises(OutOfMemory):
        classifier.classify(bad.images, bad.classes, bad.plan)


def test_a_broken_device_is_everybodys(
    broken: Classifier, classifier: Classifier, make_image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "error", torch.AcceleratorError("device-side assert"))
    bad = work(classifier, make_image, 8, names=[*NAMES, "bad"])
    with pytest.raises(DeviceError):
        broken.run([work(classifier, make_image, 8, first=100), bad])


# ---- what is told before it is over ----


def test_the_zero_shot_answer_is_there_before_anything_is_tuned(classifier: Classifier, make_image: Make) -> None:
    early: list[Answer] = []
    asked: list[int] = []

    def stop(_: float) -> str | None:
        asked.append(len(early))
        return None

    own = dataclasses.replace(work(classifier, make_image, 8, method="infomax", steps=2), early=early.append, stop=stop)
    plain = dataclasses.replace(own, plan=classifier.plan(Tuning(method="none"), 8, own.classes), early=early.append)
    tuned, zero_shot = answers(classifier, [own, plain])
    first, whole = early
    assert set(asked) == {2}  # whoever is not tuned does not wait for those who are
    assert all(same(a, b) for a, b in zip(whole.results, zero_shot.results, strict=True))
    for a, b in zip(first.results, zero_shot.results, strict=True):
        assert (a.cosines == b.cosines).all()
        assert (a.adaptation.status, a.adaptation.reason) == ("skipped", "deadline")
        assert (a.adaptation.steps, a.adaptation.steps_requested) == (0, 2)
    assert {r.adaptation.status for r in tuned.results} == {"completed"}


def test_a_plan_that_was_made_smaller_says_so(classifier: Classifier, make_image: Make) -> None:
    asked = work(classifier, make_image, 8, method="infomax", steps=9, views=8)
    less = dataclasses.replace(asked, plan=asked.plan.less("brownout", views=4, steps=1))
    small = dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, views=4, steps=1))
    shed, plain = answers(classifier, [less, small])
    for a, b in zip(shed.results, plain.results, strict=True):
        report = a.adaptation
        assert (report.status, report.reason) == ("partial", "brownout")
        assert (report.steps, report.steps_requested, report.views, report.views_requested) == (1, 9, 4, 8)
        assert (a.cosines == b.cosines).all()
    assert asked.plan.less("brownout", views=8, steps=9) == asked.plan


@pytest.mark.parametrize("stage", ["features", "_original_features", "encode_images"])
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_is_tried_once_more_and_counted(
    classifier: Classifier, make_image: Make, monkeypatch: pytest.MonkeyPatch, stage: str, times: int
) -> None:
    left = [times]
    made = copy.copy(classifier)
    made.out_of_memory = {True: 0, False: 0}
    owner = {"features": made.texts, "_original_features": made, "encode_images": made.backbone}[stage]
    real = getattr(owner, stage)

    def scarce(*args: Any, **options: Any) -> Any:
        if left[0] and (stage != "encode_images" or options.get("views")):
            left[0] -= 1
            raise torch.OutOfMemoryError("no")
        return real(*args, **options)

    own = work(classifier, make_image, 8, method="infomax", steps=1)
    monkeypatch.setattr(owner, stage, scarce)
    if times == 1:
        (answer,) = answers(made, [own])
        assert {r.adaptation.status for r in answer.results} == {"completed"}
        assert made.out_of_memory == {True: 1, False: 0}
    elif stage == "encode_images":
        (answer,) = answers(made, [own])
        assert {r.adaptation.reason for r in answer.results} == {"out_of_memory"}
        assert made.out_of_memory == {True: 0, False: 1}
    else:
        with pytest.raises(OutOfMemory):
            made.classify(own.images, own.classes, own.plan)
        assert made.out_of_memory == {True: 0, False: 1}
