"""Replay tokens: what was run, so that the same can be run again (api.md section 3).

A token holds a plan, a seed and hashes: no names and no pixels. It is not signed, so nothing in it is believed before
it is checked, and it can ask for nothing that a request could not.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gram_core.types import Adaptation, ModelInfo, Plan
from server.errors import ApiError

VERSION = "gr1."
MOST = 1024  # bytes
PLAN = ("method", "host", "scope", "steps", "views", "seed", "skip", "shed", "asked_steps", "asked_views")
REPLACED = {"fallback": ("out_of_memory", "internal")}  # what another run may do better: the answer was zero-shot
SKIPS = frozenset({"none_requested", "budget", "deadline", "brownout", "single_class", "too_few_images",
                   *REPLACED["fallback"]})  # fmt: skip
SHEDS = frozenset({"budget", "deadline", "brownout"})


@dataclass(frozen=True)
class Recorded:
    """A token that was read: the plan to run, and what must be the same as then."""

    plan: Plan
    facts: dict[str, str]


def token(did: Adaptation, plan: Plan, model: ModelInfo, class_set: str, images: Sequence[bytes]) -> str:
    """Of one result: `plan` as it was run, `images` the SHA-256 of those that were tuned together."""
    if did.status == "skipped" or did.reason in REPLACED["fallback"]:
        plan = replace(plan, skip=did.reason)
    elif did.status == "partial" and did.steps < plan.steps:
        plan = replace(plan.less(did.reason or "deadline", views=plan.views, steps=did.steps))
    body = {"p": [getattr(plan, name) for name in PLAN], **_facts(model, class_set, images)}
    return VERSION + base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":")).encode()).decode().rstrip("=")


def read(text: str) -> Recorded:
    """Raises ApiError 422 for what is no token of this version, and 409 for one of another."""
    if len(text) > MOST or not text.isascii():
        raise _no_token()
    if not text.startswith(VERSION):
        if text.startswith("gr") and "." in text[:8]:
            raise mismatch(["version"])
        raise _no_token()
    data = text.removeprefix(VERSION)
    try:
        raw = base64.b64decode(data + "=" * (-len(data) % 4), altchars=b"-_", validate=True)
        body = json.loads(raw)
        fields: dict[str, Any] = dict(zip(PLAN, body.pop("p"), strict=True))
        if not all(isinstance(value, str) for value in body.values()) or set(body) != set(FACTS):
            raise _no_token()
    except (binascii.Error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _no_token() from None
    if not _plausible(fields):
        raise _no_token()
    return Recorded(Plan(**fields), {FACTS[short]: value for short, value in body.items()})


def differences(
    recorded: Recorded, model: ModelInfo, class_set: str, images: Sequence[bytes] | None = None
) -> list[str]:
    """Names of what is not as it was then; without `images`, of everything else."""
    now = {FACTS[short]: value for short, value in _facts(model, class_set, images or ()).items()}
    names = [name for name in FACTS.values() if name != "images" or images is not None]
    return [name for name in names if recorded.facts[name] != now[name]]


def mismatch(names: Iterable[str]) -> ApiError:
    """409, and what differs."""
    sentence = f"this token was made with another {', '.join(names)}; leave replay out to run the request as it is."
    return ApiError("replay_mismatch", sentence, param="adaptation.replay")


FACTS = {"b": "build", "w": "weights", "c": "checkpoint", "k": "classes", "i": "images"}


def _facts(model: ModelInfo, class_set: str, images: Sequence[bytes]) -> dict[str, str]:
    return {
        "b": model.build,
        "w": model.weights_sha256[:16],
        "c": (model.checkpoint_sha256 or "none")[:16],
        "k": class_set,
        "i": hashlib.sha256(b"".join(sorted(images))).hexdigest()[:32],  # no answer depends on their order
    }


def _plausible(fields: dict[str, Any]) -> bool:
    """Whether these can be a plan at all; what this model can run is asked of the model."""

    def count(value: Any, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    asked = [("asked_steps", 0, 64), ("asked_views", 1, 128)]
    return (
        isinstance(fields["method"], str)
        and isinstance(fields["host"], str | None)
        and fields["scope"] in ("image", "batch")
        and count(fields["steps"], 0, 64)
        and count(fields["views"], 1, 128)
        and count(fields["seed"], 0, 2**32 - 1)
        and fields["skip"] in (None, *SKIPS)
        and fields["shed"] in (None, *SHEDS)
        and all(fields[name] is None or count(fields[name], least, most) for name, least, most in asked)
    )


def _no_token() -> ApiError:
    sentence = "adaptation.replay: is not a token of this server. Send one as an answer gave it."
    return ApiError("invalid_request", sentence, param="adaptation.replay")
