"""A server as `load.py`, `soak.py` and `batching.py` see it from outside, and the statistics of what they saw."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
PERCENTILES = "nearest rank: the smallest value that at least the share q of all values does not exceed"
Metrics = dict[str, list[tuple[dict[str, str], float]]]


def scrape(url: str) -> Metrics:
    """`/metrics`: name -> its samples."""
    found: Metrics = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Sum of a metric's samples with these labels; None where the server has no such metric."""
    if name not in metrics:
        return None
    return sum(value for have, value in metrics[name] if labels.items() <= have.items())


def wait_until_idle(url: str, seconds: float = 60.0) -> None:
    """Return when nothing but this question is being served."""
    end = time.monotonic() + seconds
    while (total(scrape(url), "gram_requests_inflight") or 0) > 1:
        if time.monotonic() > end:
            raise TimeoutError(f"the server was still busy after {seconds:g} s without requests")
        time.sleep(0.1)


def stolen_s() -> float:
    """Seconds of a core that this machine's host gave to others so far, all cores together; 0 where none says so."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def known_flags() -> frozenset[str]:
    """The flags that this checkout's server has."""
    asked = [sys.executable, "-m", "server", "--help"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^\s+(--[a-z0-9-]+)", said, re.MULTILINE))


def facts(url: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    info = httpx.get(f"{url}/info", trust_env=False, timeout=30).json()
    model = info["model"]
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    cpu = re.search(r"model name\s*:\s*(.*)", _text(Path("/proc/cpuinfo")))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None,
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, client and server together",
        "python": platform.python_version(),
        "torch": version("torch"),
        "model": model["name"],
        "weights": model["weights_sha256"][:12],
        "device": model["device"],
        "dtype": model["dtype"],
        "default_method": model["default_method"],
        "queue_seconds": info["queue_seconds"],
        "percentiles": PERCENTILES,
    }


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# ---- statistics ----


def percentile(values: Sequence[float], share: float) -> float | None:
    """See `PERCENTILES`; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float | None]:
    """p50, p95, p99, max."""
    marks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    found = {name: percentile(values, share) for name, share in marks.items()}
    return {name: None if value is None else round(value, digits) for name, value in found.items()}


def theil_sen(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of the slopes between all pairs of points, with Sen's (1968) interval for untied values."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    first, second = np.triu_indices(len(xs), 1)
    run = xs[second] - xs[first]
    slopes = np.sort((ys[second] - ys[first])[run != 0] / run[run != 0])
    if not len(slopes):
        raise ValueError("all points have the same x; a slope needs at least two different ones.")
    n = len(xs)
    sigma = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * sigma
    low = max(0, round((len(slopes) - reach) / 2) - 1)
    high = min(len(slopes) - 1, round((len(slopes) + reach) / 2))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def shares(counts: Counter[Any]) -> dict[str, float]:
    """Counts as shares of their sum, most frequent first."""
    whole = sum(counts.values())
    return {str(name): round(number / whole, 4) for name, number in counts.most_common()}


def criterion(name: str, value: Any, passed: bool | None) -> dict[str, Any]:
    """One line of the verdict; `passed` is None where the question does not arise, and the value says why."""
    return {"criterion": name, "value": value, "passed": passed}
