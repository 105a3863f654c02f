"""One run of the harness: options in, one summary (plain JSON) out."""

from __future__ import annotations

import datetime
import difflib
import fnmatch
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gram_core import backbone as towers
from gram_core.classifier import Classifier
from gram_core.config import option
from gram_core.errors import InvalidConfig, InvalidData
from gram_core.evaluate import corruptions, data, readout, suites
from gram_core.evaluate.cells import Cells, image_gflops, text_gflops
from gram_core.evaluate.features import PLAIN, Features
from gram_core.evaluate.labelled import ROLES, LabelledSet
from gram_core.evaluate.methods import METHODS, Method, Scene, choose, settings_of, views_of
from gram_core.evaluate.protocols import BATCH_KINDS, Protocol, protocols
from gram_core.evaluate.readout import Comparison
from gram_core.evaluate.store import Store
from gram_core.text import DEFAULT_TEMPLATES

LARGER = "larger"
OWN_ROLES = ("all", "choosing", "reporting")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Every option of `python -m gram_core.evaluate`; a recipe is a TOML file with the same names."""

    model: str = option("gram-mini", "model as in GRAM_MODEL: bundled, NAME/TAG, a directory or hf-hub:ORG/REPO")
    larger: str | None = option(None, "a second, larger model: its frozen zero-shot stands beside the methods")
    data: tuple[Path, ...] = option(
        (), "image folders, zips of folders, .tar shards, CSVs, or a folder that holds any of these", whole=True
    )
    suites: tuple[str, ...] = option((), "standard sets or families read below --data, as imagenet-a or fine-grained")
    sets: tuple[str, ...] = option((), "only the sets whose names match these patterns, as pacs/*")
    splits: tuple[str, ...] = option((), "splits of a set to read, instead of test or else val")
    classes: Path | None = option(None, "file of class names: one a line, or FOLDER<TAB>NAME, or JSON")
    roles: dict[str, str] = option({}, "PATTERN=choosing|reporting|training: what sets may be used for")
    methods: tuple[str, ...] = option(
        ("zero-shot", "ensemble", "tpt", "c-tpt", "zero", "mta", "tda", "stata", "infomax", "gram"),
        f"methods, of {', '.join(METHODS)}",
    )
    protocols: tuple[str, ...] = option(("image", "batch", "stream"), "image, batch, stream")
    kinds: tuple[str, ...] = option(BATCH_KINDS, "kinds of batch; effective-LOW-HIGH is StatA's protocol")
    sizes: tuple[int, ...] = option((8, 32, 64), "images of a batch; effective-* batches have 64")
    stream_size: int = option(64, "images that arrive together in a stream")
    images: int = option(600, "images of each set, a seeded class-balanced subsample; 0 takes all")
    per_class: int = option(0, "images of every class at least, where the set has them, even beyond --images")
    windows: int = option(45, "batches of each kind and size, spread over the seeds")
    seeds: int = option(3, "seeds of windows and streams")
    view_seed: int = option(0, "seed of the views, as a request's")
    templates: tuple[str, ...] = option(
        ("single",), "texts of every row: single, simple, openai, or templates", whole=True
    )
    crops: str = option("own", "own: each method's published views; strong or mild: the same crops for all")
    corrupt: tuple[str, ...] = option((), "corruptions added as sets of their own, as fog@3, noise@1-5 or all@5")
    clean: bool = option(True, "measure the undisturbed sets too when --corrupt is given")
    corrupt_seed: int = option(0, "seed of the corruptions")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option("auto", "auto, fp32 or bf16")
    model_dir: Path | None = option(None, "where fetched models lie, as GRAM_MODEL_DIR")
    cache: Path = option(Path("~/.cache/gram"), "folder of what need not be computed again")
    fresh: bool = option(False, "answer everything again, whatever the cache holds; features are kept")
    out: Path = option(Path("evaluation"), "folder for summary.json and report.html")
    predictions: bool = option(False, "write predictions.jsonl as well: every answer of every image")
    bins: int = option(15, "equal-width bins of the calibration error")
    draws: int = option(2000, "bootstrap draws")
    title: str | None = option(None, "title of the report")

    def __post_init__(self) -> None:
        least = {"stream_size": 2, "images": 0, "windows": 1, "seeds": 1, "view_seed": 0, "bins": 2, "draws": 100}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not self.sizes or min(self.sizes) < 2:
            raise InvalidConfig(f"sizes is {self.sizes}; a batch has at least 2 images.")
        if self.crops not in ("own", "strong", "mild"):
            raise InvalidConfig(f"crops is {self.crops!r}; choose own, strong or mild.")
        for role in self.roles.values():
            if role not in ROLES:
                raise InvalidConfig(f"no role {role!r}; choose choosing, reporting or training.")


# ---- what is measured ----------------------------------------------------------------------------------------


def open_sets(config: EvaluateConfig, say: Callable[[str], None]) -> list[LabelledSet]:
    """The sets of a run: found, filtered, given their roles, subsampled, and disturbed where asked.

    Raises InvalidData when nothing is there, or a pattern matches nothing.
    """
    if not config.data:
        raise InvalidConfig("no --data; name a folder of class folders, a zip, shards, a CSV, or a folder of these.")
    found: list[LabelledSet] = []
    reasons: list[str] = []
    for path in config.data:
        path = path.expanduser()
        if config.suites:
            for suite in config.suites:
                found += suites.open_suite(suite, path)
            continue
        sets, left_out = data.discover(path, splits=config.splits or None, classes_file=config.classes)
        found += sets
        reasons += left_out
    if not found:
        raise InvalidData("no labelled images: " + " ".join(reasons or ["nothing was found."]))
    for reason in reasons:
        say(f"left out: {reason}")
    names = [s.name for s in found]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise InvalidData(f"two sets are called {twice[0]!r}; rename one of the folders or files.")
    for pattern in (*config.sets, *config.roles):
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidData(f"no set matches {pattern!r}; {hint}Found: {', '.join(names)}.")
    wanted = [s for s in found if not config.sets or any(fnmatch.fnmatch(s.name, p) for p in config.sets)]
    made = []
    for given in wanted:
        roles = [role for pattern, role in config.roles.items() if fnmatch.fnmatch(given.name, pattern)]
        given = replace(given, role=roles[-1] if roles else given.role)
        least = config.per_class * len(given.classes)
        chosen = given.subsample(max(config.images, least), seed=0) if config.images else given
        if config.clean or not config.corrupt:
            made.append(chosen)
        for text in config.corrupt:
            for name, severity in corruptions.parse(text):
                made.append(_disturbed(chosen, name, severity, config.corrupt_seed))
    return made


def _disturbed(given: LabelledSet, name: str, severity: int, seed: int) -> LabelledSet:
    """The corrupted set, known to the cache by the clean images: what is kept need not be disturbed again."""
    how = f"{name}@{severity}/{seed}/{corruptions.FORMAT}".encode()

    def identity(row: int) -> bytes:
        return hashlib.sha256(hashlib.sha256(given.read(row)).digest() + how).digest()

    return replace(corruptions.corrupted(given, name, severity, seed), identity=identity)


def templates_of(config: EvaluateConfig) -> tuple[str, ...]:
    """The templates behind `--templates`."""
    named = {"single": DEFAULT_TEMPLATES, **towers.template_sets()}
    if len(config.templates) == 1 and config.templates[0] in named:
        return named[config.templates[0]]
    if any("{}" not in t for t in config.templates):
        raise InvalidConfig(f"templates: choose one of {', '.join(named)}, or give templates that hold one {{}} each.")
    return config.templates


# ---- one run -------------------------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig, console: Console, command: str = "") -> dict[str, Any]:
    """Measure, and return the summary that `gram_core.evaluate.report` shows; also writes predictions if asked.

    Raises the GramErrors of data, models and options. Interrupted, it has kept what it finished.
    """
    started = time.time()

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    opened = open_sets(config, say)
    classifier = _load(config, config.model)
    larger = _load(config, config.larger) if config.larger else None
    chosen, left_out = choose(config.methods, classifier)
    for reason in left_out:
        say(f"left out: {reason}")
    kinds = protocols(config.protocols, config.kinds, config.sizes, config.stream_size)
    store = Store(config.cache.expanduser() / "evaluate.sqlite")
    run = _Run(config, classifier, larger, chosen, left_out, kinds, store)
    with _progress(console) as progress:
        for number, given in enumerate(opened):
            place = f"{number + 1}/{len(opened)} {given.name}"
            run.measure(given, progress, place)
            say(f"{place}: {run.sets[-1]['images']} images done")
    store.close()
    return run.summary(command, started)


class _Run:
    """Figures collected set by set; features of one set at a time are in memory."""

    def __init__(
        self,
        config: EvaluateConfig,
        classifier: Classifier,
        larger: Classifier | None,
        chosen: dict[str, Method],
        left_out: list[str],
        kinds: list[Protocol],
        store: Store,
    ) -> None:
        self.config, self.classifier, self.larger = config, classifier, larger
        self.chosen, self.left_out, self.kinds, self.store = chosen, left_out, kinds, store
        self.views = {name: views_of(m, classifier, config.crops, config.view_seed) for name, m in chosen.items()}
        self.sets: list[dict[str, Any]] = []
        self.cells: list[dict[str, Any]] = []
        self.reliability: dict[tuple[str, Protocol], list[readout.Diagram]] = {}
        self.requests: dict[str, list[tuple[float, float]]] = {}
        self.compared: dict[tuple[Protocol, str], list[tuple[str, Comparison]]] = {}
        self.costs: dict[str, list[dict[str, float]]] = {}
        self._predictions = None
        if config.predictions:
            config.out.mkdir(parents=True, exist_ok=True)
            self._predictions = (config.out / "predictions.jsonl").open("w", encoding="utf-8")

    def measure(self, given: LabelledSet, progress: Progress, label: str) -> None:
        """Every method under every protocol on one set."""
        config = self.config
        task = progress.add_task(f"{label}: features", total=len(given))
        features = Features(self.classifier, self.store, given)
        features.prepare(list(self.views.values()), lambda n: progress.advance(task, n))
        laps = {views: features.measure(views) for views in {PLAIN, *self.views.values()}}
        of = {name: laps[views] for name, views in self.views.items()}
        scene = _scene(self.classifier, given, config)
        text_started = time.perf_counter()
        self.classifier.texts.encode_afresh(scene.classes)
        text_ms = (time.perf_counter() - text_started) * 1000
        cells = Cells(features, scene, self.store, windows=config.windows, seeds=config.seeds, fresh=config.fresh)
        answered: dict[Protocol, dict[str, tuple[readout.Given, Any]]] = {kind: {} for kind in self.kinds}
        progress.update(task, description=f"{label}: methods", total=None, completed=0)
        for name, method in self.chosen.items():
            progress.update(task, description=f"{label}: {method.label}")
            for protocol in self.kinds:
                got = cells.answers(name, method, self.views[name], protocol, lambda: progress.advance(task))
                if got is not None:
                    answered[protocol][name] = got
            self._cost(name, cells, of[name], [a[name] for a in answered.values() if name in a])
        if self.larger is not None:
            of[LARGER] = self._measure_larger(given, features, answered, progress)
        for number, (protocol, by_method) in enumerate(answered.items()):
            self._compare(features, cells, of, protocol, by_method, number)
        shown = features.given
        base, _, disturbed = given.name.partition("+")
        name, _, severity = disturbed.partition("@")
        self.sets.append(
            {
                "name": given.name,
                "role": given.role,
                "classes": len(given.classes),
                "images": len(shown),
                "of": len(given),
                "files_sha256": given.files_sha256,
                "skipped": dict(features.skipped),
                "notes": list(given.notes),
                "corruption": {"of": base, "name": name, "severity": int(severity)} if disturbed else None,
                "ms": {**laps[PLAIN], "text": round(text_ms, 2)},
            }
        )
        progress.remove_task(task)

    def _measure_larger(
        self, given: LabelledSet, features: Features, answered: dict[Protocol, Any], progress: Progress
    ) -> dict[str, float]:
        """Zero-shot of the larger model on the very same images and requests; its milliseconds by stage."""
        assert self.larger is not None
        task = progress.add_task(f"{given.name}: larger model", total=len(features.given))
        theirs = Features(self.larger, self.store, features.given)
        theirs.prepare([], lambda n: progress.advance(task, n))
        if theirs.digest != features.digest:
            raise InvalidData(f"set {given.name!r} changed while it was read; run the command again.")
        scene = _scene(self.larger, given, self.config)
        own = Cells(theirs, scene, self.store, windows=self.config.windows, seeds=self.config.seeds)
        method = METHODS["zero-shot"]
        for protocol in self.kinds:
            answered[protocol][LARGER] = own.answers("zero-shot", method, PLAIN, protocol, lambda: None)
        laps = theirs.measure(PLAIN)
        self._cost(LARGER, own, laps, [a[LARGER] for a in answered.values()])
        progress.remove_task(task)
        return laps

    def _cost(self, name: str, cells: Cells, laps: dict[str, float], got: Sequence[tuple[Any, Any]]) -> None:
        """What one image of this set costs with this method, by stage."""
        method = METHODS["zero-shot"] if name == LARGER else self.chosen[name]
        views = PLAIN if name == LARGER else self.views[name]
        meters = list({id(meter): meter for _, meter in got}.values())
        if not meters:
            return
        images = sum(m.images for m in meters)
        self.costs.setdefault(name, []).append(
            {
                **laps,
                "adapt": sum(m.ms for m in meters) / max(images, 1),
                "peak_mib": max(m.peak_mib for m in meters),
                "gflops": cells.gflops("zero-shot" if name == LARGER else name, method, views, 32),
            }
        )

    def _compare(
        self,
        features: Features,
        cells: Cells,
        laps: dict[str, dict[str, float]],
        protocol: Protocol,
        got: dict[str, tuple[Any, Any]],
        number: int,
    ) -> None:
        config, truth = self.config, features.labels
        drawn = cells.drawn(protocol)
        given = {name: answers for name, (answers, _) in got.items()}
        made = readout.compare(drawn, truth, given, bins=config.bins, draws=config.draws, seed=number)
        where = {"set": features.given.name, "protocol": protocol.name, "kind": protocol.kind, "size": protocol.size}
        for name, comparison in made.items():
            meter = got[name][1]
            ms = {**laps[name], "adapt": round(meter.ms / max(meter.images, 1), 3)}
            self.cells.append({**where, "method": name, **comparison.cell, "ms": ms, "statuses": dict(meter.statuses)})
            self.compared.setdefault((protocol, name), []).append((features.given.role, comparison))
            self.reliability.setdefault((name, protocol), []).append(comparison.diagram)
            if protocol.name == "batch" and name != "zero-shot":
                requests = readout.gains_by_request(
                    drawn, truth, len(cells.scene.classes), given[name], given["zero-shot"]
                )
                self.requests.setdefault(name, []).extend(requests)
        if self._predictions is not None:
            for line in readout.lines(where, drawn, features.given, given):
                self._predictions.write(line + "\n")

    def summary(self, command: str, started: float) -> dict[str, Any]:
        """The whole run as plain JSON."""
        config = self.config
        if self._predictions is not None:
            self._predictions.close()
        means = []
        for role in OWN_ROLES:
            for (protocol, name), rows in self.compared.items():
                mine = [c for own, c in rows if own == role or (role == "all" and own != "training")]
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
            "commit": _commit(),
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
            "methods": [self._row(name) for name in self.costs],
            "cells": self.cells,
            "means": means,
            "reliability": [
                {"method": name, **at, "bins": readout.merged(diagrams)}
                for (name, protocol), diagrams in self.reliability.items()
                if protocol == shown
            ],
            "skew": [{"method": name, "bins": readout.by_skew(rows)} for name, rows in self.requests.items()],
            "distance": None,
        }

    def _row(self, name: str) -> dict[str, Any]:
        """A method as the table names it, with its mean cost over sets."""
        costs = self.costs[name]
        mean = {key: sum(c[key] for c in costs) / len(costs) for key in costs[0]}
        laps = {key: round(mean[key], 3) for key in ("decode", "views", "image", "adapt")}
        row = {"gflops": round(mean["gflops"], 3), "ms_per_image": round(sum(laps.values()), 3), "ms": laps,
               "peak_mib": max(c["peak_mib"] for c in costs)}  # fmt: skip
        if name == LARGER:
            assert self.larger is not None
            label = f"larger frozen model ({self.larger.info.name})"
            return {"name": name, "label": label, "paper": "zero-shot", "unit": "image", "views": 1,
                    "crops": "original", "settings": {}, "image_passes": 1.0, **row}  # fmt: skip
        method, views = self.chosen[name], self.views[name]
        crops = method.sees if method.sees == "original" or self.config.crops == "own" else self.config.crops
        return {
            "name": name,
            "label": method.label,
            "paper": method.paper,
            "unit": method.unit,
            "views": views.count,
            "crops": crops,
            "settings": settings_of(method, self.classifier),
            "image_passes": float(views.count),
            **row,
        }


def _load(config: EvaluateConfig, model: str) -> Classifier:
    return Classifier.load(model, device=config.device, precision=config.precision, model_dir=config.model_dir)


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
        "logit_scale": round(info.logit_scale, 3),
        "gflops_image": round(image_gflops(classifier), 4),
        "gflops_text": round(text_gflops(classifier), 4),
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
