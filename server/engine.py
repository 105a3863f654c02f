"""The one thread that owns the classifier and its device.

It loads, warms up and then runs batches: the oldest job, and those behind it that fit beside it. What waits is bounded
by cost, what is waiting can be withdrawn, what is running ends at the next step once its caller has gone or its time is
up, and a job that fails fails alone. The engine knows nothing of HTTP; `ApiError` is only how it says no.
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

from gram_core.errors import DeviceError, GramError, OutOfMemory, WeightsChanged
from gram_core.images import DecodedImage
from gram_core.types import Answer, ModelInfo, Plan, Tuning, Work
from server.brownout import Brownout
from server.errors import ApiError, internal
from server.metrics import Metrics
from server.settings import Settings

TICK_S = 0.5  # how often an idle engine shows that it lives, and looks at a piece of the weights
FORGET = 0.8  # weight of the past in the measured rate, per batch
BATCH_S = 0.25  # of measured work in one batch: beyond that company costs more latency than it saves work,
ALIKE_S = 1.0  # except for tunings that share passes of the text tower
FATAL, FATAL_S = 3, 60.0  # this often without memory for zero-shot in so many seconds is a broken device

log = logging.getLogger("server.engine")


class Sentinel(Protocol):
    """Hashes of what must never change; raises WeightsChanged."""

    def check(self, pieces: int = 1) -> None: ...


class Classifier(Protocol):
    """What the server needs of `gram_core.classifier.Classifier`; `server.fake` has the same shape."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def sentinel(self) -> Sentinel: ...
    @property
    def text_weight(self) -> float: ...
    @property
    def out_of_memory(self) -> Mapping[bool, int]: ...
    def prepare(self, image: DecodedImage) -> Any: ...
    def class_set(
        self, classes: Sequence[str] | Mapping[str, Sequence[str]], templates: Sequence[str] | None = None
    ) -> Any: ...
    def plan(self, tuning: Tuning, images: int, classes: Any) -> Plan: ...
    def cost(self, plan: Plan, images: int, classes: Any) -> float: ...
    def seconds(self, plan: Plan, images: int, classes: Any) -> float: ...
    def fit(self, plan: Plan, images: int, classes: Any, budget_s: float, why: str) -> Plan: ...
    def run(self, works: Sequence[Work]) -> list[Answer | Exception]: ...
    def memory(self) -> Mapping[str, float]: ...
    def warm(self, class_set: str) -> bool: ...
    def session(self, classes: Any, capacity: int, views: int) -> Any: ...
    def restored(self, data: bytes) -> tuple[Any, dict[str, str]]: ...
    def warm_up(self) -> None: ...


@dataclass(eq=False)
class Place:
    """A place in the queue: its cost counts as waiting until the job starts or the place is given up."""

    cost: float
    since: float


@dataclass(eq=False)
class Job:
    """One request's images, to be classified together before `deadline` (on the engine's clock).

    `budget_s` bounds the adaptation from the moment that zero-shot is there; a job that is `exact` is run as its plan
    says or not at all. `memory` is what its session remembers, `features` asks for the features of images and classes:
    then the answer holds what was seen. `early` is the zero-shot answer, once it is there.
    """

    place: Place
    images: Sequence[Any]
    classes: Any
    plan: Plan
    deadline: float
    explain: bool = False
    budget_s: float | None = None
    exact: bool = False
    memory: Any = None
    features: bool = False
    future: Future[Answer] = field(default_factory=Future)
    submitted: float = 0.0
    queue_ms: float = 0.0
    early: Answer | None = None
    left: bool = False

    @property
    def together(self) -> int:
        """Images that its tuning sees: its own, and what its session remembers."""
        return len(self.images) + (0 if self.memory is None else len(self.memory.sha256))

    def patience_s(self, now: float) -> tuple[float, str]:
        """How long its adaptation may take, and what bounds it."""
        time_left = self.deadline - now
        if self.budget_s is not None and self.budget_s < time_left:
            return self.budget_s, "budget"
        return time_left, "deadline"


class Engine:
    """`with engine.place(cost) as place: answer = await engine.submit(Job(place, ...))`.

    `on_ready`, when set, is called from the engine's thread once the model is warm, `on_end` with whatever ended the
    loop; `on_stall` from the watchdog's when the engine has shown no life for GRAM_STALL_S.
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
        self.on_ready: Callable[[], None] | None = None
        self.on_end: Callable[[BaseException], None] | None = None
        self.on_stall: Callable[[], None] | None = None
        self.clock = clock
        self._load = load
        self._settings = settings
        self._metrics = metrics
        self._started = self._beat = clock()
        self._startup_s: float | None = None
        self._turn = threading.Condition()  # guards everything below
        self._queue: deque[Job] = deque()
        self._places: set[Place] = set()
        self._running: list[Job] = []
        self._busy_s, self._busy_since = 0.0, math.inf  # of batches that are over; when the one that runs began
        self._stopping = False
        self._spent: tuple[float, float] = (0.0, 0.0)  # cost, seconds; older batches fade
        self._brownout = Brownout(settings.brownout)
        self._exhausted: deque[float] = deque(maxlen=FATAL)
        self._rested = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        metrics.gauge("queue_cost", "Cost that waits.", lambda: self.queue_cost)
        metrics.gauge("queue_requests", "Requests that wait.", lambda: float(len(self._places)))
        metrics.gauge("queue_oldest_seconds", "Age of the oldest waiting request.", self._oldest_s)
        metrics.gauge("brownout_level", "0 to 3: what of adaptation is shed.", lambda: float(self.level))
        metrics.gauge("cost_rate", "Measured cost per second.", lambda: self.rate or 0.0)
        metrics.gauge("engine_heartbeat_age_seconds", "Since the engine last showed life.", self._silence_s)
        metrics.gauge("device_healthy", "1 until the device fails.", lambda: float(self.failure is None))
        metrics.gauge("weights_intact", "1 while the weights are those loaded.", lambda: float(self.intact))

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
    def intact(self) -> bool:
        """No weight is known to have changed."""
        return not isinstance(self.failure, WeightsChanged)

    @property
    def rate(self) -> float | None:
        """Cost per second, measured over the latest batches; None before the first."""
        cost, seconds = self._spent
        return cost / seconds if seconds > 0 else None

    @property
    def queue_cost(self) -> float:
        """Cost of everything that was let in and has not started."""
        with self._turn:
            return self._waiting()

    @property
    def queue_s(self) -> float:
        """The same in seconds, at the measured rate; 0 before the first batch."""
        return self.queue_cost / self.rate if self.rate else 0.0

    @property
    def busy_s(self) -> float:
        """Seconds since the start in which a batch ran."""
        with self._turn:
            return self._busy_s + max(0.0, self.clock() - self._busy_since)

    @property
    def level(self) -> int:
        """Of the brown-out, at this moment's fill."""
        with self._turn:
            return self._brownout.update(self._waiting() / self._bound())

    @property
    def crowded(self) -> bool:
        """Not even the smallest request would be let in, so that one need not be parsed to be refused."""
        with self._turn:
            return bool(self._places) and self._waiting() + 1 > self._bound()

    @property
    def startup_s(self) -> float:
        """How long start-up took, or has taken so far."""
        return self._startup_s if self._startup_s is not None else self.clock() - self._started

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        with self._turn:
            return not self._places and not self._running

    def _waiting(self) -> float:
        return sum(place.cost for place in self._places)

    def _bound(self) -> float:
        rate = self.rate
        return self._settings.queue_seconds * rate if rate else self._settings.max_request_cost

    def _oldest_s(self) -> float:
        with self._turn:
            return self.clock() - min((place.since for place in self._places), default=self.clock())

    def _silence_s(self) -> float:
        return self.clock() - self._beat

    # ---- asking, from the event loop ----

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()
        if self.on_stall is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self, patience_s: float = 30.0) -> None:
        """Finish what was submitted and end the thread; neither a load nor a batch that hangs is waited for."""
        with self._turn:
            self._stopping = True
            self._turn.notify()
        if self._thread.is_alive() and self.phase == "ready":
            self._thread.join(patience_s)

    @contextmanager
    def place(self, cost: float) -> Iterator[Place]:
        """Reserve `cost` or say no; given up on exit if the job never started."""
        with self.places([cost]) as (place,):
            yield place

    @contextmanager
    def places(self, costs: Sequence[float]) -> Iterator[list[Place]]:
        """The same for the jobs of one request: all of them have a place, or none."""
        places = self._reserve(costs)
        try:
            yield places
        finally:
            for place in places:
                self.leave(place)

    def reprice(self, place: Place, cost: float) -> None:
        """The plan changed after its place was reserved, because some of its images can't be used."""
        self._check(cost)
        place.cost = cost

    def full(self) -> ApiError:
        """429, and when to come back."""
        with self._turn:
            running = sum(job.place.cost for job in self._running)
            wait_s = math.ceil((self._waiting() + running) / self.rate) if self.rate else 1
        self._metrics.rejected.labels("queue").inc()
        return ApiError("overloaded", "the queue is full. Try again later.", retry_after=max(1, min(30, wait_s)))

    def _check(self, cost: float) -> None:
        most = self._settings.max_request_cost
        if cost > most:
            self._metrics.rejected.labels("too_costly").inc()
            raise ApiError(
                "request_too_costly",
                f"this request costs {cost:.0f}, the limit is {most:.0f} (GRAM_MAX_REQUEST_COST): "
                "send fewer images or classes, or ask for fewer views or steps.",
            )

    def _reserve(self, costs: Sequence[float]) -> list[Place]:
        self._check(sum(costs))
        with self._turn:
            if not self._places or self._waiting() + sum(costs) <= self._bound():
                places = [Place(cost, self.clock()) for cost in costs]
                self._places.update(places)
                return places
        raise self.full()

    def leave(self, place: Place) -> None:
        """Give a place up; harmless when repeated."""
        with self._turn:
            self._places.discard(place)
            self._turn.notify()  # a batch may be waiting for what will now never come

    async def submit(self, job: Job) -> Answer:
        """Queue a job and wait for its answer; cancelling the wait withdraws it, or ends it at its next step."""
        with self._turn:
            if self.failure is not None or self._stopping:
                raise _ended(self.failure)
            job.submitted = self.clock()
            self._queue.append(job)
            self._turn.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.left = True
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
            if self.on_ready is not None:
                self.on_ready()
            self._startup_s = self.clock() - self._started
            self._enter("ready", **_served(classifier.info))
            while (jobs := self._next(classifier)) is not None:
                if jobs:
                    self._do(classifier, jobs)
                else:
                    classifier.sentinel.check()
        except BaseException as error:  # whatever it is: the loop has ended, and everyone must see it
            self._end(error)

    def _enter(self, phase: str, **facts: str) -> None:
        now = self.clock()
        self._metrics.startup_seconds.labels(self.phase).set(now - self._beat)
        log.info("startup", extra={"fields": {"phase": phase, "seconds": round(now - self._started, 3), **facts}})
        self._beat = now
        self.phase = phase

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(min(1.0, self._settings.stall_s / 4)):
            if self.failure is not None or (self._stopping and not self._thread.is_alive()):
                return
            if self.phase == "ready" and self._silence_s() >= self._settings.stall_s and self.on_stall is not None:
                self.on_stall()
                return

    def _next(self, classifier: Classifier) -> list[Job] | None:
        """The next batch; none after an idle moment, None when there will be no other."""
        with self._turn:
            while not self._queue:
                if self._stopping:
                    return None
                self._beat = self.clock()
                self._turn.wait(TICK_S)
                if not self._queue and time.monotonic() - self._rested >= TICK_S:
                    self._rested = time.monotonic()
                    return []
            self._wait_for_company()
            self._beat = self.clock()
            self._running = self._gather(classifier)
            for job in self._running:
                self._queue.remove(job)
                self._places.discard(job.place)
            return list(self._running)

    def _wait_for_company(self) -> None:
        """A moment for those that are let in but still being decoded."""
        end = time.monotonic() + self._settings.batch_wait_ms / 1000
        while self._queue and not self._stopping:
            cost = sum(job.place.cost for job in self._queue)
            left = end - time.monotonic()
            if left <= 0 or len(self._places) <= len(self._queue) or cost >= self._batch_cost(ALIKE_S):
                return
            self._turn.wait(left)

    def _batch_cost(self, seconds: float) -> float:
        rate = self.rate
        most = self._settings.max_batch_cost
        return min(most, rate * seconds) if rate else most

    def _gather(self, classifier: Classifier) -> list[Job]:
        """The oldest job, and those behind it that fit beside it: in cost, and in everyone's time."""
        now, most, most_alike = self.clock(), self._batch_cost(BATCH_S), self._batch_cost(ALIKE_S)
        chosen: list[Job] = []
        cost = seconds = 0.0
        patience = math.inf
        for job in self._queue:
            try:
                own = min(job.patience_s(now)[0], patience)
                needed = min(classifier.seconds(job.plan, job.together, job.classes), job.patience_s(now)[0])
            except Exception:  # a bug of the model's own estimate: what it is about runs by itself, and fails alone
                log.exception("no estimate")
                own, needed = 0.0, math.inf
            room = most_alike if chosen and _alike(job, chosen[0]) else most
            if chosen and (cost + job.place.cost > room or seconds + needed > own):
                continue
            chosen.append(job)
            cost, seconds, patience = cost + job.place.cost, seconds + needed, own
            if cost >= most_alike:
                break
        return chosen

    def _do(self, classifier: Classifier, jobs: Sequence[Job]) -> None:
        started = self._busy_since = self.clock()
        outcomes: dict[Job, Answer | Exception] = {}
        try:
            live = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            for job in live:
                job.queue_ms = (started - job.submitted) * 1000
            late = [job for job in live if started >= job.deadline]
            outcomes |= {job: TimeoutError() for job in late}
            live = [job for job in live if job not in outcomes]
            if live:
                self._run(classifier, live, outcomes)
                self._account(classifier, live, outcomes, started)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, DeviceError):
                log.exception("a batch failed")  # a bug of this file: whoever has an answer gets it
            else:
                with self._turn:
                    self.failure = error  # before anyone is answered: whoever hears of it finds every probe turned
                raise
        finally:
            with self._turn:
                self._running = []
                self._beat = self.clock()
                self._busy_s, self._busy_since = self._busy_s + self._beat - started, math.inf
            for job in jobs:
                job.images = ()
                if job.future.running():
                    _settle(job, outcomes.get(job, self.failure or internal()))

    def _run(self, classifier: Classifier, jobs: Sequence[Job], outcomes: dict[Job, Answer | Exception]) -> None:
        """Fill `outcomes`. What fails as a whole is tried once more one by one, so that only the culprit fails."""
        ready: list[Job] = []
        works: list[Work] = []
        for job in jobs:
            try:
                works.append(self._work(classifier, job))
                ready.append(job)
            except DeviceError:
                raise
            except Exception as error:
                outcomes[job] = error
        try:
            found = classifier.run(works) if works else []
            outcomes |= zip(ready, found, strict=True)
        except DeviceError:
            raise
        except Exception as error:  # a bug, or no memory: the caller logs the traceback
            if len(ready) == 1:
                outcomes[ready[0]] = error
                return
            for job in ready:
                if job.early is not None and job.future.done():  # it was not to be tuned, and has its answer
                    outcomes[job] = job.early
                else:
                    self._run(classifier, [job], outcomes)

    def _work(self, classifier: Classifier, job: Job) -> Work:
        plan = job.plan
        if not job.exact:
            plan = classifier.fit(plan, job.together, job.classes, *job.patience_s(self.clock()))

        def stop(seconds: float) -> str | None:
            now = self._beat = self.clock()
            if job.left or now >= job.deadline:
                return "deadline"
            over = job.budget_s is not None and not job.exact and seconds >= job.budget_s
            return "budget" if over else None

        def early(answer: Answer) -> None:
            job.early = answer
            if work.final:  # nobody waits for the tunings of others
                job.images = ()
                _settle(job, answer)

        job.plan = plan
        work = Work(job.images, job.classes, plan, job.explain, stop, early, job.memory, job.features)
        return work

    def _account(
        self, classifier: Classifier, jobs: Sequence[Job], outcomes: Mapping[Job, Answer | Exception], started: float
    ) -> None:
        cost, took = sum(job.place.cost for job in jobs), self.clock() - started
        found = [outcomes[job] for job in jobs]
        answers = [outcome for outcome in found if isinstance(outcome, Answer)]
        if answers:
            self._spent = FORGET * self._spent[0] + cost, FORGET * self._spent[1] + took
        predicted = sum(classifier.seconds(job.plan, job.together, job.classes) for job in jobs)
        self._metrics.ran(answers, cost, [job.queue_ms for job in jobs], predicted)
        self._metrics.memory(classifier.out_of_memory, classifier.memory())
        if any(isinstance(outcome, OutOfMemory) for outcome in found):
            self._exhausted.append(started)
            if len(self._exhausted) == FATAL and started - self._exhausted[0] <= FATAL_S:
                raise DeviceError("the device has too little memory for plain zero-shot, again and again.")

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


def _alike(job: Job, other: Job) -> bool:
    """Whether their images are tuned one at a time, in passes that they can share (`gram_core.tuner`)."""
    a, b = job.plan, other.plan
    one_by_one = a.skip is None and b.skip is None and a.scope == b.scope == "image"
    same = (a.method, a.host, a.steps, a.views) == (b.method, b.host, b.steps, b.views)
    return one_by_one and same and job.classes.id == other.classes.id


def _settle(job: Job, outcome: Answer | BaseException) -> None:
    if isinstance(outcome, Answer):
        job.future.set_result(outcome)
    else:
        job.future.set_exception(outcome if isinstance(outcome, Exception) else _ended(outcome))


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
