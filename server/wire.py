"""uvicorn's HTTP/1.1 protocol with the bounds it lacks: bytes and seconds of a header, connections, slow readers.

uvicorn keeps whatever header arrives, however long and however slowly (its issue 157). Everything behind the header is
bounded in `server.ingress`. The members of uvicorn that are used here are named in `tests/test_wire.py`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError
from server.settings import Settings

MAX_PIPELINED = 100  # requests behind the one that is being answered; all in one read would hold the loop
MAX_TINY_CHUNKS = 4096  # of a body; the others must have TINY bytes on average: likewise
TINY = 64

log = logging.getLogger("server.wire")


class HungUp(Exception):
    """Raised inside the parser, which ends the connection."""


class Protocol(HttpToolsProtocol):
    """One connection. What is not HTTP, too long, or too slow to say what it wants, is answered and hung up on."""

    limits: ClassVar[Settings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heading = True  # between requests, or inside a header
        self._fed = 0  # bytes since a header or a piece of a body was complete: the parser holds them
        self._listed = 0  # bytes of its lines
        self._chunks = 0  # of the body so far
        self._chunked = 0  # bytes in them
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Too many connections are told so; the others have a header's time to begin."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._hang_up(ApiError("overloaded", "this server has as many connections as it may. Try again later."))
            return
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Timers of a connection end with it."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and hang up when a header grows too long."""
        if self.transport.is_closing():
            return
        if self._heading:
            self._expect_header()
        self._fed += len(data)
        super().data_received(data)
        if self._fed > self.limits.max_header_bytes and not self.transport.is_closing():
            self._hang_up(self._too_long())

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a line."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the app bounds what arrives."""
        super().on_headers_complete()
        self._heading, self._fed, self._listed = False, 0, 0
        self._chunks = self._chunked = 0
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        if len(self.pipeline) > MAX_PIPELINED:
            raise HungUp

    def on_chunk_header(self) -> None:
        """A body in crumbs costs as much time as a large one; bytes and seconds alone do not bound it."""
        self._chunks += 1
        if self._chunked < TINY * (self._chunks - MAX_TINY_CHUNKS):
            raise HungUp

    def on_body(self, body: bytes) -> None:
        """What is not body from here on is a chunk's header or a trailer, as long as a header at most."""
        self._fed = 0
        self._chunked += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next bytes are another header's."""
        super().on_message_complete()
        self._heading = True

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused with our envelope; `msg` is uvicorn's own sentence."""
        if self._listed > self.limits.max_header_bytes:
            self._hang_up(self._too_long())
        else:
            log.debug(msg)
            self._hang_up(ApiError("malformed_body", "the request is not HTTP/1.1."))

    def pause_writing(self) -> None:
        """The client reads slower than it is answered: it has as long as it would have for a body."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _expect_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._late)

    def _late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._hang_up(ApiError("body_timeout", "the header did not arrive in time (GRAM_HEADER_TIMEOUT_S)."))
        else:  # a pipelined header behind a request that is being answered: leave that answer alone
            self.transport.pause_reading()

    def _count(self, size: int) -> None:
        self._listed += size
        if self._listed > self.limits.max_header_bytes:
            raise HungUp

    def _too_long(self) -> ApiError:
        return ApiError("malformed_body", f"the header has more than {self.limits.max_header_bytes} bytes.")

    def _hang_up(self, error: ApiError) -> None:
        self._cancel_timers()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # words of ours would be taken for the answer that is still to come
            return
        body = error.envelope("")
        lines = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **error.headers}.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn is to run the app."""
    return uvicorn.Config(
        app,
        http=type("BoundedProtocol", (Protocol,), {"limits": settings}),
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.drain_s,
        backlog=settings.max_connections,
    )
