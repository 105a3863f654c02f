"""How long adaptation is expected to take, and what still fits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.pace import MOST, Line, Pace, key
from gram_core.types import Plan

BATCH = Plan(method="infomax", host="residual", scope="batch", steps=20, views=8, seed=0)
IMAGE = Plan(method="tpt", host="coop", scope="image", steps=2, views=64, seed=0)
PACE = Pace(
    view_s=0.01,
    lines={key(BATCH): Line(0.02, 0.001, 1e-6), key(IMAGE): Line(0.01, 0.02, 0.001)},
)


def test_a_line_through_three_measurements_predicts_them() -> None:
    line = Line.through(0.10, 0.16, 0.40, steps=3, units=8, wider=32)
    assert abs(line.seconds(1, 8) - 0.10) < 1e-9
    assert abs(line.seconds(3, 8) - 0.16) < 1e-9
    assert abs(line.seconds(3, 32) - 0.40) < 1e-9


def test_a_line_through_noise_is_never_negative() -> None:
    line = Line.through(0.5, 0.1, 0.05, steps=2, units=8, wider=32)
    assert line.seconds(64, 1000) >= 0


def test_a_plan_costs_its_views_and_its_tunings() -> None:
    views = 8 * 7 * 0.01
    assert abs(PACE.seconds(BATCH, 8, 10) - (views + 0.02 + 20 * (0.001 + 8 * 8 * 10 * 1e-6))) < 1e-9
    each = 0.01 + 2 * (0.02 + 10 * 0.001)
    assert abs(PACE.seconds(IMAGE, 3, 10) - (3 * 63 * 0.01 + 3 * each)) < 1e-9
    shared = 0.01 + 2 * (0.02 + 4 * 10 * 0.001)
    assert abs(PACE.seconds(IMAGE, 5, 10, group=4) - (5 * 63 * 0.01 + 2 * shared)) < 1e-9
    assert PACE.seconds(replace(BATCH, skip="too_few_images"), 8, 10) == 0
    assert Pace().seconds(BATCH, 8, 10) == 0  # nothing was measured yet, so nothing is refused


@settings(derandomize=True, deadline=None, database=None)
@given(st.floats(0, 5), st.floats(0, 5), st.sampled_from([BATCH, IMAGE]), st.integers(1, 16), st.integers(2, 200))
def test_what_fits_is_the_largest_that_does_and_more_time_never_means_fewer_steps(
    less: float, more: float, plan: Plan, images: int, classes: int
) -> None:
    made = [PACE.fit(plan, images, classes, budget, "budget") for budget in sorted((less, more))]
    for fitted, budget in zip(made, sorted((less, more)), strict=True):
        if fitted.skip == "budget":
            least = replace(plan, views=2, steps=1)
            assert budget <= 0 or PACE.seconds(least, images, classes) > budget
            continue
        assert PACE.seconds(fitted, images, classes) <= budget
        assert (fitted.steps_requested, fitted.views_requested) == (plan.steps, plan.views)
        assert (fitted == plan) == (fitted.shed is None)
        if fitted.views < plan.views:
            assert PACE.seconds(replace(fitted, views=fitted.views + 1), images, classes) > budget
    tight, roomy = made
    steps = [0 if fitted.skip else fitted.steps for fitted in (tight, roomy)]
    assert steps[0] <= steps[1]
    if steps[0] == steps[1] and not roomy.skip and not tight.skip:
        assert tight.views <= roomy.views


def test_a_correction_follows_what_was_measured_within_bounds() -> None:
    pace = Pace(view_s=0.01)
    for _ in range(100):
        pace.correct(pace.seconds(BATCH, 8, 10), 2.0 * 8 * 7 * 0.01)
    assert abs(pace.factor - 2.0) < 0.01
    for _ in range(200):
        pace.correct(1e-6, 1e6)
    assert pace.factor <= MOST
    pace.correct(0.0, 1.0)  # nothing was predicted: nothing to learn
    assert pace.factor <= MOST
