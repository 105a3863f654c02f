"""What answering costs: milliseconds, floating-point operations and memory, measured alone and in the same run.

Not read from a cache: a cost belongs to the machine that the report names.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gram_core.classifier import Classifier
from gram_core.evaluate.features import Features, Views
from gram_core.evaluate.methods import Method, Scene

REPEATS = 3
TOGETHER = 32  # images of the request on which methods of batches and streams are measured


def measure(features: Features, scene: Scene, method: Method, views: Views) -> dict[str, float]:
    """Cost of one image: `adapt` (ms, median of three), `gflops` (tower passes included), `peak_mib` (see `peak`).

    A method that takes one image is given one; others are given a request of 32, and an image's cost is its share.
    """
    count = 1 if method.unit == "image" else min(TOGETHER, len(features.labels))
    rows = np.linspace(0, len(features.labels) - 1, count).round().astype(int).tolist()
    seen = features.load(rows, views)
    with torch.no_grad():
        with counted() as total:  # also the first call, which fills what later calls find
            method.answer(scene, seen, None)
        took = []
        with peak(scene.classifier) as risen:
            for _ in range(REPEATS):
                started = time.perf_counter()
                method.answer(scene, seen, None)
                wait(scene.classifier)
                took.append((time.perf_counter() - started) * 1000 / count)
    return {
        "adapt": float(np.median(took)),
        "gflops": total[0] / count / 1e9 + views.count * image_gflops(scene.classifier),
        "peak_mib": risen[0] or 0.0,
    }


def warm(scene: Scene) -> None:
    """Encode the texts that methods share, so that none of them pays for all."""
    classifier = scene.classifier
    with torch.no_grad():
        for classes in (scene.classes, scene.ensemble):
            classifier.texts.features(classes)
        for name, host in classifier.hosts.items():
            host.features(host.start(classifier.kept[name], scene.classes, 1), scene.classes)


def image_gflops(classifier: Classifier) -> float:
    """GFLOP of one image through the image tower; a multiply-add is two."""
    backbone = classifier.backbone
    side = backbone.image_size
    with counted() as total:
        backbone.encode_images(torch.zeros(backbone.view_chunk, 3, side, side), views=True)
    return total[0] / backbone.view_chunk / 1e9


def text_gflops(classifier: Classifier) -> float:
    """GFLOP of one short text through the text tower, in a set of 16."""
    classes = classifier.class_set([f"thing {n}" for n in range(16)], ["a picture of a {}."])
    with counted() as total:
        classifier.texts.encode_afresh(classes)
    return total[0] / len(classes) / 1e9


@contextmanager
def counted() -> Iterator[list[float]]:
    """Floating-point operations inside the block, as torch counts them.

    torch's fused inference path of multi-head attention has no formula there: it is off while counting.
    """
    total = [0.0]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield total
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    total[0] = float(counter.get_total_flops())


def wait(classifier: Classifier) -> None:
    """Until the device has done what it was given."""
    if classifier.backbone.device.type == "cuda":
        torch.cuda.synchronize(classifier.backbone.device)


@contextmanager
def peak(classifier: Classifier) -> Iterator[list[float | None]]:
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
