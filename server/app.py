"""The app: its routes, and the path of one classification through them.

`create_app` wires settings, engine, limits and routes; nothing here is global. Decoding, parsing and
formatting happen in two small pools, the model runs in the engine's thread, and the event loop only waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gram_core import __version__
from gram_core.errors import GramError, InvalidClasses
from gram_core.types import Answer, Plan, Tuning
from server import images, openapi, pages, replay
from server.answers import ClassifyAnswer, classification
from server.auth import Guard, Rates
from server.brownout import shed
from server.decoding import Gate
from server.engine import Classifier, Engine, Job
from server.errors import ApiError, from_core
from server.images import Checked
from server.ingress import (
    Budget,
    Exchange,
    Ingress,
    Lease,
    declared_length,
    exchange_of,
    read_body,
    split_multipart,
    unless_gone,
)
from server.metrics import CONTENT_TYPE, Metrics
from server.schemas import (
    ClassifyRequest,
    Posted,
    Question,
    ask,
    bound_images,
    bound_predictions,
    question_of,
    read_json,
)
from server.settings import BYTES_PER_PIXEL, Settings
from server.telemetry import tracing_of

SMALL = 32_768  # bodies up to this many bytes are parsed on the spot
ABANDON_S = 1.0
PULSE_S = 0.25
RAW_TYPES = ("application/octet-stream", "image/")
T = TypeVar("T")


def create_app(
    settings: Settings,
    classifier: Classifier | None = None,
    *,
    load: Callable[[], Classifier] | None = None,
) -> FastAPI:
    """The server as an ASGI app.

    Args:
        settings: every limit and default; see `server.settings`.
        classifier: one that is loaded already, for example `server.fake.FakeClassifier()`.
        load: makes one instead, in the engine's thread; without either, `settings` names the model.
    """
    if classifier is not None and load is not None:
        raise ValueError("Use either 'classifier' or 'load', not both.")
    if classifier is not None:
        load = lambda: classifier  # noqa: E731
    service = Service(settings, load or (lambda: load_classifier(settings)))
    app = FastAPI(
        title="GRAM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.lifespan,
        exception_handlers={HTTPException: _refused_by_framework},
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    for path in ("/v1/classify", "/classify"):
        app.add_api_route(
            path,
            service.classify,
            methods=["POST"],
            operation_id=path.strip("/").replace("/", "_"),
            summary="Classify images, before and after adaptation",
            **openapi.classify(ClassifyAnswer),
        )
    probes: dict[str, Callable[[], Any]] = {"/livez": service.livez, "/startupz": service.startupz}
    for path in ("/readyz", "/health", "/healthz", "/ping"):
        probes[path] = service.readyz
    for path, probe in probes.items():
        app.add_api_route(path, probe, operation_id=path[1:], **openapi.probe(path))
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/info", service.info, operation_id="info", **openapi.info())
    app.add_api_route("/metrics", service.scrape, operation_id="metrics", response_class=Response, **openapi.metrics())
    pages.add(app, settings)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    app.add_middleware(
        Ingress,
        settings=settings,
        guard=service.guard,
        metrics=service.metrics,
        paths=frozenset(route.path for route in app.routes if hasattr(route, "path")),
        model=service.model_tag,
        tracing=service.tracing,
    )
    return app


@dataclass
class Call:
    """One classification on its way: who answers it, what is asked, and what it holds."""

    classifier: Classifier
    question: Question
    posted: list[Posted]
    exchange: Exchange
    lease: Lease
    timeout_ms: int

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
        self.leaving = False  # told to stop: not ready, but what comes is still answered
        self.draining = False
        self.started = time.time()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._desk = ThreadPoolExecutor(2, "desk")  # parsing and formatting, never behind a slow decode
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
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.stop)

    def model_tag(self) -> str | None:
        """Twelve digits that tell one model from another."""
        return self.engine.classifier.info.weights_sha256[:12] if self.engine.classifier is not None else None

    # ---- classification ----

    async def classify(self, request: Request) -> Response:
        """Answer one request; whatever it holds is given back on every way out."""
        exchange = exchange_of(request.scope)
        classifier = self._classifier()
        media = _media_type(request.headers)
        length = declared_length(request.headers, self.settings.max_body_bytes)
        lease = self.budget.lease(self.settings.max_body_bytes if length is None else length)
        try:
            body = [await read_body(exchange, request.receive, self.settings)]  # whoever parses it takes it away
            if self.engine.crowded:
                raise self.engine.full()
            lease.grow(len(body[0]) - lease.size)
            exchange.stage = "decode"
            return await unless_gone(request.receive, self._answer(request, media, body, classifier, exchange, lease))
        finally:
            lease.release()

    async def _answer(
        self,
        request: Request,
        media: str,
        body: list[bytearray],
        classifier: Classifier,
        exchange: Exchange,
        lease: Lease,
    ) -> Response:
        if media == "application/json" and len(body[0]) <= SMALL:
            question, posted = self._read(request, media, body.pop())
        else:
            question, posted = await self._at_desk(lambda: self._read(request, media, body.pop()))
        timeout_ms = question.timeout_ms or self.settings.timeout_ms
        call = Call(classifier, question, posted, exchange, lease, timeout_ms)
        try:
            return await self._classify(call)
        except GramError as error:
            raise from_core(error) from error
        except TimeoutError:  # the engine says the same of a job whose time is up when its turn comes
            self.metrics.rejected.labels("deadline").inc()
            raise ApiError("deadline_exceeded", f"no answer within {timeout_ms} ms (timeout_ms).") from None

    async def _classify(self, call: Call) -> Response:
        classifier, engine, times = call.classifier, self.engine, call.exchange.timings_ms
        began = call.exchange.elapsed_ms()
        async with call.in_time():
            class_set = await self._at_desk(_class_set, call)
        level = engine.level
        plan = self._plan(call, len(call.posted), class_set, level)
        tokenized = call.exchange.elapsed_ms()
        with engine.place(classifier.cost(plan, len(call.posted), class_set)) as place:
            self._spend(call, place.cost)
            async with call.in_time():
                items = await self._decode(call)
            times["decode"] = call.exchange.elapsed_ms() - tokenized
            prepared = [item for item in items if not isinstance(item, ApiError)]
            answer: Answer | None = None
            if prepared:
                if len(prepared) != len(items):
                    plan = self._plan(call, len(prepared), class_set, level)
                    engine.reprice(place, classifier.cost(plan, len(prepared), class_set))
                _check_replay(call, class_set, prepared)
                call.exchange.stage = "queue"
                due = engine.clock() + call.left_s()
                budget_ms = call.question.adaptation.budget_ms
                budget_ms = self.settings.default_budget_ms if budget_ms is None else budget_ms
                job = Job(
                    place,
                    prepared,
                    class_set,
                    plan,
                    due,
                    explain=call.question.explain,
                    budget_s=None if budget_ms is None else budget_ms / 1000,
                    exact=call.question.adaptation.recorded is not None,
                )
                answer = await self._run(job, call)
                plan = job.plan
                times |= {"queue": job.queue_ms, **answer.timings_ms}
                times["text"] = times.get("text", 0.0) + tokenized - began
        call.exchange.stage = "serialise"
        times["total"] = call.exchange.elapsed_ms()

        def write() -> bytes:
            if answer is not None:
                self.metrics.observe(answer, times)
            return classification(
                request_id=call.exchange.request_id,
                created=int(time.time()),
                model=classifier.info,
                class_set=class_set,
                score=call.question.score,
                top_k=call.question.top_k,
                items=[(image.id, item) for image, item in zip(call.posted, items, strict=True)],
                answer=answer,
                plan=plan,
                cost=place.cost if answer is not None else 0.0,
                brownout=level if "brownout" in (plan.skip, plan.shed) else 0,
                timings_ms=times,
            )

        content = await self._at_desk(write)
        self.metrics.stage_seconds.labels("serialise").observe((call.exchange.elapsed_ms() - times["total"]) / 1000)
        return Response(content, media_type="application/json")

    def _plan(self, call: Call, count: int, class_set: Any, level: int) -> Plan:
        """What will be run, of what was asked, at this level of the brown-out."""
        asked = call.question.adaptation
        if asked.recorded is not None:
            return _recorded_plan(call, count, class_set, asked.recorded)
        plan = _plan(call, asked.tuning(), count, class_set)
        less = shed(plan, level)
        if less != plan and asked.on_overload == "reject":
            raise self.engine.full()
        return less

    def _read(self, request: Request, media: str, body: bytearray) -> tuple[Question, list[Posted]]:
        """What is asked, and the images, from any of the three forms of a request."""
        settings = self.settings
        query = request.scope["query_string"]
        if media not in ("application/json", "multipart/form-data"):
            question = question_of(_query(query), settings)
            return question, [Posted(body)]
        if query:
            raise ApiError("invalid_request", "query parameters go with a raw image body only.")
        if media == "application/json":
            whole = ask(ClassifyRequest, read_json(body), settings)
            bound_predictions(whole, len(whole.images))
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
        bound_predictions(question, len(posted))
        return question, posted

    async def _decode(self, call: Call) -> list[Any]:
        """Each image prepared for the classifier, or the `ApiError` it gets instead."""
        settings, metrics, prepare = self.settings, self.metrics, call.classifier.prepare
        checked = await self._in_pool(images.check, [image.data for image in call.posted], settings, metrics)
        call.posted[:] = [Posted(b"", image.id) for image in call.posted]  # half of what a request holds
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

    def _spend(self, call: Call, cost: float) -> None:
        try:
            self.rates.spend(call.exchange.owner, cost)
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

    async def _at_desk(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._desk, work, *args)

    def _classifier(self) -> Classifier:
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


def _class_set(call: Call) -> Any:
    try:
        return call.classifier.class_set(call.question.classes, call.question.templates)
    except InvalidClasses as error:
        field = "templates" if error.code in ("bad_template", "templates_not_allowed") else "classes"
        raise from_core(error, field) from error


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


def _check_replay(call: Call, class_set: Any, prepared: list[Any]) -> None:
    recorded = call.question.adaptation.recorded
    if recorded is not None:
        hashes = [image.sha256 for image in prepared]
        told = replay.differences(recorded, call.classifier.info, class_set.id, hashes)
        if told:
            raise replay.mismatch(told)


def _first_refusal(items: list[Any], question: Question) -> None:
    for item in items:
        if isinstance(item, ApiError) and question.errors == "fail":
            raise item


def _media_type(headers: Headers) -> str:
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


async def _refused_by_framework(_: Request, error: Exception) -> NoReturn:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refusal = ApiError("method_not_allowed", "this path has other methods.")
        refusal.headers |= {"allow": (error.headers or {}).get("Allow", "")}
    elif error.status_code == 404:
        refusal = ApiError("not_found", "no such path.")
    else:
        refusal = ApiError("malformed_body", "the request can't be read.")
    raise refusal from error
