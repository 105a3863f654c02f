"""`gram evaluate --url`: the harness's figures of a labelled folder, asked of a running server.

Every image once, in the harness's shuffled stream of the same seed and size: with the same model and method the answers
are those of `python -m gram_core.evaluate --protocols stream --seeds 1`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gram_core.config import option
from gram_core.errors import InvalidConfig
from gram_core.evaluate import readout
from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.protocols import Protocol, draw
from server.client import AsyncGramClient

KIND = "shuffled"
PATIENCE = 5  # times the server's longest deadline: a request and its retries


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of `gram evaluate DIR --url URL`."""

    method: str | None = option(None, "what adapts; else the server's own default")
    scope: str = option("auto", "auto, image or batch")
    steps: int | None = option(None, "tuning steps; else the method's own")
    views: int | None = option(None, "views of an image; else the method's own")
    templates: tuple[str, ...] = option((), "texts with one {} each; else the server's default", whole=True)
    stream_size: int = option(64, "images of a request")
    images: int = option(600, "images of each set, a seeded class-balanced subsample; 0 takes all")
    splits: tuple[str, ...] = option((), "splits of a set to read, instead of test or else val")
    classes: Path | None = option(None, "file of class names: one a line, or FOLDER<TAB>NAME, or JSON")
    seed: int = option(0, "seed of the order of the images")
    bins: int = option(15, "equal-width bins of the calibration error")
    draws: int = option(2000, "bootstrap draws")
    predictions: Path | None = option(None, "file for every answer of every image, as JSON lines")
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        for name, low in {"stream_size": 1, "images": 0, "seed": 0, "bins": 2, "draws": 100}.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if self.scope not in ("auto", "image", "batch"):
            raise InvalidConfig("scope must be auto, image or batch.")


async def score(
    client: AsyncGramClient,
    given: LabelledSet,
    config: ScoreConfig,
    write: Callable[[str], object],
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """Zero-shot and adapted accuracy of one set, with the paired 95 % interval of their difference, as JSON.

    Percentages throughout; `write` is given a line for every prediction, `advance` the images answered. Raises
    `server.client.GramError`, also where one image is refused: a figure must not silently leave images out.
    """
    limits = (await client.info())["limits"]
    if config.stream_size > limits["max_images"]:
        most = limits["max_images"]
        raise InvalidConfig(f"stream_size is {config.stream_size}; this server takes {most} images a request at most.")
    options: dict[str, Any] = {"scope": config.scope, "top_k": 1, "timeout_ms": limits["max_timeout_ms"]}
    options |= {n: v for n in ("method", "steps", "views") if (v := getattr(config, n)) is not None}
    if config.templates:
        options["templates"] = list(config.templates)
    protocol = Protocol("stream", KIND, config.stream_size)
    units = draw(protocol, given.labels, len(given.classes), count=1, seed=config.seed)
    drawn = readout.Drawn.of([(config.seed, unit) for unit in units])
    before, after = list[tuple[int, float]](), list[tuple[int, float]]()
    method, spent_s = "", 0.0
    patience_s = PATIENCE * limits["max_timeout_ms"] / 1000
    for unit in units:
        bodies = [given.read(int(image)) for image in unit]
        started = time.perf_counter()
        answer = await client.classify(bodies, given.classes, timeout=patience_s, **options)
        spent_s += time.perf_counter() - started
        for result in answer["results"]:
            method = result["adaptation"]["method"]
            before.append(_top(result["baseline"]["predictions"]))
            after.append(_top(result["predictions"]))
        advance(len(unit))
    answers = {"zero-shot": _given(before)}
    if method != "none":
        answers[method] = _given(after)
    where = {"set": given.name, "protocol": protocol.name, "kind": protocol.kind, "size": protocol.size}
    for line in readout.lines(where, drawn, given, answers):
        write(line)
    made = readout.compare(
        drawn,
        given.labels,
        answers,
        size=protocol.size,
        bins=config.bins,
        draws=config.draws,
        seed=readout.seed_of(given.name, str(protocol)),
    )
    rows = {name: {k: c.cell[k] for k in ("top1", "gain", "ece", "mean_confidence")} for name, c in made.items()}
    ms = 1000 * spent_s / len(given)
    return {**where, "images": len(given), "classes": len(given.classes), "ms_per_image": round(ms, 2), "methods": rows}


def _top(predictions: list[dict[str, Any]]) -> tuple[int, float]:
    return predictions[0]["class_index"], predictions[0]["score"]


def _given(answers: list[tuple[int, float]]) -> readout.Given:
    labels, scores = zip(*answers, strict=True)
    return readout.Given(np.array(labels, dtype=np.int64), np.array(scores, dtype=np.float32))
