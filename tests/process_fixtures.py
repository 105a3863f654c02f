"""Servers in processes of their own, whose log and exit code can be looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_fixtures import until

ROOT = Path(__file__).parents[1]


@dataclass
class Process:
    """A server in a process of its own; its log goes to a file, so that nobody has to keep reading it."""

    popen: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; every line of it is one JSON object."""
        complete, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def url(self) -> str:
        def ports() -> list[int]:
            return [entry["port"] for entry in self.lines() if entry["event"] == "listening"]

        until(lambda: ports() or self.popen.poll() is not None, "it listens", patience_s=60)
        return f"http://127.0.0.1:{ports()[0]}"

    def ended(self, code: int) -> str:
        """Wait for the end; the last line says why."""
        assert self.popen.wait(60) == code
        last = self.lines()[-1]
        assert last["code"] == code
        return str(last["event"])

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Once it is ready."""
        with httpx.Client(base_url=self.url(), trust_env=False, timeout=30) as client:
            until(lambda: client.get("/readyz").status_code == 200, "it is ready", patience_s=60)
            yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start processes that are gone after the test, whatever happens in it."""
    with ExitStack() as stack:

        def one(*command: str, **environ: str) -> Process:
            log = tmp_path / f"{len(list(tmp_path.iterdir()))}.log"
            environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAM_")}
            environment |= {"OMP_NUM_THREADS": "1", **environ}
            with log.open("wb") as file:
                popen = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=file)
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            return Process(popen, log)

        yield one
