"""What GRAM adds to a request: its milliseconds against those of the joint tuning that it regulates.

    python benchmarks/gram_cost.py [--repeats 30] > benchmarks/results/gram_cost.json

Both answer the same features (prototypes of the bank with noise, eight views, so that the structure is trusted), one
after the other in every repeat; the ratio is that of medians. The image tower, which both need, is not in these times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from gram_core.classifier import Classifier, Seen
from gram_core.types import Tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    classifier = Classifier.load("gram-mini")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in (8, 32, 64):
        for classes in (10, 100):
            names = classifier.class_set([f"thing {i}" for i in range(classes)])
            modes = classifier.structure.modes
            modes = modes[torch.randint(len(modes), (count,), generator=generator)]
            noise = torch.randn(count, 8, modes.shape[1], generator=generator) * 0.01
            seen = Seen(F.normalize(modes[:, None] + noise, dim=-1), tuple(bytes([i] * 32) for i in range(count)))
            plans = {m: classifier.plan(Tuning(method=m, scope="batch"), count, names) for m in ("infomax", "gram")}
            took: dict[str, list[float]] = {name: [] for name in plans}
            for repeat in range(given.repeats + 2):
                for name, plan in plans.items():
                    started = time.perf_counter()
                    classifier.answer(seen, names, plan)
                    if repeat >= 2:
                        took[name].append((time.perf_counter() - started) * 1000)
            medians = {name: statistics.median(values) for name, values in took.items()}
            rows.append(
                {
                    "images": count,
                    "classes": classes,
                    "infomax_ms": round(medians["infomax"], 2),
                    "gram_ms": round(medians["gram"], 2),
                    "ratio": round(medians["gram"] / medians["infomax"], 3),
                }
            )
    structure = classifier.structure
    tensors = (*structure.visual.values(), structure.modes, structure.captions)
    told = {
        "command": "python benchmarks/gram_cost.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "bank_mb": round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 2),
        "weights": sum(w.numel() for w in classifier.weights.values()),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
