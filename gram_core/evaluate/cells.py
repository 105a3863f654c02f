"""The answers of one set: every method under every protocol, computed once and kept.

Methods that take one image at a time answer every image once, and a request is read off; methods that take a request
answer each; a method with a state runs through a stream, and starts afresh for every request. What was finished is
kept under a hash of everything it depends on, the code included, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import gram_core
from gram_core.classifier import Classifier
from gram_core.evaluate.features import Features, Views
from gram_core.evaluate.methods import Method, Outcome, Scene, settings_of
from gram_core.evaluate.protocols import Indices, Protocol, draw
from gram_core.evaluate.readout import Drawn, Given
from gram_core.evaluate.store import Store, key_of

PART = 128  # images that a per-image method answers between two saves
CODE = ("adapt", "backbone", "baselines", "classifier", "objectives", "text", "evaluate/cells", "evaluate/methods",
        "evaluate/protocols")  # fmt: skip


@dataclass
class Meter:
    """What answering took: milliseconds, the peak of memory above where it started, and how many images."""

    ms: float = 0.0
    peak_mib: float = 0.0
    images: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    def add(self, header: dict[str, Any]) -> None:
        """Count one part in."""
        self.ms += header["ms"]
        self.peak_mib = max(self.peak_mib, header["peak_mib"] or 0.0)
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

    def answers(
        self, name: str, method: Method, views: Views, protocol: Protocol, tick: Callable[[], None]
    ) -> tuple[Given, Meter] | None:
        """What a method says under a protocol, or None where the two do not go together."""
        if method.unit == "image":
            given, meter = self._images(name, method, views, tick)
            where = self.drawn(protocol).image
            return Given(given.label[where], given.confidence[where]), meter
        if protocol.name == "image":
            return None
        by_seed: dict[int, list[Indices]] = {}
        for seed, images in self.units(protocol):
            by_seed.setdefault(seed, []).append(images)
        parts, meter = [], Meter()
        for seed, requests in by_seed.items():
            key = self._key(name, method, views, protocol=str(protocol), requests=[r.tolist() for r in requests])
            kept = self._kept(key, lambda r=requests: self._requests(method, views, protocol, r))  # type: ignore[misc]
            parts.append(kept[0])
            meter.add(kept[1])
            del seed
            tick()
        return _joined(parts), meter

    def gflops(self, name: str, method: Method, views: Views, batch: int) -> float:
        """GFLOP (a multiply-add is two) for each image, the tower's passes included, counted by torch on one call."""
        rows = np.arange(min(batch if method.unit == "batch" else 4, len(self.features.labels)))
        key = self._key(name, method, views, flops=len(rows))
        kept = {} if self.fresh else self.store.headers([key])
        if key not in kept:
            with FlopCounterMode(display=False) as counter:
                self._answer(method, views, rows, None)
            kept[key] = counter.get_total_flops() / len(rows) / 1e9
            self.store.put({key: (kept[key], b"")})
        own: float = kept[key]
        return own + views.count * image_gflops(self.scene.classifier)

    # ---- inside ----

    def _images(self, name: str, method: Method, views: Views, tick: Callable[[], None]) -> tuple[Given, Meter]:
        if (name, views) not in self._each:
            parts, meter = [], Meter()
            count = len(self.features.labels)
            for start in range(0, count, PART):
                rows = np.arange(start, min(start + PART, count))
                key = self._key(name, method, views, rows=[start, len(rows)])
                kept = self._kept(key, lambda r=rows: self._requests(method, views, None, [r]))  # type: ignore[misc]
                parts.append(kept[0])
                meter.add(kept[1])
                tick()
            self._each[name, views] = _joined(parts), meter
        return self._each[name, views]

    def _requests(
        self, method: Method, views: Views, protocol: Protocol | None, requests: Sequence[Indices]
    ) -> tuple[Given, dict[str, Any]]:
        """Answers to several requests, one after the other."""
        state: Any = None
        parts, statuses, ms = [], Counter[str](), 0.0
        with _peak(self.scene.classifier) as peak:
            for rows in requests:
                if protocol is None or protocol.name != "stream":
                    state = None
                outcome, state, took = self._answer(method, views, rows, state)
                ms += took
                statuses.update(outcome.statuses)
                confidence, label = outcome.p.max(-1)
                parts.append(Given(label.cpu().numpy(), confidence.float().cpu().numpy()))
        images = sum(len(rows) for rows in requests)
        header = {"ms": ms, "peak_mib": peak[0], "images": images, "statuses": dict(statuses)}
        return _joined(parts), header

    def _answer(self, method: Method, views: Views, rows: Indices, state: Any) -> tuple[Outcome, Any, float]:
        seen = self.features.load(rows.tolist(), views)
        _wait(self.scene.classifier)
        started = time.perf_counter()
        with torch.no_grad():
            outcome, state = method.answer(self.scene, seen, state)
        _wait(self.scene.classifier)
        return outcome, state, (time.perf_counter() - started) * 1000

    def _key(self, name: str, method: Method, views: Views, **parts: Any) -> str:
        classifier = self.scene.classifier
        return key_of(
            "answers",
            code=code_hash(),
            model=classifier.backbone.fingerprint,
            root=None
            if classifier.root is None
            else hashlib.sha256(classifier.root.cpu().numpy().tobytes()).hexdigest(),
            device=str(classifier.backbone.device.type),
            dtype=str(classifier.backbone.dtype),
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


def code_hash() -> str:
    """Hash of the modules that an answer depends on: answers of other code are not read back."""
    root = Path(gram_core.__file__).parent
    files = [root / f"{name}.py" for name in CODE] + sorted((root / "prompts").glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def image_gflops(classifier: Classifier) -> float:
    """GFLOP of one image through the image tower."""
    backbone = classifier.backbone
    side = backbone.image_size
    with FlopCounterMode(display=False) as counter:
        backbone.encode_images(torch.zeros(backbone.view_chunk, 3, side, side), views=True)
    return float(counter.get_total_flops()) / backbone.view_chunk / 1e9


def text_gflops(classifier: Classifier) -> float:
    """GFLOP of one short text through the text tower, in a set of 16."""
    classes = classifier.class_set([f"thing {n}" for n in range(16)], ["a picture of a {}."])
    with FlopCounterMode(display=False) as counter:
        classifier.texts.encode_afresh(classes)
    return float(counter.get_total_flops()) / len(classes) / 1e9


def _joined(parts: Sequence[Given]) -> Given:
    return Given(np.concatenate([p.label for p in parts]), np.concatenate([p.confidence for p in parts]))


def _wait(classifier: Classifier) -> None:
    if classifier.backbone.device.type == "cuda":
        torch.cuda.synchronize(classifier.backbone.device)


@contextmanager
def _peak(classifier: Classifier) -> Iterator[list[float | None]]:
    """MiB by which memory rose inside the block at the most: of the device, or of the process on Linux, else None."""
    result: list[float | None] = [None]
    device = classifier.backbone.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result[0] = round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
        return
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (man 5 proc)
        before_kib = _status("VmRSS")
    except OSError:
        yield result
        return
    yield result
    result[0] = round(max(_status("VmHWM") - before_kib, 0) / 1024, 1)


def _trim() -> None:
    """Give freed memory back to the system, so that a rise is a rise; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
