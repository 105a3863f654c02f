"""Answers into figures: accuracy, calibration, and differences with paired intervals.

Intervals are 95 % percentile intervals of a two-way bootstrap (Owen, Annals of Applied Statistics 2007): requests and
images are both drawn again with replacement, because the same images recur in many requests. The same draws serve
all methods of a protocol, so differences are paired. Arrays only: no model, no method, no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gram_core.draws import Indices
from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.protocols import skew

Floats = NDArray[np.float64]
Diagram = list[dict[str, float]]
BLOCK = 100  # bootstrap draws that are in memory together
SKEW_EDGES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 0.999, 1.0)  # the last bin holds requests of one class


@dataclass(frozen=True, eq=False)
class Drawn:
    """All N answered places of one protocol on one set: which image, which request, which seed."""

    image: Indices
    unit: Indices
    seed: Indices

    @classmethod
    def of(cls, units: list[tuple[int, Indices]]) -> Drawn:
        """From (seed, images) of every request."""
        lengths = [len(images) for _, images in units]
        return cls(
            np.concatenate([images for _, images in units]),
            np.repeat(np.arange(len(units)), lengths),
            np.repeat(np.array([seed for seed, _ in units]), lengths),
        )


@dataclass(frozen=True, eq=False)
class Given:
    """One method's N answers: the label and its probability."""

    label: Indices
    confidence: NDArray[np.float32]


def weights(drawn: Drawn, draws: int, seed: int) -> Iterator[Floats]:
    """Blocks (r, N) of bootstrap weights of the places, each row summing to one; `draws` rows in all.

    A place weighs how often its request was drawn times how often its image was. With one request (every image alone)
    only images are drawn.
    """
    rng = np.random.default_rng(seed)
    units = int(drawn.unit.max()) + 1
    used, image = np.unique(drawn.image, return_inverse=True)
    for start in range(0, draws, BLOCK):
        rows = min(BLOCK, draws - start)
        made = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=rows)[:, image].astype(np.float64)
        if units > 1:
            made *= rng.multinomial(units, np.full(units, 1 / units), size=rows)[:, drawn.unit]
        total = made.sum(1, keepdims=True)
        # a draw of requests that holds none of the drawn images says nothing: it counts as the sample itself
        yield np.divide(made, total, out=np.full_like(made, 1 / made.shape[1]), where=total > 0)


def seed_of(*parts: str) -> int:
    """A seed from words. Copies of one set (its corruptions) share draws, because they show the same images."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode("utf-8", "surrogateescape")).digest()[:8])


def interval(samples: Floats, mean: float) -> dict[str, float]:
    """Mean and the 2.5 and 97.5 percentiles, as JSON in points."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"mean": round(100 * mean, 2), "low": round(100 * float(low), 2), "high": round(100 * float(high), 2)}


def calibration(confidence: NDArray[np.float32], right: NDArray[np.bool_], bins: int) -> Diagram:
    """The reliability diagram: mean confidence, accuracy and share of each filled one of `bins` equal-width bins."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        mine = which == b
        if mine.any():
            rows.append(
                {
                    "confidence": round(float(confidence[mine].mean()), 4),
                    "accuracy": round(float(right[mine].mean()), 4),
                    "share": round(float(mine.mean()), 4),
                }
            )
    return rows


def ece(bins: Diagram) -> float:
    """Expected calibration error in points (Guo et al., ICML 2017, eq. 3)."""
    return 100 * sum(b["share"] * abs(b["confidence"] - b["accuracy"]) for b in bins)


class BySkew:
    """Gain of requests by their skew, over sets: every answer weighs alike, intervals as everywhere."""

    def __init__(self, draws: int) -> None:
        self.draws = draws
        bins = len(SKEW_EDGES) - 1
        self.where = np.zeros(bins)  # sum of the skew of the places
        self.places, self.requests = np.zeros(bins), np.zeros(bins, dtype=int)
        self.delta: dict[str, Floats] = {}  # method -> (bins,)
        self.drawn: dict[str, Floats] = {}  # method -> (draws, bins) weighted sums of the gain
        self.weight = np.zeros((draws, bins))

    def add(self, drawn: Drawn, truth: Indices, classes: int, given: dict[str, Given], seed: int) -> None:
        """One set: all its requests of all kinds and sizes together, as one `drawn`."""
        labels = truth[drawn.image]
        starts = np.flatnonzero(np.diff(drawn.unit, prepend=-1))
        skews = np.array([skew(own, classes) for own in np.split(labels, starts[1:])])
        bin_of = np.digitize(skews, SKEW_EDGES[1:-1])
        self.requests += np.bincount(bin_of, minlength=len(self.places))
        place = np.eye(len(self.places))[bin_of[drawn.unit]]  # (N, bins)
        self.where += skews[drawn.unit] @ place
        self.places += place.sum(0)
        base = given["zero-shot"].label == labels
        gains = {n: (g.label == labels).astype(np.float64) - base for n, g in given.items() if n != "zero-shot"}
        for name, gain in gains.items():
            self.delta[name] = self.delta.get(name, 0.0) + gain @ place
            self.drawn.setdefault(name, np.zeros_like(self.weight))
        at = 0
        for block in weights(drawn, self.draws, seed):
            block *= len(drawn.image)  # sets weigh by their answers
            rows = slice(at, at + len(block))
            self.weight[rows] += block @ place
            for name, gain in gains.items():
                self.drawn[name][rows] += block @ (gain[:, None] * place)
            at += len(block)

    def rows(self, name: str) -> list[dict[str, float]]:
        """The filled bins of one method."""
        made = []
        for b in np.flatnonzero(self.places):
            samples = self.drawn[name][:, b] / np.maximum(self.weight[:, b], 1e-9)
            shown = interval(samples, float(self.delta[name][b] / self.places[b]))
            made.append({"skew": round(float(self.where[b] / self.places[b]), 3), "gain": shown["mean"],
                         "low": shown["low"], "high": shown["high"], "windows": int(self.requests[b])})  # fmt: skip
        return made


@dataclass(frozen=True, eq=False)
class Comparison:
    """One method on one set under one protocol: its cell as JSON, and the draws behind its intervals."""

    cell: dict[str, Any]
    gain: Floats
    gain_tpt: Floats | None
    diagram: Diagram


def compare(
    drawn: Drawn, truth: Indices, given: dict[str, Given], *, size: int, bins: int, draws: int, seed: int
) -> dict[str, Comparison]:
    """Every method of one set and protocol against zero-shot, and against TPT where it was run. `truth` (M,)."""
    right = {name: answers.label == truth[drawn.image] for name, answers in given.items()}
    shares = np.stack([r.astype(np.float64) for r in right.values()], axis=1)  # (N, methods)
    samples = dict(zip(right, np.concatenate([w @ shares for w in weights(drawn, draws, seed)]).T, strict=True))
    units = int(drawn.unit.max()) + 1
    made = {}
    for name, answers in given.items():
        mean = float(right[name].mean())
        diagram = calibration(answers.confidence, right[name], bins)

        def against(other: str, ours: str = name, mean: float = mean) -> tuple[Floats, dict[str, float]]:
            gains = samples[ours] - samples[other]
            return gains, interval(gains, mean - float(right[other].mean()))

        gain, shown = against("zero-shot")
        gain_tpt, shown_tpt = against("tpt") if "tpt" in right and name != "tpt" else (None, None)
        cell: dict[str, Any] = {
            "windows": units,
            "predictions": len(drawn.image),
            "mean_size": 1 if size == 1 else round(len(drawn.image) / units, 1),
            "top1": round(100 * mean, 2),
            "ece": round(ece(diagram), 2),
            "mean_confidence": round(100 * float(answers.confidence.mean()), 2),
            "gain": shown,
            "gain_tpt": shown_tpt,
            "by_seed": [round(100 * float(right[name][drawn.seed == s].mean()), 2) for s in np.unique(drawn.seed)],
        }
        made[name] = Comparison(cell, gain, gain_tpt, diagram)
    return made


def mean_of_sets(cells: list[Comparison]) -> dict[str, Any]:
    """The plain mean over sets."""
    rows = [c.cell for c in cells]
    made: dict[str, Any] = {
        "sets": len(rows),
        "top1": round(float(np.mean([r["top1"] for r in rows])), 2),
        "ece": round(float(np.mean([r["ece"] for r in rows])), 2),
        "gain": interval(
            np.mean([c.gain for c in cells], axis=0), float(np.mean([r["gain"]["mean"] for r in rows])) / 100
        ),
        "gain_tpt": None,
    }
    tpt = [c.gain_tpt for c in cells if c.gain_tpt is not None]
    if len(tpt) == len(cells):
        mean = float(np.mean([r["gain_tpt"]["mean"] for r in rows])) / 100
        made["gain_tpt"] = interval(np.mean(tpt, axis=0), mean)
    return made


def merged(diagrams: list[Diagram]) -> Diagram:
    """One reliability diagram of several sets, each with the same weight: bins of a tenth of confidence."""
    rows = [(b["confidence"], b["accuracy"], b["share"] / len(diagrams)) for bins in diagrams for b in bins]
    where, right, share = np.array(rows).T
    which = np.minimum((where * 10).astype(int), 9)
    made = []
    for b in np.unique(which):
        own = which == b
        total = float(share[own].sum())
        made.append(
            {
                "confidence": round(float((where[own] * share[own]).sum()) / total, 4),
                "accuracy": round(float((right[own] * share[own]).sum()) / total, 4),
                "share": round(total, 4),
            }
        )
    return made


def lines(where: dict[str, Any], drawn: Drawn, given: LabelledSet, answers: dict[str, Given]) -> Iterator[str]:
    """Every answer as one line of JSON."""
    for n, (image, unit, seed) in enumerate(
        zip(drawn.image.tolist(), drawn.unit.tolist(), drawn.seed.tolist(), strict=True)
    ):
        for name, answer in answers.items():
            row = {
                **where,
                "method": name,
                "seed": seed,
                "request": unit,
                "image": given.keys[image],
                "label": given.classes[int(given.labels[image])],
                "answer": given.classes[int(answer.label[n])],
                "score": round(float(answer.confidence[n]), 6),
            }
            yield json.dumps(row, ensure_ascii=False)
