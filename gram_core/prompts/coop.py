"""CoOp: learned context tokens before the class name (Zhou et al., IJCV 2022, eq. 3; unified context)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gram_core.prompts.base import PromptMethod
from gram_core.text import ClassSet, TextEncoder
from gram_core.types import Params


class Coop(PromptMethod):
    """`context` (E, N, W), started from the token embeddings of "a photo of a".

    Where the request's own texts are the start prompt's, the class feature is the tuned prompt's. With other
    templates, ensembles or sentences it is norm(baseline + tuned - start), so that no shift means the baseline.
    """

    name = "coop"

    @classmethod
    def why_not(cls, texts: TextEncoder) -> str | None:
        return texts.backbone.text_note

    def init(self) -> Params:
        return {"context": self.texts.start_context()[None]}

    def start(self, kept: Params, classes: ClassSet, episodes: int) -> Params:
        return {"context": kept["context"].expand(episodes, -1, -1).clone()}

    def features(self, params: Params, classes: ClassSet) -> Tensor:
        tuned = self.texts.encode_context(classes, params["context"])
        if classes.starts_at_baseline:
            return tuned
        shift = tuned - self.texts.start_features(classes)
        return F.normalize(self.texts.features(classes) + shift, dim=-1)
