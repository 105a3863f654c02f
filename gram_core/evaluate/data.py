"""Labelled images from whatever lies on disk: class folders, zip files, WebDataset shards and tables.

`discover` says what a path holds and what it left out, and why; `open_data` insists on a find. Nothing is unpacked,
unpickled or decoded: a set keeps where its bytes lie. How the papers' sets are laid out is the business of `suites`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gram_core.errors import InvalidData
from gram_core.evaluate.labelled import LabelledSet
from gram_core.names import Names, class_list, clean, is_wnid, named, nearest, read_names
from gram_core.sources import (
    IMAGE_COLUMNS,
    SUFFIXES,
    TABLES,
    Parts,
    expand,
    index_shard,
    open_zip,
    read_at,
    read_table,
    reading,
    some,
    walk,
)

OTHER_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic")  # images that nothing here opens
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "full": "full"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "crossval"), "val"
)
LABEL_COLUMNS = ("label", "class", "classname", "category", "name")


def _build(
    name: str,
    rows: Mapping[str, str],
    read: Callable[[str], bytes],
    names: Names | None,
    *,
    empty: Iterable[str] = (),
    known: Iterable[str] = (),
    said: Callable[[str], str] = repr,
    notes: Iterable[str] = (),
) -> LabelledSet:
    """A set from key -> label as it stands in the source; `empty` are labels known to exist without an image."""
    kept, used, bare = list(notes), set(rows.values()), set(empty) - set(rows.values())
    digits = bool(used) and all(label.isdecimal() for label in used)
    labels = sorted(used | bare, key=lambda s: (int(s) if digits and s.isdecimal() else 0, s))
    if names is None:
        own = [clean(label) for label in labels]
        twice = {n for n, count in Counter(own).items() if count > 1}
        own = [re.sub(r"[_+]+", " ", s) if n in twice else n for s, n in zip(labels, own, strict=True)]
        if len(set(own)) < len(own):
            own = [s if clean(s) in twice else n for s, n in zip(labels, own, strict=True)]
        if twice:
            kept.append(
                f"{len(twice)} names stand for several folders, which keep their raw names: {some(sorted(twice))}."
            )
        if digits:
            kept.append(
                "Class names come out as numbers, which a text tower can't use; --classes FILE gives them names."
            )
        if unknown := [n for n in own if is_wnid(n)]:
            kept.append(f"{len(unknown)} WordNet ids aren't ImageNet's and stay as they are: {some(unknown)}.")
        classes, index = own, {label: i for i, label in enumerate(labels)}
    else:
        given = dict(zip(labels, named(labels, names, bare, set(known), said), strict=True))
        listed = [n for _, n in names.rows]
        for n, count in Counter(given[label] for label in used).items():
            if count > 1:
                raise InvalidData(
                    f"{name}: {count} classes with images would be called {n!r} by {names.path}. Tell them apart."
                )
        classes = [*listed, *(n for label, n in given.items() if label in bare and n not in listed)]
        index = {label: classes.index(n) for label, n in given.items()}
        kept.extend(names.notes)
        bare = set(classes) - {given[label] for label in used}
    if bare:
        kept.append(f"{len(bare)} of {len(classes)} classes have no image here: {some(sorted(bare))}.")
    keys = sorted(rows)
    numbers = np.array([index[rows[key]] for key in keys], dtype=np.int64)
    return LabelledSet(
        name=name,
        classes=tuple(classes),
        keys=tuple(keys),
        labels=numbers,
        read=lambda i: read(keys[i]),
        notes=tuple(kept),
    )


# --- folders and zip files


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """Files and folders by their path from the top, without clutter; `depth` parts lie above what is looked at."""

    images: list[Parts]
    others: list[Parts]
    folders: list[Parts]
    read: Callable[[str], bytes]
    depth: int = 0

    def inside(self, name: str) -> _Tree:
        at = self.depth

        def below(paths: list[Parts]) -> list[Parts]:
            return [p for p in paths if len(p) > at + 1 and p[at] == name]

        images, others, folders = below(self.images), below(self.others), below(self.folders)
        return replace(self, images=images, others=others, folders=folders, depth=at + 1)

    def children(self) -> dict[str, list[Parts]]:
        """The images below each folder of this level that has any."""
        found: dict[str, list[Parts]] = defaultdict(list)
        for path in self.images:
            if len(path) > self.depth + 1:
                found[path[self.depth]].append(path)
        return found

    def classes(self) -> set[str]:
        """Folders with images, and those that could have some: empty ones, or full of other image formats."""
        at = self.depth
        filled = {p[at] for p in self.others if len(p) > at + 1 and not p[-1].lower().endswith(OTHER_SUFFIXES)}
        return set(self.children()) | {p[at] for p in self.folders if len(p) == at + 1} - filled


def _tree(files: Iterable[Parts], folders: Iterable[Parts], read: Callable[[str], bytes]) -> _Tree:
    sides: tuple[list[Parts], list[Parts]] = ([], [])
    for path in sorted(files):
        sides[path[-1].lower().endswith(SUFFIXES)].append(path)
    return _Tree(images=sides[True], others=sides[False], folders=sorted(folders), read=read)


def _folder(root: Path) -> _Tree:
    files, folders = walk(root)
    return _tree(files, folders, lambda key: (root / key).read_bytes())


def image_paths(folder: Path) -> list[str]:
    """The images anywhere below a folder: sorted relative paths."""
    return ["/".join(path) for path in _folder(folder).images]


def _zip(path: Path) -> _Tree:
    archive = open_zip(path)
    return _tree(archive.files, archive.folders, lambda key: archive.read(tuple(key.split("/"))))


@dataclass(frozen=True, kw_only=True)
class _Options:
    splits: Sequence[str] | None
    names: Names | None
    left: list[str] = field(default_factory=list)


def _choose(available: Iterable[str], splits: Sequence[str] | None, holder: str) -> tuple[list[str], tuple[str, ...]]:
    """Which of these splits (values: as they are called) to take, and the note that says so."""
    named = sorted(available)
    kinds = {name: SPLITS[_last(name)] for name in named}
    if splits:
        wanted = {SPLITS.get(s.lower(), s) for s in splits}
        chosen = [name for name in named if "all" in wanted or kinds[name] in wanted]
    else:
        first = next((kind for kind in ("test", "val", "full") if kind in kinds.values()), "")
        chosen = [name for name in named if kinds[name] == first]
    if not chosen:
        asked = some(splits) if splits else "test or val"
        raise InvalidData(
            f"{holder} has the splits {some(named)}, not {asked}. Ask for one of them by name, or for all of them."
        )
    left = [name for name in named if name not in chosen]
    return chosen, (f"Of the splits {some(named)} only {some(chosen)} was taken.",) if left else ()


def _last(name: str) -> str:
    return re.split(r"[/_.-]", name.lower())[-1]


def _shape(tree: _Tree) -> str:
    """What the folders of this level are: wrapper, splits, domains, sets, or classes."""
    at, top = tree.depth, tree.children()
    second = {name: {p[at + 1] for p in paths if len(p) > at + 2} for name, paths in top.items()}
    if top and all(name.lower() in SPLITS for name in top) and any(len(below) > 1 for below in second.values()):
        return "splits"
    if any(len(p) == at + 2 for paths in top.values() for p in paths):
        return "classes"  # images right inside
    if len(top) == 1:
        return "wrapper" if tree.classes() == set(top) else "classes"
    shared = Counter(name for below in second.values() for name in below)
    common = {name for name, count in shared.items() if count > 1}
    if all(len(below) > 1 for below in second.values()) and 2 * len(common) >= len(shared):
        deeper = any(len(p) > at + 3 for paths in top.values() for p in paths)
        return "domains" if deeper or not {n.lower() for n in common} <= set(SPLITS) else "classes"
    return "sets" if any(_shape(tree.inside(name)) in ("splits", "domains") for name in top) else "classes"


def _image_sets(name: str, tree: _Tree, options: _Options, known: frozenset[str] = frozenset()) -> list[LabelledSet]:
    top, shape = tree.children(), _shape(tree)
    if shape == "classes":
        return [_class_set(name, tree, options, known)]
    if shape == "wrapper":
        return _image_sets(name, tree.inside(next(iter(top))), options, known)
    inner = {child: tree.inside(child) for child in sorted(top)}
    if shape == "splits":
        inner = {child: sub for child, sub in inner.items() if len(sub.children()) > 1}
        chosen, notes = _choose(inner, options.splits, name)
        every = known.union(*(sub.classes() for sub in inner.values()))  # the label list of all splits
        sets = [_class_set(f"{name}/{child}", inner[child], options, every, every) for child in chosen]
        return [replace(s, notes=(*notes, *s.notes)) for s in sets]
    if shape == "domains":
        known = known.union(*(sub.classes() for sub in inner.values()))
    found: list[LabelledSet] = []
    for child, sub in inner.items():
        try:
            found += _image_sets(f"{name}/{child}", sub, options, known)
        except InvalidData as error:
            options.left.append(error.message)
    return found


def _class_set(
    name: str, tree: _Tree, options: _Options, known: frozenset[str], complete: frozenset[str] = frozenset()
) -> LabelledSet:
    at, top = tree.depth, tree.children()
    if not top:
        raise InvalidData(f"{name} holds no image inside a class folder; expected class/file.jpg (or .png, .webp).")
    notes = []
    if loose := sum(len(p) == at + 1 for p in tree.images):
        notes.append(f"{loose} images outside any class folder were left out.")
    if skipped := sum(len(p) > at + 1 for p in tree.others):
        notes.append(f"{skipped} files in the class folders aren't JPEG, PNG or WEBP by their names and were skipped.")
    split = any(len({p[at + 1] for p in paths}) > 1 for paths in top.values())
    if split and all(len(p) > at + 2 for paths in top.values() for p in paths):
        child = min(top)
        notes.append(
            f"Folders inside class folders were read as one class; if {child} is a set of its own, name {child}."
        )
    rows = {"/".join(path): path[at] for path in tree.images if len(path) > at + 1}
    every = tree.classes()
    return _build(
        name,
        rows,
        tree.read,
        options.names,
        empty=every | complete,
        known=every | known,
        said=lambda label: f"folder {label!r}",
        notes=notes,
    )


# --- WebDataset shards


def _label(kind: str, content: bytes) -> str | None:
    text = content.decode("utf-8", "replace").strip()
    if kind != ".json":
        return text or None
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    value = next((fields[f] for f in ("label", "class", "cls") if f in fields), None) if type(fields) is dict else None
    return str(value).strip() or None if isinstance(value, str | int) else None


def _shard_set(name: str, shards: Sequence[Path], options: _Options) -> LabelledSet:
    where: dict[str, tuple[Path, int, int]] = {}
    rows: dict[str, str] = {}
    texts: dict[str, str] = {}
    notes: list[str] = []
    for shard in shards:
        samples, whole = index_shard(shard)
        if not whole:
            notes.append(
                f"{shard.name} is cut off: {len(samples)} samples can be read, those that followed are missing."
            )
        for sample, files in samples.items():
            image = next((suffix for suffix in SUFFIXES if suffix in files), None)
            if image is None:
                continue
            key = f"{shard.stem}/{sample}{image}"
            where[key] = (shard, *files[image])
            kind = next((kind for kind in (".cls", ".json", ".txt") if kind in files), None)
            if kind == ".json" and _label(kind, read_at(shard, *files[kind])) is None and ".txt" in files:
                kind = ".txt"
            if kind and (label := _label(kind, read_at(shard, *files[kind]))) is not None:
                (texts if kind == ".txt" else rows)[key] = label
    if not where:
        raise InvalidData(f"{name}: its .tar files hold no image; expected key.jpg beside key.cls or key.json.")
    if texts and not rows:
        short = all(len(text) <= 60 and len(text.splitlines()) == 1 for text in texts.values())
        if not short or 2 * len(set(texts.values())) > len(texts):
            raise InvalidData(
                f"{name}: the .txt beside each image is a caption, not a label that recurs; expected key.cls, or "
                "key.json with a label. Captions can't be scored."
            )
        rows = texts
        notes.append("The labels are the texts beside the images: they are short and recur.")
    if not rows:
        raise InvalidData(
            f"{name}: no image has a label; expected key.cls, or key.json with label, class "
            "or cls. Class folders in a .tar must be unpacked, or zipped."
        )
    if bare := len(where) - len(rows):
        notes.append(f"{bare} images without a label were left out.")
    names = options.names
    listed = [shards[0].parent / "classnames.txt", shards[0].parent.parent / "classnames.txt"]
    if names is None and (path := next((p for p in listed if p.is_file()), None)):
        names = class_list(path)
    return _build(
        name, rows, lambda key: read_at(*where[key]), names, said=lambda label: f"label {label!r}", notes=notes
    )


# --- tables


def _table_set(name: str, path: Path, options: _Options) -> LabelledSet:
    header, lines = read_table(path, "a table of images and labels in UTF-8")
    columns = []
    for wanted, what in ((IMAGE_COLUMNS, "image"), (LABEL_COLUMNS, "label")):
        if (column := next((c for c in wanted if c in header), None)) is None:
            raise InvalidData(
                f"{path} has no {what} column: its header is {some(header, 12) or 'empty'}; expected one called "
                f"{', '.join(wanted)}."
            )
        columns.append(header.index(column))
    rows: dict[str, str] = {}
    at: dict[str, int] = {}
    first_row: dict[str, int] = {}
    skipped = 0
    for number, cells in lines:
        image, label = (cells[c] if c < len(cells) else "" for c in columns)
        if not image or not label:
            raise InvalidData(f"{path}, row {number}: the {'label' if image else 'image'} is empty. Fill it in.")
        if not image.lower().endswith(SUFFIXES):
            skipped += 1
        elif not os.path.isfile(path.parent / image):
            raise InvalidData(f"{path}, row {number}: there is no file {image!r} in {path.parent}. Paths start there.")
        elif image in rows:
            raise InvalidData(f"{path}, row {number}: {image!r} stands in row {at[image]} as well. Keep one of them.")
        else:
            rows[image], at[image] = label, number
            first_row.setdefault(label, number)
    notes = [f"{skipped} rows name files that aren't JPEG, PNG or WEBP and were skipped."] if skipped else []
    return _build(
        name,
        rows,
        lambda key: (path.parent / key).read_bytes(),
        options.names,
        said=lambda label: f"row {first_row[label]}: label {label!r}",
        notes=notes,
    )


# --- what lies at a path


def _stem(path: Path) -> str:
    """What a file is called; shards of one group share it."""
    return re.sub(r"[-_.]?(\d+|\{.*\})+$", "", path.stem) if path.suffix.lower() == ".tar" else path.stem


def _container(name: str, paths: list[Path], options: _Options) -> list[LabelledSet]:
    suffix = paths[0].suffix.lower()
    if suffix == ".zip":
        return _image_sets(name, _zip(paths[0]), options)
    if suffix == ".tar":
        return [_shard_set(name, paths, options)]
    if suffix in TABLES:
        return [_table_set(name, paths[0], options)]
    raise InvalidData(
        f"{paths[0]} is no data set: expected a folder, a .zip, .tar shards (not compressed), a .csv or a .tsv."
    )


def _containers(path: Path, tree: _Tree, options: _Options) -> list[tuple[str, list[Path], Parts]]:
    """Name, files and notes of the tables, shards and zip files in a folder; of splits only those that are wanted."""
    families: dict[tuple[bool, str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for parts in tree.others:
        file = path.joinpath(*parts)
        if len(parts) > 3 or (kind := file.suffix.lower()) not in (".zip", ".tar", *TABLES):
            continue
        names = [p for p in (*parts[:-1], _stem(file)) if p]
        if not names or names[0].lower() in SPLITS:
            names.insert(0, path.name)
        name = "/".join(n for i, n in enumerate(names) if names[i - 1 : i] != [n])
        base = name[: -len(_last(name))] if _last(name) in SPLITS else name
        families[kind not in TABLES, base, kind][name].append(file)
    found: list[tuple[str, list[Path], Parts]] = []
    for (_, base, kind), members in sorted(families.items()):
        chosen = sorted(members)
        notes: Parts = ()
        try:
            if base not in members:
                chosen, notes = _choose(members, options.splits, base.rstrip("/_.-"))
        except InvalidData as error:
            options.left.append(error.message)
            continue
        for name in chosen:
            apart = [[file] for file in members[name]]
            if kind == ".tar":
                apart = [
                    [f for f in members[name] if f.parent == at] for at in sorted({f.parent for f in members[name]})
                ]
            found += [(name, files, notes) for files in apart]
    return found


def discover(
    path: Path, *, splits: Sequence[str] | None = None, classes_file: Path | None = None, prefix: str = ""
) -> tuple[list[LabelledSet], list[str]]:
    """The labelled sets at `path`, and one sentence for each thing that was left out.

    `path` is a folder of class folders (or of splits or domains of them), a zip file of such, .tar shards (a file, a
    folder, or a pattern `name-{0000..0003}.tar`), a table, or a folder that holds any of these. Of splits the test
    split is taken, or else val; `splits` asks for others, `all` for every one. `prefix` goes before the sets' names.
    Raises InvalidData where `path` or `classes_file` itself can't be read.
    """
    path = Path(path)
    options = _Options(splits=splits, names=read_names(Path(classes_file)) if classes_file else None)
    for split in splits or ():
        if split.lower() not in SPLITS and split != "all":
            raise InvalidData(f"there is no split {split!r}; choose of {', '.join(SPLITS)}, all.")
    shards = [path.parent / name for name in expand(path.name)]
    if missing := [shard for shard in shards if not os.path.exists(shard)]:
        with reading(path.parent, "a folder"):
            there = os.listdir(path.parent)
        near = f" (the nearest name is {nearest(path.name, there)})" if there else ""
        raise InvalidData(
            f"{some(missing)} can't be found{near}; expected a folder, a .zip, .tar shards, a .csv or a .tsv. "
            "Check the path and its permissions."
        )
    sets: list[LabelledSet] = []
    tabled = False
    tree = _folder(path) if path.is_dir() else None
    path = path.resolve() if tree else path
    containers = _containers(path, tree, options) if tree else [(_stem(path) or path.resolve().parent.name, shards, ())]
    for name, files, notes in containers:
        try:
            sets += [replace(s, notes=(*notes, *s.notes)) for s in _container(name, files, options)]
            tabled |= files[0].suffix.lower() in TABLES
        except InvalidData as error:
            options.left.append(error.message)
    if tree is not None and any(len(parts) > 1 for parts in tree.images):
        try:
            if tabled:
                raise InvalidData(f"{path}: its folders weren't read as classes, since a table labels their images.")
            sets += _image_sets(path.name, tree, options)
        except InvalidData as error:
            options.left.append(error.message)
    elif tree is not None and not containers and not options.left:
        kinds = Counter(Path(p[-1]).suffix for p in (*tree.images, *tree.others))
        found = some(f"{count} {kind or 'nameless'} files" for kind, count in sorted(kinds.items())) or "nothing"
        options.left.append(f"{path} holds {found}; expected class folders, .zip, .tar, .csv or .tsv files.")
    seen: Counter[str] = Counter()
    for i, given in enumerate(sets):
        seen[given.name] += 1
        again = f"-{seen[given.name]}" if seen[given.name] > 1 else ""
        sets[i] = replace(given, name=f"{prefix}{given.name}{again}")
    return sets, options.left


def open_data(
    path: Path, *, splits: Sequence[str] | None = None, classes_file: Path | None = None, prefix: str = ""
) -> list[LabelledSet]:
    """What `discover` finds at `path`, at least one set; raises InvalidData with the reasons where there is none."""
    sets, left = discover(path, splits=splits, classes_file=classes_file, prefix=prefix)
    if sets:
        return sets
    raise InvalidData(left[0] if len(left) == 1 else f"{path} holds no labelled images. {' '.join(left)}")
