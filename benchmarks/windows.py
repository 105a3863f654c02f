"""Joint tuning against zero-shot on windows of labelled images, through the product's own classifier.

    python benchmarks/windows.py --data DIR [--sets cifar10 imagenette pacs-photo pacs-sketch] [--sizes 8 32 64]
        [--kinds iid imbalanced sorted single] [--images 1000] [--windows 60] [--seeds 3] [--out FILE.json]

DIR holds `cifar10.zip`, `imagenette.zip`, `pacs.zip` (folders of class folders). Of each set a seeded, class-balanced
subsample of --images is taken (--list writes the file names). Each window is one request to `Classifier.classify`,
with acceptance, temperature and every fallback of the product; only the features of an image (views of seed 0) are
kept between windows.

Kinds: `iid` draws images at random; `imbalanced` draws class shares from Dirichlet(0.3) per window; `sorted` takes
consecutive images of a stream sorted by class (the order of classes is drawn); `single` takes one class. Figures are
points of top-1 over zero-shot with a 95 % bootstrap interval over whole windows, and the expected calibration error
(15 equal-width bins).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gram_core.backbone import load, locate
from gram_core.classifier import INFOMAX, Classifier
from gram_core.images import decode
from gram_core.types import Plan, Tuning
from gram_core.views import Prepared
from prototypes.bank import load_root

SETS = {
    "cifar10": ("cifar10.zip", "test/", "choosing"),
    "imagenette": ("imagenette.zip", "", "choosing"),
    "tiny-imagenet": ("tiny-imagenet-32.zip", "val/", "choosing"),
    "pacs-photo": ("pacs.zip", "photo/", "reporting"),
    "pacs-sketch": ("pacs.zip", "sketch/", "reporting"),
}


class Remembering(Classifier):
    """The product's classifier that keeps an image's features between windows instead of computing them again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[tuple[bytes, int, int, tuple[float, float]], Tensor] = {}

    def _view_features(self, images: Sequence[Prepared], originals: Tensor, plan: Plan) -> Tensor:
        scale = self.configs[plan.method].view_scale
        keys = [(i.sha256, plan.seed, plan.views, scale) for i in images]
        for n, key in enumerate(keys):
            if key not in self.seen:
                self.seen[key] = super()._view_features([images[n]], originals[n : n + 1], plan)[0]
        return torch.stack([self.seen[k] for k in keys])

    def _original_features(self, images: Sequence[Prepared]) -> Tensor:
        keys = [(i.sha256, -1, 1, (1.0, 1.0)) for i in images]
        for n, key in enumerate(keys):
            if key not in self.seen:
                self.seen[key] = super()._original_features([images[n]])[0]
        return torch.stack([self.seen[k] for k in keys])


def sample(data: Path, name: str, count: int) -> tuple[list[str], NDArray[np.int64], list[bytes], list[str]]:
    """Class names, labels, encoded images and file names of a seeded class-balanced subsample."""
    file, prefix, _ = SETS[name]
    if not (data / file).is_file():
        raise SystemExit(f"--data has no {file}, which set {name} is read from")
    with zipfile.ZipFile(data / file) as archive:
        members = sorted(m for m in archive.namelist() if m.startswith(prefix) and not m.endswith("/"))
        by_class: dict[str, list[str]] = {}
        for member in members:
            by_class.setdefault(member.removeprefix(prefix).split("/")[0], []).append(member)
        rng = np.random.default_rng(0)
        share = -(-count // len(by_class))
        chosen, labels = [], []
        for label, own in enumerate(by_class.values()):
            picked = rng.permutation(len(own))[:share]
            chosen += [own[i] for i in sorted(picked.tolist())]
            labels += [label] * len(picked)
        names = [clean(c) for c in by_class]
        return names, np.array(labels), [archive.read(m) for m in chosen], chosen


def clean(folder: str) -> str:
    """A class name from its folder: `n01443537-goldfish` and `cassette_player` become words."""
    head, _, tail = folder.partition("-")
    words = tail if tail and head[:1] == "n" and head[1:].isdigit() else folder
    return words.replace("_", " ").strip()


def windows(labels: NDArray[np.int64], kind: str, size: int, count: int, seed: int) -> list[list[int]]:
    """`count` windows of `size` indices, drawn by (kind, size, seed)."""
    rng = np.random.default_rng([seed, size, *kind.encode()])
    classes = int(labels.max()) + 1
    own = [np.flatnonzero(labels == c) for c in range(classes)]
    made: list[list[int]] = []
    while len(made) < count:
        if kind == "iid":
            made.append(rng.choice(len(labels), size, replace=False).tolist())
        elif kind == "imbalanced":
            shares = rng.multinomial(size, rng.dirichlet(np.full(classes, 0.3)))
            made.append(
                [i for c, n in enumerate(shares) for i in rng.choice(own[c], n, replace=n > len(own[c])).tolist()]
            )
        elif kind == "single":
            mine = own[int(rng.integers(classes))]
            made.append(rng.choice(mine, size, replace=size > len(mine)).tolist())
        elif kind == "sorted":
            stream = [i for c in rng.permutation(classes) for i in rng.permutation(own[c]).tolist()]
            starts = range(int(rng.integers(size)), len(stream) - size + 1, size)
            made += [stream[s : s + size] for s in starts]
        else:
            raise SystemExit(f"no kind {kind!r}; choose iid, imbalanced, sorted, single")
    return [made[i] for i in rng.permutation(len(made))[:count]]


def interval(per_window: NDArray[np.float64], rng: np.random.Generator, draws: int = 4000) -> list[float]:
    """95 % percentile bootstrap of the mean over whole windows."""
    picks = rng.integers(len(per_window), size=(draws, len(per_window)))
    low, high = np.percentile(per_window[picks].mean(1), [2.5, 97.5])
    return [round(float(low), 2), round(float(high), 2)]


def calibration(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error with equal-width bins."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))


def measure(
    classifier: Classifier,
    images: list[Prepared],
    labels: NDArray[np.int64],
    names: list[str],
    drawn: list[list[int]],
    tuning: Tuning,
) -> dict[str, Any]:
    """One cell: every window is one request."""
    classes = classifier.class_set(names)
    gains, milliseconds, statuses = [], [], {}
    before, after, sure_before, sure_after = [], [], [], []
    for window in drawn:
        plan = classifier.plan(tuning, len(window), classes)
        answer = classifier.classify([images[i] for i in window], classes, plan)
        truth = labels[window]
        zero = np.array([r.baseline_scores() for r in answer.results])
        tuned = np.array([r.scores() for r in answer.results])
        before.append(zero.argmax(1) == truth)
        after.append(tuned.argmax(1) == truth)
        sure_before.append(zero.max(1))
        sure_after.append(tuned.max(1))
        gains.append(100 * (after[-1].mean() - before[-1].mean()))
        milliseconds.append(answer.timings_ms["adapt"])
        report = answer.results[0].adaptation
        key = report.status if report.reason in (None, "not_accepted") else f"{report.status}/{report.reason}"
        statuses[key] = statuses.get(key, 0) + 1
    gain = np.array(gains, dtype=np.float64)
    return {
        "windows": len(drawn),
        "zero_shot": round(100 * float(np.concatenate(before).mean()), 2),
        "tuned": round(100 * float(np.concatenate(after).mean()), 2),
        "gain": round(float(gain.mean()), 2),
        "interval": interval(gain, np.random.default_rng(1)),
        "ece_before": round(100 * calibration(np.concatenate(sure_before), np.concatenate(before)), 2),
        "ece_after": round(100 * calibration(np.concatenate(sure_after), np.concatenate(after)), 2),
        "adapt_ms": round(float(np.median(milliseconds)), 2),
        "statuses": statuses,
        "_gains": gains,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="gram-mini")
    parser.add_argument(
        "--sets", nargs="+", default=["cifar10", "imagenette", "pacs-photo", "pacs-sketch"], choices=SETS
    )
    parser.add_argument("--kinds", nargs="+", default=["iid", "imbalanced", "sorted", "single"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=60, help="per cell, spread over the seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--host", default=None)
    parser.add_argument("--views", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--scale", type=float, default=None, help="smallest area of a crop")
    parser.add_argument("--list", type=Path, default=None, help="write the names of the sampled files here")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    backbone = load(args.model)
    root = load_root(locate(args.model).folder, fingerprint=backbone.fingerprint)
    if root is None:
        raise SystemExit(f"model {args.model} has no root prototype; joint tuning needs one")
    config = INFOMAX
    if args.lr is not None:
        config = replace(config, lr=dict.fromkeys(config.lr, args.lr))
    if args.scale is not None:
        config = replace(config, view_scale=(args.scale, 1.0))
    classifier = Remembering(backbone, root.visual, infomax=config)
    tuning = Tuning(method="infomax", scope="batch", host=args.host, views=args.views, steps=args.steps)

    cells: dict[str, dict[str, Any]] = {}
    listed: dict[str, list[str]] = {}
    started = time.time()
    for name in args.sets:
        names, labels, encoded, files = sample(args.data, name, args.images)
        listed[name] = files
        images = [classifier.prepare(decode(d)) for d in encoded]
        for kind in args.kinds:
            for size in args.sizes:
                share = -(-args.windows // args.seeds)
                drawn = [w for s in range(args.seeds) for w in windows(labels, kind, size, share, s)]
                cell = measure(classifier, images, labels, names, drawn, tuning)
                cells[f"{name}/{kind}/{size}"] = cell
                low, high = cell["interval"]
                sys.stdout.write(
                    f"{name:14s} {kind:10s} {size:3d}  zero-shot {cell['zero_shot']:5.1f}  gain {cell['gain']:+5.2f} "
                    f"[{low:+5.2f}, {high:+5.2f}]  ECE {cell['ece_before']:4.1f} -> {cell['ece_after']:4.1f}  "
                    f"{cell['adapt_ms']:.0f} ms  {cell['statuses']}\n"
                )
                sys.stdout.flush()
        classifier.seen.clear()
    means = {}
    for kind in args.kinds:
        for size in args.sizes:
            rng = np.random.default_rng(2)
            gains = [np.array(cells[f"{name}/{kind}/{size}"]["_gains"]) for name in args.sets]
            draws = [np.mean([g[rng.integers(len(g), size=len(g))].mean() for g in gains]) for _ in range(4000)]
            low, high = np.percentile(draws, [2.5, 97.5])
            mean = float(np.mean([g.mean() for g in gains]))
            means[f"{kind}/{size}"] = {
                "gain": round(mean, 2),
                "interval": [round(float(low), 2), round(float(high), 2)],
            }
            sys.stdout.write(
                f"{'mean of sets':14s} {kind:10s} {size:3d}  gain {mean:+5.2f} [{low:+5.2f}, {high:+5.2f}]\n"
            )
    if args.list:
        args.list.write_text(json.dumps(listed, indent=1) + "\n")
    if args.out:
        for cell in cells.values():
            cell.pop("_gains")
        report = {
            "benchmark": "windows",
            "command": " ".join(["python", "benchmarks/windows.py", *_public(sys.argv[1:])]),
            "date": datetime.date.today().isoformat(),
            "model": classifier.info.name,
            "fingerprint": classifier.info.fingerprint,
            "device": f"{classifier.info.device}, {os.cpu_count()} cores",
            "settings": {
                **classifier.info.defaults["infomax"],
                **{k: v for k, v in vars(tuning).items() if v is not None},
            },
            "roles": {name: SETS[name][2] for name in args.sets},
            "files_sha256": {k: hashlib.sha256("\n".join(v).encode()).hexdigest() for k, v in listed.items()},
            "minutes": round((time.time() - started) / 60, 1),
            "cells": cells,
            "means": means,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def _public(words: list[str]) -> list[str]:
    """The command without this machine's folders."""
    hidden = [
        Path(w).name if "/" in w and i and words[i - 1] in ("--out", "--list") else w for i, w in enumerate(words)
    ]
    return ["DIR" if i and words[i - 1] == "--data" else w for i, w in enumerate(hidden)]


if __name__ == "__main__":
    main()
