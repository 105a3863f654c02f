"""What is minimised, and what keeps it safe: entropies, information maximisation, confidence, temperature.

Pure functions of logits (already scaled). Entropies are in nats. Shapes use the legend of `gram_core.types`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACCEPT_BELOW = 1.0  # largest zero-shot logit gap that a tuned answer may overrule, reached with many images
ACCEPT_HALF = 8  # images at which half of that gap may be overruled
NEIGHBOURS = 3  # images of the same request that are asked
CONSENT = 0.7  # share of the neighbours' probability that must stand behind the tuned label


def entropy(p: Tensor) -> Tensor:
    """Entropy (...) of probabilities (..., K), in nats; 0 log 0 is 0, with a finite gradient."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) (...) between the softmaxes of two logit tensors (..., K), in nats."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0)


def confident(logits: Tensor, fraction: float = 0.1) -> Tensor:
    """Indices (E, kept) of the int(fraction V) views with the lowest entropy, at least one.

    Confidence selection of TPT (Shu et al., NeurIPS 2022, section 3.2). `logits` (E, V, K).
    """
    views = logits.shape[1]
    kept = max(1, int(views * fraction))
    return entropy(logits.softmax(-1)).argsort(dim=1, stable=True)[:, :kept]


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy (E,) of the mean prediction over kept views (E, V, K) of one image (TPT, eq. 4)."""
    return entropy(logits.softmax(-1).mean(dim=1))


def infomax(logits: Tensor, root: Tensor | None = None, rho: float | Tensor = 0.0) -> Tensor:
    """Joint information maximisation (E,) over B images in V views, `logits` (E, B, V, K).

    mean_i H(p_i) - H(mbar), p_i = mean_v softmax, mbar = (mean_i p_i + rho q) / (1 + rho) with q the softmax of the
    `root` prototype's logits (E, K), a rehearsal sample that keeps the marginal honest when the batch is skewed.
    SHOT (Liang et al., ICML 2020, eq. 3) without a root. Invariant to the order of images.
    """
    p = logits.softmax(-1).mean(dim=2)
    marginal = p.mean(dim=1)
    if root is not None:
        marginal = (marginal + rho * root.softmax(-1)) / (1 + rho)
    return entropy(p).mean(dim=1) - entropy(marginal)


def rehearsal_weight(marginal: Tensor, images: int) -> Tensor:
    """rho (E,) = 0.1 + 2 d + 5/n: how much the root weighs against n images with zero-shot `marginal` (E, K).

    d is the deficit of the marginal's entropy against what n images of C equally frequent classes would show:
    log C less the Miller-Madow bias (C - 1) / 2n (Miller, 1955), at least half of log C.
    """
    classes = marginal.shape[-1]
    full = math.log(classes)
    expected = max(full - (classes - 1) / (2 * images), 0.5 * full)
    deficit = (1 - entropy(marginal) / expected).clamp_min(0)
    return 0.1 + 2 * deficit + 5 / images


def accepted(baseline: Tensor, tuned: Tensor, features: Tensor) -> Tensor:
    """Which of n images (n,) take the tuned answer; logits (n, K) before and after, features (n, D).

    Two conditions. Zero-shot must be undecided: its first two logits differ by less than n / (n + 8). And the request
    must agree: where the label changes, the image's three nearest neighbours in the request, as zero-shot sees them,
    must give at least 1 / 0.7 times as much probability to the new label as to the old one.
    """
    count = len(baseline)
    top = baseline.topk(2, dim=-1).values
    undecided = (top[:, 0] - top[:, 1]) < ACCEPT_BELOW * count / (count + ACCEPT_HALF)
    if count < 2:
        return undecided
    similar = (features @ features.T).fill_diagonal_(-torch.inf)
    near = similar.topk(min(NEIGHBOURS, count - 1), dim=-1).indices
    around = baseline.softmax(-1)[near].mean(dim=1)  # (n, K)
    old, new = baseline.argmax(-1, keepdim=True), tuned.argmax(-1, keepdim=True)
    agreed = CONSENT * around.gather(1, new) >= around.gather(1, old)
    return undecided & (agreed | (old == new))[:, 0]


def temperature(logits: Tensor, confidence: Tensor, steps: int = 40) -> Tensor:
    """T (E,) for which the mean confidence of softmax(logits / T), (E, B, K), equals `confidence` (E,).

    Bisection on log T in [-5, 5]; the mean confidence falls monotonically in T. Outside it, the nearest end.
    """
    low = torch.full_like(confidence, -5.0)
    high = torch.full_like(confidence, 5.0)
    for _ in range(steps):
        middle = (low + high) / 2
        scaled = logits / middle.exp()[:, None, None]
        sure = scaled.softmax(-1).amax(-1).mean(1) > confidence
        low, high = torch.where(sure, middle, low), torch.where(sure, high, middle)
    return ((low + high) / 2).exp()


def guarded(baseline: Tensor, tuned: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The answer of a guarded tuning: logits (n, K), which images were `accepted` (n,), and their temperature ().

    Accepted images take the tuned logits, at the temperature that gives them, as a group, zero-shot's mean confidence;
    the others keep zero-shot's. Arguments as in `accepted`.
    """
    chosen = accepted(baseline, tuned, features)
    if not bool(chosen.any()):
        return baseline, chosen, torch.ones((), device=baseline.device)
    confidence = baseline[chosen].softmax(-1).amax(-1).mean()[None]
    heat = temperature(tuned[chosen][None], confidence)[0]
    return torch.where(chosen[:, None], tuned / heat, baseline), chosen, heat
