"""What the routes of one app share, and the path of one classification through it.

Decoding, parsing and formatting happen in two small pools, the model runs in the engine's thread, and the event loop
only waits. Every route that classifies, whatever its form, goes through `Service.answered`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gram_core import __version__
from gram_core.errors import GramError, InvalidClasses
from gram_core.types import Answer, Plan, Tuning
from server import images, pages, replay
from server.answers import Group, Outcome, classification
from server.auth import Guard, Rates
from server.brownout import shed
from server.class_sets import ClassSets
from server.decoding import Gate
from server.engine import Classifier, Engine, Job, Place
from server.errors import ApiError, from_core
from server.images import Checked
from server.ingress import (
    Budget,
    Exchange,
    Lease,
    declared_length,
    exchange_of,
    read_body,
    split_multipart,
    unless_gone,
)
from server.metrics import CONTENT_TYPE, Metrics
from server.schemas import (
    MAX_EMBEDDING_TEXTS,
    ClassifyRequest,
    ClassSetReference,
    Posted,
    Question,
    ask,
    bound_images,
    bound_lists,
    bound_predictions,
    bound_texts,
    question_of,
    read_json,
)
from server.sessions import Session, Sessions
from server.settings import BYTES_PER_PIXEL, Settings
from server.telemetry import tracing_of

SMALL = 32_768  # bodies up to this many bytes are parsed on the spot
ABANDON_S = 1.0
PULSE_S = 0.25
JSON = "application/json"
RAW_TYPES = ("application/octet-stream", "image/")
T = TypeVar("T")


@dataclass
class Taken:
    """A request whose body was read: whoever parses the body takes it away."""

    request: Request
    media: str
    body: list[bytearray]
    classifier: Classifier
    lease: Lease

    @property
    def owner(self) -> str | None:
        """Of the key."""
        return exchange_of(self.request.scope).owner


@dataclass
class Call:
    """One classification on its way: who answers it, what is asked, and what it holds."""

    classifier: Classifier
    question: Question
    posted: list[Posted]
    exchange: Exchange
    lease: Lease
    timeout_ms: int
    session: Session | None = None

    def left_s(self) -> float:
        """Seconds until its deadline."""
        return (self.timeout_ms - self.exchange.elapsed_ms()) / 1000

    def in_time(self) -> asyncio.Timeout:
        """Raises TimeoutError once the deadline has passed."""
        return asyncio.timeout(self.left_s())


class Service:
    """What the routes share: the engine, the pools and the byte budget of one app."""

    def __init__(self, settings: Settings, load: Callable[[], Classifier]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.engine = Engine(load, settings, self.metrics)
        self.guard = Guard(settings, pages.public(settings))
        self.rates = Rates(settings.rate_cost, settings.queue_seconds)
        self.budget = Budget(settings.max_inflight_bytes, self.metrics)
        self.gate = Gate(settings, self.metrics)
        self.class_sets = ClassSets(settings, self.metrics)
        self.sessions = Sessions(settings, self.metrics)
        self.leaving = False  # told to stop: not ready, but what comes is still answered
        self.draining = False
        self.started = time.time()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._desk = ThreadPoolExecutor(2, "desk")  # parsing and formatting, never behind a slow decode
        self._tokens = ThreadPoolExecutor(
            1, "tokens"
        )  # class sets and sessions may have many texts: a queue of their own
        self.tracing = tracing_of(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The engine loads while requests are already answered (503), and finishes its work at the end."""
        self.engine.start()
        pulse = asyncio.create_task(self._feel())
        try:
            yield
        finally:
            pulse.cancel()
            self.draining = True
            await asyncio.to_thread(self.engine.stop, ABANDON_S)  # the web server has waited for requests already
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._desk.shutdown(wait=False, cancel_futures=True)
            self._tokens.shutdown(wait=False, cancel_futures=True)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.stop)

    def model_tag(self) -> str | None:
        """Twelve digits that tell one model from another."""
        return self.engine.classifier.info.weights_sha256[:12] if self.engine.classifier is not None else None

    # ---- classification ----

    async def classify(self, request: Request) -> Response:
        """`POST /v1/classify`."""
        return await self.taking(request, self._answer, media_type(request.headers))

    async def taking(
        self, request: Request, answer: Callable[[Taken], Coroutine[Any, Any, Response]], media: str = JSON
    ) -> Response:
        """Read a body within its bounds, and answer it; whatever the request holds is given back on every way out."""
        exchange = exchange_of(request.scope)
        classifier = self.classifier()
        length = declared_length(request.headers, self.settings.max_body_bytes)
        lease = self.budget.lease(self.settings.max_body_bytes if length is None else length)
        try:
            body = [await read_body(exchange, request.receive, self.settings)]  # whoever parses it takes it away
            if self.engine.crowded:
                raise self.engine.full()
            lease.grow(len(body[0]) - lease.size)
            exchange.stage = "decode"
            return await unless_gone(request.receive, answer(Taken(request, media, body, classifier, lease)))
        finally:
            lease.release()

    async def _answer(self, taken: Taken) -> Response:
        if taken.media == JSON and len(taken.body[0]) <= SMALL:
            question, posted = self._read(taken)
        else:
            question, posted = await self.at_desk(self._read, taken)
        call = self.call(taken, question, posted)
        outcome = await self.answered(call)
        used = None
        if (session := call.session) is not None:
            used = {"id": session.id, "images": len(session.memory), "added": session.added}
        began = call.exchange.elapsed_ms()

        def write() -> bytes:
            return classification(
                request_id=call.exchange.request_id,
                created=int(time.time()),
                model=taken.classifier.info,
                question=question,
                names=[image.id for image in call.posted],
                outcome=outcome,
                timings_ms=call.exchange.timings_ms,
                session=used,
            )

        content = await self.at_desk(write)
        self.metrics.stage_seconds.labels("serialise").observe((call.exchange.elapsed_ms() - began) / 1000)
        return Response(content, media_type="application/json")

    def call(self, taken: Taken, question: Question, posted: list[Posted]) -> Call:
        """One question with its images, on its way."""
        timeout_ms = question.timeout_ms or self.settings.timeout_ms
        return Call(taken.classifier, question, posted, exchange_of(taken.request.scope), taken.lease, timeout_ms)

    async def answered(self, call: Call) -> Outcome:
        """Everything between a question and the JSON of its answer; raises ApiError for each way that it can fail."""
        try:
            async with self.sessions.turn(call.exchange.owner, call.question.session, call.left_s) as session:
                call.session = session
                return await self._classified(call)
        except GramError as error:
            raise from_core(error) from error
        except TimeoutError:  # the engine says the same of a job whose time is up when its turn comes
            self.metrics.rejected.labels("deadline").inc()
            raise ApiError("deadline_exceeded", f"no answer within {call.timeout_ms} ms (timeout_ms).") from None

    async def _classified(self, call: Call) -> Outcome:
        classifier, engine, times = call.classifier, self.engine, call.exchange.timings_ms
        began = call.exchange.elapsed_ms()
        async with call.in_time():
            groups = await self.at_desk(self._groups, call)
        level = engine.level
        for group in groups:
            group.plan = self._plan(call, len(group.where), group.class_set, level)
        tokenized = call.exchange.elapsed_ms()
        with engine.places([_cost(classifier, group, call) for group in groups]) as places:
            self.spend(call.exchange.owner, sum(place.cost for place in places))
            async with call.in_time():
                items = await self._decode(call)
            times["decode"] = call.exchange.elapsed_ms() - tokenized
            jobs: list[tuple[Group, Job]] = []
            for group, place in zip(groups, places, strict=True):
                prepared = [items[n] for n in group.where if not isinstance(items[n], ApiError)]
                if not prepared:
                    engine.leave(place)
                    continue
                if len(prepared) != len(group.where):
                    group.plan = self._plan(call, len(prepared), group.class_set, level)
                    engine.reprice(place, _cost(classifier, group, call, len(prepared)))
                group.hashes = [image.sha256 for image in prepared]
                if call.session is not None:
                    group.hashes.append(call.session.memory.digest)
                _check_replay(call, group)
                jobs.append((group, self._job(call, group, place, prepared)))
            call.exchange.stage = "queue"
            answers = await self.run_all([job for _, job in jobs], call)
            for (group, job), answer in zip(jobs, answers, strict=True):
                group.answer, group.plan = answer, job.plan
                group.level = level if "brownout" in (job.plan.skip, job.plan.shed) else 0
            if jobs:
                times["queue"] = max(job.queue_ms for _, job in jobs)
                for stage in ("text", "image", "adapt"):
                    times[stage] = max(answer.timings_ms.get(stage, 0.0) for answer in answers)
                times["text"] += tokenized - began
            if call.session is not None and call.question.update:
                call.session.added = call.session.keep(groups[0])  # here: a thread could outlive the turn
        call.exchange.stage = "serialise"
        times["total"] = call.exchange.elapsed_ms()
        if jobs:
            self.metrics.observe(answers, times)
        return Outcome(items, groups, sum(place.cost for place in places) if jobs else 0.0)

    def _groups(self, call: Call) -> list[Group]:
        """The request's images by the classes that they are asked about: those are tuned together."""
        asked, templates, session = call.question.classes, call.question.templates, call.session
        if session is not None and asked is None:
            first = call.classifier.class_set(session.classes, session.templates)
        else:
            first = self._class_set(call, asked, templates, "classes")
        groups: dict[Any, Group] = {}
        known: dict[str, Any] = {}
        bound_lists([image.classes for image in call.posted], templates, self.settings)
        for n, image in enumerate(call.posted):
            own = first
            if image.classes is not None:
                name = repr(image.classes)
                if name not in known:
                    known[name] = self._class_set(call, image.classes, templates, f"images.{n}.classes")
                own = known[name]
            groups.setdefault(own.id, Group(own, [])).where.append(n)
        texts = sum({group.class_set.id: group.class_set.texts for group in groups.values()}.values())
        bound_texts(texts, max(self.settings.max_texts, first.texts))
        if session is not None and any(identity != session.class_set for identity in groups):
            sentence = "these are not the session's classes. Leave classes out, or use another session."
            raise ApiError("session_conflict", sentence, param="classes")
        bound_predictions(call.question, [(len(group.class_set), len(group.where)) for group in groups.values()])
        return list(groups.values())

    def _class_set(self, call: Call, classes: Any, templates: Any, field: str) -> Any:
        if isinstance(classes, ClassSetReference):
            try:
                return self.class_sets.use(call.exchange.owner, classes.class_set, call.classifier)
            except ApiError as error:
                error.param = field
                raise
        try:
            return call.classifier.class_set(classes, templates if isinstance(classes, list) else None)
        except InvalidClasses as error:
            of_template = error.code in ("bad_template", "templates_not_allowed")
            raise from_core(error, "templates" if of_template else field) from error

    def _job(self, call: Call, group: Group, place: Place, prepared: list[Any]) -> Job:
        asked = call.question.adaptation
        budget_ms = self.settings.default_budget_ms if asked.budget_ms is None else asked.budget_ms
        return Job(
            place,
            prepared,
            group.class_set,
            group.plan,
            self.engine.clock() + call.left_s(),
            explain=call.question.explain,
            budget_s=None if budget_ms is None else budget_ms / 1000,
            exact=asked.recorded is not None,
            memory=None if call.session is None else call.session.memory.snapshot(),
        )

    async def run_all(self, jobs: list[Job], call: Call) -> list[Answer]:
        """An answer for each; the first that fails ends the others."""
        if len(jobs) == 1:
            return [await self._run(jobs[0], call)]
        tasks = [asyncio.ensure_future(self._run(job, call)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _plan(self, call: Call, count: int, class_set: Any, level: int) -> Plan:
        """What will be run, of what was asked, at this level of the brown-out."""
        asked = call.question.adaptation
        remembered = 0 if call.session is None else len(call.session.memory)
        if asked.recorded is not None:
            return _recorded_plan(call, count + remembered, class_set, asked.recorded)
        tuning = asked.tuning()
        if call.session is not None:  # what it was made for, where the request leaves that open
            session = call.session
            tuning = replace(tuning, method=tuning.method or session.method, views=tuning.views or session.views)
        plan = _plan(call, tuning, count + remembered, class_set)
        if call.session is not None:
            plan = call.session.bound(plan)
        less = shed(plan, level)
        if less != plan and asked.on_overload == "reject":
            raise self.engine.full()
        return less

    def _read(self, taken: Taken) -> tuple[Question, list[Posted]]:
        """What is asked, and the images, from any of the three forms of a request."""
        settings, request, media, body = self.settings, taken.request, taken.media, taken.body.pop()
        query = request.scope["query_string"]
        if media not in (JSON, "multipart/form-data"):
            question = question_of(_query(query), settings)
            return question, [Posted(body)]
        if query:
            raise ApiError("invalid_request", "query parameters go with a raw image body only.")
        if media == JSON:
            whole = ask(ClassifyRequest, read_json(body), settings)
            return whole, whole.images
        most = settings.max_images + settings.max_classes + 128
        parts = split_multipart(body, request.headers["content-type"], max_parts=most)
        posted = [Posted(part.data) for part in parts if part.name == "image"]
        bound_images(len(posted), settings)
        others = [(part.name, bytes(part.data)) for part in parts if part.name != "image"]
        if [name for name, _ in others] == ["request"]:
            question = ask(Question, read_json(others[0][1]), settings)
        elif any(name == "request" for name, _ in others):
            raise ApiError("invalid_request", "send either one request part or plain fields, not both.")
        else:
            question = question_of([(name, _text(data)) for name, data in others], settings)
        return question, posted

    async def decoded(self, call: Call) -> list[Any]:
        """The images, prepared; within the call's time, which is a TimeoutError's cause."""
        async with call.in_time():
            return await self._decode(call)

    async def _decode(self, call: Call) -> list[Any]:
        """Each image prepared for the classifier, or the `ApiError` it gets instead."""
        settings, metrics, prepare = self.settings, self.metrics, call.classifier.prepare
        checked = await self._in_pool(images.check, [image.data for image in call.posted], settings, metrics)
        call.posted[:] = [image._replace(data=b"") for image in call.posted]  # half of what a request holds
        _first_refusal(checked, call.question)
        pixels = sum(item.pixels for item in checked if isinstance(item, Checked))
        size = BYTES_PER_PIXEL * pixels
        call.lease.grow(size)
        turn = asyncio.Semaphore(settings.decode_threads)  # one request never fills the pool's queue

        async def one(index: int, item: Checked | ApiError) -> Any:
            if isinstance(item, ApiError):
                return item
            async with turn, self.gate.hold(item.pixels):
                loaded, seconds = await self._in_pool(images.load, item, index, settings, metrics, prepare)
                self.gate.took(item.pixels, seconds)
                return loaded

        with self.gate.room(pixels):
            loads = [one(index, item) for index, item in enumerate(checked)]
            checked.clear()  # the encoded bytes go as they are decoded
            items = await asyncio.gather(*loads)
        _first_refusal(items, call.question)
        kept = sum(item.nbytes for item in items if not isinstance(item, ApiError))
        call.lease.grow(min(0, kept - size))
        return items

    def spend(self, owner: str | None, cost: float) -> None:
        """Take the cost from what the key may spend; raises ApiError 429."""
        try:
            self.rates.spend(owner, cost)
        except ApiError:
            self.metrics.rejected.labels("rate").inc()
            raise

    async def _run(self, job: Job, call: Call) -> Answer:
        """The engine's answer, or, when time runs out in the middle of its work, zero-shot if that is there."""
        try:
            async with call.in_time():
                return await self.engine.submit(job)
        except TimeoutError:
            if job.early is None or job.exact:
                raise
            return job.early
        finally:
            if job.future.running():  # the caller has gone, but the engine still holds these images
                call.exchange.stage = "adapt"
                loop, held = asyncio.get_running_loop(), call.lease.size
                call.lease.size = 0

                def give_back(_: Any) -> None:
                    with suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(self.budget.take, -held)

                job.future.add_done_callback(give_back)

    async def _in_pool(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *args)

    async def tokenizing(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work` where nobody but its like waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._tokens, work, *args)

    async def at_desk(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work` in the pool for what is short and must not hold the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._desk, work, *args)

    def classifier(self) -> Classifier:
        """Who answers; raises ApiError where nobody does, now or any more."""
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ApiError("draining", "the server is stopping; ask another one.")
        if self.engine.failure is not None:
            raise ApiError("accelerator_failed", "the engine has stopped; this process is being replaced.")
        if self.engine.classifier is None or not self.engine.ready:
            raise ApiError("not_ready", "the model is still being loaded; try again later.", retry_after=5)
        return self.engine.classifier

    async def _feel(self) -> None:
        """How late the event loop is, again and again."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PULSE_S
            await asyncio.sleep(PULSE_S)
            self.metrics.loop_lag.set(max(0.0, loop.time() - due))

    # ---- probes and facts ----

    async def livez(self) -> Response:
        """Whether the process is worth keeping."""
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def readyz(self) -> Response:
        """Whether to send requests here. The queue's length is not a check: 429 does that job."""
        checks = {
            "engine": self.engine.alive,
            "model": self.engine.phase in ("warmup", "ready"),
            "weights": self.engine.phase in ("warmup", "ready") and self.engine.intact,
            "warmup": self.engine.phase == "ready",
            "device": self.engine.failure is None,
            "not_draining": not (self.leaving or self.draining),
        }
        ready = all(checks.values())
        content = {"status": "ready" if ready else "not_ready", "checks": checks}
        return JSONResponse(content, 200 if ready else 503)

    async def startupz(self) -> Response:
        """How far start-up is."""
        phase = self.engine.phase
        content = {"phase": phase, "seconds": round(self.engine.startup_s, 3)}
        return JSONResponse(content, 200 if phase == "ready" else 503)

    async def info(self) -> Response:
        """What is served, and every limit that a client needs."""
        if self.engine.classifier is None:
            raise ApiError("not_ready", "the model is still being loaded; try again later.", retry_after=5)
        settings = self.settings
        limits = {name: value for name, value in settings if name.startswith("max_")}
        limits["max_embedding_texts"] = MAX_EMBEDDING_TEXTS
        content = {
            "version": __version__,
            "model": asdict(self.engine.classifier.info),
            "limits": limits,
            "timeout_ms": settings.timeout_ms,
            "default_budget_ms": settings.default_budget_ms,
            "deterministic": settings.deterministic,
            "queue_seconds": settings.queue_seconds,
            "brownout": list(settings.brownout),
            "text_pass_cost": self.engine.classifier.text_weight,
            "cost_rate": self.engine.rate,
            "uptime_seconds": round(time.time() - self.started, 1),
        }
        return JSONResponse(content)

    async def scrape(self) -> Response:
        """Prometheus text."""
        if self.engine.classifier is not None:
            self.metrics.serving(__version__, self.engine.classifier.info)
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)


def load_classifier(settings: Settings) -> Classifier:
    """What the settings name, its files held to the SHA256SUMS beside them, if any; raises GramError."""
    from gram_core.backbone import check_sums, locate  # torch, and only here
    from gram_core.classifier import Classifier as Loaded

    check_sums(locate(settings.model, settings.model_dir).folder)
    return Loaded.load(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        model_dir=settings.model_dir,
        weights_sha256=settings.weights_sha256,
        checkpoint=settings.checkpoint,
        text_cache_bytes=settings.text_cache_bytes,
        kl_cap=settings.kl_cap,
        default_method=settings.default_method,
        default_steps=settings.default_steps,
        default_views=settings.default_views,
        default_batch_views=settings.default_batch_views,
        deterministic=settings.deterministic,
        text_group=settings.text_group,
    )


def _cost(classifier: Classifier, group: Group, call: Call, count: int | None = None) -> float:
    """What a group's images cost; a session looks at their views even where nothing is tuned."""
    plan = group.plan
    if call.session is not None and plan.skip == "too_few_images":
        plan = replace(plan, skip=None, host="residual", steps=0)
    return classifier.cost(plan, len(group.where) if count is None else count, group.class_set)


def _plan(call: Call, tuning: Tuning, count: int, class_set: Any) -> Plan:
    known = call.classifier.info.hosts
    if tuning.host is not None and tuning.host not in known:
        sentence = f"no such host on this model. It has {', '.join(known)}."
        raise ApiError("method_unavailable", sentence, param="adaptation.host")
    try:
        return call.classifier.plan(tuning, count, class_set)
    except GramError as error:
        raise from_core(error) from error


def _recorded_plan(call: Call, count: int, class_set: Any, recorded: replay.Recorded) -> Plan:
    """The plan of a token, once the model agrees that it could run it."""
    told, plan = replay.differences(recorded, call.classifier.info, class_set.id), recorded.plan
    if told:
        raise replay.mismatch(told)
    tuning = Tuning(method=plan.method, seed=plan.seed)
    if plan.method != "none":
        tuning = replace(tuning, host=plan.host, scope=plan.scope, steps=plan.steps, views=plan.views)
    return replace(plan, skip=plan.skip or _plan(call, tuning, count, class_set).skip)


def _check_replay(call: Call, group: Group) -> None:
    recorded = call.question.adaptation.recorded
    if recorded is not None:
        told = replay.differences(recorded, call.classifier.info, group.class_set.id, group.hashes)
        if told:
            raise replay.mismatch(told)


def _first_refusal(items: list[Any], question: Question) -> None:
    for item in items:
        if isinstance(item, ApiError) and question.errors == "fail":
            raise item


def media_type(headers: Headers) -> str:
    """What the body is, of what can be read at all; raises ApiError 415."""
    media, _, parameters = headers.get("content-type", "").partition(";")
    media = media.strip().lower()
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("unsupported_media_type", "no content encoding is supported; send the body as it is.")
    if media == "application/json":
        charset = parameters.lower().partition("charset=")[2].strip(' "')
        if charset in ("", "utf-8", "utf8"):
            return media
    elif media == "multipart/form-data" or media.startswith(RAW_TYPES):
        return media
    sentence = "send application/json in UTF-8, multipart/form-data, or one image as the raw body."
    raise ApiError("unsupported_media_type", sentence)


def _query(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise ApiError("malformed_body", "the query string is not UTF-8 in percent encoding.") from None


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError("malformed_body", "a field of the form is not UTF-8.") from None
