"""Test-time methods as short functions of frozen features: the field's baselines, and the tunings that are served.

Each function is one paper, from its equations; none keeps anything between calls. Features are unit-norm float32,
`views` hold the original at index 0, `scale` is the model's logit scale. Shapes use the legend of `gram_core.types`.
Where nothing else is said the answer is a probability over classes, (..., K), whose argmax is the paper's answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core import objectives
from gram_core.adapt import UPDATES, Active, Regulate, adapt, identity, of
from gram_core.prompts import PromptMethod
from gram_core.text import ClassSet
from gram_core.types import Params

EPS = 1e-12


def zero_shot(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """softmax_k(s f . t_k) (B, K) of features (B, D) and class features (K, D) (Radford et al., ICML 2021)."""
    return (scale * features @ texts.T).softmax(-1)


# ---- one image ------------------------------------------------------------------------------------------------


def marginal(
    host: PromptMethod,
    classes: ClassSet,
    start: Params,
    chosen: Tensor,
    *,
    lr: float,
    update: str,
    steps: int,
    dispersion: float = 0.0,
    active: Active | None = None,
) -> Params:
    """Tune on the entropy of the mean prediction over the kept views `chosen` (E, V, D) of one image each.

    TPT (Shu et al., NeurIPS 2022, eq. 4). With `dispersion` lambda > 0 the loss is C-TPT's (Yoon et al., ICLR 2024,
    eq. 6): minus lambda times the mean distance of the class features to their centroid.
    """

    def loss(params: Params) -> Tensor:
        texts = host.features(params, classes)
        value = objectives.marginal_entropy(host.scale * chosen @ texts.transpose(-1, -2))
        if dispersion:
            value = value - dispersion * (texts - texts.mean(dim=1, keepdim=True)).norm(dim=-1).mean(dim=1)
        return value

    return adapt(of(loss), start, update=UPDATES[update], lr=lr, steps=steps, active=active)


def tpt(
    host: PromptMethod,
    classes: ClassSet,
    start: Params,
    views: Tensor,
    *,
    keep: float = 0.1,
    lr: float = 5e-3,
    update: str = "sign",
    steps: int = 1,
    dispersion: float = 0.0,
) -> Tensor:
    """TPT (E, K): keep the most confident views of (E, V, D), tune on them, predict on the original.

    `update="sign"` is the paper's one AdamW step (`gram_core.adapt.sign`).
    """
    with torch.no_grad():
        first = host.logits(start, views, classes)
        kept = objectives.confident(first, keep)
        chosen = views.gather(1, kept[..., None].expand(-1, -1, views.shape[-1]))
        params = marginal(host, classes, start, chosen, lr=lr, update=update, steps=steps, dispersion=dispersion)
        return host.logits(params, views[:, :1], classes)[:, 0].softmax(-1)


def c_tpt(
    host: PromptMethod,
    classes: ClassSet,
    start: Params,
    views: Tensor,
    *,
    dispersion: float = 50.0,
    keep: float = 0.1,
    lr: float = 5e-3,
) -> Tensor:
    """C-TPT (E, K): TPT's step with class features pushed apart for calibration (Yoon et al., ICLR 2024)."""
    return tpt(host, classes, start, views, keep=keep, lr=lr, dispersion=dispersion)


def zero(views: Tensor, texts: Tensor, scale: float, *, keep: float = 0.3) -> Tensor:
    """ZERO (B, K): the confident views of (B, V, D) vote at zero temperature (Farina et al., NeurIPS 2024, alg. 1).

    Shares of the votes. A tie goes to the first class among the tied that a further view, by rising entropy, names;
    else to the largest mean probability; the winner's share is raised by 1e-6, so that argmax is the answer.
    """
    p = zero_shot(views, texts, scale)  # (B, V, K)
    order = objectives.entropy(p).argsort(dim=1, stable=True)
    kept = max(1, int(p.shape[1] * keep))
    named = p.argmax(-1).gather(1, order)
    votes = F.one_hot(named[:, :kept], p.shape[-1]).sum(1)
    tied = votes == votes.amax(-1, keepdim=True)
    mean = p.gather(1, order[:, :kept, None].expand(-1, -1, p.shape[-1])).mean(1)
    winner = mean.masked_fill(~tied, -1).argmax(-1)
    later = tied.gather(1, named[:, kept:])
    if later.shape[1]:
        first = later.int().argmax(1, keepdim=True)
        winner = torch.where(later.any(1), named[:, kept:].gather(1, first)[:, 0], winner)
    # with one class in front every rule names it
    return votes / kept * (1 - 1e-6) + 1e-6 * F.one_hot(winner, p.shape[-1])


def mta(views: Tensor, texts: Tensor, scale: float) -> Tensor:
    """MTA (B, K): a robust mean of the views (B, V, D), with inlierness scores (Zanella & Ben Ayed, CVPR 2024).

    Bandwidth of a view: half the mean squared distance to its nearest 30 %; lambda 4 and lambda_y 0.2 as published.
    """
    if views.shape[1] == 1:
        return zero_shot(views[:, 0], texts, scale)
    p = zero_shot(views, texts, scale)
    affinity = p @ p.transpose(1, 2)
    apart = (2 - 2 * views @ views.transpose(1, 2)).clamp_min(0)
    others = apart + torch.diag_embed(torch.full_like(apart[:, 0], torch.inf))
    near = max(1, int(0.3 * (views.shape[1] - 1)))
    width = others.topk(near, dim=-1, largest=False).values.mean(-1) / 2

    def kernel(mode: Tensor) -> Tensor:
        return (-(views - mode[:, None]).square().sum(-1) / (2 * width + EPS)).exp()

    inlier = torch.full_like(apart[:, 0], 1 / views.shape[1])
    mode = views[:, 0]
    for _ in range(5):
        density = kernel(mode)
        for _ in range(5):
            inlier = ((density + 4 * (affinity @ inlier[..., None])[..., 0]) / 0.2).softmax(-1)
        for _ in range(5):
            mode = F.normalize(((inlier * kernel(mode))[..., None] * views).sum(1), dim=-1)
    return zero_shot(mode, texts, scale)


# ---- a stream -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tda:
    """TDA's two banks after some images of a stream; empty places have infinite entropy.

    `positive` (K, 3, D), `sure` (K, 3) entropies; `negative` (K, 2, D), `unsure` (K, 2), `masks` (K, 2, K).
    """

    positive: Tensor
    sure: Tensor
    negative: Tensor
    unsure: Tensor
    masks: Tensor

    @classmethod
    def empty(cls, classes: int, dim: int, device: torch.device | str = "cpu") -> Tda:
        """The banks before the first image."""
        return cls(
            torch.zeros(classes, 3, dim, device=device),
            torch.full((classes, 3), torch.inf, device=device),
            torch.zeros(classes, 2, dim, device=device),
            torch.full((classes, 2), torch.inf, device=device),
            torch.zeros(classes, 2, classes, device=device),
        )


def tda(bank: Tda, feature: Tensor, texts: Tensor, scale: float) -> tuple[Tda, Tensor]:
    """TDA (Karmanov et al., CVPR 2024, eq. 2 to 8): the banks after one image (D,), and its probabilities (K,).

    The image enters before it is answered. Alpha 2 and beta 5, the authors' setting for ImageNet, on all data.
    """
    logits = scale * texts @ feature
    p = logits.softmax(-1)
    entropy = objectives.entropy(p)
    label = int(p.argmax())
    positive, sure, negative, unsure, masks = bank.positive, bank.sure, bank.negative, bank.unsure, bank.masks
    place = int(sure[label].argmax())  # an empty place, else the least certain entry
    if entropy < sure[label, place]:
        positive, sure = positive.clone(), sure.clone()
        positive[label, place], sure[label, place] = feature, entropy
    if 0.2 < float(entropy) / math.log2(len(texts)) < 0.5:  # nats over log2, as published
        place = int(unsure[label].argmax())
        if entropy < unsure[label, place]:
            negative, unsure, masks = negative.clone(), unsure.clone(), masks.clone()
            negative[label, place], unsure[label, place] = feature, entropy
            masks[label, place] = ((p > 0.03) & (p < 1)).float()
    near = (-5 * (1 - positive @ feature)).exp().masked_fill(sure.isinf(), 0)
    far = (-(1 - negative @ feature)).exp().masked_fill(unsure.isinf(), 0)
    logits = logits + 2 * near.sum(1) - 0.117 * torch.einsum("kn,knc->c", far, masks)
    return Tda(positive, sure, negative, unsure, masks), logits.softmax(-1)


# ---- a batch --------------------------------------------------------------------------------------------------


def stata(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """StatA (B, K): class Gaussians anchored at the texts, and a graph of nearest images (Zanella et al., CVPR 2025).

    One diagonal covariance a class, anchor weight alpha 1, three neighbours, ten rounds; no gradient.
    """
    count = len(features)
    first = zero_shot(features, texts, scale)
    log_first = first.clamp_min(EPS).log()
    similar = features @ features.T
    near = similar.clone().fill_diagonal_(-torch.inf).topk(min(3, count - 1), dim=-1).indices
    graph = torch.zeros_like(similar).scatter(1, near, similar.gather(1, near))
    graph = graph + graph.T

    def spread(weights: Tensor, centres: Tensor) -> Tensor:
        """sum_i w_ik (f_i - c_k)^2, (K, D), without the (B, K, D) tensor."""
        total = weights.sum(0)[:, None]
        return weights.T @ features.square() - 2 * centres * (weights.T @ features) + total * centres.square()

    def assign(z: Tensor, centres: Tensor, variance: Tensor) -> Tensor:
        inverse = 1 / variance
        squared = features.square() @ inverse.T - 2 * features @ (centres * inverse).T
        likely = -0.5 * (squared + (centres.square() * inverse + variance.log()).sum(-1))
        for _ in range(5):
            z = (log_first + likely / 50 + graph @ z / 6).softmax(-1)
        return z

    anchor = (spread(first, texts).sum(0) / count).clamp_min(EPS)  # (D,)
    centres, variance, z = texts, anchor.expand_as(texts), first
    for _ in range(10):
        z = assign(z, centres, variance)
        found = F.one_hot(z.argmax(-1), len(texts)).sum(0).to(z.dtype)[:, None]
        trust = found / (found + 1)
        seen = F.normalize(z.T @ features, dim=-1)
        centres = F.normalize(trust * seen + (1 - trust) * texts, dim=-1)
        own = spread(z, centres) / z.sum(0)[:, None].clamp_min(EPS)
        variance = (trust * own + (1 - trust) * (anchor + (texts - centres).square())).clamp_min(EPS)
    return assign(z, centres, variance)


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint tuning of E batches: its parameters, the views' logits (E, B, V, K) before and after, and the weight of
    the first batch's root in the loss."""

    params: Params
    before: Tensor
    after: Tensor
    rho: float = 0.0


def infomax(
    host: PromptMethod,
    classes: ClassSet,
    start: Params,
    views: Tensor,
    *,
    root: Tensor | None = None,
    lr: float,
    steps: int,
    update: str = "rms",
    regulate: Regulate = identity,
    active: Active | None = None,
) -> Joint:
    """Tune one variable jointly on views (E, B, V, D) of all images of a batch (docs/method.md, eq. 1 to 4).

    With the `root` (D,) of the prototype tree the batch's marginal is rehearsed, which keeps a skewed batch honest;
    without it this is plain information maximisation (Liang et al., ICML 2020).
    """
    e, b, v, d = views.shape
    seen = views.reshape(e, b * v, d)
    if root is not None:
        seen = torch.cat([seen, root.expand(e, 1, d)], dim=1)

    def split(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits[:, : b * v].reshape(e, b, v, -1), None if root is None else logits[:, -1]

    with torch.no_grad():
        before, _ = split(host.logits(start, seen, classes))
        rho = 0.0 if root is None else objectives.rehearsal_weight(before.softmax(-1).mean(dim=(1, 2)), b)

        def loss(params: Params) -> Tensor:
            batch, rehearsed = split(host.logits(params, seen, classes))
            return objectives.infomax(batch, rehearsed, rho)

        params = adapt(of(loss), start, regulate=regulate, update=UPDATES[update], lr=lr, steps=steps, active=active)
        after, _ = split(host.logits(params, seen, classes))
    return Joint(params, before, after, float(rho) if isinstance(rho, float) else float(rho[0]))
