"""The same app under Ray Serve: one replica for each GPU or CPU slot (docs/ray.md).

`build` makes the application, `by_load` says how many replicas its work needs, and `retrying` is what Ray's HTTP
proxies load so that a request outlives the replica that it was given to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from ray import serve
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.__main__ import WAIT_QUIETLY, bind, code_of, fetch_model, give_up, leave_soon, settle, why
from server.app import create_app, metrics_app
from server.engine import Classifier, Engine
from server.errors import ApiError
from server.ingress import request_id
from server.logs import last_words, log_to_stderr
from server.service import Service, load_classifier
from server.settings import InvalidSettings, Settings, read_settings
from server.wire import http_config

METRICS_PORTS = 16  # of which a replica takes the first that is free: as many as may share one host
FULL = 0.7  # of the time busy is as much as one replica should be
LATE = 0.25  # of what may wait (GRAM_QUEUE_SECONDS) likewise
FORCED_S = 10  # that Ray waits beyond GRAM_DRAIN_S before it kills
LOOK_S = 0.05
TRIES = 2  # of one request, so that one which kills its replica kills no third
AGAIN = re.compile(r"(.*/)?(classify|v1/class-sets|v1/embeddings|hf/zero-shot-image-classification|models/[^/]+)")
KEPT_BYTES = Settings.model_fields["max_body_bytes"].default  # of a body, so that it can be sent again

log = logging.getLogger("server.ray")


class Options(BaseModel):
    """The arguments of `build`: what a replica takes, and how many there may be."""

    model_config = ConfigDict(extra="forbid")

    gpus: NonNegativeFloat | None = None  # None: 1 where GRAM_DEVICE is a CUDA device, else 0
    cpus: PositiveFloat = 1  # and as many threads of torch, unless OMP_NUM_THREADS is set
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 8


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run server.ray_app:build` or a config file; raises InvalidSettings.

    `args` are `Options`. Settings are the GRAM_* variables that the replicas will see: those of the nodes, and of
    `runtime_env`.
    """
    try:
        options = Options.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidSettings(f"argument {first['loc'][0]}: {first['msg']}") from None
    return application(replica_app, options)


def application(make: Callable[[], FastAPI], options: Options) -> serve.Application:
    """The same of another app: `make` is a function of a module that replicas can import."""
    settings = replica_settings()
    gpus = float(settings.device.startswith("cuda")) if options.gpus is None else options.gpus
    deployment = serve.deployment(
        name="gram",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": gpus},
        max_ongoing_requests=256,  # more than are ever let in: the engine's own bound decides
        max_queued_requests=settings.max_connections,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": 8,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
            "policy": {"policy_function": f"{__name__}:{by_load.__name__}"},
        },
        graceful_shutdown_timeout_s=settings.drain_s + FORCED_S,
        graceful_shutdown_wait_loop_s=1,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False},  # a request has our own line already
    )
    return deployment(serve.ingress(make)(Replica)).bind()


def replica_settings() -> Settings:
    """Those of the environment, with what replicas can't share taken out; raises InvalidSettings."""
    settings = read_settings([], under_ray=True)
    changes: dict[str, Any] = {"max_sessions": 0}  # they live in one process, and the next request may go to another
    if settings.class_set_dir is None:
        changes["max_class_sets"] = 0
    for name in changes.keys() & settings.model_fields_set:
        if getattr(settings, name):
            more = "" if name == "max_sessions" else " without GRAM_CLASS_SET_DIR"
            raise InvalidSettings(f"GRAM_{name.upper()} must be 0 or unset under Ray Serve{more}")
    return settings.model_copy(update=changes)


def replica_app(load: Callable[[], Classifier] | None = None) -> FastAPI:
    """The app of one replica, made inside it; start-up ends once its model is warm, or can't be loaded."""
    settings = replica_settings()
    log_to_stderr(settings.log_level, settings.log_format)
    os.environ.setdefault(*WAIT_QUIETLY)  # read when torch is imported, which is later
    if settings.device == "auto" and not ray.get_gpu_ids():  # those that this replica was given
        settings = settings.model_copy(update={"device": "cpu"})

    def fetched() -> Classifier:
        fetch_model(settings)
        return load_classifier(settings)

    app = create_app(settings, load=load or fetched, metrics=False)
    service: Service = app.state.service
    service.engine.on_ready = settle
    service.engine.on_end = _ended
    service.engine.on_stall = lambda: give_up(settings.stall_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.lifespan(app):
            while not service.engine.ready and service.engine.failure is None:
                await asyncio.sleep(LOOK_S)  # Ray sends no request before this is over
            scraped = listen_for_scrapes(service)
            try:
                yield
            finally:
                if scraped is not None:
                    scraped.should_exit = True

    app.router.lifespan_context = lifespan
    return app


class Replica:
    """What Ray asks of a replica besides requests."""

    app: FastAPI  # Ray's wrapper has it

    def __init__(self) -> None:
        self._looked, self._busy_s = time.monotonic(), 0.0

    @property
    def _engine(self) -> Engine:
        service: Service = self.app.state.service
        return service.engine

    async def check_health(self) -> None:
        """Raises RuntimeError once the engine has failed or shows no life: Ray puts another replica in its place."""
        if self._engine.failure is not None:
            raise RuntimeError(f"{why(self._engine.failure)} (code {code_of(self._engine.failure)})")
        if not self._engine.alive:
            raise RuntimeError("the engine shows no life")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """`load`: how many replicas the work of this one would need, by time busy and by cost that waits."""
        now, busy_s = time.monotonic(), self._engine.busy_s
        share = (busy_s - self._busy_s) / max(now - self._looked, LOOK_S)
        self._looked, self._busy_s = now, busy_s
        service: Service = self.app.state.service
        return {"load": max(share / FULL, self._engine.queue_s / (LATE * service.settings.queue_seconds))}


def by_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Replicas that the work of all would need; until one has told, by requests that are under way."""
    loads = (context.aggregated_metrics or {}).get("load")
    if not loads:
        wanted, state = replica_queue_length_autoscaling_policy(context)
        return float(wanted), state
    return sum(loads.values()), {}


def listen_for_scrapes(service: Service) -> uvicorn.Server | None:
    """`/metrics` at GRAM_HOST on the first free port from GRAM_METRICS_PORT, in a thread; None where none is wanted."""
    settings, first = service.settings, service.settings.metrics_port
    if first is None:
        return None
    for number in range(first, min(first + METRICS_PORTS, 65536)):
        try:
            port = bind(settings.model_copy(update={"port": number}))
            port.listen()  # raises as well, where another replica was first
        except OSError:
            continue
        config = http_config(metrics_app(service), settings)
        config.lifespan = "off"
        server = uvicorn.Server(config)
        threading.Thread(target=server.run, kwargs={"sockets": [port]}, name="metrics", daemon=True).start()
        log.info("metrics", extra={"fields": {"host": settings.host, "port": number}})
        return server
    log.error("none of %d ports from GRAM_METRICS_PORT is free: this replica's metrics can't be read", METRICS_PORTS)
    return None


def _ended(error: BaseException) -> None:
    leave_soon(lambda: last_words(code_of(error), why(error)))  # until then `check_health` says why


class Retry:
    """ASGI middleware of Ray's proxy: a request whose replica died unanswered is given to another one, once.

    Only what may be asked twice: GET, HEAD, and the POSTs of this app that can be used under Ray. What can't be asked
    again is 503 with `Retry-After`, where Ray would say 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        heard: list[Message] = []
        kept = left = 0
        head: Message | None = None
        answered = gone = False

        async def hear() -> Message:
            nonlocal kept, left, gone
            if left < len(heard):
                left += 1
                return heard[left - 1]
            message = await receive()
            gone = message["type"] == "http.disconnect"
            kept += len(message.get("body", b""))
            if kept <= KEPT_BYTES and not gone:
                heard.append(message)
                left += 1
            return message

        async def say(message: Message) -> None:
            nonlocal head, answered
            if message["type"] == "http.response.start":  # held until the body comes: Ray may lose the replica between
                head = {**message, "headers": _once(message["headers"])}
                return
            if head is not None:
                answered, start, head = True, head, None
                await send(start)
            await send(message)

        again = scope["method"] in ("GET", "HEAD") or AGAIN.fullmatch(scope["path"])
        for _ in range(TRIES if again else 1):
            left, head = 0, None
            await self.app(scope, hear, say)
            if answered or gone or kept > KEPT_BYTES:
                break
        if not answered and not gone:
            refusal = ApiError("accelerator_failed", "the replica that had this request died. Try again.")
            identity = request_id(Headers(scope=scope))
            body = refusal.envelope(identity)
            named = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": identity}
            named |= refusal.headers
            raw = [(name.encode(), value.encode()) for name, value in named.items()]
            await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
            await send({"type": "http.response.body", "body": body})


def _once(headers: Any) -> list[tuple[bytes, bytes]]:
    """The app's request id, without the one that Ray's proxy adds."""
    first: dict[bytes, bytes] = {}
    return [
        (name, value)
        for name, value in headers
        if name.lower() != b"x-request-id" or first.setdefault(name.lower(), value) is value
    ]


def retrying() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Retry)]
