"""python -m gram_core.train: the whole way from pairs to a checkpoint, stopped anywhere, refused in words."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from gram_core import gram, meta, pairs, train, unseen
from gram_core.backbone import file_sha256, load
from gram_core.checkpoint import Checkpoint, load_checkpoint
from gram_core.config import BAD_DATA, INTERRUPTED, OK, USAGE, read
from gram_core.errors import GramError, InvalidConfig, InvalidData
from gram_core.train import TrainConfig, main, run
from prototypes.bank import load_bank
from tests.conftest import TINY, write_model
from tests.train_fixtures import write_recipe, write_things

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
FILES = ("bank.json", "bank.safetensors", "gram.json", "gram.safetensors", "seen.json")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    write_things(made / "data")
    write_recipe(made / "meta.toml")
    return made


def config(folder: Path, out: Path, model: Path, **options: Any) -> TrainConfig:
    given = {"model": str(model), "data": folder / "data", "out": out, "device": "cpu"}
    return read(TrainConfig, folder / "meta.toml", given | options)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def made(folder: Path, out: Path, model: Path, console: Console | None = None, **options: Any) -> Checkpoint:
    checkpoint = run(config(folder, out, model, **options), console or quiet())
    assert checkpoint is not None
    return checkpoint


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "checkpoint").iterdir())}


@pytest.fixture(scope="module")
def good(folder: Path, tiny_dir: Path) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made(folder, folder / "good", tiny_dir)
    torch.set_num_threads(threads)
    return folder / "good"


# ---- the whole way


def test_pairs_become_a_checkpoint_that_explains_itself(good: Path, tiny_dir: Path) -> None:
    fingerprint = load(str(tiny_dir), device="cpu").fingerprint
    checkpoint = load_checkpoint(good / "checkpoint", fingerprint=fingerprint)
    bank = load_bank(good / "checkpoint", fingerprint=fingerprint)
    assert checkpoint is not None
    assert bank is not None
    assert tuple(content(good)) == FILES
    assert checkpoint.bank_sha256 == file_sha256(good / "checkpoint" / "bank.safetensors")
    assert set(checkpoint.params) == set(gram.init())
    assert checkpoint.regulator == "identity"
    settings = {"host": "residual", "steps": 3, "lr": 2e-4, "update": "rms", "root": True, "views": 3}
    assert checkpoint.settings == settings | {"view_scale": [0.85, 1.0], "prototypes": "real"}
    facts: Any = checkpoint.facts
    assert facts["config"]["meta"]["steps"] == 6
    assert facts["config"]["episodes"]["held_out"] == 0.4
    assert facts["pairs"]["pairs"] == 80
    assert facts["views"]["counts"]["plain"] == 80
    assert [look["step"] for look in facts["looks"]] == [0, 3, 6]
    assert not set(facts["training"]["nodes"]) & set(facts["held_out"]["nodes"])
    said = json.dumps(facts)
    assert str(good.parent) not in said  # no folder of this machine


def test_a_finished_run_is_left_alone(good: Path, folder: Path, tiny_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()}
    said = quiet()
    made(folder, good, tiny_dir, said)
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()} == before
    told = said.file.getvalue()  # type: ignore[attr-defined]
    assert [told.count(f"{name} is complete already") for name in ("features", "views", "tree", "checkpoint")] == [
        1
    ] * 4


class Stop(Exception):
    """Something that ends the run."""


STAGES: dict[str, tuple[Any, str]] = {
    "features": (pairs, "_finish"),
    "views": (unseen, "_finish"),
    "tree": (train, "save_bank"),
    "meta": (meta, "validate"),
    "checkpoint": (train, "save_checkpoint"),
}


def test_a_run_stopped_in_every_stage_goes_on_to_the_same_bytes(
    good: Path, folder: Path, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, (module, name) in STAGES.items():

        def stopped(*_: object, stage: str = stage, **__: object) -> None:
            raise Stop(stage)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopped)
            with pytest.raises(Stop, match=stage):
                made(folder, tmp_path / "out", tiny_dir)
    made(folder, tmp_path / "out", tiny_dir)
    assert content(tmp_path / "out") == content(good)


def test_a_checkpoint_that_was_stopped_half_way_is_written_again(
    good: Path, folder: Path, tmp_path: Path, tiny_dir: Path
) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(good), str(out)], check=True)
    (out / "checkpoint" / "gram.json").unlink()
    (out / "checkpoint" / "bank.json").unlink()
    made(folder, out, tiny_dir)
    assert content(out) == content(good)


def command(folder: Path, out: Path, model: Path) -> list[str]:
    words = [str(folder / "meta.toml"), "--model", str(model), "--data", str(folder / "data"), "--out", str(out)]
    return ["-m", "gram_core.train", *words, "--device=cpu"]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(
    good: Path, folder: Path, tmp_path: Path, tiny_dir: Path
) -> None:
    chance, out, kills = random.SystemRandom(), tmp_path / "out", 0
    whole = command(folder, out, tiny_dir)
    for _ in range(5):
        before = len(list(out.rglob("*")))
        child = subprocess.Popen([sys.executable, *whole], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(out.rglob("*"))) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.4))  # all of it takes a second when it is alone
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills
    subprocess.run([sys.executable, *whole], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    assert content(out) == content(good)


def torchrun(*program: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    start = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    whole = [sys.executable, "-m", "torch.distributed.run", *start, *program]
    return subprocess.run(whole, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(good: Path, folder: Path, tmp_path: Path, tiny_dir: Path) -> None:
    done = torchrun(*command(folder, tmp_path / "out", tiny_dir))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("meta-training: 6 of 6 steps") == 1
    assert content(tmp_path / "out") == content(good)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["features", "meta"])
def test_a_process_that_is_killed_is_started_again_and_the_bytes_are_those_of_an_undisturbed_run(
    good: Path, folder: Path, tmp_path: Path, tiny_dir: Path, stage: str
) -> None:
    out = tmp_path / "out"
    done = torchrun("-m", "tests.elastic_fixtures", stage, *command(folder, out, tiny_dir)[2:], restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert content(out) == content(good)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(good: Path, folder: Path, tmp_path: Path, tiny_dir: Path) -> None:
    for stage in ("features", "meta"):
        ended = torchrun("-m", "tests.elastic_fixtures", stage, *command(folder, tmp_path / "out", tiny_dir)[2:])
        assert ended.returncode == 1
    step = json.loads(safe_open(tmp_path / "out" / "meta" / meta.STATE, "pt").metadata()["state"])["step"]
    assert 0 < step < 6
    made(folder, tmp_path / "out", tiny_dir)
    assert content(tmp_path / "out") == content(good)


# ---- what is wrong is said


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"data": None}, InvalidConfig, "no --data"),
        ({"pairs": []}, InvalidConfig, "pairs is empty"),
        ({"pairs": ["nothing.tar"]}, InvalidData, r"nothing\.tar can't be found"),
        ({"unseen": []}, InvalidConfig, r"no image is known that the towers were not fitted on: held_out\.json is not"),
        ({"unseen": ["nobody"]}, InvalidData, "none of the 1 keys is there, the first is nobody"),
        ({"held_out": "open_clip_config.json"}, InvalidData, "is no list of held-out images"),
        ({"tree": {"seed": 1}}, InvalidData, "is the tree of other pairs or options"),
        ({"learner": {"lr": 1e-3}}, InvalidData, "a run with other data or options"),
        ({"meta": {"seed": 1}}, InvalidData, "a run with other data or options"),
        ({"episodes": {"least": 50}}, InvalidData, "0 concepts in 0 themes have 50 unseen images"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_words(
    good: Path, folder: Path, tiny_dir: Path, options: dict[str, Any], error: type[GramError], said: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()}
    with pytest.raises(error, match=said):
        run(config(folder, good, tiny_dir, **options), quiet())
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()} == before


def test_a_folder_of_another_model_is_refused(good: Path, folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", TINY, seed=5)
    with pytest.raises(GramError, match=r"features of model 'tiny'.*the loaded one is 'other'"):
        run(config(folder, good, other), quiet())


def test_the_models_own_list_of_held_out_images_is_used(folder: Path, tmp_path: Path, tiny_dir: Path) -> None:
    model = write_model(tmp_path / "tiny", TINY)
    (model / "held_out.json").write_text(json.dumps({"held_out": {"things": ["cat/001.png", "dog/002.png"]}}))
    asked = config(folder, tmp_path / "out", model, unseen=["things/egg/"])
    sources = pairs.open_sources(train._reading(asked, meta.World()))
    assert train._unseen_keys(asked, sources) == ["things/egg/", "cat/001.png", "dog/002.png"]
    assert train._unseen_keys(config(folder, tmp_path, tiny_dir), sources) == ["things/"]


# ---- the command


def test_the_command_ends_with_its_exit_code_and_says_what_it_did(
    good: Path, folder: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(folder, good, tiny_dir)[2:]
    assert main(words) == OK
    assert "weights, SHA-256" in capsys.readouterr().err
    assert main([*words, "--pairs", "gone.tar"]) == BAD_DATA
    assert "InvalidData" in capsys.readouterr().err
    for wrong in (
        ["--meta.steps", "0"],
        ["--meta.stepz=1"],
        ["--episodes.held_out=2"],
        ["--learner.regulator=pilot"],
        ["--tree.kind=bush"],
        ["--tree.themes=0"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, *wrong])
        assert ended.value.code == USAGE

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert main(words) == INTERRUPTED


def test_the_recipe_of_the_bundled_model_reads() -> None:
    recipe = read(TrainConfig, ROOT / "recipes" / "gram-mini" / "meta.toml", {})
    assert recipe.model == "gram-mini"
    assert recipe.pairs
    assert recipe.data is None
