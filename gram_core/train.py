"""From image-text pairs to a checkpoint: `python -m gram_core.train CONFIG.toml [--key=value] --data DIR [--out DIR]`.

Stages, each in a folder of its own below `--out`, each skipped where it is done and gone on with where it was stopped:
`features` of the pairs, `views` of images that the towers were not fitted on, `tree` with its prototype bank, `meta`,
the outer loop, and `checkpoint`, what the server loads: bank, weights, and a header that says how they came about.
A run that was killed at any moment ends, when the same command is given again, with the same bytes. Under `torchrun`
the processes share features, views, clustering and the episodes of a step, each with a GPU of its own where there are
any; `--out` must be one folder for all of them. How many they are changes no byte (docs/training.md says where not).

Exit codes: 0 done, 2 an option or recipe is wrong, 65 data or model can't be used or training diverged, 130 interrupted
(run the same command again: it goes on where it stopped). `torchrun` itself ends with 1 for all but 0.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import gram_core
from gram_core import backbone as towers
from gram_core import meta, pairs, unseen
from gram_core.backbone import Backbone, file_sha256
from gram_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gram_core.config import exit_code, option, parse
from gram_core.episodes import EpisodeConfig, Tasks
from gram_core.errors import InvalidCheckpoint, InvalidConfig, InvalidData
from gram_core.gram import Structure
from gram_core.learner import GramLearner, margin, survey
from gram_core.meta import LearnerConfig, MetaConfig, World
from gram_core.pairs import PairsConfig, Source, open_sources
from gram_core.sources import TABLES
from gram_core.text import TextEncoder
from gram_core.types import Params
from gram_core.unseen import UnseenConfig, ViewCache
from prototypes.bank import PrototypeBank, Root, load_bank, load_root, save_bank
from prototypes.cache import FeatureCache
from prototypes.cluster import ClusterConfig, Sizes, grow
from prototypes.hierarchy import LEVELS, Hierarchy, load_hierarchy, save_hierarchy
from prototypes.team import Team

PROGRAM = "python -m gram_core.train"
FEATURES, VIEWS, TREE, META, CHECKPOINT = "features", "views", "tree", "meta", "checkpoint"
MADE, SEEN = "made.json", "seen.json"


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """How the pairs are clustered."""

    kind: str = option("full", "the tree, or an ablation of it: random, flat, image, text")
    complexity: str = option("measured", "structure complexity, or a control: fixed, permuted, inverted")
    seed: int = option(0, "seed of clustering and bank")
    quantile: float = option(0.2, "share of the pairs that agree least, which are dropped")
    duplicate: float = option(0.97, "image cosine above which the later pair is dropped")
    themes: int | None = option(None, "themes, instead of the number that follows from the pairs")

    def __post_init__(self) -> None:
        try:
            self.cluster(0, 100.0)
        except ValueError as error:
            raise InvalidConfig(str(error)) from None

    def cluster(self, count: int, logit_scale: float) -> ClusterConfig:
        """These options for `prototypes.cluster`, for so many pairs. Raises ValueError in words."""
        sizes = None
        if self.themes is not None:
            sizes = replace(Sizes.of(round(count * (1.0 - self.quantile))), themes=self.themes)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "themes"}
        return ClusterConfig(**given, sizes=sizes, logit_scale=logit_scale)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of `python -m gram_core.train`; a recipe is a TOML file with the same names."""

    model: str = option("gram-mini", "model as in GRAM_MODEL: bundled, NAME/TAG, a directory or hf-hub:ORG/REPO")
    data: Path | None = option(None, "folder that `pairs` lie in")
    out: Path = option(Path("trained"), "folder of all stages")
    pairs: tuple[str, ...] = option((), "image-text pairs in --data, as --data of gram_core.pairs", whole=True)
    share: dict[str, float] = option({}, "use a seeded share of some sources' pairs: PATTERN of their names = SHARE")
    unseen: tuple[str, ...] = option(
        (),
        "pairs whose images the towers were not fitted on: keys, ends of keys, starts with a slash, or all",
        whole=True,
    )
    held_out: str = option("held_out.json", "file beside the model's weights that lists such images; may be missing")
    image_column: str | None = option(None, "column of a table with the image's path, relative to the table")
    caption_columns: tuple[str, ...] = option((), "columns of a table with captions", whole=True)
    least: int = option(3, "captions that must hold a phrase")
    phrases: int = option(20_000, "candidate phrases at most")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option("fp32", "of features and views: auto, fp32 or bf16")
    model_dir: Path | None = option(None, "where fetched models lie, as GRAM_MODEL_DIR")
    workers: int = option(0, "threads that read and decode; 0 takes one per core, at most 16")
    tree: TreeConfig = option(TreeConfig(), "the tree of the pairs")
    views: UnseenConfig = option(UnseenConfig(), "views of unseen images")
    episodes: EpisodeConfig = option(EpisodeConfig(), "what is drawn from tree and views")
    learner: LearnerConfig = option(LearnerConfig(), "what is learned, and the inner loop")
    meta: MetaConfig = option(MetaConfig(), "the outer loop")

    @property
    def public(self) -> dict[str, Any]:
        """What a checkpoint repeats: all but folders, device and speed (JSON values)."""
        private = {"model", "data", "out", "device", "model_dir", "workers"}
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in private}
        return json.loads(json.dumps(kept, default=asdict))  # type: ignore[no-any-return]  # parsed JSON of a dict


def run(config: TrainConfig, console: Console) -> Checkpoint | None:
    """All stages; the checkpoint, or None from a rank other than 0.

    Raises the GramErrors of options, data, models and training.
    """
    world = World.here()
    if config.data is None:
        raise InvalidConfig("no --data; name the folder that the pairs of the recipe lie in.")
    if not config.pairs:
        raise InvalidConfig("pairs is empty; name shards, tables, folders or zip files in --data.")
    out = config.out.expanduser()
    reading = _reading(config, world)
    sources = open_sources(reading)  # before anything costs time
    towers.fetch(config.model, config.model_dir)
    backbone = towers.load(config.model, device=reading.device, precision=config.precision, model_dir=config.model_dir)
    keys = _unseen_keys(config, sources)
    pairs.build(reading, console, backbone)
    world.gather("features")  # nobody goes on before rank 0 has put them together
    views = replace(config.views, workers=config.views.workers or config.workers)
    unseen.build(sources, keys, out / VIEWS, backbone, console, views, rank=world.rank, world=world.size)
    world.gather("views")
    with _in_words():
        _plant(config, backbone, out, console, world)
    world.gather("tree")
    with _in_words():
        tree = load_hierarchy(out / TREE, fingerprint=backbone.fingerprint)
        bank = load_bank(out / TREE, fingerprint=backbone.fingerprint)
    assert bank is not None  # `_plant` has written it
    cache = ViewCache.open(out / VIEWS, fingerprint=backbone.fingerprint)
    training, held_out = (Tasks(tree, bank, cache, config.episodes, held_out=side) for side in (False, True))
    texts = TextEncoder(backbone)
    learner = GramLearner(
        texts=texts.features(texts.class_set(training.names)),
        root=torch.from_numpy(_root(config, bank).visual).to(backbone.device),  # the one that is served
        scale=backbone.logit_scale,
        config=config.learner,
        structure=_structure(config, bank, backbone),
    )
    surveyed = survey(learner, learner.init(torch.Generator()), training, config.learner.survey, world)
    learner = replace(learner, surveyed=surveyed)
    headers = {name: json.loads((out / name / pairs.HEADER).read_bytes()) for name in (FEATURES, VIEWS)}
    grown_from = json.loads((out / TREE / MADE).read_bytes())["made_from"]
    asked = [asdict(config.episodes), asdict(config.learner), headers[VIEWS]["made_from"], grown_from]
    made_from = pairs.digest([backbone.fingerprint, asked])
    end = meta.train(learner, training, held_out, config.meta, out / META, made_from=made_from, console=console)
    fresh = range(end.step * config.meta.episodes, end.step * config.meta.episodes + config.learner.settle)
    params = end.params | {"accept.margin": margin(learner, end.params, training, fresh, world)}
    if world.rank:
        return None
    facts: dict[str, Any] = {
        "model": backbone.name,
        "config": config.public,
        "made_from": pairs.digest([made_from, asdict(config.meta)]),
        "pairs": {name: headers[FEATURES][name] for name in ("source", "pairs", "captions", "phrases", "skipped")},
        "views": {name: headers[VIEWS][name] for name in ("source", "counts", "skipped")},
        "tree": _counts(tree, bank),
        "training": training.facts,
        "held_out": held_out.facts,
        "looks": end.history,
        "versions": {"gram": gram_core.__version__, "torch": version("torch")},
    }
    settings: dict[str, Any] = {
        "host": "residual",
        "steps": config.learner.steps,
        "lr": config.learner.lr,
        "update": config.learner.update,
        "root": config.learner.root,
        "prototypes": config.learner.prototypes,
        "views": config.views.views,
        "view_scale": list(config.views.scale),
    }
    _list_seen(out, sources)
    return _finish(out / CHECKPOINT, bank, params, config.learner.regulator, settings, facts, console)


def _reading(config: TrainConfig, world: World) -> PairsConfig:
    """The first stage's options, on the GPU that torchrun gives to this process."""
    own = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else "auto"
    assert config.data is not None
    return PairsConfig(
        model=config.model,
        data=tuple(config.data / name for name in config.pairs),
        share=config.share,
        out=config.out / FEATURES,
        image_column=config.image_column,
        caption_columns=config.caption_columns,
        least=config.least,
        phrases=config.phrases,
        device=own if config.device == "auto" else config.device,
        precision=config.precision,
        model_dir=config.model_dir,
        workers=config.workers,
        rank=world.rank,
        world=world.size,
    )


def _unseen_keys(config: TrainConfig, sources: Sequence[Source]) -> list[str]:
    """Entries of `unseen.listed`: those of the recipe, and those of the model's own list."""
    keys = [key for key in config.unseen if key != "all"]
    if "all" in config.unseen:
        keys += [f"{source.name}/" for source in sources]
    path = towers.locate(config.model, config.model_dir).folder / config.held_out
    try:
        lists = json.loads(path.read_bytes())["held_out"]
        keys += [str(key) for each in lists.values() for key in each]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidData(
            f'{path} is no list of held-out images ({error!r}); expected {{"held_out": {{SOURCE: [KEY, ...]}}}}.'
        ) from None
    if not keys:
        raise InvalidConfig(
            f"no image is known that the towers were not fitted on: {path.name} is not beside the weights. "
            'Name such pairs with unseen, or all of them with "all".'
        )
    return keys


class _Team(Team):
    """The processes of a `World`, for what `prototypes` shares."""

    def add(self, values: NDArray[np.float64] | NDArray[np.int64]) -> None:
        World(self.rank, self.size).add(torch.from_numpy(values))


@contextmanager
def _in_words() -> Iterator[None]:
    """What `prototypes` says of its input, as an error of this package."""
    try:
        yield
    except ValueError as error:
        raise InvalidData(str(error)) from error


def _plant(config: TrainConfig, backbone: Backbone, out: Path, console: Console, world: World) -> None:
    """Tree and bank, unless they are there; all processes make them, rank 0 writes them, `made.json` last."""
    cache = FeatureCache.open(out / FEATURES, fingerprint=backbone.fingerprint)
    of = json.loads((out / FEATURES / pairs.HEADER).read_bytes())["made_from"]
    made_from = pairs.digest([of, asdict(config.tree), backbone.logit_scale])
    try:
        theirs = json.loads((out / TREE / MADE).read_bytes())["made_from"]
    except FileNotFoundError:
        theirs = None
    except (ValueError, KeyError, TypeError):
        raise InvalidData(f"{out / TREE / MADE} is damaged. Delete {out / TREE}.") from None
    theirs = world.gather(theirs)[0]  # all go on, or none
    if theirs not in (None, made_from):
        raise InvalidData(
            f"{out / TREE} is the tree of other pairs or options. Delete it, or name another folder with --out."
        )
    if theirs == made_from:
        console.print(f"{out / TREE} is complete already.", markup=False, highlight=False, soft_wrap=True)
        return

    def report(line: str) -> None:
        console.print(f"tree: {line}", markup=False, highlight=False, soft_wrap=True)

    team = _Team(world.rank, world.size, backbone.device.index or 0)
    tree = grow(cache, config.tree.cluster(len(cache), backbone.logit_scale), report=report, team=team)
    bank = PrototypeBank.build(tree, cache, seed=config.tree.seed, team=team)
    if world.rank:
        return
    save_hierarchy(out / TREE, tree)
    save_bank(out / TREE, bank)
    with pairs.beside(out / TREE / MADE) as file:
        file.write(pairs.json_line({"made_from": made_from}))


def _root(config: TrainConfig, bank: PrototypeBank) -> Root:
    """The root beside the model's weights, or else the bank's own."""
    folder = towers.locate(config.model, config.model_dir).folder
    with _in_words():
        return load_root(folder, fingerprint=bank.fingerprint) or bank.root


def _structure(config: TrainConfig, bank: PrototypeBank, backbone: Backbone) -> Structure:
    with _in_words():
        return Structure.of(bank, backbone.device).control(config.learner.prototypes)


def _counts(tree: Hierarchy, bank: PrototypeBank) -> dict[str, Any]:
    levels = {LEVELS[level]: [len(tree.nodes(level)), len(bank.rows(level))] for level in range(len(LEVELS))}
    return {"pairs": len(tree.keys), "nodes and prototypes": levels, "dropped": dict(tree.facts.get("dropped", {}))}


def _list_seen(out: Path, sources: Sequence[Source]) -> None:
    """`seen.json` beside the checkpoint: the images of class folders that the pairs were read from. The harness leaves
    them out of what it measures."""
    labelled = [source.name for source in sources if source.path.suffix.lower() not in (".tar", *TABLES)]
    lists: dict[str, list[str]] = {}
    with (out / FEATURES / "keys.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            key = str(json.loads(line)["key"])
            for name in labelled:
                if key.startswith(f"{name}/"):
                    lists.setdefault(name, []).append(key.removeprefix(f"{name}/"))
    (out / CHECKPOINT).mkdir(parents=True, exist_ok=True)
    told = pairs.json_line({"seen": {name: sorted(keys) for name, keys in lists.items()}})
    path = out / CHECKPOINT / SEEN
    if not path.is_file() or path.read_bytes() != told:  # a finished run is left alone
        with pairs.beside(path) as file:
            file.write(told)


def _finish(
    folder: Path,
    bank: PrototypeBank,
    params: Params,
    regulator: str,
    settings: dict[str, Any],
    facts: dict[str, Any],
    console: Console,
) -> Checkpoint:
    """Bank and checkpoint in one folder, unless they are there."""
    try:
        there = load_checkpoint(folder, fingerprint=bank.fingerprint)
    except InvalidCheckpoint:
        there = None  # stopped while it was written: the state of training is whole, so write it again
    if there is not None and there.facts.get("made_from") == facts["made_from"]:
        console.print(f"{folder} is complete already.", markup=False, highlight=False, soft_wrap=True)
        return there
    save_bank(folder, bank)
    made = Checkpoint(
        params=params,
        regulator=regulator,
        settings=settings,
        fingerprint=bank.fingerprint,
        bank_sha256=file_sha256(folder / "bank.safetensors"),
        facts=facts,
    )
    return save_checkpoint(folder, made)


def main(words: Sequence[str] | None = None) -> int:
    """Run with command-line `words`; returns the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    description = __doc__.partition("\n\n")[0]
    config = parse(TrainConfig, words, program=PROGRAM, description=description, recipe="CONFIG.toml")
    said = Console(stderr=True)
    quiet = os.environ.get("RANK", "0") != "0"

    def work() -> None:
        with meta.joined():
            made = run(config, Console(stderr=True, quiet=quiet))
        if made is not None:
            count = sum(w.numel() for w in made.params.values())
            told = f"{config.out / CHECKPOINT}: {count:,} weights, SHA-256 {made.sha256[:16]}."
            said.print(told, markup=False, highlight=False, soft_wrap=True)

    return exit_code(work, said)


if __name__ == "__main__":
    sys.exit(main())
