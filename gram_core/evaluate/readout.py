"""Answers into figures: accuracy, calibration, and differences with paired intervals.

Intervals are 95 % percentile intervals of a two-way bootstrap (Owen, Annals of Applied Statistics 2007): requests and
images are both drawn again with replacement, because the same images recur in many requests. The same draws serve
all methods of a protocol, so differences are paired. Arrays only: no model, no method, no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.protocols import Indices, skew

Floats = NDArray[np.float64]
Diagram = list[dict[str, float]]
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


def weights(drawn: Drawn, draws: int, rng: np.random.Generator) -> Floats:
    """(R, N) bootstrap weights of the places, each row summing to one.

    A place weighs how often its request was drawn times how often its image was. With one request (every image alone)
    only images are drawn.
    """
    units = int(drawn.unit.max()) + 1
    used, image = np.unique(drawn.image, return_inverse=True)
    made = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=draws)[:, image].astype(np.float64)
    if units > 1:
        made *= rng.multinomial(units, np.full(units, 1 / units), size=draws)[:, drawn.unit]
    total = made.sum(1, keepdims=True)
    # a draw of requests that holds none of the drawn images says nothing: it counts as the sample itself
    shares: Floats = np.divide(made, total, out=np.full_like(made, 1 / made.shape[1]), where=total > 0)
    return shares


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


@dataclass(frozen=True, eq=False)
class Comparison:
    """One method on one set under one protocol: its cell as JSON, and the draws behind its intervals."""

    cell: dict[str, Any]
    gain: Floats
    gain_tpt: Floats | None
    diagram: Diagram


def compare(
    drawn: Drawn, truth: Indices, given: dict[str, Given], *, bins: int, draws: int, seed: int
) -> dict[str, Comparison]:
    """Every method of one set and protocol against zero-shot, and against TPT where it was run. `truth` (M,)."""
    right = {name: answers.label == truth[drawn.image] for name, answers in given.items()}
    drawn_weights = weights(drawn, draws, np.random.default_rng(seed))
    base = right["zero-shot"].astype(np.float64)
    seeds = np.unique(drawn.seed)

    def difference(ours: NDArray[np.bool_], theirs: Floats) -> tuple[Floats, dict[str, float]]:
        delta = ours - theirs
        samples = drawn_weights @ delta
        return samples, interval(samples, float(delta.mean()))

    made = {}
    for name, answers in given.items():
        gain, shown = difference(right[name], base)
        diagram = calibration(answers.confidence, right[name], bins)
        cell: dict[str, Any] = {
            "windows": int(drawn.unit.max()) + 1,
            "predictions": len(drawn.image),
            "top1": round(100 * float(right[name].mean()), 2),
            "ece": round(ece(diagram), 2),
            "mean_confidence": round(100 * float(answers.confidence.mean()), 2),
            "gain": shown,
            "gain_tpt": None,
            "by_seed": [round(100 * float(right[name][drawn.seed == s].mean()), 2) for s in seeds],
        }
        gain_tpt = None
        if "tpt" in right and name != "tpt":
            gain_tpt, cell["gain_tpt"] = difference(right[name], right["tpt"].astype(np.float64))
        made[name] = Comparison(cell, gain, gain_tpt, diagram)
    return made


def mean_of_sets(cells: list[Comparison]) -> dict[str, Any]:
    """The plain mean over sets; every set was drawn again on its own."""
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


def by_skew(requests: list[tuple[float, float]], draws: int = 1000) -> list[dict[str, float]]:
    """Mean gain of requests by their skew, from (skew, gain as a share) pairs, with intervals over requests."""
    if not requests:
        return []
    rng = np.random.default_rng(0)
    where, gains = np.array(requests).T
    which = np.digitize(where, SKEW_EDGES[1:-1])
    rows = []
    for b in np.unique(which):
        mine, at = gains[which == b], where[which == b]
        samples = mine[rng.integers(len(mine), size=(draws, len(mine)))].mean(1)
        shown = interval(samples, float(mine.mean()))
        rows.append(
            {
                "skew": round(float(at.mean()), 3),
                "gain": shown["mean"],
                "low": shown["low"],
                "high": shown["high"],
                "windows": len(mine),
            }
        )
    return rows


def gains_by_request(drawn: Drawn, truth: Indices, classes: int, ours: Given, base: Given) -> list[tuple[float, float]]:
    """(skew, gain) of every request."""
    labels = truth[drawn.image]
    delta = (ours.label == labels).astype(np.float64) - (base.label == labels)
    units = range(int(drawn.unit.max()) + 1)
    own = [drawn.unit == u for u in units]
    return [(skew(labels[mine], classes), float(delta[mine].mean())) for mine in own]
