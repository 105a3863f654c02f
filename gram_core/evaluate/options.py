"""What may be asked of a run, and the labelled sets that an answer to it is measured on."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gram_core import backbone as towers
from gram_core.config import option
from gram_core.errors import InvalidConfig, InvalidData
from gram_core.evaluate import corruptions, data, suites
from gram_core.evaluate.labelled import ROLES, LabelledSet
from gram_core.evaluate.methods import METHODS
from gram_core.evaluate.protocols import BATCH_KINDS, protocols
from gram_core.text import DEFAULT_TEMPLATES


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Every option of `python -m gram_core.evaluate`; a recipe is a TOML file with the same names."""

    model: str = option("gram-mini", "model as in GRAM_MODEL: bundled, NAME/TAG, a directory or hf-hub:ORG/REPO")
    checkpoint: Path | None = option(None, "folder of the GRAM checkpoint, as GRAM_CHECKPOINT; else the model's own")
    checkpoints: dict[str, str] = option({}, "NAME=FOLDER: a row gram:NAME for a checkpoint that was trained otherwise")
    seen: str = option("seen.json", "list beside a checkpoint of images it was trained on, left out; empty: none")
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
        least = dict.fromkeys(("images", "per_class", "view_seed", "corrupt_seed"), 0)
        least |= {"stream_size": 2, "windows": 1, "seeds": 1, "bins": 2, "draws": 100}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not self.sizes or min(self.sizes) < 2:
            raise InvalidConfig(f"sizes is {self.sizes}; a batch has at least 2 images.")
        protocols(self.protocols, self.kinds, self.sizes, self.stream_size)
        templates_of(self)
        for text in self.corrupt:
            corruptions.parse(text)
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
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidData(f"no set matches {pattern!r}; {hint}Found: {', '.join(names)}.")
    wanted = [s for s in found if not config.sets or any(_matches(s.name, p) for p in config.sets)]
    seen = _seen(config)
    made = []
    for given in wanted:
        roles = [role for pattern, role in config.roles.items() if _matches(given.name, pattern)]
        given = replace(given, role=roles[-1] if roles else given.role)
        given = _without(given, seen)
        least = config.per_class * len(given.classes)
        chosen = given.subsample(max(config.images, least), seed=0) if config.images else given
        if len(chosen) < len(given):
            note = f"A class-balanced sample of {len(chosen)} of {len(given)} images (seed 0)."
            chosen = replace(chosen, notes=(*chosen.notes, note))
        if config.clean or not config.corrupt:
            made.append(chosen)
        for text in config.corrupt:
            for name, severity in corruptions.parse(text):
                made.append(_disturbed(chosen, name, severity, config.corrupt_seed))
    return made


def _seen(config: EvaluateConfig) -> frozenset[str]:
    """SET/FILE of every image that one of the checkpoints was trained on: all rows answer the same images."""
    if not config.seen:
        return frozenset()
    own = config.checkpoint or towers.locate(config.model, config.model_dir).folder
    found: set[str] = set()
    for folder in (own, *map(Path, config.checkpoints.values())):
        path = folder.expanduser() / config.seen
        try:
            lists = json.loads(path.read_bytes())["seen"]
            found.update(f"{name}/{key}" for name, keys in lists.items() for key in keys)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidData(f'{path} is no list of images ({error!r}): {{"seen": {{SET: [FILE, ...]}}}}.') from None
    return frozenset(found)


def _without(given: LabelledSet, seen: frozenset[str]) -> LabelledSet:
    """The set without the images that training saw; a note says how many there were."""
    left = np.array([i for i, key in enumerate(given.keys) if f"{given.name}/{key}" not in seen], dtype=np.int64)
    if len(left) in (0, len(given)):  # nothing to leave out, or nothing else: then its role should say "training"
        return given
    made = given.take(left)
    note = f"{len(given) - len(made)} images that meta-training saw are left out."
    return replace(made, notes=(*made.notes, note))


def _matches(name: str, pattern: str) -> bool:
    """Whether a set is meant: its own name always is, whatever brackets it holds."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


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
