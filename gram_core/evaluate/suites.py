"""The papers' data sets by name: `open_suite("dtd", root)` finds one in the layouts in which people have it on disk.

A literal table: one entry per set with the names its folder goes by and its layouts (CoOp's, the authors' own,
torchvision's); a zip file, class folders or WebDataset shards of the same name are left to `data.discover`. Nothing
here reads pickles or Matlab files: the first can run code, and the lists exist as plain text.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image

from gram_core.errors import InvalidData
from gram_core.evaluate.data import discover, image_paths
from gram_core.evaluate.labelled import LabelledSet, with_names
from gram_core.names import clean, imagenet_classes

Names = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a set lies in its folder: it is this one where every glob of `needs` finds something."""

    needs: tuple[str, ...]
    read: Callable[[str, Path, Names], LabelledSet]  # name of the set, its folder, class name of a folder


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A published set. `homes` are names of its folder under the root, letter case and punctuation left aside."""

    title: str
    classes: int
    homes: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()
    names: Names = clean
    refused: tuple[str, ...] = ()  # globs of pickles and Matlab lists: there when the set is, but of no use
    instead: str = ""  # what to take in their place


# --- readers


def _set(name: str, folder: Path, rows: Mapping[str, str], classes: Mapping[str, str], *notes: str) -> LabelledSet:
    """From image -> class and class -> name; every image must be there, every class may be without."""
    if absent := [key for key in rows if not (folder / key).is_file()]:
        raise InvalidData(
            f"{len(absent)} of the {len(rows)} images that the list of {name} names aren't in {folder}, the first is "
            f"{absent[0]}. Unpack the images again."
        )
    index = {c: i for i, c in enumerate(classes)}
    if unknown := sorted(set(rows.values()) - set(index)):
        raise InvalidData(f"{folder}: {unknown[0]!r} isn't a class of {name}, which has {len(classes)}. Move it away.")
    keys = sorted(rows)
    bare = len(index) - len(set(rows.values()))
    return LabelledSet(
        name=name,
        classes=tuple(classes.values()),
        keys=tuple(keys),
        labels=np.array([index[rows[key]] for key in keys], dtype=np.int64),
        read=lambda i: (folder / keys[i]).read_bytes(),
        notes=(*notes, *([f"{bare} of {len(index)} classes have no image here."] if bare else [])),
    )


def coop(split: str, images: str) -> Layout:
    """CoOp's split file {"train"|"val"|"test": [[path, label, class name], ...]} and the folder its paths start in."""

    def read(name: str, home: Path, _: Names) -> LabelledSet:
        try:
            parts = json.loads((home / split).read_text(encoding="utf-8"))
            every = {int(label): str(own) for part in parts.values() for _, label, own in part}
            rows = {str(path).lstrip("/"): str(int(label)) for path, label, _ in parts["test"]}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise InvalidData(
                f"{home / split} is no split file of CoOp; expected train, val and test, each a list of [path, label, "
                "class name]. Download it again."
            ) from None
        classes = {str(label): every[label].replace("_", " ") for label in sorted(every)}
        return _set(name, home / images, rows, classes)

    return Layout(needs=(split, images or "*"), read=read)


def listed(
    test: str, images: str, row: Callable[[str], tuple[str, str]], every: str = "", names: Names | None = None
) -> Layout:
    """A text file with one test image per line; `row` makes (path, class) of a line, `every` lists all classes."""

    def read(name: str, home: Path, own: Names) -> LabelledSet:
        rows = dict(row(line) for line in _lines(home / test))
        classes = [line.lstrip("/") for line in _lines(home / every)] if every else sorted(set(rows.values()))
        return _set(name, home / images, rows, {c: (names or own)(c) for c in classes})

    return Layout(needs=(test, images, *([every] if every else [])), read=read)


def _lines(path: Path) -> list[str]:
    try:
        return [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()[:1] not in ("", "#")
        ]
    except (OSError, UnicodeDecodeError):
        raise InvalidData(f"{path} can't be read; expected a text file in UTF-8. Unpack the set again.") from None


def folders(images: str, inside: str = "*", *, leave: Iterable[str] = (), nested: bool = False) -> Layout:
    """Class folders, all images of them; `nested` where the class is all of the path but the file."""

    def read(name: str, home: Path, names: Names) -> LabelledSet:
        rows = {
            p: p.rpartition("/")[0] if nested else p.partition("/")[0] for p in image_paths(home / images) if "/" in p
        }
        rows = {path: c for path, c in rows.items() if c not in leave}
        note = f"All images of {images or home.name} were taken, since no list of test images was found beside them."
        return _set(name, home / images, rows, {c: names(c) for c in sorted(set(rows.values()))}, note)

    return Layout(needs=(f"{images}/{inside}".lstrip("/"),), read=read)


def wordnet(images: str, folder: str = "n????????", subset: str = "imagenet") -> Layout:
    """ImageNet's folders, called by WordNet id or, where `folder` says so, by index in the order of these ids."""

    def read(name: str, home: Path, _: Names) -> LabelledSet:
        classes = imagenet_classes(subset)
        wnids = list(classes)
        rows = {path: path.split("/")[0] for path in image_paths(home / images)}
        rows = {p: wnids[int(c)] if c.isdecimal() and int(c) < len(wnids) else c for p, c in rows.items() if "/" in p}
        return _set(name, home / images, rows, classes)

    return Layout(needs=(f"{images}/{folder}".lstrip("/"),), read=read)


def binary(records: str, names: str, skip: int) -> Layout:
    """CIFAR's binary version: records of `skip` bytes, the last of them the label, and 3 x 32 x 32 of pixels."""

    def read(name: str, home: Path, _: Names) -> LabelledSet:
        classes = tuple(line.replace("_", " ") for line in _lines(home / names))
        content = np.fromfile(home / records, dtype=np.uint8)
        if len(content) % (size := skip + 3072) or not len(content):
            raise InvalidData(
                f"{home / records} has {len(content)} bytes; expected a multiple of {size}. Unpack it again."
            )
        table = content.reshape(-1, size)

        def png(i: int) -> bytes:
            file = io.BytesIO()
            Image.fromarray(table[i, skip:].reshape(3, 32, 32).transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
            return file.getvalue()

        keys = tuple(f"{Path(records).stem}/{i:05d}.png" for i in range(len(table)))
        return LabelledSet(name=name, classes=classes, keys=keys, labels=table[:, skip - 1].astype(np.int64), read=png)

    return Layout(needs=(records, names), read=read)


# --- class names


def _imagenet(folder: str) -> str:
    names = tuple(imagenet_classes().values())
    return names[int(folder)] if folder.isdecimal() and int(folder) < len(names) else clean(folder)


def _scene(folder: str) -> str:
    """SUN397's `a/apartment_building/outdoor` as CoOp has it: outdoor apartment building."""
    return clean(" ".join(reversed(re.sub(r"^[a-z]/", "", folder.strip("/")).split("/"))))


def _words(folder: str) -> str:
    """UCF101's ApplyEyeMakeup: Apply Eye Makeup."""
    return clean(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder))


def _renamed(names: Mapping[str, str]) -> Names:
    return lambda folder: names.get(folder) or clean(folder)


LAND = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
OBJECTS = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
VLCS = dict(zip("01234", ("bird", "car", "chair", "dog", "person"), strict=True))


def _slashed(line: str) -> tuple[str, str]:
    return line.lstrip("/"), line.lstrip("/").rpartition("/")[0]


def _jpg(line: str) -> tuple[str, str]:
    return f"{line}.jpg", line.partition("/")[0]


def _variant(line: str) -> tuple[str, str]:
    number, _, variant = line.partition(" ")
    return f"{number}.jpg", variant


def _breed(line: str) -> tuple[str, str]:
    image = line.split()[0]
    return f"{image}.jpg", image.rpartition("_")[0].lower()


# --- the table

SUITES: dict[str, Suite] = {
    "imagenet": Suite(
        title="ImageNet ILSVRC2012, validation images sorted into folders n01440764 and so on",
        classes=1000,
        homes=("imagenet", "ilsvrc2012", "imagenet1k", "ilsvrc"),
        layouts=tuple(wordnet(where) for where in ("images/val", "val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val")),
        names=_imagenet,
    ),
    "imagenet-v2": Suite(
        title="ImageNetV2, matched frequency",
        classes=1000,
        homes=("imagenetv2", "imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
        layouts=(wordnet("imagenetv2-matched-frequency-format-val", "[0-9]*"), wordnet("", "[0-9]*"), wordnet("")),
        names=_imagenet,
    ),
    "imagenet-a": Suite(
        title="ImageNet-A, natural adversarial examples",
        classes=200,
        homes=("imagenet-adversarial", "imagenet-a"),
        layouts=(wordnet("imagenet-a", subset="imagenet_a"), wordnet("", subset="imagenet_a")),
    ),
    "imagenet-r": Suite(
        title="ImageNet-R, renditions",
        classes=200,
        homes=("imagenet-rendition", "imagenet-r"),
        layouts=(wordnet("imagenet-r", subset="imagenet_r"), wordnet("", subset="imagenet_r")),
    ),
    "imagenet-sketch": Suite(
        title="ImageNet-Sketch",
        classes=1000,
        homes=("imagenet-sketch",),
        layouts=(wordnet("images"), wordnet("sketch"), wordnet("")),
        names=_imagenet,
    ),
    "aircraft": Suite(
        title="FGVC-Aircraft 2013b",
        classes=100,
        homes=("fgvc_aircraft", "fgvc-aircraft-2013b", "aircraft"),
        layouts=(
            listed("images_variant_test.txt", "images", _variant, "variants.txt", names=str),
            listed("data/images_variant_test.txt", "data/images", _variant, "data/variants.txt", names=str),
        ),
    ),
    "caltech101": Suite(
        title="Caltech-101",
        classes=100,
        homes=("caltech-101",),
        layouts=(
            coop("split_zhou_Caltech101.json", "101_ObjectCategories"),
            folders("101_ObjectCategories", leave=("BACKGROUND_Google", "Faces_easy")),
        ),
        names=_renamed(OBJECTS),
    ),
    "cars": Suite(
        title="Stanford Cars",
        classes=196,
        homes=("stanford_cars", "cars"),
        layouts=(coop("split_zhou_StanfordCars.json", ""),),
        refused=("cars_test_annos_withlabels.mat", "devkit/*.mat", "cars_test/*.jpg"),
        instead="add split_zhou_StanfordCars.json of the CoOp project beside cars_test",
    ),
    "dtd": Suite(
        title="Describable Textures Dataset, release 1.0.1",
        classes=47,
        homes=("dtd",),
        layouts=(coop("split_zhou_DescribableTextures.json", "images"), listed("labels/test1.txt", "images", _slashed)),
    ),
    "eurosat": Suite(
        title="EuroSAT, RGB",
        classes=10,
        homes=("eurosat",),
        layouts=(coop("split_zhou_EuroSAT.json", "2750"), folders("2750")),
        names=_renamed(LAND),
    ),
    "flowers102": Suite(
        title="Oxford 102 Flowers",
        classes=102,
        homes=("oxford_flowers", "flowers102", "flowers-102", "flowers"),
        layouts=(coop("split_zhou_OxfordFlowers.json", "jpg"),),
        refused=("imagelabels.mat", "setid.mat", "jpg/*.jpg"),
        instead="add split_zhou_OxfordFlowers.json of the CoOp project beside jpg",
    ),
    "food101": Suite(
        title="Food-101",
        classes=101,
        homes=("food-101",),
        layouts=(
            coop("split_zhou_Food101.json", "images"),
            listed("meta/test.txt", "images", _jpg, "meta/classes.txt"),
        ),
    ),
    "pets": Suite(
        title="Oxford-IIIT Pet",
        classes=37,
        homes=("oxford_pets", "oxford-iiit-pet", "pets"),
        layouts=(coop("split_zhou_OxfordPets.json", "images"), listed("annotations/test.txt", "images", _breed)),
    ),
    "sun397": Suite(
        title="SUN397, with its Partitions",
        classes=397,
        homes=("sun397",),
        layouts=(
            coop("split_zhou_SUN397.json", "SUN397"),
            listed("Testing_01.txt", "SUN397", _slashed, "ClassName.txt"),
            listed("Partitions/Testing_01.txt", "SUN397", _slashed, "Partitions/ClassName.txt"),
            folders("", "[a-z]/*", nested=True),
        ),
        names=_scene,
    ),
    "ucf101": Suite(
        title="UCF101, middle frames as the CoOp project has them",
        classes=101,
        homes=("ucf101", "ucf-101"),
        layouts=(coop("split_zhou_UCF101.json", "UCF-101-midframes"), folders("UCF-101-midframes")),
        names=_words,
    ),
    "cifar10": Suite(
        title="CIFAR-10, binary version",
        classes=10,
        homes=("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
        layouts=tuple(binary(f"{d}test_batch.bin", f"{d}batches.meta.txt", 1) for d in ("", "cifar-10-batches-bin/")),
        refused=("cifar-10-batches-py", "test_batch"),
        instead="take the binary version, cifar-10-binary.tar.gz, and unpack it there",
    ),
    "cifar100": Suite(
        title="CIFAR-100, binary version",
        classes=100,
        homes=("cifar100", "cifar-100-binary", "cifar-100-python"),
        layouts=tuple(binary(f"{d}test.bin", f"{d}fine_label_names.txt", 2) for d in ("", "cifar-100-binary/")),
        refused=("cifar-100-python", "meta"),
        instead="take the binary version, cifar-100-binary.tar.gz, and unpack it there",
    ),
    "pacs": Suite(title="PACS", classes=7, homes=("pacs",)),
    "vlcs": Suite(title="VLCS", classes=5, homes=("vlcs",), names=_renamed(VLCS)),
    "officehome": Suite(
        title="Office-Home", classes=65, homes=("officehome", "office_home_dg", "OfficeHomeDataset_10072016")
    ),
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "ood": ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch"),
    "fine-grained": (
        *("aircraft", "caltech101", "cars", "dtd", "eurosat"),
        *("flowers102", "food101", "pets", "sun397", "ucf101"),
    ),
    "domains": ("pacs", "vlcs", "officehome"),
    "corruptions": ("cifar10", "cifar100", "imagenet"),  # the sets that published benchmarks disturb
}


# --- finding them


def _plain(name: str) -> str:
    """A folder's name without letter case, punctuation and what clip_benchmark puts before it."""
    return re.sub(r"^(wds)?(vtab)?", "", re.sub(r"[^a-z0-9]", "", name.lower()))


def _homes(suite: Suite, root: Path) -> list[Path]:
    """Folders and archives under the root that go by one of the set's names, those one deeper, and the root itself."""
    known = {_plain(home) for home in suite.homes}

    def called(folder: Path) -> list[Path]:
        fits = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
        return [p for p in fits if _plain(p.name if p.is_dir() else p.stem) in known and (p.is_dir() or _archive(p))]

    first = [*([root] if _plain(root.resolve().name) in known else []), *called(root)]
    return [*first, *(inner for home in first if home.is_dir() and home != root for inner in called(home))]


def _archive(path: Path) -> bool:
    return path.suffix.lower() in (".zip", ".tar")


def _named(given: LabelledSet, suite: Suite) -> LabelledSet:
    renamed = with_names(given, {c: suite.names(c) for c in given.classes})
    count = len(given.classes)
    notes = [
        n
        for n in given.notes
        if not n.startswith("Class names come out as numbers") or renamed.classes == given.classes
    ]
    if count != suite.classes:
        notes.append(f"{suite.title} has {suite.classes} classes; the label list here has {count}.")
    return replace(renamed, role="reporting", notes=tuple(notes))


def _open(name: str, root: Path) -> list[LabelledSet]:
    suite = SUITES[name]
    homes = _homes(suite, root)
    for home in homes:
        for layout in suite.layouts:
            if home.is_dir() and all(any(home.glob(pattern)) for pattern in layout.needs):
                return [_named(layout.read(name, home, suite.names), suite)]
    refused = [p for at in homes if at.is_dir() for pattern in suite.refused for p in at.glob(pattern)]
    if refused:
        raise InvalidData(
            f"suite {name!r}: {refused[0].relative_to(root)} has its labels in a pickle or a Matlab file, which isn't "
            f"read here: a pickle can run code. To measure {suite.title}, {suite.instead}."
        )
    left: list[str] = []
    for home in homes:
        sets, reasons = discover(home)
        left += reasons
        if sets:
            return [_named(replace(s, name="/".join([name, *s.name.split("/")[1:]])), suite) for s in sets]
    looked = [f"{suite.homes[0]}/{' + '.join(needs)}" for needs in (layout.needs for layout in suite.layouts)]
    there = [p.name for home in ([h for h in homes if h.is_dir()] or [root]) for p in sorted(home.iterdir())]
    where = ", ".join(str(h.relative_to(root)) for h in homes if h.is_dir() and h != root) or str(root)
    raise InvalidData(
        f"suite {name!r} isn't under {root}. Looked for {'; '.join([*looked, 'class folders, a zip file or shards'])} "
        f"in a folder called {', '.join(suite.homes)} or wds_{suite.homes[0]}; {where} holds "
        f"{', '.join(there[:12]) or 'nothing'}{' and more' if len(there) > 12 else ''}. {' '.join(left)} "
        f"The set is called {suite.title}: get it from its authors, unpack it there and name the folder above it."
    )


def open_suite(name: str, root: Path) -> list[LabelledSet]:
    """The sets of a suite under `root`, or of every suite of a family that is there, all for reporting.

    Raises InvalidData with the folders that were looked for. A family may be there in part: the notes say what isn't.
    """
    root = Path(root)
    if name not in SUITES and name not in FAMILIES:
        every = [*SUITES, *FAMILIES]
        near = get_close_matches(name, every, n=3, cutoff=0.4) or every
        raise InvalidData(f"there is no suite {name!r}; choose one of {', '.join(near)}.")
    if not root.is_dir():
        raise InvalidData(f"{root} is no folder; expected the one that holds the data sets. Check the path.")
    try:
        if name in SUITES:
            return _open(name, root)
        here = [suite for suite in FAMILIES[name] if _homes(SUITES[suite], root)]
        if not here:
            homes = ", ".join(SUITES[suite].homes[0] for suite in FAMILIES[name])
            raise InvalidData(f"{root} holds nothing of the family {name!r}; expected some of the folders {homes}.")
        sets = [s for suite in here for s in _open(suite, root)]
    except OSError as error:
        raise InvalidData(f"{error.filename or root} can't be read: {error.strerror}. Check its permissions.") from None
    if not (missing := [suite for suite in FAMILIES[name] if suite not in here]):
        return sets
    note = f"Of the family {name} these aren't there: {', '.join(missing)}."
    return [replace(s, notes=(*s.notes, note)) for s in sets]
