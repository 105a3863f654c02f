"""What the repository promises about itself: imports, forbidden names, lock file, version, README."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gram_core

ROOT = Path(__file__).parents[1]
PACKAGES = ("gram_core", "prototypes", "server")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "shelve", "joblib", "marshal", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "faiss.read_index"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    """Everything that could run code found in a file, or open an image with any parser."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_forbidden(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module or ''}.{alias.name}" for alias in node.names)
            yield from filter(is_forbidden, names)
        elif isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {k.arg for k in node.keywords}
            if is_forbidden(name):
                yield name
            if "allow_pickle" in keywords:
                yield "allow_pickle"
            if f".{name}".endswith(".Image.open") and "formats" not in keywords:
                yield "Image.open without formats="


def is_forbidden(name: str) -> bool:
    return name in FORBIDDEN_CALLS or name.partition(".")[0] in FORBIDDEN_MODULES


def test_every_import_contract_holds() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("contract", "file", "violation"),
    [
        ("packages", "gram_core/adapt.py", "import server.errors"),
        ("gram_core", "gram_core/adapt.py", "from gram_core import classifier"),
        ("gram_core", "gram_core/utils.py", ""),
        ("server", "server/engine.py", "from server import app"),
        ("server", "server/utils.py", ""),
        ("prototypes", "prototypes/cluster.py", "from prototypes import bank"),
        ("prototypes", "prototypes/utils.py", ""),
        ("arrays", "prototypes/bank.py", "import torch"),
        ("wire", "gram_core/text.py", "from pydantic import BaseModel"),
        ("no-mathematics", "server/engine.py", "import torch"),
        ("open_clip", "gram_core/prompts/coop.py", "from open_clip import tokenize"),
    ],
)
def test_each_import_contract_has_teeth(tmp_path: Path, contract: str, file: str, violation: str) -> None:
    names = {c["id"]: c["name"] for c in PYPROJECT["tool"]["importlinter"]["contracts"]}
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in SHIPPED:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    with (tmp_path / file).open("a") as target:
        target.write(f"\n{violation}\n")
    result = lint_imports(tmp_path)
    broken = [line for line in result.stdout.splitlines() if "BROKEN" in line]
    assert result.returncode == 1
    assert len(broken) == 1, result.stdout + result.stderr
    assert broken[0].startswith(names[contract])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_code_can_not_run_what_a_file_says(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(path)",
        "np.load(path)",
        "read(path, allow_pickle=False)",
        "eval(text)",
        "PIL.Image.open(data)",
        "Image.open(data)",
    ],
)
def test_the_search_for_forbidden_names_finds_them(line: str) -> None:
    assert len(list(offences(ast.parse(line)))) == 1


def test_importing_the_wire_layer_loads_no_torch() -> None:
    # In a fresh process: this one has long imported torch.
    program = "import sys, server.app; sys.exit(bool({'torch', 'open_clip', 'timm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["lock.txt", "uv.txt"])
def test_every_locked_requirement_is_exact_and_hashed_and_names_no_host(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    requirements = text.replace("\\\n", " ").splitlines()
    assert requirements
    for requirement in requirements:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( ; [^#]+?)?( +--hash=sha256:[0-9a-f]{64})+", requirement), requirement


def test_the_lock_file_holds_every_dependency_of_the_project() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["otel"], *extras["dev"]]
    locked = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE))
    names = {re.split(r"[\[<>=~!; ]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= locked


def test_the_version_is_the_newest_of_the_changelog() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PYPROJECT["project"]["version"] == gram_core.__version__


def test_every_name_of_the_readme_tree_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Layout")[1].split("```")[1]
    folder, seen = Path(), 0
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name if name.endswith("/") else ROOT
            path = ROOT / name
        else:
            path = folder / name
        assert path.exists(), f"README names {path.relative_to(ROOT)}"
        seen += 1
    assert seen > 20
