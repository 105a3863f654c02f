"""GRAM's regulation of one request: what is seen of it, along which directions its answer may move, and how far.

The joint tuning gives one direction, the displacement of the class logits after its steps. Relations give others:
between an image and its own views, its neighbours and the rest of the request, and between the request and the class
names (which classes it seems to hold at all). `amounts` is the meta-learned function that turns a request's context,
its relation to the prototypes included, into how far the answer goes along each (docs/method.md). Everything here is a
pure function of one request: no labels, no state, no HTTP. `meta` trains it, `classifier` serves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gram_core import objectives
from gram_core.adapt import Regulate, of
from gram_core.prompts.residual import shifted
from gram_core.regulators import REGULATORS, Context, bind
from gram_core.types import Params
from prototypes.bank import PrototypeBank
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, THEME

RELATED = (THEME, CONCEPT, MODE)  # levels that a request is related to
PROTOTYPES = ("real", "permuted", "random", "none")  # the last three are controls
SHARPNESS = 0.05  # tau_v: cosines that change a relation weight by a factor e
DELTA = 0.02  # cosines over which trust rises from a half to 0.73
NEIGHBOURS = 3
ROUNDS = 12  # of the prior's fixed point
HIDDEN = 16

DIRECTIONS = ("tuned", "views", "neighbours", "request")
LIMITS = {"likelihood": 1.5, "prior": 1.5}  # the most that a bounded amount can be; directions end at 1
AMOUNTS = (*DIRECTIONS, "likelihood", "concentration", "prior")
START = {**dict.fromkeys(DIRECTIONS, -2.0), "likelihood": 0.0, "concentration": 0.0, "prior": -1.0}

OWN = ("images", "classes", "deficit", "spread", "entropy", "confidence", "largest", "similarity", "width",
       "root", "gap", "agreement", "together", "together spread")  # fmt: skip
SEEN = ("prototypes", "information", "nearest", "nearest together")
CONTEXT = (*OWN, *(f"{LEVELS[level]} {name}" for level in RELATED for name in SEEN))


@dataclass(frozen=True, eq=False)
class Structure:
    """The prototypes as relations use them, on one device: centred unit visual centres (M_l, D) of each level with
    the widths (M_l,) tau phi of their softmax, their rows in the bank, what is subtracted (D,), and the root (D,). And
    the raw visual and text centres (M_3, D) of the modes, which a neighbours' loss needs."""

    visual: Mapping[int, Tensor]
    width: Mapping[int, Tensor]
    rows: Mapping[int, NDArray[np.int64]]
    mean: Tensor
    root: Tensor
    names: tuple[str, ...]
    modes: Tensor
    captions: Tensor
    kind: str = "real"

    @classmethod
    def of(cls, bank: PrototypeBank, device: torch.device | str = "cpu") -> Structure:
        """A bank's vectors on `device`."""
        rows = {level: bank.rows(level) for level in RELATED}
        return cls(
            {level: torch.from_numpy(bank.centre(bank.visual[own])).to(device) for level, own in rows.items()},
            {level: SHARPNESS * torch.from_numpy(bank.concentration[own]).to(device) for level, own in rows.items()},
            rows,
            torch.from_numpy(bank.visual_mean).to(device),
            torch.from_numpy(bank.root.visual).to(device),
            bank.names,
            torch.from_numpy(bank.visual[rows[MODE]]).to(device),
            torch.from_numpy(bank.text[rows[MODE]]).to(device),
        )

    def control(self, kind: str, seed: int = 0) -> Structure:
        """One of PROTOTYPES: `permuted` shuffles the dimensions of all centres alike, so that they keep their geometry
        and lose their meaning; `random` draws directions; `none` hides the relation from `amounts`."""
        if kind not in PROTOTYPES:
            raise ValueError(f"no prototypes {kind!r}; choose from {', '.join(PROTOTYPES)}.")
        rng = np.random.default_rng(seed)
        made = dict(self.visual)
        order = torch.from_numpy(rng.permutation(len(self.mean)))
        for level, centres in self.visual.items():
            if kind == "permuted":
                made[level] = centres[:, order.to(centres.device)].contiguous()
            elif kind == "random":
                drawn = torch.from_numpy(rng.standard_normal(tuple(centres.shape), dtype=np.float32))
                made[level] = F.normalize(drawn, dim=-1).to(centres)
        return replace(self, visual=made, kind=kind)

    def centre(self, features: Tensor) -> Tensor:
        """norm(f - mean) of raw image features (..., D)."""
        return F.normalize(features - self.mean, dim=-1)


@dataclass(frozen=True, eq=False)
class Relation:
    """Weights (n, M_l) of n images over the prototypes of each level, and the cosine (n,) of the nearest; the same
    nearest cosine (1,) for the mean image. Masked prototypes have weight 0."""

    weights: Mapping[int, Tensor]
    nearest: Mapping[int, Tensor]
    together: Mapping[int, Tensor]

    @property
    def novelty(self) -> Tensor:
        """nu: how near the request is to what the tree knows, the mean cosine () to the nearest mode."""
        return self.nearest[MODE].mean()


def relate(structure: Structure, originals: Tensor, masked: NDArray[np.bool_] | None = None) -> Relation:
    """Relation of images (n, D) to the prototypes, docs/method.md: a_p ~ exp(q . mu_p / (tau phi_p)).

    `masked` (M,) over the bank's rows hides prototypes; a level that is hidden as a whole is at cosine -1 from all.
    """
    q, mean = structure.centre(originals), structure.centre(originals.mean(0, keepdim=True))
    weights, nearest, together = {}, {}, {}
    for level, centres in structure.visual.items():
        cosines, whole = q @ centres.T, mean @ centres.T
        hidden = torch.zeros(len(centres), dtype=torch.bool, device=q.device)
        if masked is not None:
            hidden = torch.from_numpy(masked[structure.rows[level]]).to(q.device)
        scores = (cosines / structure.width[level]).masked_fill(hidden, -torch.inf)
        weights[level] = scores.softmax(-1).nan_to_num(0.0)
        nearest[level] = cosines.masked_fill(hidden, -1.0).amax(-1)
        together[level] = whole.masked_fill(hidden, -1.0).amax(-1)
    return Relation(weights, nearest, together)


def context(structure: Structure, relation: Relation, originals: Tensor, texts: Tensor, scale: float) -> Tensor:
    """What `amounts` may know of a request (len(CONTEXT),): counts, zero-shot's doubts, how alike the images are, and
    where they lie in the tree. Does not depend on the order of images or classes. originals (n, D), texts (K, D)."""
    n, k = len(originals), len(texts)
    p = (scale * originals @ texts.T).softmax(-1)
    marginal, full = p.mean(0), math.log(k)
    expected = max(full - (k - 1) / (2 * n), 0.5 * full)
    top = p.topk(2, dim=-1).values
    labels = p.argmax(-1)
    centred = structure.centre(originals)
    alike = centred @ centred.T
    near = _near(alike, n)
    together = (scale * F.normalize(originals.mean(0), dim=-1) @ texts.T).softmax(-1)
    own = [
        math.log(n),
        full,
        1 - objectives.entropy(marginal) / expected,
        objectives.entropy(marginal) / full,
        objectives.entropy(p).mean() / full,
        top[:, 0].mean(),
        torch.bincount(labels, minlength=k).amax() / n,
        (alike.sum() - n) / max(n * (n - 1), 1),
        n / alike.square().sum(),  # participation ratio of the images' spectrum, over n
        (originals @ structure.root).mean(),
        (top[:, 0].log() - top[:, 1].clamp_min(1e-9).log()).mean(),
        (labels[near] == labels[:, None]).float().mean() if n > 1 else 1.0,
        together.amax(),
        objectives.entropy(together) / full,
    ]
    seen: list[Tensor | float] = []
    for level in RELATED:
        w = relation.weights[level]
        most = math.log(max(w.shape[1], 2))
        mean = objectives.entropy(w.mean(0)) / most
        seen += [mean, mean - objectives.entropy(w).mean() / most, relation.nearest[level].mean(),
                 relation.together[level].mean()]  # fmt: skip
    if structure.kind == "none":
        seen = [0.0] * len(seen)
    return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=originals.device) for x in (*own, *seen)])


def directions(
    structure: Structure, views: Tensor, texts: Tensor, base: Tensor, tuned: Tensor, scale: float
) -> dict[str, Tensor]:
    """Displacements (n, K) of the zero-shot logits `base` of n images in `views` (n, V, D), original first.

    `tuned` (n, K) are the logits after the joint tuning; the others are what an image's views, its nearest images in
    the request (after centring) and the mean image of the request say of it.
    """
    originals = views[:, 0]
    n = len(base)
    centred = structure.centre(originals)
    near = _near(centred @ centred.T, n)
    return {
        "tuned": tuned - base,
        "views": scale * views.mean(1) @ texts.T - base,
        "neighbours": base[near].mean(1) - base if n > 1 else torch.zeros_like(base),
        "request": scale * F.normalize(originals.mean(0), dim=-1) @ texts.T - base,
    }


def _near(alike: Tensor, n: int) -> Tensor:
    """The nearest other images (n, min(3, n - 1)) by similarity (n, n); (n, 0) for a single image."""
    return alike.clone().fill_diagonal_(-torch.inf).topk(min(NEIGHBOURS, n - 1), dim=-1).indices


@dataclass(frozen=True, eq=False)
class Amounts:
    """How far along each direction, and the three numbers of the prior, as scalars (); see `move`."""

    values: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @cached_property
    def told(self) -> dict[str, float]:
        """The same as plain numbers."""
        return {name: float(value) for name, value in self.values.items()}


def init(generator: torch.Generator | None = None, hidden: int = HIDDEN) -> Params:
    """What is learned. `amounts`: a layer of `hidden` units whose output layer is zero, so that every request starts
    with the same amounts, those of START. And three statistics of simulated requests: `context` (mean and deviation),
    `trust.least` (see `trust`) and `accept.margin` (see `accepted`)."""
    c = len(CONTEXT)
    return {
        "amounts.hidden": torch.randn(1, c, hidden, generator=generator) / math.sqrt(c),
        "amounts.hidden_bias": torch.zeros(1, hidden),
        "amounts.out": torch.zeros(1, hidden, len(AMOUNTS)),
        "amounts.out_bias": torch.tensor([[START[name] for name in AMOUNTS]]),
        "context.mean": torch.zeros(1, c),
        "context.spread": torch.ones(1, c),
        "trust.least": torch.full((1, 1), -2.0),
        "accept.margin": torch.zeros(1, 1),
    }


def amounts(params: Params, context: Tensor) -> Amounts:
    """The regulating function: from a context (len(CONTEXT),) to the amounts of one request.

    The context is standardised and cut at three deviations, so that nothing unheard-of leads to unheard-of amounts.
    """
    x = ((context - params["context.mean"][0]) / params["context.spread"][0]).clamp(-3, 3)
    hidden = (x @ params["amounts.hidden"][0] + params["amounts.hidden_bias"][0]).tanh()
    h = hidden @ params["amounts.out"][0] + params["amounts.out_bias"][0]
    raw = dict(zip(AMOUNTS, h, strict=True))
    values = {name: LIMITS.get(name, 1.0) * value.sigmoid() for name, value in raw.items() if name != "concentration"}
    values["concentration"] = (3 + 4 * (raw["concentration"] / 2).tanh()).exp()  # 0.4 to 1,100 images
    return Amounts(values)


def prior(logits: Tensor, likelihood: Tensor, concentration: Tensor) -> Tensor:
    """log(K pi) (K,): which classes the request (n, K) seems to hold; 0 where nothing speaks against equal shares.

    The maximum a posteriori of the class shares under a symmetric Dirichlet that weighs `concentration` images, by
    expectation maximisation on likelihoods p^`likelihood` (Saerens et al., Neural Computation 2002, without a prior).
    """
    n, k = logits.shape
    evidence = (likelihood * logits).log_softmax(-1)
    log_pi = torch.full_like(evidence[0], -math.log(k))
    for _ in range(ROUNDS):
        share = (evidence + log_pi).softmax(-1).sum(0)
        log_pi = ((share + concentration / k) / (n + concentration)).clamp_min(1e-8).log()
    return log_pi + math.log(k)


def move(base: Tensor, along: Mapping[str, Tensor], amounts: Amounts) -> tuple[Tensor, Tensor]:
    """Logits (n, K) after the regulated step from zero-shot's, and the log prior (K,) that is part of it."""
    moved = base
    for name in DIRECTIONS:
        moved = moved + amounts[name] * along[name]
    log_prior = prior(moved, amounts["likelihood"], amounts["concentration"])
    return moved + amounts["prior"] * log_prior, log_prior


def neighbours(structure: Structure, relation: Relation, texts: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """The neighbours' loss (E,): cross-entropy of the prototypes near a request under class features `tuned` (E, K, D).

    docs/method.md, L_inv, for a host whose variables are the request's own classes: a mode is a labelled sample whose
    label is what its captions say of the classes under the frozen `texts` (K, D).
    """
    weights = relation.weights[MODE].mean(0)
    label = (scale * structure.captions @ texts.T).softmax(-1)
    log_p = (scale * structure.modes @ tuned.mT).log_softmax(-1)
    return -(weights[:, None] * label * log_p).sum(dim=(-2, -1))


def start(params: Params, texts: Tensor) -> Params:
    """Where the residual (1, K, D) of classes `texts` (K, D) starts: at zero, or, where a start was learned, at the
    low-rank map U V^T t of the class's own feature."""
    if "start.u" not in params:
        return {"residual": torch.zeros_like(texts)[None]}
    return {"residual": texts @ params["start.v"] @ params["start.u"].mT}


def regulate(
    name: str,
    params: Params,
    structure: Structure,
    relation: Relation,
    texts: Tensor,
    first: Params,
    scale: float,
) -> Regulate:
    """Regulator `name` with its weights `regulator.*` and what it may know of a request, for `adapt`.

    For `structure`: the gradient of the neighbours' loss at the start `first`, how far it is trusted, and how much it
    is needed, 1 - exp(-loss).
    """
    weights = {key.removeprefix("regulator."): w for key, w in params.items() if key.startswith("regulator.")}
    known = Context(images=float(len(relation.nearest[MODE])))
    if name == "structure":

        def loss(p: Params) -> Tensor:
            return neighbours(structure, relation, texts, shifted(texts, p["residual"]), scale)

        frozen = {key: p.detach() for key, p in first.items()}
        with torch.no_grad():
            need = 1 - (-loss(frozen)).exp()
            sure = trust(relation.novelty, params["trust.least"][0, 0])
        known = replace(known, structure=of(loss)(frozen), trust=sure, need=need)
    return bind(REGULATORS[name], weights, known)


def trust(novelty: Tensor, least: Tensor | float) -> Tensor:
    """() in [0, 1]: 1 near the prototypes, a half at cosine `least`, exactly 0 below least - 3 DELTA."""
    value = ((novelty - least) / DELTA).sigmoid()
    return torch.where(novelty < least - 3 * DELTA, torch.zeros_like(value), value)


def settle(base: Tensor, plain: Tensor, moved: Tensor, trust: Tensor) -> Tensor:
    """Logits (n, K) between the answer of the plain tuning and the regulated one: exactly `plain` where trust is 0."""
    return torch.where(trust > 0, plain + trust * (moved - plain), plain) if len(base) else plain


def accepted(base: Tensor, answer: Tensor, margin: Tensor | float) -> Tensor:
    """Which images (n,) take the answer: those whose label stays, and those whose new label is ahead of zero-shot's by
    more than margin / n in probability. Few images are weak evidence, so they have to be clearer."""
    p = answer.softmax(-1)
    old, new = base.argmax(-1, keepdim=True), answer.argmax(-1, keepdim=True)
    ahead = (p.gather(1, new) - p.gather(1, old))[:, 0]
    return (old == new)[:, 0] | (ahead > margin / len(base))
