"""`gram bench`: open-loop load on a running server, Poisson arrivals whatever becomes of the requests before.

Every request is timed from when it should have been sent, so a server that falls behind can't slow the load down.
The client shares its machine's cores with whatever else runs there; `late_ms` says how far it fell behind itself.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from server.client import AsyncGramClient

KINDS = 16  # synthetic images


@dataclass(frozen=True)
class Outcome:
    """One request; `status` 0 without an answer, times in milliseconds."""

    status: int
    ms: float
    late_ms: float
    images: int


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds of a Poisson process of `rate` a second in [0, seconds)."""
    chance, now, times = random.Random(seed), 0.0, list[float]()
    while (now := now + chance.expovariate(rate)) < seconds:
        times.append(now)
    return times


def synthetic(side: int, seed: int = 0) -> list[bytes]:
    """Seeded JPEGs of `side` pixels."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(KINDS):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


async def fire(
    client: AsyncGramClient,
    pictures: Sequence[bytes],
    question: dict[str, Any],
    *,
    rate: float,
    seconds: float,
    batch: int = 1,
    timeout_s: float = 60.0,
    seed: int = 0,
) -> list[Outcome]:
    """Send requests of `batch` images at random times for `seconds`; one outcome for each, in order of arrival."""
    form = ("request", (None, json.dumps(question), "application/json"))
    start = time.monotonic()

    async def one(number: int, at: float) -> Outcome:
        began = time.monotonic()
        chosen = [pictures[(number * batch + n) % len(pictures)] for n in range(batch)]
        files: list[Any] = [("image", ("image", data, "application/octet-stream")) for data in chosen]
        try:
            async with asyncio.timeout(timeout_s):  # never sent again: a retry would hide what is measured
                status = (await client.post("/v1/classify", files=[*files, form], timeout=None)).status_code
        except (TimeoutError, httpx.TransportError):
            status = 0
        due = start + at
        return Outcome(status, 1000 * (time.monotonic() - due), 1000 * (began - due), batch)

    tasks = []
    for number, at in enumerate(arrivals(rate, seconds, seed)):
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        tasks.append(asyncio.create_task(one(number, at)))
    return list(await asyncio.gather(*tasks))


def report(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Percentiles of answered requests in milliseconds, and what became of all of them; None where nothing is there."""
    good = [outcome.ms for outcome in outcomes if outcome.status == 200]
    statuses = Counter(str(outcome.status) if outcome.status else "no answer" for outcome in outcomes)
    cut = {f"p{q}_ms": round(float(np.percentile(good, q)), 1) if good else None for q in (50, 95, 99)}
    late = [outcome.late_ms for outcome in outcomes]
    return {
        "requests": len(outcomes),
        "offered_per_s": round(len(outcomes) / seconds, 2),
        "goodput_per_s": round(len(good) / seconds, 2),
        "images_per_s": round(sum(o.images for o in outcomes if o.status == 200) / seconds, 2),
        **cut,
        "refused_429": statuses["429"],
        "statuses": dict(sorted(statuses.items())),
        "late_ms": round(float(np.percentile(late, 99)), 1) if late else None,
    }
