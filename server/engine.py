"""The one thread that owns the classifier and its device.

It loads, warms up and then runs one job at a time, first come first served. What waits is bounded by
cost, what is waiting can be withdrawn, a deadline is checked before work starts, and a job that fails
fails alone. The engine knows nothing of HTTP; `ApiError` is only how it says no.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from gram_core.errors import DeviceError, GramError, OutOfMemory
from gram_core.images import DecodedImage
from gram_core.types import Answer, ModelInfo, Plan, Tuning
from server.errors import ApiError, internal
from server.metrics import Metrics
from server.settings import Settings

TICK_S = 0.5  # how often an idle engine shows that it lives
FORGET = 0.8  # weight of the past in the measured rate, per job

log = logging.getLogger("server.engine")


class Classifier(Protocol):
    """What the server needs of `gram_core.classifier.Classifier`; `server.fake` has the same shape."""

    @property
    def info(self) -> ModelInfo: ...
    def prepare(self, image: DecodedImage) -> Any: ...
    def class_set(
        self, classes: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] | None = None
    ) -> Any: ...
    def plan(self, tuning: Tuning, images: int, classes: Any) -> Plan: ...
    def cost(self, plan: Plan, images: int, classes: Any) -> float: ...
    def classify(self, images: Sequence[Any], classes: Any, plan: Plan, *, explain: bool = False) -> Answer: ...
    def warm_up(self) -> None: ...


@dataclass(eq=False)
class Place:
    """A place in the queue: its cost counts as waiting until the job starts or the place is given up."""

    cost: float
    since: float


@dataclass(eq=False)
class Job:
    """One request's images, to be classified together before `deadline` (on the engine's clock)."""

    place: Place
    images: Sequence[Any]
    classes: Any
    plan: Plan
    deadline: float
    explain: bool = False
    future: Future[Answer] = field(default_factory=Future)
    submitted: float = 0.0
    queue_ms: float = 0.0


class Engine:
    """`with engine.place(cost) as place: answer = await engine.submit(Job(place, ...))`.

    `on_end`, when set, is called from the engine's thread with whatever ended the loop.
    """

    def __init__(
        self,
        load: Callable[[], Classifier],
        settings: Settings,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.classifier: Classifier | None = None
        self.phase = "settings"
        self.failure: BaseException | None = None
        self.on_end: Callable[[BaseException], None] | None = None
        self.clock = clock
        self._load = load
        self._settings = settings
        self._metrics = metrics
        self._started = self._beat = clock()
        self._startup_s: float | None = None
        self._turn = threading.Condition()  # guards everything below
        self._queue: deque[Job] = deque()
        self._places: set[Place] = set()
        self._running: Job | None = None
        self._stopping = False
        self._spent: tuple[float, float] = (0.0, 0.0)  # cost, seconds; older jobs fade
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        metrics.gauge("queue_cost", "Cost that waits.", lambda: self.queue_cost)
        metrics.gauge("queue_requests", "Requests that wait.", lambda: float(len(self._places)))
        metrics.gauge("queue_oldest_seconds", "Age of the oldest waiting request.", self._oldest_s)
        metrics.gauge("cost_rate", "Measured cost per second.", lambda: self.rate or 0.0)
        metrics.gauge("engine_heartbeat_age_seconds", "Since the engine last showed life.", self._silence_s)
        metrics.gauge("device_healthy", "1 until the device fails.", lambda: float(self.failure is None))

    # ---- state, readable from any thread ----

    @property
    def ready(self) -> bool:
        """Loaded, warmed up and running."""
        return self.phase == "ready" and self.failure is None and not self._stopping

    @property
    def alive(self) -> bool:
        """The thread runs and showed life lately; loading may take as long as it takes."""
        if self.failure is not None or not self._thread.is_alive():
            return False
        return self.phase != "ready" or self._silence_s() < self._settings.stall_s

    @property
    def rate(self) -> float | None:
        """Cost per second, measured over the latest jobs; None before the first."""
        cost, seconds = self._spent
        return cost / seconds if seconds > 0 else None

    @property
    def queue_cost(self) -> float:
        """Cost of everything that was let in and has not started."""
        with self._turn:
            return sum(place.cost for place in self._places)

    @property
    def startup_s(self) -> float:
        """How long start-up took, or has taken so far."""
        return self._startup_s if self._startup_s is not None else self.clock() - self._started

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        with self._turn:
            return not self._places and self._running is None

    def _oldest_s(self) -> float:
        with self._turn:
            return self.clock() - min((place.since for place in self._places), default=self.clock())

    def _silence_s(self) -> float:
        return self.clock() - self._beat

    # ---- asking, from the event loop ----

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def stop(self, patience_s: float = 30.0) -> None:
        """Finish what was submitted and end the thread; neither a load nor a job that hangs is waited for."""
        with self._turn:
            self._stopping = True
            self._turn.notify()
        if self._thread.is_alive() and self.phase == "ready":
            self._thread.join(patience_s)

    @contextmanager
    def place(self, cost: float) -> Iterator[Place]:
        """Reserve `cost` or say no; given up on exit if the job never started."""
        place = self._reserve(cost)
        try:
            yield place
        finally:
            self._leave(place)

    def reprice(self, place: Place, cost: float) -> None:
        """The plan changed after its place was reserved, because some of its images can't be used."""
        self._check(cost)
        place.cost = cost

    def _check(self, cost: float) -> None:
        most = self._settings.max_request_cost
        if cost > most:
            self._metrics.rejected.labels("too_costly").inc()
            raise ApiError(
                "request_too_costly",
                f"this request costs {cost:.0f}, the limit is {most:.0f} (GRAM_MAX_REQUEST_COST): "
                "send fewer images or classes, or ask for fewer views or steps.",
            )

    def _reserve(self, cost: float) -> Place:
        self._check(cost)
        with self._turn:
            waiting = sum(place.cost for place in self._places)
            rate = self.rate
            bound = self._settings.queue_seconds * rate if rate else self._settings.max_request_cost
            if self._places and waiting + cost > bound:
                running = self._running.place.cost if self._running else 0.0
                wait_s = math.ceil((waiting + running) / rate) if rate else 1
                self._metrics.rejected.labels("queue").inc()
                wait_s = max(1, min(30, wait_s))
                raise ApiError("overloaded", "the queue is full. Try again later.", retry_after=wait_s)
            place = Place(cost, self.clock())
            self._places.add(place)
            return place

    def _leave(self, place: Place) -> None:
        with self._turn:
            self._places.discard(place)

    async def submit(self, job: Job) -> Answer:
        """Queue a job and wait for its answer; cancelling the wait withdraws a job that has not started."""
        with self._turn:
            if self.failure is not None or self._stopping:
                raise _ended(self.failure)
            job.submitted = self.clock()
            self._queue.append(job)
            self._turn.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._turn:
                if job in self._queue:  # free its images now rather than when its turn comes
                    self._queue.remove(job)
            raise

    # ---- the thread ----

    def _live(self) -> None:
        try:
            self._enter("load")
            classifier = self._load()
            self._enter("warmup")
            classifier.warm_up()
            self.classifier = classifier
            self._startup_s = self.clock() - self._started
            self._enter("ready", **_served(classifier.info))
            while (job := self._next()) is not None:
                self._do(classifier, job)
        except BaseException as error:  # whatever it is: the loop has ended, and everyone must see it
            self._end(error)

    def _enter(self, phase: str, **facts: str) -> None:
        now = self.clock()
        self._metrics.startup_seconds.labels(self.phase).set(now - self._beat)
        log.info("startup", extra={"fields": {"phase": phase, "seconds": round(now - self._started, 3), **facts}})
        self._beat = now
        self.phase = phase

    def _next(self) -> Job | None:
        with self._turn:
            while not self._queue:
                if self._stopping:
                    return None
                self._beat = self.clock()
                self._turn.wait(TICK_S)
            job = self._queue.popleft()
            self._beat = self.clock()
            self._running = job
            self._places.discard(job.place)
            return job

    def _do(self, classifier: Classifier, job: Job) -> None:
        started = self.clock()
        answer: Answer | None = None
        failure: Exception | None = None
        try:
            if not job.future.set_running_or_notify_cancel():
                return
            job.queue_ms = (started - job.submitted) * 1000
            if started >= job.deadline:
                failure = TimeoutError()
                return
            answer = classifier.classify(job.images, job.classes, job.plan, explain=job.explain)
            self._spent = (
                FORGET * self._spent[0] + job.place.cost,
                FORGET * self._spent[1] + self.clock() - started,
            )
        except DeviceError as error:
            failure = error
            with self._turn:
                self.failure = error  # before this job is answered: whoever hears of it finds every probe turned
            raise
        except GramError as error:
            failure = error
            if isinstance(error, OutOfMemory):
                self._metrics.out_of_memory.labels("false").inc()
        except Exception as error:  # a bug: this job fails alone, and whoever waits for it logs the traceback
            failure = error
        finally:
            job.images = ()
            with self._turn:
                self._running = None
                self._beat = self.clock()
            if answer is not None:
                job.future.set_result(answer)
            elif job.future.running():
                job.future.set_exception(failure or internal())

    def _end(self, error: BaseException) -> None:
        log.critical("engine ended", exc_info=None if isinstance(error, GramError) else error)
        with self._turn:
            self.failure = error
            waiting = list(self._queue)
            self._queue.clear()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(_ended(error))
        if self.on_end is not None:
            self.on_end(error)


def _served(model: ModelInfo) -> dict[str, str]:
    """What the log says of a model that is ready; without a checkpoint, why there is none."""
    facts = {"model": model.name, "device": model.device, "method": model.default_method}
    if model.checkpoint_sha256 is not None:
        return {**facts, "checkpoint": model.checkpoint_sha256}
    return {**facts, "checkpoint_note": model.checkpoint_note or ""}


def _ended(error: BaseException | None) -> ApiError:
    if error is None:
        return ApiError("draining", "the server is stopping. Ask another one.")
    return ApiError("accelerator_failed", "the engine has stopped; this process is being replaced.")
