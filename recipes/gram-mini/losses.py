"""The few losses that steps A and C share. Features are unit vectors; `scale` is a positive number or tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distil(image: Tensor, text: Tensor, target: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
    """Cross entropy to a (B, K) target that may leave mass outside the K names; rows weigh by the mass inside.

    How common each name is in training, `prior` (K,), is added as a log: it is not to be learned (logit adjustment).
    """
    mass = target.sum(dim=1, keepdim=True)
    goal = target / mass.clamp_min(1e-6)
    loss = -(goal * F.log_softmax(scale * image @ text.T + prior.clamp_min(1e-6).log(), dim=1)).sum(dim=1)
    return (loss * mass[:, 0]).sum() / mass.sum().clamp_min(1e-6)


def pairs(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over matched rows."""
    logits = scale * image @ text.T
    goal = torch.arange(len(image))
    return 0.5 * (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal))


def multi(image: Tensor, text: Tensor, present: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
    """Both directions of a softmax with several right answers; (B, K) `present` is 0 or 1, `prior` as in `distil`."""
    logits = scale * image @ text.T
    rows = present / present.sum(dim=1, keepdim=True).clamp_min(1.0)
    columns = present / present.sum(dim=0, keepdim=True).clamp_min(1.0)
    per_image = -(rows * F.log_softmax(logits + prior.clamp_min(1e-6).log(), dim=1)).sum() / (rows.sum() + 1e-6)
    per_name = -(columns * F.log_softmax(logits, dim=0)).sum() / (columns.sum() + 1e-6)
    return 0.5 * (per_image + per_name)


def relations(student: Tensor, teacher: Tensor, scale: float = 20.0) -> Tensor:
    """KL between the two batch-similarity distributions, self-similarity left out."""
    mask = torch.eye(len(student), dtype=torch.bool)
    ours = F.log_softmax((scale * student @ student.T).masked_fill(mask, -1e4), dim=1)
    theirs = F.softmax((scale * teacher @ teacher.T).masked_fill(mask, -1e4), dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean")
