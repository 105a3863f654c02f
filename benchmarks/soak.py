"""A long run against the real server over HTTP: is memory flat, is anything lost, do answers stay the same?

    python benchmarks/soak.py [--minutes 15 | --hours 2] [--out FILE] [-- FLAGS OF THE SERVER]

A closed loop of clients sends 70 % good requests, 10 % bad ones, 10 % that are given up, 5 % that are too large and 5 %
whose body comes slowly (`assortment.py`), in an order drawn by a seed. A tenth of the time is warm-up. Before and after
the rest the server is left alone until it is idle, and its descriptors, threads and device memory are counted. Every
Nth good answer is asked for again: by its replay token where it has one, else by the same request, compared where the
plan was the same. The text cache is kept so small that it is full, and turning over, when the warm-up ends; bodies are
bounded at 4 MiB, so that memory held for a moment does not hide memory that is kept. Prints one JSON object; exit code
1 where a criterion is not met. Whether memory grows by 64 MiB in a million requests takes tens of thousands of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.assortment import SHARES, Requests, with_token
from benchmarks.figures import criterion, facts, scrape, theil_sen, total, wait_until_idle
from benchmarks.throughput import photographs
from benchmarks.traffic import Ask, Client, Outcome, processes
from examples.demo import server_process

TEXT_CACHE_BYTES = 2**21
FLAGS = (f"--text-cache-bytes={TEXT_CACHE_BYTES}", f"--max-body-bytes={2**22}", f"--max-image-bytes={2**21}")
SLOPE_MIB, DECILE_MIB = 64.0, 32.0
SAMPLE_S = 1.0
BLOCKS = 60  # of samples; the slope is that of their medians, which depend on each other less than samples do
MIB = 2**20


# ---- traffic, in a process of its own ----


@dataclass
class Tally:
    """What became of a phase: counts, the time of every end, and what the replays said."""

    ends: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: Counter[tuple[str, int]] = field(default_factory=Counter)
    adaptation: Counter[str] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one request; 429 is an answer that may be expected of any."""
        self.ends[outcome.end] += 1
        self.times.append(outcome.done)
        if outcome.end == "answered":
            self.answers[outcome.kind, outcome.status] += 1
            self.adaptation.update(outcome.adaptation)
            if not outcome.expected and outcome.status != 429:
                self.unexpected[outcome.kind, outcome.status] += 1


async def soak(url: str, requests: Requests, clients: int, seconds: float, every: int) -> Tally:
    """`clients` keep asking for `seconds`; every `every`th good answer is asked for again."""
    client, tally, stream, end = Client(url), Tally(), iter(requests), time.monotonic() + seconds
    good = 0

    async def one() -> None:
        nonlocal good
        while time.monotonic() < end:
            ask = next(stream)
            outcome = await client.ask(ask)
            tally.add(outcome)
            if outcome.kind == "good" and outcome.status == 200:
                good += 1
                if good % every == 0:
                    tally.replays[await replay(client, ask, outcome)] += 1

    await asyncio.gather(*(one() for _ in range(clients)))
    client.close()
    return tally


async def replay(client: Client, ask: Ask, before: Outcome) -> str:
    """`equal` or `different`; `other plan` where nothing can be compared, `unanswered` where nothing came."""
    if before.replay is not None:
        ask = with_token(ask, before.replay)
    after = await client.ask(ask)
    if after.status != 200:
        return "unanswered"
    if before.replay is None and after.plans != before.plans:
        return "other plan"
    return "equal" if after.digests == before.digests else "different"


def run_soak(url: str, seed: int, clients: int, seconds: float, every: int) -> Tally:
    """`soak`, for a process of its own."""
    limits = httpx.get(f"{url}/info", trust_env=False).json()["limits"]
    return asyncio.run(soak(url, Requests(photographs(96), limits, seed), clients, seconds, every))


# ---- the server, from outside ----


def rss_mib(pid: int) -> float:
    """Resident memory."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def at_rest(url: str, pid: int) -> dict[str, Any]:
    """Descriptors, threads and device memory of the idle server, once its connections have gone."""
    wait_until_idle(url)
    end, seen = time.monotonic() + 15.0, [-1, -2, -3]
    while len(set(seen[-3:])) > 1 and time.monotonic() < end:  # our own connections are closing
        time.sleep(0.2)
        seen.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
    return {
        "descriptors": seen[-1],
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
        "device_bytes": total(scrape(url), "gram_device_memory_bytes"),
    }


class Watch:
    """Samples the server's memory every second, on a thread."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.samples.append((time.monotonic(), rss_mib(self._pid)))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


# ---- the report ----


def memory(samples: Sequence[tuple[float, float]], times: Sequence[float], warm: float) -> dict[str, Any]:
    """Slope after `warm`, and the median of the last tenth of the run less that of the second."""
    done = np.sort(np.asarray(times))
    kept = [(np.searchsorted(done, t) / 1e6, mib) for t, mib in samples if t >= warm]
    blocks = [np.median(part, axis=0) for part in np.array_split(kept, min(BLOCKS, len(kept)))]
    slope = theil_sen(*np.transpose(blocks))
    tenths = np.array_split([mib for _, mib in samples], 10)
    return {
        "slope_mib_per_million": [round(each, 1) for each in slope],
        "decile_difference_mib": round(float(np.median(tenths[-1]) - np.median(tenths[1])), 2),
        "rss_mib": {"first": round(samples[0][1], 1), "median": round(statistics.median(m for _, m in samples), 1),
                    "last": round(samples[-1][1], 1), "max": round(max(m for _, m in samples), 1)},
        "samples": len(kept),
        "curve": [[round(1e6 * millions), round(mib, 1)] for millions, mib in blocks],
    }  # fmt: skip


def verdict(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The criteria of the soak programme."""
    flat, (before, after) = report["memory"], report["at_rest"]
    cache, bound, intact = report["text_cache_bytes"], report["text_cache_bound"], report["weights_intact"]
    replays = report["replays"]
    compared = replays.get("equal", 0) + replays.get("different", 0)
    slope, gap = flat["slope_mib_per_million"], flat["decile_difference_mib"]
    flat_enough = True if slope[0] < SLOPE_MIB else False if slope[1] >= SLOPE_MIB else None  # None: run longer
    lines = [
        criterion(f"memory grows by less than {SLOPE_MIB:g} MiB per million requests", slope, flat_enough),
        criterion(f"last tenth less second tenth below {DECILE_MIB:g} MiB", gap, gap < DECILE_MIB),
    ]
    for what in ("descriptors", "threads", "device_bytes"):
        pair = [before[what], after[what]]
        lines.append(criterion(f"{what} at rest equal", pair, None if None in pair else pair[0] == pair[1]))
    return [
        *lines,
        criterion("text cache within its bound", [cache, bound], None if cache is None else cache <= bound),
        criterion("weights intact", intact, None if intact is None else intact == 1),
        criterion("replayed answers equal", replays, not replays.get("different") if compared else None),
        criterion("every answer is the documented one", report["unexpected"], not report["unexpected"]),
        criterion("nothing lost", report["lost"], report["lost"] == 0),
    ]


def measure(url: str, pid: int, given: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Warm up, rest, run, rest."""
    seconds = 3600 * given.hours if given.hours else 60 * given.minutes
    phase = (given.clients, 0.1 * seconds, given.every), (given.clients, 0.9 * seconds, given.every)
    with Watch(pid) as watch:
        warm_up = pool.submit(run_soak, url, given.seed, *phase[0]).result()
        rest = [at_rest(url, pid)]
        warm = time.monotonic()
        tally = pool.submit(run_soak, url, given.seed + 1, *phase[1]).result()
        rest.append(at_rest(url, pid))
    metrics = scrape(url)
    paths = httpx.get(f"{url}/openapi.json", trust_env=False).json()["paths"]
    both = warm_up.ends + tally.ends
    answers = warm_up.answers + tally.answers
    return {
        "requests": both.total(),
        "seconds": round(seconds, 1),
        "ends": dict(both),
        "lost": both["lost"],
        "answers": {f"{kind}: {status}": n for (kind, status), n in sorted(answers.items())},
        "unexpected": {f"{k}: {s}": n for (k, s), n in (warm_up.unexpected + tally.unexpected).items()},
        "adaptation": dict(warm_up.adaptation + tally.adaptation),
        "replays": dict(warm_up.replays + tally.replays),
        "memory": memory(watch.samples, warm_up.times + tally.times, warm),
        "at_rest": rest,
        "text_cache_bytes": total(metrics, "gram_text_cache_bytes"),
        "text_cache_bound": TEXT_CACHE_BYTES,
        "weights_intact": total(metrics, "gram_weights_intact"),
        "class_sets": "not covered yet" if "/v1/class-sets" in paths else "the server has no such route: skipped",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--hours", type=float, help="instead of --minutes")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every", type=int, default=1000, help="good answers from one replay to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("server", nargs="*", help="after --: flags for the server")
    given = parser.parse_args()
    flags = [*FLAGS, *given.server]
    with (
        tempfile.TemporaryDirectory() as scratch,
        server_process(Path(scratch) / "server.txt", flags) as (url, process),
        processes(1) as pool,
    ):
        report = {"benchmark": "soak", **facts(url), "flags": flags, "clients": given.clients, "seed": given.seed}
        report |= {"shares": SHARES, "replay_every": given.every, **measure(url, process.pid, given, pool)}
    report["verdict"] = verdict(report)
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)
    return int(any(line["passed"] is False for line in report["verdict"]))


if __name__ == "__main__":
    sys.exit(main())
