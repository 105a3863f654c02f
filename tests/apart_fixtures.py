"""A server with a fake classifier in a process of its own, for raw bytes and for what the kernel tells of it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx

from server.answers import ErrorAnswer
from server.errors import STATUS
from tests.server_fixtures import LEAKS, PATIENCE_S, Live, until

ROOT = Path(__file__).parents[1]
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
MOST_STALL_S = 2.0  # milliseconds in fact; benchmarks/ingress.py has the figures
BETWEEN_PROBES_S = 0.02
AT_REST = {"requests_inflight": 1.0, "ingress_bytes": 0.0, "queue_requests": 0.0, "queue_cost": 0.0}  # 1: the scrape

PROGRAM = """
import json, socket, sys
from server.__main__ import log_to_stderr, serve
from server.app import create_app
from server.fake import FakeClassifier
from server.settings import Settings

log_to_stderr("debug")
settings = Settings(**json.loads(sys.argv[1]))
port = socket.create_server(("127.0.0.1", 0), backlog=1024)
sys.exit(serve(create_app(settings, FakeClassifier()), settings, port))
"""


@dataclass
class Apart(Live):
    """A running process and a client for it; its `service` is out of reach."""

    popen: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; every line of it is one JSON object."""
        complete, _, _ = self.log.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in complete.split("\n")]

    def kib(self, name: str) -> int:
        """A number of the kernel's about the process, as VmRSS or VmHWM (the highest VmRSS)."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]

    @contextmanager
    def flat(self, mib: float) -> Iterator[None]:
        """At no moment inside does the process take more than `mib` above what it had before."""
        Path(f"/proc/{self.popen.pid}/clear_refs").write_text("5")  # the highest begins anew
        before = self.kib("VmRSS")
        yield
        grown = (self.kib("VmHWM") - before) / 1024
        assert grown < mib, f"it took {grown:.0f} MiB, {mib:.0f} are allowed"

    def assert_well(self) -> None:
        """A good request is answered, and nothing is held afterwards."""
        response = self.ask()
        assert response.status_code == 200, response.text
        held: dict[str, float] = {}

        def at_rest() -> bool:
            held.update(self.held())
            return held == AT_REST

        try:
            until(at_rest, "everything is given back")
        except AssertionError:
            raise AssertionError(f"still held: {held}") from None

    def held(self) -> dict[str, float]:
        """The gauges of what requests hold."""
        text = self.client.get("/metrics").text
        found = re.findall(rf"^gram_({'|'.join(AT_REST)}) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@contextmanager
def apart(log: Path, program: str = PROGRAM, environ: dict[str, str] | None = None, **settings: Any) -> Iterator[Apart]:
    """Start a server, and stop it in good order: it must exit with 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAM_")}
    environment |= {"OMP_NUM_THREADS": "1", **(environ or {})}
    command = [sys.executable, "-c", program, json.dumps(settings)]
    with log.open("wb") as file:
        popen = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    try:

        def ports() -> list[int]:
            found = re.findall(r'"event": "listening", .*"port": (\d+)', log.read_text())
            assert popen.poll() is None, log.read_text()[-2000:]
            return [int(port) for port in found]

        until(ports, "it listens", patience_s=60)
        (port,) = ports()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False) as client:
            until(lambda: client.get("/readyz").status_code == 200, "it is ready", patience_s=60)
            yield Apart(client, None, port, popen, log)  # type: ignore[arg-type]
        popen.terminate()
        assert popen.wait(30) == 0, log.read_text()[-2000:]
    finally:
        popen.kill()
        popen.wait()


# ---- raw bytes ----


@dataclass(frozen=True)
class Answer:
    """One answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def code(self) -> str | None:
        """The error's code, or None."""
        return json.loads(self.content)["error"]["code"] if self.status >= 400 and self.content else None


def answers(received: bytes) -> list[Answer]:
    """Every answer in what was received; each error is held to the documented shape."""
    found = []
    while received:
        head, separator, received = received.partition(b"\r\n\r\n")
        assert separator, head[-200:]
        start, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [\w ]*", start)
        assert match, start
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(headers) == len(lines), lines  # none is given twice
        length = int(headers.get("content-length", "0"))
        assert len(received) >= length, "an answer is cut off"
        found.append(Answer(int(match[1]), headers, received[:length]))
        received = received[length:]
        if found[-1].status >= 400:
            documented(found[-1])
    return found


def documented(answer: Answer) -> None:
    """An error has our envelope, is short, and says nothing of the machine."""
    error = ErrorAnswer.model_validate_json(answer.content).error
    assert STATUS[error.code] == answer.status
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) <= 4096
    assert not LEAKS.search(answer.content), answer.content
    assert "server" not in answer.headers


def until_closed(connection: socket.socket) -> bytes:
    """Everything until the server hangs up; a reset counts as hanging up."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def push(connection: socket.socket, content: bytes) -> int:
    """Send until all is sent or the server hangs up; the number of bytes that went out."""
    sent = 0
    with suppress(ConnectionError):
        for start in range(0, len(content), 65536):
            piece = content[start : start + 65536]
            connection.sendall(piece)
            sent += len(piece)
    return sent


def talk(server: Live, content: bytes) -> list[Answer]:
    """Send bytes as they are; the answers that came until the server hung up."""
    with server.connect() as connection:
        push(connection, content)
        return answers(until_closed(connection))


# ---- the probe ----


@dataclass
class Probe:
    """What one client saw that did nothing but ask `/livez`."""

    seconds: list[float] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)


@contextmanager
def probed(server: Live) -> Iterator[Probe]:
    """Ask `/livez` all the time: it must answer, and never be kept waiting long."""
    probe, done = Probe(), threading.Event()

    def run() -> None:
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)) as connection:
            while not done.is_set() or not probe.seconds:
                started = time.monotonic()
                connection.request("GET", "/livez")
                response = connection.getresponse()
                response.read()
                probe.statuses.add(response.status)
                probe.seconds.append(time.monotonic() - started)
                done.wait(BETWEEN_PROBES_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield probe
    finally:
        done.set()
        thread.join()
    assert probe.statuses == {200}
    assert max(probe.seconds) < MOST_STALL_S
