"""What answering several requests in one run of the classifier is worth: batched over one-by-one throughput, over HTTP.

    python benchmarks/batching.py [--mode NAME ...] [--clients 8 32] [--repeats 6] [--out FILE] [-- FLAGS OF BOTH]

Two servers of this checkout run side by side: one with `--max-batch-cost=1 --text-group=1`, which makes every run one
request and fills no pass up for company, one with the defaults. They are asked in turn, A B B A, by the same closed
loop; whichever is not asked has nothing to do. Every request has its own images, all share one class set. Both have a
long queue and no brown-out, so that all requests get the same work. Throughput leaves out as many answers as there are
clients: it is what comes after, over its time. The ratio is that of medians over repeats; its interval is of the sign
test over pairs of repeats and needs six of them for 95 %. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.figures import facts, known_flags, scrape, total, wait_until_idle
from benchmarks.throughput import photographs
from benchmarks.traffic import Ask, Outcome, classify, processes, run_keep_asking
from examples.demo import CLASSES, server_process

TPT = {"method": "tpt", "scope": "image"}
MODES: dict[str, tuple[int, int, dict[str, Any]]] = {  # images, classes, adaptation
    "zero-shot, 1 image, 10 classes": (1, 10, {"method": "none"}),
    "tpt, 1 image, 16 views, 10 classes": (1, 10, {**TPT, "views": 16}),
    "tpt, 1 image, 16 views, 100 classes": (1, 100, {**TPT, "views": 16}),
    "tpt, 1 image, 64 views, 10 classes": (1, 10, {**TPT, "views": 64}),
    "tpt, 1 image, 64 views, 100 classes": (1, 100, {**TPT, "views": 64}),
    "infomax, coop host, 8 images, 10 classes": (8, 10, {"method": "infomax", "scope": "batch", "host": "coop"}),
    "gram (default), 8 images, 10 classes": (8, 10, {}),
}
SAME_WORK = ("--brownout=off", "--queue-seconds=600", "--timeout-ms=120000")
ONE = ("--max-batch-cost=1", "--text-group=1")
LEAST = 2  # answers of every client


def requests(mode: str, photos: Sequence[bytes]) -> list[Ask]:
    """Requests that share their classes and nothing else."""
    images, classes, adaptation = MODES[mode]
    names = (CLASSES + [f"thing {i}" for i in range(classes)])[:classes]
    question = {"classes": names, "adaptation": adaptation}
    rng = np.random.default_rng(0)
    return [
        classify("good", [photos[k] for k in rng.choice(len(photos), images, False)], question)
        for _ in range(len(photos))
    ]


def throughput(outcomes: Sequence[Outcome], clients: int) -> float:
    """Answers a second, from the moment when as many have come as there are clients.

    Exact for answers that come one after the other and for answers that come together.
    """
    done = sorted(o.done for o in outcomes)
    return (len(done) - clients) / (done[-1] - done[clients - 1])


def measure(url: str, asks: Sequence[Ask], clients: int, seconds: float, pool: ProcessPoolExecutor) -> dict[str, float]:
    """One block on one server; every request must have been answered with all that it asked for."""
    before = total(scrape(url), "gram_batches_total") or 0.0
    outcomes = pool.submit(run_keep_asking, url, asks, clients, seconds, LEAST).result()
    wait_until_idle(url)
    runs = (total(scrape(url), "gram_batches_total") or 0.0) - before
    if poor := [o for o in outcomes if o.status != 200 or o.level]:
        raise SystemExit(f"{len(poor)} of {len(outcomes)} requests were refused or browned out, first: {poor[0]}")
    return {
        "per_s": throughput(outcomes, clients),
        "p50_ms": statistics.median(o.ms for o in outcomes),
        "requests_per_run": len(outcomes) / runs if runs else float("nan"),
    }


def ratio(one: Sequence[float], batched: Sequence[float]) -> dict[str, float]:
    """Of medians; the interval is of the sign test on the ratios of pairs, which were measured side by side.

    It supposes no distribution: the median of n values lies outside all of them with a chance of 2 / 2^n.
    """
    pairs = sorted(b / a for a, b in zip(one, batched, strict=True))
    out, cut, tail = 0.0, 0, 0.0
    for k in range(len(pairs) // 2 + 1):  # give up values at both ends while 95 % are left
        tail += 2 * math.comb(len(pairs), k) / 2 ** len(pairs)
        if k and tail > 0.05:
            break
        out, cut = tail, k
    return {
        "ratio": round(statistics.median(batched) / statistics.median(one), 3),
        "low": round(pairs[cut], 3),
        "high": round(pairs[-1 - cut], 3),
        "coverage": round(1 - out, 3),
    }


def compare(
    urls: dict[str, str], asks: Sequence[Ask], clients: int, given: argparse.Namespace, pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """Both servers in turn, the other one first in every second repeat."""
    for url in urls.values():
        pool.submit(run_keep_asking, url, asks, 2, 0.0, 1).result()
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for repeat in range(given.repeats):
        for name in sorted(urls, reverse=bool(repeat % 2)):
            blocks[name].append(measure(urls[name], asks, clients, given.seconds, pool))
    per_s = {name: [block["per_s"] for block in mine] for name, mine in blocks.items()}
    return {
        "clients": clients,
        **ratio(per_s["one"], per_s["batched"]),
        **{
            name: {what: round(statistics.median(block[what] for block in mine), 2) for what in mine[0]}
            for name, mine in blocks.items()
        },
        "repeats": {name: [round(x, 3) for x in values] for name, values in per_s.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help=f"per block; every client has {LEAST} answers or more"
    )
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("server", nargs="*", help="after --: flags for both servers, as --decode-threads 2")
    given = parser.parse_args()
    known = known_flags()
    missing = [flag for flag in (*SAME_WORK, *ONE) if flag.partition("=")[0] not in known]
    both = [*(flag for flag in SAME_WORK if flag not in missing), *given.server]
    servers = {"one": [*both, *(flag for flag in ONE if flag not in missing)], "batched": both}
    if missing:
        sys.stderr.write(f"this server has no {', '.join(missing)}: the figures don't compare what they should\n")
    photos = photographs(96)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {
            name: stack.enter_context(server_process(scratch / f"{name}.txt", flags))[0]
            for name, flags in servers.items()
        }
        pool = stack.enter_context(processes(1))
        report = {"benchmark": "batching", **facts(urls["batched"]), "flags": servers, "missing": missing}
        report |= {"block_seconds": given.seconds, "image": "256-pixel JPEG", "rows": []}
        for mode in given.mode:
            for clients in given.clients:
                row = {"mode": mode, **compare(urls, requests(mode, photos), clients, given, pool)}
                report["rows"].append(row)
                sys.stderr.write(f"{mode}, {clients} clients: {row['ratio']} [{row['low']}, {row['high']}]\n")
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
