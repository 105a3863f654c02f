"""The outermost layer: who is asking, how much may arrive, and how every answer leaves.

`Ingress` wraps the whole app: request ids, the body cap, headers, error envelopes, one log line and
one count per request. `read_body` and `split_multipart` turn what arrives into bytes and parts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import PROBES, SCRAPE, Guard
from server.errors import CLIENT_GONE, ApiError, ClientGone, internal
from server.metrics import Metrics
from server.settings import Settings
from server.telemetry import Finished, Tracing, traceparent

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CHUNK = 65_536
UNTRACED = frozenset({*PROBES, SCRAPE})  # machines ask them all day

log = logging.getLogger("server.request")
T = TypeVar("T")


@dataclass
class Exchange:
    """One request as the log and the headers see it: what it is doing (`stage`) and what took how long."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    stage: str = "body"
    timings_ms: dict[str, float] = field(default_factory=dict)
    body_read: bool = False
    owner: str | None = None  # of the key
    traceparent: str | None = None
    error: str | None = None  # the code that it was refused with

    def elapsed_ms(self) -> float:
        """Since the request's headers arrived."""
        return (time.monotonic() - self.started) * 1000


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `Ingress` attached."""
    found: Exchange = scope["gram.exchange"]
    return found


class Ingress:
    """Pure ASGI middleware around the whole app."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        guard: Guard,
        metrics: Metrics,
        paths: frozenset[str],
        model: Callable[[], str | None],
        draining: Callable[[], bool],
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.guard = guard
        self.metrics = metrics
        self.paths = paths
        self.model = model
        self.draining = draining
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; every exception becomes an envelope here, and nowhere else."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = scope["gram.exchange"] = Exchange(request_id(headers), traceparent=traceparent(headers))
        route = scope["path"] if scope["path"] in self.paths else "other"
        status = CLIENT_GONE
        peer = (scope.get("client") or ("",))[0]
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

        async def leave(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = exchange.request_id
                out["server-timing"] = _server_timing(exchange)
                out["cache-control"] = "no-store"
                out["x-content-type-options"] = "nosniff"
                for name, value in (self.guard.cors(headers) or {}).items():
                    out[name] = value
                if (model := self.model()) is not None:
                    out["x-gram-model"] = model
                if has_body and not exchange.body_read:
                    out["connection"] = "close"  # nobody will read the rest
            await send(message)

        async def refuse(error: ApiError) -> None:
            exchange.error = error.code
            body = error.envelope(exchange.request_id)
            plain = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
            raw = [(name.encode(), value.encode()) for name, value in plain.items()]
            await leave({"type": "http.response.start", "status": error.status, "headers": raw})
            await leave({"type": "http.response.body", "body": body})

        async def agree(preflight: dict[str, str]) -> None:
            raw = [(name.encode(), value.encode()) for name, value in preflight.items()]
            await leave({"type": "http.response.start", "status": 204, "headers": raw})
            await leave({"type": "http.response.body", "body": b""})

        self.metrics.inflight.inc()
        try:
            if (preflight := self.guard.preflight(scope["method"], headers, peer)) is not None:
                await agree(preflight)
                return
            exchange.owner = self.guard.admit(scope["method"], scope["path"], headers, peer)
            declared_length(headers, self.settings.max_body_bytes)
            await self.app(scope, receive, leave)
        except asyncio.CancelledError:  # the drain time is over; else a client left Ray's proxy, which says it so
            if not self.draining():
                self.metrics.disconnects.labels(exchange.stage).inc()
            elif status == CLIENT_GONE:
                await refuse(ApiError("draining", "the server stopped before this was done. Ask another one."))
            raise
        except ClientGone:
            self.metrics.disconnects.labels(exchange.stage).inc()
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request failed", extra={"fields": {"request_id": exchange.request_id}})
            if status == CLIENT_GONE:  # nothing has been sent yet
                await refuse(error if isinstance(error, ApiError) else internal())
        finally:
            route = str(getattr(scope.get("route"), "path", route))
            self.metrics.inflight.dec()
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(exchange.elapsed_ms() / 1000)
            self._tell(scope, exchange, route, status)

    def _tell(self, scope: Scope, exchange: Exchange, route: str, status: int) -> None:
        """One line in the log, and one span."""
        ms = exchange.elapsed_ms()
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        fields = {
            "request_id": exchange.request_id,
            "method": method,
            "route": route,
            "status": status,
            "stage": exchange.stage,
            "ms": round(ms, 1),
        }
        if exchange.traceparent is not None:
            fields["traceparent"] = exchange.traceparent
        level = logging.INFO if method == "POST" else logging.DEBUG  # probes would drown the rest
        log.log(level, "request", extra={"fields": fields})
        if self.tracing is not None and scope["path"] not in UNTRACED:
            stages = {stage: took for stage, took in exchange.timings_ms.items() if stage != "total"}
            done = Finished(
                method, route, status, exchange.request_id, ms, exchange.error, exchange.traceparent, stages
            )
            self.tracing.record(done)


class Budget:
    """Bytes that all requests together may hold. Used from the event loop only."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self.held = 0
        self._metrics = metrics
        metrics.gauge("ingress_bytes", "Bytes of bodies and pixels.", lambda: float(self.held))

    def lease(self, size: int) -> Lease:
        """Reserve bytes for one request, or raise 429."""
        lease = Lease(self)
        lease.grow(size)
        return lease

    def take(self, size: int) -> None:
        """Add `size` to what is held; negative gives back."""
        if size > 0 and self.held + size > self.limit:
            self._metrics.rejected.labels("bytes").inc()
            raise ApiError("overloaded", "the server holds as many bytes as it may. Try again later.")
        self.held += size


class Lease:
    """One request's share of a `Budget`."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def grow(self, size: int) -> None:
        """Take more (or, negative, give some back)."""
        self._budget.take(size)
        self.size += size

    def release(self) -> None:
        """Give everything back; harmless when repeated."""
        self.grow(-self.size)


def declared_length(headers: Headers, limit: int) -> int | None:
    """The Content-Length, or None if the body is chunked; 413 above `limit`, before anything is read."""
    declared = headers.get("content-length")
    if declared is None:
        coding = headers.get("transfer-encoding")
        if coding is not None and coding.strip().lower() != "chunked":  # the parser looks at the last one alone
            raise ApiError("unsupported_media_type", "no transfer encoding but chunked is supported.")
        return None if coding is not None else 0
    if not (declared.isascii() and declared.isdigit()):
        raise ApiError("malformed_body", "Content-Length is not a number.")
    if len(declared) > 18 or int(declared) > limit:
        raise _too_large(limit)
    return int(declared)


async def read_body(exchange: Exchange, receive: Receive, settings: Settings) -> bytearray:
    """The whole body, within its cap and its time; never copied here, because that would hold the event loop."""
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > settings.max_body_bytes:
                    raise _too_large(settings.max_body_bytes)
                more = message.get("more_body", False)
    except TimeoutError:
        sentence = f"the body did not arrive within {settings.body_timeout_s:g} s (GRAM_BODY_TIMEOUT_S)."
        raise ApiError("body_timeout", sentence) from None
    exchange.body_read = True
    exchange.timings_ms["body"] = exchange.elapsed_ms()
    return body


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` while watching the connection; if the client leaves, cancel it and raise `ClientGone`."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


@dataclass
class Part:
    """One part of a form: its field name, whether it came with a filename, its bytes."""

    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)


def split_multipart(body: bytes | bytearray, content_type: str, *, max_parts: int) -> Sequence[Part]:
    """The parts of a form, from memory to memory: no temporary files, and filenames are dropped unread."""
    parts: list[Part] = []
    header: list[bytearray] = [bytearray(), bytearray()]
    disposition = b""
    ended = False

    def begin() -> None:
        nonlocal disposition
        disposition = b""
        if len(parts) >= max_parts:
            raise ApiError("invalid_request", f"the form has more than {max_parts} parts.")

    def header_end() -> None:
        nonlocal disposition
        if header[0].lower() == b"content-disposition":
            disposition = bytes(header[1])
        header[:] = bytearray(), bytearray()

    def headers_finished() -> None:
        _, options = parse_options_header(disposition)
        try:
            parts.append(Part(options[b"name"].decode("utf-8"), b"filename" in options))
        except (KeyError, UnicodeDecodeError):
            raise ApiError("malformed_body", "a part of the form has no readable name.") from None

    def end() -> None:
        nonlocal ended
        ended = True

    def grow(which: int) -> Callable[[bytes, int, int], None]:
        def more(data: bytes, start: int, stop: int) -> None:
            header[which] += data[start:stop]

        return more

    def part_data(data: bytes, start: int, stop: int) -> None:
        parts[-1].data += data[start:stop]

    try:
        _, options = parse_options_header(content_type)
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": begin,
                "on_part_data": part_data,
                "on_header_field": grow(0),
                "on_header_value": grow(1),
                "on_header_end": header_end,
                "on_headers_finished": headers_finished,
                "on_end": end,
            },
        )
        for start in range(0, len(body), CHUNK):  # chunks, so that other threads get their turn
            parser.write(bytes(body[start : start + CHUNK]))
    except (KeyError, FormParserError, ValueError):
        raise ApiError("malformed_body", "the body is not a well-formed multipart form.") from None
    if not ended:
        raise ApiError("malformed_body", "the multipart form ends before its closing boundary.")
    return parts


def request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    if REQUEST_ID.fullmatch(given):
        return given
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"  # sorts by time


def _server_timing(exchange: Exchange) -> str:
    timings = {**exchange.timings_ms, "total": exchange.elapsed_ms()}
    return ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in timings.items())


def _too_large(limit: int) -> ApiError:
    return ApiError("body_too_large", f"the body is larger than {limit} bytes (GRAM_MAX_BODY_BYTES).")
