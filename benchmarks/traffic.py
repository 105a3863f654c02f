"""Traffic for `load.py`, `soak.py` and `batching.py`: arrivals, requests, and a client that times bytes.

The client speaks HTTP/1.1 on raw sockets: on the two cores that it shares with the server, a client library's own
work would be part of what is measured. It runs in processes of its own, and its lateness is in every report.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

BOUNDARY = "gram-benchmark"
STALE_S = 2.0  # an idle connection older than this is not used again: the server may be closing it
PATIENCE_S = 180.0  # a request without an answer after this is lost
PIECE = 65_536


# ---- requests ----


@dataclass(frozen=True)
class Ask:
    """One request as bytes: sent in `pieces`, with `pause_s` between them, and given up after `cancel_s`."""

    kind: str
    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    cancel_s: float | None = None
    expected: tuple[int, ...] = (200,)


def get(path: str, kind: str) -> Ask:
    """A request without a body."""
    return Ask(kind, (f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(),))


def post(kind: str, media: str, body: bytes, **options: Any) -> Ask:
    """A classification with this body."""
    return Ask(kind, (head(media, f"Content-Length: {len(body)}") + body,), **options)


def head(media: str, length: str) -> bytes:
    """The header of a classification; `length` is the line that says how its body is delimited."""
    lines = ("POST /v1/classify HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {media}", length)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def classify(kind: str, photos: Sequence[bytes], question: dict[str, Any], **options: Any) -> Ask:
    """A form of images and one `request` part."""
    parts = [
        *(('name="image"; filename="x.jpg"', "image/jpeg", photo) for photo in photos),
        ('name="request"', "application/json", json.dumps(question).encode()),
    ]
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {media}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, media, data in parts
    )
    body += f"--{BOUNDARY}--\r\n".encode()
    return post(kind, f"multipart/form-data; boundary={BOUNDARY}", body, **options)


def slowly(ask: Ask, pieces: int, seconds: float) -> Ask:
    """The same request, its bytes spread over `seconds`."""
    whole = b"".join(ask.pieces)
    step = math.ceil(len(whole) / pieces)
    cut = tuple(whole[i : i + step] for i in range(0, len(whole), step))
    return replace(ask, pieces=cut, pause_s=seconds / len(cut))


def chunks(data: bytes) -> Iterator[bytes]:
    """A chunked body without its end: the last byte sent is the last of `data`."""
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        yield (b"\r\n" if start else b"") + f"{len(piece):x}\r\n".encode() + piece


# ---- the client ----


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are seconds on the machine's monotonic clock.

    `end` is `answered`, `cancelled` (we left before an answer came) or `lost` (neither). `sent` is when the last byte
    of the body was handed over, `started` when the first could have been, `at` when it should have been.
    """

    kind: str
    at: float
    started: float = 0.0
    sent: float = 0.0
    done: float = 0.0
    end: str = "lost"
    status: int = 0
    code: str = ""
    expected: bool = False
    level: int | None = None
    adaptation: Counter[str] = field(default_factory=Counter)
    plans: tuple[Any, ...] = ()
    digests: tuple[str, ...] = ()
    replay: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        """From the time when it should have been sent."""
        return 1000 * (self.done - self.at)

    @property
    def reject_ms(self) -> float:
        """From the last byte of the body; 0 where the answer was faster than the body."""
        return max(0.0, 1000 * (self.done - self.sent))

    def read(self, status: int, body: bytes) -> None:
        """Keep what is looked at later."""
        self.end, self.status = "answered", status
        if not body.startswith(b"{"):
            found = re.search(rb"^gram_brownout_level (\S+)", body, re.MULTILINE)
            self.level = int(float(found[1])) if found else None
            return
        answer = json.loads(body)
        self.code = answer.get("error", {}).get("code", "")
        if "results" in answer:
            did = [each["adaptation"] for each in answer["results"] if each["adaptation"]]
            self.adaptation = Counter("/".join(filter(None, (a["status"], a["reason"]))) for a in did)
            self.plans = tuple((a["status"], a["reason"], a["steps"], a["views"]) for a in did)
            self.digests = tuple(a["digest"] for a in did)
            self.replay = did[0].get("replay") if did else None
            self.level = answer["usage"]["brownout"]
            self.timings = answer["timings_ms"]


class Client:
    """Asks one server, over connections that are kept."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, ask: Ask, at: float | None = None) -> Outcome:
        """Send one request and wait for its answer, or leave; never raises for what the network does."""
        now = time.monotonic()
        outcome = Outcome(ask.kind, now if at is None else at, started=now, sent=now)
        patience = PATIENCE_S if ask.cancel_s is None else ask.cancel_s
        try:
            async with asyncio.timeout(patience):
                outcome.read(*await self._exchange(ask, outcome))
        except TimeoutError:
            outcome.end = "lost" if ask.cancel_s is None else "cancelled"
            outcome.done = time.monotonic()
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            outcome.code, outcome.done = type(error).__name__, time.monotonic()
        outcome.expected = outcome.status in ask.expected
        return outcome

    async def _exchange(self, ask: Ask, outcome: Outcome) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        answer = asyncio.ensure_future(_answer(reader))
        kept = False
        try:
            with suppress(ConnectionError):  # hung up on while sending: the answer may have come before that
                for n, piece in enumerate(ask.pieces):
                    if n:  # let the answer in: a server that refuses does not read the rest
                        await asyncio.wait({answer}, timeout=ask.pause_s)
                        if answer.done():
                            break
                    writer.write(piece)
                    await writer.drain()
                    outcome.sent = time.monotonic()
            status, keep, body = await answer
            outcome.done = time.monotonic()
            if kept := keep:
                self._idle.append((reader, writer, outcome.done))
            return status, body
        finally:
            answer.cancel()
            if not kept:
                writer.transport.abort()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since = self._idle.pop()
            if time.monotonic() - since < STALE_S and not reader.at_eof():
                return reader, writer
            writer.transport.abort()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        """Hang up."""
        for _, writer, _ in self._idle:
            writer.transport.abort()
        self._idle.clear()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """Status, whether the connection can be used again, body."""
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:] if line)
    body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    return int(lines[0].split()[1]), fields.get(b"connection") != b"close", body


# ---- traffic ----


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals of `rate` a second in [0, seconds): a Poisson number of independent uniform times."""
    rng = np.random.default_rng(seed)
    return [float(t) for t in np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))]


async def fire(url: str, plan: Sequence[tuple[float, Ask]], start: float) -> list[Outcome]:
    """Open loop: every request at `start` plus its own time, whatever became of those before."""
    client = Client(url)
    tasks = []
    for after, ask in plan:
        await asyncio.sleep(max(0.0, start + after - time.monotonic()))
        tasks.append(asyncio.create_task(client.ask(ask, start + after)))
    outcomes = await asyncio.gather(*tasks)
    client.close()
    return list(outcomes)


async def keep_asking(url: str, asks: Sequence[Ask], clients: int, seconds: float, least: int = 1) -> list[Outcome]:
    """Closed loop: `clients` that each ask again once they are answered, for `seconds` and `least` times or more."""
    client, turn, end = Client(url), count(), time.monotonic() + seconds
    outcomes: list[Outcome] = []

    async def one() -> None:
        for asked in count():
            if asked >= least and time.monotonic() >= end:
                return
            outcomes.append(await client.ask(asks[next(turn) % len(asks)]))

    await asyncio.gather(*(one() for _ in range(clients)))
    client.close()
    return outcomes


def run_fire(url: str, plan: Sequence[tuple[float, Ask]], start: float) -> list[Outcome]:
    """`fire`, for a process of its own."""
    return asyncio.run(fire(url, plan, start))


def run_keep_asking(url: str, asks: Sequence[Ask], clients: int, seconds: float, least: int = 1) -> list[Outcome]:
    """`keep_asking`, likewise."""
    return asyncio.run(keep_asking(url, asks, clients, seconds, least))


def processes(number: int) -> ProcessPoolExecutor:
    """Fresh processes for generators and probes."""
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))
