"""The engine alone: who waits, who runs, who is refused, and what everyone sees when it ends."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from gram_core.errors import DeviceError, GramError, ModelUnavailable, OutOfMemory
from gram_core.types import Answer, Plan
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
