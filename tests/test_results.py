"""The record of results: written from its JSON, by recipes that exist."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import results
from gram_core.config import read
from gram_core.evaluate.methods import METHODS
from gram_core.evaluate.options import EvaluateConfig
from gram_core.evaluate.protocols import protocols

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("evaluate*.toml"))
SUMMARIES = sorted((ROOT / "benchmarks" / "results").glob("evaluate*.json"))


def test_the_record_says_what_its_json_says() -> None:
    result = subprocess.run([sys.executable, "benchmarks/results.py", "--check"], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


def test_the_estimates_for_large_corpora_are_those_of_the_benchmark() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    assert "\n".join(results.corpora(report["corpora"])) in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_run_of_the_harness(path: Path) -> None:
    config = read(EvaluateConfig, path, {"data": (Path("DIR"),)})
    assert set(config.methods) <= set(METHODS)
    assert protocols(config.protocols, config.kinds, config.sizes, config.stream_size)
    assert f"--recipe recipes/gram-mini/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda p: p.stem)
def test_every_recorded_table_has_its_recipe_and_was_made_by_it(path: Path) -> None:
    recipe = tomllib.loads((ROOT / "recipes" / "gram-mini" / f"{path.stem}.toml").read_text())
    summary = json.loads(path.read_text())
    assert summary["title"] == recipe["title"]
    rows = {m["name"] for m in summary["methods"] if not m["name"].startswith("gram:")}  # a checkpoint's own row
    assert rows == set(recipe["methods"])
    assert summary["settings"]["images"] == recipe["images"]
    assert "/" not in summary["command"].replace(f"recipes/gram-mini/{path.stem}.toml", "")
    for role in ("choosing", "reporting", "training"):
        named = {pattern for pattern, r in recipe["roles"].items() if r == role}
        assert bool(named) == any(s["role"] == role for s in summary["sets"])
