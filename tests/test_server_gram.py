"""GRAM over HTTP: which method a server has, why one has it not, what explains an answer, and what stops a start."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gram_core.backbone import Backbone, file_sha256, load
from gram_core.checkpoint import ARRAYS, HEADER
from gram_core.classifier import Classifier, Learned
from server.__main__ import main
from server.settings import read_settings
from tests.conftest import TINY, write_model
from tests.gram_fixtures import CONCEPT_NAMES, CONCEPTS, STEPS, VIEWS, tiny_learned, write_checkpoint
from tests.server_fixtures import Live, answered, b64, code, live, png

ROOT = Path(__file__).parents[1]
NAMES = ["cat", "dog", "fire truck", "a red bus", "house", "tree"]
LEARNED = ("bank.json", "bank.safetensors", HEADER, ARRAYS)
MOST = 8192  # bytes that explain one image
NO_CHECKPOINT = "no GRAM checkpoint lies beside this model"
IMAGES = [png(n, (40 + n, 36)) for n in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with root, bank and checkpoint."""
    made = write_model(tmp_path_factory.mktemp("models") / "learned", TINY, seed=3)
    write_checkpoint(made, load(str(made), device="cpu"))
    return made


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def plain_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its root alone."""
    made = tmp_path_factory.mktemp("plain") / "plain"
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns(*LEARNED))
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with live(fake=False, model=str(folder), device="cpu") as running:
        yield running


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> Iterator[Live]:
    with live(fake=False, model=str(plain_folder), device="cpu") as running:
        yield running


def results(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text[:500]
    found: list[dict[str, Any]] = answered(response).json()["results"]
    return found


def ask(server: Live, *images: bytes, **fields: Any) -> list[dict[str, Any]]:
    return results(server.ask(*images, **{"classes": NAMES, "top_k": None, **fields}))


def told(result: dict[str, Any], *without: str) -> str:
    """Everything said of an image but its place and what the clock said."""
    adaptation = {key: value for key, value in result["adaptation"].items() if key != "ms"}
    return json.dumps({**{k: v for k, v in result.items() if k not in ("index", *without)}, "adaptation": adaptation})


def assert_same(these: list[dict[str, Any]], those: list[dict[str, Any]]) -> None:
    """The same answers bit for bit, and the same reasons but for the rounding of a matmul of another size."""
    assert [told(r, "explain") for r in these] == [told(r, "explain") for r in those]
    for a, b in ((x["explain"], y["explain"]) for x, y in zip(these, those, strict=True)):
        assert a["views"] == b["views"]
        near, far = ({p["name"]: p["weight"] for p in why["prototypes"]} for why in (a, b))
        assert near == pytest.approx(far, abs=1e-5)
        rest = [{k: v for k, v in why.items() if k not in ("views", "prototypes")} for why in (a, b)]
        assert rest[0] == pytest.approx(rest[1], abs=1e-5)


# ---- which method is served ----


def test_a_checkpoint_beside_the_model_makes_gram_the_default_and_is_named(server: Live, folder: Path) -> None:
    info = server.client.get("/info").json()["model"]
    digest = file_sha256(folder / ARRAYS)
    assert info["default_method"] == "gram"
    assert info["methods"] == ["gram", "infomax", "tpt", "none"]
    assert (info["checkpoint_sha256"], info["checkpoint_note"]) == (digest, None)
    assert (info["defaults"]["gram"]["steps"], info["defaults"]["gram"]["views"]) == (STEPS, VIEWS)
    answer = answered(server.ask(*IMAGES[:8])).json()
    assert answer["model"]["checkpoint_sha256"] == digest
    assert {r["adaptation"]["method"] for r in answer["results"]} == {"gram"}
    assert {r["adaptation"]["scope"] for r in answer["results"]} == {"batch"}
    assert server.metric("gram_info", checkpoint=digest[:12]) == 1
    assert server.metric("gram_adaptation_total", method="gram", scope="batch", status="completed") >= 8


def test_without_a_checkpoint_infomax_is_served_and_the_reason_is_told(plain: Live) -> None:
    info = plain.client.get("/info").json()["model"]
    assert info["default_method"] == "infomax"
    assert info["methods"] == ["infomax", "tpt", "none"]
    assert (info["checkpoint_sha256"], info["checkpoint_note"]) == (None, NO_CHECKPOINT)
    answer = answered(plain.ask(*IMAGES[:8])).json()
    assert answer["model"]["checkpoint_sha256"] is None
    assert {r["adaptation"]["method"] for r in answer["results"]} == {"infomax"}
    assert plain.metric("gram_info", checkpoint="none") == 1
    refused = plain.ask(*IMAGES[:8], adaptation={"method": "gram"})
    assert code(refused) == "method_unavailable"
    sentence = refused.json()["error"]["message"]
    assert sentence == f"gram is not served: {NO_CHECKPOINT}; choose infomax, tpt, none."
    plain.assert_well()


@pytest.mark.parametrize("learned", [True, False])
def test_the_start_is_logged_with_its_method_and_without_a_checkpoint_with_the_reason(
    learned: bool, folder: Path, plain_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.engine")
    with live(fake=False, model=str(folder if learned else plain_folder), device="cpu"):
        pass
    (ready,) = (f for r in caplog.records if (f := getattr(r, "fields", {})).get("phase") == "ready")
    assert ready["method"] == ("gram" if learned else "infomax")
    assert ready.get("checkpoint") == (file_sha256(folder / ARRAYS) if learned else None)
    assert ready.get("checkpoint_note") == (None if learned else NO_CHECKPOINT)


def test_the_operator_may_choose_another_default_than_gram(folder: Path) -> None:
    with live(fake=False, model=str(folder), device="cpu", default_method="infomax") as server:
        assert {r["adaptation"]["method"] for r in ask(server, *IMAGES[:8])} == {"infomax"}
        assert {r["adaptation"]["method"] for r in ask(server, *IMAGES[:8], adaptation={"method": "gram"})} == {"gram"}


def test_a_checkpoint_is_taken_from_where_the_setting_says_even_for_a_model_without_a_root(
    plain_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(plain_folder, bare, ignore=shutil.ignore_patterns("root.*"))
    made = write_checkpoint(tmp_path / "mine", backbone, seed=7)
    with live(fake=False, model=str(bare), device="cpu", checkpoint=tmp_path / "mine") as server:
        info = server.client.get("/info").json()["model"]
        assert (info["default_method"], info["checkpoint_sha256"]) == ("gram", made.sha256)
        assert {r["adaptation"]["method"] for r in ask(server, *IMAGES[:8])} == {"gram"}


def test_another_checkpoint_gives_other_answers(server: Live, folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, backbone, seed=7)
    with live(fake=False, model=str(folder), device="cpu", checkpoint=tmp_path) as other:
        theirs = ask(other, *IMAGES)
    ours = ask(server, *IMAGES)
    assert any(a["score"] != b["score"] for a, b in zip(ours, theirs, strict=True))
    assert [r["baseline"] for r in ours] == [r["baseline"] for r in theirs]


def test_the_setting_is_a_flag_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings([]).checkpoint is None
    monkeypatch.setenv("GRAM_CHECKPOINT", "~/mine")
    assert read_settings([]).checkpoint == Path("~/mine").expanduser()
    assert read_settings(["--checkpoint", "trained"]).checkpoint == Path("trained")
    monkeypatch.setenv("GRAM_CHECKPOINT", "")
    assert read_settings([]).checkpoint is None


# ---- a checkpoint that can't be loaded ----


class Never:
    """A timer that does not run: the server's last resort would end this process."""

    def __init__(self, *_: Any) -> None:
        self.daemon = False

    def start(self) -> None:
        pass


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Start with flags and end with 65; what its only line says."""
    monkeypatch.setattr("server.__main__.log_to_stderr", lambda *_: None)
    monkeypatch.setattr(threading, "Timer", Never)

    def start(*flags: str) -> str:
        ended = main(["--port", "0", "--device", "cpu", *flags])
        (line,) = capsys.readouterr().err.splitlines()
        last = json.loads(line)
        assert (ended, last["code"]) == (65, 65)
        return str(last["event"])

    return start


def _missing(_: Path) -> None:
    pass


def _of_another_model(there: Path) -> None:
    other = write_model(there.parent / "other", TINY, seed=4)
    write_checkpoint(there, load(str(other), device="cpu"))


def _spoilt(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(there: Path) -> None:
        model = write_model(there.parent / "same", TINY, seed=3)
        write_checkpoint(there, load(str(model), device="cpu"))
        change(there / name)

    return make


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _of_another_seed(bank: Path) -> None:
    model = write_model(bank.parent.parent / "again", TINY, seed=3)
    write_checkpoint(bank.parent / "other", load(str(model), device="cpu"), seed=1)
    for name in ("bank.json", "bank.safetensors"):
        shutil.copy(bank.parent / "other" / name, bank.parent / name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_missing, "holds no GRAM checkpoint. Name the folder that training wrote."),
        (_of_another_model, "was made for model"),
        (_spoilt(ARRAYS, _cut), "train it again"),
        (_spoilt(HEADER, _cut), "train it again"),
        (_spoilt(ARRAYS, Path.unlink), f"lacks {ARRAYS}"),
        (_spoilt("bank.safetensors", _cut), "the prototype bank of the checkpoint can't be used"),
        (_spoilt("bank.json", _of_another_seed), "was trained with another prototype bank"),
    ],
    ids=["missing", "other_model", "cut_weights", "cut_header", "half", "cut_bank", "other_bank"],
)
def test_a_checkpoint_that_cannot_be_loaded_stops_the_start_with_65_and_a_reason(
    make: Callable[[Path], None], said: str, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    make(tmp_path / "given")
    assert said in refused("--model", str(folder), "--checkpoint", str(tmp_path / "given"))


def test_so_does_one_beside_the_model_and_gram_as_the_default_without_one(
    folder: Path, plain_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    _cut(tmp_path / "model" / ARRAYS)
    assert "train it again" in refused("--model", str(tmp_path / "model"))
    sentence = refused("--model", str(plain_folder), "--default-method", "gram")
    assert sentence == f"gram is not served: {NO_CHECKPOINT}; choose infomax, tpt, none."


def test_the_process_exits_65_rather_than_serve_without_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    _cut(tmp_path / "model" / ARRAYS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAM_")}
    environment |= {"OMP_NUM_THREADS": "1", "GRAM_PORT": "0", "GRAM_DEVICE": "cpu"}
    environment |= {"GRAM_MODEL": str(folder), "GRAM_CHECKPOINT": str(tmp_path / "model")}
    command = [sys.executable, "-m", "server"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    lines = [json.loads(line) for line in ended.stderr.decode().splitlines()]
    assert ended.returncode == lines[-1]["code"] == 65
    assert "train it again" in lines[-1]["event"]
    assert not any("traceback" in line for line in lines)


# ---- scopes, isolation, do no harm ----


def test_a_batch_answer_is_independent_of_the_order_of_its_images(server: Live) -> None:
    straight = ask(server, *IMAGES, explain=True)
    assert any(r["predictions"] != r["baseline"]["predictions"] for r in straight)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(IMAGES))
        turned = ask(server, *(IMAGES[n] for n in order), explain=True)
        assert_same(turned, [straight[n] for n in order])


def test_scope_image_answers_each_image_as_if_it_were_alone(server: Live) -> None:
    together = ask(server, *IMAGES[:5], adaptation={"scope": "image"}, explain=True)
    assert {(r["adaptation"]["method"], r["adaptation"]["scope"]) for r in together} == {("gram", "image")}
    assert "completed" in {r["adaptation"]["status"] for r in together}
    assert any(r["predictions"] != r["baseline"]["predictions"] for r in together)
    alone = [ask(server, data, adaptation={"scope": "image"}, explain=True)[0] for data in IMAGES[:5]]
    assert_same(together, alone)


def test_a_small_request_is_zero_shot_unless_a_scope_is_asked_for(server: Live) -> None:
    (auto, *_), (asked, *_) = ask(server, *IMAGES[:3]), ask(server, *IMAGES[:3], adaptation={"scope": "batch"})
    assert (auto["adaptation"]["method"], auto["adaptation"]["reason"]) == ("gram", "too_few_images")
    assert auto["predictions"] == auto["baseline"]["predictions"]
    assert (asked["adaptation"]["scope"], asked["adaptation"]["status"]) == ("batch", "completed")
    (one,) = ask(server, IMAGES[0], adaptation={"scope": "batch"})
    assert one["adaptation"]["reason"] == "too_few_images"


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_the_baseline_is_what_none_returns_with_a_checkpoint_and_without(server: Live, plain: Live, scope: str) -> None:
    bare = [r["baseline"] for r in ask(plain, *IMAGES, adaptation={"method": "none"})]
    none = ask(server, *IMAGES, adaptation={"method": "none"})
    assert [r["baseline"] for r in none] == bare
    assert [r["predictions"] for r in none] == [b["predictions"] for b in bare]
    assert [r["baseline"] for r in ask(server, *IMAGES, adaptation={"scope": scope})] == bare
    told_why = ask(server, *IMAGES, adaptation={"method": "none"}, explain=True)
    assert [told(r, "explain") for r in told_why] == [told(r, "explain") for r in none]


def test_another_host_than_the_learned_one_is_tuned_without_gram_or_refused_in_words(server: Live) -> None:
    answered = ask(server, *IMAGES[:8], adaptation={"host": "coop"})
    assert {r["adaptation"]["method"] for r in answered} == {"infomax"}
    refused = server.ask(*IMAGES[:8], adaptation={"method": "gram", "host": "coop"})
    assert code(refused) == "method_unavailable"
    assert "gram was learned for host residual" in refused.json()["error"]["message"]


# ---- explanations ----


@pytest.mark.parametrize("adaptation", [{}, {"scope": "image"}, {"method": "infomax"}, {"method": "tpt", "views": 16}])
def test_an_explanation_changes_no_answer_and_is_null_unless_asked_for(
    server: Live, adaptation: dict[str, Any]
) -> None:
    silent, told_why = (ask(server, *IMAGES, adaptation=adaptation, explain=asked) for asked in (False, True))
    assert all(r["explain"] is None for r in silent)
    assert all(r["explain"] is not None for r in told_why)
    assert [told(r, "explain") for r in told_why] == [told(r, "explain") for r in silent]


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_gram_explains_views_prototypes_and_how_far_it_went(server: Live, scope: str) -> None:
    found = ask(server, *IMAGES, adaptation={"scope": scope}, explain=True)
    completed = [result for result in found if result["adaptation"]["status"] == "completed"]
    assert len(completed) >= 8
    for result in completed:
        why = result["explain"]
        assert len(why["views"]) == result["adaptation"]["views"] == VIEWS
        first, *crops = why["views"]
        assert (first["box"], first["flip"], first["kept"]) == (None, False, True)
        assert first["entropy"] == pytest.approx(result["adaptation"]["entropy_before"], abs=1e-5)
        assert all(len(crop["box"]) == 4 and min(crop["box"][2:]) > 0 for crop in crops)
        weights = [near["weight"] for near in why["prototypes"]]
        assert len({near["name"] for near in why["prototypes"]} & set(CONCEPT_NAMES)) == 5
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1 + 1e-5
        assert why["trust"] == 1.0
        assert 0 <= why["shift"] <= 2
        assert 0 <= why["skew"] <= 1
        assert 0 < why["structure_share"] < 1
        assert why["rho"] > 0
        assert why["prompt_shift"] > 0


def test_what_a_method_does_not_have_is_null(server: Live, plain: Live) -> None:
    (none,) = ask(server, IMAGES[0], adaptation={"method": "none"}, explain=True)
    why = none["explain"]
    assert [view["kept"] for view in why["views"]] == [False]
    assert why["shift"] is not None
    assert {why[name] for name in ("trust", "skew", "rho", "structure_share", "prompt_shift")} == {None}
    joint = ask(plain, *IMAGES, explain=True)[0]["explain"]
    assert joint["prototypes"] == []
    assert (joint["trust"], joint["shift"], joint["structure_share"]) == (None, None, None)
    assert joint["rho"] > 0
    (tpt,) = ask(plain, IMAGES[0], adaptation={"method": "tpt", "views": 30}, explain=True)
    assert sum(view["kept"] for view in tpt["explain"]["views"]) == tpt["adaptation"]["views_kept"] == 3


def test_json_form_and_query_ask_for_an_explanation_alike(server: Live) -> None:
    post, (data,) = server.client.post, IMAGES[:1]
    options = {"scope": "image", "seed": "5"}
    asked = {"classes": NAMES, "adaptation": {"scope": "image", "seed": 5}, "explain": True}
    query: Any = [*(("classes", name) for name in NAMES), *options.items(), ("explain", "true")]
    answers = [
        post("/classify", json={"images": [b64(data)], **asked}),
        post("/classify", files={"image": ("a", data)}, data={"classes": NAMES, **options, "explain": "true"}),
        post("/classify", files={"image": ("a", data), "request": (None, json.dumps(asked), "application/json")}),
        post("/classify", params=query, content=data, headers={"content-type": "image/png"}),
    ]
    assert len({told(results(answer)[0]) for answer in answers}) == 1
    assert results(answers[0])[0]["explain"]["prototypes"]


@pytest.mark.parametrize(
    "letter", ["\x01", *(pytest.param(letter, marks=pytest.mark.slow) for letter in ("n", "\U0001f600"))]
)
def test_an_explanation_fits_into_8_kib_whatever_prototypes_are_called(backbone: Backbone, letter: str) -> None:
    names = [str(c) + letter * 3000 for c in range(CONCEPTS)]
    learned = tiny_learned(backbone, names=names)
    with live(load=lambda: Classifier(backbone, learned.bank.root.visual, learned=learned)) as server:
        for adaptation in ({}, {"scope": "image"}, {"method": "tpt"}):
            response = server.ask(
                *(png(n, (990, 10)) for n in range(8)),
                classes=[f"class {n}" for n in range(200)],
                adaptation={**adaptation, "views": 128},
                explain=True,
            )
            for result in results(response):
                why = result["explain"]
                assert len(json.dumps(why, ensure_ascii=False).encode()) <= MOST
                assert len(why["views"]) == 64
                assert len({near["name"] for near in why["prototypes"]}) == 5
                assert all(len(near["name"]) == 80 and near["name"][-1] == "\u2026" for near in why["prototypes"])


def test_a_tuning_that_is_not_finite_is_explained_as_well(backbone: Backbone) -> None:
    learned = tiny_learned(backbone)
    broken = replace(learned.checkpoint, settings={**learned.checkpoint.settings, "lr": float("nan")})
    wild = Classifier(backbone, learned.bank.root.visual, learned=Learned(broken, learned.bank))
    with live(wild) as server:
        for result in ask(server, *IMAGES, explain=True):
            assert (result["adaptation"]["status"], result["adaptation"]["reason"]) == ("fallback", "not_finite")
            assert result["predictions"] == result["baseline"]["predictions"]
            assert result["explain"]["prompt_shift"] is None


def test_a_bad_image_beside_good_ones_has_no_explanation_and_leaves_theirs_alone(server: Live) -> None:
    images = [b64(data) for data in IMAGES]
    whole = ask(server, *IMAGES, explain=True)
    mixed = ask(server, images=[*images[:4], "????", *images[4:]], errors="per_item", explain=True)
    assert mixed[4]["explain"] is None
    assert_same(mixed[:4] + mixed[5:], whole)
