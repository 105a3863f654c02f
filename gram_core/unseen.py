"""Views of images that the towers were not fitted on: what meta-training sees instead of pixels.

A regulator that is trained on images which the towers know by heart learns nothing that helps at test time
(docs/method.md). `build` computes mild views of chosen pairs once, as they are and restyled, in parts that survive a
kill as those of `pairs` do; `ViewCache` reads them. It knows nothing of classes, trees or captions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save
from torch import Tensor

from gram_core import pairs, views
from gram_core.backbone import Backbone
from gram_core.config import option
from gram_core.domains import DOMAINS
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData, InvalidImage
from gram_core.images import DecodedImage, ImageLimits, decode
from gram_core.pairs import Meter, Part, Sample, Source
from gram_core.sources import some
from gram_core.views import Prepared

__all__ = ["PLAIN", "UnseenConfig", "ViewCache", "build", "listed"]

FORMAT = 1
HEADER, ROWS, VIEWS, PARTS = pairs.HEADER, "rows.jsonl", "views.f16", pairs.PARTS
PLAIN = "plain"  # the domain of images as they are
GROUP = 16  # images that pass the tower at once
AHEAD = 64  # images that are read, decoded and restyled before their turn

Halves = NDArray[np.float16]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class UnseenConfig:
    """Which views are made of an unseen image."""

    views: int = option(8, "views of an image as it is, the original included")
    styled_views: int = option(4, "views of a restyled image, the original included")
    domains: tuple[str, ...] = option(tuple(DOMAINS), "restylings: " + ", ".join(DOMAINS))
    share: float = option(0.5, "share of the images that are restyled as well, a seeded one")
    scale: tuple[float, ...] = option((0.85, 1.0), "smallest and largest share of the area that a view shows")
    seed: int = option(0, "seed of the views and of that share")
    part: int = option(256, "images that are computed and kept together")
    workers: int = option(0, "threads that read, decode and restyle; 0 takes one per core, at most 16")

    def __post_init__(self) -> None:
        for name, low in {"styled_views": 1, "seed": 0, "part": 1, "workers": 0}.items():
            if getattr(self, name) < low:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if self.views < self.styled_views:
            raise InvalidConfig(f"views is {self.views}; it must be at least styled_views, {self.styled_views}.")
        if unknown := [name for name in self.domains if name not in DOMAINS]:
            raise InvalidConfig(f"no domain {unknown[0]!r}; choose from {', '.join(DOMAINS)}.")
        if not 0.0 <= self.share <= 1.0:
            raise InvalidConfig(f"share is {self.share}; it must lie between 0 and 1.")
        if len(self.scale) != 2 or not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise InvalidConfig(f"scale is {self.scale}; give two shares of the area, 0 < smallest <= largest <= 1.")


@dataclass(frozen=True, eq=False)
class ViewCache:
    """R rows, each the V views of one image in one domain.

    Args:
        fingerprint: the model whose features these are.
        keys: (R,) key of the pair that the image belongs to; the same key stands in several domains.
        domains: (R,) `plain` or a name of `domains.DOMAINS`.
        features: (R, V, D) half-precision features, view 0 of the original; memory-mapped when opened from disk.
    """

    fingerprint: str
    keys: tuple[str, ...]
    domains: tuple[str, ...]
    features: Halves

    def __post_init__(self) -> None:
        shape = self.features.shape
        if len(shape) != 3 or not len(self.keys) == len(self.domains) == shape[0] or 0 in shape:
            raise InvalidData(
                f"{len(self.keys)} keys, {len(self.domains)} domains and views of shape {shape} are no view cache; "
                "expected (rows, views, dimension) with a key and a domain for every row. Build it again."
            )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dimension(self) -> int:
        return int(self.features.shape[2])

    def views(self, rows: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, V, D) float32 of unit norm."""
        return _unit(self.features[np.asarray(rows, np.int64)])

    def originals(self, rows: Sequence[int] | NDArray[np.int64]) -> Floats:
        """(n, D) float32 of unit norm: view 0."""
        return _unit(self.features[np.asarray(rows, np.int64), 0])

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None) -> ViewCache:
        """The finished cache in `folder`, made for the model `fingerprint` (None: for any).

        Raises FingerprintMismatch, or InvalidData in words when it is missing, unfinished, cut off or damaged.
        """
        path = folder / HEADER
        try:
            header = json.loads(path.read_bytes())
            stored, complete, form = str(header["fingerprint"]), header["complete"], header["format"]
            shape = tuple(int(header[name]) for name in ("rows", "views", "dimension")) if complete else ()
        except OSError as error:
            raise InvalidData(f"{folder} is no view cache: {path} can't be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{path} is damaged ({error!r}). Delete {folder} and build it again.") from None
        if form != FORMAT:
            raise InvalidData(f"{path} has format {form!r}, this version reads {FORMAT}. Build it again.")
        if complete is not True:
            raise InvalidData(f"the view cache in {folder} is unfinished. Run the step that makes it to its end.")
        if fingerprint is not None and stored != fingerprint:
            raise FingerprintMismatch(
                f"the view cache in {folder} is of model {stored[:16]}, expected {fingerprint[:16]}. "
                "Name another folder, or load that model."
            )
        views, wanted = folder / VIEWS, int(np.prod(shape)) * 2
        if not views.is_file() or views.stat().st_size != wanted:
            size = views.stat().st_size if views.is_file() else 0
            raise InvalidData(f"{views} has {size} bytes, expected {wanted}: it is cut off. Build {folder} again.")
        try:
            rows = [json.loads(line) for line in (folder / ROWS).read_bytes().splitlines()]
            keys, domains = (tuple(str(row[name]) for row in rows) for name in ("key", "domain"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{folder / ROWS} can't be read ({error!r}). Build {folder} again.") from None
        return cls(stored, keys, domains, np.memmap(views, "<f2", "r", shape=shape))


# ---- building -----------------------------------------------------------------------------------------------------


def listed(entries: Iterable[str]) -> Callable[[str], bool]:
    """Whether a pair's key is among `entries`: keys, ends of keys from a slash on, or starts of keys up to a slash.

    So `shard-0/cat` and `cat` both take the pair `shard-0/cat`, and `photos/val/` takes all below it.
    """
    entries = list(entries)
    whole = {entry for entry in entries if not entry.endswith("/")}
    above = {entry for entry in entries if entry.endswith("/")}

    def among(key: str) -> bool:
        cuts = [at + 1 for at, letter in enumerate(key) if letter == "/"]
        return key in whole or any(key[at:] in whole or key[:at] in above for at in cuts)

    return among


def build(
    sources: Sequence[Source],
    keys: Iterable[str],
    out: Path,
    backbone: Backbone,
    console: Console,
    config: UnseenConfig | None = None,
    *,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any] | None:
    """Make the view cache in `out`, or go on with it; its header, or None from a rank other than 0.

    `sources` are those of `pairs.open_sources`, `keys` the images in there that the towers were not fitted on, as
    `listed` reads them. A row's views are those that `Classifier.see` makes with the same seed and scale.
    Raises InvalidData, and FingerprintMismatch when the folder holds views of another model.
    """
    config = config or UnseenConfig()
    keys = list(keys)
    among = listed(keys)
    chosen = [replace(source, samples=_chosen(source, among)) for source in sources]
    out = out.expanduser()
    asked = _asked(config)
    stamp = f"{FORMAT}/{pairs.stamp_of(backbone)}/{pairs.digest(asked)}"
    parts = list(pairs.plan(chosen, config.part, stamp))
    if not parts:
        raise InvalidData(
            f"{some(s.path for s in sources) or 'no sources'}: none of the {len(keys)} keys is there, the first is "
            f"{keys[0] if keys else 'none'}. Keys are those of gram_core.pairs: SOURCE/NAME."
        )
    made_from = pairs.digest([[part.content for part in parts], asked])
    header = pairs.started(out, backbone, made_from)
    if header is not None:
        shutil.rmtree(out / PARTS, ignore_errors=True)
        console.print(f"{out} is complete already.", markup=False, highlight=False, soft_wrap=True)
        return header
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        opened = {"format": FORMAT, "fingerprint": backbone.fingerprint, "model": backbone.name, "complete": False}
        with pairs.beside(out / HEADER) as file:
            file.write(pairs.json_line(opened))
    with Meter(console, "views", "images") as meter:
        mine = parts[rank::world]
        todo = [part for part in mine if not (out / PARTS / part.file).is_file()]
        total, left = (sum(part.stop - part.start for part in some_) for some_ in (mine, todo))
        meter.begin(total, total - left)
        _Worker(backbone, config, out / PARTS).run(todo, meter.advance)
    if rank != 0:
        return None
    if world > 1:
        with Meter(console, "parts of all processes", "parts") as meter:
            pairs.await_parts(out / PARTS, parts, meter)
    return _finish(out, backbone, parts, config, made_from)


def _asked(config: UnseenConfig) -> dict[str, Any]:
    """The options that the views depend on, as JSON gives them back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if name not in ("part", "workers")
    }


def _chosen(source: Source, among: Callable[[str], bool]) -> Callable[[], tuple[list[Sample], Counter[str]]]:
    def samples() -> tuple[list[Sample], Counter[str]]:
        every, skipped = source.samples()
        return [sample for sample in every if among(sample.key)], skipped

    return samples


class _Worker:
    """Turns parts into files: reading, decoding and restyling in threads, ahead of the tower."""

    def __init__(self, backbone: Backbone, config: UnseenConfig, folder: Path) -> None:
        self.backbone, self.config, self.folder = backbone, config, folder
        self.limits = ImageLimits()

    def run(self, parts: Sequence[Part], done: Callable[[int], None]) -> None:
        """Compute `parts`, telling `done` how many images were seen."""
        with ThreadPoolExecutor(pairs.threads(self.config.workers)) as pool:
            try:
                opened = pairs.ahead(pool, self._open, pairs.samples_of(parts), AHEAD)
                for part in parts:
                    self._part(part, islice(opened, part.stop - part.start), done)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _open(self, sample: Sample) -> list[tuple[str, str, Prepared]] | str:
        """(key, domain, image) of every row of a sample, or why it is left out."""
        if sample.image is None:
            return "no_image"
        try:
            image = decode(sample.image.read(self.limits.max_bytes), self.limits)
        except InvalidImage as error:
            return error.code
        except OSError:
            return "unreadable_file"
        made = [(sample.key, PLAIN, views.prepare(self.backbone, image))]
        if pairs.fraction(sample.key, self.config.seed) < self.config.share:
            made += [(sample.key, d, views.prepare(self.backbone, _restyled(image, d))) for d in self.config.domains]
        return made

    def _part(
        self, part: Part, opened: Iterator[list[tuple[str, str, Prepared]] | str], done: Callable[[int], None]
    ) -> None:
        skipped: Counter[str] = Counter()
        rows: list[dict[str, str]] = []
        features: list[Halves] = [np.zeros((0, self.config.views, self.backbone.joint_dim), np.float16)]
        while group := list(islice(opened, GROUP)):
            skipped.update(item for item in group if isinstance(item, str))
            images = [row for item in group if not isinstance(item, str) for row in item]
            for plain, count in ((True, self.config.views), (False, self.config.styled_views)):
                own = [row for row in images if (row[1] == PLAIN) == plain]
                if own:
                    features.append(self._features([image for _, _, image in own], count, [key for key, _, _ in own]))
                    rows += [{"key": key, "domain": domain} for key, domain, _ in own]
            done(len(group))
        about = {"rows": json.dumps(rows), "skipped": json.dumps(dict(sorted(skipped.items())))}
        with pairs.beside(self.folder / part.file) as file:
            file.write(save({"views": np.concatenate(features)}, about))

    def _features(self, images: Sequence[Prepared], count: int, keys: Sequence[str]) -> Halves:
        """(n, V, D): `count` views of each image; they repeat where V is larger, which leaves every mean as it is."""
        config, backbone = self.config, self.backbone
        with torch.inference_mode():
            made = [backbone.encode_images(torch.stack([image.original for image in images]))[:, None]]
            if count > 1:
                crops = [self._crops(image, count) for image in images]
                encoded = backbone.encode_images(torch.cat(crops), views=True)
                made.append(encoded.reshape(len(images), count - 1, -1))
            features = torch.cat(made, dim=1).float().cpu().numpy()
        flat = pairs.checked(features.reshape(len(keys) * count, -1), np.repeat(keys, count).tolist(), backbone.name)
        halves: Halves = flat.reshape(features.shape).astype("<f2")[:, np.arange(config.views) % count]
        return halves

    def _crops(self, image: Prepared, count: int) -> Tensor:
        size = (int(image.pixels.shape[1]), int(image.pixels.shape[2]))
        low, high = self.config.scale
        return views.cut(self.backbone, image, views.boxes(image.sha256, size, count, self.config.seed, (low, high)))


def _restyled(image: DecodedImage, domain: str) -> DecodedImage:
    rgb = DOMAINS[domain](image.rgb)
    sha256 = hashlib.sha256(image.sha256 + domain.encode()).digest()
    return replace(image, rgb=rgb, width=rgb.width, height=rgb.height, sha256=sha256)


def _finish(
    out: Path, backbone: Backbone, parts: Sequence[Part], config: UnseenConfig, made_from: str
) -> dict[str, Any]:
    """Put the parts together, write the header last and remove the parts."""
    for name in (HEADER, ROWS, VIEWS):
        for left in out.glob(f".{name}.*"):  # of a run that was killed here
            left.unlink()
    skipped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with pairs.beside(out / VIEWS) as file, pairs.beside(out / ROWS) as lines:
        for part in parts:
            arrays, about = pairs.read_part(out / PARTS / part.file)
            file.write(arrays["views"].astype("<f2").tobytes())
            for row in json.loads(about["rows"]):
                lines.write(pairs.json_line(row))
                counts[row["domain"]] += 1
            skipped.update(json.loads(about["skipped"]))
    if not counts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise InvalidData(f"none of the chosen images can be used ({reasons}). Choose others, or check the data.")
    header = {
        "format": FORMAT,
        "fingerprint": backbone.fingerprint,
        "model": backbone.name,
        "rows": sum(counts.values()),
        "views": config.views,
        "dimension": backbone.joint_dim,
        "dtype": "float16",
        "source": f"{counts[PLAIN]} images of {some(sorted({part.source.name for part in parts}))}",
        "counts": dict(sorted(counts.items())),
        "skipped": dict(sorted(skipped.items())),
        "settings": _asked(config),
        "made_from": made_from,
        "complete": True,
    }
    with pairs.beside(out / HEADER) as file:
        file.write(pairs.json_line(header))
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return header


def _unit(features: Halves) -> Floats:
    wide = features.astype(np.float32)
    unit: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return unit
