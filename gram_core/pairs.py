"""Image-text pairs in, cached features out: `python -m gram_core.pairs --model M --data SHARDS... --out DIR`.

Reads WebDataset shards, tables, image folders and zip files; writes the feature cache that `prototypes` reads: raw
float32 arrays and JSON lines. The work is cut into parts of some hundred samples, each of them one file that is written
beside and renamed, so a killed run goes on where it stopped and its bytes are those of an undisturbed one.
Under `torchrun` every process takes every world-th part and rank 0 puts them together (equal to one process with as
many threads as each of them: the thread count moves a feature's last bits). It knows nothing of hierarchies.

Exit codes: 0 done, 2 an option or recipe is wrong, 65 data or model can't be used, 130 interrupted (run the same
command again: it goes on where it stopped).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from gram_core import backbone as towers
from gram_core import phrases
from gram_core.backbone import Backbone
from gram_core.config import exit_code, option, parse
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData, InvalidImage
from gram_core.images import ImageLimits, decode
from gram_core.names import clean
from gram_core.sources import (
    IMAGE_COLUMNS,
    SUFFIXES,
    TABLES,
    Archive,
    Parts,
    expand,
    index_shard,
    open_zip,
    read_at,
    read_table,
    some,
    walk,
)  # fmt: skip
from gram_core.text import START_TEMPLATE, TextEncoder

FORMAT = 1
HEADER, PARTS = "header.json", "parts"
ARRAYS = ("image.f32", "caption.f32", "phrase.f32", "keys.jsonl", "phrases.jsonl", "phrase_rows.jsonl")
CAPTION_COLUMNS = re.compile(r"(captions?|text|title|description|sentence|comment)([ _-]?\d+)?")
MAX_TEXT = 2**20  # bytes of the captions of one sample
GROUP = 64  # images that are stacked for the tower at once
TEXTS = 2048  # phrases of one part
AHEAD = 256  # images that are read and decoded before their turn
QUIET_S = 20.0  # between lines where there is no terminal
PATIENCE_S = 600.0  # without a new part from the other ranks

Array = NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Every option of `python -m gram_core.pairs`; a recipe is a TOML file with the same names."""

    model: str = option("gram-mini", "model as in GRAM_MODEL: bundled, NAME/TAG, a directory or hf-hub:ORG/REPO")
    data: tuple[Path, ...] = option(
        (),
        ".tar shards (NAME-{0000..0003}.tar names several), .csv or .tsv tables, image folders, .zip files of such "
        "or a folder in one (NAME.zip/val)",
        whole=True,
    )
    out: Path = option(Path("features"), "folder of the feature cache")
    image_column: str | None = option(None, "column of a table with the image's path, relative to the table")
    caption_columns: tuple[str, ...] = option((), "columns of a table with captions", whole=True)
    share: dict[str, float] = option({}, "use a seeded share of some sources' pairs: PATTERN of their names = SHARE")
    part: int = option(512, "samples that are computed and kept together")
    least: int = option(3, "captions that must hold a phrase")
    phrases: int = option(20_000, "candidate phrases at most")
    phrase_rows: int = option(1000, "pairs named for each phrase at most, a seeded sample")
    seed: int = option(0, "seed of that sample and of the shares")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option("fp32", "auto, fp32 or bf16")
    model_dir: Path | None = option(None, "where fetched models lie, as GRAM_MODEL_DIR")
    workers: int = option(0, "threads that read and decode; 0 takes one per core, at most 16")
    rank: int | None = option(None, "number of this process (default: what torchrun says, or 0)")
    world: int | None = option(None, "number of processes that share the work (default: what torchrun says, or 1)")

    def __post_init__(self) -> None:
        least = {"part": 1, "least": 1, "phrases": 0, "phrase_rows": 1, "seed": 0, "workers": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        for pattern, share in self.share.items():
            if not 0.0 < share <= 1.0:
                raise InvalidConfig(f"the share of {pattern!r} is {share}; it must be above 0 and at most 1.")
        if (self.rank is None) != (self.world is None):
            raise InvalidConfig("rank and world go together: give both or none.")
        if self.rank is not None and self.world is not None and not 0 <= self.rank < self.world:
            raise InvalidConfig(f"rank is {self.rank} of {self.world}; it must be 0 to {self.world - 1}.")


# ---- what there is to read ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """Bytes on disk: a whole file (size None) or a piece of a shard."""

    path: Path
    suffix: str
    offset: int = 0
    size: int | None = None

    def read(self, limit: int) -> bytes:
        """The bytes; of more than `limit` just enough for the reader to see that they are too many."""
        if self.size is not None:
            return read_at(self.path, self.offset, min(self.size, limit + 1))
        with self.path.open("rb") as file:
            return file.read(limit + 1)

    @property
    def content(self) -> object:
        """What tells it from others without being read."""
        return [self.suffix, self.offset, self.size]


@dataclass(frozen=True)
class Member:
    """Bytes inside a zip file."""

    archive: Archive
    parts: Parts

    def read(self, limit: int) -> bytes:
        """As `Blob.read`."""
        return self.archive.read(self.parts, limit + 1)

    @property
    def content(self) -> object:
        """As `Blob.content`."""
        member = self.archive.members[self.parts]
        return [member.CRC, member.file_size]


@dataclass(frozen=True)
class Sample:
    """One key with its image and its captions, still to be read; either may be missing."""

    key: str
    image: Blob | Member | None
    texts: tuple[Blob, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A shard, table, folder or zip file. `samples` are the same, in the same order, whenever they are asked for."""

    name: str
    path: Path
    samples: Callable[[], tuple[list[Sample], Counter[str]]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples `start` to `stop` of a source. `file` is named by all that its features depend on, the model, the place
    of the data and its time of change included; `content` is a hash of keys, sizes and captions alone."""

    source: Source
    start: int
    stop: int
    file: str
    content: str


def open_sources(config: PairsConfig) -> list[Source]:
    """The shards, tables, folders and zip files of `--data`, sorted by name: their order there changes nothing.

    Raises InvalidData for what is not there or is of another kind.
    """
    if not config.data:
        raise InvalidConfig("no --data; name .tar shards, .csv or .tsv tables, image folders or .zip files.")
    found: dict[Path, Path] = {}
    for given in config.data:
        given = given.expanduser()
        for path in [given] if given.is_dir() else [given.parent / name for name in expand(given.name)]:
            for one in _contents(path):
                found[one.resolve()] = one
    for path in found:
        if above := next((p for p in path.parents if p in found and _zipped(p)), None):
            raise InvalidData(f"{found[path]} lies in {found[above]}, which is named as well. Leave one of them out.")
    names = _short_names(list(found))
    for pattern in config.share:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names.values()):
            raise InvalidConfig(f"share names {pattern!r}; the sources are {some(sorted(names.values()))}.")
    every = sorted((_source(name, path, config) for path, name in names.items()), key=lambda source: source.name)
    return [_shared(source, config) for source in every]


def _shared(source: Source, config: PairsConfig) -> Source:
    """The source with the share of its samples that is asked for; a sample stays or goes whatever stands beside it."""
    wanted = [share for pattern, share in config.share.items() if fnmatch.fnmatchcase(source.name, pattern)]
    if not wanted:
        return source

    def samples() -> tuple[list[Sample], Counter[str]]:
        every, skipped = source.samples()
        return [sample for sample in every if fraction(sample.key, config.seed) < wanted[-1]], skipped

    return replace(source, samples=samples)


def fraction(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on key and seed alone: more samples change nobody's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _contents(path: Path) -> list[Path]:
    if _zipped(path):
        return [path]
    if not os.path.exists(path):
        raise InvalidData(
            f"{path} can't be found; expected a .tar shard, a table, an image folder or a .zip file. Check the path."
        )
    if path.is_dir():
        files, _ = walk(path)
        inside = sorted(path.joinpath(*f) for f in files if f[-1].lower().endswith((".tar", *TABLES)))
        return inside or [path]
    if path.suffix.lower() not in (".tar", *TABLES):
        raise InvalidData(
            f"{path} can't be read; expected an uncompressed .tar shard, a .csv, a .tsv, a .zip or a folder. "
            "Unpack it first."
        )
    return [path]


def _zipped(path: Path) -> tuple[Path, Parts] | None:
    """The zip file that `path` is or lies in, and the folder in there."""
    for at in (path, *path.parents):
        if at.suffix.lower() == ".zip" and at.is_file():
            return at, path.relative_to(at).parts
    return None


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each file, with as many of its folders as tell it from the others."""
    names: dict[Path, str] = {}
    todo = list(paths)
    depth = 1
    while todo:
        tried = {path: _tail(path, depth) for path in todo}
        often = Counter(tried.values())
        done = [path for path in todo if often[tried[path]] == 1 or depth > len(path.parts)]
        names |= {path: tried[path] if depth <= len(path.parts) else path.as_posix() for path in done}
        todo = [path for path in todo if path not in names]
        depth += 1
    return names


def _tail(path: Path, depth: int) -> str:
    """The last `depth` parts of a path; of a folder in a zip file, those of the file and all that follow."""
    file, inner = _zipped(path) or (path, ())
    return "/".join((*(file.with_suffix("") if file.is_file() else file).parts[-depth:], *inner))


def _source(name: str, path: Path, config: PairsConfig) -> Source:
    if zipped := _zipped(path):
        file, inner = zipped
        return Source(name=name, path=file, samples=lambda: _zip(name, file, inner))
    if path.is_dir():
        return Source(name=name, path=path, samples=lambda: _folder(name, path))
    if path.suffix.lower() in TABLES:
        return Source(name=name, path=path, samples=lambda: _table(name, path, config))
    return Source(name=name, path=path, samples=lambda: _shard(name, path))


def _shard(name: str, path: Path) -> tuple[list[Sample], Counter[str]]:
    index, whole = index_shard(path)
    samples = []
    for key, files in index.items():
        image = next((suffix for suffix in SUFFIXES if suffix in files), None)
        texts = [suffix for suffix in (".txt", ".json") if suffix in files]
        if image is None and not texts:
            continue  # something else: masks, features, notes
        blobs = [Blob(path, suffix, *files[suffix]) for suffix in texts]
        samples.append(Sample(f"{name}/{key}", Blob(path, image, *files[image]) if image else None, tuple(blobs)))
    return samples, Counter() if whole else Counter({"shard_cut_off": 1})


def _folder(name: str, path: Path) -> tuple[list[Sample], Counter[str]]:
    files, _ = walk(path)
    samples = []
    for parts in sorted(files):
        if parts[-1].lower().endswith(SUFFIXES):
            captions = (clean(parts[-2]),) if len(parts) > 1 else ()
            samples.append(Sample("/".join((name, *parts)), Blob(path.joinpath(*parts), ""), captions=captions))
    if not samples:
        raise InvalidData(f"{path} holds no .jpg, .png or .webp image, shard or table; expected class/file.jpg.")
    return samples, Counter()


def _zip(name: str, path: Path, inner: Parts) -> tuple[list[Sample], Counter[str]]:
    """As `_folder`, of what lies in the folder `inner` of a zip file."""
    archive = open_zip(path)
    samples = []
    for parts in sorted(archive.files):
        if parts[: len(inner)] == inner and parts[-1].lower().endswith(SUFFIXES):
            captions = (clean(parts[-2]),) if len(parts) > len(inner) + 1 else ()
            key = "/".join((name, *parts[len(inner) :]))
            samples.append(Sample(key, Member(archive, parts), captions=captions))
    if not samples:
        there = "/".join((str(path), *inner))
        raise InvalidData(f"{there} holds no .jpg, .png or .webp image; expected class/file.jpg in there.")
    return samples, Counter()


def _table(name: str, path: Path, config: PairsConfig) -> tuple[list[Sample], Counter[str]]:
    header, lines = read_table(path, "a table of images and captions in UTF-8")
    wanted = [config.image_column.lower()] if config.image_column else IMAGE_COLUMNS
    image = next((header.index(column) for column in wanted if column in header), None)
    if config.caption_columns:
        missing = [column for column in config.caption_columns if column.lower() not in header]
        columns = [header.index(column.lower()) for column in config.caption_columns if column not in missing]
    else:
        columns = [i for i, column in enumerate(header) if CAPTION_COLUMNS.fullmatch(column) and i != image]
        missing = [] if columns else ["caption, captions, text, title, description, sentence or comment"]
    if image is None or missing:
        raise InvalidData(
            f"{path} has no {'image' if image is None else 'caption'} column: its header is "
            f"{some(header, 12) or 'empty'}; expected {', '.join(wanted) if image is None else some(missing)}. "
            "Name the columns with --image-column and --caption-columns."
        )
    rows: dict[str, list[str]] = {}
    for _, cells in lines:
        if image < len(cells) and cells[image]:
            rows.setdefault(cells[image], []).extend(cells[c] for c in columns if c < len(cells))
    samples = [
        Sample(f"{name}/{key}", Blob(path.parent / key, ""), captions=tuple(captions))
        for key, captions in sorted(rows.items())
    ]
    return samples, Counter()


def _captions(sample: Sample) -> list[str] | str:
    """The captions of a sample in order, each once and with single spaces; or why there are none."""
    found = list(sample.captions)
    for blob in sample.texts:
        try:
            content = blob.read(MAX_TEXT)
        except OSError:
            return "unreadable_file"
        if len(content) > MAX_TEXT:
            return "captions_too_long"
        text = content.decode("utf-8", "replace")
        if blob.suffix == ".txt":
            found += text.splitlines()
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            if len(sample.texts) == 1:
                return "unreadable_captions"
            continue
        for name in ("caption", "captions"):
            value = fields.get(name) if isinstance(fields, dict) else None
            found += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    whole = [c.encode("utf-8", "replace").decode("utf-8") for c in found]  # JSON may hold lone surrogates
    plain = [" ".join(re.sub(r"[\x00-\x1f\x7f\x80-\x9f]", " ", unicodedata.normalize("NFC", c)).split()) for c in whole]
    return [c for c in dict.fromkeys(plain) if c] or "no_captions"


# ---- the parts ---------------------------------------------------------------------------------------------------


def plan(sources: Iterable[Source], size: int, stamp: str) -> Iterator[Part]:
    """The parts of all sources in row order; `stamp` says what their features depend on besides the samples."""
    for number, source in enumerate(sources):
        samples, _ = source.samples()
        place = (stamp, str(source.path), source.path.stat().st_mtime_ns)
        for start in range(0, len(samples), size):
            mine = samples[start : start + size]
            content = digest([[s.key, [b and b.content for b in (s.image, *s.texts)], s.captions] for s in mine])
            yield Part(
                source=source,
                start=start,
                stop=start + len(mine),
                file=f"{number:06d}-{start:08d}-{digest([place, content])}.safetensors",
                content=content,
            )


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def stamp_of(backbone: Backbone) -> str:
    """What the bits of a feature depend on besides its input."""
    return f"{FORMAT}/{backbone.fingerprint}/{backbone.device.type}/{backbone.dtype}"


class _Worker:
    """Turns parts into files: reading and decoding in threads, ahead of the towers."""

    def __init__(self, backbone: Backbone, folder: Path, workers: int) -> None:
        self.backbone = backbone
        self.stamp = stamp_of(backbone)
        self.texts = TextEncoder(backbone)
        self.folder = folder
        self.limits = ImageLimits()
        self.threads = threads(workers)
        self.took: Counter[str] = Counter()  # milliseconds in each tower

    def run(self, parts: Sequence[Part], done: Callable[[int], None]) -> None:
        """Compute `parts` that follow each other in row order, telling `done` how many samples were seen."""
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                opened = ahead(pool, self._open, samples_of(parts), AHEAD)
                for part in parts:
                    self._part(part, islice(opened, part.stop - part.start), done)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def phrases(self, wanted: Sequence[str]) -> bytes:
        """The file of some phrases' features."""
        features = self._checked(self.texts.sentences([START_TEMPLATE.replace("{}", p) for p in wanted]), wanted)
        return save({"phrase": features})

    def _open(self, sample: Sample) -> tuple[str, list[str], Tensor] | str:
        """Key, captions and pixels of a sample, or why it is left out."""
        if sample.image is None:
            return "no_image"
        captions = _captions(sample)
        if isinstance(captions, str):
            return captions
        try:
            image = decode(sample.image.read(self.limits.max_bytes), self.limits)
        except InvalidImage as error:
            return error.code
        except OSError:
            return "unreadable_file"
        return sample.key, captions, self.backbone.preprocess(image.rgb)

    def _part(
        self, part: Part, opened: Iterator[tuple[str, list[str], Tensor] | str], done: Callable[[int], None]
    ) -> None:
        skipped: Counter[str] = Counter()
        keys: list[str] = []
        captions: list[list[str]] = []
        images: list[Array] = [np.zeros((0, self.backbone.joint_dim), np.float32)]
        while group := list(islice(opened, GROUP)):
            good = [item for item in group if not isinstance(item, str)]
            skipped.update(item for item in group if isinstance(item, str))
            if good:
                with self._timed("images"):
                    features = self.backbone.encode_images(torch.stack([pixels for _, _, pixels in good]))
                    images.append(self._checked(features, [key for key, _, _ in good]))
                keys += [key for key, _, _ in good]
                captions += [own for _, own, _ in good]
            done(len(group))
        flat = [caption for own in captions for caption in own]
        with self._timed("captions"):
            each = self._checked(self.texts.sentences(flat), flat)
        starts = np.cumsum([0, *(len(own) for own in captions[:-1])])
        mean = np.add.reduceat(each, starts, axis=0) if captions else each
        mean = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        rows = [{"key": key, "captions": own} for key, own in zip(keys, captions, strict=True)]
        about = {"rows": json.dumps(rows), "skipped": json.dumps(dict(sorted(skipped.items())))}
        arrays = {"image": np.concatenate(images), "caption": mean.astype(np.float32)}
        with beside(self.folder / part.file) as file:
            file.write(save(arrays, about))

    @contextmanager
    def _timed(self, tower: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.took[tower] += round((time.perf_counter() - started) * 1000)

    def _checked(self, features: Tensor, what: Sequence[str]) -> Array:
        return checked(features.float().cpu().numpy(), what, self.backbone.name)


def checked(features: Array, what: Sequence[str], model: str) -> Array:
    """The features (n, D) of n inputs; raises InvalidData where they aren't unit vectors."""
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(features, axis=1) - 1) < 1e-2))  # NaN compares as false
    if len(bad):
        raise InvalidData(
            f"model {model!r} gives NaN or empty features for {len(bad)} of {len(what)} inputs, the first is "
            f"{what[bad[0]]!r}. Its weights are damaged, or bf16 is too coarse: try --precision fp32."
        )
    return features


def threads(workers: int) -> int:
    """How many threads read and decode; 0 asks for one per core, at most 16."""
    return workers or min(16, os.cpu_count() or 1)


def samples_of(parts: Sequence[Part]) -> Iterator[Sample]:
    """The samples of parts, a source being indexed once."""
    current: Source | None = None
    samples: list[Sample] = []
    for part in parts:
        if part.source is not current:
            current = part.source
            samples, _ = current.samples()
        yield from samples[part.start : part.stop]


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """`map` over threads, in order, with at most `most` results begun before their turn."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on the disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# ---- the whole ---------------------------------------------------------------------------------------------------


def build(config: PairsConfig, console: Console, backbone: Backbone | None = None) -> dict[str, Any] | None:
    """Make the feature cache in `config.out`, or go on with it; its header, or None from a rank other than 0.

    Raises InvalidData, InvalidConfig, ModelUnavailable, UnsupportedTower, and FingerprintMismatch when the folder holds
    features of another model.
    """
    rank, world = config.rank or 0, config.world or 1
    sources = open_sources(config)
    if backbone is None:
        towers.fetch(config.model, config.model_dir)
        backbone = towers.load(
            config.model, device=config.device, precision=config.precision, model_dir=config.model_dir
        )
    out = config.out.expanduser()
    parts = list(plan(sources, config.part, stamp_of(backbone)))
    asked = [config.least, config.phrases, config.phrase_rows, config.seed]
    made_from = digest([[part.content for part in parts], asked])
    if not parts:
        raise InvalidData(
            f"{some(s.path for s in sources)}: no images with captions there; expected key.jpg + key.txt."
        )
    header = started(out, backbone, made_from)
    if header is not None:
        shutil.rmtree(out / PARTS, ignore_errors=True)
        console.print(f"{out} is complete already.", markup=False, highlight=False, soft_wrap=True)
        return header
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        opened = {"format": FORMAT, "fingerprint": backbone.fingerprint, "model": backbone.name, "complete": False}
        with beside(out / HEADER) as file:
            file.write(json_line(opened))
    worker = _Worker(backbone, out / PARTS, config.workers)
    mine = parts[rank::world]
    with Meter(console, "features", "images") as meter:
        todo = [part for part in mine if not (out / PARTS / part.file).is_file()]
        total, left = (sum(part.stop - part.start for part in some_) for some_ in (mine, todo))
        meter.begin(total, total - left)
        worker.run(todo, meter.advance)
    if worker.took:
        spent = ", ".join(f"{ms / 1000:.1f} s for {name}" for name, ms in worker.took.items())
        console.print(f"time in the towers: {spent}.", markup=False, highlight=False)
    if rank != 0:
        return None
    if world > 1:
        with Meter(console, "parts of all processes", "parts") as meter:
            await_parts(out / PARTS, parts, meter)
    return _finish(out, worker, parts, sources, config, console, made_from)


def started(out: Path, backbone: Backbone, made_from: str) -> dict[str, Any] | None:
    """The header of a complete cache of the same data; None where there is work to do. Anything else is refused."""
    try:
        header = json.loads((out / HEADER).read_bytes())
        theirs = header["fingerprint"], header["complete"], header.get("made_from")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidData(f"{out / HEADER} is damaged. Delete {out}, or name another folder with --out.") from None
    if theirs[0] != backbone.fingerprint:
        raise FingerprintMismatch(
            f"{out} holds features of model {header.get('model')!r} ({str(theirs[0])[:12]}...), the loaded one is "
            f"{backbone.name!r} ({backbone.fingerprint[:12]}...). Name another folder with --out, or load that model."
        )
    if not theirs[1]:
        return None
    if theirs[2] != made_from:
        raise InvalidData(
            f"{out} is the complete cache of other data or options ({header.get('source')}). Name another folder with "
            "--out, or delete it."
        )
    return header  # type: ignore[no-any-return]  # parsed JSON, checked above


def await_parts(folder: Path, parts: Sequence[Part], meter: Meter) -> None:
    """Until the parts of all ranks are there; raises InvalidData when none comes for `PATIENCE_S`."""
    missing = {part.file for part in parts}
    meter.begin(len(missing), 0)
    last = time.monotonic()
    while True:
        there = missing.intersection(os.listdir(folder))
        missing -= there
        meter.advance(len(there))
        if not missing:
            return
        last = time.monotonic() if there else last
        if time.monotonic() - last > PATIENCE_S:
            raise InvalidData(
                f"{len(missing)} parts of the other processes don't come. Start every rank, or run this command "
                "again as one process: what is there is kept."
            )
        time.sleep(0.2)


def _finish(
    out: Path,
    worker: _Worker,
    parts: Sequence[Part],
    sources: Sequence[Source],
    config: PairsConfig,
    console: Console,
    made_from: str,
) -> dict[str, Any]:
    """Put the parts together, add the phrases, write the header last and remove the parts."""
    for name in (HEADER, *ARRAYS):
        for left in out.glob(f".{name}.*"):  # of a run that was killed here
            left.unlink()
    skipped: Counter[str] = Counter()
    for source in {part.source.name: part.source for part in parts}.values():
        skipped.update(source.samples()[1])
    pairs = captions = 0
    with beside(out / "image.f32") as image, beside(out / "caption.f32") as caption, beside(out / "keys.jsonl") as keys:
        for part in parts:
            arrays, about = read_part(out / PARTS / part.file)
            image.write(arrays["image"].astype("<f4").tobytes())
            caption.write(arrays["caption"].astype("<f4").tobytes())
            for row in json.loads(about["rows"]):
                keys.write(json_line(row))
                pairs, captions = pairs + 1, captions + len(row["captions"])
            skipped.update(json.loads(about["skipped"]))
    if not pairs:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise InvalidData(
            f"{some(s.path for s in sources)}: none of the samples is an image with a caption ({counts})."
        )
    found = phrases.frequent(_lines(out), config.least, config.phrases)
    located = phrases.located(_lines(out), found, config.phrase_rows, config.seed)
    with Meter(console, "phrases", "texts") as meter, beside(out / "phrase.f32") as file:
        meter.begin(len(located), 0)
        for start in range(0, len(located), TEXTS):
            texts = [phrase.text for phrase in located[start : start + TEXTS]]
            path = out / PARTS / f"phrases-{start:06d}-{digest([worker.stamp, texts])}.safetensors"
            if not path.is_file():
                with beside(path) as one:
                    one.write(worker.phrases(texts))
            file.write(read_part(path)[0]["phrase"].astype("<f4").tobytes())
            meter.advance(len(texts))
    with beside(out / "phrases.jsonl") as file:
        file.writelines(json_line({"phrase": p.text, "count": p.count}) for p in located)
    with beside(out / "phrase_rows.jsonl") as file:
        file.writelines(json_line(p.rows) for p in located)
    header = {
        "format": FORMAT,
        "fingerprint": worker.backbone.fingerprint,
        "model": worker.backbone.name,
        "dimension": worker.backbone.joint_dim,
        "pairs": pairs,
        "phrases": len(located),
        "dtype": "float32",
        "source": f"{len(sources)} sources: {some(s.name for s in sources)}",
        "skipped": dict(sorted(skipped.items())),
        "captions": captions,
        "template": START_TEMPLATE,
        "computed": f"{worker.backbone.device.type} {str(worker.backbone.dtype).removeprefix('torch.')}",
        "made_from": made_from,
        "complete": True,
    }
    with beside(out / HEADER) as file:
        file.write(json_line(header))
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return header


def read_part(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and notes of one part; a damaged one is removed, so that the next run makes it again."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (a safetensors file has no other iterator)
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise InvalidData(
            f"{path.name} was damaged ({error}) and is removed: run the same command again to make it anew."
        ) from None


def _lines(out: Path) -> Iterator[list[str]]:
    """The captions of every pair, in row order."""
    with (out / "keys.jsonl").open("rb") as file:
        for line in file:
            yield json.loads(line)["captions"]


def json_line(value: object) -> bytes:
    """One line of ASCII: file names may hold bytes that are no text."""
    return json.dumps(value).encode("ascii") + b"\n"


def _rated(rate: float) -> str:
    """A rate as a person reads it: 1,234 or 0.47."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class _Rate(ProgressColumn):
    """Things per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_rated(speed)} {task.fields['unit']}/s")


class Meter:
    """A progress bar with rate and time left; without a terminal, a line now and then."""

    def __init__(self, console: Console, label: str, unit: str) -> None:
        self.console, self.label, self.unit = console, label, unit
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(),
                   TimeRemainingColumn())  # fmt: skip
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()
        if raised[0] is None and self.count > self.first:
            self._say()

    def begin(self, total: int, count: int) -> None:
        """Start the clock: `count` of `total` were there before."""
        self.total, self.count, self.first = total, count, count
        self.started = self.said = time.monotonic()
        self.task = self.bar.add_task(self.label, total=total, completed=count, unit=self.unit)

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.count += count
        self.bar.advance(self.task, count)
        if not self.console.is_terminal and self.count < self.total and time.monotonic() - self.said > QUIET_S:
            self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        took = max(self.said - self.started, 1e-9)
        rate = (self.count - self.first) / took
        left = f", {(self.total - self.count) / rate:.0f} s left" if self.count < self.total and rate else ""
        self.console.print(
            f"{self.label}: {self.count} of {self.total} {self.unit}, {_rated(rate)} {self.unit}/s, {took:.0f} s{left}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _placed(config: PairsConfig, environment: Mapping[str, str]) -> PairsConfig:
    """The share and the GPU that torchrun gives to this process, where the options leave them open."""
    if config.rank is not None or "RANK" not in environment:
        return config
    own = f"cuda:{environment.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return replace(
        config,
        rank=int(environment["RANK"]),
        world=int(environment.get("WORLD_SIZE", "1")),
        device=own if config.device == "auto" else config.device,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run with command-line `words`; returns the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    description = __doc__.partition("\n\n")[0]
    config = parse(PairsConfig, words, program="python -m gram_core.pairs", description=description)
    said = Console(stderr=True)

    def work() -> None:
        header = build(_placed(config, os.environ), said)
        if header is None:
            said.print("this process's parts are done; rank 0 puts them together.")
            return
        left_out = "".join(f", {count} {reason}" for reason, count in header["skipped"].items())
        said.print(
            f"{config.out}: {header['pairs']} pairs with {header['captions']} captions, {header['phrases']} phrases; "
            f"left out: {left_out[2:] or 'nothing'}.", markup=False, highlight=False, soft_wrap=True
        )  # fmt: skip

    return exit_code(work, said)


if __name__ == "__main__":
    sys.exit(main())
