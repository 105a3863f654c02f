"""A real server on a real port for tests, classifiers that misbehave on purpose, and requests to send it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from gram_core.types import Answer, Plan
from server.answers import ClassifyAnswer, ErrorAnswer
from server.app import create_app
from server.engine import Classifier
from server.errors import STATUS
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.service import Service
from server.settings import Settings
from server.wire import http_config

PATIENCE_S = 10.0  # for things that take milliseconds; only a bug waits this long
# What no error may hold: addresses of memory, paths, files of code, tracebacks, objects (vLLM CVE-2026-22778).
LEAKS = re.compile(rb"0x[0-9a-f]{6,}|Traceback|\.py\b|(?<![\w./:])/\w+/\w|<_?\w+\.\w+ object")


def until(fact: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for something that is about to become true."""
    end = time.monotonic() + patience_s
    while not fact():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.002)


def png(seed: int = 0, size: tuple[int, int] = (9, 7)) -> bytes:
    """A small picture; every seed has other bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(*images: bytes, classes: Any = ("cat", "dog"), **fields: Any) -> dict[str, Any]:
    """A JSON request; one small picture unless others are given."""
    given = list(classes) if isinstance(classes, tuple) else classes
    return {"images": [b64(data) for data in images or (png(),)], "classes": given, **fields}


class HeldClassifier(FakeClassifier):
    """Waits inside every run until `gate` is set; `runs` tells how far it got."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.runs: list[Sequence[FakePrepared]] = []

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        self.runs.append(images)
        assert self.gate.wait(PATIENCE_S)
        return super().classify(images, classes, plan, **options)


class FailingClassifier(FakeClassifier):
    """Raises `error` whenever a class is called `bad`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        if "bad" in classes.names:
            raise self.error
        return super().classify(images, classes, plan, **options)


@dataclass
class Live:
    """A running server and a client for it."""

    client: httpx.Client
    service: Service
    port: int

    def metric(self, name: str, **labels: str) -> float:
        """One sample of `/metrics`; 0 where there is none yet."""
        text = self.client.get("/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def ask(self, *images: bytes, path: str = "/v1/classify", **fields: Any) -> httpx.Response:
        """Post JSON; every answer is held to the documented shape."""
        return answered(self.client.post(path, json=body(*images, **fields)))

    def assert_well(self) -> None:
        """A good request is answered, and nothing is held afterwards."""
        response = self.ask()
        assert response.status_code == 200, response.text
        until(lambda: self.service.engine.idle, "the engine is idle")
        until(lambda: self.service.budget.held == 0, "every byte is given back")

    def connect(self) -> socket.socket:
        """A raw connection, for what no client library would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def raw(self, request: bytes) -> bytes:
        """Send bytes as they are and read until the server hangs up."""
        with self.connect() as connection:
            connection.sendall(request)
            received = b""
            while piece := connection.recv(65536):
                received += piece
        return received


@contextmanager
def live(
    classifier: Classifier | None = None,
    *,
    load: Callable[[], Classifier] | None = None,
    fake: bool = True,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Live]:
    """The real app under the real uvicorn, in a thread; with a fake classifier unless told otherwise."""
    if fake and classifier is None and load is None:
        classifier = FakeClassifier()
    chosen = Settings(**settings)
    app = create_app(chosen, classifier, load=load)
    port = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(http_config(app, chosen))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    number = port.getsockname()[1]
    try:
        until(lambda: server.started, "the server listens")
        with httpx.Client(base_url=f"http://127.0.0.1:{number}", timeout=PATIENCE_S, trust_env=False) as client:
            if wait:
                until(lambda: client.get("/readyz").status_code == 200, "the server is ready")
            yield Live(client, app.state.service, number)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"


def answered(response: httpx.Response) -> httpx.Response:
    """Check an answer against the documented shapes and headers."""
    assert response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "total;dur=" in response.headers["server-timing"]
    assert "server" not in response.headers
    if response.status_code == 200:
        ClassifyAnswer.model_validate_json(response.content)
        return response
    error = ErrorAnswer.model_validate_json(response.content).error
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) <= 4096
    assert not LEAKS.search(response.content), response.text
    assert STATUS[error.code] == response.status_code
    assert error.request_id == response.headers["x-request-id"]
    assert error.retryable == (response.status_code in (408, 429, 503, 504))
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    return response


def code(response: httpx.Response) -> str:
    """The error's code, after the envelope has been checked."""
    return str(json.loads(answered(response).content)["error"]["code"])
