"""The inner loop: the one place that takes tuning steps.

Test-time tuning and (later) meta-training call `adapt`. It knows nothing of images, classes or HTTP, which
`grad` closes over, and keeps nothing between calls, so it is safe under threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from gram_core.types import Params

Grad: TypeAlias = Callable[[Params], Params]
Loss: TypeAlias = Callable[[Params], Tensor]
Update: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
Regulate: TypeAlias = Callable[[Params], Params]
Active: TypeAlias = Callable[[int], Tensor | None]

EPS = 1e-8
ADAMW_DECAY = 0.01


def identity(grads: Params) -> Params:
    """The regulator that leaves gradients as they are."""
    return grads


def of(loss: Loss) -> Grad:
    """Gradient of `loss(params) -> (E,)`; episodes are independent, so the sum's gradient is every episode's own."""

    def grad(params: Params) -> Params:
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_(True) for name, p in params.items()}
            total = loss(leaves).sum()
            grads = torch.autograd.grad(total, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    return grad


def rms(p: Tensor, g: Tensor, lr: float) -> Tensor:
    """p - lr g / rms(g), the rms over one episode: TPT's step size, without throwing magnitudes away."""
    size = g.square().mean(dim=tuple(range(1, g.dim())), keepdim=True).sqrt()
    return p - lr * g / (size + EPS)


def sign(p: Tensor, g: Tensor, lr: float) -> Tensor:
    """The first step of AdamW from a fresh state (decay 0.01): m / (sqrt(v) + eps) is g / (|g| + eps) there.

    This is TPT's update (Shu et al., NeurIPS 2022), which takes exactly one such step.
    """
    return p * (1 - ADAMW_DECAY * lr) - lr * g / (g.abs() + EPS)


def sgd(p: Tensor, g: Tensor, lr: float) -> Tensor:
    """p - lr g."""
    return p - lr * g


UPDATES: dict[str, Update] = {"rms": rms, "sgd": sgd, "sign": sign}


def adapt(
    grad: Grad,
    params: Params,
    *,
    regulate: Regulate = identity,
    update: Update = rms,
    lr: float,
    steps: int,
    active: Active | None = None,
) -> Params:
    """Take `steps` regulated steps from `params` and return the new ones; touch nothing.

    First order: gradients are constants, so an outer loss sees `params` through the identity path only.
    `steps=0` returns params equal to the input. `active` is asked before each step, with the number of steps taken,
    which episodes go on: (E,) bool, or None for all. An episode that has stopped keeps its params.

    >>> adapt(of(lambda p: p["x"].square().sum(1)), {"x": torch.ones(1, 2)}, update=sgd, lr=0.25, steps=1)
    {'x': tensor([[0.5000, 0.5000]])}
    """
    for step in range(steps):
        going = None if active is None else active(step)
        if going is not None and not bool(going.any()):
            break
        grads = regulate({name: g.detach() for name, g in grad(params).items()})
        stepped = {name: update(p, grads[name], lr) for name, p in params.items()}
        if going is not None and not bool(going.all()):
            stepped = {name: torch.where(_like(going, p), stepped[name], p) for name, p in params.items()}
        params = stepped
    return dict(params)


def _like(going: Tensor, p: Tensor) -> Tensor:
    return going.to(p.device).reshape(-1, *[1] * (p.dim() - 1))
