"""Tokens: what is written is what is read, and nothing in one is believed."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.types import Adaptation, Plan
from server.errors import ApiError
from server.fake import FakeClassifier
from server.replay import MOST, VERSION, differences, read, token

MODEL = FakeClassifier().info
PLAN = Plan(method="gram", host="residual", scope="batch", steps=20, views=8, seed=2**32 - 1)
DID = Adaptation(
    method="gram", host="residual", scope="batch", status="completed", reason=None, steps=20, steps_requested=20,
    views=8, views_requested=8, views_kept=8, entropy_before=1.0, entropy_after=1.0, kl=0.0, label_changed=False,
    accepted=True, temperature=1.0, ms=1.0, digest="",
)  # fmt: skip
CLASSES, IMAGES = "cs_" + "1" * 32, [b"\1" * 32, b"\2" * 32]


@pytest.mark.parametrize(
    ("did", "plan", "expected"),
    [
        ({}, PLAN, PLAN),
        (
            {"status": "partial", "reason": "deadline", "steps": 3},
            PLAN,
            replace(PLAN, steps=3, shed="deadline", asked_steps=20, asked_views=8),
        ),
        ({"status": "skipped", "reason": "brownout"}, replace(PLAN, skip="brownout"), replace(PLAN, skip="brownout")),
        ({"status": "skipped", "reason": "deadline"}, PLAN, replace(PLAN, skip="deadline")),
        ({"status": "fallback", "reason": "out_of_memory"}, PLAN, replace(PLAN, skip="out_of_memory")),
        ({"status": "fallback", "reason": "kl_cap"}, PLAN, PLAN),  # another run would say the same
    ],
)
def test_a_token_holds_the_plan_as_it_was_run(did: dict[str, Any], plan: Plan, expected: Plan) -> None:
    made = token(replace(DID, **did), plan, MODEL, CLASSES, IMAGES)
    assert made.startswith(VERSION)
    assert len(made) <= MOST
    recorded = read(made)
    assert recorded.plan == expected
    assert differences(recorded, MODEL, CLASSES, IMAGES) == []


def test_every_difference_is_named() -> None:
    recorded = read(token(DID, PLAN, MODEL, CLASSES, IMAGES))
    assert differences(recorded, replace(MODEL, build="other"), CLASSES, IMAGES) == ["build"]
    assert differences(recorded, replace(MODEL, weights_sha256="f" * 64), CLASSES, IMAGES) == ["weights"]
    assert differences(recorded, replace(MODEL, checkpoint_sha256="f" * 64), CLASSES, IMAGES) == ["checkpoint"]
    assert differences(recorded, MODEL, "cs_" + "2" * 32, IMAGES) == ["classes"]
    assert differences(recorded, MODEL, CLASSES, IMAGES[::-1]) == []  # no answer depends on their order
    assert differences(recorded, MODEL, CLASSES, IMAGES[:1]) == ["images"]
    assert differences(recorded, MODEL, CLASSES, [IMAGES[0], IMAGES[0]]) == ["images"]
    assert differences(recorded, MODEL, "cs_" + "2" * 32) == ["classes"]


def forged(**changes: Any) -> str:
    body = json.loads(base64.urlsafe_b64decode(token(DID, PLAN, MODEL, CLASSES, IMAGES).removeprefix(VERSION) + "==="))
    plan = [*body["p"]]
    for place, value in changes.pop("plan", {}).items():
        plan[place] = value
    return VERSION + base64.urlsafe_b64encode(json.dumps({**body, "p": plan, **changes}).encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gr1.",
        "gr1.x",
        "gr1." + "A" * MOST,
        "gr1.\u00e9",
        "nonsense",
        forged(b=7),
        forged(more="x"),
        forged(p=[]),
        forged(plan={0: 3}),
        forged(plan={2: "auto"}),
        forged(plan={3: -1}),
        forged(plan={3: True}),
        forged(plan={4: 129}),
        forged(plan={5: 2**32}),
        forged(plan={6: "because"}),
        forged(plan={7: "because"}),
        forged(plan={8: "x"}),
        VERSION + base64.urlsafe_b64encode(b"[" * 700).decode(),
    ],
)
def test_what_is_no_token_is_422(text: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(text)
    assert (refused.value.code, refused.value.param) == ("invalid_request", "adaptation.replay")


def test_another_version_is_409() -> None:
    with pytest.raises(ApiError) as refused:
        read("gr2." + "A" * 40)
    assert refused.value.code == "replay_mismatch"


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(st.one_of(st.text(max_size=1200), st.binary(max_size=300).map(lambda b: VERSION + base64.b64encode(b).decode())))
def test_any_text_is_a_token_or_an_api_error(text: str) -> None:
    with suppress(ApiError):
        read(text)
