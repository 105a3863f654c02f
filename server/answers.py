"""What is answered: the shape of a classification and of an error, and how a result becomes one.

The models are what the OpenAPI document promises; tests hold every answer to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gram_core.types import Adaptation, Answer, Explanation, FloatArray, ImageResult, ModelInfo, Plan
from server.errors import ApiError
from server.replay import token

DIGITS = 6  # of what an explanation says
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


class ClassifyAnswer(Strict):
    """The answer of `/v1/classify`."""

    id: str
    object: Literal["classification"]
    created: int
    model: ModelName
    class_set: ClassSetUsed
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


def classification(
    *,
    request_id: str,
    created: int,
    model: ModelInfo,
    class_set: Any,
    score: str,
    top_k: int | None,
    items: Sequence[tuple[str | None, Any]],
    answer: Answer | None,
    plan: Plan,
    cost: float,
    brownout: int,
    timings_ms: Mapping[str, float],
) -> bytes:
    """The JSON of `ClassifyAnswer`.

    `plan` is what was run, at a level of the brown-out (0: that took nothing away). `items` are the caller's id and
    the prepared image, or the `ApiError` that it got instead; `answer` holds one result for each prepared image, in
    order, and is None if there was none.
    """
    answered = iter(answer.results if answer is not None else ())
    hashes = [image.sha256 for _, image in items if not isinstance(image, ApiError)]
    results: list[dict[str, Any]] = []
    for index, (name, image) in enumerate(items):
        head = {"index": index, "id": name}
        if isinstance(image, ApiError):
            results.append({**head, **EMPTY, "error": {"code": image.code, "message": image.message}})
        else:
            result = next(answered)
            together = [image.sha256] if plan.scope == "image" else hashes
            again = token(result.adaptation, plan, model, class_set.id, together)
            results.append({**head, **_result(result, image, class_set.names, score, top_k, again)})
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
            "id": class_set.id,
            "size": len(class_set),
            "text_cache": answer.text_cache if answer is not None else None,
        },
        "results": results,
        "usage": {
            "images": len(items),
            "classes": len(class_set),
            "image_passes": answer.image_passes if answer is not None else 0,
            "text_passes": answer.text_passes if answer is not None else 0,
            "cost": cost,
            "brownout": brownout,
        },
        "timings_ms": {stage: round(ms, 3) for stage, ms in timings_ms.items()},
    }
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


EMPTY: dict[str, Any] = {
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
