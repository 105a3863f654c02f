"""Structure complexity: known values, invariances, and decisions that are monotone and bounded."""

from __future__ import annotations

import numpy as np
import pytest

from prototypes import complexity
from prototypes.vectors import unit

KAPPA = np.linspace(0.0, 1.0, 101)


def test_effective_rank_counts_equally_used_dimensions() -> None:
    # Plus and minus each of five axes: five equal eigenvalues, so exp(log 5).
    x = np.concatenate([np.eye(8)[:5], -np.eye(8)[:5]]).astype(np.float32)
    assert complexity.effective_rank(x) == pytest.approx(5.0)


def test_effective_rank_is_the_same_by_either_gram_matrix() -> None:
    x = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    values = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    share = values / values.sum()
    assert complexity.effective_rank(x) == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-4)
    assert complexity.effective_rank(x[:10]) == pytest.approx(
        complexity.effective_rank(np.pad(x[:10], ((0, 0), (0, 30)))), rel=1e-6
    )


def test_identical_rows_have_no_spread() -> None:
    x = np.repeat(unit(np.ones((1, 16))), 9, axis=0)
    assert complexity.concentration(x) == pytest.approx(0.0, abs=1e-6)
    assert complexity.effective_rank(x) == 1.0


def test_concentration_is_the_mean_distance_over_the_log_of_the_size() -> None:
    x = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    assert complexity.concentration(x) == pytest.approx(1.0 / np.log(12.0))


def test_confusion_is_zero_for_clear_nodes_and_half_between_two_alike() -> None:
    eye = np.eye(4, dtype=np.float32)
    assert complexity.confusion(eye[:1], eye[:2], 0, 100.0) == pytest.approx(0.0, abs=1e-6)
    assert complexity.confusion(eye[:1], eye[[1, 1]], 0, 100.0) == pytest.approx(0.5)
    assert complexity.confusion(eye[:1], eye[:1], 0, 100.0) == 0.0


def test_percentile_ranks_fill_the_unit_interval_and_share_ties() -> None:
    assert complexity.percentile_ranks([3.0, 1.0, 2.0]).tolist() == [1.0, 0.0, 0.5]
    assert complexity.percentile_ranks([7.0, 7.0, 7.0]).tolist() == [0.5, 0.5, 0.5]
    assert complexity.percentile_ranks([4.0]).tolist() == [0.5]


def test_kappa_depends_on_ranks_alone_and_not_on_the_order_of_siblings() -> None:
    rng = np.random.default_rng(1)
    measures = rng.random((3, 20))
    kappa = complexity.kappa(*measures)
    assert kappa.min() >= 0.0
    assert kappa.max() <= 1.0
    np.testing.assert_allclose(complexity.kappa(*np.exp(5 * measures)), kappa)
    order = rng.permutation(20)
    np.testing.assert_allclose(complexity.kappa(*measures[:, order]), kappa[order])


def test_children_grow_with_complexity_between_their_bounds() -> None:
    k = complexity.children(KAPPA, np.full(101, 10_000), 4, 64, 32)
    assert (np.diff(k) >= 0).all()
    assert (k[0], k[50], k[-1]) == (4, 16, 64)


def test_a_node_is_not_split_below_twice_the_smallest_child() -> None:
    assert complexity.children([0.5, 0.5, 0.5], [23, 24, 36], 4, 64, 12).tolist() == [1, 2, 3]


def test_prototypes_grow_with_complexity_between_their_bounds() -> None:
    p = complexity.prototypes(KAPPA)
    assert (np.diff(p) >= 0).all()
    assert (p[0], p[-1]) == (1, 8)


def test_harder_tasks_have_more_ways_and_fewer_shots_at_constant_compute() -> None:
    way, shots = complexity.task_shape(KAPPA, np.full(101, 100), np.full(101, 100))
    assert (np.diff(way) >= 0).all()
    assert (np.diff(shots) <= 0).all()
    assert (way[0], way[-1], shots[0], shots[-1]) == (5, 32, 12, 2)
    assert (way * shots <= complexity.SUPPORT).all()


def test_a_task_never_asks_for_more_than_exists() -> None:
    way, shots = complexity.task_shape([1.0, 0.0], [3, 3], [1, 40])
    assert way.tolist() == [3, 3]
    assert shots.tolist() == [1, 16]


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_sampling_is_a_distribution_with_a_floor(progress: float) -> None:
    p = complexity.sampling(KAPPA, np.full(101, 9), progress)
    assert p.sum() == pytest.approx(1.0)
    assert p.min() >= 0.2 / 101
    assert KAPPA[p.argmax()] == pytest.approx(0.25 + 0.5 * progress)


def test_sampling_prefers_larger_nodes_by_the_root_of_their_size() -> None:
    p = complexity.sampling([0.5, 0.5], [100, 400], 0.5, floor=0.0)
    assert p[1] / p[0] == pytest.approx(2.0)


def test_the_controls_keep_their_promises() -> None:
    x = np.random.default_rng(2).random(50)
    np.testing.assert_array_equal(complexity.control(x, "measured", 0), x)
    np.testing.assert_array_equal(complexity.control(x, "fixed", 0), 0.5)
    np.testing.assert_allclose(complexity.control(x, "inverted", 0), 1 - x)
    permuted = complexity.control(x, "permuted", 0)
    assert sorted(permuted) == sorted(x)
    assert not np.array_equal(permuted, x)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="choose one of measured, fixed"):
        complexity.control([0.5], "shuffled", 0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        complexity.children([1.5], [100], 4, 64, 1)
    with pytest.raises(ValueError, match="low <= high"):
        complexity.prototypes([0.5], 8, 1)
    with pytest.raises(ValueError, match="progress"):
        complexity.sampling([0.5], [1], 2.0)
