"""Too much to do, or too little time: what is shed, what is refused, and that everyone hears of it in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from gram_core.types import Answer, Plan, Work
from server.fake import FakeClassifier, FakeClassSet
from tests.server_fixtures import HeldClassifier, answered, body, code, live, png, until

EIGHT = [png(n) for n in range(8)]
COST = 72.0  # of eight images with eight views each, in the fake's terms


class Paced(HeldClassifier):
    """One step a millisecond, if the gate is open."""

    step_s = 0.001

    def seconds(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        return super().seconds(plan, images, classes) + (0.0 if plan.skip else plan.steps * self.step_s)

    def fit(self, plan: Plan, images: int, classes: FakeClassSet, budget_s: float, why: str) -> Plan:
        fits = plan.skip is not None or images * 0.0 + self.seconds(plan, images, classes) <= budget_s
        steps = int(budget_s / self.step_s)
        return plan if fits else (plan.less(why, views=plan.views, steps=steps) if steps else replace(plan, skip=why))


class Early(HeldClassifier):
    """Says what zero-shot says, then waits."""

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        for work in works:
            if work.early is not None and work.plan.skip is None:
                plain = replace(work.plan, skip="deadline")
                work.early(FakeClassifier.classify(self, work.images, work.classes, plain))
        return super().run(works)


def first(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = answered(response).json()["results"][0]["adaptation"]
    return found


# ---- brown-out ----


def test_a_filling_queue_sheds_views_then_steps_then_adaptation_and_then_requests() -> None:
    classifier = HeldClassifier()
    with live(classifier, max_request_cost=10 * COST, timeout_ms=60_000) as server, ThreadPoolExecutor(40) as pool:
        running = pool.submit(server.ask, *EIGHT)
        until(lambda: classifier.runs, "one runs")
        waiting = []
        while True:  # nothing was measured yet, so ten times its cost may wait
            before = server.metric("gram_queue_requests")
            waiting.append(pool.submit(server.ask, *EIGHT))
            until(lambda n=before: server.metric("gram_queue_requests") > n or waiting[-1].done(), "it waits")  # type: ignore[misc]
            if waiting[-1].done() or len(waiting) > 35:
                break
        assert code(waiting[-1].result()) == "overloaded"
        assert server.metric("gram_brownout_level") == 3
        classifier.gate.set()
        answers = [running.result(), *(future.result() for future in waiting[:-1])]
        levels = [answer.json()["usage"]["brownout"] for answer in answers]
        assert levels == sorted(levels)
        assert set(levels) == {0, 1, 2, 3}
        for answer, level in zip(answers, levels, strict=True):
            did = first(answer)
            assert (did["status"], did["reason"]) == [
                ("completed", None),
                ("partial", "brownout"),
                ("partial", "brownout"),
                ("skipped", "brownout"),
            ][level]
            assert (did["steps_requested"], did["views_requested"]) == (20, 8)
            assert (did["steps"], did["views"]) == [(20, 8), (20, 4), (1, 2), (0, 1)][level]
            if level == 3:
                assert all(r["predictions"] == r["baseline"]["predictions"] for r in answer.json()["results"])
        until(lambda: server.metric("gram_brownout_level") == 0, "the level is back")
        server.assert_well()


def test_one_who_would_rather_be_refused_than_shed_is_refused() -> None:
    classifier = HeldClassifier()
    with live(classifier, max_request_cost=2 * COST) as server, ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.ask, *EIGHT)
        until(lambda: classifier.runs, "one runs")
        waiting = pool.submit(server.ask, *EIGHT)
        until(lambda: server.metric("gram_queue_requests") == 1, "one waits")
        refused = server.ask(*EIGHT, adaptation={"on_overload": "reject"})
        assert code(refused) == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        nothing_to_shed = pool.submit(server.ask, adaptation={"method": "none", "on_overload": "reject"})
        until(lambda: server.metric("gram_queue_requests") == 2, "it waits")
        classifier.gate.set()
        assert [f.result().status_code for f in (running, waiting, nothing_to_shed)] == [200, 200, 200]


def test_where_nothing_fits_a_body_is_refused_before_it_is_parsed() -> None:
    classifier = HeldClassifier()
    with live(classifier, max_request_cost=8) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.ask, *EIGHT, adaptation={"method": "none"})
        until(lambda: classifier.runs, "one runs")
        waiting = pool.submit(server.ask, *EIGHT, adaptation={"method": "none"})
        until(lambda: server.metric("gram_queue_cost") == 8, "the queue is full to the brim")
        broken = {"content": b"{", "headers": {"content-type": "application/json"}}
        refused = answered(server.client.post("/v1/classify", **broken))
        assert (refused.status_code, code(refused)) == (429, "overloaded")
        assert server.metric("gram_rejected_total", reason="queue") == 1
        classifier.gate.set()
        assert [f.result().status_code for f in (running, waiting)] == [200, 200]
        assert answered(server.client.post("/v1/classify", **broken)).status_code == 400
        server.assert_well()


def test_brownout_can_be_off() -> None:
    classifier = HeldClassifier()
    with live(classifier, max_request_cost=2 * COST, brownout=()) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.ask, *EIGHT)]
        until(lambda: classifier.runs, "one runs")
        asked.append(pool.submit(server.ask, *EIGHT))
        until(lambda: server.metric("gram_queue_requests") == 1, "one waits")
        assert server.metric("gram_brownout_level") == 0
        classifier.gate.set()
        assert {first(f.result())["status"] for f in asked} == {"completed"}


def test_a_replay_is_never_shed() -> None:
    classifier = HeldClassifier()
    classifier.gate.set()
    with live(classifier, max_request_cost=2 * COST, queue_seconds=1e6) as server, ThreadPoolExecutor(3) as pool:
        token = first(server.ask(*EIGHT))["replay"]
        classifier.gate.clear()
        with server.service.engine.place(2 * COST):
            server.service.engine._spent = (2.1 * COST * 1.6, 1e6)  # three may wait, of whom two do
            assert server.metric("gram_brownout_level") == 1
            again = pool.submit(server.ask, *EIGHT, adaptation={"replay": token})
            until(lambda: server.metric("gram_queue_requests") == 1 and classifier.runs, "it is let in")
            classifier.gate.set()
            did = first(again.result())
            assert (did["status"], did["steps"], did["views"]) == ("completed", 20, 8)


# ---- time ----


def test_a_budget_chooses_steps_and_says_so() -> None:
    classifier = Paced()
    classifier.gate.set()
    with live(classifier) as server:
        for budget_ms, steps, status in ((10_000, 20, "completed"), (10, 10, "partial"), (0, 0, "skipped")):
            did = first(server.ask(*EIGHT, adaptation={"budget_ms": budget_ms}))
            assert (did["steps"], did["status"], did["steps_requested"]) == (steps, status, 20)
            assert did["reason"] == (None if status == "completed" else "budget")
        assert server.ask(*EIGHT, adaptation={"budget_ms": 10}).json()["usage"]["brownout"] == 0


def test_the_operator_may_set_a_budget_for_all() -> None:
    classifier = Paced()
    classifier.gate.set()
    with live(classifier, default_budget_ms=5) as server:
        assert first(server.ask(*EIGHT))["steps"] == 5
        assert first(server.ask(*EIGHT, adaptation={"budget_ms": 8}))["steps"] == 8
        assert server.client.get("/info").json()["default_budget_ms"] == 5


def test_a_deadline_that_is_near_makes_the_plan_smaller() -> None:
    classifier = Paced()
    classifier.step_s = 60.0
    classifier.gate.set()
    with live(classifier) as server:
        did = first(server.ask(*EIGHT, timeout_ms=5000))
        assert (did["status"], did["reason"], did["steps_requested"]) == ("skipped", "deadline", 20)


def test_when_time_runs_out_in_the_middle_of_a_step_the_answer_is_zero_shot() -> None:
    with live(classifier := Early()) as server:
        started = time.monotonic()
        response = server.ask(*EIGHT, timeout_ms=300)
        assert time.monotonic() - started < 5  # the classifier waits for ten
        for result in response.json()["results"]:
            did = result["adaptation"]
            assert (did["status"], did["reason"], did["steps"]) == ("skipped", "deadline", 0)
            assert result["predictions"] == result["baseline"]["predictions"]
        until(lambda: classifier.runs, "it ran")
        held = server.service.budget.held
        classifier.gate.set()
        server.assert_well()
        assert held >= 0
        again = server.ask(*EIGHT, adaptation={"replay": did["replay"]})
        assert [r["adaptation"]["digest"] for r in again.json()["results"]] == [
            r["adaptation"]["digest"] for r in response.json()["results"]
        ]


def test_a_replay_is_answered_exactly_or_not_at_all() -> None:
    classifier = Early()
    classifier.gate.set()
    with live(classifier) as server:
        token = first(server.ask(*EIGHT))["replay"]
        classifier.gate.clear()
        assert code(server.ask(*EIGHT, timeout_ms=300, adaptation={"replay": token})) == "deadline_exceeded"
        classifier.gate.set()
        server.assert_well()


def test_a_deadline_before_zero_shot_is_504() -> None:
    with live(classifier := HeldClassifier()) as server:
        assert code(server.ask(timeout_ms=200)) == "deadline_exceeded"
        classifier.gate.set()
        server.assert_well()


# ---- replay, as far as the wire decides it ----


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"classes": ("cat", "cow")}, "replay_mismatch"),
        ({"images": [9]}, "replay_mismatch"),
        ({"adaptation": {"seed": 3}}, "invalid_request"),
    ],
)
def test_a_token_goes_with_its_own_request_alone(fields: dict[str, Any], expected: str) -> None:
    with live() as server:
        token = first(server.ask(*EIGHT))["replay"]
        images = [png(n) for n in fields.pop("images", range(8))]
        adaptation = {**fields.pop("adaptation", {}), "replay": token}
        response = server.client.post("/classify", json=body(*images, **fields, adaptation=adaptation))
        assert code(response) == expected


def test_a_token_asks_for_no_more_than_a_request_may() -> None:
    with live() as generous, live(max_steps=5) as strict:
        token = first(generous.ask(*EIGHT))["replay"]
        assert code(strict.ask(*EIGHT, adaptation={"replay": token})) == "invalid_request"
