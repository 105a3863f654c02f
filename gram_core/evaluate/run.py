"""One run of the harness: options in, one summary (plain JSON) out."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gram_core import backbone as towers
from gram_core.classifier import Classifier, load_learned
from gram_core.errors import InvalidData
from gram_core.evaluate import cost, readout, report
from gram_core.evaluate.cells import Cells, Meter
from gram_core.evaluate.corruptions import CORRUPTIONS
from gram_core.evaluate.features import PLAIN, Features, Views
from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.methods import METHODS, Scene, choose, settings_of, views_of
from gram_core.evaluate.options import EvaluateConfig, open_sets, templates_of
from gram_core.evaluate.protocols import Protocol, protocols
from gram_core.evaluate.readout import Comparison
from gram_core.evaluate.store import Store

LARGER = "larger"
OWN_ROLES = ("all", "choosing", "reporting")


def evaluate(config: EvaluateConfig, console: Console, command: str = "") -> dict[str, Any]:
    """Measure, and return the summary that `gram_core.evaluate.report` shows; also writes predictions if asked.

    Raises the GramErrors of data, models and options. Interrupted, it has kept what it finished.
    """
    started = time.time()

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    opened = open_sets(config, say)
    store = Store(config.cache.expanduser() / "evaluate.sqlite")
    run = _Run(config, store, say)
    for reason in run.left_out:
        say(f"left out: {reason}")
    only_training = all(given.role == "training" for given in opened)
    with _predictions(config) as write, _progress(console) as progress:
        for number, given in enumerate(opened):
            place = f"{number + 1}/{len(opened)} {given.name}"
            for line in run.measure(given, progress, place, only_training or given.role != "training"):
                write(line)
            say(f"{place}: done, {run.sets[-1]['images']} images")
    store.close()
    return run.summary(command, started)


@contextmanager
def _predictions(config: EvaluateConfig) -> Iterator[Callable[[str], object]]:
    """Where lines of predictions go; the file takes its name when all of them are there."""
    if not config.predictions:
        yield lambda _: None
        return
    config.out.mkdir(parents=True, exist_ok=True)
    with report.beside(config.out / "predictions.jsonl") as aside, aside.open("w", encoding="utf-8") as file:
        yield lambda line: file.write(line + "\n")


class _Run:
    """Figures collected set by set; features of one set at a time are in memory."""

    def __init__(self, config: EvaluateConfig, store: Store, say: Callable[[str], None]) -> None:
        self.config, self.store, self.say = config, store, say
        self.commit = _commit()
        self.classifier = _load(config, config.model, config.checkpoint)
        self.larger = _load(config, config.larger) if config.larger else None
        chosen, self.left_out = choose(config.methods, self.classifier)
        self.kinds = protocols(config.protocols, config.kinds, config.sizes, config.stream_size)
        self.rows = {n: (m, views_of(m, self.classifier, config.crops, config.view_seed)) for n, m in chosen.items()}
        if self.larger is not None:
            label = f"larger frozen model ({self.larger.info.name})"
            self.rows[LARGER] = (replace(METHODS["zero-shot"], label=label), PLAIN)
        self.others = {f"gram:{name}": self._trained(name, Path(path)) for name, path in config.checkpoints.items()}
        for name in self.others:
            row = replace(METHODS["gram"], label=f"GRAM, {name.removeprefix('gram:')}")
            self.rows[name] = row, views_of(row, self.others[name], config.crops, config.view_seed)
        self.sets: list[dict[str, Any]] = []
        self.cells: list[dict[str, Any]] = []
        self.reliability: dict[tuple[str, Protocol], list[readout.Diagram]] = {}
        self.skew = readout.BySkew(min(config.draws, 500))
        self.compared: dict[tuple[Protocol, str], list[tuple[str, Comparison]]] = {}
        self.costs: dict[str, list[dict[str, float]]] = {name: [] for name in self.rows}

    def _trained(self, name: str, folder: Path) -> Classifier:
        """The same model with the checkpoint in `folder`."""
        learned, why = load_learned(folder.expanduser(), self.classifier.backbone.fingerprint)
        if learned is None:
            raise InvalidData(f"checkpoints {name}: {why} in {folder}. Name the folder that training wrote.")
        if self.classifier.root is None:
            raise InvalidData(f"checkpoints {name}: the model has no root prototype. Name its --checkpoint as well.")
        return self.classifier.variant(learned)

    def measure(self, given: LabelledSet, progress: Progress, label: str, counts: bool) -> Iterator[str]:
        """Every method under every protocol on one set; yields its predictions as lines if they are asked for.

        `counts` says whether the set enters what is shown over all sets.
        """
        task = progress.add_task(f"{label}: features", total=len(given))
        features = Features(self.classifier, self.store, given)
        features.prepare([views for _, views in self.rows.values()], lambda n: progress.advance(task, n))
        own = self._cells(self.classifier, features)
        every = dict.fromkeys(self.rows, own)
        if self.larger is not None:
            progress.update(task, description=f"{label}: features of the larger model", completed=0)
            theirs = Features(self.larger, self.store, features.given)
            theirs.prepare([], lambda n: progress.advance(task, n))
            if theirs.digest != features.digest:
                raise InvalidData(f"set {given.name!r} changed while it was read; run the command again.")
            every[LARGER] = self._cells(self.larger, theirs)
        for name, other in self.others.items():
            every[name] = self._cells(other, features)
        started = time.perf_counter()
        self.classifier.texts.encode_afresh(own.scene.classes)
        text_ms = (time.perf_counter() - started) * 1000
        progress.update(task, total=len(self.rows) * len(self.kinds), completed=0)
        laps: dict[str, dict[str, float]] = {}
        answered: dict[Protocol, dict[str, tuple[readout.Given, Meter]]] = {kind: {} for kind in self.kinds}
        decode_ms = features.decode_ms()
        timed: dict[tuple[int, Views], dict[str, float]] = {}
        for name, (method, views) in self.rows.items():
            progress.update(task, description=f"{label}: {method.label}")
            if not progress.live.console.is_terminal:
                self.say(f"{label}: {method.label}")
            cells = every[name]
            place = (id(cells), views)
            if place not in timed:
                timed[place] = {"decode": decode_ms, **cells.features.measure(views)}
            laps[name] = timed[place]
            self.costs[name].append({**laps[name], **cost.measure(cells.features, cells.scene, method, views)})
            for protocol in self.kinds:
                got = cells.answers("zero-shot" if name == LARGER else name, method, views, protocol)
                if got is not None:
                    answered[protocol][name] = got
                progress.advance(task)
        for protocol, by_method in answered.items():
            yield from self._compare(features, own, laps, protocol, by_method, counts)
        if counts:
            self._skew(own, features, answered)
        self.sets.append(_set(given, features, {**timed[id(own), PLAIN], "text": round(text_ms, 2)}))
        progress.remove_task(task)

    def _cells(self, classifier: Classifier, features: Features) -> Cells:
        scene = _scene(classifier, features.given, self.config)
        cost.warm(scene)
        config = self.config
        return Cells(features, scene, self.store, windows=config.windows, seeds=config.seeds, fresh=config.fresh)

    def _compare(
        self,
        features: Features,
        cells: Cells,
        laps: dict[str, dict[str, float]],
        protocol: Protocol,
        got: dict[str, tuple[readout.Given, Meter]],
        counts: bool,
    ) -> Iterator[str]:
        config, truth, name_of_set = self.config, features.labels, features.given.name
        drawn = cells.drawn(protocol)
        given = {name: answers for name, (answers, _) in got.items()}
        seed = readout.seed_of(_undisturbed(name_of_set), str(protocol))
        made = readout.compare(drawn, truth, given, size=protocol.size, bins=config.bins, draws=config.draws, seed=seed)
        where = {"set": name_of_set, "protocol": protocol.name, "kind": protocol.kind, "size": protocol.size}
        for name, comparison in made.items():
            meter = got[name][1]
            ms = {**laps[name], "adapt": round(meter.ms / max(meter.images, 1), 3)}
            self.cells.append({**where, "method": name, **comparison.cell, "ms": ms, "statuses": dict(meter.statuses)})
            self.compared.setdefault((protocol, name), []).append((features.given.role, comparison))
            if counts:
                self.reliability.setdefault((name, protocol), []).append(comparison.diagram)
        if config.predictions:
            yield from readout.lines(where, drawn, features.given, given)

    def _skew(
        self, cells: Cells, features: Features, answered: dict[Protocol, dict[str, tuple[readout.Given, Meter]]]
    ) -> None:
        """All batches of one set, of every kind and size, as one collection of requests."""
        batches = [kind for kind in self.kinds if kind.name == "batch"]
        if not batches:
            return
        drawn = readout.Drawn.of([unit for kind in batches for unit in cells.units(kind)])
        given = {
            name: readout.Given(
                np.concatenate([answered[kind][name][0].label for kind in batches]),
                np.concatenate([answered[kind][name][0].confidence for kind in batches]),
            )
            for name in self.rows
        }
        seed = readout.seed_of(_undisturbed(features.given.name), "skew")
        self.skew.add(drawn, features.labels, len(cells.scene.classes), given, seed)

    def summary(self, command: str, started: float) -> dict[str, Any]:
        """The whole run as plain JSON."""
        config = self.config
        means = []
        for role in OWN_ROLES:
            for (protocol, name), rows in self.compared.items():
                mine = [c for own, c in rows if own == role or (role == "all" and own != "training")]
                mine = [c for c in mine if 2 * c.cell["mean_size"] >= protocol.size]  # else they are other requests
                if mine:
                    where = {"role": role, "protocol": protocol.name, "kind": protocol.kind, "size": protocol.size}
                    means.append({**where, "method": name, **readout.mean_of_sets(mine)})
        shown = next((k for k in self.kinds if k.name == "batch" and k.kind == "iid" and k.size == 32), self.kinds[0])
        at = {"protocol": shown.name, "kind": shown.kind, "size": shown.size}
        device = self.classifier.backbone.device
        return {
            "format": 1,
            "kind": "evaluation",
            "title": config.title or f"{config.model}: test-time methods side by side",
            "command": command,
            "date": datetime.datetime.now().astimezone().date().isoformat(),
            "commit": self.commit,
            "minutes": round((time.time() - started) / 60, 2),
            "hardware": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "dtype": self.classifier.info.dtype,
            },
            "model": _model(self.classifier),
            "larger": None if self.larger is None else _model(self.larger),
            "settings": {
                "templates": list(templates_of(config)),
                "crops": config.crops,
                "view_seed": config.view_seed,
                "seeds": config.seeds,
                "windows": config.windows,
                "stream_size": config.stream_size,
                "images": config.images,
                "per_class": config.per_class,
                "corrupt_seed": config.corrupt_seed,
                "bins": config.bins,
                "draws": config.draws,
                "left_out": self.left_out,
            },
            "sets": self.sets,
            "methods": [self._row(name) for name in self.rows],
            "cells": self.cells,
            "means": means,
            "reliability": [
                {"method": name, **at, "bins": readout.merged(diagrams)}
                for (name, protocol), diagrams in self.reliability.items()
                if protocol == shown
            ],
            "skew": [{"method": name, "bins": self.skew.rows(name)} for name in self.skew.delta],
            "distance": None,
        }

    def _row(self, name: str) -> dict[str, Any]:
        """A method as the table names it, with its mean cost over sets."""
        method, views = self.rows[name]
        costs = self.costs[name]
        laps = {key: _mean([c[key] for c in costs]) for key in ("decode", "views", "image", "adapt")}
        own = method.sees if method.sees == "original" or self.config.crops == "own" else self.config.crops
        return {
            "name": name,
            "label": method.label,
            "paper": method.paper,
            "unit": method.unit,
            "views": views.count,
            "crops": own,
            "settings": settings_of(method, self.classifier),
            "image_passes": float(views.count),
            "gflops": _mean([c["gflops"] for c in costs], 6),
            "ms_per_image": round(sum(laps.values()), 3),
            "ms": laps,
            "peak_mib": max(c["peak_mib"] for c in costs),
        }


def _mean(values: Sequence[float], digits: int = 3) -> float:
    return round(sum(values) / len(values), digits)


def _corruption(name: str) -> dict[str, Any] | None:
    """What `corruptions.corrupted` did to a set, read from the name it gave; a plus sign alone is nothing."""
    found = re.fullmatch(r"(.+)\+(\w+)@([1-5])", name)
    if found is None or found[2] not in CORRUPTIONS:
        return None
    return {"of": found[1], "name": found[2], "severity": int(found[3])}


def _undisturbed(name: str) -> str:
    """The name of the set that a corrupted copy was made of."""
    found = _corruption(name)
    return name if found is None else str(found["of"])


def _set(given: LabelledSet, features: Features, ms: dict[str, float]) -> dict[str, Any]:
    """A set as the report names it."""
    return {
        "name": given.name,
        "role": given.role,
        "classes": len(given.classes),
        "images": len(features.given),
        "of": len(given),
        "files_sha256": given.files_sha256,
        "skipped": dict(features.skipped),
        "notes": list(given.notes),
        "corruption": _corruption(given.name),
        "ms": ms,
    }


def _load(config: EvaluateConfig, model: str, checkpoint: Path | None = None) -> Classifier:
    return Classifier.load(
        model, device=config.device, precision=config.precision, model_dir=config.model_dir, checkpoint=checkpoint
    )


def _scene(classifier: Classifier, given: LabelledSet, config: EvaluateConfig) -> Scene:
    names = list(given.classes)
    return Scene(
        classifier,
        classifier.class_set(names, templates_of(config)),
        classifier.class_set(names, towers.template_sets()["simple"]),
    )


def _model(classifier: Classifier) -> dict[str, Any]:
    info = classifier.info
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "weights_sha256": info.weights_sha256,
        "image_size": info.image_size,
        "parameters": info.parameters,
        "checkpoint_sha256": info.checkpoint_sha256,
        "logit_scale": round(info.logit_scale, 3),
        "gflops_image": round(cost.image_gflops(classifier), 6),
        "gflops_text": round(cost.text_gflops(classifier), 6),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this code lies in, if it lies in one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress
