"""What can go wrong with a device, and how it is noticed: errors that concern everyone, weights that change, bits that
depend on the machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gram_core.errors import WeightsChanged

PIECE = 1 << 21  # bytes hashed at a time: a few milliseconds, so that a check never makes anyone wait
BROKEN = ("CUDA error", "cuDNN error", "cuBLAS", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error")


def is_broken(error: BaseException) -> bool:
    """Whether the device itself failed, so that nothing on it can be trusted; too little memory is not that."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN)
    )


def make_deterministic() -> None:
    """Deterministic kernels from here on, in the whole process; an operation without one raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def build(version: str, device: torch.device, shapes: Iterable[tuple[str, int]]) -> str:
    """Twelve digits that agree where an answer's bits may be expected to: versions, processor, threads and shapes."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = [version, torch.__version__, device.type, kind, torch.get_num_threads(), *sorted(shapes)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


class Sentinel:
    """Hashes of tensors that must not change, checked a piece at a time.

    >>> Sentinel([torch.zeros(3)]).check()
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._digests = [_digest(piece) for piece in self._pieces]
        self._next = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def check(self, pieces: int = 1) -> None:
        """Look at the next pieces, in turn; raises WeightsChanged."""
        for _ in range(min(pieces, len(self._pieces))):
            if _digest(self._pieces[self._next]) != self._digests[self._next]:
                raise WeightsChanged("the weights in memory have changed since they were loaded; replace the process.")
            self._next = (self._next + 1) % len(self._pieces)


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The tensor's whole memory, whatever its strides: a copy would never change."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.detach().as_strided((size,), (1,), 0)
    return list(flat.split(max(1, PIECE // flat.element_size())))


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().view(torch.uint8).numpy().tobytes()).digest()
