"""What is shed at which level, and when a level begins and ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gram_core.types import Plan
from server.brownout import Brownout, shed

PLAN = Plan(method="gram", host="residual", scope="batch", steps=20, views=9, seed=0)


@pytest.mark.parametrize(
    ("level", "views", "steps", "skip"), [(0, 9, 20, None), (1, 4, 20, None), (2, 2, 1, None), (3, 9, 20, "brownout")]
)
def test_views_and_steps_go_before_adaptation_itself(level: int, views: int, steps: int, skip: str | None) -> None:
    made = shed(PLAN, level)
    assert (made.views, made.steps, made.skip) == (views, steps, skip)
    assert (made.views_requested, made.steps_requested) == (9, 20)
    assert made.shed == ("brownout" if level in (1, 2) else None)


def test_what_is_small_already_is_left_alone() -> None:
    small = replace(PLAN, views=1, steps=1)
    assert shed(small, 2) == small
    assert shed(replace(PLAN, skip="none_requested"), 3).skip == "none_requested"


def test_a_level_begins_at_its_threshold_and_ends_a_tenth_below() -> None:
    brownout = Brownout((0.5, 0.75, 0.9))
    fills = [0.0, 0.49, 0.5, 0.41, 0.39, 0.76, 0.95, 0.85, 0.79, 0.66, 0.64, 0.2, 1.5]
    assert [brownout.update(fill) for fill in fills] == [0, 0, 1, 1, 0, 2, 3, 3, 2, 2, 1, 0, 3]
    assert Brownout(()).update(5.0) == 0
