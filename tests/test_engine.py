"""The engine alone: who waits, who runs, who is refused, and what everyone sees when it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from gram_core.errors import DeviceError, GramError, ModelUnavailable, OutOfMemory
from gram_core.types import Answer, Plan, Work
from server.engine import Classifier, Engine, Job
from server.errors import ApiError, from_core
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.metrics import Metrics
from server.settings import Settings
from tests.server_fixtures import FailingClassifier, HeldClassifier, until

PLAN = Plan(method="none", host=None, scope="image", steps=0, views=1, seed=0, skip="none_requested")
FAR = 1e12


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def classes(*names: str) -> FakeClassSet:
    return FakeClassSet(names or ("cat", "dog"), "cs_" + "0" * 32)


def image(seed: int = 0) -> FakePrepared:
    return FakePrepared(bytes([seed]) * 32, 8, 8, "png", ())


@contextmanager
def engine(
    classifier: Classifier | Callable[[], Classifier] | None = None,
    clock: Clock | None = None,
    **settings: Any,
) -> Iterator[Engine]:
    chosen = classifier or FakeClassifier()
    load = chosen if callable(chosen) else lambda: chosen
    made = Engine(load, Settings(**settings), Metrics(), clock=clock or Clock())
    made.start()
    until(lambda: made.ready or made.failure, "the engine is up")
    yield made
    made.stop()


async def run(engine: Engine, seed: int = 0, cost: float = 1.0, deadline: float = FAR, *names: str) -> Answer:
    with engine.place(cost) as place:
        return await engine.submit(Job(place, [image(seed)], classes(*names), PLAN, deadline))


def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(gather())


def test_jobs_run_one_at_a_time_in_the_order_they_came() -> None:
    class Watched(FakeClassifier):
        inside = 0
        order: list[int] = []  # noqa: RUF012

        def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
            assert self.inside == 0
            self.inside += 1
            self.order.append(images[0].sha256[0])
            self.inside -= 1
            return super().classify(images, classes, plan, **options)

    with engine(classifier := Watched()) as it:
        together(*(run(it, seed) for seed in range(30)))
    assert classifier.order == list(range(30))


def test_every_caller_gets_the_answer_to_its_own_image() -> None:
    with engine() as it:
        answers = together(*(run(it, seed) for seed in range(20)))
        alone = [asyncio.run(run(it, seed)) for seed in range(20)]
    assert [a.results[0].adaptation.digest for a in answers] == [a.results[0].adaptation.digest for a in alone]
    assert len({a.results[0].adaptation.digest for a in alone}) > 15


def test_a_job_that_asks_for_reasons_gets_them_and_the_next_one_does_not() -> None:
    async def one(engine: Engine, explain: bool) -> Answer:
        with engine.place(1.0) as place:
            return await engine.submit(Job(place, [image(1)], classes(), PLAN, FAR, explain=explain))

    with engine() as it:
        answers = together(*(one(it, n % 2 == 0) for n in range(6)))
    assert [answer.results[0].explanation is not None for answer in answers] == [True, False] * 3


def test_one_failing_job_fails_alone() -> None:
    with engine(FailingClassifier(ZeroDivisionError("bug"))) as it:
        before, bad, after = together(run(it), run(it, 0, 1.0, FAR, "bad", "dog"), run(it))
        assert isinstance(bad, ZeroDivisionError)
        assert before.results[0].adaptation.digest == after.results[0].adaptation.digest
        assert it.alive
        assert it.idle


def test_running_out_of_memory_is_survived_and_counted() -> None:
    with engine(FailingClassifier(OutOfMemory("full"))) as it:
        bad, after = together(run(it, 0, 1.0, FAR, "bad"), run(it))
        assert isinstance(bad, OutOfMemory)
        assert isinstance(after, Answer)
        assert it.ready
        assert b'gram_out_of_memory_total{recovered="false"} 1.0' in it._metrics.render()


def test_a_job_whose_deadline_has_passed_is_never_run() -> None:
    clock = Clock()
    with engine(classifier := HeldClassifier(), clock) as it:

        async def late() -> Any:
            first = asyncio.create_task(run(it))
            await asyncio.to_thread(until, lambda: classifier.runs, "the first job runs")
            second = asyncio.create_task(run(it, deadline=clock.now + 5))
            await asyncio.sleep(0)
            clock.now += 5
            classifier.gate.set()
            return await asyncio.gather(first, second, return_exceptions=True)

        first, second = asyncio.run(late())
        assert isinstance(first, Answer)
        assert isinstance(second, TimeoutError)
        assert len(classifier.runs) == 1


def test_a_cancelled_job_leaves_the_queue_at_once_and_gives_its_cost_back() -> None:
    with engine(classifier := HeldClassifier()) as it:

        async def leave() -> None:
            first = asyncio.create_task(run(it))
            await asyncio.to_thread(until, lambda: classifier.runs, "the first job runs")
            second = asyncio.create_task(run(it, cost=7.0))
            await asyncio.sleep(0)
            assert it.queue_cost == 7.0
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            assert it.queue_cost == 0.0
            assert not it._queue
            classifier.gate.set()
            await first

        asyncio.run(leave())
        assert len(classifier.runs) == 1


def test_the_queue_is_bounded_by_seconds_of_measured_work() -> None:
    clock = Clock()

    class Timed(HeldClassifier):
        def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
            answer = super().classify(images, classes, plan, **options)
            clock.now += 2.0
            return answer

    classifier = Timed()
    classifier.gate.set()
    with engine(classifier, clock, queue_seconds=4.0, max_request_cost=1000.0) as it:
        asyncio.run(run(it, cost=20.0))  # 20 in 2 s: 10 per second, so 40 may wait
        assert it.rate == pytest.approx(10.0)
        with it.place(30.0), it.place(10.0):
            with pytest.raises(ApiError) as full, it.place(0.1):
                pass
            assert full.value.code == "overloaded"
            assert full.value.retry_after == 4  # 40 at 10 per second
        with it.place(40.0):
            pass  # given back, so there is room again


def test_a_request_within_the_cost_limit_always_enters_an_empty_queue() -> None:
    clock = Clock()

    class Slow(FakeClassifier):
        def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
            clock.now += 100.0
            return super().classify(images, classes, plan, **options)

    with engine(Slow(), clock, max_request_cost=1000.0) as it:
        asyncio.run(run(it, cost=1.0))  # 0.04 cost fit into 4 s now
        assert isinstance(asyncio.run(run(it, cost=1000.0)), Answer)


def test_a_request_above_the_cost_limit_is_refused_with_both_numbers() -> None:
    with (
        engine(max_request_cost=100.0) as it,
        pytest.raises(ApiError, match=r"costs 101, the limit is 100") as refused,
    ):
        asyncio.run(run(it, cost=101.0))
    assert refused.value.status == 413


def test_a_place_is_given_up_when_its_request_fails_before_it_is_queued() -> None:
    with engine() as it:
        with pytest.raises(KeyError), it.place(5.0):
            raise KeyError
        assert it.idle


@pytest.mark.parametrize("error", [DeviceError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_ends_the_loop_is_seen_by_everyone(error: BaseException) -> None:
    ended: list[BaseException] = []
    with engine(FailingClassifier(error)) as it:
        it.on_end = ended.append

        async def three() -> list[Any]:
            return await asyncio.gather(run(it, 0, 1.0, FAR, "bad"), run(it), run(it), return_exceptions=True)

        bad, *waiting = asyncio.run(three())
        until(lambda: ended, "on_end is called")
        assert ended == [error]
        assert isinstance(bad, DeviceError | ApiError)
        for other in waiting:
            refusal = from_core(other) if isinstance(other, GramError) else other
            assert isinstance(refusal, ApiError)
            assert refusal.code == "accelerator_failed"
        assert not it.alive
        assert not it.ready
        with pytest.raises(ApiError):
            asyncio.run(run(it))


def test_a_model_that_cannot_be_loaded_ends_the_engine_with_its_reason() -> None:
    def load() -> Classifier:
        raise ModelUnavailable("there is no such model.")

    with engine(load) as it:
        assert isinstance(it.failure, ModelUnavailable)
        assert it.phase == "load"
        assert not it.alive


def test_loading_may_take_long_but_a_job_may_not() -> None:
    clock, loaded = Clock(), threading.Event()

    def load() -> Classifier:
        assert loaded.wait(10)
        return classifier

    classifier = HeldClassifier()
    it = Engine(load, Settings(stall_s=60.0), Metrics(), clock=clock)
    it.start()
    clock.now += 3600
    assert it.alive
    assert not it.ready
    loaded.set()
    until(lambda: it.ready, "the engine is ready")

    async def stall() -> None:
        task = asyncio.create_task(run(it))
        await asyncio.to_thread(until, lambda: classifier.runs, "the job runs")
        clock.now += 59
        assert it.alive
        clock.now += 2
        assert not it.alive
        classifier.gate.set()
        await task

    asyncio.run(stall())
    assert it.alive
    it.stop()


def test_an_idle_engine_shows_that_it_lives() -> None:
    clock = Clock()
    with engine(clock=clock) as it:
        clock.now += 3600
        with it._turn:
            it._turn.notify()  # rather than waiting for the tick
        until(lambda: it.alive, "the heartbeat is fresh")


def test_stopping_finishes_what_was_submitted_and_refuses_what_comes_later() -> None:
    with engine(classifier := HeldClassifier()) as it:

        async def stop() -> tuple[list[Any], BaseException]:
            jobs = [asyncio.create_task(run(it, seed)) for seed in range(4)]
            await asyncio.to_thread(until, lambda: classifier.runs, "the first job runs")
            stopping = asyncio.create_task(asyncio.to_thread(it.stop))
            await asyncio.to_thread(until, lambda: it._stopping, "the engine is stopping")
            (late,) = await asyncio.gather(run(it), return_exceptions=True)
            classifier.gate.set()
            await stopping
            assert isinstance(late, BaseException)
            return await asyncio.gather(*jobs), late

        answers, late = asyncio.run(stop())
        assert len(answers) == 4
        assert isinstance(late, ApiError)
        assert late.code == "draining"


def test_every_job_of_a_random_storm_ends_exactly_once() -> None:
    rng = random.Random(0)

    async def one(it: Engine, number: int) -> str:
        bad, leaves = rng.random() < 0.2, rng.random() < 0.3
        late = rng.random() < 0.1
        names = ("bad", "dog") if bad else ("cat", "dog")
        task = asyncio.create_task(run(it, number % 250, 1.0, 0.0 if late else FAR, *names))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if leaves:
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert leaves
            return "left"
        except TimeoutError:
            assert late
            return "late"
        except ZeroDivisionError:
            assert bad
            return "bad"
        return "answered"

    async def storm(it: Engine) -> list[str]:
        return await asyncio.gather(*(one(it, number) for number in range(600)))

    with engine(FailingClassifier(ZeroDivisionError())) as it:
        ends = asyncio.run(storm(it))
        until(lambda: it.idle, "nothing is left")
        assert {"left", "late", "bad", "answered"} == set(ends)
        assert it.alive
        assert isinstance(asyncio.run(run(it)), Answer)


# ---- batches ----


class Batched(HeldClassifier):
    """Tells which images each run held, and asks every work whether to stop, as a tuning does between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.stops: list[str | None] = []
        self.takes: dict[int, float] = {}

    def seconds(self, plan: Plan, images: int, classes: FakeClassSet) -> float:
        return self.takes.get(plan.seed, 0.0) + super().seconds(plan, images, classes)

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        self.batches.append([work.images[0].sha256[0] for work in works])
        made = super().run(works)
        self.stops += [work.stop(0.0) for work in works]
        return made


async def held(it: Engine, classifier: Batched, *later: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run job 0, submit the others while it runs, then let go."""
    first = asyncio.create_task(run(it, 0))
    await asyncio.to_thread(until, lambda: classifier.batches, "the first job runs")
    tasks = [asyncio.create_task(work) for work in later]
    await asyncio.sleep(0)
    classifier.gate.set()
    return await asyncio.gather(first, *tasks, return_exceptions=True)


def test_jobs_that_wait_together_run_together_in_the_order_they_came() -> None:
    with engine(classifier := Batched()) as it:
        asyncio.run(held(it, classifier, *(run(it, seed) for seed in range(1, 6))))
    assert classifier.batches == [[0], [1, 2, 3, 4, 5]]
    assert classifier.stops == [None] * 6


def test_a_batch_is_bounded_by_its_cost_and_the_oldest_job_always_goes() -> None:
    with engine(classifier := Batched(), max_batch_cost=4.0, max_request_cost=100.0) as it:
        later = [run(it, 1, 3.0), run(it, 2, 9.0), run(it, 3, 1.0), run(it, 4, 1.0)]
        asyncio.run(held(it, classifier, *later))
    assert classifier.batches == [[0], [1, 3], [2], [4]]  # 2 is too large for company, and is not passed over twice


def test_a_batch_holds_no_more_than_a_quarter_of_a_second_of_measured_work() -> None:
    clock = Clock()

    class Timed(Batched):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            clock.now += 1.0
            return super().run(works)

    with engine(classifier := Timed(), clock, max_request_cost=100.0) as it:
        classifier.gate.set()
        asyncio.run(run(it, 9, 40.0))  # 40 a second
        classifier.gate.clear()
        classifier.batches.clear()
        asyncio.run(held(it, classifier, run(it, 1, 6.0), run(it, 2, 6.0), run(it, 3, 4.0)))
    assert classifier.batches == [[0], [1], [2], [3]]  # one second for a cost of one has brought the rate down
    assert it.rate is not None
    assert it.rate * 0.25 < 6


def test_max_batch_cost_of_one_means_one_request_at_a_time() -> None:
    with engine(classifier := Batched(), max_batch_cost=1.0) as it:
        asyncio.run(held(it, classifier, *(run(it, seed) for seed in range(1, 4))))
    assert classifier.batches == [[0], [1], [2], [3]]


def test_nobody_is_taken_along_whose_work_would_use_up_anothers_time() -> None:
    async def one(it: Engine, seed: int, budget_s: float | None) -> Answer:
        plan = dataclasses.replace(PLAN, seed=seed)
        with it.place(1.0) as place:
            return await it.submit(Job(place, [image(seed)], classes(), plan, FAR, budget_s=budget_s))

    with engine(classifier := Batched()) as it:
        classifier.takes = {1: 0.3, 2: 0.3, 3: 0.05, 4: 0.3}
        work = [one(it, 1, 0.5), one(it, 2, None), one(it, 3, None), one(it, 4, None)]
        asyncio.run(held(it, classifier, *work))
    assert classifier.batches == [[0], [1, 3], [2, 4]]


def test_a_moment_is_waited_for_requests_that_are_still_being_decoded() -> None:
    async def decoded_later(it: Engine) -> Answer:
        with it.place(1.0) as place:
            await asyncio.sleep(0.02)
            return await it.submit(Job(place, [image(2)], classes(), PLAN, FAR))

    async def both(it: Engine) -> None:
        await asyncio.gather(decoded_later(it), run(it, 1))

    for patience, expected in ((5000.0, [[1, 2]]), (0.0, [[1], [2]])):
        with engine(classifier := Batched(), batch_wait_ms=patience) as it:
            classifier.gate.set()
            asyncio.run(both(it))
        assert classifier.batches == expected


def test_one_that_is_waited_for_and_gives_up_is_waited_for_no_longer() -> None:
    async def gives_up(it: Engine) -> None:
        with it.place(1.0):
            await asyncio.sleep(0.02)

    async def both(it: Engine) -> None:
        await asyncio.gather(gives_up(it), run(it, 1))

    with engine(classifier := Batched(), batch_wait_ms=60_000.0) as it:
        classifier.gate.set()
        asyncio.run(asyncio.wait_for(both(it), 10))
    assert classifier.batches == [[1]]


@pytest.mark.parametrize("error", [ValueError("a bug"), OutOfMemory("full")])
def test_a_batch_that_fails_as_a_whole_is_tried_one_by_one(error: Exception) -> None:
    class Fragile(Batched):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            made = super().run(works)
            if any("bad" in work.classes.names for work in works):
                raise error
            return made

    with engine(classifier := Fragile()) as it:
        found = asyncio.run(held(it, classifier, run(it, 1), run(it, 2, 1.0, FAR, "bad", "dog"), run(it, 3)))
        assert [isinstance(outcome, Answer) for outcome in found] == [True, True, False, True]
        assert found[2] is error
        assert it.ready
        assert it.idle
    assert classifier.batches == [[0], [1, 2, 3], [1], [2], [3]]


def test_an_estimate_that_fails_costs_nobody_an_answer() -> None:
    class Wild(Batched):
        def seconds(self, *_: Any) -> float:
            raise ZeroDivisionError

        def fit(self, plan: Plan, *_: Any) -> Plan:
            return plan

    with engine(classifier := Wild()) as it:
        found = asyncio.run(held(it, classifier, run(it, 1), run(it, 2)))
        assert all(isinstance(outcome, Answer) for outcome in found)
        assert it.ready


def test_a_plan_that_can_not_be_fitted_fails_its_own_job_alone() -> None:
    class Wild(Batched):
        def fit(self, plan: Plan, images: int, classes: FakeClassSet, budget_s: float, why: str) -> Plan:
            if "bad" in classes.names:
                raise ZeroDivisionError
            return super().fit(plan, images, classes, budget_s, why)

    with engine(classifier := Wild()) as it:
        found = asyncio.run(held(it, classifier, run(it, 1), run(it, 2, 1.0, FAR, "bad", "dog")))
        assert [type(outcome) for outcome in found] == [Answer, Answer, ZeroDivisionError]
        assert it.ready


def test_a_job_whose_caller_has_gone_ends_at_its_next_step() -> None:
    with engine(classifier := Batched()) as it:

        async def leave() -> None:
            task = asyncio.create_task(run(it, 1))
            await asyncio.to_thread(until, lambda: classifier.batches, "it runs")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            classifier.gate.set()

        asyncio.run(leave())
        until(lambda: it.idle, "it ended")
    assert classifier.stops == ["deadline"]


def test_time_and_budget_end_a_tuning_and_a_replay_has_no_budget() -> None:
    clock = Clock()

    class Late(Batched):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            self.stops = [work.stop(seconds) for work in works for seconds in (0.0, 0.4)]
            clock.now += 10.0
            self.stops += [work.stop(0.0) for work in works]
            return FakeClassifier.run(self, works)

    async def one(it: Engine, exact: bool, deadline: float) -> None:
        with it.place(1.0) as place:
            await it.submit(Job(place, [image()], classes(), PLAN, deadline, budget_s=0.3, exact=exact))

    with engine(classifier := Late(), clock) as it:
        classifier.gate.set()
        asyncio.run(one(it, False, FAR))
        assert classifier.stops == [None, "budget", None]
        asyncio.run(one(it, True, clock.now + 5.0))
        assert classifier.stops == [None, None, "deadline"]


def test_memory_that_runs_out_for_zero_shot_three_times_a_minute_is_a_broken_device() -> None:
    clock = Clock()
    with engine(FailingClassifier(OutOfMemory("full")), clock) as it:
        for pause in (50.0, 50.0, 20.0, 20.0):
            assert isinstance(together(run(it, 0, 1.0, FAR, "bad"))[0], OutOfMemory)
            clock.now += pause
        assert it.ready
        together(run(it, 0, 1.0, FAR, "bad"))
        until(lambda: it.failure, "the engine gives up")
        assert isinstance(it.failure, DeviceError)


def test_the_level_follows_the_queue_and_lets_go_late() -> None:
    with engine(max_request_cost=100.0) as it:  # nothing was measured yet: 100 may wait
        seen = []
        with it.place(40.0):
            seen.append(it.level)
            with it.place(10.0):
                seen.append(it.level)
                with it.place(25.0):
                    seen.append(it.level)
                    with it.place(16.0):
                        seen.append(it.level)
                    seen.append(it.level)  # 75: below 90 - 10
                seen.append(it.level)
            seen.append(it.level)  # 40: not below 50 - 10
        seen.append(it.level)
        assert seen == [0, 1, 2, 3, 2, 1, 1, 0]
    with engine(max_request_cost=100.0, brownout=()) as it, it.place(99.0):
        assert it.level == 0


def test_whoever_is_not_tuned_does_not_wait_for_those_who_are() -> None:
    tuned_now = threading.Event()

    class Mixed(Batched):
        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            made = super().run(works)
            for work, answer in zip(works, made, strict=True):
                if work.plan.skip is not None and work.early is not None and isinstance(answer, Answer):
                    work.early(answer)
            assert len(works) == 1 or tuned_now.wait(10)
            return made

    async def tuned(it: Engine) -> Answer:
        with it.place(1.0) as place:
            return await it.submit(Job(place, [image(1)], classes(), dataclasses.replace(PLAN, skip=None), FAR))

    async def both(it: Engine) -> None:
        first = asyncio.create_task(run(it, 0))
        await asyncio.to_thread(until, lambda: classifier.batches, "the first job runs")
        slow, plain = asyncio.create_task(tuned(it)), asyncio.create_task(run(it, 2))
        await asyncio.sleep(0)
        classifier.gate.set()
        await first
        assert isinstance(await asyncio.wait_for(plain, 10), Answer)
        assert not slow.done()
        tuned_now.set()
        assert isinstance(await slow, Answer)

    with engine(classifier := Mixed()) as it:
        asyncio.run(both(it))
        assert classifier.batches == [[0], [1, 2]]
        until(lambda: it.idle, "nothing is left")


def test_tunings_that_share_their_passes_may_be_more_in_a_batch() -> None:
    """A second of measured work rather than a quarter."""
    shared = dataclasses.replace(PLAN, method="tpt", host="coop", steps=1, views=8, skip=None)

    async def one(it: Engine, seed: int, plan: Plan, *names: str) -> Answer:
        with it.place(1.0) as place:
            return await it.submit(Job(place, [image(seed)], classes(*names), plan, FAR))

    with engine(classifier := Batched(), Clock()) as it:
        it._spent = (4e6, 1e6)  # four a second, whatever one more batch takes
        work = [one(it, 1, shared), one(it, 2, dataclasses.replace(shared, steps=2)), one(it, 3, shared)]
        work += [one(it, 4, PLAN), one(it, 5, shared), one(it, 6, shared), one(it, 7, shared)]
        asyncio.run(held(it, classifier, *work))
    assert classifier.batches == [[0], [1, 3, 5, 6], [2], [4], [7]]


def test_whoever_was_answered_early_is_not_run_again_when_the_rest_of_the_batch_fails() -> None:
    class Breaks(Batched):
        sizes: list[int] = []  # noqa: RUF012

        def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
            self.sizes.append(len(works))
            made = super().run(works)
            for work, answer in zip(works, made, strict=True):
                if work.plan.skip is not None and work.early is not None and isinstance(answer, Answer):
                    work.early(answer)
            if len(works) > 1:
                raise OutOfMemory("full")
            return made

    async def tuned(it: Engine) -> Answer:
        with it.place(1.0) as place:
            return await it.submit(Job(place, [image(1)], classes(), dataclasses.replace(PLAN, skip=None), FAR))

    with engine(classifier := Breaks()) as it:
        found = asyncio.run(held(it, classifier, tuned(it), run(it, 2)))
        assert all(isinstance(outcome, Answer) for outcome in found)
        assert it.ready
        until(lambda: it.idle, "nothing is left")
    assert classifier.batches == [[0], [1, 2], [1]]
    assert classifier.sizes == [1, 2, 1]
