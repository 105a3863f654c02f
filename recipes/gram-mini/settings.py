"""The recipe's hyper-parameters: one frozen dataclass per stage, read from a TOML file that may not surprise.

Nothing here knows a path: folders are arguments of `build.py`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many views of each training image are cached, and how much of each source is held out."""

    held_out_flickr8k: float = 0.2
    held_out_other: float = 0.15
    size: int = 128
    crops_flickr: int = 3
    restyles_flickr: int = 4
    crops_imagenet: int = 5
    restyles_imagenet: int = 6
    restyles_tiny: int = 1
    restyles_emoji: int = 2


@dataclass(frozen=True, kw_only=True)
class Words:
    """The general vocabulary that the text tower is taught."""

    names: int = 27000
    max_words: int = 3


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Step A: sentence embeddings mapped into the space of the image features."""

    first_steps: int = 150
    steps: int = 2500
    batch: int = 512
    lr: float = 1.0e-3
    names_per_step: int = 500
    hidden: int = 1024
    dropout: float = 0.1
    distil: float = 1.0
    hypernyms: float = 1.0
    captions: float = 0.5
    nouns: float = 0.5
    emoji: float = 0.15
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Text:
    """Step B: the text tower, distilled to the teacher map."""

    steps: int = 800
    batch: int = 256
    lr: float = 1.2e-3
    captions_share: float = 0.2
    relations: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Step C: every tensor, end to end."""

    steps: int = 3000
    batch: int = 48
    size_first: int = 129
    size_last: int = 161
    last_share: float = 0.35
    lr_trunk: float = 2.0e-4
    lr_heads: float = 3.0e-4
    lr_text: float = 2.0e-4
    weight_decay: float = 1.0e-4
    ema: float = 0.998
    text_batch: int = 96
    clean_share: float = 0.5
    self_distil: float = 1.0
    polish_steps: int = 300
    polish_lr: float = 6.0e-4
    polish_core_share: float = 0.75


@dataclass(frozen=True, kw_only=True)
class Polish:
    """Step D: the text tower alone, towards the map that step C left."""

    views: int = 12000
    steps: int = 2400
    batch: int = 256
    images: int = 512
    lr: float = 1.0e-3
    weight_decay: float = 0.05
    relations: float = 1.0
    naming: float = 0.5
    core_share: float = 0.4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole recipe."""

    seed: int = 0
    embed_dim: int = 512
    image_size: int = 161
    context: int = 32
    width: int = 256
    heads: int = 4
    layers: int = 4
    images: Images = Images()
    words: Words = Words()
    teacher: Teacher = Teacher()
    text: Text = Text()
    finetune: Finetune = Finetune()
    polish: Polish = Polish()


def _fill(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}. Keys: {', '.join(sorted(known))}.")
        default = known[key].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{where}.{key} must be a table, got {value!r}.")
            values[key] = _fill(type(default), value, f"{where}.{key}")
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            values[key] = float(value)
        elif type(value) is not type(default):
            raise ValueError(f"{where}.{key} must be {type(default).__name__}, got {value!r}.")
        else:
            values[key] = value
    return cls(**values)


def load_settings(path: Path) -> Settings:
    """Read a recipe; an unknown key or a value of the wrong type is a sentence, not a surprise."""
    settings = _fill(Settings, tomllib.loads(path.read_text(encoding="utf-8")), path.name)
    if not isinstance(settings, Settings):
        raise TypeError("unreachable")
    return settings
