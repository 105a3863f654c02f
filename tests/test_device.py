"""Weights that change are noticed, and a broken device is told from too little memory."""

from __future__ import annotations

import pytest
import torch

from gram_core.backbone import Backbone
from gram_core.device import PIECE, Sentinel, build, is_broken
from gram_core.errors import WeightsChanged


def test_a_change_of_one_bit_anywhere_is_noticed() -> None:
    tensors = [
        torch.zeros(PIECE // 4 + 5),
        torch.zeros(3, 4).T,
        torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.zeros((), dtype=torch.bfloat16),
        torch.zeros(4, dtype=torch.int64),
    ]
    sentinel = Sentinel(tensors)
    sentinel.check(len(sentinel))
    for tensor in tensors:
        last = tensor.view(-1)[-1:] if tensor.is_contiguous() else tensor[(-1,) * tensor.dim()]
        last += 1
        with pytest.raises(WeightsChanged):
            sentinel.check(len(sentinel))
        last -= 1
        sentinel.check(2 * len(sentinel))


def test_every_piece_has_its_turn() -> None:
    tensors = [torch.zeros(4) for _ in range(5)]
    sentinel = Sentinel(tensors)
    tensors[4] += 1
    for _ in range(4):
        sentinel.check()
    with pytest.raises(WeightsChanged):
        sentinel.check()


def test_every_weight_of_a_backbone_is_watched(tiny: Backbone) -> None:
    watched = {t.untyped_storage().data_ptr() for t in tiny.tensors()}
    assert tiny.text is not None
    theirs = [*tiny._visual.parameters(), *tiny._visual.buffers(), tiny.text.tokens, tiny.text.positions]
    theirs += [layer.up[0] for layer in tiny.text.layers]
    assert {t.untyped_storage().data_ptr() for t in theirs} <= watched


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (torch.AcceleratorError("device-side assert"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_a_broken_device_is_told_from_a_bug_and_from_too_little_memory(error: Exception, broken: bool) -> None:
    assert is_broken(error) is broken


def test_a_build_names_everything_that_decides_bits() -> None:
    cpu = torch.device("cpu")
    first = build("1", cpu, {"a": 1}.items())
    assert first == build("1", cpu, {"a": 1}.items())
    assert len({first, build("2", cpu, {"a": 1}.items()), build("1", cpu, {"a": 2}.items())}) == 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert build("1", cpu, {"a": 1}.items()) != first
    finally:
        torch.set_num_threads(threads)
