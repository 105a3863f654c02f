"""Every block of code in README and docs/ is run here as it stands, or is named with the test that runs it instead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gram_core.backbone import load
from prototypes.bank import Root, save_root
from tests.conftest import TINY, write_model
from tests.server_fixtures import Live, live

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that take minutes, or the machine as it is, and the test that runs them.
ELSEWHERE = {
    "make demo": "tests/test_demo.py",
    "make test": "what runs this",
    "make serve": "tests/test_server.py, tests/test_lifecycle.py",
    "make install": "what runs this",
    "make check": "what runs this",
    "make bench": "minutes of measuring",
    "make lock": "tests/test_supply_chain.py",
    "make audit": "asks the network",
    "make sbom": "tests/test_licences.py",
    "docker ": "tests/test_deployment.py, docker/check.py",
    "python docker/check.py": "needs root and a built image",
    ".venv/bin/python -m gram_core.evaluate": "tests/test_evaluate.py",
    "python -m gram_core.train": "tests/test_train.py",
    "GRAM_CHECKPOINT=OUT/checkpoint python -m server": "tests/test_server_gram.py",
    "torchrun": "tests/test_train.py",
    "gram doctor": "tests/test_doctor.py",
    "pip install": "what runs this",
    "serve ": "tests/test_ray.py",
    "ray ": "several machines; tests/test_ray.py has a local one",
    "kubectl ": "a Kubernetes cluster",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A real model: a tiny one with a root, so that images are tuned jointly."""
    folder = write_model(tmp_path_factory.mktemp("models") / "docs", TINY)
    visual = np.eye(1, TINY["embed_dim"], dtype=np.float32)[0]
    fingerprint = load(str(folder), device="cpu").fingerprint
    save_root(folder, Root(visual=visual, fingerprint=fingerprint, count=1, source="a unit vector"))
    with live(fake=False, model=str(folder), device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("reader")
    names = ["photos/cat.jpg", "photos/cup.jpg", "cat.jpg", "lunch.png", *(f"photos/{n}.jpg" for n in range(10))]
    for name in (*names, "labelled/cat/1.jpg", "labelled/cup/1.jpg"):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (60, 50, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def blocks() -> list[tuple[str, str, str]]:
    """(page and number, language, code)."""
    found = []
    for page in PAGES:
        for n, (language, code) in enumerate(BLOCK.findall(page.read_text())):
            found.append((f"{page.name} {n}", language, code))
    return found


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        fences = re.findall(r"^```.*$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0
        assert {fence[3:] for fence in fences[::2]} <= {"sh", "python", ""}, page.name


@pytest.mark.parametrize(("language", "code"), [b[1:] for b in blocks()], ids=[b[0] for b in blocks()])
def test_what_the_documents_show_runs(server: Live, place: Path, language: str, code: str) -> None:
    code = code.replace("localhost:8000", f"127.0.0.1:{server.port}")
    if language == "python":
        run([sys.executable, "-c", code], place, server)
        return
    for line in re.sub(r"\\\n", " ", code).splitlines():
        command = re.sub(r"\s+# .*$", "", line).strip()
        if not command or command.startswith("#") or any(command.startswith(known) for known in ELSEWHERE):
            continue
        run(["bash", "-c", command.replace("curl ", "curl -sS --fail-with-body --noproxy '*' ")], place, server)


def run(command: list[str], place: Path, server: Live) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    environment["GRAM_URL"] = f"http://127.0.0.1:{server.port}"  # of `gram`, where the page says nothing of it
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
