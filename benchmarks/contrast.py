"""One method against others, request by request: the mean over sets and kinds of request, by size.

    python benchmarks/contrast.py PREDICTIONS.jsonl [--method gram] [--against zero-shot infomax-root tpt]

PREDICTIONS.jsonl is what `python -m gram_core.evaluate --predictions ...` wrote. A cell is a set and a kind of
request; a request's difference is its top-1 less the other's, in points; cells are averaged with equal weights. 95 %
intervals by a paired bootstrap: requests are drawn again inside each cell, the same ones for both methods (2,000
draws, seed 0). Cells whose requests have fewer than half of the images asked for are left out, as in the harness.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000
Cells = dict[tuple[int, str, str], dict[tuple[int, int], dict[str, list[bool]]]]


def read(path: Path, methods: set[str]) -> Cells:
    """(size, set, kind) -> request -> method -> whether each answer was right."""
    cells: Cells = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["protocol"] == "batch" and row["method"] in methods:
                request = cells[row["size"], row["set"], row["kind"]][row["seed"], row["request"]]
                request[row["method"]].append(row["answer"] == row["label"])
    return cells


def contrast(cells: Cells, method: str, other: str, size: int, kinds: set[str] | None = None) -> dict[str, float]:
    """Mean difference in points over the cells of one size, and its interval."""
    rng = np.random.default_rng(0)
    means, drawn = [], []
    for (own, _, kind), requests in sorted(cells.items()):
        each = [r for r in requests.values() if r[method] and r[other]]
        if (
            own != size
            or not each
            or (kinds and kind not in kinds)
            or 2 * np.mean([len(r[method]) for r in each]) < size
        ):
            continue
        gap = np.array([[sum(r[method]) - sum(r[other]), len(r[method])] for r in each], dtype=np.float64)
        means.append(100 * gap[:, 0].sum() / gap[:, 1].sum())
        again = gap[rng.integers(len(gap), size=(DRAWS, len(gap)))].sum(1)
        drawn.append(100 * again[:, 0] / again[:, 1])
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return {"mean": round(float(np.mean(means)), 2), "low": round(float(low), 2), "high": round(float(high), 2),
            "cells": len(means)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--method", default="gram")
    parser.add_argument("--against", nargs="+", default=["zero-shot", "infomax-root", "tpt"])
    given = parser.parse_args()
    cells = read(given.predictions, {given.method, *given.against})
    sizes = sorted({size for size, _, _ in cells})
    rows: list[dict[str, Any]] = [
        {"method": given.method, "against": other, "size": size, **contrast(cells, given.method, other, size)}
        for other in given.against
        for size in sizes
    ]
    kinds = sorted({kind for _, _, kind in cells if not kind.startswith("effective")})
    told = {
        "kind": "contrast",
        "command": f"python benchmarks/contrast.py DIR/predictions.jsonl --method {given.method} --against "
        + " ".join(given.against),
        "rows": rows,
        "kinds": [
            {"method": given.method, "against": given.against[0], "size": size, "kind": kind,
             **contrast(cells, given.method, given.against[0], size, {kind})}
            for kind in kinds
            for size in sizes
        ],
    }  # fmt: skip
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
