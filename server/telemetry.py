"""A span for each request, sent to the OpenTelemetry collector that `GRAM_OTLP_ENDPOINT` names; off without it.

What a span holds comes from closed sets, from our own clocks and from ids: no class name, key, query or path of a
caller. Nothing of the SDK is imported, and no variable of its own counts, unless our setting is set.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.datastructures import Headers

from gram_core import __version__
from server.settings import InvalidSettings

TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
TRACEPARENT_LENGTH = 55  # of the part that every version has
FLUSH_S = 2.0  # at the end, for spans that are still here
SEND_S = 5.0  # for one batch, with its retries
BATCH_MS, BATCH, QUEUE = 1000, 512, 4096
QUIET_S = 60.0  # between two complaints about the collector

log = logging.getLogger("server.telemetry")


@dataclass
class Finished:
    """What is told of a request when it is over; `stages_ms` in the order in which they happened."""

    method: str
    route: str
    status: int
    request_id: str
    ms: float
    error: str | None = None
    traceparent: str | None = None
    stages_ms: Mapping[str, float] = field(default_factory=dict)


def traceparent(headers: Headers) -> str | None:
    """The caller's place in a trace (W3C Trace Context), if there is exactly one and it is well-formed."""
    given = headers.getlist("traceparent")
    match = TRACEPARENT.fullmatch(given[0]) if len(given) == 1 else None
    if match is None or (match[1] == "00" and match[2]):
        return None
    return given[0][:TRACEPARENT_LENGTH]


class Tracing:
    """Batches of spans on their way to one collector. A collector that is away costs spans, never a request."""

    def __init__(self, endpoint: str) -> None:
        try:
            import requests
            from opentelemetry import trace
            from opentelemetry.context import Context
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.metrics import NoOpMeterProvider
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
        except ImportError:
            raise InvalidSettings(
                "GRAM_OTLP_ENDPOINT needs the extra otel, which is not installed: pip install 'gram-server[otel]', "
                "or leave the setting out."
            ) from None
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its lines name addresses; `_Sender` has ours
        session = requests.Session()
        session.trust_env = False  # no proxy, no password file: this address and no other
        url = endpoint.rstrip("/") + "/v1/traces"
        unmeasured = NoOpMeterProvider()
        exporter = OTLPSpanExporter(url, timeout=SEND_S, session=session, meter_provider=unmeasured)
        self._sender = _Sender(exporter)
        self._batches = BatchSpanProcessor(cast(Any, self._sender), QUEUE, BATCH_MS, BATCH, meter_provider=unmeasured)
        provider = TracerProvider(
            ParentBased(ALWAYS_ON),  # a caller that does not sample its trace is not sampled here either
            Resource({"service.name": "gram-server", "service.version": __version__}),
            shutdown_on_exit=False,
            meter_provider=unmeasured,
        )
        provider.add_span_processor(self._batches)
        self._tracer = provider.get_tracer("server", __version__)
        self._api: Any = trace
        self._nowhere = Context()

    def record(self, done: Finished) -> None:
        """Queue the span of a request, and one for each of its stages.

        Stages are laid end to end from the request's start: their lengths are measured, their places are not.
        """
        end = time.time_ns()
        start = end - _ns(done.ms)
        attributes: dict[str, str | int] = {
            "http.request.method": done.method,
            "http.route": done.route,
            "http.response.status_code": done.status,
            "gram.request_id": done.request_id,
        }
        if done.error is not None:
            attributes["error.type"] = done.error
        span = self._tracer.start_span(
            f"{done.method} {done.route}",
            self._parent(done.traceparent),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=start,
        )
        if done.status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        inside = self._api.set_span_in_context(span, self._nowhere)
        for stage, ms in done.stages_ms.items():
            until = min(start + _ns(ms), end)
            self._tracer.start_span(stage, inside, start_time=start).end(until)
            start = until
        span.end(end)

    def stop(self, patience_s: float = FLUSH_S) -> None:
        """Send what is queued, for at most `patience_s`."""
        ending = threading.Thread(target=self._batches.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(patience_s)
        if ending.is_alive():
            log.warning("spans were left unsent: the collector (GRAM_OTLP_ENDPOINT) took too long")
            self._sender.shutdown()

    def _parent(self, given: str | None) -> Any:
        if given is None:
            return self._nowhere
        _, trace_id, span_id, flags = given.split("-")
        sampled = self._api.TraceFlags(int(flags, 16) & self._api.TraceFlags.SAMPLED)
        remote = self._api.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=sampled)
        return self._api.set_span_in_context(self._api.NonRecordingSpan(remote), self._nowhere)


def tracing_of(endpoint: str | None) -> Tracing | None:
    """The spans' way out, if the operator named one; raises InvalidSettings where the extra is missing."""
    return None if endpoint is None else Tracing(endpoint)


class _Sender:
    """What a processor calls of an exporter; says so, now and then, when batches are lost."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self._lost = 0
        self._quiet_until = 0.0

    def export(self, spans: Sequence[Any]) -> Any:
        """Send a batch."""
        result = self._exporter.export(spans)
        if result.name != "SUCCESS":
            self._lost += len(spans)
            if time.monotonic() >= self._quiet_until:
                self._quiet_until = time.monotonic() + QUIET_S
                fields = {"spans": self._lost}
                log.warning("spans were not taken by the collector (GRAM_OTLP_ENDPOINT)", extra={"fields": fields})
        return result

    def shutdown(self) -> None:
        """Stop waiting for the collector."""
        self._exporter.shutdown()


def _ns(ms: float) -> int:
    return int(ms * 1e6)
