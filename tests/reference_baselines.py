"""Test-time baselines written a second time, slowly: one image, one view, one class after another, in float64.

From the definitions alone: `zero` (Farina et al., NeurIPS 2024), `mta` (Zanella and Ben Ayed, CVPR 2024), `Tda`
(Karmanov et al., CVPR 2024), `stata` (Zanella et al., CVPR 2025), `tpt` (Shu et al., NeurIPS 2022) and, with a
dispersion, C-TPT (Yoon et al., ICLR 2024).
They share no code with the product, and are not used by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def entropy(p: Array) -> float:
    """In nats."""
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum())


def exact(x: Any) -> Array:
    return np.asarray(x, dtype=np.float64)


def episodes(
    seed: int, count: int, views: int, classes: int, dims: int, noise: float = 2.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded unit features (count, views, dims) around class directions, and those directions (classes, dims).

    `RandomState` is frozen by numpy, so saved outputs keep their inputs.
    """
    rng = np.random.RandomState(seed)
    texts = rng.standard_normal((classes, dims))
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    own = texts[rng.randint(0, classes, count)] + noise * rng.standard_normal((count, dims)) / math.sqrt(dims)
    x = own[:, None]
    if views > 1:
        x = x + 2.5 * rng.standard_normal((count, views, dims)) / math.sqrt(dims)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(texts, dtype=torch.float32)


# ---- ZERO ----


def zero(views: Any, texts: Any, scale: float, keep: float = 0.3) -> tuple[list[int], int]:
    """The votes for each class and the winner, for the views (V, D) of one image."""
    views, texts = exact(views), exact(texts)
    p = [softmax(scale * texts @ f) for f in views]
    choice = [int(q.argmax()) for q in p]
    order = sorted(range(len(views)), key=lambda v: (entropy(p[v]), v))
    count = max(1, int(len(views) * keep))
    kept, others = order[:count], order[count:]
    votes = [sum(choice[v] == k for v in kept) for k in range(len(texts))]
    tied = [k for k, n in enumerate(votes) if n == max(votes)]
    if len(tied) == 1:
        return votes, tied[0]
    for v in others:
        if choice[v] in tied:
            return votes, choice[v]
    return votes, max(tied, key=lambda k: sum(p[v][k] for v in kept))


# ---- MTA ----


def mta_mode(views: Any, texts: Any, scale: float) -> tuple[Array, Array]:
    """The mode (D,) and the inlierness (V,) of the views of one image.

    The bandwidth takes floor(0.3 (V - 1)) neighbours, at least one: below five views the paper leaves it undefined.
    A view at distance zero from the mode has a kernel of one, whatever its bandwidth.
    """
    views, texts = exact(views), exact(texts)
    count = len(views)
    if count == 1:
        return views[0], np.ones(1)
    near = max(1, int(0.3 * (count - 1)))
    bandwidth = []  # h_v^2
    for v in range(count):
        distances = sorted(float(((views[v] - views[w]) ** 2).sum()) for w in range(count) if w != v)
        bandwidth.append(0.5 * sum(distances[:near]) / near)
    p = np.stack([softmax(scale * texts @ f) for f in views])
    affinity = np.array([[float((a * b).sum()) for b in p] for a in p])

    def kernel(mode: Array) -> Array:
        distances = [float(((f - mode) ** 2).sum()) for f in views]
        return exact(
            [
                1.0 if d == 0 else math.exp(-d / (2 * h)) if h > 0 else 0.0
                for d, h in zip(distances, bandwidth, strict=True)
            ]
        )

    y, mode = np.full(count, 1 / count), views[0]
    for _ in range(5):
        density = kernel(mode)
        for _ in range(5):
            before, y = y, softmax((density + 4 * affinity @ y) / 0.2)
            if np.linalg.norm(y - before) < 1e-6:
                break
        for _ in range(5):
            before, mode = mode, unit((y * kernel(mode)) @ views)
            if np.linalg.norm(mode - before) < 1e-6:
                break
    return mode, y


def mta(views: Any, texts: Any, scale: float) -> Array:
    mode, _ = mta_mode(views, texts, scale)
    return softmax(scale * exact(texts) @ mode)


# ---- TDA ----


class Tda:
    """A stream; `step` takes one image (D,) and gives its probabilities (K,)."""

    def __init__(self, texts: Any, scale: float, alpha: float = 2.0, beta: float = 5.0) -> None:
        self.texts, self.scale, self.alpha, self.beta = exact(texts), scale, alpha, beta
        self.positive: dict[int, list[tuple[float, Array, Array]]] = {}
        self.negative: dict[int, list[tuple[float, Array, Array]]] = {}

    def step(self, feature: Any) -> Array:
        f = exact(feature)
        logits = self.scale * self.texts @ f
        p = softmax(logits)
        label, h = int(p.argmax()), entropy(p)
        admit(self.positive, label, (h, f, p), capacity=3)
        if 0.2 < h / math.log2(len(p)) < 0.5:  # nats over log2, as published
            admit(self.negative, label, (h, f, p), capacity=2)
        for k, entries in self.positive.items():
            for _, g, _ in entries:
                logits[k] += self.alpha * math.exp(-self.beta * (1 - f @ g))
        for entries in self.negative.values():
            for _, g, q in entries:
                for k in range(len(p)):
                    if 0.03 < q[k] < 1:
                        logits[k] -= 0.117 * math.exp(-(1 - f @ g))
        return softmax(logits)


def admit(bank: dict[int, list[Any]], label: int, entry: tuple[float, Array, Array], capacity: int) -> None:
    """A full list gives up its entry of highest entropy for a lower one; of equal entropies the older stays."""
    entries = bank.setdefault(label, [])
    if len(entries) < capacity:
        entries.append(entry)
    elif entry[0] < entries[-1][0]:
        entries[-1] = entry
    entries.sort(key=lambda e: e[0])


# ---- StatA ----


def stata(features: Any, texts: Any, scale: float, *, rounds: int = 10, inner: int = 5) -> Array:
    """Assignments (B, K) of one batch, alpha = 1. With fewer than four images each has all others as neighbours."""
    f, t = exact(features), exact(texts)
    images, classes = len(f), len(t)
    logits = scale * f @ t.T
    guess = np.stack([softmax(row) for row in logits])
    z = guess.copy()
    spread = sum(guess[i, k] * (f[i] - t[k]) ** 2 for i in range(images) for k in range(classes)) / images
    graph = np.zeros((images, images))
    for i in range(images):
        others = sorted((j for j in range(images) if j != i), key=lambda j: (-float(f[i] @ f[j]), j))
        for j in others[:3]:
            graph[i, j] = f[i] @ f[j]
    graph = graph + graph.T
    mu, variance = t.copy(), np.tile(spread, (classes, 1))

    def fit(i: int, k: int) -> float:
        return -0.5 * float(((f[i] - mu[k]) ** 2 / variance[k] + np.log(variance[k])).sum())

    def assign(z: Array) -> Array:
        fits = np.array([[fit(i, k) for k in range(classes)] for i in range(images)])
        for _ in range(inner):
            z = np.stack([softmax(logits[i] + fits[i] / 50 + graph[i] @ z / 6) for i in range(images)])
        return z

    for _ in range(rounds):
        z = assign(z)
        found = [int(row.argmax()) for row in z]
        for k in range(classes):
            if not found.count(k):  # b = 0: nothing but the anchor, even where no weight at all is left for the class
                mu[k], variance[k] = t[k], spread
                continue
            b = found.count(k) / (found.count(k) + 1)
            mass = z[:, k].sum()
            mu[k] = unit(b * unit(z[:, k] @ f) + (1 - b) * t[k])
            within = sum(z[i, k] * (f[i] - mu[k]) ** 2 for i in range(images)) / mass
            variance[k] = b * within + (1 - b) * (spread + (t[k] - mu[k]) ** 2)
    return assign(z)


# ---- TPT and C-TPT, through all 77 tokens of open_clip's own encode_text ----


def text_features(model: Any, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """`model.encode_text` with the embeddings at positions 1..N replaced by the context (N, W)."""

    def replace(_: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
        n = len(context)
        return torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, n + 1 :]], dim=1)

    handle = model.token_embedding.register_forward_hook(replace)
    try:
        return F.normalize(model.encode_text(tokens), dim=-1)
    finally:
        handle.remove()


def tpt(
    model: Any,
    tokenizer: Callable[[list[str]], torch.Tensor],
    names: Sequence[str],
    views: torch.Tensor,
    *,
    keep: float = 0.1,
    dispersion: float = 0.0,
    lr: float = 5e-3,
    steps: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (K,) of view 0 of one image (V, D) under the tuned prompt, and the first gradient (N, W).

    `dispersion` makes it C-TPT: its term rewards the mean distance of the class features from their centre.
    """
    tokens = tokenizer([f"a photo of a {name}." for name in names])
    context = model.token_embedding(tokens[:1, 1:5])[0].detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([context], lr=lr, weight_decay=0.01)
    scale = model.logit_scale.exp()
    chosen, first = None, None
    for _ in range(steps):
        texts = text_features(model, tokens, context)
        logits = scale * views @ texts.T
        if chosen is None:  # the views are chosen once
            entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            chosen = entropies.argsort(stable=True)[: max(1, int(len(views) * keep))]
        mean = logits[chosen].softmax(-1).mean(0)
        loss = -(mean * mean.log()).sum()
        loss = loss - dispersion * (texts - texts.mean(0)).norm(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert context.grad is not None
        first = context.grad.clone() if first is None else first
        optimizer.step()
    assert first is not None
    with torch.no_grad():
        return (scale * views[0] @ text_features(model, tokens, context).T).softmax(-1), first
