"""`python -m prototypes`: build, inspect and draw from a shell, with the promised exit codes and a page of its own."""

from __future__ import annotations

import html.parser
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prototypes.__main__ import BAD_DATA, OK, USAGE, main
from prototypes.draw import thumbnails
from prototypes.hierarchy import load_hierarchy
from tests.prototypes_fixtures import plant

HOSTILE = '<script src="http://evil.example/x.js"></script>&"'
BUILD = ["--quantile", "0", "--duplicate", "1.1", "--themes", "3"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    planted = plant()
    planted.write(folder / "cache", phrases=[HOSTILE, *(f"thing {i}" for i in range(1, 12))], source="<b>planted</b>")
    assert main(["build", str(folder / "cache"), "--out", str(folder / "tree"), *BUILD]) == OK
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i, key in enumerate(planted.keys):
            data = io.BytesIO()
            Image.new("RGB", (90, 60), (i % 256, 40, 90)).save(data, "JPEG")
            broken = b"\xff\xd8\xff damaged" if i == 0 else data.getvalue()
            member = tarfile.TarInfo(f"{key.removeprefix('shard/')}.jpg")
            member.size = len(broken)
            archive.addfile(member, io.BytesIO(broken))
    return folder


class Links(html.parser.HTMLParser):
    """Everything in a page that would load or run something, and its images."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form", "a", "b"):
            self.bad.append(tag)
        self.bad += [name for name in values if name.startswith("on") or name in ("href", "srcset", "action")]
        if tag == "img":
            self.images.append(values["src"] or "")


def test_a_tree_is_built_inspected_and_drawn(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built / "tree"), "--depth", "3"]) == OK
    said = capsys.readouterr().out
    assert "3 themes" in said
    assert "thing 5" in said
    assert "complexity" in said
    assert main(["draw", str(built / "tree"), "--out", str(built / "plain.html")]) == OK
    assert "thing 5" in (built / "plain.html").read_text()


def test_the_page_holds_its_images_and_loads_nothing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["draw", str(built / "tree"), "--cache", str(built / "cache"), "--images", str(built / "shard.tar")]
    assert main([*words, "--nearest", "30", "--side", "16", "--out", str(built / "tree.html")]) == OK
    text = (built / "tree.html").read_text()
    links = Links()
    links.feed(text)
    assert links.bad == []
    tree = load_hierarchy(built / "tree", fingerprint=None)
    assert len(links.images) == len(tree.keys) - 1  # all members of every prototype but the damaged one
    assert all(source.startswith("data:image/jpeg;base64,") for source in links.images)
    assert "1 of" in capsys.readouterr().err
    assert "evil.example" in text  # the name is shown, escaped
    assert "<script" not in text.lower()
    assert "url(" not in text


def test_thumbnails_are_square_jpegs_found_with_and_without_the_shard_s_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.png", "b.x.png", "a.txt"):
            data = io.BytesIO()
            Image.fromarray(np.zeros((20, 50, 4), np.uint8)).save(data, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    found, damaged = thumbnails([tmp_path / "s.tar"], ["s/a", "b", "c"], 24)
    assert (set(found), damaged) == ({"s/a", "b"}, 0)
    assert Image.open(io.BytesIO(found["b"]), formats=["JPEG"]).size == (24, 24)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["grow"],
        ["build"],
        ["build", "x", "--out", "y", "--kind", "tall"],
        ["build", "x", "--out", "y", "--quantile", "1"],
        ["build", "x", "--out", "y", "--themes", "0"],
        ["inspect", "x", "--depth", "9"],
        ["draw", "x"],
    ],
)
def test_a_wrong_option_ends_with_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == USAGE
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "{0}/none", "--out", "{0}/x"], "is no feature cache"),
        (["build", "{0}/cache", "--out", "{0}/x", "--leaks", "{0}/none"], "is no feature cache"),
        (["inspect", "{0}/none"], "lacks tree.safetensors"),
        (["draw", "{0}/tree", "--images", "{0}/shard.tar", "--out", "{0}/x.html"], "give --cache"),
        (
            ["draw", "{0}/tree", "--cache", "{0}/cache", "--images", "{0}/cache/image.f32", "--out", "{0}/x"],
            "no readable tar",
        ),
        (
            ["draw", "{0}/tree", "--cache", "{0}/cache", "--images", "{0}/none.tar", "--out", "{0}/x"],
            "No such file",
        ),
    ],
)
def test_bad_data_ends_with_code_65_and_words(
    built: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{0}", str(built)) for word in words]) == BAD_DATA
    assert said in " ".join(capsys.readouterr().err.split())
