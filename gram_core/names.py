"""Class names: what a folder is called as a person would say it, and files that say it outright."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gram_core.errors import InvalidData
from gram_core.sources import Parts, reading, some


@cache
def imagenet_classes(subset: str = "imagenet") -> dict[str, str]:
    """WordNet id -> name in label order, all distinct; `subset` is `imagenet`, `imagenet_a` or `imagenet_r`.

    The names are open_clip's. Where two ids share one (missile, sunglasses), each takes its first WordNet lemma:
    missile and projectile, sunglass and sunglasses.
    """
    from gram_core.backbone import imagenet_names  # here, since it loads torch: reading folders needs none

    spec = find_spec("timm")  # the lists lie in its wheel; importing it would build every model it knows
    assert spec is not None
    assert spec.origin is not None
    info = Path(spec.origin).parent / "data" / "_info"
    if subset != "imagenet":
        names = imagenet_classes()
        return {wnid: names[wnid] for wnid in (info / f"{subset}_synsets.txt").read_text().split()}
    wnids = (info / "imagenet_synsets.txt").read_text().split()
    lemmas = dict(line.split("\t") for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    often = Counter(imagenet_names())
    pairs = zip(wnids, imagenet_names(), strict=True)
    return {wnid: name if often[name] == 1 else lemmas[wnid].split(",")[0] for wnid, name in pairs}


def is_wnid(text: str) -> bool:
    """Whether this is a bare WordNet id, as n01440764."""
    return re.fullmatch(r"n\d{8}", text) is not None


def clean(folder: str) -> str:
    """The class name a person would type: `n01443537-goldfish` and `001.gold_fish` lose their number, `_` and `+`
    become spaces, a bare WordNet id its ImageNet name. What isn't known stays as it is."""
    if is_wnid(folder):
        return imagenet_classes().get(folder, folder)
    name = re.sub(r"^(n\d{8}[-_]|\d+\.(?=[^\W\d]))", "", folder)
    return unicodedata.normalize("NFC", " ".join(re.sub(r"[_+]+", " ", name).split())) or folder


@dataclass(frozen=True, kw_only=True)
class Names:
    """A file of class names: rows (folder or None, name), all of one kind."""

    path: Path
    rows: tuple[tuple[str | None, str], ...]
    notes: tuple[str, ...] = ()


def read_names(path: Path, *, strict: bool = True) -> Names:
    with reading(path, "a text file of class names"):
        text = path.read_text(encoding="utf-8-sig")
    rows: list[tuple[str | None, str]] = []
    if text.lstrip().startswith("{"):
        with reading(path, "a JSON object from folder to name"):
            pairs = json.loads(text, object_pairs_hook=list)
        rows = [(str(folder), str(name).strip()) for folder, name in pairs]
    else:
        lines = [(at, line.strip()) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
        for at, line in lines:
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) > 2 or not all(cells) or len(cells) != len(lines[0][1].split("\t")):
                raise InvalidData(
                    f"{path}, line {at} has {len(cells)} columns; expected one name per line, or folder, tab, name on "
                    "every line."
                )
            rows.append((cells[0] if len(cells) == 2 else None, cells[-1]))
    if not strict:
        return Names(path=path, rows=tuple(rows))
    for column, what in ((0, "folder"), (1, "name")):
        for value, count in Counter(row[column] for row in rows).items():
            if value is not None and count > 1:
                raise InvalidData(f"{path} gives the {what} {value!r} {count} times. Each must be there once.")
    return Names(path=path, rows=tuple(rows))


def class_list(path: Path) -> Names:
    """A `classnames.txt` as converters write it. It isn't the user's, so names that occur twice are told apart."""
    listed = read_names(path, strict=False)
    names = [name for _, name in listed.rows]
    if len(set(names)) == len(names):
        return listed
    from gram_core.backbone import imagenet_names

    if tuple(names) == imagenet_names():
        return replace(listed, rows=tuple((None, name) for name in imagenet_classes().values()))
    seen: Counter[str] = Counter()
    rows = []
    for folder, name in listed.rows:
        seen[name] += 1
        rows.append((folder, name if seen[name] == 1 else f"{name} {seen[name]}"))
    note = f"{path.name} names some classes twice; the later ones are numbered: {some(n for n in seen if seen[n] > 1)}."
    return replace(listed, rows=tuple(rows), notes=(note,))


def nearest(name: str, among: Iterable[str]) -> str:
    by_folded = {a.casefold(): a for a in among}
    found = get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.0)
    return repr(by_folded[found[0]]) if found else "none"


def named(labels: Sequence[str], names: Names, empty: set[str], known: set[str], said: Callable[[str], str]) -> Parts:
    """For each label its name in the file; `known` are the folders that the file may speak of, none for any."""
    if any(folder is not None for folder, _ in names.rows):
        table = {folder: name for folder, name in names.rows if folder is not None}
        for folder in table:
            if known and folder not in known:
                raise InvalidData(
                    f"{names.path} names the folder {folder!r}, which isn't there; the nearest is "
                    f"{nearest(folder, known)}. Correct the line or leave it out."
                )
        given = {label: table.get(label) for label in labels}
    else:
        lines = [name for _, name in names.rows]
        table = {clean(name): name for name in lines} | {name: name for name in lines}
        given = {label: table.get(label) or table.get(clean(label)) for label in labels}
        digits = all(label.isdecimal() for label in labels)
        if digits and None in given.values() and max(map(int, labels)) < len(lines):
            given = {label: lines[int(label)] for label in labels}
    if missing := [label for label in labels if given[label] is None and label not in empty]:
        closest = [f"{said(m)} has no name there, the nearest is {nearest(clean(m), table)}" for m in missing]
        raise InvalidData(
            f"{names.path} has {len(names.rows)} lines and must name every class that has images: "
            f"{some(closest)}. Add the missing names or correct these."
        )
    return tuple(given[label] or clean(label) for label in labels)
