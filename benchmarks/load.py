"""Open-loop load on the real server over HTTP: latency, goodput and what is shed at 0.5, 0.9, 1.5 and 3 times capacity.

    python benchmarks/load.py [--mix NAME ...] [--seconds 60] [--out FILE] [--url URL] [-- FLAGS OF THE SERVER]

Arrivals are Poisson and drawn before a rate starts; latency counts from the scheduled time, so that a request that
waits for a slow server to take it is not forgiven. Requests come from one process, `/livez` and the brown-out level are
asked from another, all the time. Capacity C is found by a closed loop with 1, 2, 4, 8 and 16 clients: C is the most
requests a second at which nothing was refused and nothing browned out; the doubling ends where something is. After
three times C come five seconds of silence, then 0.5 C once more. Prints one JSON object; exit code 1 where a criterion
of `verdict.py` is not met.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.figures import facts, scrape, spread, stolen_s, total, wait_until_idle
from benchmarks.throughput import photographs
from benchmarks.traffic import Ask, classify, get, processes, run_fire, run_keep_asking, schedule
from benchmarks.verdict import RATES, RECOVERY_S, level_zero_s, summary, verdict
from examples.demo import CLASSES, server_process

CLIENTS = (1, 2, 4, 8, 16)
PROBE_S, LEVEL_S = 0.02, 1.0
CANCEL_S = 0.5  # a client that leaves does so within this time, uniformly
VARIANTS = 200  # distinct requests of a mix


@dataclass(frozen=True)
class Mix:
    """A kind of traffic: how many images and classes, what adaptation, how many requests are bad or given up."""

    images: tuple[int, int]
    classes: int = 10
    adaptation: dict[str, Any] = field(default_factory=dict)
    bad: float = 0.0
    cancelled: float = 0.0


MIXES = {
    "zero-shot": Mix((1, 4), adaptation={"method": "none"}),
    "default": Mix((8, 8)),
    "per-image": Mix((1, 1), adaptation={"method": "tpt", "scope": "image", "views": 16}),
    "1000-classes": Mix((8, 8), classes=1000),
    "mixed": Mix((8, 8), bad=0.1, cancelled=0.05),
}


def requests(mix: Mix, photos: Sequence[bytes], seed: int) -> list[Ask]:
    """Distinct requests of a mix, in the order in which they are sent; a bad one ends in half an image."""
    rng = np.random.default_rng(seed)
    names = (CLASSES + [f"thing {i}" for i in range(mix.classes)])[: mix.classes]
    question = {"classes": names, "adaptation": mix.adaptation}
    bad, leaving = (set(rng.choice(VARIANTS, round(share * VARIANTS), False)) for share in (mix.bad, mix.cancelled))
    made = []
    for n in range(VARIANTS):
        size = int(rng.integers(mix.images[0], mix.images[1] + 1))
        chosen = [photos[k] for k in rng.choice(len(photos), size, False)]
        if n in bad:
            chosen[-1] = chosen[-1][: len(chosen[-1]) // 2]
        ask = classify("bad" if n in bad else "good", chosen, question, expected=(422,) if n in bad else (200,))
        made.append(replace(ask, cancel_s=float(rng.uniform(0.0, CANCEL_S))) if n in leaving else ask)
    return made


def capacity(url: str, asks: Sequence[Ask], seconds: float, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """See the module: a closed loop of more and more clients."""
    steps: list[dict[str, Any]] = []
    service_ms = 0.0
    for clients in CLIENTS:
        probing = pool.submit(run_fire, url, probes_for(seconds), time.monotonic())
        outcomes = pool.submit(run_keep_asking, url, asks, clients, seconds).result()
        probing.result()
        wait_until_idle(url)
        wall = max(o.done for o in outcomes) - min(o.at for o in outcomes)
        good = [o for o in outcomes if o.status == 200]
        if clients == 1:
            service_ms = statistics.median(o.ms for o in good)
        steps.append(
            {
                "clients": clients,
                "requests_per_s": round(len(outcomes) / wall, 3),
                "good_per_s": round(len(good) / wall, 3),
                "refused": sum(o.status in (429, 503, 504) for o in outcomes),
                "browned_out": sum(bool(o.level) for o in good),
            }
        )
        if steps[-1]["refused"] or steps[-1]["browned_out"]:
            break
    clean = [s for s in steps if not s["refused"] and not s["browned_out"]] or steps[:1]
    best = max(clean, key=lambda s: s["requests_per_s"])
    return {
        "per_s": best["requests_per_s"],
        "clients": best["clients"],
        "service_ms": round(service_ms, 1),
        "steps": steps,
    }


def measure(
    url: str, asks: Sequence[Ask], rate: float, seconds: float, seed: int, pool: ProcessPoolExecutor, tail: float = 0.0
) -> dict[str, Any]:
    """One rate for `seconds`, then silence; probes go on for `tail` seconds of it."""
    plan = [(at, asks[n % len(asks)]) for n, at in enumerate(schedule(rate, seconds, seed))]
    before, stolen, start = _counted(url), stolen_s(), time.monotonic() + 1.0
    probing = pool.submit(run_fire, url, probes_for(seconds + tail), start)
    outcomes, probes = pool.submit(run_fire, url, plan, start).result(), probing.result()
    stolen = (stolen_s() - stolen) / (time.monotonic() - start + 1.0)
    wait_until_idle(url)
    counted = {code: int(n - before.get(code, 0)) for code, n in _counted(url).items() if n > before.get(code, 0)}
    alive = [o for o in probes if o.kind == "livez" and o.at < start + seconds]
    told, recovery = level_zero_s(probes, start + seconds)
    return {
        "rate": round(rate, 3),
        "seconds": seconds,
        **summary(outcomes, start, seconds),
        "counted": counted,
        "stolen_cores": round(stolen, 2),
        "livez_ms": {**spread([o.ms for o in alive]), "failed": sum(o.status != 200 for o in alive)},
        "level_told": told,
        "level_zero_s": recovery,
    }


def probes_for(seconds: float) -> list[tuple[float, Ask]]:
    """What is asked beside the load: whether the server lives, and its level of brown-out."""
    asked = [(PROBE_S * n, get("/livez", "livez")) for n in range(int(seconds / PROBE_S))]
    asked += [(LEVEL_S * n, get("/metrics", "metrics")) for n in range(int(seconds / LEVEL_S))]
    return sorted(asked, key=lambda each: each[0])


def _counted(url: str) -> dict[str, float]:
    metrics = scrape(url)
    mine = [labels for labels, _ in metrics.get("gram_requests_total", []) if labels["route"] == "/v1/classify"]
    return {labels["code"]: total(metrics, "gram_requests_total", **labels) or 0.0 for labels in mine}


def run(
    url: str, name: str, photos: Sequence[bytes], given: argparse.Namespace, pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """Everything of one mix."""
    mix, seed = MIXES[name], given.seed + 1000 * list(MIXES).index(name)
    asks = requests(mix, photos, seed)
    limit = capacity(url, asks, max(2.0, given.seconds / 8), pool)
    rows = []
    for n, factor in enumerate(RATES):
        tail = RECOVERY_S if factor == RATES[-1] else 0.0
        rows.append(
            {"factor": factor, **measure(url, asks, factor * limit["per_s"], given.seconds, seed + n, pool, tail)}
        )
    after = measure(url, asks, RATES[0] * limit["per_s"], given.seconds / 2, seed + len(RATES), pool)
    return {"mix": asdict(mix), "capacity": limit, "rates": rows, "after": after}


@contextmanager
def target(given: argparse.Namespace) -> Iterator[str]:
    """The server to ask: the one named, or one of our own."""
    if given.url:
        yield given.url.rstrip("/")
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        server_process(Path(scratch) / "server.txt", given.server) as (url, _),
    ):
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--seconds", type=float, default=60.0, help="per rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs already, instead of one of our own")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("server", nargs="*", help="after --: flags for our own server")
    given = parser.parse_args()
    photos = photographs(96)
    with target(given) as url, processes(2) as pool:
        list(pool.map(time.sleep, [0.5, 0.5]))  # both are there before the first request is due
        report = {
            "benchmark": "load",
            **facts(url),
            "flags": given.server,
            "seconds": given.seconds,
            "seed": given.seed,
        }
        report["image"] = "256-pixel JPEG"
        report["mixes"] = {}
        for name in given.mix:
            found = run(url, name, photos, given, pool)
            report["mixes"][name] = {**found, "verdict": verdict(found, report["queue_seconds"])}
            sys.stderr.write(f"{name}: C = {found['capacity']['per_s']} requests/s\n")
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)
    lines = [line for found in report["mixes"].values() for line in found["verdict"]]
    return int(any(line["passed"] is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
