"""What is answered: the shape of a classification and of an error, and how a result becomes one.

The models are what the OpenAPI document promises; tests hold every answer to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gram_core.types import Adaptation, Answer, Explanation, FloatArray, ImageResult, ModelInfo, Plan
from server.errors import ApiError
from server.replay import token
from server.schemas import Question

DIGITS = 6  # of what an explanation says
NOTHING = Plan(method="none", host=None, scope="image", steps=0, views=1, seed=0, skip="none_requested")
MAX_TOLD_NAME = 80  # characters of a prototype's name


class Strict(BaseModel):
    """Base of everything that is answered."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Prediction(Strict):
    """One class and its score."""

    label: str
    class_index: int
    score: float


class Baseline(Strict):
    """What zero-shot says without adaptation."""

    label: str
    score: float
    predictions: list[Prediction]


class ImageFacts(Strict):
    """The image as it was read; notes say what was changed."""

    width: int
    height: int
    format: str
    notes: list[str]


class ItemError(Strict):
    """Why this image has no answer."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Told(Adaptation):
    """What adaptation did, and the token with which the same can be run again."""

    replay: str


class Result(Strict):
    """One image: the answer to use, and the baseline beside it."""

    index: int
    id: str | None
    class_set: str | None
    label: str | None
    score: float | None
    error: ItemError | None
    predictions: list[Prediction]
    baseline: Baseline | None
    adaptation: Told | None
    explain: Explanation | None
    image: ImageFacts | None


class ModelName(Strict):
    """Which model answered."""

    name: str
    weights_sha256: str
    checkpoint_sha256: str | None


class ClassSetUsed(Strict):
    """The class set that the classes made."""

    id: str
    size: int
    text_cache: str | None


class Usage(Strict):
    """What the request cost."""

    images: int
    classes: int
    image_passes: int
    text_passes: int
    cost: float
    brownout: int


class SessionUsed(Strict):
    """The session that the request named, after it: images that it holds, and how many of these it took."""

    id: str
    images: int
    added: int


class ClassifyAnswer(Strict):
    """The answer of `/v1/classify`."""

    id: str
    object: Literal["classification"]
    created: int
    model: ModelName
    class_set: ClassSetUsed
    session: SessionUsed | None
    results: list[Result]
    usage: Usage
    timings_ms: Mapping[str, float]


class ErrorFacts(Strict):
    """What went wrong."""

    message: str
    type: str
    code: str
    param: str | None
    request_id: str
    retryable: bool


class ErrorAnswer(Strict):
    """The envelope of every error."""

    error: ErrorFacts


@dataclass(eq=False)
class Group:
    """Images of one request that are asked about the same classes: they are planned, run and tuned together.

    `where` are their places in the request, `hashes` of those that were run; `level` of the brown-out, 0 where that
    took nothing away.
    """

    class_set: Any
    where: list[int]
    plan: Plan = NOTHING
    level: int = 0
    hashes: list[bytes] = field(default_factory=list)
    answer: Answer | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """One request: for each image what was prepared, or the `ApiError` that it got instead, and its groups."""

    items: Sequence[Any]
    groups: Sequence[Group]
    cost: float

    def results(self) -> list[tuple[ImageResult, Group] | None]:
        """Each image's result, None where it has none."""
        found: list[tuple[ImageResult, Group] | None] = [None] * len(self.items)
        for group in self.groups:
            answered = iter(group.answer.results if group.answer is not None else ())
            for n in group.where:
                if not isinstance(self.items[n], ApiError):
                    found[n] = next(answered), group
        return found


def classification(
    *,
    request_id: str,
    created: int,
    model: ModelInfo,
    question: Question,
    names: Sequence[str | None],
    outcome: Outcome,
    timings_ms: Mapping[str, float],
    session: Mapping[str, Any] | None = None,
) -> bytes:
    """The JSON of `ClassifyAnswer`; `names` are the caller's own of its images."""
    results: list[dict[str, Any]] = []
    for index, (name, image, found) in enumerate(zip(names, outcome.items, outcome.results(), strict=True)):
        head = {"index": index, "id": name}
        if found is None:
            results.append({**head, **EMPTY, "error": {"code": image.code, "message": image.message}})
        else:
            result, group = found
            together = [image.sha256] if group.plan.scope == "image" else group.hashes
            again = token(result.adaptation, group.plan, model, group.class_set.id, together)
            body = _result(result, image, group.class_set.names, question.score, question.top_k, again)
            results.append({**head, "class_set": group.class_set.id, **body})
    answers = [group.answer for group in outcome.groups if group.answer is not None]
    first = outcome.groups[0].class_set
    cached = {answer.text_cache for answer in answers}
    body = {
        "id": request_id,
        "object": "classification",
        "created": created,
        "model": {
            "name": model.name,
            "weights_sha256": model.weights_sha256,
            "checkpoint_sha256": model.checkpoint_sha256,
        },
        "class_set": {
            "id": first.id,
            "size": len(first),
            "text_cache": None if not cached else ("hit" if cached == {"hit"} else "miss"),
        },
        "session": session,
        "results": results,
        "usage": {
            "images": len(outcome.items),
            "classes": sum(len(group.class_set) for group in outcome.groups),
            "image_passes": sum(answer.image_passes for answer in answers),
            "text_passes": sum(answer.text_passes for answer in answers),
            "cost": outcome.cost,
            "brownout": max(group.level for group in outcome.groups),
        },
        "timings_ms": {stage: round(ms, 3) for stage, ms in timings_ms.items()},
    }
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


EMPTY: dict[str, Any] = {
    "class_set": None,
    "label": None,
    "score": None,
    "predictions": [],
    "baseline": None,
    "adaptation": None,
    "explain": None,
    "image": None,
}


def _result(
    result: ImageResult, image: Any, names: Sequence[str], score: str, top_k: int | None, again: str
) -> dict[str, Any]:
    after = _predictions(result.scores(score), names, top_k)
    before = _predictions(result.baseline_scores(score), names, top_k)
    return {
        "label": after[0]["label"],
        "score": after[0]["score"],
        "error": None,
        "predictions": after,
        "baseline": {"label": before[0]["label"], "score": before[0]["score"], "predictions": before},
        "adaptation": {**vars(result.adaptation), "replay": again},
        "explain": None if result.explanation is None else _explanation(result.explanation),
        "image": {
            "width": image.width,
            "height": image.height,
            "format": image.format,
            "notes": list(image.notes),
        },
    }


def _explanation(told: Explanation) -> dict[str, Any]:
    """Within 8 KiB, whatever the prototypes are called: names are cut, numbers have as many digits as they mean."""
    body: dict[str, Any] = {
        name: None if value is None or not math.isfinite(value) else round(value, DIGITS)
        for name, value in vars(told).items()
        if name not in ("views", "prototypes")
    }
    views = [{**asdict(view), "entropy": round(view.entropy, DIGITS)} for view in told.views]
    prototypes = [{"name": _cut(p.name), "weight": round(p.weight, DIGITS)} for p in told.prototypes]
    return {"views": views, "prototypes": prototypes, **body}


def _cut(name: str) -> str:
    return name if len(name) <= MAX_TOLD_NAME else name[: MAX_TOLD_NAME - 1] + "\u2026"


def _predictions(scores: FloatArray, names: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """Best first, ties in the order of the classes."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[k], "class_index": int(k), "score": float(scores[k])} for k in order]
