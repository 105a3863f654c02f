"""Which images arrive together: every kind of request and stream is what its name says."""

from __future__ import annotations

import numpy as np
import pytest

from gram_core.draws import Indices
from gram_core.errors import InvalidConfig
from gram_core.evaluate.protocols import BATCH_KINDS, STREAM_KINDS, Protocol, draw, protocols, skew

K, EACH = 8, 100
LABELS = np.repeat(np.arange(K), EACH)


def requests(kind: str, size: int = 32, count: int = 40, seed: int = 0, labels: Indices = LABELS) -> list[Indices]:
    return draw(Protocol("batch", kind, size), labels, K, count=count, seed=seed)


def stream(kind: str, size: int = 64, seed: int = 0) -> list[Indices]:
    return draw(Protocol("stream", kind, size), LABELS, K, count=0, seed=seed)


def switches(order: Indices) -> float:
    """Share of neighbours in a stream that differ in class."""
    return float((np.diff(LABELS[order]) != 0).mean())


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_a_draw_depends_on_its_seed_alone_and_repeats_no_image(kind: str) -> None:
    size = 64
    first, again, other = requests(kind, size), requests(kind, size), requests(kind, size, seed=1)
    assert len(first) == 40
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))
    for request in first:
        assert len(set(request.tolist())) == len(request) <= size


def test_single_requests_show_one_class_and_all_classes_are_drawn() -> None:
    seen = [set(LABELS[r].tolist()) for r in requests("single", count=200)]
    assert all(len(s) == 1 for s in seen)
    assert set.union(*seen) == set(range(K))  # 200 draws of 8 classes miss one with probability below 1e-10


def test_sorted_requests_hold_at_most_two_classes_where_classes_are_larger_than_requests() -> None:
    for request in requests("sorted"):
        assert len(set(LABELS[request].tolist())) <= 2
        assert len(request) == 32


def test_imbalanced_requests_are_more_skewed_than_iid_ones_and_less_than_single() -> None:
    means = [np.mean([skew(LABELS[r], K) for r in requests(kind)]) for kind in ("iid", "imbalanced", "single")]
    assert means[0] < 0.1 < means[1] < 0.9 < means[2]


@pytest.mark.parametrize(("kind", "low", "high"), [("effective-1-4", 1, 4), ("effective-2-10", 2, 8)])
def test_effective_requests_draw_from_a_number_of_classes_that_is_uniform_in_its_range(
    kind: str, low: int, high: int
) -> None:
    counts = [len(set(LABELS[r].tolist())) for r in requests(kind, 64, count=400)]
    assert min(counts) == low
    assert max(counts) == high
    share = np.bincount(counts, minlength=high + 1)[low]
    # one of the range's numbers has 400/4 or 400/9 draws; 5 standard deviations of a binomial are below 50
    assert abs(share - 400 / (4 if high == 4 else 9)) < 50


def test_a_request_is_shorter_where_the_set_has_too_few_images() -> None:
    labels = np.array([0] * 5 + [1] * 40)
    drawn = draw(Protocol("batch", "single", 32), labels, 2, count=50, seed=0)
    assert {len(r) for r in drawn} == {5, 32}
    few = draw(Protocol("batch", "iid", 64), labels, 2, count=1, seed=0)
    assert len(few[0]) == 45
    assert len(draw(Protocol("batch", "sorted", 64), labels, 2, count=3, seed=0)[0]) == 45


def test_a_class_without_images_is_never_drawn() -> None:
    labels = np.repeat([0, 2], 20)
    for kind in BATCH_KINDS:
        for request in draw(Protocol("batch", kind, 64), labels, 3, count=10, seed=0):
            assert set(labels[request].tolist()) <= {0, 2}


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_stream_shows_every_image_once_in_pieces_of_its_size(kind: str) -> None:
    pieces = stream(kind)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(LABELS)))
    assert [len(p) for p in pieces] == [64] * 12 + [32]


def test_streams_are_correlated_as_their_names_say() -> None:
    orders = {kind: np.concatenate(stream(kind)) for kind in STREAM_KINDS}
    assert switches(orders["sorted"]) == pytest.approx((K - 1) / (len(LABELS) - 1))
    assert switches(orders["shuffled"]) > 0.8  # 7/8 expected, standard deviation 0.012
    runs = [np.mean([len(set(LABELS[p].tolist())) for p in stream(k)]) for k in ("sorted", "correlated", "shuffled")]
    assert runs[0] < runs[1] < runs[2]


def test_the_image_protocol_is_all_images_once() -> None:
    (unit,) = draw(Protocol("image", "each", 1), LABELS, K, count=9, seed=3)
    assert unit.tolist() == list(range(len(LABELS)))


def test_effective_kinds_have_one_size_and_unknown_names_are_refused() -> None:
    made = protocols(("image", "batch", "stream"), BATCH_KINDS, (8, 32, 64), 64)
    assert len(made) == 1 + 4 * 3 + 3 + 3
    assert len(set(map(str, made))) == len(made)
    with pytest.raises(InvalidConfig, match="no kind of batch 'iidd'"):
        protocols(("batch",), ("iidd",), (8,), 64)
    with pytest.raises(InvalidConfig, match="no protocol 'batches'"):
        protocols(("batches",), (), (8,), 64)


def test_skew_is_zero_for_even_requests_and_one_for_one_class() -> None:
    assert skew(np.arange(8), 8) == pytest.approx(0)
    assert skew(np.zeros(8, dtype=np.int64), 8) == 1
    assert skew(np.arange(4), 100) == pytest.approx(0)  # as even as four images can be
    assert 0 < skew(np.array([0, 0, 0, 1]), 2) < 1
