"""Readers of labelled images: every layout in miniature, and what is said about each bad one."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from gram_core.backbone import imagenet_names
from gram_core.errors import InvalidData
from gram_core.evaluate import data
from gram_core.evaluate.data import discover, open_data
from gram_core.evaluate.labelled import LabelledSet
from gram_core.names import clean, imagenet_classes


def picture(seed: object) -> bytes:
    """A small PNG that differs from seed to seed: a swapped read is a wrong answer."""
    rng = np.random.default_rng(list(repr(seed).encode()))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(root: Path, *names: str) -> Path:
    """Files below a folder: images hold their own name as pixels, anything else a word."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name) if name.lower().endswith(data.SUFFIXES) else b"text")
    return root


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else picture(name))
    return path


def shard(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(kind: str, labels: Iterable[bytes], start: int = 0) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i, label in enumerate(labels, start):
        found |= {f"s{i:04d}.png": picture(f"s{i:04d}"), f"s{i:04d}.{kind}": label}
    return found


def table(path: Path, *rows: Iterable[str], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def one(path: Path, **options: object) -> LabelledSet:
    (found,) = open_data(path, **options)  # type: ignore[arg-type]
    return found


def labelled(given: LabelledSet) -> dict[str, str]:
    return {key: given.classes[label] for key, label in zip(given.keys, given.labels, strict=True)}


def refused(path: Path, **options: object) -> str:
    with pytest.raises(InvalidData) as caught:
        open_data(path, **options)  # type: ignore[arg-type]
    assert caught.value.code == "invalid_data"
    return caught.value.message


# --- class names


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("n01443537-goldfish", "goldfish"),
        ("n01443537_goldfish", "goldfish"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("n01440764", "tench"),
        ("ice+cream__cone", "ice cream cone"),
        ("ApplyEyeMakeup", "ApplyEyeMakeup"),
        ("hen-of-the-woods", "hen-of-the-woods"),
        ("n99999999", "n99999999"),
        ("3.14", "3.14"),
        ("7", "7"),
        ("_", "_"),
        ("cafe\u0301", "caf\u00e9"),  # composed, as the server's check of class names has it
    ],
)
def test_a_folder_gives_the_name_that_a_person_would_type(folder: str, name: str) -> None:
    assert clean(folder) == name


def test_imagenet_names_are_distinct_and_differ_from_open_clips_only_where_those_occur_twice() -> None:
    names = tuple(imagenet_classes().values())
    assert len(set(names)) == len(names) == 1000
    assert list(imagenet_classes()) == sorted(imagenet_classes())
    differing = {(theirs, ours) for theirs, ours in zip(imagenet_names(), names, strict=True) if theirs != ours}
    assert differing == {("missile", "projectile"), ("sunglasses", "sunglass")}


def test_the_subsets_of_imagenet_have_two_hundred_of_its_classes() -> None:
    for subset in ("imagenet_a", "imagenet_r"):
        assert len(imagenet_classes(subset)) == 200
        assert imagenet_classes(subset).items() <= imagenet_classes().items()


# --- folders


def test_a_folder_of_class_folders_is_one_set_sorted_and_readable(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", "dog/b.png", "dog/a.jpg", "cat/x/deep.webp", "cat/c.JPEG")
    found = one(root)
    assert (found.name, found.classes, found.role) == ("pets", ("cat", "dog"), "reporting")
    assert labelled(found) == {"cat/c.JPEG": "cat", "cat/x/deep.webp": "cat", "dog/a.jpg": "dog", "dog/b.png": "dog"}
    assert list(found.keys) == sorted(found.keys)
    assert [found.read(i) for i in range(4)] == [picture(key) for key in found.keys]
    assert found.notes == ()


def test_the_order_of_a_set_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "a", *(f"{c}/{i}.png" for c in "dcba" for i in (3, 1, 2)))
    before = one(root).files_sha256
    real = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert one(root).files_sha256 == before


def test_domains_give_one_set_each_with_their_own_name(tmp_path: Path) -> None:
    root = write(tmp_path / "pacs", *(f"{d}/{c}/1.jpg" for d in ("photo", "sketch") for c in ("dog", "horse", "house")))
    found = open_data(root)
    assert [s.name for s in found] == ["pacs/photo", "pacs/sketch"]
    assert found[1].keys[0] == "sketch/dog/1.jpg"
    assert found[1].read(0) == picture("sketch/dog/1.jpg")


def test_domains_that_lack_a_class_keep_their_own_list(tmp_path: Path) -> None:
    root = write(tmp_path / "d", *(f"art/{c}/1.jpg" for c in "abc"), *(f"real/{c}/1.jpg" for c in "ab"))
    assert [s.classes for s in open_data(root)] == [("a", "b", "c"), ("a", "b")]


SPLIT_FILES = [f"{s}/{c}/{s}.jpg" for s in ("train", "val", "test", "full") for c in ("cat", "dog")]


@pytest.mark.parametrize(
    ("there", "asked", "taken"),
    [
        (("train", "val", "test"), None, ["test"]),
        (("train", "val"), None, ["val"]),
        (("train", "full"), None, ["full"]),
        (("train", "val", "test"), ["train"], ["train"]),
        (("train", "val", "test"), ["validation"], ["val"]),
        (("train", "val", "test"), ["all"], ["test", "train", "val"]),
    ],
)
def test_of_splits_the_test_images_are_taken_unless_others_are_asked_for(
    tmp_path: Path, there: tuple[str, ...], asked: list[str] | None, taken: list[str]
) -> None:
    root = write(tmp_path / "c", *(f for f in SPLIT_FILES if f.startswith(there)))
    found = open_data(root, splits=asked)
    assert [s.name for s in found] == [f"c/{split}" for split in taken]
    if len(taken) < len(there):
        assert f"only {taken[0]} was taken" in found[0].notes[0]


def test_a_class_of_another_split_stays_in_the_label_list(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", *SPLIT_FILES, "train/emu/1.jpg"))
    assert found.classes == ("cat", "dog", "emu")
    assert "1 of 3 classes have no image here: emu." in found.notes


def test_a_test_split_without_labels_gives_way_to_the_labelled_one(tmp_path: Path) -> None:
    root = write(tmp_path / "t", *(f for f in SPLIT_FILES if not f.startswith("test")), "test/images/1.jpg")
    assert one(root).name == "t/val"


def test_training_images_alone_are_only_taken_when_asked_for(tmp_path: Path) -> None:
    root = write(tmp_path / "c", *(f for f in SPLIT_FILES if f.startswith("train")))
    assert "c has the splits train, not test or val. Ask for one of them by name" in refused(root)
    assert one(root, splits=["train"]).name == "c/train"


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "c", *SPLIT_FILES), splits=["tset"])
    assert "no split 'tset'" in message
    assert "test" in message


def test_splits_inside_domains_are_chosen_for_each(tmp_path: Path) -> None:
    files = [f"{d}/{s}/{c}/1.jpg" for d in ("art", "real") for s in ("train", "test") for c in ("cat", "dog")]
    assert [s.name for s in open_data(write(tmp_path / "o", *files))] == ["o/art/test", "o/real/test"]


def test_sets_beside_each_other_are_told_apart_by_their_own_splits_and_domains(tmp_path: Path) -> None:
    domains = [f"pacs/{d}/{c}/1.jpg" for d in ("photo", "sketch") for c in ("dog", "horse")]
    root = write(tmp_path / "all", *domains, *(f"cifar/{f}" for f in SPLIT_FILES))
    assert [s.name for s in open_data(root)] == ["all/cifar/test", "all/pacs/photo", "all/pacs/sketch"]


def test_folders_inside_classes_that_have_nothing_in_common_are_one_class_with_a_note(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", "cat/2019/1.jpg", "cat/2020/2.jpg", "dog/spring/3.jpg", "dog/summer/4.jpg"))
    assert found.classes == ("cat", "dog")
    assert "Folders inside class folders were read as one class" in found.notes[0]


def test_splits_inside_class_folders_are_no_domains(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", *(f"{c}/{s}/1.jpg" for c in ("cat", "dog") for s in ("train", "test"))))
    assert found.classes == ("cat", "dog")


def test_an_empty_class_folder_keeps_its_place_in_the_label_list(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "ant/1.jpg", "cat/1.jpg", "gif/1.gif", "annotations/1.xml")
    (root / "bee").mkdir()
    found = one(root)
    assert found.classes == ("ant", "bee", "cat", "gif")
    assert labelled(found) == {"ant/1.jpg": "ant", "cat/1.jpg": "cat"}
    assert "2 of 4 classes have no image here: bee, gif." in found.notes


def test_clutter_is_ignored_and_other_files_are_counted(tmp_path: Path) -> None:
    names = ("a/1.jpg", "b/1.jpg", "a/x.gif", "a/notes.txt", "a/Thumbs.db", "a/.hidden.jpg", ".git/1.jpg", "loose.jpg")
    found = one(write(tmp_path / "c", *names))
    assert found.keys == ("a/1.jpg", "b/1.jpg")
    assert found.notes == (
        "1 images outside any class folder were left out.",
        "2 files in the class folders aren't JPEG, PNG or WEBP by their names and were skipped.",
    )


def test_two_folders_of_one_name_keep_their_raw_names(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", "n02012849-crane/1.jpg", "n03126707-crane/1.jpg", "sea_gull/1.jpg"))
    assert found.classes == ("n02012849-crane", "n03126707-crane", "sea gull")
    assert "crane" in found.notes[0]
    assert one(write(tmp_path / "d", "sea_gull/1.jpg", "sea gull/1.jpg")).classes == ("sea gull", "sea_gull")


def test_wordnet_ids_become_imagenet_names_and_unknown_ones_are_noted(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", "n01440764/1.jpg", "n04008634/1.jpg", "n99999999/1.jpg"))
    assert found.classes == ("tench", "projectile", "n99999999")
    assert any("n99999999" in note for note in found.notes)


def test_numbers_for_names_sort_as_numbers_and_say_what_gives_them_names(tmp_path: Path) -> None:
    found = one(write(tmp_path / "c", *(f"{i}/1.jpg" for i in (10, 2, 1))))
    assert found.classes == ("1", "2", "10")
    assert "--classes FILE" in found.notes[0]


def test_links_that_lead_back_up_do_not_hang_and_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "a/1.jpg", "b/1.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "linked").symlink_to(write(tmp_path / "other", "2.jpg"))
    assert one(root).keys == ("a/1.jpg", "b/1.jpg", "linked/2.jpg")


def test_an_image_that_is_gone_by_the_time_it_is_read_is_an_os_error(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "a/1.jpg", "b/1.jpg")
    found = one(root)
    (root / "a/1.jpg").unlink()
    with pytest.raises(OSError, match=r"1\.jpg"):
        found.read(0)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)  # the tests may run as root, whom no permission stops
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert "Permission denied" in message


def test_a_missing_path_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "imagenette", "a/1.jpg")
    message = refused(tmp_path / "imagenete")
    assert "imagenete can't be found (the nearest name is 'imagenette')" in message


def test_a_folder_without_anything_known_says_what_it_holds(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "c", "a.npy", "b.npy"))
    assert "holds 2 .npy files; expected class folders, .zip, .tar, .csv or .tsv" in message
    (tmp_path / "e").mkdir()
    assert "holds nothing" in refused(tmp_path / "e")


def test_a_single_class_and_a_flat_folder_are_refused(tmp_path: Path) -> None:
    assert "at least 2" in refused(write(tmp_path / "one", "cat/1.jpg"))
    assert "expected class folders" in refused(write(tmp_path / "flat", "1.jpg", "2.jpg"))


def test_a_file_of_another_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("x.npy", "x.tar.gz"):
        assert "not compressed" in refused(write(tmp_path, name) / name)


# --- names given by a file


def test_a_list_of_names_matches_raw_and_clean_folders_and_adds_distractors(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "sea_gull/1.jpg", "n02012849-crane/1.jpg")
    (tmp_path / "names.txt").write_text("\ufeffcrane\n\nostrich\nsea_gull\n")
    found = one(root, classes_file=tmp_path / "names.txt")
    assert found.classes == ("crane", "ostrich", "sea_gull")
    assert labelled(found) == {"n02012849-crane/1.jpg": "crane", "sea_gull/1.jpg": "sea_gull"}
    assert any("ostrich" in note for note in found.notes)


def test_a_folder_without_a_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "goldfish/1.jpg", "crane/1.jpg")
    (tmp_path / "names.txt").write_text("gold fish\ncrane\n")
    message = refused(root, classes_file=tmp_path / "names.txt")
    assert "folder 'goldfish' has no name there, the nearest is 'gold fish'" in message


@pytest.mark.parametrize("text", ["0\ttench\n1\tgoldfish\n7\tcock\n", '{"0": "tench", "1": "goldfish", "7": "cock"}'])
def test_pairs_of_folder_and_name_rename_folders(tmp_path: Path, text: str) -> None:
    root = write(tmp_path / "c", "0/1.jpg", "1/1.jpg", "7/1.jpg")
    (tmp_path / "names").write_text(text)
    found = one(root, classes_file=tmp_path / "names")
    assert labelled(found) == {"0/1.jpg": "tench", "1/1.jpg": "goldfish", "7/1.jpg": "cock"}
    assert found.notes == ()


def test_lines_name_numbered_folders_by_their_index(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "0/1.jpg", "2/1.jpg")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\ncock\n")
    assert labelled(one(root, classes_file=tmp_path / "names.txt")) == {"0/1.jpg": "tench", "2/1.jpg": "cock"}
    (tmp_path / "short.txt").write_text("tench\ngoldfish\n")
    assert "folder '2' has no name there" in refused(root, classes_file=tmp_path / "short.txt")


def test_a_pair_for_a_folder_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "names.txt").write_text("cat\thouse cat\ndogg\thound\n")
    message = refused(root, classes_file=tmp_path / "names.txt")
    assert "'dogg', which isn't there; the nearest is 'dog'" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\ncat\n", "the name 'cat' 2 times"),
        ("a\tcat\na\tdog\n", "the folder 'a' 2 times"),
        ("a\tcat\nb\tcat\n", "the name 'cat' 2 times"),
        ('{"a": "cat", "a": "dog"}', "the folder 'a' 2 times"),
        ("a\tcat\ndog\n", "line 2 has 1 columns"),
        ("a\tb\tc\n", "line 1 has 3 columns"),
        ('{"a": ', "JSON"),
    ],
)
def test_a_bad_file_of_names_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    root = write(tmp_path / "c", "a/1.jpg", "b/1.jpg")
    (tmp_path / "names.txt").write_text(text)
    message = refused(root, classes_file=tmp_path / "names.txt")
    assert said in message
    assert "names.txt" in message


def test_a_missing_file_of_names_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "a/1.jpg", "b/1.jpg")
    assert "none.txt can't be read" in refused(root, classes_file=tmp_path / "none.txt")


def test_one_name_for_two_folders_with_images_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "c", "sea_gull/1.jpg", "sea gull/1.jpg", "crane/1.jpg")
    (tmp_path / "names.txt").write_text("sea-gull\nsea gull\ncrane\n")
    assert "2 classes with images would be called 'sea gull'" in refused(root, classes_file=tmp_path / "names.txt")


# --- zip files


def test_a_zip_file_reads_as_its_folders_would(tmp_path: Path) -> None:
    names = ["top/cat/1.png", "top/dog/2.png"]
    found = one(zipped(tmp_path / "pets.zip", *names, "__MACOSX/top/cat/._1.png", "top/.DS_Store", "top/emu/"))
    assert (found.name, found.classes, found.keys) == ("pets", ("cat", "dog", "emu"), tuple(names))
    assert [found.read(i) for i in (0, 1) * 20] == [picture(names[i]) for i in (0, 1) * 20]


def test_splits_and_domains_are_found_in_a_zip_file(tmp_path: Path) -> None:
    assert one(zipped(tmp_path / "c.zip", *SPLIT_FILES)).name == "c/test"
    domains = [f"{d}/{c}/1.jpg" for d in ("photo", "sketch") for c in ("dog", "horse")]
    assert [s.name for s in open_data(zipped(tmp_path / "pacs.zip", *domains))] == ["pacs/photo", "pacs/sketch"]


def test_a_broken_zip_file_is_refused(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "c.zip", *SPLIT_FILES).read_bytes()
    for name, content in {"cut.zip": whole[: len(whole) // 2], "text.zip": b"no zip file", "empty.zip": b""}.items():
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path / name)
        assert f"{name} can't be read" in message
        assert "copy it again" in message


def test_a_zip_file_with_a_password_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "c.zip", *SPLIT_FILES)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "password" in refused(path)


def test_a_damaged_member_of_a_zip_file_is_an_os_error_when_it_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "c.zip", "a/1.png", "b/1.png")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255
    path.write_bytes(content)
    found = one(path)
    with pytest.raises(OSError, match=r"a/1\.png can't be read"):
        found.read(0)
    assert found.read(1) == picture("b/1.png")


# --- shards


def test_shards_with_class_numbers_take_the_names_beside_or_above_them(tmp_path: Path) -> None:
    home = tmp_path / "wds_pets"
    shard(home / "test" / "0.tar", samples("cls", [b"0", b"2"]))
    shard(home / "test" / "1.tar", samples("cls", [b"1"], start=2))
    shard(home / "train" / "0.tar", samples("cls", [b"1"]))
    (home / "classnames.txt").write_text("cat\ndog\nred panda\nemu\n")
    found = one(home)
    assert (found.name, found.classes) == ("wds_pets/test", ("cat", "dog", "red panda", "emu"))
    assert labelled(found) == {"0/s0000.png": "cat", "0/s0001.png": "red panda", "1/s0002.png": "dog"}
    assert [found.read(i) for i in (2, 0, 1)] == [picture(s) for s in ("s0002", "s0000", "s0001")]
    assert any("only wds_pets/test was taken" in note for note in found.notes)
    (home / "test" / "classnames.txt").write_text("CAT\nDOG\nPANDA\n")
    assert one(home / "test").classes == ("CAT", "DOG", "PANDA")


def test_class_numbers_without_names_stay_numbers_or_take_those_given(tmp_path: Path) -> None:
    path = shard(tmp_path / "a" / "x.tar", samples("cls", [b"1", b"0", b"10"]))
    assert one(path).classes == ("0", "1", "10")
    assert "--classes FILE" in one(path).notes[0]
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(11)))
    assert set(labelled(one(path, classes_file=tmp_path / "names.txt")).values()) == {"name 0", "name 1", "name 10"}
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert "label '10' has no name there" in refused(path, classes_file=tmp_path / "names.txt")


def test_names_that_occur_twice_beside_shards_are_told_apart(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", samples("cls", [b"0", b"1", b"2"]))
    (tmp_path / "classnames.txt").write_text("crane\nemu\ncrane\n")
    found = one(path)
    assert found.classes == ("crane", "emu", "crane 2")
    assert any("crane" in note for note in found.notes)
    (tmp_path / "classnames.txt").write_text("\n".join(imagenet_names()))
    assert one(path).classes == tuple(imagenet_classes().values())


def test_labels_come_from_json_as_names_or_numbers(tmp_path: Path) -> None:
    for field, values in {"label": ("red_panda", "dog"), "class": ("cat", "dog"), "cls": (0, 1)}.items():
        labels = [json.dumps({field: value, "width": 3}).encode() for value in values]
        found = one(shard(tmp_path / f"{field}x.tar", samples("json", labels)))
        assert found.classes == tuple(sorted(clean(str(value)) for value in values))


def test_a_pattern_names_shards_and_missing_ones_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"birds-{i:04d}.tar", samples("cls", [b"owl", b"emu"], start=2 * i))
    found = one(tmp_path / "birds-{0000..0002}.tar")
    assert (found.name, len(found)) == ("birds", 6)
    assert one(tmp_path / "birds-{0000..0001}.tar").keys == found.keys[:4]
    assert "birds-0003.tar, " in refused(tmp_path / "birds-{0000..0004}.tar")


def test_shards_of_one_name_in_two_folders_are_two_sets(tmp_path: Path) -> None:
    shard(tmp_path / "a" / "a-0.tar", samples("cls", [b"owl", b"emu"]))
    shard(tmp_path / "a-0.tar", samples("cls", [b"cat", b"dog"]))
    assert [(s.name, s.classes) for s in open_data(tmp_path)] == [("a", ("cat", "dog")), ("a-2", ("emu", "owl"))]


def test_short_texts_that_recur_are_labels_and_captions_are_not(tmp_path: Path) -> None:
    found = one(shard(tmp_path / "a.tar", samples("txt", [b"cat", b"dog\n", b"dog", b"cat"])))
    assert list(labelled(found).values()) == ["cat", "dog", "dog", "cat"]
    assert any("texts beside the images" in note for note in found.notes)
    captions = {
        "unique": [f"emoji {i}".encode() for i in range(4)],
        "long": [b"a dog runs over a wide green field towards a small red ball" * 2] * 4,
        "several": [b"a dog\na brown dog"] * 4,
    }
    for name, texts in captions.items():
        assert "caption" in refused(shard(tmp_path / f"{name}.tar", samples("txt", texts)))


def test_images_without_a_label_are_counted(tmp_path: Path) -> None:
    members = samples("cls", [b"cat", b"dog"]) | {"x.png": picture("x"), "y.txt": b"no image"}
    found = one(shard(tmp_path / "a.tar", members))
    assert len(found) == 2
    assert "1 images without a label were left out." in found.notes
    assert "no image has a label" in refused(shard(tmp_path / "b.tar", {"x.png": picture("x")}))
    assert "hold no image" in refused(shard(tmp_path / "c.tar", {"x.cls": b"0"}))


def test_a_truncated_shard_gives_what_is_readable_and_says_so(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", samples("cls", [b"cat", b"dog", b"cat", b"dog"])).read_bytes()
    assert one(tmp_path / "whole.tar").notes == ()
    # A sample takes 2,048 bytes here: a header and a block for each of its two files. Cut in the third sample's image,
    # in its header, after its header, and exactly before it.
    for end in (2 * 2048 + 600, 2 * 2048 + 100, 2 * 2048 + 512, 2 * 2048):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        found = one(tmp_path / "cut.tar")
        assert [found.read(i) for i in range(2)] == [picture("s0000"), picture("s0001")]
        assert len(found) == 2
        assert "cut.tar is cut off: 2 samples can be read" in found.notes[0]
    damaged = bytearray(whole)
    damaged[2 * 2048 + 10] ^= 255  # in the third image's name: its checksum no longer fits
    (tmp_path / "damaged.tar").write_bytes(damaged)
    assert "damaged.tar is cut off" in one(tmp_path / "damaged.tar").notes[0]


def test_a_shard_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    for name, content in {"empty.tar": b"", "text.tar": b"no tar file" * 100, "short.tar": b"x" * 100}.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} can't be read" in refused(tmp_path / name)


def test_a_shard_that_shrinks_after_it_was_indexed_is_an_os_error(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", samples("cls", [b"cat", b"dog"]))
    found = one(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match="ends before byte"):
        found.read(1)


# --- tables


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_a_table_names_images_and_labels(tmp_path: Path, suffix: str, delimiter: str) -> None:
    write(tmp_path, "in/1.png", "in/2.png")
    rows = (["id", "Filename", "Label"], ["0", "in/2.png", "red_panda"], [], ["1", "in/1.png", "dog, large"])
    found = one(table(tmp_path / f"t{suffix}", *rows, delimiter=delimiter))
    assert found.name == "t"
    assert labelled(found) == {"in/1.png": "dog, large", "in/2.png": "red panda"}
    assert found.read(1) == picture("in/2.png")


def test_a_table_skips_and_counts_other_files(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png", "3.gif")
    found = one(table(tmp_path / "t.csv", ["image", "class"], ["1.png", "a"], ["2.png", "b"], ["3.gif", "b"]))
    assert found.notes == ("1 rows name files that aren't JPEG, PNG or WEBP and were skipped.",)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["file", "tag"], ["1.png", "a"]], "no label column: its header is file, tag"),
        ([["picture", "label"], ["1.png", "a"]], "no image column"),
        ([], "its header is empty"),
        ([["file", "label"], ["1.png", "a"], ["none.png", "b"]], "row 3: there is no file 'none.png'"),
        ([["file", "label"], ["1.png", ""]], "row 2: the label is empty"),
        ([["file", "label"], ["1.png"]], "row 2: the label is empty"),
        ([["file", "label"], ["", "a"]], "row 2: the image is empty"),
        ([["file", "label"], ["1.png", "a"], ["2.png", "b"], ["1.png", "b"]], "row 4: '1.png' stands in row 2 as well"),
        ([["file", "label"], ["1.png", "a"]], "at least 2"),
    ],
)
def test_a_bad_table_is_refused_with_its_row(tmp_path: Path, rows: list[list[str]], said: str) -> None:
    write(tmp_path, "1.png", "2.png")
    assert said in refused(table(tmp_path / "t.csv", *rows))


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x80")
    assert "t.csv can't be read" in refused(tmp_path / "t.csv")


def test_a_label_that_is_not_among_the_names_given_is_refused_with_row_and_nearest(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png", "3.png")
    path = table(tmp_path / "t.csv", ["file", "label"], ["1.png", "cat"], ["2.png", "dgo"], ["3.png", "dgo"])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    message = refused(path, classes_file=tmp_path / "names.txt")
    assert "row 3: label 'dgo' has no name there, the nearest is 'dog'" in message


def test_a_table_keeps_the_folder_it_labels_from_being_read_as_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "d", "x/1.png", "y/2.png")
    table(root / "t.csv", ["file", "label"], ["x/1.png", "cat"], ["y/2.png", "dog"])
    found, left = discover(root)
    assert [s.classes for s in found] == [("cat", "dog")]
    assert "a table labels their images" in left[0]


# --- a folder of all sorts


def test_everything_in_a_folder_is_found_or_left_out_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, "folders/photo/dog/1.jpg", "README.md")
    write(root, *(f"folders/{d}/{c}/1.jpg" for d in ("photo", "sketch") for c in ("dog", "horse")))
    zipped(root / "pets.zip", "cat/1.png", "dog/2.png")
    (root / "broken.zip").write_bytes(b"PK")
    shard(root / "birds" / "birds-0000.tar", samples("cls", [b"owl", b"emu"]))
    shard(root / "birds" / "birds-0001.tar", samples("cls", [b"owl", b"emu"], start=2))
    shard(root / "captions.tar", samples("txt", [b"one", b"two", b"three"]))
    table(root / "scores.csv", ["method", "accuracy"], ["plain", "0.5"])
    found, left = discover(root)
    assert [(s.name, len(s)) for s in found] == [("birds", 4), ("pets", 2), ("data/photo", 2), ("data/sketch", 2)]
    assert len(left) == 3
    assert any(reason.startswith("captions: ") and "caption" in reason for reason in left)
    assert any("broken.zip" in reason for reason in left)
    assert any("scores.csv has no image column" in reason for reason in left)
    assert discover(root)[1] == left
    assert [s.files_sha256 for s in discover(root)[0]] == [s.files_sha256 for s in found]


def test_where_nothing_is_found_the_reasons_are_quoted(tmp_path: Path) -> None:
    shard(tmp_path / "captions.tar", samples("txt", [b"one", b"two", b"three"]))
    (tmp_path / "broken.zip").write_bytes(b"PK")
    message = refused(tmp_path)
    assert "holds no labelled images" in message
    assert "caption" in message
    assert "broken.zip" in message


def test_files_called_after_splits_are_chosen_like_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        zipped(tmp_path / f"pets-{split}.zip", "cat/1.png", "dog/2.png")
    assert one(tmp_path).name == "pets-val"
    assert [s.name for s in open_data(tmp_path, splits=["all"])] == ["pets-train", "pets-val"]


def test_names_of_sets_are_unique_and_take_a_prefix(tmp_path: Path) -> None:
    zipped(tmp_path / "pets.zip", "cat/1.png", "dog/2.png")
    shard(tmp_path / "pets.tar", samples("cls", [b"cat", b"dog"]))
    assert [s.name for s in open_data(tmp_path, prefix="mine/")] == ["mine/pets", "mine/pets-2"]
