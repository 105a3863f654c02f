"""The answers of one set: every method under every protocol, computed once and kept.

Methods that take one image at a time answer every image once, and a request is read off; methods that take a request
answer each; a method with a state runs through a stream, and starts afresh for every request. What was finished is
kept under a hash of everything it depends on, the code included, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gram_core
from gram_core.draws import Indices
from gram_core.evaluate.cost import wait
from gram_core.evaluate.features import Features, Views
from gram_core.evaluate.methods import Method, Scene, settings_of
from gram_core.evaluate.protocols import Protocol, draw
from gram_core.evaluate.readout import Drawn, Given
from gram_core.evaluate.store import Store, key_of

PART = 128  # images that a per-image method answers between two saves
TOGETHER = 16  # requests that are answered between two saves
# What says nothing about an answer: where images come from, what is made of answers, and how a checkpoint was trained
# (its own hash is in the key). All else is in `code_hash`.
ASIDE = ("__init__", "__main__", "corruptions", "cost", "data", "options", "readout", "report", "run", "store",
         "suites")  # fmt: skip
OFFLINE = ("domains", "episodes", "learner", "meta", "pairs", "phrases", "train", "unseen")


@dataclass
class Meter:
    """What answering took when it was done: milliseconds, how many images, and the statuses."""

    ms: float = 0.0
    images: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    def add(self, header: dict[str, Any]) -> None:
        """Count one part in."""
        self.ms += header["ms"]
        self.images += header["images"]
        self.statuses.update(header["statuses"])


class Cells:
    """Answers of methods on the prepared features of one set."""

    def __init__(
        self, features: Features, scene: Scene, store: Store, *, windows: int, seeds: int, fresh: bool = False
    ) -> None:
        self.features = features
        self.scene = scene
        self.store = store
        self.windows = windows
        self.seeds = seeds
        self.fresh = fresh
        self._drawn: dict[Protocol, list[tuple[int, Indices]]] = {}
        self._each: dict[tuple[str, Views], tuple[Given, Meter]] = {}

    def units(self, protocol: Protocol) -> list[tuple[int, Indices]]:
        """(seed, images) of every request; the windows are spread over the seeds."""
        if protocol not in self._drawn:
            labels, classes = self.features.labels, len(self.scene.classes)
            seeds = 1 if protocol.name == "image" else self.seeds
            share = -(-self.windows // seeds)
            self._drawn[protocol] = [
                (s, images) for s in range(seeds) for images in draw(protocol, labels, classes, count=share, seed=s)
            ]
        return self._drawn[protocol]

    def drawn(self, protocol: Protocol) -> Drawn:
        """The same, flat."""
        return Drawn.of(self.units(protocol))

    def answers(self, name: str, method: Method, views: Views, protocol: Protocol) -> tuple[Given, Meter] | None:
        """What a method says under a protocol, or None where the two do not go together."""
        if method.unit == "image":
            given, meter = self._images(name, method, views)
            where = self.drawn(protocol).image
            return Given(given.label[where], given.confidence[where]), meter
        if protocol.name == "image":
            return None
        parts, meter = [], Meter()
        for requests in self._pieces(protocol, whole=method.unit == "stream" and protocol.name == "stream"):
            key = self._key(name, method, views, protocol=str(protocol), requests=[r.tolist() for r in requests])
            kept = self._kept(key, partial(self._requests, method, views, protocol, requests))
            parts.append(kept[0])
            meter.add(kept[1])
        return _joined(parts), meter

    # ---- inside ----

    def _pieces(self, protocol: Protocol, *, whole: bool) -> Iterator[list[Indices]]:
        """The requests of a protocol in order, a few at a time; those of one seed together where a state runs."""
        for _, group in groupby(self.units(protocol), key=lambda unit: unit[0]):
            requests = [images for _, images in group]
            step = len(requests) if whole else TOGETHER
            yield from (requests[at : at + step] for at in range(0, len(requests), step))

    def _images(self, name: str, method: Method, views: Views) -> tuple[Given, Meter]:
        if (name, views) not in self._each:
            parts, meter = [], Meter()
            count = len(self.features.labels)
            for start in range(0, count, PART):
                rows = np.arange(start, min(start + PART, count))
                key = self._key(name, method, views, rows=[start, len(rows)])
                kept = self._kept(key, partial(self._requests, method, views, None, [rows]))
                parts.append(kept[0])
                meter.add(kept[1])
            self._each[name, views] = _joined(parts), meter
        return self._each[name, views]

    def _requests(
        self, method: Method, views: Views, protocol: Protocol | None, requests: Sequence[Indices]
    ) -> tuple[Given, dict[str, Any]]:
        """Answers to several requests, one after the other."""
        state: Any = None
        parts, statuses, ms = [], Counter[str](), 0.0
        for rows in requests:
            if protocol is None or protocol.name != "stream":
                state = None
            seen = self.features.load(rows.tolist(), views)
            started = time.perf_counter()
            with torch.no_grad():
                outcome, state = method.answer(self.scene, seen, state)
            wait(self.scene.classifier)
            ms += (time.perf_counter() - started) * 1000
            statuses.update(outcome.statuses)
            confidence, label = outcome.p.max(-1)
            parts.append(Given(label.cpu().numpy(), confidence.float().cpu().numpy()))
        header = {"ms": ms, "images": sum(len(rows) for rows in requests), "statuses": dict(statuses)}
        return _joined(parts), header

    def _key(self, name: str, method: Method, views: Views, **parts: Any) -> str:
        classifier = self.scene.classifier
        return key_of(
            "answers",
            code=code_hash(),
            torch=torch.__version__,
            model=classifier.backbone.fingerprint,
            root=None
            if classifier.root is None
            else hashlib.sha256(classifier.root.cpu().numpy().tobytes()).hexdigest(),
            device=str(classifier.backbone.device.type),
            dtype=str(classifier.backbone.dtype),
            checkpoint=classifier.info.checkpoint_sha256 if name.startswith("gram") else None,
            method=name,
            settings=settings_of(method, classifier),
            views=[views.count, *views.scale, views.seed],
            classes=[self.scene.classes.id, self.scene.ensemble.id],
            images=self.features.digest,
            **parts,
        )

    def _kept(self, key: str, make: Callable[[], tuple[Given, dict[str, Any]]]) -> tuple[Given, dict[str, Any]]:
        found = {} if self.fresh else self.store.get([key])
        if key in found:
            header, value = found[key]
            half = len(value) // 2
            return Given(
                np.frombuffer(value[:half], dtype=np.int32).astype(np.int64),
                np.frombuffer(value[half:], dtype=np.float32),
            ), header
        given, header = make()
        value = given.label.astype(np.int32).tobytes() + given.confidence.astype(np.float32).tobytes()
        self.store.put({key: (header, value)})
        return given, header


@cache
def code_hash() -> str:
    """Hash of every module that an answer may depend on: answers of other code are not read back."""
    root = Path(gram_core.__file__).parent
    unused = {root / "evaluate" / f"{name}.py" for name in ASIDE} | {root / f"{name}.py" for name in OFFLINE}
    paths = [path for path in sorted(root.rglob("*.py")) if path not in unused]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _joined(parts: Sequence[Given]) -> Given:
    return Given(np.concatenate([p.label for p in parts]), np.concatenate([p.confidence for p in parts]))
