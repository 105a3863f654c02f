"""What may be installed, what a file may do and what the code may not say.

The gates over imports and calls that could run code are in `tests/test_architecture.py`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gram_core.checkpoint import load_checkpoint
from gram_core.errors import GramError, InvalidCheckpoint
from prototypes import store
from prototypes.bank import load_bank, load_root
from tests.server_fixtures import live, until
from tests.test_architecture import PACKAGES, PYPROJECT, ROOT, SHIPPED, dotted

LOCK = (ROOT / "requirements" / "lock.txt").read_text()
DEPENDENCIES = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
EXTRAS = [Requirement(line) for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines]

# ---- versions ----

# The last version that must not be used, and why: advisories, or an interface that does not exist in it.
TOO_OLD = {
    "starlette": ("1.5.99", "CVE-2026-54283, PYSEC-2026-248, CVE-2026-48817, CVE-2026-48710, CVE-2025-62727"),
    "fastapi": ("0.164.99", "switches for telemetry, redirects and the size of a body"),
    "python-multipart": ("0.0.30", "CVE-2026-53540, -53537, -53538, -42561, -40347"),
    "pillow": ("12.99", "CVE-2026-59197 to -59200, -55798; the latest release alone is supported"),
    "torch": ("2.9.99", "CVE-2026-24747, CVE-2025-32434"),
    "ray": ("2.53.99", "CVE-2026-27482"),
}
# Subclassed, or read inside: an upgrade is a change of its own, so the next version must not be taken by itself.
PINNED = {
    "uvicorn": "minor",
    "httptools": "minor",
    "open_clip_torch": "exact",
    "safetensors": "exact",
    "faiss-gpu": "exact",
    "faiss-cpu": "exact",
}


def requirement(name: str) -> Requirement:
    (found,) = (r for r in [*DEPENDENCIES, *EXTRAS] if canonicalize_name(r.name) == canonicalize_name(name))
    return found


@pytest.mark.parametrize("name", TOO_OLD)
def test_no_version_with_a_known_fault_may_be_installed(name: str) -> None:
    version, why = TOO_OLD[name]
    assert not requirement(name).specifier.contains(version, prereleases=True), why


@pytest.mark.parametrize("name", PINNED)
def test_what_is_read_inside_is_not_upgraded_by_itself(name: str) -> None:
    specifier = requirement(name).specifier
    pins = [s for s in specifier if s.operator in ("==", "~=")]
    assert len(pins) == 1, f"{name} has no pin"
    major, minor, patch = (*Version(pins[0].version).release, 0, 0)[:3]
    assert not specifier.contains(f"{major}.{minor + 1}.0")
    assert specifier.contains(f"{major}.{minor}.{patch + 1}") == (PINNED[name] == "minor")


def installed(needed: Requirement) -> str | None:
    try:
        return importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("needed", [*DEPENDENCIES, *EXTRAS], ids=lambda needed: needed.name)
def test_what_is_installed_and_what_is_locked_is_what_is_asked_for(needed: Requirement) -> None:
    if needed.marker is not None and not needed.marker.evaluate():
        return
    found = installed(needed)
    assert found is not None or needed not in DEPENDENCIES
    assert found is None or needed.specifier.contains(found, prereleases=True), f"{needed.name} {found}"
    locked = re.findall(rf"^{canonicalize_name(needed.name)}==(\S+)", LOCK, re.MULTILINE)
    assert locked or needed not in DEPENDENCIES
    assert all(needed.specifier.contains(version, prereleases=True) for version in locked), locked


# ---- files that would run code ----


class Marker:
    """Pickles to something that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def raw(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Marker(marker)}))


def zipped(path: Path, marker: Path) -> None:
    torch.save({"state_dict": Marker(marker)}, path)


def legacy(path: Path, marker: Path) -> None:
    torch.save({"state_dict": Marker(marker)}, path, _use_new_zipfile_serialization=False)


def array(path: Path, marker: Path) -> None:
    with path.open("wb") as file:  # np.save would add a suffix
        np.save(file, np.array([Marker(marker)], dtype=object), allow_pickle=True)


FORGERIES: list[Callable[[Path, Path], None]] = [raw, zipped, legacy, array]
WEIGHTS = "open_clip_model.safetensors"
BUNDLED = ROOT / "gram_core" / "assets" / "gram-mini"


def test_the_forgeries_do_what_they_are_meant_to(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for forge in FORGERIES:
        forge(tmp_path / "file", marker)
        if forge is raw:
            pickle.loads((tmp_path / "file").read_bytes())
        elif forge is array:
            np.load(tmp_path / "file", allow_pickle=True)
        else:
            torch.load(tmp_path / "file", weights_only=False)
        marker.rmdir()


def refused(folder: Path, **settings: Any) -> GramError:
    """Start a server on the model in `folder`; why its engine ended. `GramError` is exit code 65."""
    with live(fake=False, wait=False, model=str(folder), device="cpu", **settings) as server:
        until(lambda: server.service.engine.failure is not None, "it is refused", patience_s=60)
        failure = server.service.engine.failure
        assert server.client.get("/readyz").status_code == 503
    assert isinstance(failure, GramError), repr(failure)
    return failure


@pytest.mark.parametrize("forge", FORGERIES)
def test_a_pickle_under_the_name_of_weights_is_refused_and_never_run(
    tmp_path: Path, tiny_dir: Path, forge: Callable[[Path, Path], None]
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_dir, folder)
    forge(folder / WEIGHTS, marker)
    refused(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["open_clip_model.pt", "open_clip_pytorch_model.bin", "pytorch_model.pth", "weights.ckpt"]
)
def test_weights_in_a_pickle_are_never_taken_for_want_of_others(tmp_path: Path, tiny_dir: Path, name: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_dir, folder)
    (folder / WEIGHTS).unlink()
    zipped(folder / name, marker)
    assert "Pickled weights (.bin, .pt, .pth) are never read" in refused(folder).message
    assert not marker.exists()


READERS: dict[str, Callable[[Path, str], Any]] = {
    "gram": lambda folder, fingerprint: load_checkpoint(folder, fingerprint=fingerprint),
    "bank": lambda folder, fingerprint: load_bank(folder, fingerprint=fingerprint),
    "root": lambda folder, fingerprint: load_root(folder, fingerprint=fingerprint),
}


@pytest.mark.parametrize("forge", [raw, zipped])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_under_the_name_of_a_checkpoint_or_a_bank_is_refused_and_never_run(
    tmp_path: Path, forge: Callable[[Path, Path], None], name: str
) -> None:
    """Its header vouches for it: whoever can write one file can write two. A refusal at start is exit code 65."""
    marker, arrays, header = tmp_path / "marker", tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
    for path in (arrays, header):
        shutil.copy(BUNDLED / path.name, path)
    fingerprint = json.loads((BUNDLED / "root.json").read_text())["fingerprint"]
    assert READERS[name](tmp_path, fingerprint) is not None
    forge(arrays, marker)
    if name != "root":  # whose header holds no digest
        digest = hashlib.sha256(arrays.read_bytes()).hexdigest()
        header.write_bytes(store._text(json.loads(header.read_text())["header"] | {"arrays_sha256": digest}))
    with pytest.raises((InvalidCheckpoint, ValueError), match=r"root\.safetensors|not a readable safetensors file"):
        READERS[name](tmp_path, fingerprint)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("forge", FORGERIES)
def test_a_server_on_forged_weights_exits_65(
    tmp_path: Path, tiny_dir: Path, forge: Callable[[Path, Path], None]
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_dir, folder)
    forge(folder / WEIGHTS, marker)
    command = [sys.executable, "-m", "server", "--model", str(folder), "--device", "cpu", "--port", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert ended.returncode == 65, ended.stderr[-2000:]
    assert not marker.exists()


# ---- gates over the source ----

OWN_WORDS = {
    "message",
    "code",
    "index",
    "status",
    "status_code",
    "headers",
    "retry_after",
    "errors",
    "param",
    "envelope",
}
FOR_THE_OPERATOR = ("log.", "_refuse", "InvalidSettings")  # the log, the last line of a process, a refusal to start


def exceptions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, where it is bound) of every caught exception and of every parameter that is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in node.args.args:
                kind = ast.unparse(argument.annotation) if argument.annotation is not None else ""
                if re.fullmatch(r"\w*(Error|Exception)( \| None)?", kind):
                    yield argument.arg, node


def spoken(tree: ast.AST) -> Iterator[str]:
    """Wherever the text of an exception, or what it holds besides our own words, could get into an answer."""
    for name, scope in exceptions(tree):
        if isinstance(scope, ast.ExceptHandler) and for_the_operator(scope):
            continue
        for node in unless_told_to_the_operator(scope):
            match node:
                case ast.Call(func=ast.Name("str" | "repr" | "format" | "ascii"), args=[ast.Name(said), *_]):
                    found = said == name
                case ast.FormattedValue(value=ast.Name(said)):
                    found = said == name
                case ast.BinOp(op=ast.Mod(), right=right):
                    found = name in {n.id for n in ast.walk(right) if isinstance(n, ast.Name)}
                case ast.Attribute(value=ast.Name(said), attr=attribute):
                    found = said == name and attribute not in OWN_WORDS
                case _:
                    found = False
            if found:
                yield ast.unparse(node)


def for_the_operator(handler: ast.ExceptHandler) -> bool:
    """Whether all that a handler raises is a refusal to start."""
    raised = [ast.unparse(node.exc) for node in ast.walk(handler) if isinstance(node, ast.Raise) and node.exc]
    return bool(raised) and all(text.startswith("InvalidSettings(") for text in raised)


def unless_told_to_the_operator(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and ast.unparse(child.func).startswith(FOR_THE_OPERATOR):
            continue
        yield child
        yield from unless_told_to_the_operator(child)


def faults(tree: ast.AST) -> Iterator[str]:
    """What no file of the server may hold."""
    yield from spoken(tree)
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name | ast.alias) else ""
        if isinstance(node, ast.Attribute) and node.attr in ("url", "base_url", "url_for"):
            yield f"{text}: put together from what a client sent"
        if text.endswith("BaseHTTPMiddleware") or (isinstance(node, ast.Attribute) and node.attr == "middleware"):
            yield f"{text}: swallows disconnects, runs in another task"
        if isinstance(node, ast.Name) and node.id in ("format_exc", "format_exception", "print_exc"):
            yield text
        if isinstance(node, ast.Call):
            name, given = dotted(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name.endswith(".errors") and given.get("include_input") != "False":
                yield f"{name}() with the caller's input"
            if name.endswith((".format_map", "Template")) or (
                name.endswith(".format") and not name.startswith("self.")
            ):
                yield f"{name}(): a template of somebody else's"
            if name in ("os.system", "os.popen") or name.startswith(("subprocess.", "tempfile.", "webbrowser.")):
                yield f"{name}()"
            if name == "FastAPI" and not {"telemetry", "redirect_slashes", "docs_url", "redoc_url"} <= given.keys():
                yield "FastAPI() without its switches"
            if name == "FastAPI" and "True" in given.get("telemetry", ""):
                yield "FastAPI() that exports what the environment asks for"


# These speak to whoever starts the process, and answer nobody: our own errors' sentences are what they are for.
TO_THE_OPERATOR = {
    "__main__.py": {"str(error)", "error.strerror"},
    "cli.py": {"str(error)"},
    "doctor.py": {"str(error)", "error.strerror", "{error}"},
}
# The asking side, in the caller's own process: it has no answers to give, only what a server or a file told it.
ASKING = {"client.py", "commands.py", "bulk.py", "local.py", "scoring.py", "sheets.py", "sorting.py", "bench.py"}


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if p.parts[-2] == "server" and p.name not in ASKING], ids=lambda path: path.name
)
def test_no_answer_can_repeat_an_exception_or_what_a_client_sent(path: Path) -> None:
    assert set(faults(ast.parse(path.read_text()))) <= TO_THE_OPERATOR.get(path.name, set())


@pytest.mark.parametrize(
    "lines",
    [
        "try: f()\nexcept OSError as error: raise ApiError('x', str(error))",
        "try: f()\nexcept OSError as error: raise ApiError('x', f'{error}')",
        "try: f()\nexcept OSError as error: raise ApiError('x', f'it says {error!r}')",
        "try: f()\nexcept OSError as error: raise ApiError('x', '%s' % error)",
        "try: f()\nexcept OSError as error: raise ApiError('x', error.args[0])",
        "try: f()\nexcept OSError as error: raise ApiError('x', error.strerror)",
        "def answer(error: Exception): return JSONResponse({'detail': repr(error)})",
        "path = request.url.path",
        "self.base_url = request.base_url",
        "from starlette.middleware.base import BaseHTTPMiddleware",
        "@app.middleware('http')\nasync def f(request, call_next): ...",
        "error.errors(include_url=False)",
        "template.format(name)",
        "string.Template(text)",
        "subprocess.run(['x'])",
        "app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)",
        "FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False, telemetry={'auto_configure': True})",
    ],
)
def test_the_gate_closes(lines: str) -> None:
    assert list(faults(ast.parse(lines))) != []


@pytest.mark.parametrize(
    "lines",
    [
        "try: f()\nexcept OSError as error: log.error('%s', error)",
        "try: f()\nexcept GramError as error: raise ApiError(error.code, error.message)",
        "try: f()\nexcept OSError as error: raise InvalidSettings(f'it says {error.strerror}')",
        "try: f()\nexcept OSError as error: return _refuse(64, str(error))",
        "raise ApiError('x', f'{count} images')",
    ],
)
def test_the_gate_lets_our_own_words_through(lines: str) -> None:
    assert list(faults(ast.parse(lines))) == []


ANSWERED = (
    "InvalidImage",
    "InvalidClasses",
    "InvalidTuning",
    "MethodUnavailable",
)  # the core's, with a status below 500


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_answers_in_its_own_words_and_nobody_prints(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name, scope in exceptions(tree):
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and dotted(node.func) in ANSWERED:
                for inner in ast.walk(node):
                    assert not (isinstance(inner, ast.FormattedValue) and dotted(inner.value) == name), ast.unparse(
                        node
                    )
                    assert not (isinstance(inner, ast.Call) and dotted(inner.func) in ("str", "repr")), ast.unparse(
                        node
                    )
    prints = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) in ("print", "pprint")
    ]
    assert prints == [], "say it through the log, or through a console"


def test_the_packages_that_are_shipped_are_the_packages_that_are_watched() -> None:
    shipped = {pattern.rstrip("*") for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert shipped == set(PACKAGES)
    assert {path.relative_to(ROOT).parts[0] for path in SHIPPED} == set(PACKAGES)
