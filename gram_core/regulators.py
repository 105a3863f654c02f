"""Gradient regulators: what stands between a gradient and the step, as pairs of pure functions.

`init` makes what a checkpoint keeps, a flat dict `block.weight` with a leading E of 1 that knows no class list;
`__call__` maps gradients to gradients of the same keys and shapes. Nothing here is an `nn.Module`, keeps anything
between calls or looks across episodes. This module takes no steps and computes no gradients: `adapt` hands them over
as constants, so that an outer loss reaches the weights and goes no further (first order).

A new regulator is a class with `weights` and `block`, and a line in `REGULATORS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from gram_core.types import Params

Shapes: TypeAlias = Mapping[str, tuple[int | None, int]]
"""(rows, width) per block, without E. Rows of None are the request's own (classes): weights are shared over them."""

EPS = 1e-8
RELATION = 128  # width of the relation vector c
FADE = 16.0  # images at which half of the regulation is left
PULL = 2.0  # the most that a reference gradient may add, in norms of the gradient
PULL_START = 5e-4  # tanh^2 has no slope at zero: from there it would never learn; this start adds 5e-7 of the norm
SUPMER_HIDDEN = 24
PROMETAR_RATE = 8  # neighbouring features that share one gamma, and the narrowing of the bottleneck


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What a regulator may know besides the gradient. Every field may be missing; a number holds for all episodes.

    `images` (E,) how many a request has: missing means no fade. `relation` (E, 128) to the prototypes: missing means
    zeros. `structure` and `zero_shot`: the gradient of the neighbours' loss and of the KL to the zero-shot answer,
    with the keys of grads: missing ones take no part. `trust` (E,) in the structure: missing means 0. `need` (E,) of
    the neighbours' help: missing means 1.
    """

    images: float | Tensor | None = None
    relation: Tensor | None = None
    structure: Params | None = None
    zero_shot: Params | None = None
    trust: float | Tensor | None = None
    need: float | Tensor | None = None


@dataclass(frozen=True)
class Regulator(ABC):
    """The contract; equal settings make equal regulators. Subclass `Blockwise` unless blocks have to see each other."""

    @abstractmethod
    def init(self, shapes: Shapes, generator: torch.Generator | None = None) -> Params:
        """What a checkpoint keeps, each with a leading E of 1; empty where nothing is learned."""

    @abstractmethod
    def __call__(self, params: Params, grads: Params, context: Context) -> Params:
        """Regulated gradients: same keys, same shapes, episode by episode; touches nothing."""


class Blockwise(Regulator):
    """A regulator that treats every block alike: `context` (E, N, W) and `residual` (E, K, D)."""

    learned: ClassVar[bool] = True

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        """The weights of one block."""
        return {}

    @abstractmethod
    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        """The regulated gradient of one block."""

    def init(self, shapes: Shapes, generator: torch.Generator | None = None) -> Params:
        made = {name: self.weights(rows, width, generator) for name, (rows, width) in shapes.items()}
        return {f"{name}.{key}": w for name, weights in made.items() for key, w in weights.items()}

    def __call__(self, params: Params, grads: Params, context: Context) -> Params:
        regulated = {}
        for name, g in grads.items():
            weights = _under(params, name)
            if self.learned and not weights:
                blocks = sorted({key.rpartition(".")[0] for key in params})
                raise ValueError(f"no weights for block {name!r}; this regulator was made for {blocks}")
            regulated[name] = self.block(weights, name, g, context)
        return regulated


class Identity(Blockwise):
    """g: the unit of `chain`."""

    learned: ClassVar[bool] = False

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        return g


class MetaSGD(Blockwise):
    """a * g, elementwise (Li et al., 2017). Positive scales do nothing to a sign step, only to an rms one."""

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        return {"scale": torch.ones(1, rows or 1, width)}

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        return weights["scale"] * g


class MetaCurvature(Blockwise):
    """M_in G M_out, full matrices (Park and Oliva, NeurIPS 2019). Where rows are classes, M_out alone."""

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        out = {"out": torch.eye(width)[None]}
        return out if rows is None else out | {"in": torch.eye(rows)[None]}

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        curved = g @ weights["out"]
        return weights["in"] @ curved if "in" in weights else curved


class ProGrad(Blockwise):
    """g without what would move the answer away from zero-shot (Zhu et al., ICCV 2023; lambda = 1)."""

    learned: ClassVar[bool] = False

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        reference = _reference(context.zero_shot, name)
        return g if reference is None else _without_conflict(g, _direction(reference))


class ProMetaR(Blockwise):
    """g + gamma * g_reg, gamma = sigmoid(bottleneck of both) (Park et al., CVPR 2024); g_reg is `zero_shot`'s.

    Two linear maps to width / 8 and one gamma for 8 neighbouring features, as in the authors' code; there all tokens
    go in at once, here a row at a time and at unit rms, so that class lists and loss scales of any size fit.
    """

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        narrow = math.ceil(width / PROMETAR_RATE)
        sizes = {"down": (2 * width, narrow), "mix": (narrow, narrow)}
        return {key: torch.randn(1, *s, generator=generator) / math.sqrt(s[0]) for key, s in sizes.items()}

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        reference = _reference(context.zero_shot, name)
        if reference is None:
            return g
        unit_rms = (x * math.sqrt(g[0].numel()) / (_norm(x) + EPS) for x in (g, reference))
        both = torch.cat(tuple(unit_rms), dim=-1)  # (E, rows, 2 width)
        gamma = (both @ weights["down"] @ weights["mix"]).sigmoid()
        return g + gamma.repeat_interleave(PROMETAR_RATE, dim=-1)[..., : g.shape[-1]] * reference


class Gated(Blockwise):
    """z g + (1 - z) T(g), T rescaled to the norm of g (SUPMER; Pan et al., EMNLP Findings 2023)."""

    @abstractmethod
    def turn(self, weights: Params, g: Tensor, context: Context) -> Tensor:
        """T(g) of g at unit norm, before it is rescaled."""

    @abstractmethod
    def keep(self, weights: Params, context: Context) -> Tensor:
        """z (E, 1), or (1, 1) where no relation is known: how much of the plain gradient stays."""

    def amount(self, g: Tensor, context: Context) -> Tensor:
        """(E, 1, 1), or (1, 1, 1): how much of the regulation is used."""
        return g.new_ones(1, 1, 1)

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        size = _norm(g)
        turned = self.turn(weights, g / (size + EPS), context)
        turned = turned * size / (_norm(turned) + EPS)
        share = (1 - self.keep(weights, context))[..., None] * self.amount(g, context)
        return g + share * (turned - g)

    def gate(self, params: Params, blocks: Iterable[str], context: Context) -> Tensor:
        """z (E,) or (1,), mean over blocks: what the gate loss of meta-training pulls at."""
        return torch.stack([self.keep(_under(params, name), context) for name in blocks]).mean(0)[..., 0]


@dataclass(frozen=True)
class Supmer(Gated):
    """SUPMER as published: two low-rank layers with a skip around each, and a gate from the task's own features.

    Without three faults of its code: the last layer has no ReLU (it made T non-negative), the start is the identity
    (it was random), and each gradient is put at unit norm (its running statistics were never written back).
    """

    rank: int = 64

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        rank = min(self.rank, width)
        layers = {}
        for layer in ("first", "last"):
            layers[f"{layer}_u"] = torch.zeros(1, rank, width)
            layers[f"{layer}_v"] = torch.randn(1, width, rank, generator=generator) / math.sqrt(width)
            layers[f"{layer}_bias"] = torch.zeros(1, 1, width)
        hidden = torch.randn(1, RELATION, SUPMER_HIDDEN, generator=generator) / math.sqrt(RELATION)
        bias = torch.rand(1, SUPMER_HIDDEN, generator=generator) / math.sqrt(RELATION)
        return layers | {"hidden": hidden, "hidden_bias": bias} | _head("gate", 1, inputs=SUPMER_HIDDEN)

    def turn(self, weights: Params, g: Tensor, context: Context) -> Tensor:
        hidden = g @ weights["first_v"] @ weights["first_u"] + weights["first_bias"]
        first = g + torch.where(hidden < 0, 0.0, hidden)  # relu with a slope at zero: the identity starts there
        return first + first @ weights["last_v"] @ weights["last_u"] + weights["last_bias"]

    def keep(self, weights: Params, context: Context) -> Tensor:
        hidden = _from(weights, "hidden", context.relation).clamp(min=0)
        return _from(weights, "gate", hidden).sigmoid()


@dataclass(frozen=True)
class Gram(Gated):
    """The base regulator: T = g + ((g V) * m) U^T at the norm of g, gated, faded by n / (n + 16).

    U is zero at the start, V orthonormal, m = 1 + tanh(W_m c + b_m), z = sigmoid(w_z c + b_z) with b_z = 1. The
    learned constant that stands for an unknown relation, and the embedding of the block, are the biases.
    Linear in g but for norms, so that signs are free: this is what a sign step can feel.
    """

    rank: int = 64

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        rank = min(self.rank, width)
        v = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        low_rank = {"u": torch.zeros(1, width, rank), "v": v[None].contiguous()}
        return low_rank | _head("mix", rank) | _head("gate", 1, bias=1.0)

    def turn(self, weights: Params, g: Tensor, context: Context) -> Tensor:
        mix = 1 + _from(weights, "mix", context.relation).tanh()  # (E, rank)
        return g + (g @ weights["v"] * mix[..., None, :]) @ weights["u"].mT

    def keep(self, weights: Params, context: Context) -> Tensor:
        return _from(weights, "gate", context.relation).sigmoid()

    def amount(self, g: Tensor, context: Context) -> Tensor:
        return FADE / (_each(context.images, 0.0, g) + FADE)


class Structure(Gram):
    """GRAM induced by the structure: trusted by `trust`, freed of conflicts with g_s, pulled along g_s.

    g' = psi(g) with (1 - z) trust for (1 - z); g' loses trust * min(0, <g', g_s>) g_s, g_s at unit norm; then
    + beta |g'| g_s, beta = 2 tanh^2(w c + b) trust need. Where trust is 0 the answer is g, bit for bit.
    The identity at the start (to 1e-6) where g_s is missing or agrees with g.
    """

    def weights(self, rows: int | None, width: int, generator: torch.Generator | None) -> Params:
        return super().weights(rows, width, generator) | _head("pull", 1, bias=PULL_START)

    def amount(self, g: Tensor, context: Context) -> Tensor:
        return super().amount(g, context) * _each(context.trust, 0.0, g)

    def block(self, weights: Params, name: str, g: Tensor, context: Context) -> Tensor:
        trust = _each(context.trust, 0.0, g)
        out = super().block(weights, name, g, context)
        reference = _reference(context.structure, name)
        if reference is not None:
            toward = _direction(reference)
            out = _without_conflict(out, toward, trust)
            pull = PULL * _from(weights, "pull", context.relation).tanh().square()[..., None]
            out = out + pull * trust * _each(context.need, 1.0, g) * _norm(out) * toward
        return torch.where(trust > 0, out, g)


@dataclass(frozen=True)
class Chain(Regulator):
    """Regulators one after the other; the weights of the i-th are kept under `i.`."""

    parts: tuple[Regulator, ...]

    def init(self, shapes: Shapes, generator: torch.Generator | None = None) -> Params:
        made = [part.init(shapes, generator) for part in self.parts]
        return {f"{i}.{key}": w for i, weights in enumerate(made) for key, w in weights.items()}

    def __call__(self, params: Params, grads: Params, context: Context) -> Params:
        for i, part in enumerate(self.parts):
            grads = part(_under(params, str(i)), grads, context)
        return grads


REGULATORS: dict[str, Regulator] = {
    "gram": Gram(),
    "identity": Identity(),
    "meta_curvature": MetaCurvature(),
    "meta_sgd": MetaSGD(),
    "prograd": ProGrad(),
    "prometar": ProMetaR(),
    "structure": Structure(),
    "supmer": Supmer(),
}


def chain(*regulators: Regulator) -> Regulator:
    """The first acts first. `chain()` is the identity, and the identity in a chain is nothing.

    >>> chain() == Identity(), chain(ProGrad(), Identity()) == ProGrad()
    (True, True)
    """
    flat = [part for r in regulators for part in (r.parts if isinstance(r, Chain) else (r,))]
    acting = tuple(part for part in flat if part != Identity())
    return Chain(acting) if len(acting) > 1 else next(iter(acting), Identity())


def bind(regulator: Regulator, params: Params, context: Context) -> Callable[[Params], Params]:
    """The `regulate` of `adapt`. The context is held fixed: for new reference gradients take one step per context."""
    return lambda grads: regulator(params, grads, context)


def _under(params: Params, prefix: str) -> Params:
    return {key.removeprefix(f"{prefix}."): w for key, w in params.items() if key.startswith(f"{prefix}.")}


def _reference(grads: Params | None, name: str) -> Tensor | None:
    return None if grads is None else grads[name]


def _head(name: str, outputs: int, *, inputs: int = RELATION, bias: float = 0.0) -> Params:
    return {name: torch.zeros(1, inputs, outputs), f"{name}_bias": torch.full((1, outputs), bias)}


def _from(weights: Params, name: str, inputs: Tensor | None) -> Tensor:
    """An affine head: (E, outputs) of inputs (E, inputs), or its bias (1, outputs) where there are none."""
    bias = weights[f"{name}_bias"]
    return bias if inputs is None else (inputs[..., None, :] @ weights[name])[..., 0, :] + bias


def _each(value: float | Tensor | None, default: float, g: Tensor) -> Tensor:
    """One number per episode, (E, 1, 1) or (1, 1, 1), on the device and in the type of g."""
    return torch.as_tensor(default if value is None else value, dtype=g.dtype, device=g.device).reshape(-1, 1, 1)


def _norm(g: Tensor) -> Tensor:
    """(E, 1, 1): over all dimensions of an episode, never across episodes."""
    norm: Tensor = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True)
    return norm


def _direction(reference: Tensor) -> Tensor:
    """At unit norm; zero where there is next to nothing to follow."""
    size = _norm(reference)
    return torch.where(size >= EPS, reference / (size + EPS), 0.0)


def _without_conflict(g: Tensor, toward: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """g less what points against the unit direction `toward`."""
    against = (g * toward).sum(dim=(1, 2), keepdim=True).clamp(max=0)
    return g - strength * against * toward
