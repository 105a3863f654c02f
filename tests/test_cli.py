"""`gram classify`, `evaluate --url`, `bench`, `pull`, `tune`: what they print, what they write, how they end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from gram_core.backbone import file_sha256, load
from gram_core.types import Answer, Plan
from server import bulk, commands
from server import client as clients
from server.bench import Outcome, arrivals, report, synthetic
from server.cli import app
from server.client import GramClient
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.settings import InvalidSettings, read_settings
from server.sheets import COLUMNS
from server.sorting import Sorter, folder_names
from tests.conftest import TINY, write_model
from tests.gram_fixtures import write_checkpoint
from tests.server_fixtures import PATIENCE_S, Live, live, png, until

ROOT = Path(__file__).parents[1]
CLASSES = "cat,dog,fire truck"
NAMES = CLASSES.split(",")
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of this machine, and retries after milliseconds."""
    for name in [name for name in os.environ if name.startswith("GRAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(clients, "BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a checkpoint: gram, infomax and tpt."""
    made = write_model(tmp_path_factory.mktemp("models") / "learned", TINY, seed=3)
    write_checkpoint(made, load(str(made), device="cpu"))
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images in two folders, one damaged, and two files that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for n in range(10):
        (folder / ("more" if n % 2 else ".") / f"{n}.png").write_bytes(png(n, (40 + n, 36)))
    (folder / "bad.png").write_bytes(png()[:60])
    (folder / "notes.txt").write_text("no image")
    (folder / "more" / "empty").write_bytes(b"")
    return folder


def gram(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def url(server: Live) -> str:
    return str(server.client.base_url)


def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        return f"http://127.0.0.1:{port.getsockname()[1]}"


def without_clock(text: str) -> Any:
    """The rows of --json or --jsonl without milliseconds."""
    told = json.loads(text)
    for row in told["results"]:
        if row["adaptation"] is not None:
            row["adaptation"]["ms"] = 0
    return told


# ---- classify: who answers ----


def test_a_server_and_this_process_give_the_same_answers(photos: Path, learned: Path) -> None:
    asked = ("classify", photos, "--classes", CLASSES, "--json", "--explain")
    here = gram(*asked, "--local", "--model", learned, "--device", "cpu", code=1)
    with live(fake=False, model=str(learned), device="cpu") as running:
        there = gram(*asked, "--url", url(running), code=1)
    ours, theirs = without_clock(here.stdout), without_clock(there.stdout)
    assert {row["adaptation"]["method"] for row in ours["results"] if row["adaptation"]} == {"gram"}
    for row in (*ours["results"], *theirs["results"]):
        row.pop("explain")  # rounding of a matmul of another size
    assert ours == theirs
    assert "in this process" in here.stderr
    assert f"asking the server at {url(running)}" in there.stderr


def test_a_model_without_a_root_answers_alike_too(photos: Path, tiny_dir: Path) -> None:
    asked = ("classify", photos, "--classes", CLASSES, "--json", "--scope", "image", "--views", "4")
    here = gram(*asked, "--model", tiny_dir, "--device", "cpu", code=1)
    with live(fake=False, model=str(tiny_dir), device="cpu") as running:
        there = gram(*asked, "--url", url(running), code=1)
    assert without_clock(here.stdout) == without_clock(there.stdout)


def test_the_server_of_the_environment_is_asked(photos: Path, server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAM_URL", url(server))
    assert "asking the server at" in gram("classify", photos, "--classes", CLASSES, code=1).stderr


def test_without_a_server_the_model_is_loaded_here(
    photos: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "HERE", nobody())
    monkeypatch.setattr(commands, "LOOK_S", 0.1)
    monkeypatch.setenv("GRAM_MODEL", str(tiny_dir))
    monkeypatch.setenv("GRAM_DEVICE", "cpu")
    told = gram("classify", photos / "0.png", "--classes", CLASSES, "--method", "none")
    assert "no server at" in told.stderr
    assert f"running {tiny_dir.name} in this process" in told.stderr
    assert told.stdout.startswith(f"{photos / '0.png'}: ")


def test_who_is_not_there_is_told_in_one_line(photos: Path) -> None:
    told = gram("classify", photos, "--classes", CLASSES, "--url", nobody(), code=1)
    assert "no server answers at this address" in told.stderr
    assert told.stdout == ""


def test_a_model_that_is_not_there_is_told_in_one_line(photos: Path) -> None:
    told = gram("classify", photos, "--classes", CLASSES, "--model", "no-such-model", code=65)
    assert "no-such-model" in told.stderr


def test_a_client_can_be_set_up_where_a_server_is() -> None:
    os.environ["GRAM_URL"] = "http://127.0.0.1:8000"
    read_settings([])
    os.environ["GRAM_API_KEY"] = "a key that would protect nothing"
    try:
        with pytest.raises(InvalidSettings, match="GRAM_API_KEYS_FILE"):
            read_settings([])
    finally:
        del os.environ["GRAM_URL"], os.environ["GRAM_API_KEY"]


# ---- classify: rows ----


def test_every_image_is_a_row_in_order_and_a_bad_one_a_row_with_its_error(photos: Path, server: Live) -> None:
    told = gram("classify", photos, "--classes", CLASSES, "--jsonl", "--url", url(server), code=1)
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    wanted = [photos / f"{n}.png" for n in (0, 2, 4, 6, 8)] + [photos / "bad.png"]
    wanted += [photos / "more" / f"{n}.png" for n in (1, 3, 5, 7, 9)]
    assert [row["path"] for row in rows] == [str(path) for path in wanted]
    assert [row["index"] for row in rows] == list(range(11))
    (bad,) = (row for row in rows if row["error"])
    assert Path(bad["path"]).name == "bad.png"
    assert bad["error"]["code"] == "undecodable_image"
    assert bad["error"]["message"].startswith("the image ")
    assert "11 images, 1 failed" in told.stderr
    assert f"no JPEG, PNG or WEBP, 2: {photos / 'notes.txt'}, {photos / 'more' / 'empty'}" in told.stderr
    with GramClient(url(server)) as client:
        good = [row for row in rows if not row["error"]]
        theirs = client.classify([path for path in wanted if path.name != "bad.png"], NAMES)["results"]
    assert [row["predictions"] for row in good] == [row["predictions"] for row in theirs]


def test_a_table_has_a_column_for_everything(photos: Path, server: Live, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    told = gram("classify", photos, "--classes", CLASSES, "--csv", "--out", out, "--url", url(server), code=1)
    assert told.stdout == ""
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 11
    good, (bad,) = [row for row in rows if not row["error"]], [row for row in rows if row["error"]]
    assert {row["label"] for row in good} <= set(NAMES)
    assert {row["changed"] for row in good} <= {"true", "false"}
    assert all(0 < float(row["score"]) < 1 for row in good)
    assert (bad["label"], bad["error"]) == ("", "undecodable_image")


def test_files_that_are_named_are_sent_whatever_they_are(photos: Path, server: Live) -> None:
    told = gram("classify", photos / "notes.txt", photos / "0.png", photos / "0.png", "--classes", CLASSES, "--jsonl",
                "--url", url(server), code=1)  # fmt: skip
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert [row["error"] and row["error"]["code"] for row in rows] == ["unsupported_image_format", None]


def test_names_with_commas_come_from_a_file(photos: Path, server: Live, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat, big\n# not a comment\n\ndog\n", encoding="utf-8")
    told = gram("classify", photos / "0.png", "--classes-file", names, "--top-k", "3", "--jsonl", "--url", url(server))
    assert {p["label"] for p in json.loads(told.stdout)["predictions"]} == {"cat, big", "# not a comment", "dog"}


def test_a_token_runs_the_same_again(photos: Path, learned: Path) -> None:
    with live(fake=False, model=str(learned), device="cpu") as running:
        images = [photos / f"{n}.png" for n in (0, 2, 4, 6, 8)]
        asked = ("classify", *images, "--classes", CLASSES, "--jsonl", "--url", url(running))
        first = [json.loads(line) for line in gram(*asked, "--scope", "batch", "--steps", "3").stdout.splitlines()]
        again = gram(*asked, "--replay", first[0]["adaptation"]["replay"])
        assert [json.loads(line)["adaptation"]["digest"] for line in again.stdout.splitlines()] == [
            row["adaptation"]["digest"] for row in first
        ]
        gram(*asked, "--replay", "gr1.x", "--steps", "3", code=2)
        assert "replay" in gram(*asked, "--replay", "gr1.x", code=1).stderr


def test_thousands_of_images_go_through_in_order(server: Live, tmp_path: Path) -> None:
    for n in range(2000):
        (tmp_path / f"{n:04}.png").write_bytes(png(n % 50))
    before = server.metric("gram_requests_total", route="/v1/classify", code="200")
    began = time.monotonic()
    told = gram("classify", tmp_path, "--classes", CLASSES, "--jsonl", "--url", url(server))
    assert time.monotonic() - began < 30  # 3 s on two idle cores
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert [Path(row["path"]).stem for row in rows] == [f"{n:04}" for n in range(2000)]
    assert [row["index"] for row in rows] == list(range(2000))
    assert [row["score"] for row in rows[:50]] == [row["score"] for row in rows[50:100]]
    assert server.metric("gram_requests_total", route="/v1/classify", code="200") == before + 32


def test_a_request_that_costs_too_much_is_halved(photos: Path) -> None:
    with live(max_request_cost=100.0) as running:  # five images of 30 views cost 5 * 31
        asked = ("classify", photos / "more", "--classes", CLASSES, "--jsonl", "--url", url(running))
        told = gram(*asked, "--method", "tpt", "--views", "30")
        assert len(told.stdout.splitlines()) == 5
        together = ("classify", photos, "--classes", CLASSES, "--jsonl", "--url", url(running), "--scope", "batch")
        batch = gram(*together, "--views", "30", "--batch", "11", code=1)
        assert {json.loads(line)["error"]["code"] for line in batch.stdout.splitlines()} == {"request_too_costly"}


def test_a_file_that_can_not_be_read_or_is_too_large_is_a_row(server: Live, tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "fine.png").write_bytes(png())
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(png())
        file.truncate(2**31)
    told = gram("classify", tmp_path, "--classes", CLASSES, "--jsonl", "--url", url(server), code=1)
    rows = {Path(row["path"]).name: row for row in map(json.loads, told.stdout.splitlines())}
    assert set(rows) == {"fine.png", "huge.png"}
    assert rows["huge.png"]["error"]["code"] == "image_too_large"
    gram("classify", tmp_path, "--classes", CLASSES, "--errors", "fail", "--url", url(server), code=1)


def test_names_that_are_no_unicode_and_no_field_of_a_line_are_written(server: Live, tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b'caf\xe9 "a",b.png')).write_bytes(png())
    except OSError:
        pytest.skip("this file system has Unicode names only")
    told = gram("classify", tmp_path, "--classes", CLASSES, "--jsonl", "--url", url(server))
    assert os.fsencode(json.loads(told.stdout)["path"]).endswith(b'caf\xe9 "a",b.png')
    (tmp_path / "\x1b[31m.png").write_bytes(png())
    assert "\x1b" not in gram("classify", tmp_path, "--classes", CLASSES, "--url", url(server)).stdout
    (tmp_path / "\x1b[31m.png").unlink()
    table = gram("classify", tmp_path, "--classes", CLASSES, "--csv", "--url", url(server))
    assert next(iter(csv.DictReader(io.StringIO(table.stdout))))["path"].endswith('caf\\udce9 "a",b.png')


# ---- classify: sorting ----


@pytest.mark.parametrize("how", ["copy", "move", "link"])
def test_images_are_sorted_and_nothing_is_overwritten(photos: Path, server: Live, tmp_path: Path, how: str) -> None:
    (photos / "more" / "0.png").write_bytes(png(0, (40, 36)))  # the same image, so the same label and name
    into = photos / "sorted"
    asked = ("classify", photos, "--classes", CLASSES, "--jsonl", "--url", url(server), "--sort-into", into)
    told = gram(*asked, f"--{how}", code=1)
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    files = sorted(path.relative_to(into) for path in into.rglob("*.png"))
    assert len(files) == 11
    label = next(row["label"] for row in rows if row["path"] == str(photos / "0.png"))
    assert Path(label, "0.png") in files
    assert Path(label, "0-1.png") in files
    assert all(path.parts[0] in NAMES for path in files)
    assert (photos / "0.png").exists() == (how != "move")
    assert all((into / path).is_symlink() == (how == "link") for path in files)
    assert (into / label / "0.png").read_bytes() == png(0, (40, 36))
    assert (photos / "bad.png").exists()
    assert "11 " in told.stderr.split(";")[-1]
    if how == "copy":  # once more: what was sorted is not classified again
        again = gram(*asked, code=1)
        assert len(again.stdout.splitlines()) == len(rows)
        assert len(list(into.rglob("*.png"))) == 22
    del tmp_path


def test_no_label_names_a_folder_elsewhere_or_anothers() -> None:
    labels = ["../up", "/etc", "a/b", "a_b", "A_b", ".", "..", "con\x00", "x" * 300, "é" * 200, "plain", " dot. "]
    made = folder_names(labels)
    assert list(made) == labels
    assert all(name == Path(name).name and name not in (".", "..") for name in made.values())
    assert all(1 <= len(name.encode()) <= 210 for name in made.values())
    assert len({name.casefold() for name in made.values()}) == len(labels)
    assert made["plain"] == "plain"


def test_half_an_image_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(png())

    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("server.sorting.shutil.copyfileobj", full)
    with pytest.raises(OSError, match="no space"):
        Sorter(tmp_path / "into", ["cat"]).put(image, "cat")
    assert list((tmp_path / "into").rglob("*.png")) == []
    assert image.exists()


# ---- classify: usage and interruptions ----


@pytest.mark.parametrize(
    "words",
    [
        ("{photos}",),
        ("{photos}", "--classes", "a,b", "--classes-file", "f"),
        ("{photos}", "--classes", ","),
        ("{photos}", "--classes", "a,a"),
        ("{photos}", "--classes-file", "{photos}/nowhere"),
        ("{photos}/nowhere", "--classes", "a,b"),
        ("{photos}/more/empty-folder", "--classes", "a,b"),
        ("{photos}", "--classes", "a,b", "--json", "--csv"),
        ("{photos}", "--classes", "a,b", "--move"),
        ("{photos}", "--classes", "a,b", "--move", "--link", "--sort-into", "x"),
        ("{photos}", "--classes", "a,b", "--url", "http://127.0.0.1:9", "--local"),
        ("{photos}", "--classes", "a,b", "--url", "http://127.0.0.1:9", "--model", "m"),
        ("{photos}", "--classes", "a,b", "--url", "127.0.0.1:9"),
        ("{photos}", "--classes", "a,b", "--batch", "0"),
        ("{photos}", "--classes", "a,b", "--scope", "all"),
        ("{photos}", "--classes", "a,b", "--errors", "ignore"),
        ("{photos}", "--classes", "a,b", "--url", "http://127.0.0.1:9", "--out", "{photos}/nowhere/x"),
        ("--classes", "a,b"),
        ("{photos}", "--classes", "a,b", "--frobnicate"),
    ],
    ids=lambda words: " ".join(words).replace("{photos}", "P"),
)
def test_usage_errors_end_with_code_2_and_a_sentence(photos: Path, words: Sequence[str]) -> None:
    (photos / "more" / "empty-folder").mkdir()
    told = gram("classify", *(word.format(photos=photos) for word in words), code=2)
    assert told.stdout == ""
    assert told.stderr.strip()


def test_what_every_request_would_meet_ends_the_run(photos: Path, server: Live) -> None:
    told = gram(
        "classify", photos, "--classes", CLASSES, "--template", "no place for a name", "--url", url(server), code=1
    )
    assert "bad_template" in told.stderr
    assert told.stdout == ""


class Halting(FakeClassifier):
    """Answers two requests and holds the third."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.gate = threading.Event()

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        self.runs += 1
        assert self.runs < 3 or self.gate.wait(PATIENCE_S)
        return super().classify(images, classes, plan, **options)


def test_an_interrupted_run_leaves_what_it_wrote_complete(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "rows.json"
    photos.mkdir()
    for n in range(20):
        (photos / f"{n:02}.png").write_bytes(png(n))
    halting = Halting()
    with live(halting) as running:
        command = [sys.executable, "-m", "server.cli", "classify", str(photos), "--classes", CLASSES, "--json"]
        command += ["--batch", "5", "--out", str(out), "--url", url(running)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: halting.runs == 3, "the third request is under way", patience_s=60)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        halting.gate.set()
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    told = json.loads(out.read_text())
    assert [Path(row["path"]).stem for row in told["results"]] == [f"{n:02}" for n in range(10)]
    assert (told["images"], told["failed"]) == (10, 0)


# ---- evaluate ----


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four images of each of three colours."""
    folder = tmp_path / "labelled"
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for n in range(4):
            pixels = np.clip(rng.normal(colour, 40, (36, 40 + n, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")
    return folder


def predictions(path: Path) -> dict[tuple[str, str], tuple[str, int, float]]:
    """(method, image) -> answer, request and score."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["method"], row["image"]): (row["answer"], row["request"], row["score"]) for row in rows}


def test_a_served_evaluation_agrees_with_the_harness(labelled: Path, learned: Path, tmp_path: Path) -> None:
    gram(
        *("evaluate", labelled, "--model", learned, "--device", "cpu", "--methods", "zero-shot", "gram", "infomax"),
        *("--protocols", "stream", "--stream-size", "12", "--seeds", "1", "--predictions", "--draws", "100"),
        *("--out", tmp_path / "harness", "--cache", tmp_path / "cache"),
    )
    lines = (tmp_path / "harness" / "predictions.jsonl").read_text().splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(line for line in lines if json.loads(line)["kind"] == "shuffled") + "\n")
    theirs = predictions(shuffled)
    with live(fake=False, model=str(learned), device="cpu") as running:
        for method in ("gram", "infomax"):
            out = tmp_path / f"{method}.jsonl"
            told = gram(
                *("evaluate", labelled, "--url", url(running), "--method", method, "--stream-size", "12"),
                *("--predictions", out, "--draws", "100", "--json"),
            )
            ours = predictions(out)
            assert len(ours) == 24
            assert ours == {key: theirs[key] for key in ours}
            (cell,) = json.loads(told.stdout)["sets"]
            assert list(cell["methods"]) == ["zero-shot", method]
            summary = json.loads((tmp_path / "harness" / "summary.json").read_text())
            row = next(c for c in summary["cells"] if c["method"] == method and c["kind"] == "shuffled")
            assert cell["methods"][method] == {k: row[k] for k in ("top1", "gain", "ece", "mean_confidence")}
            assert cell["ms_per_image"] > 0


def test_a_served_evaluation_prints_a_table(labelled: Path, server: Live) -> None:
    told = gram("evaluate", labelled, "--url", url(server), "--draws", "100")
    assert "labelled" in told.stdout
    assert "zero-shot" in told.stdout
    assert "infomax" in told.stdout


def test_an_evaluation_says_what_is_wrong(labelled: Path, server: Live, tmp_path: Path) -> None:
    gram("evaluate", labelled, "--url", url(server), "--local", code=2)
    gram("evaluate", tmp_path / "nowhere", "--url", url(server), code=2)
    gram("evaluate", labelled, "--url", url(server), "--frobnicate", "1", code=2)
    gram("evaluate", labelled, "--url", url(server), "--bins", "1", code=2)
    assert "64 images" in gram("evaluate", labelled, "--url", url(server), "--stream-size", "65", code=2).stderr
    gram("evaluate", labelled / "red", "--url", url(server), code=65)
    assert "no server answers" in gram("evaluate", labelled, "--url", nobody(), code=1).stderr
    (labelled / "red" / "bad.png").write_bytes(png()[:50])
    assert "undecodable_image" in gram("evaluate", labelled, "--url", url(server), code=1).stderr


# ---- bench, pull, tune, train ----


def test_a_benchmark_counts_what_became_of_every_request(server: Live, photos: Path) -> None:
    asked = ("bench", "--url", url(server), "--rate", "40", "--seconds", "0.5", "--images", photos / "more")
    told = json.loads(gram(*asked, "--json").stdout)
    assert told["requests"] == len(arrivals(40, 0.5, 0)) > 5
    assert told["statuses"] == {"200": told["requests"]}
    assert 0 < told["p50_ms"] <= told["p95_ms"] <= told["p99_ms"]
    assert told["goodput_per_s"] == told["offered_per_s"] == 2 * told["requests"]
    assert "p95_ms" in gram(*asked, "--batch", "2").stdout


def test_a_benchmark_tells_refusals_apart() -> None:
    outcomes = (
        [Outcome(200, ms, 0.1, 2) for ms in range(1, 101)] + [Outcome(429, 1, 0.1, 2)] * 3 + [Outcome(0, 9, 1, 2)]
    )
    told = report(outcomes, 10)
    assert (told["p50_ms"], told["p95_ms"], told["p99_ms"]) == (50.5, 95.0, 99.0)
    assert told["refused_429"] == 3
    assert told["statuses"] == {"200": 100, "429": 3, "no answer": 1}
    assert (told["goodput_per_s"], told["images_per_s"], told["offered_per_s"]) == (10.0, 20.0, 10.4)
    assert report([], 10)["p50_ms"] is None


def test_arrivals_are_poisson() -> None:
    times = arrivals(100, 100, 1)
    gaps = np.diff(times)
    assert abs(len(times) - 10_000) < 500  # five standard deviations
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as an exponential's
    assert times == sorted(times)
    assert len({bytes(picture) for picture in synthetic(32)}) == 16


def test_a_benchmark_says_what_is_wrong(server: Live, tmp_path: Path) -> None:
    gram("bench", "--url", url(server), "--rate", "0", code=2)
    gram("bench", "--url", url(server), "--seconds", "nan", code=2)
    gram("bench", "--url", url(server), "--images", tmp_path, code=2)
    gram("bench", "--url", url(server), "--images", tmp_path / "nowhere", code=2)
    assert "no server answers" in gram("bench", "--url", nobody(), "--seconds", "0.1", code=1).stderr


def test_pull_prints_the_hash_of_what_is_there(tiny_dir: Path) -> None:
    told = gram("pull", tiny_dir)
    assert told.stdout == f"{file_sha256(tiny_dir / 'open_clip_model.safetensors')}  {tiny_dir.name}\n"


@pytest.mark.parametrize("name", ["ViT-B-32/no-such-tag", "no-such-model", "hf-hub:nobody"])
def test_pull_says_why_it_can_not(name: str, tmp_path: Path) -> None:
    told = gram("pull", name, "--model-dir", tmp_path, code=65)
    assert told.stdout == ""
    assert len(told.stderr.strip().splitlines()) == 2


def test_pull_offline_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAM_OFFLINE", "true")
    assert "GRAM_OFFLINE" in gram("pull", "ViT-B-32/openai", "--model-dir", tmp_path, code=65).stderr


def test_tuning_says_that_it_does_not_exist() -> None:
    assert "does not exist yet" in gram("tune", "anything", "--at", "all", code=2).stderr


def test_training_is_the_modules(tmp_path: Path) -> None:
    gram("train", tmp_path / "nowhere.toml", code=2)


@pytest.mark.parametrize("command", ["classify", "evaluate", "bench", "pull", "tune", "train"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in gram(command, "--help").stdout or command == "train"


def test_importing_the_command_line_loads_no_torch() -> None:
    program = "import sys, server.cli; sys.exit(bool({'torch', 'open_clip', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_an_image_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    made: dict[str, Callable[[io.BytesIO], None]] = {
        "a.txt": lambda file: Image.new("RGB", (3, 3)).save(file, "JPEG"),
        "b": lambda file: Image.new("RGB", (3, 3)).save(file, "WEBP"),
    }
    for name, write in made.items():
        file = io.BytesIO()
        write(file)
        (tmp_path / name).write_bytes(file.getvalue())
    (tmp_path / "c.jpg").write_bytes(b"GIF89a")
    found = bulk.find([tmp_path])
    assert [path.name for path in found.images] == ["a.txt", "b"]
    assert [path.name for path in found.left_out] == ["c.jpg"]
