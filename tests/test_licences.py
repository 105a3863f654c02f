"""What is shipped is listed: the images' lock files, the SBOM and its table of licences say the same."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.utils import canonicalize_name

from tests.test_architecture import ROOT

DOCUMENT: dict[str, Any] = json.loads((ROOT / "docker" / "sbom.cdx.json").read_bytes())
LIBRARIES = {
    canonicalize_name(component["name"]): component
    for component in DOCUMENT["components"]
    if component["type"] == "library"
}
IMAGE = {"sys_platform": "linux", "platform_machine": "x86_64", "python_full_version": "3.11.2", "extra": ""}


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "requirements" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(name: str, everywhere: bool = False) -> dict[str, str]:
    """Versions of a lock file, of the image's platform unless of all."""
    rows = re.findall(
        r"^([\w.-]+)==([\w.]+)(?: ; (.*?))? \\$", (ROOT / "requirements" / name).read_text(), re.MULTILINE
    )
    return {
        package: version
        for package, version, marker in rows
        if everywhere or not marker or Marker(marker).evaluate(IMAGE)
    }


def test_the_sbom_lists_exactly_what_the_image_installs_with_every_hash(sbom: ModuleType) -> None:
    assert {name: each["version"] for name, each in LIBRARIES.items()} == locked("server.txt")
    hashes = sbom.hashes((ROOT / "requirements" / "server.txt").read_text())
    for name, component in LIBRARIES.items():
        assert [each["content"] for each in component["hashes"]] == hashes[name] != []
        assert component["licenses"], name


def test_the_images_install_the_versions_that_are_tested() -> None:
    tested = locked("lock.txt", everywhere=True)
    for name in ("server.txt", "ray.txt"):
        assert locked(name, everywhere=True).items() <= tested.items()
    assert locked("server.txt").items() <= locked("ray.txt").items()


def test_the_sbom_holds_the_bundled_model_file_by_file() -> None:
    (model,) = [each for each in DOCUMENT["components"] if each["type"] == "machine-learning-model"]
    listed = "".join(f"{file['hashes'][0]['content']}  {file['name']}\n" for file in model["components"])
    assert listed == (ROOT / "gram_core" / "assets" / "gram-mini" / "SHA256SUMS").read_text()


def test_the_table_of_licences_is_that_of_the_sbom(sbom: ModuleType) -> None:
    assert (ROOT / "docs" / "licences.md").read_text() == sbom.table(DOCUMENT)


def test_a_package_without_a_licence_stops_the_list(sbom: ModuleType) -> None:
    assert sbom.licences({"licenses": []}, "torchvision") == [{"license": {"id": "BSD-3-Clause"}}]
    with pytest.raises(SystemExit, match="nobody"):
        sbom.licences({}, "nobody-knows-it")


def test_code_and_bundled_model_have_their_own_licences_and_their_texts_are_here() -> None:
    rules = tomllib.loads((ROOT / "REUSE.toml").read_text())["annotations"]

    def licence(path: str) -> str:
        return str([r["SPDX-License-Identifier"] for r in rules if fnmatch(path, r["path"])][-1])

    used = {licence(path) for path in ("server/app.py", "README.md", "gram_core/assets/gram-mini/gram.safetensors")}
    assert licence("gram_core/backbone.py") == "Apache-2.0"
    assert licence("gram_core/assets/gram-mini/open_clip_model.safetensors") == "LicenseRef-gram-mini"
    assert {f"{name}.txt" for name in used} == {path.name for path in (ROOT / "LICENSES").iterdir()}
    assert (ROOT / "LICENSES" / "Apache-2.0.txt").read_text() == (ROOT / "LICENSE").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["license"].split(" AND ")) == used
