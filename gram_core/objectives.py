"""What is minimised, and what keeps it safe: entropies, information maximisation, confidence, temperature.

Pure functions of logits (already scaled). Entropies are in nats. Shapes use the legend of `gram_core.types`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACCEPT_BELOW = 1.0  # largest zero-shot logit gap that a tuned answer may overrule, reached with many images
ACCEPT_HALF = 8  # images at which half of that gap may be overruled


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
    """rho (E,) = 0.4 + 2 d + 5/n: how much the root weighs against n images with zero-shot `marginal` (E, K).

    d is the deficit of the marginal's entropy against what n images of C equally frequent classes would show:
    log C less the Miller-Madow bias (C - 1) / 2n (Miller, 1955), at least half of log C.
    """
    classes = marginal.shape[-1]
    full = math.log(classes)
    expected = max(full - (classes - 1) / (2 * images), 0.5 * full)
    deficit = (1 - entropy(marginal) / expected).clamp_min(0)
    return 0.4 + 2 * deficit + 5 / images


def accepted(baseline: Tensor, images: int) -> Tensor:
    """Which images (...) take the tuned answer: zero-shot logits (..., K) whose first two differ by less than n/(n+8).

    What few images say together overrules zero-shot only where it was nearly undecided.
    """
    top = baseline.topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]) < ACCEPT_BELOW * images / (images + ACCEPT_HALF)


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
