"""The papers' sets: every layout in miniature, what the classes are called, and what is said where a set is missing."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from gram_core.errors import InvalidData
from gram_core.evaluate.labelled import LabelledSet
from gram_core.evaluate.suites import FAMILIES, SUITES, open_suite
from gram_core.images import decode


def picture(seed: object) -> bytes:
    rng = np.random.default_rng(list(repr(seed).encode()))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def images(*names: str) -> dict[str, bytes]:
    return {name: picture(name) for name in names}


def text(**files: str) -> dict[str, bytes]:
    """Files by name, `__` for the slash and `_txt` for the suffix."""
    return {name.replace("__", "/").replace("_txt", ".txt"): content.encode() for name, content in files.items()}


def split(home: str, where: str, folder: str, *test: tuple[str, int, str]) -> dict[str, bytes]:
    """CoOp's layout: the test images are there, those of the training list needn't be, and name one more class."""
    start = f"{home}/{folder}/" if folder else f"{home}/"
    parts = {"train": [["gone/0.jpg", 2, "one_more"]], "val": [], "test": test}
    return {f"{home}/{where}": json.dumps(parts).encode()} | images(*(start + path for path, _, _ in test))


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, picture(name))
    return file.getvalue()


def shard(*labels: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, label in enumerate(labels):
            for name, content in ((f"s{i}.webp", picture(i)), (f"s{i}.cls", label)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)


def records(*labels: tuple[int, ...]) -> bytes:
    return b"".join(bytes(label) + PIXELS[i].tobytes() for i, label in enumerate(labels))


IMAGENET = {"n01440764/a.JPEG": "tench", "n04356056/b.JPEG": "sunglasses"}
IMAGENET_A = {"n01498041/a.jpg": "stingray", "n12267677/b.jpg": "acorn"}
IMAGENET_R = {"n01443537/a.jpg": "goldfish", "n12267677/b.jpg": "acorn"}
INDEXED = {"0/a.jpeg": "tench", "837/b.jpeg": "sunglasses"}
AIRCRAFT = {"0034309.jpg": "Boeing 707-320", "1.jpg": "F/A-18"}
PETS = {"Abyssinian_201.jpg": "abyssinian", "american_bulldog_1.jpg": "american bulldog"}
DTD = {"banded/1.jpg": "banded", "polka-dotted/1.jpg": "polka-dotted"}
FOOD = {"apple_pie/1.jpg": "apple pie", "waffles/2.jpg": "waffles"}
SCENES = {"a/abbey/1.jpg": "abbey", "a/athletic_field/outdoor/2.jpg": "outdoor athletic field"}
CIFAR = {"test/airplane/1.png": "airplane", "test/dog/2.png": "dog"}
CIFAR_TRAIN = images("cifar10/train/airplane/0.png", "cifar10/train/dog/0.png")
DOMAIN = {"photo/dog/1.jpg": "dog", "photo/horse/1.jpg": "horse"}


def at(home: str, rows: dict[str, str]) -> dict[str, bytes]:
    return images(*(f"{home}/{path}" for path in rows))


def aircraft(home: str) -> dict[str, bytes]:
    lists = {
        "images_variant_test.txt": "0034309 Boeing 707-320\n1 F/A-18\n",
        "variants.txt": "Boeing 707-320\nF/A-18\n",
    }
    return at(f"{home}/images", AIRCRAFT) | {f"{home}/{name}": content.encode() for name, content in lists.items()}


# suite, files under the root, image (the end of its key) -> class name
LAYOUTS: dict[str, tuple[str, dict[str, bytes], dict[str, str]]] = {
    "imagenet, coop": ("imagenet", at("imagenet/images/val", IMAGENET), IMAGENET),
    "imagenet, torchvision": ("imagenet", at("ILSVRC2012/val", IMAGENET), IMAGENET),
    "imagenet, kaggle": ("imagenet", at("imagenet/ILSVRC/Data/CLS-LOC/val", IMAGENET), IMAGENET),
    "imagenet-v2, coop": ("imagenet-v2", at("imagenetv2/imagenetv2-matched-frequency-format-val", INDEXED), INDEXED),
    "imagenet-v2, own": ("imagenet-v2", at("imagenetv2-matched-frequency-format-val", INDEXED), INDEXED),
    "imagenet-v2, wordnet": ("imagenet-v2", at("imagenetv2", IMAGENET), IMAGENET),
    "imagenet-a, coop": ("imagenet-a", at("imagenet-adversarial/imagenet-a", IMAGENET_A), IMAGENET_A),
    "imagenet-a, own": ("imagenet-a", at("imagenet-a", IMAGENET_A), IMAGENET_A),
    "imagenet-r, coop": ("imagenet-r", at("imagenet-rendition/imagenet-r", IMAGENET_R), IMAGENET_R),
    "imagenet-r, own": ("imagenet-r", at("imagenet-r", IMAGENET_R), IMAGENET_R),
    "imagenet-sketch, coop": ("imagenet-sketch", at("imagenet-sketch/images", IMAGENET), IMAGENET),
    "imagenet-sketch, own": ("imagenet-sketch", at("imagenet_sketch/sketch", IMAGENET), IMAGENET),
    "aircraft, coop": ("aircraft", aircraft("fgvc_aircraft"), AIRCRAFT),
    "aircraft, own": ("aircraft", aircraft("fgvc-aircraft-2013b/data"), AIRCRAFT),
    "caltech101, coop": (
        "caltech101",
        split("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories", ("Faces/1.jpg", 0, "face"))
        | images("caltech-101/101_ObjectCategories/BACKGROUND_Google/1.jpg"),
        {"Faces/1.jpg": "face"},
    ),
    "caltech101, own": (
        "caltech101",
        at(
            "caltech101/101_ObjectCategories",
            dict.fromkeys(("Faces/1.jpg", "wild_cat/1.jpg", "BACKGROUND_Google/1.jpg", "Faces_easy/1.jpg"), ""),
        ),
        {"Faces/1.jpg": "face", "wild_cat/1.jpg": "wild cat"},
    ),
    "cars, coop": (
        "cars",
        split("stanford_cars", "split_zhou_StanfordCars.json", "", ("cars_test/1.jpg", 0, "2012 Ram C/V Cargo Van")),
        {"cars_test/1.jpg": "2012 Ram C/V Cargo Van"},
    ),
    "dtd, coop": (
        "dtd",
        split("dtd", "split_zhou_DescribableTextures.json", "images", ("banded/1.jpg", 0, "banded")),
        {"banded/1.jpg": "banded"},
    ),
    "dtd, own": ("dtd", at("dtd/images", DTD) | text(dtd__labels__test1_txt="\n".join(DTD)), DTD),
    "dtd, torchvision": ("dtd", at("dtd/dtd/images", DTD) | text(dtd__dtd__labels__test1_txt="\n".join(DTD)), DTD),
    "eurosat, coop": (
        "eurosat",
        split("eurosat", "split_zhou_EuroSAT.json", "2750", ("SeaLake/1.jpg", 0, "Sea or Lake")),
        {"SeaLake/1.jpg": "Sea or Lake"},
    ),
    "eurosat, own": (
        "eurosat",
        images("eurosat/2750/Forest/1.jpg", "eurosat/2750/SeaLake/1.jpg"),
        {"Forest/1.jpg": "Forest", "SeaLake/1.jpg": "Sea or Lake"},
    ),
    "flowers102, coop": (
        "flowers102",
        split("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", ("image_1.jpg", 0, "pink primrose")),
        {"image_1.jpg": "pink primrose"},
    ),
    "food101, coop": (
        "food101",
        split("food-101", "split_zhou_Food101.json", "images", ("apple_pie/1.jpg", 0, "apple_pie")),
        {"apple_pie/1.jpg": "apple pie"},
    ),
    "food101, own": (
        "food101",
        at("food-101/images", FOOD)
        | {"food-101/meta/test.txt": b"apple_pie/1\nwaffles/2\n", "food-101/meta/classes.txt": b"apple_pie\nwaffles\n"},
        FOOD,
    ),
    "pets, coop": (
        "pets",
        split("oxford_pets", "split_zhou_OxfordPets.json", "images", ("Abyssinian_201.jpg", 0, "abyssinian")),
        {"Abyssinian_201.jpg": "abyssinian"},
    ),
    "pets, own": (
        "pets",
        at("oxford-iiit-pet/images", PETS)
        | {
            "oxford-iiit-pet/annotations/test.txt": b"#Image CLASS-ID\nAbyssinian_201 1 1 1\namerican_bulldog_1 2 2 1\n"
        },
        PETS,
    ),
    "sun397, coop": (
        "sun397",
        split("sun397", "split_zhou_SUN397.json", "SUN397", ("a/abbey/1.jpg", 0, "abbey")),
        {"a/abbey/1.jpg": "abbey"},
    ),
    "sun397, partitions": (
        "sun397",
        at("sun397/SUN397", SCENES)
        | {
            "sun397/Partitions/Testing_01.txt": b"/a/abbey/1.jpg\n/a/athletic_field/outdoor/2.jpg\n",
            "sun397/Partitions/ClassName.txt": b"/a/abbey\n/a/athletic_field/outdoor\n",
        },
        SCENES,
    ),
    "sun397, torchvision": ("sun397", at("SUN397", SCENES) | {"SUN397/ClassName.txt": b"/a/abbey\n"}, SCENES),
    "ucf101, coop": (
        "ucf101",
        split("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes", ("Yo_Yo/1.jpg", 0, "Yo_Yo")),
        {"Yo_Yo/1.jpg": "Yo Yo"},
    ),
    "ucf101, folders": (
        "ucf101",
        images("UCF-101/ApplyEyeMakeup/1.jpg", "UCF-101/Yo_Yo/1.jpg"),
        {"ApplyEyeMakeup/1.jpg": "Apply Eye Makeup", "Yo_Yo/1.jpg": "Yo Yo"},
    ),
    "ucf101, midframes": (
        "ucf101",
        images("ucf101/UCF-101-midframes/ApplyEyeMakeup/1.jpg", "ucf101/UCF-101-midframes/Yo_Yo/1.jpg"),
        {"ApplyEyeMakeup/1.jpg": "Apply Eye Makeup", "Yo_Yo/1.jpg": "Yo Yo"},
    ),
    "cifar10, folders": ("cifar10", at("cifar10", CIFAR) | CIFAR_TRAIN, CIFAR),
    "cifar10, zip": ("cifar10", {"cifar10.zip": archive(*CIFAR)}, CIFAR),
    "cifar10, binary": (
        "cifar10",
        {
            "cifar10/cifar-10-batches-bin/test_batch.bin": records((1,), (0,)),
            "cifar10/cifar-10-batches-bin/batches.meta.txt": b"airplane\nautomobile\n\n",
        },
        {"test_batch/00000.png": "automobile", "test_batch/00001.png": "airplane"},
    ),
    "cifar100, binary": (
        "cifar100",
        {
            "cifar-100-binary/test.bin": records((7, 1), (7, 0)),
            "cifar-100-binary/fine_label_names.txt": b"apple\naquarium_fish\n",
        },
        {"test/00000.png": "aquarium fish", "test/00001.png": "apple"},
    ),
    "cifar100, clip_benchmark": (
        "cifar100",
        {
            "wds_vtab-cifar100/test/0.tar": shard(b"0", b"1"),
            "wds_vtab-cifar100/classnames.txt": b"apple\naquarium fish\n",
        },
        {"0/s0.webp": "apple", "0/s1.webp": "aquarium fish"},
    ),
    "imagenet-a, clip_benchmark": (
        "imagenet-a",
        {"wds_imagenet-a/test/0.tar": shard(b"0", b"1"), "wds_imagenet-a/classnames.txt": b"stingray\ngoldfinch\n"},
        {"0/s0.webp": "stingray", "0/s1.webp": "goldfinch"},
    ),
    "pacs, folders": ("pacs", at("PACS", DOMAIN) | images("PACS/sketch/dog/1.jpg", "PACS/sketch/horse/1.jpg"), DOMAIN),
    "pacs, dassl": (
        "pacs",
        at("pacs/images", DOMAIN)
        | images("pacs/images/sketch/dog/1.jpg", "pacs/images/sketch/horse/1.jpg")
        | {"pacs/splits/photo_train_kfold.txt": b"photo/dog/1.jpg 1\n"},
        DOMAIN,
    ),
    "vlcs, dassl": (
        "vlcs",
        images(*(f"VLCS/{d}/{s}/{c}/1.jpg" for d in ("CALTECH", "SUN") for s in ("train", "test") for c in (0, 3))),
        {"CALTECH/test/0/1.jpg": "bird", "CALTECH/test/3/1.jpg": "dog"},
    ),
    "officehome, domains": (
        "officehome",
        images(*(f"office_home/{d}/{c}/1.jpg" for d in ("Art", "Real World") for c in ("Alarm_Clock", "Bed"))),
        {"Art/Alarm_Clock/1.jpg": "Alarm Clock", "Art/Bed/1.jpg": "Bed"},
    ),
}


def lay(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def labelled(given: LabelledSet) -> dict[str, str]:
    return {key: given.classes[label] for key, label in zip(given.keys, given.labels, strict=True)}


def refused(name: str, root: Path) -> str:
    with pytest.raises(InvalidData) as caught:
        open_suite(name, root)
    return caught.value.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_suite_is_read_in_each_layout_that_people_have(tmp_path: Path, layout: str) -> None:
    name, files, expected = LAYOUTS[layout]
    first, *_ = open_suite(name, lay(tmp_path, files))
    rows = labelled(first)
    assert len(rows) == len(expected)
    for ending, wanted in expected.items():
        (key,) = (key for key in rows if key.endswith(ending))
        assert rows[key] == wanted
        if "binary" not in layout and "clip_benchmark" not in layout and "zip" not in layout:
            stored = next(content for path, content in files.items() if path.endswith(key))
            assert first.read(first.keys.index(key)) == stored
    assert first.role == "reporting"
    assert first.name.split("/")[0] == name
    assert all(decode(first.read(i)).width in (4, 32) for i in range(len(first)))


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_layout_that_is_tested(suite: str) -> None:
    assert any(name == suite for name, _, _ in LAYOUTS.values())


@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_suite_says_what_was_looked_for_and_what_is_there(tmp_path: Path, suite: str) -> None:
    message = refused(suite, lay(tmp_path, {"something/else.txt": b""}))
    for part in (repr(suite), str(tmp_path), SUITES[suite].title, SUITES[suite].homes[0], "something"):
        assert part in message
    for layout in SUITES[suite].layouts:
        assert all(need in message for need in layout.needs)


@pytest.mark.parametrize("suite", SUITES)
def test_class_folders_of_the_right_name_are_read_for_any_suite(tmp_path: Path, suite: str) -> None:
    home = SUITES[suite].homes[0]
    (found,) = open_suite(suite, lay(tmp_path, images(f"{home}/test/red_cat/1.jpg", f"{home}/test/dog/2.jpg")))
    assert set(found.classes) == {"red cat", "dog"}
    assert found.name == f"{suite}/test"
    assert f"{SUITES[suite].title} has {SUITES[suite].classes} classes; the label list here has 2." in found.notes


def test_imagenet_sets_are_scored_over_their_own_names(tmp_path: Path) -> None:
    for layout, count in {"imagenet, coop": 1000, "imagenet-a, own": 200, "imagenet-r, own": 200}.items():
        name, files, _ = LAYOUTS[layout]
        (found,) = open_suite(name, lay(tmp_path / name, files))
        assert len(found.classes) == len(set(found.classes)) == count
        assert f"{count - 2} of {count} classes have no image here." in found.notes


def test_a_class_that_the_set_does_not_have_is_refused(tmp_path: Path) -> None:
    root = lay(tmp_path, at("imagenet-a", IMAGENET_A) | images("imagenet-a/n01440764/1.jpg"))
    assert "'n01440764' isn't a class of imagenet-a" in refused("imagenet-a", root)


def test_imagenet_with_unsorted_images_says_what_is_needed(tmp_path: Path) -> None:
    message = refused("imagenet", lay(tmp_path, images("imagenet/val/ILSVRC2012_val_00000001.JPEG")))
    assert "imagenet holds val" in message
    assert "sorted into folders n01440764" in message


def test_a_split_file_names_every_class_in_the_order_of_its_labels(tmp_path: Path) -> None:
    rows = (("b/1.jpg", 1, "b_b"), ("a/2.jpg", 0, "z"))
    files = split("dtd", "split_zhou_DescribableTextures.json", "images", *rows)
    (found,) = open_suite("dtd", lay(tmp_path, files))
    assert found.classes == ("z", "b b", "one more")
    assert "1 of 3 classes have no image here." in found.notes


@pytest.mark.parametrize("content", [b"{}", b"[]", b"not json", b'{"test": [["a.jpg", 0]]}', b'{"test": 3}'])
def test_a_broken_split_file_is_refused(tmp_path: Path, content: bytes) -> None:
    root = lay(tmp_path, {"dtd/split_zhou_DescribableTextures.json": content} | at("dtd/images", DTD))
    assert "split_zhou_DescribableTextures.json is no split file of CoOp" in refused("dtd", root)


def test_images_that_a_list_names_must_be_there(tmp_path: Path) -> None:
    root = lay(tmp_path, at("dtd/images", DTD) | text(dtd__labels__test1_txt="banded/1.jpg\nbanded/9.jpg"))
    message = refused("dtd", root)
    assert "1 of the 2 images" in message
    assert "banded/9.jpg" in message


def test_domains_keep_their_names_under_the_suites(tmp_path: Path) -> None:
    _, files, _ = LAYOUTS["pacs, dassl"]
    assert [s.name for s in open_suite("pacs", lay(tmp_path, files))] == ["pacs/photo", "pacs/sketch"]
    _, files, _ = LAYOUTS["vlcs, dassl"]
    assert [s.name for s in open_suite("vlcs", lay(tmp_path, files))] == ["vlcs/CALTECH/test", "vlcs/SUN/test"]


def test_the_root_may_be_the_set_itself(tmp_path: Path) -> None:
    name, files, expected = LAYOUTS["dtd, own"]
    assert labelled(open_suite(name, lay(tmp_path, files) / "dtd")[0]) == expected


def test_records_of_cifar_become_images_of_the_same_pixels(tmp_path: Path) -> None:
    name, files, _ = LAYOUTS["cifar100, binary"]
    (found,) = open_suite(name, lay(tmp_path, files))
    for i in (1, 0):
        planes = np.asarray(decode(found.read(i)).rgb).transpose(2, 0, 1)
        assert np.array_equal(planes.ravel(), PIXELS[i])


def test_a_binary_file_of_another_size_is_refused(tmp_path: Path) -> None:
    name, files, _ = LAYOUTS["cifar100, binary"]
    files = files | {"cifar-100-binary/test.bin": b"x" * 3073}
    assert "has 3073 bytes; expected a multiple of 3074" in refused(name, lay(tmp_path, files))


class Trap:
    """Runs on being unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("suite", "file", "instead"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch", "cifar-10-binary.tar.gz"),
        ("cifar10", "cifar10/cifar-10-batches-py/test_batch", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-python/meta", "cifar-100-binary.tar.gz"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat", "split_zhou_StanfordCars.json"),
        ("flowers102", "oxford_flowers/imagelabels.mat", "split_zhou_OxfordFlowers.json"),
    ],
)
def test_pickles_and_matlab_files_are_refused_with_what_to_take_instead(
    tmp_path: Path, suite: str, file: str, instead: str
) -> None:
    message = refused(suite, lay(tmp_path, {file: pickle.dumps(Trap())}))
    assert "a pickle can run code" in message
    assert instead in message


def test_cars_and_flowers_without_their_split_file_are_no_set_of_two_classes(tmp_path: Path) -> None:
    root = lay(tmp_path, images("stanford_cars/cars_test/1.jpg", "stanford_cars/cars_train/1.jpg"))
    assert "split_zhou_StanfordCars.json" in refused("cars", root)


def test_a_family_opens_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    for layout in ("imagenet-a, coop", "imagenet-r, own"):
        lay(tmp_path, LAYOUTS[layout][1])
    found = open_suite("ood", tmp_path)
    assert [s.name for s in found] == ["imagenet-a", "imagenet-r"]
    for given in found:
        assert given.notes[-1] == "Of the family ood these aren't there: imagenet-v2, imagenet-sketch."


def test_a_family_does_not_hide_a_set_that_is_there_but_broken(tmp_path: Path) -> None:
    lay(tmp_path, LAYOUTS["dtd, own"][1] | {"dtd/labels/test1.txt": b"banded/9.jpg\n"} | LAYOUTS["pets, own"][1])
    assert "banded/9.jpg" in refused("fine-grained", tmp_path)


def test_families_name_suites_and_the_fine_grained_one_has_ten() -> None:
    assert all(suite in SUITES for family in FAMILIES.values() for suite in family)
    assert len(FAMILIES["fine-grained"]) == 10
    assert not set(FAMILIES) & set(SUITES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_which_nothing_is_there_is_refused(tmp_path: Path, family: str) -> None:
    message = refused(family, tmp_path)
    assert repr(family) in message
    assert all(SUITES[suite].homes[0] in message for suite in FAMILIES[family])


def test_an_unknown_suite_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    assert "no suite 'imagnet-a'; choose one of imagenet-a" in refused("imagnet-a", tmp_path)
    assert "cifar100" in refused("zzz", tmp_path)


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is no folder" in refused("dtd", tmp_path / "none")


def test_a_root_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)  # the tests may run as root, whom no permission stops
    assert f"{tmp_path} can't be read: Permission denied" in refused("dtd", tmp_path)
