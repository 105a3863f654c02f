"""The small shared types, and the shape legend that every docstring uses.

**E** episodes (independent tunings in one pass), **B** images, **V** views per image, **K** classes,
**N** context tokens, **T** tokens, **S** packed suffix tokens, **W** text width, **D** joint dimension.

This module imports no torch, so that the wire layer can name results without loading a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    Params: TypeAlias = dict[str, Tensor]
    """The only thing ever tuned, saved or compared; every tensor has a leading E."""
else:
    Params = dict

FloatArray: TypeAlias = NDArray[np.float32]

SCORE_KINDS = ("softmax", "cosine", "logit")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a caller asks for; None means the model's own default."""

    method: str | None = None
    host: str | None = None
    scope: str = "auto"
    steps: int | None = None
    views: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be run: a `Tuning` with every default filled in. `skip` says why nothing will be tuned.

    A plan that was made smaller than asked says why in `shed`, and keeps what was asked.
    """

    method: str
    host: str | None
    scope: str
    steps: int
    views: int
    seed: int
    skip: str | None = None
    shed: str | None = None
    asked_steps: int | None = None
    asked_views: int | None = None

    @property
    def steps_requested(self) -> int:
        """Before anything was shed."""
        return self.steps if self.asked_steps is None else self.asked_steps

    @property
    def views_requested(self) -> int:
        """Before anything was shed."""
        return self.views if self.asked_views is None else self.asked_views

    def less(self, why: str, *, views: int, steps: int) -> Plan:
        """The same with at most these views and steps; equal if that is no less."""
        views, steps = min(views, self.views), min(steps, self.steps)
        if self.skip is not None or (views, steps) == (self.views, self.steps):
            return self
        asked = self.steps_requested, self.views_requested
        return replace(self, shed=why, views=views, steps=steps, asked_steps=asked[0], asked_views=asked[1])


def never(_: float) -> str | None:
    """No reason to stop."""
    return None


@dataclass(frozen=True, eq=False)
class Work:
    """One request's part of a run: prepared images, a class set, and what to do with them.

    `stop` is asked before views are cut and before every step, with the seconds since zero-shot was there: why this
    request's tuning must end now, or None. `early` is given the zero-shot answer as soon as it is there: all there will
    be where the plan tunes nothing, else what to answer when time runs out in the middle of a step. With a `memory`
    (`gram_core.memory.Snapshot`) its images are tuned along, and the answer holds what was seen of these. Without
    images only the class features are computed; where `features` is true the answer holds them and the originals'.
    """

    images: Sequence[Any]
    classes: Any
    plan: Plan
    explain: bool = False
    stop: Callable[[float], str | None] = never
    early: Callable[[Answer], None] | None = None
    memory: Any = None
    features: bool = False

    @property
    def together(self) -> int:
        """Images that a joint tuning sees."""
        return len(self.images) + (0 if self.memory is None else len(self.memory.sha256))

    @property
    def looked_at(self) -> bool:
        """Whether its images' views are needed: to tune on, or to be remembered where they are too few to tune on."""
        return self.plan.skip is None or (self.memory is not None and self.plan.skip == "too_few_images")

    @property
    def final(self) -> bool:
        """Whether zero-shot is all that there will be."""
        return self.plan.skip is not None and self.memory is None and not self.features


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What happened to one image. Entropies and KL in nats on the original view, before the temperature."""

    method: str
    host: str | None
    scope: str
    status: str
    reason: str | None
    steps: int
    steps_requested: int
    views: int
    views_requested: int
    views_kept: int
    entropy_before: float
    entropy_after: float
    kl: float
    label_changed: bool
    accepted: bool
    temperature: float
    ms: float
    digest: str


@dataclass(frozen=True)
class ViewSeen:
    """One view: its box (top, left, height, width) in pixels of the working image, whether it is mirrored, the
    zero-shot entropy (nats) of its prediction, and whether the tuning used it. The original has no box."""

    box: tuple[int, int, int, int] | None
    flip: bool
    entropy: float
    kept: bool


@dataclass(frozen=True)
class PrototypeSeen:
    """A prototype of the tree near the image: a concept's name, and its share of the relation."""

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an image got its answer; None where the method has no such thing.

    Attributes:
        views: at most 64 of them; prototypes: the five concepts that weigh most, where a bank is loaded.
        trust: in [0, 1], how far the structure is trusted for this request; 0 is plain tuning.
        shift: 1 - cosine to the nearest prototype: how far the image is from what the tree knows.
        skew: 1 - H(estimated class shares) / log K of the request: 0 equal shares, 1 a single class.
        rho: weight of the rehearsed root in the joint loss.
        structure_share: in [0, 1], the part of this image's step that is not the tuned prompt's.
        prompt_shift: root mean square of the tuned variable's change.
    """

    views: tuple[ViewSeen, ...] = ()
    prototypes: tuple[PrototypeSeen, ...] = ()
    trust: float | None = None
    shift: float | None = None
    skew: float | None = None
    rho: float | None = None
    structure_share: float | None = None
    prompt_shift: float | None = None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Scores of one image over all K classes, before and after.

    `cosines` and `baseline_cosines` are (K,) float32; logits are `scale * cosine`, and the answer's are
    divided by `adaptation.temperature`, which keeps the confidence of a tuned answer calibrated.
    """

    cosines: FloatArray
    baseline_cosines: FloatArray
    scale: float
    adaptation: Adaptation
    explanation: Explanation | None = None

    def scores(self, kind: str = "softmax") -> FloatArray:
        """The answer's scores, (K,): one of `SCORE_KINDS`."""
        return _scores(self.cosines, self.scale, self.adaptation.temperature, kind)

    def baseline_scores(self, kind: str = "softmax") -> FloatArray:
        """What plain zero-shot says, (K,)."""
        return _scores(self.baseline_cosines, self.scale, 1.0, kind)


@dataclass(frozen=True, eq=False)
class Answer:
    """One result per image, in the order they were given, and what it cost.

    `seen` are the images' features for the memory of a session (`gram_core.tuner.Seen`), where the work had one and
    they were looked at; `features` are unit (B, D) of the originals and (K, D) of the classes, where asked for.
    """

    results: tuple[ImageResult, ...]
    text_cache: str
    image_passes: int
    text_passes: int
    timings_ms: dict[str, float] = field(default_factory=dict)
    seen: Any = None
    features: tuple[FloatArray, FloatArray] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a client may know of the loaded model; every value is plain JSON."""

    name: str
    weights_sha256: str
    fingerprint: str
    device: str
    dtype: str
    image_size: int
    joint_dim: int
    context_length: int
    parameters: int
    logit_scale: float
    text_path: str
    text_path_note: str | None
    root: bool
    checkpoint_sha256: str | None
    checkpoint_note: str | None
    methods: tuple[str, ...]
    hosts: tuple[str, ...]
    default_method: str
    batch_from: int
    defaults: dict[str, dict[str, float | int | str]]
    shapes: dict[str, int]
    build: str = ""  # what else decides the bits of an answer: versions, device, threads, shapes


def _scores(cosines: FloatArray, scale: float, temperature: float, kind: str) -> FloatArray:
    if kind == "cosine":
        return cosines
    logits = (cosines * np.float32(scale) / np.float32(temperature)).astype(np.float32)
    if kind == "logit":
        return logits
    if kind != "softmax":
        raise ValueError(f"no score kind {kind!r}; choose one of {', '.join(SCORE_KINDS)}")
    shifted = np.exp(logits - logits.max())
    softmax: FloatArray = (shifted / shifted.sum()).astype(np.float32)
    return softmax
