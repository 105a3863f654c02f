"""gram_core.draws: what every kind of request has in common, for any classes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gram_core.draws import KINDS, request


@given(
    kind=st.sampled_from(KINDS),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_request_repeats_no_image_and_is_what_its_kind_says(
    kind: str, counts: list[int], size: int, seed: int
) -> None:
    own = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    label = np.repeat(np.arange(len(counts)), counts)
    drawn = request(kind, own, size, np.random.default_rng(seed))
    assert drawn.tolist() == request(kind, own, size, np.random.default_rng(seed)).tolist()
    assert 1 <= len(set(drawn.tolist())) == len(drawn) <= size
    assert set(drawn.tolist()) <= set(range(sum(counts)))
    if kind in ("iid", "sorted"):
        assert len(drawn) == min(size, sum(counts))
    if kind == "single":
        assert len(set(label[drawn].tolist())) == 1
        assert len(drawn) == min(size, counts[label[drawn[0]]])
    if kind == "sorted":
        assert sum(a != b for a, b in pairwise(label[drawn].tolist())) == len(set(label[drawn].tolist())) - 1


def test_an_unknown_kind_is_an_error_in_words() -> None:
    with pytest.raises(ValueError, match="no kind of request 'even'; choose from iid, imbalanced, sorted, single"):
        request("even", [np.arange(3)], 2, np.random.default_rng(0))
