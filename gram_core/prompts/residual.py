"""TaskRes: a residual on the class features (Yu et al., CVPR 2023, eq. 4), made per request, zero at the start."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core.prompts.base import PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.types import Params


def shifted(base: Tensor, residual: Tensor) -> Tensor:
    """norm(t0 + z) (..., K, D), written as a shift of `base` so that z = 0 gives it bit for bit."""
    return base + (F.normalize(base + residual, dim=-1) - F.normalize(base, dim=-1))


class Residual(PromptMethod):
    """`residual` (E, K, D): t = norm(t0 + z). No text pass and no text gradient, whatever the tower."""

    name = "residual"

    @classmethod
    def why_not(cls, texts: TextEncoder) -> str | None:
        return None

    def init(self) -> Params:
        return {}

    def start(self, kept: Params, classes: ClassSet, episodes: int) -> Params:
        base = self.texts.features(classes)
        return {"residual": torch.zeros(episodes, *base.shape, device=base.device)}

    def features(self, params: Params, classes: ClassSet) -> Tensor:
        return shifted(self.texts.features(classes), params["residual"])
