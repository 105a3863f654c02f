"""Pixels being decoded are bounded, and so are those that wait."""

from __future__ import annotations

import asyncio
import random

import pytest

from server.decoding import Gate
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import Settings


def gate(pixels: int, **settings: object) -> Gate:
    return Gate(Settings(decode_inflight_pixels=pixels, **settings), Metrics())  # type: ignore[arg-type]


def test_no_more_is_held_than_allowed_and_everyone_has_a_turn_in_order() -> None:
    it, rng, order, most = gate(100), random.Random(0), [], [0]

    async def one(number: int, pixels: int) -> None:
        async with it.hold(pixels):
            order.append(number)
            most[0] = max(most[0], it.held)
            assert it.held <= 100 or it.held == pixels  # one that is too large goes alone
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(n, rng.choice([10, 40, 60, 500])) for n in range(200)))

    asyncio.run(all_of_them())
    assert order == sorted(order)
    assert it.held == 0
    assert most[0] == 500


def test_leaving_the_line_gives_everything_back() -> None:
    async def storm() -> None:
        it, rng = gate(100), random.Random(1)

        async def one() -> None:
            async with it.hold(rng.randint(1, 90)):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one()) for _ in range(300)]
        for _ in range(40):
            await asyncio.sleep(0)
            for task in rng.sample(tasks, 8):
                task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ended} == {type(None), asyncio.CancelledError}
        assert it.held == 0
        assert not it._line

    asyncio.run(storm())


def test_what_waits_is_bounded_by_seconds_of_measured_decoding() -> None:
    it = gate(10**9, decode_threads=2, queue_seconds=4.0)
    with it.room(10**6), it.room(10**6):  # nothing was measured yet
        pass
    it.took(1000, 1.0)
    assert it.rate == pytest.approx(2000)
    with it.room(10**6):  # whatever is within the limits enters an empty line
        with pytest.raises(ApiError) as refused, it.room(1):
            pass
        assert (refused.value.code, refused.value.retry_after) == ("overloaded", 30)
    with it.room(7999), it.room(1):
        pass
    assert it.waiting == 0
