"""The harness as a whole, on small files and a tiny real CLIP: its table, its cache, its errors, and its parity."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from gram_core.backbone import load
from gram_core.classifier import Classifier
from gram_core.errors import InvalidConfig, InvalidData
from gram_core.evaluate import cells, methods
from gram_core.evaluate.__main__ import main, public
from gram_core.evaluate.features import PLAIN, Features, Views
from gram_core.evaluate.options import EvaluateConfig, open_sets
from gram_core.evaluate.run import evaluate
from gram_core.evaluate.store import Store, key_of
from prototypes.bank import Root, save_root
from tests.conftest import TINY, write_model
from tests.gram_fixtures import write_checkpoint
from tests.server_fixtures import b64, live

ROOT = Path(__file__).parents[1]
CLASSES = ("red", "green", "blue")


def picture(seed: int, colour: int, side: int = 40) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.eye(3)[colour] * 150 + rng.normal(60, 40, (side, side, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, each: int = 12) -> Path:
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for n in range(each):
            (folder / name / f"{n:02}.png").write_bytes(picture(100 * c + n, c))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with a root prototype, and a checkpoint with its bank, beside it."""
    folder = write_model(tmp_path_factory.mktemp("evaluate") / "tiny", TINY)
    backbone = load(str(folder), device="cpu")
    pixels = torch.from_numpy(np.random.default_rng(9).standard_normal((6, 3, 32, 32), dtype=np.float32))
    visual = F.normalize(backbone.encode_images(pixels).mean(0), dim=0).numpy()
    save_root(folder, Root(visual=visual, fingerprint=backbone.fingerprint, count=6, source="noise"))
    write_checkpoint(folder, backbone)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture
def options(model: Path, images: Path, tmp_path: Path) -> Callable[..., EvaluateConfig]:
    def make(**changes: Any) -> EvaluateConfig:
        given: dict[str, Any] = {
            "model": str(model),
            "data": (images,),
            "cache": tmp_path / "cache",
            "out": tmp_path / "out",
            "sizes": (8,),
            "stream_size": 8,
            "windows": 6,
            "draws": 100,
            "device": "cpu",
        }
        return EvaluateConfig(**(given | changes))

    return make


Make = Callable[..., EvaluateConfig]


def run(config: EvaluateConfig) -> dict[str, Any]:
    return evaluate(config, Console(file=io.StringIO()))


def cell(summary: dict[str, Any], method: str, protocol: str, kind: str) -> dict[str, Any]:
    (found,) = [c for c in summary["cells"] if (c["method"], c["protocol"], c["kind"]) == (method, protocol, kind)]
    return dict(found)


# ---- the table ----


FEW = ("zero-shot", "tpt", "infomax", "gram")


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(methods.METHODS), marks=pytest.mark.slow)])
def test_every_method_has_a_cell_in_every_protocol_that_it_fits(options: Make, names: tuple[str, ...]) -> None:
    summary = run(options(methods=names, windows=3, seeds=1))
    json.dumps(summary)
    protocols = {(c["protocol"], c["kind"]) for c in summary["cells"]}
    assert len(protocols) == 1 + 4 + 3
    for name in names:
        method = methods.METHODS[name]
        mine = [c for c in summary["cells"] if c["method"] == name]
        expected = protocols if method.unit == "image" else {p for p in protocols if p[0] != "image"}
        assert {(c["protocol"], c["kind"]) for c in mine} == expected, name
        for c in mine:
            assert 0 <= c["top1"] <= 100
            assert 0 <= c["ece"] <= 100
            assert c["gain"]["low"] <= c["gain"]["mean"] <= c["gain"]["high"]
            if method.unit != "image" and c["protocol"] == "batch":
                assert c["ms"]["adapt"] > 0
    rows = {row["name"]: row for row in summary["methods"]}
    assert rows["zero-shot"]["image_passes"] == 1
    assert rows["tpt"]["image_passes"] == 64
    assert rows["infomax"]["image_passes"] == 8
    # by hand: 5 tokens of width 64, 2 layers of 24 W^2 n + 4 n^2 W, 4 patches of 3 x 16 x 16, projection to 32
    tower = 2 * (24 * 64**2 * 5 + 4 * 25 * 64) + 2 * 4 * 64 * 3 * 16**2 + 2 * 64 * 32
    assert summary["model"]["gflops_image"] == pytest.approx(tower / 1e9, rel=0.05)
    assert 64 * tower / 1e9 < rows["tpt"]["gflops"] < 200 * tower / 1e9
    assert 8 * tower / 1e9 < rows["infomax"]["gflops"] < 9 * tower / 1e9


def test_zero_shot_is_what_the_classifier_says(options: Make, model: Path, images: Path) -> None:
    summary = run(options(methods=("zero-shot",), protocols=("image",)))
    classifier = Classifier.load(str(model), device="cpu")
    from gram_core.images import decode

    classes = classifier.class_set(sorted(CLASSES))
    right = 0
    for c, name in enumerate(sorted(CLASSES)):
        prepared = [classifier.prepare(decode(p.read_bytes())) for p in sorted((images / name).iterdir())]
        plan = classifier.plan(methods.Tuning(method="none"), len(prepared), classes)
        right += sum(int(r.scores().argmax()) == c for r in classifier.classify(prepared, classes, plan).results)
    assert cell(summary, "zero-shot", "image", "each")["top1"] == pytest.approx(100 * right / 36, abs=0.01)


def test_per_image_answers_do_not_depend_on_the_protocol(options: Make) -> None:
    config = options(methods=("zero", "tpt"), protocols=("image", "stream"), predictions=True)
    run(config)
    lines = [json.loads(line) for line in (config.out / "predictions.jsonl").read_text().splitlines()]
    said: dict[tuple[str, str], set[tuple[str, float]]] = {}
    for line in lines:
        said.setdefault((line["method"], line["image"]), set()).add((line["answer"], line["score"]))
    assert len(said) == 3 * 36
    assert all(len(answers) == 1 for answers in said.values())


def test_a_larger_model_stands_beside_the_methods(options: Make, tmp_path: Path) -> None:
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "width": 96, "layers": 3}}
    larger = write_model(tmp_path / "wide", wide, seed=1)
    summary = run(options(methods=("zero-shot",), larger=str(larger)))
    assert summary["larger"]["gflops_image"] > summary["model"]["gflops_image"]
    (row,) = [m for m in summary["methods"] if m["name"] == "larger"]
    assert row["gflops"] >= summary["larger"]["gflops_image"]  # comparing with three class texts is below the rounding
    assert {c["protocol"] for c in summary["cells"] if c["method"] == "larger"} == {"image", "batch", "stream"}


def test_roles_decide_which_mean_a_set_enters(options: Make, tmp_path: Path, images: Path) -> None:
    other = write_images(tmp_path / "others" / "more")
    third = write_images(tmp_path / "seen")
    summary = run(
        options(
            data=(images, other, third),
            methods=("zero-shot",),
            protocols=("image",),
            roles={"colours": "choosing", "seen": "training"},
        )
    )
    assert {s["name"]: s["role"] for s in summary["sets"]} == {
        "colours": "choosing",
        "more": "reporting",
        "seen": "training",
    }
    assert {m["role"]: m["sets"] for m in summary["means"]} == {"all": 2, "choosing": 1, "reporting": 1}


def test_training_sets_enter_nothing_that_is_shown_over_all_sets(options: Make, tmp_path: Path, images: Path) -> None:
    seen = write_images(tmp_path / "seen")
    given = {"methods": ("stata",), "protocols": ("batch",), "kinds": ("iid", "single")}
    alone = run(options(data=(images,), **given))
    both = run(options(data=(images, seen), roles={"seen": "training"}, **given))
    for name in ("skew", "reliability", "means"):
        assert both[name] == alone[name]
    assert sum(b["windows"] for b in alone["skew"][0]["bins"]) == 12
    only = run(options(data=(seen,), roles={"seen": "training"}, **given))
    assert only["skew"]
    assert only["means"] == []


def test_cells_of_much_shorter_requests_say_so_and_enter_no_mean(options: Make) -> None:
    summary = run(options(methods=("stata",), protocols=("batch",), kinds=("iid", "single"), sizes=(8, 32)))
    sizes = {(c["kind"], c["size"]): c["mean_size"] for c in summary["cells"]}
    assert sizes == {("iid", 8): 8, ("iid", 32): 32, ("single", 8): 8, ("single", 32): 12}
    assert {(m["kind"], m["size"]) for m in summary["means"]} == set(sizes) - {("single", 32)}


def test_the_texts_and_the_crops_are_the_same_for_every_row(options: Make) -> None:
    single = run(options(methods=("ensemble",), protocols=("image",)))
    seven = run(options(methods=("ensemble",), protocols=("image",), templates=("simple",)))
    ours = cell(seven, "zero-shot", "image", "each")
    assert (ours["top1"], ours["ece"]) == tuple(cell(single, "ensemble", "image", "each")[k] for k in ("top1", "ece"))
    chosen: dict[str, Any] = {"methods": ("tpt", "infomax"), "protocols": ("batch",), "kinds": ("iid",), "windows": 1}
    mild = run(options(**chosen, crops="mild", seeds=1))
    assert [m["crops"] for m in mild["methods"]] == ["original", "mild", "mild"]


def test_corruptions_are_sets_of_their_own(options: Make) -> None:
    summary = run(options(methods=("zero-shot",), protocols=("image",), corrupt=("fog@3", "contrast@5")))
    assert [s["name"] for s in summary["sets"]] == ["colours", "colours+fog@3", "colours+contrast@5"]
    assert summary["sets"][1]["corruption"] == {"of": "colours", "name": "fog", "severity": 3}
    alone = run(options(methods=("zero-shot",), protocols=("image",), corrupt=("fog@3",), clean=False))
    assert [c["top1"] for c in alone["cells"]] == [c["top1"] for c in summary["cells"] if "fog" in c["set"]]


def test_a_set_may_be_called_anything_that_a_folder_may(options: Make, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "cats+dogs [2024] 50%@home", each=3)
    given = {"data": (folder,), "methods": ("zero-shot",), "protocols": ("image",), "corrupt": ("contrast@5",)}
    summary = run(options(sets=(folder.name,), roles={folder.name: "choosing"}, **given))
    assert [(s["role"], s["corruption"]) for s in summary["sets"]] == [
        ("choosing", None),
        ("choosing", {"of": folder.name, "name": "contrast", "severity": 5}),
    ]


# ---- nothing is computed twice, nothing is lost ----


def figures(summary: dict[str, Any]) -> list[Any]:
    return [{k: v for k, v in c.items() if k != "ms"} for c in summary["cells"]]


def test_a_second_run_answers_from_the_cache_and_says_the_same(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(methods=("stata", "tda", "infomax"), kinds=("iid",), windows=3)
    first = run(config)
    calls: list[int] = []
    monkeypatch.setattr(Features, "_compute", lambda *_: calls.append(1) or {})
    monkeypatch.setattr(cells.Cells, "_requests", lambda *_: pytest.fail("answered again"))
    again = run(config)
    assert figures(again) == figures(first)
    assert sum(calls) == 0


def test_fresh_answers_are_the_kept_ones(options: Make) -> None:
    chosen: dict[str, Any] = {"methods": ("stata", "infomax"), "kinds": ("iid",), "windows": 3}
    assert figures(run(options(**chosen))) == figures(run(options(**chosen, fresh=True)))


def test_answers_of_other_code_are_not_read_back(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(methods=("zero-shot",), protocols=("image",))
    run(config)
    monkeypatch.setattr(cells, "code_hash", lambda: "another")
    asked: list[int] = []
    original = cells.Cells._requests
    monkeypatch.setattr(cells.Cells, "_requests", lambda *a: asked.append(1) or original(*a))
    run(config)
    assert asked


def test_the_hash_of_the_code_leaves_out_nothing_that_methods_or_features_import() -> None:
    package = ROOT / "gram_core"
    todo, seen = [package / "evaluate" / "methods.py", package / "evaluate" / "features.py"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        text = path.read_text()
        named = re.findall(r"from (gram_core[\w.]*) import ([^(\n]+|\([^)]*\))", text)
        for module, names in named:
            folder = ROOT / module.replace(".", "/")
            for found in (folder.with_suffix(".py"), *(folder / f"{n.strip()}.py" for n in names.split(","))):
                if found.exists() and found not in seen:
                    todo.append(found)
    inside = {path.stem for path in seen if path.parent.name == "evaluate"}
    assert {"methods", "features", "labelled", "store"} == inside
    assert inside & set(cells.ASIDE) == {"store"}  # where values are kept, not what they are
    assert {"views", "images", "types", "baselines", "classifier"} <= {path.stem for path in seen}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(model: Path, images: Path, tmp_path: Path) -> None:
    words = ["--model", str(model), "--data", str(images), "--cache", str(tmp_path / "cache"), "--device", "cpu",
             "--out", str(tmp_path / "out"), "--methods", "zero,infomax", "--sizes", "8", "--windows", "8",
             "--stream-size", "8", "--draws", "100"]  # fmt: skip
    command = [sys.executable, "-m", "gram_core.evaluate", *words]
    store = tmp_path / "cache" / "evaluate.sqlite"

    def kept() -> int:
        try:
            with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as file:
                return int(file.execute("SELECT COUNT(*) FROM kept").fetchone()[0])
        except sqlite3.Error:
            return 0

    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while kept() < 36 * 3 + 4 and killed.poll() is None:  # features of 36 images in 3 kinds, and a few answers
        assert time.monotonic() < end
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out" / "summary.json").exists()
    before = kept()
    assert before >= 36 * 3
    assert main(words) == 0
    assert kept() > before
    resumed = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert main([*words, "--cache", str(tmp_path / "another")]) == 0
    assert figures(resumed) == figures(json.loads((tmp_path / "out" / "summary.json").read_text()))


def test_a_broken_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluate.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(InvalidData, match="Delete it, or name another folder with --cache"):
        Store(tmp_path / "evaluate.sqlite")


def test_the_store_keeps_all_of_a_batch_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({key_of("a", n=n): ({"n": n}, bytes([n])) for n in range(3)})
    with pytest.raises(TypeError):
        store.put({"x": ({}, b"1"), "y": ({"not json": object()}, b"2")})
    assert store.get([key_of("a", n=1), "x"]) == {key_of("a", n=1): ({"n": 1}, b"\1")}
    assert store.has(["x", "y"]) == set()
    assert key_of("a", n=1) != key_of("b", n=1) != key_of("a", n=2)


def test_features_of_another_model_or_a_stale_cache_are_not_used(model: Path, tmp_path: Path, options: Make) -> None:
    classifier = Classifier.load(str(model), device="cpu")
    (given,) = open_sets(options(), lambda _: None)
    store = Store(tmp_path / "s.sqlite")
    kind = Views(4, (0.5, 1.0), 0)
    features = Features(classifier, store, given)
    features.prepare([kind])
    features.measure(kind)
    rows = [features._key(i, kind) for i in features._identities]
    store.put({key: ({"sha256": "00" * 32}, np.ones((4, 32), dtype=np.float32).tobytes()) for key in rows})
    with pytest.raises(InvalidData, match="not what this version computes"):
        features.measure(kind)
    store.put({rows[0]: ({"sha256": "00" * 32}, b"cut")})
    with pytest.raises(InvalidData, match="cut off"):
        features.load([0], kind)
    other = Features(Classifier.load(str(write_model(tmp_path / "other", TINY, seed=5))), store, given)
    assert not store.has([other._key(i, PLAIN) for i in features._identities])


# ---- bad input ----


def test_an_image_that_cannot_be_decoded_is_counted_and_left_out(options: Make, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data" / "damaged", each=6)
    (folder / "red" / "00.png").write_bytes(picture(0, 0)[:90])
    (folder / "blue" / "01.png").write_bytes(b"no image at all")
    summary = run(options(data=(folder,), methods=("infomax",)))
    (shown,) = summary["sets"]
    assert shown["skipped"] == {"undecodable_image": 1, "unsupported_image_format": 1}
    assert (shown["images"], shown["of"]) == (16, 18)
    again = run(options(data=(folder,), methods=("infomax",)))
    assert again["sets"][0]["skipped"] == shown["skipped"]
    assert figures(again) == figures(summary)


def test_a_file_that_vanishes_is_counted_for_that_run_alone(options: Make, model: Path, tmp_path: Path) -> None:
    (given,) = open_sets(options(), lambda _: None)
    gone = {3}

    def read(row: int) -> bytes:
        if row in gone:
            raise FileNotFoundError
        return given.read(row)

    def identity(row: int) -> bytes:
        return bytes([row])  # known without a read: the file vanishes when it is decoded

    classifier, store = Classifier.load(str(model), device="cpu"), Store(tmp_path / "s.sqlite")
    for known in (None, identity):
        gone.add(3)
        lossy = dataclasses.replace(given, read=read, identity=known)
        features = Features(classifier, store, lossy)
        features.prepare([])
        assert dict(features.skipped) == {"unreadable_file": 1}
        assert len(features.labels) == 35
        assert given.keys[3] not in features.given.keys
        gone.clear()
        again = Features(classifier, store, lossy)
        again.prepare([Views(4, (0.5, 1.0), 0)])
        assert (len(again.labels), dict(again.skipped)) == (36, {})


def test_a_set_without_one_readable_image_is_an_error(options: Make, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "junk" / name).mkdir(parents=True)
        (tmp_path / "junk" / name / "x.png").write_bytes(b"junk")
    with pytest.raises(InvalidData, match=r"none of its 3 images can be read \(3 unsupported_image_format\)"):
        run(options(data=(tmp_path / "junk",)))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"data": ()}, InvalidConfig, "no --data"),
        ({"sets": ("colour",)}, InvalidData, "no set matches 'colour'; did you mean 'colours'"),
        ({"roles": {"nothing": "choosing"}}, InvalidData, "no set matches 'nothing'"),
        ({"methods": ("tptt",)}, InvalidConfig, "no method 'tptt'; did you mean tpt"),
        ({"templates": ("a photo",)}, InvalidConfig, "templates"),
        ({"corrupt": ("fogg@3",)}, InvalidConfig, "fog"),
        ({"suites": ("imagenet-b",)}, InvalidData, "imagenet-a"),
    ],
)
def test_a_wrong_option_is_explained(options: Make, changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run(options(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": -1}, "images is -1; it must be at least 0"),
        ({"sizes": (1,)}, "a batch has at least 2"),
        ({"crops": "wild"}, "choose own, strong or mild"),
        ({"roles": {"x": "testing"}}, "no role 'testing'"),
        ({"per_class": -3}, "per_class is -3"),
        ({"corrupt_seed": -1}, "corrupt_seed is -1"),
        ({"kinds": ("effective-10-2",)}, "no range of classes"),
        ({"kinds": ("effective-0-0",)}, "no range of classes"),
        ({"protocols": ("batch",), "kinds": ("effective-1-4",), "sizes": (8,)}, "no protocol is left"),
        ({"corrupt": ("fogg@3",)}, "fog"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_read(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        EvaluateConfig(**changes)


def test_a_method_that_the_model_lacks_the_parts_for_is_left_out_and_named(options: Make, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", TINY)
    summary = run(options(model=str(bare), methods=("infomax", "infomax-plain", "gram"), protocols=("batch",)))
    assert {m["name"] for m in summary["methods"]} == {"zero-shot", "infomax-plain"}
    first, second = summary["settings"]["left_out"]
    assert first == "method infomax: this model has no root prototype."
    assert second.startswith("method gram: ")


def test_one_class_is_an_error_that_says_what_to_do(options: Make, tmp_path: Path) -> None:
    (tmp_path / "one" / "red").mkdir(parents=True)
    (tmp_path / "one" / "red" / "x.png").write_bytes(picture(0, 0))
    with pytest.raises(InvalidData, match="at least 2"):
        run(options(data=(tmp_path / "one",)))


# ---- the command ----


def test_the_command_prints_the_table_and_writes_both_files(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(model), "--data", str(images), "--cache", str(tmp_path / "c"), "--out", str(out),
             "--methods", "zero,infomax", "--sizes", "8", "--windows", "3", "--draws", "100"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "ZERO" in shown
    assert "colours" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert str(tmp_path) not in json.dumps(summary)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "summary.json"]


def test_bad_data_ends_with_65_and_a_wrong_option_with_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), "--data", str(tmp_path / "nowhere")]) == 65
    assert "nowhere" in capsys.readouterr().err
    write_images(tmp_path / "small", each=2)
    words = ["--data", str(tmp_path / "small"), "--methods", "x", "--model", str(model), "--cache", str(tmp_path / "c")]
    assert main(words) == 2
    assert "no method 'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--windowz", "3"])
    assert ended.value.code == 2


def test_an_interrupted_command_says_how_to_go_on_and_spoils_no_file(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", str(model), "--data", str(images), "--cache", str(tmp_path / "c"), "--out", str(out),
             "--methods", "stata", "--sizes", "8", "--windows", "6", "--draws", "100", "--predictions"]  # fmt: skip
    assert main(words) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert sorted(before) == ["predictions.jsonl", "report.html", "summary.json"]
    answered = cells.Cells._requests
    calls: list[int] = []

    def interrupt(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(*given)

    monkeypatch.setattr(cells.Cells, "_requests", interrupt)
    assert main([*words, "--fresh"]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_the_command_in_the_report_names_no_folder_of_this_machine() -> None:
    here = f"{os.sep}a{os.sep}b"
    words = ["--model", here, "--data", here, "c/d.zip", "--methods", "tpt", "--out=x/y", "--title", "two words"]
    assert public(words) == (
        "python -m gram_core.evaluate --model b --data DIR --methods tpt --out=DIR --title 'two words'"
    )
    words = ["--checkpoint", here, "--checkpoints", f"seed-1={here}", "seed-2=c/d", "--methods", "gram"]
    assert public(words) == (
        "python -m gram_core.evaluate --checkpoint DIR --checkpoints seed-1=DIR seed-2=DIR --methods gram"
    )


# ---- parity with the server ----


def test_the_harness_and_the_server_give_the_same_answers(model: Path, images: Path, options: Make) -> None:
    config = options(
        methods=("infomax", "tpt-served"), kinds=("iid", "single"), protocols=("image", "batch"), predictions=True
    )
    run(config)
    lines = [json.loads(line) for line in (config.out / "predictions.jsonl").read_text().splitlines()]
    served = {"zero-shot": {"method": "none"}, "infomax": {"method": "infomax"},
              "tpt-served": {"method": "tpt", "scope": "image"}}  # fmt: skip
    requests: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["protocol"] == "batch":
            requests.setdefault((line["method"], line["kind"], line["request"]), []).append(line)
    assert len(requests) == 3 * 2 * 6
    changed = 0
    with live(load=lambda: Classifier.load(str(model), device="cpu")) as server:
        for (method, _, _), expected in requests.items():
            body = {
                "images": [b64((images / line["image"]).read_bytes()) for line in expected],
                "classes": sorted(CLASSES),
                "adaptation": served[method],
            }
            response = server.client.post("/classify", json=body)
            assert response.status_code == 200, response.text
            results = response.json()["results"]
            assert [r["label"] for r in results] == [line["answer"] for line in expected]
            assert [r["score"] for r in results] == pytest.approx([line["score"] for line in expected], abs=1e-6)
            changed += sum(r["adaptation"]["label_changed"] or r["adaptation"]["accepted"] for r in results)
    assert changed > 0  # tuning took part in what was compared


# ---- GRAM ----


def test_a_row_for_a_checkpoint_that_was_trained_otherwise(options: Make, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other, load(str(model), device="cpu"), seed=5)
    same = str(model)
    config = options(methods=("gram",), protocols=("batch",), checkpoints={"other": str(other), "same": same})
    rows = {c["method"]: c["top1"] for c in run(config)["cells"] if c["kind"] == "iid"}
    assert set(rows) == {"zero-shot", "gram", "gram:other", "gram:same"}
    assert rows["gram:same"] == rows["gram"]
    with pytest.raises(InvalidData, match="Name the folder that training wrote"):
        run(options(methods=("gram",), checkpoints={"none": str(tmp_path / "nowhere")}))
    bare = write_model(tmp_path / "bare", TINY)
    with pytest.raises(InvalidData, match="Name its --checkpoint as well"):
        run(options(model=str(bare), methods=("gram",), checkpoints={"other": str(other)}))


def test_images_that_training_saw_are_left_out_and_counted(options: Make, model: Path, tmp_path: Path) -> None:
    seen = model / "seen.json"
    try:
        seen.write_text(json.dumps({"seen": {"colours": ["red/00.png", "blue/03.png", "blue/gone.png"]}}))
        (given,) = open_sets(options(), lambda _: None)
        assert len(given) == 34
        assert not {"red/00.png", "blue/03.png"} & set(given.keys)
        assert "2 images that meta-training saw are left out." in given.notes
        assert len(open_sets(options(seen=""), lambda _: None)[0]) == 36
        (tmp_path / "seen.json").write_text(json.dumps({"seen": {"colours": ["red/00.png", "red/01.png"]}}))
        (given,) = open_sets(options(checkpoints={"other": str(tmp_path)}), lambda _: None)
        assert len(given) == 33  # what any row was trained on
        seen.write_text("{}")
        with pytest.raises(InvalidData, match="is no list of images"):
            open_sets(options(), lambda _: None)
    finally:
        seen.unlink()
    (given,) = open_sets(options(), lambda _: None)
    assert len(given) == 36
