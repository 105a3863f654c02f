"""gram_core.pairs: every input form, what is left out and why, and exactness under kills and ranks."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gram_core import pairs
from gram_core.backbone import Backbone, load
from gram_core.config import BAD_DATA, INTERRUPTED, OK, USAGE
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData
from gram_core.images import decode
from gram_core.pairs import PairsConfig, build, main
from gram_core.text import TextEncoder
from tests.conftest import TINY, write_model

FILES = ("caption.f32", "header.json", "image.f32", "keys.jsonl", "phrase.f32", "phrase_rows.jsonl", "phrases.jsonl")
# rounding of float32 sums in another order; unit vectors of 32 numbers
CLOSE = {"rtol": 0, "atol": 1e-5}


def picture(seed: int, kind: str = "JPEG") -> bytes:
    array = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def pair(number: int, *captions: str) -> list[tuple[str, bytes]]:
    return [(f"s{number:03d}.jpg", picture(number)), (f"s{number:03d}.txt", "\n".join(captions).encode())]


def simple(path: Path, count: int, first: int = 0) -> Path:
    things = ("dog", "cat", "red boat")
    each = [pair(i, f"a {things[i % 3]} on the beach", f"picture of a {things[i % 3]}") for i in range(count)]
    return shard(path, [member for members in ([*p] for p in each) for member in members] if not first else [
        member for i in range(first, first + count) for member in pair(i, f"a {things[i % 3]} at home")
    ])  # fmt: skip


def config(out: Path, *data: Path, **options: Any) -> PairsConfig:
    return PairsConfig(**({"data": data, "out": out, "device": "cpu", "least": 1, "part": 4, "workers": 2} | options))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def made(out: Path, backbone: Backbone, *data: Path, **options: Any) -> dict[str, Any]:
    header = build(config(out, *data, **options), quiet(), backbone)
    assert header is not None
    return header


def rows(out: Path, name: str = "keys.jsonl") -> list[Any]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def array(out: Path, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.fromfile(out / name, dtype="<f4").reshape(-1, 32)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# ---- input forms


def test_shards_become_arrays_that_equal_the_towers_own_outputs(tiny: Backbone, tmp_path: Path) -> None:
    data = simple(tmp_path / "one.tar", 11)
    header = made(tmp_path / "out", tiny, data)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)
    assert (header["pairs"], header["dimension"], header["dtype"], header["complete"]) == (11, 32, "float32", True)
    assert header["fingerprint"] == tiny.fingerprint
    assert json.loads((tmp_path / "out" / "header.json").read_text()) == header
    keys = rows(tmp_path / "out")
    assert [row["key"] for row in keys] == [f"one/s{i:03d}" for i in range(11)]
    assert keys[2]["captions"] == ["a red boat on the beach", "picture of a red boat"]
    pixels = torch.stack([tiny.preprocess(decode(picture(i)).rgb) for i in range(11)])
    np.testing.assert_allclose(array(tmp_path / "out", "image.f32"), tiny.encode_images(pixels).numpy(), **CLOSE)
    texts = TextEncoder(tiny)
    classes = texts.class_set({str(i): row["captions"] for i, row in enumerate(keys)})
    np.testing.assert_allclose(array(tmp_path / "out", "caption.f32"), texts.features(classes).numpy(), **CLOSE)
    found = rows(tmp_path / "out", "phrases.jsonl")
    assert header["phrases"] == len(found)
    assert {"phrase": "red boat", "count": 6} in found
    own = texts.features(texts.class_set([row["phrase"] for row in found]))
    np.testing.assert_allclose(array(tmp_path / "out", "phrase.f32"), own.numpy(), **CLOSE)
    where = rows(tmp_path / "out", "phrase_rows.jsonl")[[row["phrase"] for row in found].index("red boat")]
    assert where == [2, 5, 8]


def test_json_beside_an_image_gives_its_captions(tiny: Backbone, tmp_path: Path) -> None:
    fields = [{"caption": "a dog"}, {"captions": ["a cat", "two  cats\u2028here"]}, {"caption": ["a boat"], "url": 3}]
    members = []
    for i, field in enumerate(fields):
        members += [(f"dir/{i}.png", picture(i, "PNG")), (f"dir/{i}.json", json.dumps(field).encode())]
    members += [
        ("dir/3.webp", picture(3, "WEBP")),
        ("dir/3.txt", b"a hat\n\n"),
        ("dir/3.json", b'{"caption": "a hat"}'),
    ]
    made(tmp_path / "out", tiny, shard(tmp_path / "j.tar", members))
    captions = {row["key"]: row["captions"] for row in rows(tmp_path / "out")}
    assert captions == {
        "j/dir/0": ["a dog"],
        "j/dir/1": ["a cat", "two cats here"],
        "j/dir/2": ["a boat"],
        "j/dir/3": ["a hat"],
    }


def test_rows_of_a_table_that_name_one_image_are_merged(tiny: Backbone, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    table = tmp_path / "captions.csv"
    table.write_text('image,caption\n1.jpg,"a dog, barking"\n0.jpg,a cat\n1.jpg,a brown dog\n1.jpg,a brown dog\n')
    header = made(tmp_path / "out", tiny, table)
    assert header["pairs"] == 2
    assert rows(tmp_path / "out") == [
        {"key": "captions/0.jpg", "captions": ["a cat"]},
        {"key": "captions/1.jpg", "captions": ["a dog, barking", "a brown dog"]},
    ]
    tabbed = tmp_path / "more.tsv"
    tabbed.write_text("Path\tCaption 1\tcaption_2\tsplit\n2.jpg\ta hat\ta red hat\ttrain\n9.jpg\ta ghost\t\ttrain\n")
    header = made(tmp_path / "out2", tiny, tabbed)
    assert rows(tmp_path / "out2") == [{"key": "more/2.jpg", "captions": ["a hat", "a red hat"]}]
    assert header["skipped"] == {"unreadable_file": 1}


def test_a_table_with_its_own_column_names_is_read_when_they_are_given(tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(0))
    table = tmp_path / "t.csv"
    table.write_text("photo;said;note\n0.jpg;a dog;x\n")
    with pytest.raises(InvalidData, match=r"no image column: its header is photo, said, note.*--image-column"):
        made(tmp_path / "out", tiny, table)
    with pytest.raises(InvalidData, match="no caption column"):
        made(tmp_path / "out", tiny, table, image_column="photo")
    made(tmp_path / "out", tiny, table, image_column="Photo", caption_columns=("said",))
    assert rows(tmp_path / "out")[0]["captions"] == ["a dog"]


def test_image_folders_take_the_folders_name_as_caption(tiny: Backbone, tmp_path: Path) -> None:
    for i, folder in enumerate(["red_fox", "n01443537-goldfish", "n01443537-goldfish"]):
        path = tmp_path / "set" / "train" / folder / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    (tmp_path / "set" / "loose.png").write_bytes(picture(9, "PNG"))
    header = made(tmp_path / "out", tiny, tmp_path / "set")
    assert [(row["key"], row["captions"]) for row in rows(tmp_path / "out")] == [
        ("set/train/n01443537-goldfish/1.jpg", ["goldfish"]),
        ("set/train/n01443537-goldfish/2.jpg", ["goldfish"]),
        ("set/train/red_fox/0.jpg", ["red fox"]),
    ]
    assert header["skipped"] == {"no_captions": 1}


def test_a_zip_of_class_folders_is_read_like_the_folder_and_so_is_a_folder_in_it(
    tiny: Backbone, tmp_path: Path
) -> None:
    inside = {
        "train/red_fox/0.jpg": picture(0),
        "val/n01443537-goldfish/1.jpg": picture(1),
        "val/n01443537-goldfish/2.png": picture(2, "PNG"),
        "val/n01443537-goldfish/notes.txt": b"no image",
        "val/cat/broken.jpg": b"no image either",
        "__MACOSX/val/cat/._3.jpg": b"clutter",
    }
    data = zipped(tmp_path / "set.zip", inside)
    for name, content_ in inside.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_)
    header = made(tmp_path / "whole", tiny, data)
    assert header == made(tmp_path / "folder", tiny, tmp_path / "set") | {"made_from": header["made_from"]}
    for name in set(FILES) - {"header.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    assert header["skipped"] == {"unsupported_image_format": 1}
    header = made(tmp_path / "out", tiny, data / "val")
    assert [(row["key"], row["captions"]) for row in rows(tmp_path / "out")] == [
        ("set/val/n01443537-goldfish/1.jpg", ["goldfish"]),
        ("set/val/n01443537-goldfish/2.png", ["goldfish"]),
    ]
    with pytest.raises(InvalidData, match=r"set.zip/val lies in .*set.zip, which is named as well"):
        made(tmp_path / "both", tiny, data, data / "val")
    header = made(tmp_path / "parts", tiny, data / "val", data / "train")
    assert {row["key"] for row in rows(tmp_path / "parts")} == {row["key"] for row in rows(tmp_path / "whole")}


def test_a_damaged_member_of_a_zip_is_counted_and_left_out(tiny: Backbone, tmp_path: Path) -> None:
    data = zipped(tmp_path / "set.zip", {f"cat/{i}.jpg": picture(i) for i in range(3)})
    whole = bytearray(data.read_bytes())
    whole[150:400] = bytes(250)  # in the middle of the first member
    data.write_bytes(whole)
    header = made(tmp_path / "out", tiny, data)
    assert (header["pairs"], header["skipped"]) == (2, {"unreadable_file": 1})


def test_keys_and_bytes_do_not_depend_on_the_order_of_the_arguments(tiny: Backbone, tmp_path: Path) -> None:
    a, b = simple(tmp_path / "x" / "0.tar", 3), simple(tmp_path / "y" / "0.tar", 3, first=7)
    c = simple(tmp_path / "y" / "1.tar", 2)
    made(tmp_path / "one", tiny, a, b, c)
    made(tmp_path / "two", tiny, c, tmp_path / "y", b, a)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert {row["key"].rpartition("/")[0] for row in rows(tmp_path / "one")} == {"x/0", "y/0", "1"}


def test_a_pattern_names_its_shards(tiny: Backbone, tmp_path: Path) -> None:
    for i in range(2):
        simple(tmp_path / f"s-{i:04d}.tar", 2)
    assert made(tmp_path / "out", tiny, tmp_path / "s-{0000..0001}.tar")["pairs"] == 4
    with pytest.raises(InvalidData, match=r"s-0002\.tar can't be found"):
        made(tmp_path / "more", tiny, tmp_path / "s-{0000..0002}.tar")


def test_a_long_caption_is_cut_and_not_fatal(tiny: Backbone, tmp_path: Path) -> None:
    data = shard(tmp_path / "l.tar", pair(0, "dog " * 500) + pair(1, "a \x00\x07 cat"))
    made(tmp_path / "out", tiny, data)
    assert rows(tmp_path / "out")[1]["captions"] == ["a cat"]
    assert np.allclose(np.linalg.norm(array(tmp_path / "out", "caption.f32"), axis=1), 1, atol=1e-5)


def test_a_share_of_a_source_is_the_same_pairs_whatever_stands_beside_them(tiny: Backbone, tmp_path: Path) -> None:
    a, b = simple(tmp_path / "a.tar", 40), simple(tmp_path / "b.tar", 6)
    made(tmp_path / "all", tiny, a, b)
    header = made(tmp_path / "half", tiny, a, b, share={"a": 0.5})
    every, half = ([row["key"] for row in rows(tmp_path / out)] for out in ("all", "half"))
    assert [key for key in half if key[0] == "b"] == [key for key in every if key[0] == "b"]
    own = [key for key in half if key[0] == "a"]
    assert 10 < len(own) < 30  # 20 are expected; fewer or more have a probability of 2 in a thousand, once and for all
    assert header["pairs"] == len(own) + 6
    simple(tmp_path / "a.tar", 20)
    made(tmp_path / "less", tiny, a, share={"a": 0.5})
    assert [row["key"] for row in rows(tmp_path / "less")] == [key for key in own if key < "a/s020"]
    made(tmp_path / "other", tiny, a, share={"*": 0.5}, seed=1)
    assert rows(tmp_path / "other") != rows(tmp_path / "less")
    with pytest.raises(InvalidConfig, match=r"share names 'c'; the sources are a, b"):
        made(tmp_path / "none", tiny, a, b, share={"c": 0.5})
    with pytest.raises(InvalidConfig, match=r"the share of 'a' is 1.5"):
        config(tmp_path, share={"a": 1.5})


# ---- what is left out


def test_samples_that_are_no_pair_are_counted_by_reason_and_skipped(tiny: Backbone, tmp_path: Path) -> None:
    members = pair(0, "a dog")
    members += [("broken.jpg", picture(1)[:200]), ("broken.txt", b"a cat")]
    members += [("gif.jpg", b"GIF89a..."), ("gif.txt", b"a cat")]
    members += [("silent.jpg", picture(2)), ("blank.jpg", picture(3)), ("blank.txt", b" \n\n")]
    members += [("blind.txt", b"a cat"), ("odd.jpg", picture(4)), ("odd.json", b"{not json")]
    members += [("null.jpg", picture(5)), ("null.json", b'{"caption": null}'), ("else.npy", b"x")]
    members += [("long.jpg", picture(6)), ("long.txt", b"x" * 2_000_000)]
    header = made(tmp_path / "out", tiny, shard(tmp_path / "m.tar", members))
    assert [row["key"] for row in rows(tmp_path / "out")] == ["m/s000"]
    assert header["skipped"] == {
        "captions_too_long": 1,
        "no_captions": 3,
        "no_image": 1,
        "undecodable_image": 1,
        "unreadable_captions": 1,
        "unsupported_image_format": 1,
    }


def test_a_truncated_shard_gives_its_whole_samples_and_is_counted(tiny: Backbone, tmp_path: Path) -> None:
    data = simple(tmp_path / "t.tar", 10)
    data.write_bytes(data.read_bytes()[:9000])
    header = made(tmp_path / "out", tiny, data)
    assert 1 <= header["pairs"] < 10
    assert header["skipped"]["shard_cut_off"] == 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", picture(0))], "1 no_captions"),
        ([("a.txt", b"a dog"), ("b.txt", b"a cat")], "2 no_image"),
        ([("a.npy", b"x")], "no images with captions there"),
    ],
)
def test_shards_without_a_single_pair_are_an_error_in_words(
    tiny: Backbone, tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    with pytest.raises(InvalidData, match=words):
        made(tmp_path / "out", tiny, shard(tmp_path / "n.tar", members))


def test_missing_and_unreadable_data_is_an_error_in_words(tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"this is not a tar file" * 99)
    (tmp_path / "none.tar").write_bytes(b"")
    (tmp_path / "z.zip").write_bytes(b"PK")
    (tmp_path / "z.7z").write_bytes(b"7z")
    zipped(tmp_path / "loose.zip", {"notes.txt": b"no images"})
    (tmp_path / "bin.csv").write_bytes(b"image,caption\n\xff\xfe\n")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "gone.tar": "can't be found",
        "bad.tar": "expected an uncompressed .tar shard",
        "none.tar": "expected an uncompressed .tar shard",
        "z.zip": "expected a zip file of class folders",
        "z.7z": "Unpack it first",
        "loose.zip": "holds no .jpg",
        "loose.zip/val": "loose.zip/val holds no .jpg",
        "bin.csv": "in UTF-8",
        "empty": "holds no .jpg",
    }.items():
        with pytest.raises(InvalidData, match=words):
            made(tmp_path / "out", tiny, tmp_path / name)


def test_features_that_are_not_numbers_are_an_error_in_words(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny.encode_images

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        features = plain(pixels)
        features[1, 3] = torch.nan
        return features

    monkeypatch.setattr(tiny, "encode_images", broken)
    with pytest.raises(InvalidData, match=r"NaN or empty features for 1 of 4 inputs, the first is 'n/s001'"):
        made(tmp_path / "out", tiny, simple(tmp_path / "n.tar", 4))


# ---- the folder


def test_a_folder_of_another_model_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    other = load(str(write_model(tmp_path / "other", TINY, seed=5)), device="cpu")
    data = simple(tmp_path / "d.tar", 3)
    made(tmp_path / "out", tiny, data)
    before = content(tmp_path / "out")
    with pytest.raises(FingerprintMismatch, match=r"features of model 'tiny'.*the loaded one is 'other'"):
        made(tmp_path / "out", other, data)
    assert content(tmp_path / "out") == before


def test_a_complete_folder_is_left_alone_and_other_data_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    data = simple(tmp_path / "d.tar", 3)
    first = made(tmp_path / "out", tiny, data)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    os.utime(data, (1, 1))  # a copy of the data is the same data
    (tmp_path / "out" / "parts").mkdir()  # of a run that was killed after its last line
    assert made(tmp_path / "out", tiny, data) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InvalidData, match="complete cache of other data or options"):
        made(tmp_path / "out", tiny, simple(tmp_path / "e.tar", 4))
    (tmp_path / "out" / "header.json").write_text("{")
    with pytest.raises(InvalidData, match="is damaged"):
        made(tmp_path / "out", tiny, data)


def test_a_damaged_part_is_removed_and_made_again(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = simple(tmp_path / "d.tar", 9)
    made(tmp_path / "good", tiny, data)
    monkeypatch.setattr(pairs, "_finish", lambda *_: {})
    made(tmp_path / "out", tiny, data)
    monkeypatch.undo()
    victim = sorted((tmp_path / "out" / "parts").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InvalidData, match=r"was damaged.*run the same command again"):
        made(tmp_path / "out", tiny, data)
    made(tmp_path / "out", tiny, data)
    assert content(tmp_path / "out") == content(tmp_path / "good")


# ---- kills and ranks


def forked(work: Callable[[], object]) -> int:
    """A child process that does `work` with one thread: the towers' thread pool doesn't survive a fork."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:  # nothing of pytest may run in the child
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", [1, 2, 4, 8, 10, 11, 13])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tiny: Backbone, tmp_path: Path, moment: int) -> None:
    data = simple(tmp_path / "d.tar", 14)

    @contextmanager
    def deadly(path: Path) -> Iterator[BinaryIO]:
        deadly.count += 1  # type: ignore[attr-defined]
        with plain(path) as file:
            yield file
            if deadly.count >= moment:  # type: ignore[attr-defined]
                file.truncate(max(1, file.tell() // 2))
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        pairs.beside = deadly
        made(tmp_path / "out", tiny, data)

    plain = pairs.beside
    deadly.count = 0  # type: ignore[attr-defined]
    with one_thread():
        made(tmp_path / "good", tiny, data)
        assert ended(forked(killed)) == -signal.SIGKILL
        there = list((tmp_path / "out" / "parts").iterdir())
        made(tmp_path / "out", tiny, data)
    assert there or moment <= 2  # something was kept
    assert content(tmp_path / "out") == content(tmp_path / "good")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_was_finished_before_a_kill_is_not_computed_again(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = simple(tmp_path / "d.tar", 14)
    seen: list[int] = []
    plain = tiny.encode_images

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if sum(seen) > 8:
            raise KeyboardInterrupt
        return plain(pixels)

    monkeypatch.setattr(tiny, "encode_images", counted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", tiny, data)
    monkeypatch.setattr(tiny, "encode_images", lambda pixels: seen.append(-len(pixels)) or plain(pixels))
    made(tmp_path / "out", tiny, data)
    assert seen == [4, 4, 4, -4, -2]  # two of four parts were kept


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_make_what_one_makes(tiny: Backbone, tmp_path: Path) -> None:
    data = [simple(tmp_path / "a.tar", 9), simple(tmp_path / "b.tar", 6, first=20)]
    shared = tmp_path / "two"

    def rank(number: int) -> Callable[[], object]:
        return lambda: build(config(shared, *data, rank=number, world=2), quiet(), tiny)

    with one_thread():
        made(tmp_path / "one", tiny, *data)
        children = [forked(rank(0)), forked(rank(1))]
        assert [ended(child) for child in children] == [0, 0]
    assert content(shared) == content(tmp_path / "one")


def test_rank_0_says_so_when_the_others_do_not_come(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "PATIENCE_S", 0.1)
    with pytest.raises(InvalidData, match="2 parts of the other processes don't come"):
        made(tmp_path / "out", tiny, simple(tmp_path / "d.tar", 14), rank=0, world=2)
    assert build(config(tmp_path / "out", tmp_path / "d.tar", rank=1, world=2), quiet(), tiny) is None
    assert made(tmp_path / "out", tiny, tmp_path / "d.tar", rank=0, world=2)["pairs"] == 14


# ---- the command


def test_the_command_ends_with_its_exit_code_and_says_what_it_did(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = simple(tmp_path / "d.tar", 6)
    words = ["--model", str(tiny_dir), "--out", str(tmp_path / "out"), "--device", "cpu", "--data"]
    assert main([*words, str(data)]) == OK
    said = capsys.readouterr().err
    assert "features: 6 of 6 images" in said
    assert "6 pairs with 12 captions" in said
    assert main([*words, str(data)]) == OK
    assert "is complete already" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "gone.tar")]) == BAD_DATA
    assert "InvalidData" in capsys.readouterr().err
    assert main(words[:-1]) == USAGE
    with pytest.raises(SystemExit) as ended_:
        main([*words, str(data), "--part", "0"])
    assert ended_.value.code == USAGE
    (tmp_path / "file").write_text("")
    assert main([*words[:3], str(tmp_path / "file"), *words[4:], str(data)]) == BAD_DATA

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pairs, "build", interrupted)
    assert main([*words, str(data)]) == INTERRUPTED


def test_torchrun_tells_each_process_its_share() -> None:
    own = pairs._placed(PairsConfig(data=(Path("x"),)), {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (own.rank, own.world) == (1, 4)
    given = PairsConfig(rank=0, world=2)
    assert pairs._placed(given, {"RANK": "1", "WORLD_SIZE": "4"}) == given
    with pytest.raises(InvalidConfig, match="rank is 2 of 2"):
        PairsConfig(rank=2, world=2)


def test_a_terminal_gets_a_bar_with_rate_and_time_left(tiny: Backbone, tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    build(config(tmp_path / "out", simple(tmp_path / "d.tar", 8)), screen, tiny)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "8/8" in shown
    assert "images/s" in shown
