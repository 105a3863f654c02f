"""Traces reach the collector that the operator named, whole, in time and without a caller's words; and no other."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.auth import new_key
from server.fake import FakeClassifier
from server.settings import InvalidSettings, read_settings
from server.telemetry import FLUSH_S, Finished, Tracing
from tests.server_fixtures import b64, body, live, png, until

ROOT = Path(__file__).parents[1]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{PARENT}-01"
SERVER, INTERNAL, UNSET, ERROR = 2, 1, 0, 2  # in the protocol's numbers


@dataclass
class Collector:
    """What a sink on this machine was sent."""

    url: str
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(sent) for sent in self.bodies]

    def spans(self) -> list[Any]:
        return [span for r in self.requests() for rs in r.resource_spans for ss in rs.scope_spans for span in ss.spans]

    def roots(self) -> list[Any]:
        return [span for span in self.spans() if span.kind == SERVER]


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.paths.append(self.path)
            made.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_a_request_leaves_one_span_with_its_stages() -> None:
    with collector() as sink:
        before = time.time_ns()
        with live(otlp_endpoint=sink.url + "/") as server:
            answer = server.ask(png(1), adaptation={"method": "tpt"})
        after = time.time_ns()
    assert set(sink.paths) == {"/v1/traces"}
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for request in sink.requests()}
    assert b"gram-server" in resource
    (root,) = sink.roots()
    assert root.name == "POST /v1/classify"
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/classify",
        "http.response.status_code": 200,
        "gram.request_id": answer.headers["x-request-id"],
    }
    assert root.status.code == UNSET
    assert before <= root.start_time_unix_nano <= root.end_time_unix_nano <= after
    stages = [span for span in sink.spans() if span is not root and span.kind == INTERNAL]
    told = {stage: ms for stage, ms in answer.json()["timings_ms"].items() if stage != "total"}
    assert [span.name for span in stages] == list(told)
    assert {(span.trace_id, span.parent_span_id) for span in stages} == {(root.trace_id, root.span_id)}
    place = root.start_time_unix_nano
    for span in stages:
        assert span.start_time_unix_nano == place
        place = span.end_time_unix_nano
        # the answer's milliseconds are rounded to three digits at the most
        assert abs((place - span.start_time_unix_nano) / 1e6 - told[span.name]) < 0.1
    assert place <= root.end_time_unix_nano


def test_a_callers_trace_is_continued_if_its_header_is_valid_and_sampled() -> None:
    broken = [
        *("", "00", GIVEN.upper(), GIVEN + "-00", f"ff{GIVEN[2:]}", f"00-{'0' * 32}-{PARENT}-01"),
        *(f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{PARENT}-01", f"{GIVEN}, {GIVEN}", "x" * 10_000),
    ]
    with collector() as sink:
        with live(otlp_endpoint=sink.url) as server:

            def ask(*headers: tuple[str, str]) -> None:
                assert server.client.post("/classify", json=body(), headers=list(headers)).status_code == 200

            ask(("traceparent", GIVEN), ("tracestate", "vendor=secret"))
            ask(("traceparent", f"01-{TRACE}-{PARENT}-03-more"))  # a later version: its first part is ours
            ask(("traceparent", f"00-{TRACE}-{PARENT}-00"))  # not sampled
            for value in broken:
                ask(("traceparent", value))
            ask(("traceparent", GIVEN), ("traceparent", GIVEN))
        roots = sink.roots()
    assert len(roots) == 2 + len(broken) + 1
    assert [(span.trace_id.hex(), span.parent_span_id.hex()) for span in roots[:2]] == [(TRACE, PARENT)] * 2
    assert not any(span.parent_span_id for span in roots[2:])
    assert len({span.trace_id for span in roots}) == len(roots) - 1
    assert not any(span.trace_state for span in sink.spans())


def test_a_valid_traceparent_is_logged_and_another_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.request")
    with live() as server:
        for value in (GIVEN, f"01-{TRACE}-{PARENT}-01-caller's own", "00-secret", ""):
            server.client.post("/classify", json=body(), headers={"traceparent": value})
    told = [r.fields.get("traceparent") for r in caplog.records if r.name == "server.request"]  # type: ignore[attr-defined]
    assert told == [GIVEN, f"01-{TRACE}-{PARENT}-01", None, None]


def test_a_refusal_is_told_by_its_code_and_only_our_own_failures_are_errors() -> None:
    class Buggy(FakeClassifier):
        def class_set(self, classes: Any, templates: Any = None) -> Any:
            return super().class_set(classes, templates) if "bug" not in classes else object()

    with collector() as sink:
        with live(Buggy(), otlp_endpoint=sink.url) as server:
            server.ask(classes=["bug", "dog"])
            server.ask(classes=["dog", "dog"])
            server.client.get("/elsewhere")
            server.client.request("PROPFIND", "/classify")
        told = [(span.name, attributes(span).get("error.type"), span.status.code) for span in sink.roots()]
    assert told == [
        ("POST /v1/classify", "internal", ERROR),
        ("POST /v1/classify", "duplicate_class", UNSET),
        ("GET other", "not_found", UNSET),
        ("other /classify", "method_not_allowed", UNSET),
    ]


def test_probes_and_scrapes_leave_no_span() -> None:
    with collector() as sink:
        with live(otlp_endpoint=sink.url) as server:
            for path in ("/livez", "/readyz", "/startupz", "/health", "/healthz", "/ping", "/metrics"):
                assert server.client.get(path).status_code == 200
            assert server.client.get("/info").status_code == 200
        assert [span.name for span in sink.roots()] == ["GET /info"]


def test_nothing_that_a_caller_sent_is_in_a_span(tmp_path: Path) -> None:
    key, line = new_key("owner-of-the-key")
    (tmp_path / "keys").write_text(line)
    secret = "Wunderkammer"
    with collector() as sink:
        with live(otlp_endpoint=sink.url, api_keys_file=tmp_path / "keys") as server:
            post, lock = server.client.post, {"x-api-key": key, "user-agent": secret, "baggage": f"a={secret}"}
            picture = png(5)
            assert post("/classify", json=body(picture, classes=[secret, "dog"]), headers=lock).status_code == 200
            assert post("/classify", json=body(picture, **{secret: 1}), headers=lock).status_code == 422
            raw = {**lock, "content-type": "image/png"}
            query = {"classes": [secret, "dog"]}
            assert post("/classify", params=query, content=picture, headers=raw).status_code == 200
            assert post(f"/{secret}", headers=lock).status_code == 404
            assert post("/classify", headers={"x-api-key": secret}).status_code == 401
            lock["x-request-id"] = "kept-if-harmless"
            assert post("/classify", json=body(picture), headers=lock).status_code == 200
        assert len(sink.roots()) == 6
        sent = b"".join(sink.bodies)
    for private in (secret, key, "owner-of-the-key", "127.0.0.1", b64(picture)[:40], "/" + secret):
        assert private.encode() not in sent, private
    assert picture not in sent
    assert b"kept-if-harmless" in sent


def finished(number: int) -> Finished:
    return Finished("POST", "/classify", 200, f"req_{number}", 2.0, stages_ms={"image": 1.0})


@contextmanager
def silent() -> Iterator[str]:
    """A collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        yield f"http://127.0.0.1:{port.getsockname()[1]}"


def test_spans_are_sent_in_batches_while_the_server_runs_and_the_rest_at_its_end() -> None:
    with collector() as sink:
        tracing = Tracing(sink.url)
        for number in range(1000):
            tracing.record(finished(number))
        until(lambda: len(sink.spans()) >= 512, "a full batch is sent at once")
        tracing.record(finished(1000))
        tracing.stop()
        assert len(sink.roots()) == 1001
        assert len(sink.bodies) < 20
        tracing.record(finished(1001))  # too late, and harmless


def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.SEND_S", 1.5)
    assert FLUSH_S <= 2.0  # what the lifespan waits for
    with silent() as url:
        tracing = Tracing(url)
        tracing.record(finished(0))
        began = time.monotonic()
        tracing.stop(patience_s=0.1)
        assert time.monotonic() - began < 1.0
    until(lambda: "last spans" not in {thread.name for thread in threading.enumerate()}, "what was left behind ends")
    assert "spans were left unsent" in caplog.text


@pytest.mark.parametrize("status", [None, 400])
def test_a_collector_that_is_away_or_refuses_costs_spans_and_no_request(
    status: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.telemetry.SEND_S", 0.2)
    with collector(status or 200) as sink:
        url = sink.url if status else "http://127.0.0.1:1/not/there"
        tracing = Tracing(url)
        for number in range(1024):  # two batches
            tracing.record(finished(number))
        until(lambda: "spans were not taken" in caplog.text, "the first batch is lost")
        tracing.stop()
    complaints = [r for r in caplog.records if "spans were not taken" in r.getMessage()]
    assert len(complaints) == 1  # a minute
    assert "127.0.0.1" not in caplog.text


def test_spans_go_straight_to_the_collector_whatever_proxies_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with collector() as sink, collector() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", proxy.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", proxy.url)
        tracing = Tracing(sink.url)
        tracing.record(finished(0))
        tracing.stop()
        assert len(sink.roots()) == 1
        assert proxy.bodies == []


QUIET_PROCESS = """
import os, socket, sys
from fastapi import FastAPI
from server.__main__ import log_to_stderr, serve
from server.app import create_app
from server.fake import FakeClassifier
from server.settings import Settings
from tests.server_fixtures import body, until
import httpx, threading, uvicorn

settings = Settings()
app = create_app(settings, FakeClassifier()) if sys.argv[1] == "ours" else FastAPI()
port = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
thread.start()
until(lambda: server.started, "it listens")
with httpx.Client(base_url=f"http://127.0.0.1:{port.getsockname()[1]}", trust_env=False) as client:
    if sys.argv[1] == "ours":
        until(lambda: client.get("/readyz").status_code == 200, "it is ready")
    print(client.post("/classify", json=body(), headers={"traceparent": sys.argv[2]}).status_code)
server.should_exit = True
thread.join()
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))) != [])
"""


@pytest.mark.parametrize(("app", "told"), [("ours", "200 False"), ("FastAPI's own", "404 True")])
def test_without_our_setting_no_variable_opens_a_connection(app: str, told: str) -> None:
    """FastAPI's own start with these variables does, which shows that the sink would see it."""
    with collector() as sink:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRAM_", "OTEL_"))}
        environment |= {"FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        environment |= {"OTEL_METRIC_EXPORT_INTERVAL": "50", "OTEL_BLRP_SCHEDULE_DELAY": "50"}
        environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        environment |= {"OTEL_SERVICE_NAME": "x", "OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"}
        for signal in ("TRACES", "METRICS", "LOGS"):
            environment[f"OTEL_{signal}_EXPORTER"] = "otlp"
            environment[f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"] = f"{sink.url}/v1/{signal.lower()}"
        command = [sys.executable, "-c", QUIET_PROCESS, app, GIVEN]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=True)
    assert ended.stdout.decode().split() == told.split(), ended.stderr.decode()
    assert bool(sink.paths) == (app != "ours")


def test_without_the_extra_the_setting_ends_the_start_with_64_and_one_line() -> None:
    program = (
        "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http.trace_exporter'] = None; "
        "from server.__main__ import main; "
        "sys.exit(main(['--port', '0', '--otlp-endpoint', 'http://127.0.0.1:4318']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert ended.returncode == line["code"] == 64
    assert line["event"].startswith("GRAM_OTLP_ENDPOINT needs the extra otel, which is not installed: pip install")


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://collector:4317", "http://user:word@collector", "http://c/?k=1"]
)
def test_an_endpoint_that_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidSettings, match="GRAM_OTLP_ENDPOINT"):
        read_settings(["--otlp-endpoint", url])
    assert read_settings(["--otlp-endpoint", "http://collector:4318/base"]).otlp_endpoint
