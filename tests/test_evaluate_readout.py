"""Figures and intervals: hand-computed cases, and coverage where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from gram_core.draws import Indices
from gram_core.evaluate.readout import (
    BLOCK,
    BySkew,
    Drawn,
    Given,
    calibration,
    compare,
    ece,
    mean_of_sets,
    merged,
    seed_of,
    weights,
)


def answers(labels: Indices, confidence: float = 0.5) -> Given:
    return Given(labels, np.full(len(labels), confidence, dtype=np.float32))


def test_every_draw_of_weights_sums_to_one_and_one_request_draws_images_only() -> None:
    drawn = Drawn.of([(0, np.arange(5)), (0, np.arange(3, 9))])
    made = np.concatenate(list(weights(drawn, 2 * BLOCK + 100, 0)))
    assert made.shape == (2 * BLOCK + 100, 11)
    np.testing.assert_allclose(made.sum(1), 1)
    alone = np.concatenate(list(weights(Drawn.of([(0, np.arange(4))]), 200, 0)))
    assert set(np.unique(np.round(alone * 4)).tolist()) <= {0, 1, 2, 3, 4}


def test_the_calibration_error_of_a_case_worked_by_hand() -> None:
    # two bins: 0.25 with accuracy 1/2 (share 2/4), 0.9 with accuracy 1 (share 2/4): 0.5*0.25 + 0.5*0.1
    confidence = np.array([0.25, 0.25, 0.9, 0.9], dtype=np.float32)
    bins = calibration(confidence, np.array([True, False, True, True]), 2)
    assert ece(bins) == pytest.approx(100 * (0.5 * 0.25 + 0.5 * 0.1), abs=0.01)
    assert [b["share"] for b in bins] == [0.5, 0.5]


def test_certainty_falls_into_the_last_bin() -> None:
    assert calibration(np.ones(3, dtype=np.float32), np.ones(3, dtype=bool), 15)[0]["confidence"] == 1


def test_gains_are_paired_and_signed() -> None:
    truth = np.zeros(100, dtype=np.int64)
    drawn = Drawn.of([(s, np.arange(100)) for s in range(2)])
    base = np.array([1] * 40 + [0] * 60)
    ours = np.array([0] * 20 + [1] * 20 + [0] * 60)  # 20 images of 100 put right, none spoilt
    given = {
        "zero-shot": answers(np.tile(base, 2)),
        "ours": answers(np.tile(ours, 2)),
        "tpt": answers(np.tile(ours, 2)),
    }
    made = compare(drawn, truth, given, size=20, bins=15, draws=4000, seed=0)
    cell = made["ours"].cell
    assert (cell["top1"], cell["gain"]["mean"], cell["by_seed"]) == (80.0, 20.0, [80.0, 80.0])
    assert cell["gain_tpt"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert made["zero-shot"].cell["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert made["tpt"].cell["gain_tpt"] is None
    # the same 100 images twice: the interval is that of 100 images, 20 +- 1.96 * 4, not of 200
    assert cell["gain"]["low"] == pytest.approx(20 - 7.84, abs=1.5)
    assert cell["gain"]["high"] == pytest.approx(20 + 7.84, abs=1.5)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    # 200 worlds: images with a gain of +1 at 10 %, -1 at 10 %; requests of 20 drawn from 150 of them. The two-way
    # bootstrap is conservative: it may cover more than 95 %, never clearly less. 190 expected, 3 sd = 9.
    rng = np.random.default_rng(0)
    covered = 0
    for world in range(200):
        delta = rng.choice([1, 0, -1], p=[0.1, 0.8, 0.1], size=150)
        units = [(0, rng.permutation(150)[:20]) for _ in range(30)]
        drawn = Drawn.of(units)
        truth = np.zeros(150, dtype=np.int64)
        base, ours = (delta == 1).astype(int), (delta == -1).astype(int)  # wrong where it is 1
        given = {"zero-shot": answers(base[drawn.image]), "ours": answers(ours[drawn.image])}
        gain = compare(drawn, truth, given, size=20, bins=2, draws=400, seed=world)["ours"].cell["gain"]
        covered += gain["low"] <= 0 <= gain["high"]
    assert covered >= 181


def test_the_mean_of_sets_weighs_sets_alike() -> None:
    made = []
    for right, count in ((True, 10), (False, 1000)):
        truth = np.zeros(count, dtype=np.int64)
        drawn = Drawn.of([(0, np.arange(count))])
        given = {"zero-shot": answers(truth + 1), "ours": answers(truth if right else truth + 1)}
        made.append(compare(drawn, truth, given, size=20, bins=15, draws=200, seed=0)["ours"])
    mean = mean_of_sets(made)
    assert (mean["sets"], mean["top1"], mean["gain"]["mean"]) == (2, 50.0, 50.0)
    assert mean["gain_tpt"] is None


def test_copies_of_one_set_share_draws_so_that_their_mean_is_not_too_sure() -> None:
    # the same images twice say no more than once: the mean of two copies has the interval of one
    rng = np.random.default_rng(0)
    truth = np.zeros(200, dtype=np.int64)
    drawn = Drawn.of([(0, np.arange(200))])
    given = {"zero-shot": answers(rng.integers(0, 2, 200)), "ours": answers(rng.integers(0, 2, 200))}
    seed = seed_of("a", "image/each/1")
    one = compare(drawn, truth, given, size=1, bins=15, draws=500, seed=seed)["ours"]
    again = compare(drawn, truth, given, size=1, bins=15, draws=500, seed=seed)["ours"]
    assert mean_of_sets([one, again])["gain"] == one.cell["gain"]
    other = compare(drawn, truth, given, size=1, bins=15, draws=500, seed=seed_of("b", "image/each/1"))["ours"]
    both = mean_of_sets([one, other])["gain"]
    assert both["high"] - both["low"] < 0.85 * (one.cell["gain"]["high"] - one.cell["gain"]["low"])  # about 0.71


def test_gains_are_binned_by_the_skew_of_their_request() -> None:
    truth = np.array([0, 1, 0, 0])
    drawn = Drawn.of([(0, np.array([0, 1])), (0, np.array([2, 3]))])
    base, ours = answers(np.array([1, 1, 1, 1])), answers(np.array([0, 1, 1, 1]))
    by_skew = BySkew(200)
    by_skew.add(drawn, truth, 2, {"zero-shot": base, "ours": ours}, 0)
    rows = by_skew.rows("ours")
    assert [(r["skew"], r["gain"], r["windows"]) for r in rows] == [(0.0, 50.0, 1), (1.0, 0.0, 1)]


def test_the_band_of_gain_by_skew_holds_the_truth_about_as_often_as_it_says() -> None:
    # 60 worlds without a true gain, 400 requests from 150 images each: requests alone would cover in 14 % of worlds
    covered = 0
    for world in range(60):
        rng = np.random.default_rng(world)
        delta = rng.choice([1, 0, -1], p=[0.1, 0.8, 0.1], size=150)
        drawn = Drawn.of([(0, rng.permutation(150)[:32]) for _ in range(400)])
        truth = np.zeros(150, dtype=np.int64)
        base, ours = (delta == 1).astype(int), (delta == -1).astype(int)
        by_skew = BySkew(200)
        given = {"zero-shot": answers(base[drawn.image]), "ours": answers(ours[drawn.image])}
        by_skew.add(drawn, truth, 2, given, world)
        (row,) = by_skew.rows("ours")
        covered += row["low"] <= 0 <= row["high"]
    assert covered >= 51  # 57 expected at 95 %; 3.5 standard deviations of a binomial are 6


def test_merged_diagrams_weigh_sets_alike_and_shares_sum_to_one() -> None:
    one = [{"confidence": 0.25, "accuracy": 0.5, "share": 1.0}]
    two = [{"confidence": 0.25, "accuracy": 1.0, "share": 0.5}, {"confidence": 0.95, "accuracy": 1.0, "share": 0.5}]
    bins = merged([one, two])
    assert sum(b["share"] for b in bins) == pytest.approx(1)
    assert bins[0]["accuracy"] == pytest.approx((0.5 * 1 + 1.0 * 0.5) / 1.5, abs=1e-3)
