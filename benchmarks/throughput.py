"""Throughput of `/classify` over real HTTP against the real server, on this machine.

    python benchmarks/throughput.py [--requests 20] [--clients 2]

Starts `python -m server` with the bundled model, posts JPEGs cut from scikit-image's photographs (extra `demo`) and
prints images per second and latency for: zero-shot with 1 and with 32 images a request, GRAM and joint tuning of 32
images, and per-image tuning with 16 views. Client and server share the machine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.demo import CLASSES, PHOTOS, running_server

MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero-shot, 1 image": (1, {"method": "none"}),
    "zero-shot, 32 images": (32, {"method": "none"}),
    "gram, scope batch, 32 images, 8 views": (32, {"method": "gram", "scope": "batch"}),
    "infomax, scope batch, 32 images, 8 views": (32, {"method": "infomax", "scope": "batch"}),
    "infomax, coop host, 32 images, 8 views": (32, {"method": "infomax", "scope": "batch", "host": "coop"}),
    "tpt, scope image, 1 image, 16 views": (1, {"method": "tpt", "views": 16}),
    "tpt, scope image, 8 images, 16 views": (8, {"method": "tpt", "views": 16}),
}


def photographs(count: int) -> list[bytes]:
    """`count` distinct 256-pixel JPEGs cut from the bundled photographs by a seed."""
    rng = np.random.default_rng(0)
    folder = files("skimage") / "data"
    whole = [Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB") for name in PHOTOS]
    made = []
    for i in range(count):
        image = whole[i % len(whole)]
        side = int(min(image.size) * rng.uniform(0.6, 1.0))
        left, top = (int(rng.integers(s - side + 1)) for s in image.size)
        out = io.BytesIO()
        image.crop((left, top, left + side, top + side)).resize((256, 256)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def measure(
    url: str, pool: list[bytes], size: int, adaptation: dict[str, Any], requests: int, clients: int
) -> dict[str, Any]:
    """Closed loop of `clients`; every request has its own images."""
    head = json.dumps({"classes": CLASSES, "adaptation": adaptation})

    def post(n: int) -> tuple[float, dict[str, Any]]:
        chosen = [pool[(n * size + k) % len(pool)] for k in range(size)]
        parts = [("image", (f"{k}.jpg", data, "image/jpeg")) for k, data in enumerate(chosen)]
        started = time.perf_counter()
        answer = client.post(f"{url}/classify", files=[*parts, ("request", (None, head, "application/json"))])
        took = time.perf_counter() - started
        answer.raise_for_status()
        return took, answer.json()

    with httpx.Client(timeout=600, trust_env=False) as client:
        post(0)
        with ThreadPoolExecutor(clients) as threads:
            started = time.perf_counter()
            answers = list(threads.map(post, range(requests)))
            wall = time.perf_counter() - started
    latency = sorted(1000 * t for t, _ in answers)
    stages = {
        k: round(statistics.median(a["timings_ms"].get(k, 0.0) for _, a in answers), 1)
        for k in ("decode", "queue", "text", "image", "adapt", "total")
    }
    return {
        "images_per_s": round(requests * size / wall, 2),
        "requests_per_s": round(requests / wall, 2),
        "p50_ms": round(statistics.median(latency), 1),
        "max_ms": round(latency[-1], 1),
        "median_stage_ms": stages,
        "statuses": sorted({r["adaptation"]["status"] for _, a in answers for r in a["results"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="per mode")
    parser.add_argument(
        "--clients", type=int, default=1, help="requests under way at once; beyond one, 429 is an answer"
    )
    args = parser.parse_args()
    pool = photographs(96)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch, running_server(Path(scratch) / "server.txt") as url:
        info = httpx.get(f"{url}/info", trust_env=False).json()["model"]
        for name, (size, adaptation) in MODES.items():
            rows[name] = measure(url, pool, size, adaptation, args.requests, args.clients)
    report = {
        "benchmark": "throughput",
        "date": datetime.date.today().isoformat(),
        "model": info["name"],
        "device": f"{info['device']}, {os.cpu_count()} cores",
        "dtype": info["dtype"],
        "classes": len(CLASSES),
        "clients": args.clients,
        "requests": args.requests,
        "rows": rows,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
