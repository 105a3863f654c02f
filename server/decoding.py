"""How many pixels are decoded at once, and how many may wait for it.

Used from the event loop only; the decoding itself happens in a pool of threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from server.errors import ApiError
from server.metrics import Metrics
from server.settings import Settings

FORGET = 0.95  # weight of the past in the measured rate, per image


class Gate:
    """First come, first served, within `GRAM_DECODE_INFLIGHT_PIXELS`; an image larger than that goes alone.

    Attributes:
        held: pixels being decoded now; waiting: pixels that were let in and are not decoded yet.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.held = 0
        self.waiting = 0
        self._limit = settings.decode_inflight_pixels
        self._threads = settings.decode_threads
        self._queue_seconds = settings.queue_seconds
        self._metrics = metrics
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()
        self._spent = (0.0, 0.0)  # pixels, seconds of a thread

    @property
    def rate(self) -> float | None:
        """Pixels a second, all threads together; None before the first."""
        pixels, seconds = self._spent
        return self._threads * pixels / seconds if seconds > 0 else None

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Let one request's images wait, or raise 429 where more wait than `GRAM_QUEUE_SECONDS` are enough for."""
        rate = self.rate
        if self.waiting and rate is not None and self.waiting + pixels > self._queue_seconds * rate:
            self._metrics.rejected.labels("queue").inc()
            wait_s = max(1, min(30, round(self.waiting / rate)))
            raise ApiError("overloaded", "too many images wait to be decoded. Try again later.", retry_after=wait_s)
        self.waiting += pixels
        try:
            yield
        finally:
            self.waiting -= pixels

    @asynccontextmanager
    async def hold(self, pixels: int) -> AsyncIterator[None]:
        """Wait for a turn to decode an image."""
        if self._line or not self._fits(pixels):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._line.append((turn, pixels))
            try:
                await turn  # whoever ends it has taken the pixels already
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(pixels)
                else:
                    with suppress(ValueError):  # it may have been passed over already
                        self._line.remove((turn, pixels))
                    self._call()
                raise
        else:
            self.held += pixels
        try:
            yield
        finally:
            self._give_back(pixels)

    def took(self, pixels: int, seconds: float) -> None:
        """One image was decoded."""
        self._spent = FORGET * self._spent[0] + pixels, FORGET * self._spent[1] + seconds

    def _fits(self, pixels: int) -> bool:
        return self.held == 0 or self.held + pixels <= self._limit

    def _give_back(self, pixels: int) -> None:
        self.held -= pixels
        self._call()

    def _call(self) -> None:
        while self._line and (self._line[0][0].done() or self._fits(self._line[0][1])):
            turn, pixels = self._line.popleft()
            if not turn.done():
                self.held += pixels
                turn.set_result(None)
