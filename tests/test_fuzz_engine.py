"""The engine's queue under random interleavings, against a simple model: every job ends once, and nothing is kept.

Jobs come, leave, run late and fail in any order, in batches that run when the test says so, on a clock that only the
test moves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

from gram_core.errors import DeviceError, OutOfMemory
from gram_core.types import Answer, Plan, Work
from server.engine import FATAL, Engine, Job
from server.errors import ApiError
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.metrics import Metrics
from server.settings import Settings
from tests.fuzz_fixtures import fuzzed
from tests.server_fixtures import until

PLAN = Plan(method="none", host=None, scope="image", steps=0, views=1, seed=0, skip="none_requested")
HANGS_S = 5.0  # what takes milliseconds
MOST, QUEUE_S, FAR = 10.0, 4.0, 1e9
STEPS = (0.5, 0.75, 0.9)  # of the brown-out
FAILURES: dict[str, type[Exception]] = {
    "bug": ZeroDivisionError,
    "memory": OutOfMemory,
    "device": DeviceError,
    "crash": RuntimeError,
}
SUBMIT = st.tuples(
    st.just("submit"),
    st.sampled_from([0.5, 0.5, 1.0, 1.0, 3.0, MOST]),  # cost
    st.sampled_from(["good"] * 8 + ["bug", "memory", "memory", "crash", "crash", "crash", "device"]),
    st.sampled_from([FAR, FAR, FAR, 5.0, 0.0]),  # patience
)
DO = st.one_of(
    SUBMIT,
    SUBMIT,
    SUBMIT,
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("release")),
    st.tuples(st.just("pass_time"), st.sampled_from([0.01, 0.01, 0.1, 5.0])),
)


class Stepped(FakeClassifier):
    """Runs a batch when it is told to; what becomes of a job is the name of its first class."""

    def __init__(self, clock: Callable[[], float], expects_stop: Callable[[int], bool]) -> None:
        super().__init__()
        self.clock = clock
        self.turn = threading.Semaphore(0)
        self.entered = self.left = 0  # batches
        self.began: dict[int, float] = {}  # jobs, and when
        self.wrong: list[str] = []
        self.expects_stop = expects_stop

    def run(self, works: Sequence[Work]) -> list[Answer | Exception]:
        """Wait for the turn, ask each job whether to stop, and fail as asked: alone, or with the whole batch."""
        for work in works:
            self.began.setdefault(number_of(work.images), self.clock())
        self.entered += 1
        assert self.turn.acquire(timeout=HANGS_S)
        self.left += 1
        for work in works:
            if (work.stop(0.0) is not None) != self.expects_stop(number_of(work.images)):
                self.wrong.append(f"job {number_of(work.images)} is told {work.stop(0.0)}")
        if any(work.classes.names[0] == "crash" for work in works):
            raise RuntimeError("it takes the whole batch along")
        return super().run(works)

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        if (failure := FAILURES.get(classes.names[0])) is not None:
            raise failure("as asked")
        return super().classify(images, classes, plan, **options)


def number_of(images: Sequence[FakePrepared]) -> int:
    return int.from_bytes(images[0].sha256[:2], "big")


class Model:
    """One engine, and what is expected of it after each thing that is done to it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.classifier = Stepped(
            lambda: self.now, lambda number: number in self.gone or self.now >= self.deadlines[number]
        )
        settings = Settings(
            max_request_cost=MOST, max_batch_cost=4.0, batch_wait_ms=0, queue_seconds=QUEUE_S, stall_s=FAR
        )
        self.metrics = Metrics()
        self.engine = Engine(lambda: self.classifier, settings, self.metrics, clock=lambda: self.now)
        self.tasks: list[asyncio.Task[Answer]] = []
        self.kinds: list[str] = []
        self.deadlines: list[float] = []
        self.accepted: set[int] = set()
        self.gone: set[int] = set()
        self.ended: list[int] = []  # numbers of jobs, once for each time that their future ends
        self.ended_at: dict[int, float] = {}

    async def hand_over(self, number: int, cost: float) -> Answer:
        """All that this suite knows of how a job is given to an engine."""
        image = FakePrepared(number.to_bytes(2, "big") * 16, 8, 8, "png", ())
        with self.engine.place(cost) as place:
            self.accepted.add(number)
            job = Job(place, [image], FakeClassSet((self.kinds[number], "other"), "cs"), PLAN, self.deadlines[number])
            job.future.add_done_callback(lambda _: self.ended.append(number))
            return await self.engine.submit(job)

    # ---- what is done ----

    async def submit(self, cost: float, kind: str, patience: float) -> None:
        waiting, rate, dead = self.engine.queue_cost, self.engine.rate, self.engine.failure is not None
        number = len(self.tasks)
        self.kinds.append(kind)
        self.deadlines.append(self.now + patience)
        task = asyncio.create_task(self.hand_over(number, cost))
        task.add_done_callback(lambda _: self.ended_at.setdefault(number, self.now))
        self.tasks.append(task)
        await ticks()
        if waiting > 0 and waiting + cost > (QUEUE_S * rate if rate else MOST):
            assert refusal(task) == "overloaded"
        elif dead:
            assert refusal(task) == "accelerator_failed"
            self.accepted.discard(number)  # it had a place, but never was a job of the engine's
        else:
            assert number in self.accepted

    async def cancel(self, index: int) -> None:
        if self.tasks and not (task := self.tasks[index % len(self.tasks)]).done():
            self.gone.add(index % len(self.tasks))
            task.cancel()

    async def release(self) -> None:
        if self.classifier.entered > self.classifier.left:
            before = self.classifier.left
            self.classifier.turn.release()
            await comes_true(lambda: self.classifier.left > before)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds

    # ---- what is expected ----

    async def settled(self) -> None:
        """The engine waits: for a job, or inside a batch for its turn; or it has ended."""
        await ticks()
        c, engine = self.classifier, self.engine
        await comes_true(lambda: c.entered > c.left or engine.idle or engine.failure is not None)
        await ticks()
        rate = engine.rate
        fill = engine.queue_cost / (QUEUE_S * rate if rate else MOST)
        assert sum(fill >= step for step in STEPS) <= engine.level <= sum(fill >= step - 0.1 for step in STEPS)

    async def finish(self) -> None:
        """Let everything run, then compare."""
        await self.run_out()
        began, broken = self.classifier.began, self.engine.failure is not None
        started = [self.kinds[number] for number in began]
        if "device" not in started and started.count("memory") < FATAL:
            assert not broken
        assert all(at < self.deadlines[number] for number, at in began.items())
        for number in self.accepted:
            self.check(number, self.tasks[number], broken)
        assert sorted(self.ended) == sorted(self.accepted), "a job ends once"
        assert self.classifier.wrong == []
        assert self.engine.idle
        assert self.engine.queue_cost == 0
        if not broken:
            assert self.engine.alive
            await self.submit(MOST, "good", FAR)
            await self.run_out()
            assert isinstance(await self.tasks[-1], Answer)

    async def run_out(self) -> None:
        end = time.monotonic() + HANGS_S
        while not self.engine.idle:
            assert time.monotonic() < end, "the engine hangs"
            await self.release()
            await asyncio.sleep(0.0002)
        await comes_true(lambda: len(self.ended_at) == len(self.tasks))  # a task is done before it has told so

    def check(self, number: int, task: asyncio.Task[Answer], broken: bool) -> None:
        assert task.cancelled() == (number in self.gone)
        if task.cancelled():
            return
        error, began, kind = task.exception(), number in self.classifier.began, self.kinds[number]
        if isinstance(error, TimeoutError):
            assert not began
            assert self.ended_at[number] >= self.deadlines[number]
        elif isinstance(error, ApiError):
            assert error.code == "accelerator_failed"
            assert broken
            assert not began
        elif error is None:
            assert kind == "good"
            image = FakePrepared(number.to_bytes(2, "big") * 16, 8, 8, "png", ())
            alone = FakeClassifier().classify([image], FakeClassSet((kind, "other"), "cs"), PLAN)
            assert task.result().results[0].adaptation.digest == alone.results[0].adaptation.digest
        else:
            assert began
            assert type(error) is FAILURES.get(kind) or (broken and isinstance(error, DeviceError))


def refusal(task: asyncio.Task[Answer]) -> str:
    error = task.exception()
    assert isinstance(error, ApiError)
    return error.code


async def ticks() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def comes_true(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS_S
    while not fact():
        assert time.monotonic() < end, "the engine hangs"
        await asyncio.sleep(0.0005)


@fuzzed(script=st.lists(DO, min_size=10, max_size=40))
def test_every_job_ends_once_and_as_it_should_whatever_comes_in_between(script: list[tuple[Any, ...]]) -> None:
    model, records = Model(), Records()
    logging.getLogger("server.engine").addHandler(records)

    async def follow() -> None:
        for name, *arguments in script:
            await getattr(model, name)(*arguments)
            await model.settled()
        await model.finish()

    model.engine.start()
    try:
        until(lambda: model.engine.ready, "the engine is ready")
        asyncio.run(follow())
    finally:
        logging.getLogger("server.engine").removeHandler(records)
        model.classifier.turn.release(1000)
        with suppress(RuntimeError):
            model.engine.stop()
    assert set(records.seen) <= ({"engine ended"} if model.engine.failure is not None else set())


class Records(logging.Handler):
    """What is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
