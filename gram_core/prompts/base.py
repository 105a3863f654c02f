"""The contract of a prompt method: pure functions of a dict of tensors.

`init` makes what a checkpoint may keep, which never depends on a class list; `start` turns it into the variables of
one request; `features` and `logits` are pure in those variables. Nothing here is an `nn.Module`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from gram_core.text import ClassSet, TextEncoder
from gram_core.types import Params


class PromptMethod(ABC):
    """A host for tuning. `needs_pixels` says whether `logits` wants pixels or frozen image features."""

    name: str
    needs_pixels = False

    def __init__(self, texts: TextEncoder) -> None:
        self.texts = texts
        self.scale = texts.backbone.logit_scale

    @classmethod
    @abstractmethod
    def why_not(cls, texts: TextEncoder) -> str | None:
        """Why this host can't run on these towers, or None."""

    @abstractmethod
    def init(self) -> Params:
        """What a checkpoint keeps, each with a leading E of 1."""

    @abstractmethod
    def start(self, kept: Params, classes: ClassSet, episodes: int) -> Params:
        """The variables of `episodes` independent tunings of one class set."""

    @abstractmethod
    def features(self, params: Params, classes: ClassSet) -> Tensor:
        """Class features (E, K, D), differentiable in `params`."""

    def logits(self, params: Params, images: Tensor, classes: ClassSet) -> Tensor:
        """Scaled logits (E, B, K) of image features (E, B, D)."""
        return self.scale * images @ self.features(params, classes).transpose(-1, -2)
