"""Which images arrive together: single images, requests of many kinds, and streams.

A draw depends on (protocol, seed, labels) alone. Nothing here knows a model or a method.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from gram_core.draws import KINDS, Indices, consecutive, one_after_another, request, some
from gram_core.errors import InvalidConfig

BATCH_KINDS = (*KINDS, "effective-1-4", "effective-2-10", "effective-5-25")
STREAM_KINDS = ("shuffled", "correlated", "sorted")
EFFECTIVE_SIZE = 64  # StatA's protocol has one size of small batches
CORRELATION = 0.01  # Dirichlet concentration of a class over the slots of a correlated stream (StatA's "medium")
EFFECTIVE = re.compile(r"effective-(\d+)-(\d+)")


@dataclass(frozen=True)
class Protocol:
    """`image`: every image alone. `batch`: requests of `size` images. `stream`: all in one order, cut into `size`s."""

    name: str
    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}/{self.kind}/{self.size}"


def protocols(names: tuple[str, ...], kinds: tuple[str, ...], sizes: tuple[int, ...], stream: int) -> list[Protocol]:
    """The protocols asked for, in the order of a table. Raises InvalidConfig for a name that isn't one."""
    made: list[Protocol] = []
    for name in names:
        if name == "image":
            made.append(Protocol("image", "each", 1))
        elif name == "batch":
            for kind in kinds:
                match = EFFECTIVE.fullmatch(kind)
                if kind not in BATCH_KINDS and not match:
                    raise InvalidConfig(f"no kind of batch {kind!r}; choose from {', '.join(BATCH_KINDS)}.")
                if match and not 1 <= int(match[1]) <= int(match[2]):
                    raise InvalidConfig(
                        f"{kind} is no range of classes; expected effective-LOW-HIGH, 1 <= LOW <= HIGH."
                    )
                made += [Protocol("batch", kind, s) for s in sizes if kind in KINDS or s == EFFECTIVE_SIZE]
        elif name == "stream":
            made += [Protocol("stream", kind, stream) for kind in STREAM_KINDS]
        else:
            raise InvalidConfig(f"no protocol {name!r}; choose from image, batch, stream.")
    if not made:
        raise InvalidConfig(
            f"no protocol is left; effective-* batches have {EFFECTIVE_SIZE} images: add it to --sizes."
        )
    return made


def draw(protocol: Protocol, labels: Indices, classes: int, *, count: int, seed: int) -> list[Indices]:
    """The units of one protocol: arrays of positions in `labels`.

    `image`: one unit of all images. `batch`: `count` independent requests, no image twice in one of them.
    `stream`: the consecutive pieces of one order of all images; the last may be shorter.
    """
    if protocol.name == "image":
        return [np.arange(len(labels))]
    rng = np.random.default_rng([seed, protocol.size, *protocol.kind.encode()])
    own = [np.flatnonzero(labels == c) for c in range(classes)]
    own = [images for images in own if len(images)]
    if protocol.name == "stream":
        order = _stream(protocol.kind, own, len(labels), protocol.size, rng)
        return [order[at : at + protocol.size] for at in range(0, len(order), protocol.size)]
    if protocol.kind == "sorted":
        return consecutive(own, protocol.size, count, rng)
    drawn = request if protocol.kind in KINDS else _effective
    return [drawn(protocol.kind, own, protocol.size, rng) for _ in range(count)]


def _effective(kind: str, own: list[Indices], size: int, rng: np.random.Generator) -> Indices:
    """One request of the images of a few classes; how many is uniform in the range that `kind` names."""
    match = EFFECTIVE.fullmatch(kind)
    assert match
    low, high = int(match[1]), int(match[2])
    effective = min(int(rng.integers(low, high + 1)), len(own))
    pool = np.concatenate([own[int(c)] for c in rng.permutation(len(own))[:effective]])
    return some(pool, size, rng)


def _stream(kind: str, own: list[Indices], total: int, size: int, rng: np.random.Generator) -> Indices:
    if kind == "shuffled":
        return rng.permutation(np.concatenate(own))
    if kind == "sorted":
        return one_after_another(own, rng)
    # every class spreads over the slots by its own Dirichlet draw; slots are shuffled inside (StatA's streams)
    slots = max(1, min(total // size, len(own)))
    pieces: list[list[Indices]] = [[] for _ in range(slots)]
    for images in own:
        cuts = np.floor(np.cumsum(rng.dirichlet(np.full(slots, CORRELATION)))[:-1] * len(images)).astype(int)
        for slot, piece in enumerate(np.split(rng.permutation(images), cuts)):
            pieces[slot].append(piece)
    return np.concatenate([rng.permutation(np.concatenate(slot)) for slot in pieces])


def skew(labels: Indices, classes: int) -> float:
    """1 - H(class shares) / log(min(K, n)): 0 for a request as even as it can be, 1 for a single class."""
    most = min(classes, len(labels))
    if most < 2:
        return 1.0
    shares = np.bincount(labels, minlength=classes) / len(labels)
    shares = shares[shares > 0]
    return float(1 + (shares * np.log(shares)).sum() / np.log(most))
