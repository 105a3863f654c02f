"""Faults, one at a time, over real HTTP: who is hurt, what everyone else hears, and that it is over afterwards.

Every fault ends with a good request, nothing reserved and the loop alive. Those that end the process are in
`test_lifecycle.py`; what memory does inside a run is in `test_run.py`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from gram_core import baselines, objectives, views
from gram_core.backbone import Backbone, load
from gram_core.classifier import Classifier
from gram_core.errors import DeviceError, OutOfMemory
from gram_core.images import DecodedImage
from gram_core.learned import Learned
from gram_core.types import Answer, Plan, Work
from server import service
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from tests.conftest import TINY, write_model
from tests.gram_fixtures import tiny_learned
from tests.server_fixtures import HeldClassifier, Live, answered, body, code, live, png, until

EIGHT = [png(n) for n in range(8)]
NAMES = ["cat", "dog", "house"]
CALLS = count()


# ---- bugs, with a fake model ----


class Buggy(FakeClassifier):
    """Fails in one place, where a class is called `bad`; `prepare` fails on images of 13 x 13 pixels."""

    place = ""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__()
        self.place, self.error = place, error

    def _fail(self, place: str, bad: bool) -> None:
        if bad and place == self.place:
            raise self.error

    def prepare(self, image: DecodedImage) -> FakePrepared:
        self._fail("prepare", image.width == 13)
        return super().prepare(image)

    def class_set(self, classes: Any, templates: Sequence[str] | None = None) -> FakeClassSet:
        self._fail("class_set", "bad" in classes)
        return super().class_set(classes, templates)

    def plan(self, tuning: Any, images: int, classes: FakeClassSet) -> Plan:
        self._fail("plan", "bad" in classes.names)
        return super().plan(tuning, images, classes)

    def cost(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        self._fail("cost", "bad" in classes.names)
        return super().cost(plan, images, classes)

    def fit(self, plan: Plan, images: int, classes: FakeClassSet, budget_s: float, why: str) -> Plan:
        self._fail("fit", "bad" in classes.names)
        return super().fit(plan, images, classes, budget_s, why)

    def seconds(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        self._fail("seconds", "bad" in classes.names)
        return super().seconds(plan, images, classes)

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        bad = any("bad" in work.classes.names for work in works)
        self._fail("run", bad)
        made = super().run(works)
        return made[1:] if bad and self.place == "too few" else made

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        self._fail("classify", "bad" in classes.names)
        return super().classify(images, classes, plan, **options)


PLACES = ("prepare", "class_set", "plan", "cost", "fit", "seconds", "run", "too few", "classify")


@pytest.mark.parametrize("place", PLACES)
def test_a_bug_anywhere_is_one_requests_500(place: str, caplog: pytest.LogCaptureFixture) -> None:
    with live(Buggy(place, RuntimeError("secret"))) as server, ThreadPoolExecutor(12) as pool:
        bad = png(1, (13, 13)) if place == "prepare" else png(1)
        classes = ("cat", "dog") if place == "prepare" else ("bad", "dog")
        good = [pool.submit(server.ask, png(n)) for n in range(5)]
        wrong = [pool.submit(server.ask, bad, classes=classes) for _ in range(2)]
        good += [pool.submit(server.ask, png(n)) for n in range(5)]
        assert [future.result().status_code for future in good] == [200] * 10
        for future in wrong:
            assert code(future.result()) == "internal"
            assert "secret" not in future.result().text
        assert ("shorter" if place == "too few" else "secret") in caplog.text  # the log has the traceback
        server.assert_well()


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("too few", "seconds")])
def test_too_little_memory_anywhere_is_a_503_that_may_be_tried_again(place: str) -> None:
    with live(Buggy(place, OutOfMemory("no"))) as server:
        bad = png(1, (13, 13)) if place == "prepare" else png(1)
        response = server.ask(bad, classes=("cat", "dog") if place == "prepare" else ("bad", "dog"))
        assert code(response) == "accelerator_failed"
        assert response.json()["error"]["retryable"]
        server.assert_well()


@pytest.mark.parametrize("place", ["fit", "run", "classify"])
def test_a_device_that_fails_anywhere_in_a_batch_turns_every_probe_and_runs_nothing_more(place: str) -> None:
    classifier = Buggy(place, DeviceError("gone"))
    with live(classifier) as server:
        assert code(server.ask(classes=("bad", "dog"))) == "accelerator_failed"
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/readyz").json()["checks"]["device"] is False
        assert server.client.get("/livez").status_code == 503
        assert code(server.ask()) == "accelerator_failed"
        assert server.metric("gram_device_healthy") == 0
        until(lambda: server.service.budget.held == 0, "every byte is given back")


def test_a_bug_while_an_answer_is_written_is_its_own_500(monkeypatch: pytest.MonkeyPatch) -> None:
    real = service.classification

    def broken(**facts: Any) -> bytes:
        if "bad" in facts["outcome"].groups[0].class_set.names:
            raise ZeroDivisionError
        return real(**facts)

    monkeypatch.setattr(service, "classification", broken)
    with live() as server:
        assert code(server.ask(classes=("bad", "dog"))) == "internal"
        server.assert_well()


def test_one_bad_item_fails_alone_in_a_batch() -> None:
    with live(Buggy("prepare", RuntimeError("bug"))) as server:
        response = server.ask(png(0), b"GIF89a", png(2), errors="per_item")
        results = answered(response).json()["results"]
        assert [r["error"] and r["error"]["code"] for r in results] == [None, "unsupported_image_format", None]
        server.assert_well()


def test_2000_requests_of_which_three_in_ten_leave() -> None:
    """Everyone who stays is answered, and every reservation returns."""
    rng = random.Random(0)
    leaves = [rng.random() < 0.3 for _ in range(2000)]

    class Slow(FakeClassifier):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            made = super().run(works)
            assert all(work.stop(0.0) in (None, "deadline") for work in works)
            return made

    bodies = [json.dumps(body(png(n))).encode() for n in range(7)]

    async def one(port: int, n: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = bodies[n % 7]
        head = "POST /classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        if leaves[n]:
            await asyncio.sleep(rng.random() * 0.01)
            writer.close()
            return b""
        answer = await reader.read()
        writer.close()
        return answer.partition(b"\r\n")[0]

    async def storm(port: int) -> list[bytes]:
        turn = asyncio.Semaphore(64)

        async def later(n: int) -> bytes:
            async with turn:
                return await one(port, n)

        return list(await asyncio.gather(*(later(n) for n in range(2000))))

    with live(Slow(), brownout=(), queue_seconds=1e6, log_level="error") as server:
        ends = asyncio.run(storm(server.port))
        assert {end for end, left in zip(ends, leaves, strict=True) if not left} == {b"HTTP/1.1 200 OK"}
        until(lambda: server.metric("gram_requests_inflight") == 1, "only the scrape is left")
        assert server.metric("gram_queue_cost") == 0
        assert server.metric("gram_ingress_bytes") == 0
        assert server.service.gate.held == server.service.gate.waiting == 0
        server.assert_well()


def test_a_client_that_leaves_between_steps_ends_its_tuning() -> None:
    steps: list[str | None] = []

    class Stepping(HeldClassifier):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            self.runs.append(works)
            while not steps or steps[-1] is None:
                steps.append(works[0].stop(0.0))
                self.gate.wait(0.001)
            return FakeClassifier.run(self, works)

    with live(classifier := Stepping()) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/classify", json=body(), timeout=0.2)
        until(lambda: steps[-1] == "deadline", "the tuning ends")
        classifier.gate.set()
        assert classifier.runs
        until(lambda: server.metric("gram_client_disconnects_total", stage="adapt") == 1, "it is counted once")
        until(lambda: server.service.budget.held == 0, "every byte is given back")
        steps.append(None)


# ---- numbers and memory, with a real model ----


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = write_model(tmp_path_factory.mktemp("models") / "faulty", TINY, seed=3)
    return load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def learned(backbone: Backbone) -> Learned:
    return tiny_learned(backbone)


@pytest.fixture(scope="module")
def warm(backbone: Backbone, learned: Learned) -> Classifier:
    """Measures once, for all: warming up takes longer than any of these tests."""
    classifier = Classifier(backbone, learned.bank.root.visual, learned=learned)
    classifier.warm_up()
    return classifier


@pytest.fixture
def real(backbone: Backbone, learned: Learned, warm: Classifier, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    classifier = Classifier(backbone, learned.bank.root.visual, learned=learned)
    classifier.pace, classifier.text_weight = copy.deepcopy(warm.pace), warm.text_weight
    monkeypatch.setattr(classifier, "warm_up", lambda: None)
    with live(classifier, batch_wait_ms=200.0, timeout_ms=60_000) as server:
        yield server


def faulty(function: Callable[..., Any], spoil: Callable[[Any], Any], times: int = 10**9) -> Callable[..., Any]:
    """`function`, whose first results are spoilt."""
    left = [times]

    def made(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if left[0] > 0:
            left[0] -= 1
            return spoil(result)
        return result

    return made


def out_of_memory(_: Any) -> Any:
    raise torch.OutOfMemoryError("no")


def nan(result: Any) -> Any:
    return {name: torch.full_like(p, torch.nan) for name, p in result.items()}


def statuses(response: httpx.Response) -> set[tuple[str, str | None]]:
    assert response.status_code == 200, response.text
    results = answered(response).json()["results"]
    for result in results:
        if result["adaptation"]["status"] == "fallback":
            assert result["predictions"] == result["baseline"]["predictions"]
    return {(r["adaptation"]["status"], r["adaptation"]["reason"]) for r in results}


def beside_a_neighbour(server: Live, **adaptation: Any) -> set[tuple[str, str | None]]:
    """The faulty request's outcome, in a batch with one whose answer must not move."""
    plain = {"method": "none"}
    alone = server.ask(*EIGHT, classes=NAMES, adaptation=plain).json()["results"]
    with ThreadPoolExecutor(2) as pool:
        faulty_one = pool.submit(server.ask, *EIGHT, classes=NAMES, adaptation=adaptation)
        neighbour = pool.submit(server.ask, *EIGHT, classes=NAMES, adaptation=plain)
        assert [r["predictions"] for r in neighbour.result().json()["results"]] == [r["predictions"] for r in alone]
        return statuses(faulty_one.result())


@pytest.mark.parametrize("adaptation", [{"method": "infomax"}, {"method": "tpt", "views": 4}, {"method": "gram"}])
@pytest.mark.parametrize("times", [1, 10**9])
def test_memory_that_runs_out_in_a_step_is_tried_once_more(
    real: Live, monkeypatch: pytest.MonkeyPatch, adaptation: dict[str, Any], times: int
) -> None:
    name = "marginal" if adaptation["method"] == "tpt" else "infomax"
    monkeypatch.setattr(baselines, name, faulty(getattr(baselines, name), out_of_memory, times))
    found = beside_a_neighbour(real, **adaptation)
    if times == 1:
        assert ("fallback", "out_of_memory") not in found
        assert real.metric("gram_out_of_memory_total", recovered="true") == 1
    else:
        assert found == {("fallback", "out_of_memory")}
        assert real.metric("gram_out_of_memory_total", recovered="false") >= 1
    real.assert_well()


@pytest.mark.parametrize(("owner", "name"), [("backbone", "encode_images"), ("texts", "features")])
def test_memory_that_runs_out_in_a_forward_pass_is_tried_once_more(
    real: Live, monkeypatch: pytest.MonkeyPatch, owner: str, name: str
) -> None:
    thing = getattr(real.service.engine.classifier, owner)
    method = getattr(thing, name)
    asked = partial(real.ask, *EIGHT, classes=NAMES, adaptation={"method": "infomax", "steps": 1})
    monkeypatch.setattr(thing, name, faulty(method, out_of_memory, 1))
    assert ("fallback", "out_of_memory") not in statuses(asked())
    monkeypatch.setattr(thing, name, faulty(method, out_of_memory))
    assert code(asked()) == "accelerator_failed"
    monkeypatch.setattr(thing, name, method)
    assert real.metric("gram_out_of_memory_total", recovered="true") == 1
    assert real.metric("gram_out_of_memory_total", recovered="false") >= 1
    real.assert_well()


@pytest.mark.parametrize(
    ("module", "name", "spoil", "reasons"),
    [
        (baselines, "adapt", nan, {"not_finite"}),
        (objectives, "marginal_entropy", lambda entropy: entropy + next(CALLS), {"diverged"}),
        (objectives, "kl", lambda distance: distance + 99, {"kl_cap"}),
        (objectives, "marginal_entropy", lambda entropy: entropy * torch.nan, {"not_finite"}),
        (baselines, "adapt", lambda _: 1 / 0, {"internal"}),
        (views, "boxes", lambda _: 1 / 0, {"internal"}),
    ],
)
def test_a_tuning_that_goes_wrong_is_zero_shot_and_the_neighbour_does_not_notice(
    real: Live,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    spoil: Callable[[Any], Any],
    reasons: set[str],
) -> None:
    monkeypatch.setattr(module, name, faulty(getattr(module, name), spoil))
    found = beside_a_neighbour(real, method="tpt", views=4)
    assert found <= {("fallback", reason) for reason in reasons}
    monkeypatch.undo()
    real.assert_well()


def test_features_that_are_no_numbers_hurt_their_own_image_alone(real: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = real.service.engine.classifier.backbone  # type: ignore[union-attr]
    real_encode = backbone.encode_images

    def encode(pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        features = real_encode(pixels, **options)
        if options.get("views"):
            features[0] = torch.nan
        return features

    before = statuses(real.ask(*EIGHT, classes=NAMES, adaptation={"method": "tpt", "views": 4}))
    monkeypatch.setattr(backbone, "encode_images", encode)
    results = real.ask(*EIGHT, classes=NAMES, adaptation={"method": "tpt", "views": 4}).json()["results"]
    told = [(r["adaptation"]["status"], r["adaptation"]["reason"]) for r in results]
    assert {*told[1:]} <= before
    assert all(np.isfinite(p["score"]) for r in results for p in r["predictions"])
    real.assert_well()


def test_a_broken_device_inside_a_tuning_is_everyones(real: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(baselines, "infomax", faulty(baselines.infomax, broken))
    assert code(real.ask(*EIGHT, classes=NAMES)) == "accelerator_failed"
    assert real.client.get("/readyz").status_code == 503
