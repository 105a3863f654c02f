"""What the server's image ships: docker/sbom.cdx.json in CycloneDX's form, docs/licences.md as a table.

    make sbom

Installs requirements/server.txt into an environment of its own, lets cyclonedx-py read names, versions, dependencies
and licences there, adds the hashes of the lock file and the files of the bundled model, and checks the result against
CycloneDX's schema. Raises SystemExit where a package declares no licence and none is known here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "server.txt"
SBOM = ROOT / "docker" / "sbom.cdx.json"
LICENCES = ROOT / "docs" / "licences.md"
MODEL = ROOT / "gram_core" / "assets" / "gram-mini"
KEPT = ("type", "bom-ref", "name", "version", "purl", "description", "licenses", "hashes")
# Packages whose metadata names none; looked up in the licence files that they carry.
UNDECLARED = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-cusparselt-cu13": "LicenseRef-NVIDIA-Proprietary",
    "protobuf": "BSD-3-Clause",
    "torchvision": "BSD-3-Clause",
}
# Old classifiers by the identifier that they mean where the package has only the classifier.
CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: Other/Proprietary License": "LicenseRef-NVIDIA-Proprietary",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment, found = Path(folder) / "venv", Path(folder) / "found.json"
        python = environment / "bin" / "python"
        run("uv", "venv", "--quiet", str(environment))
        run("uv", "pip", "install", "--quiet", "--python", str(python), "--require-hashes", "-r", str(LOCK))
        options = ["--output-reproducible", "--short-PURLs", "--pyproject", str(ROOT / "pyproject.toml")]
        run("cyclonedx-py", "environment", *options, "-o", str(found), str(python))
        document = json.loads(found.read_bytes())
    locked = hashes(LOCK.read_text())
    for component in document["components"]:
        name = re.sub(r"[-_.]+", "-", component["name"]).lower()
        component["licenses"] = licences(component, name)
        component["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in locked[name]]
    document["components"] = [{k: c[k] for k in KEPT if k in c} for c in document["components"]] + [model()]
    document["metadata"] = {"component": root(document), "properties": document["metadata"].get("properties", [])}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    check(text)
    SBOM.write_text(text)
    LICENCES.write_text(table(document))


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def hashes(lock: str) -> dict[str, list[str]]:
    """SHA-256 of every file that the lock file accepts, by package."""
    parts = re.findall(r"^([\w.-]+)==[^\n]*\\\n((?: +--hash=sha256:\w+[ \\]*\n?)+)", lock, re.MULTILINE)
    return {name: sorted(re.findall(r"sha256:(\w+)", listed)) for name, listed in parts}


def licences(component: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """One SPDX expression, or as many declared licences as there are."""
    declared = component.get("licenses", [])
    if declared and "expression" in declared[0]:
        return [{"expression": declared[0]["expression"]}]
    known = {entry["license"]["id"] for entry in declared if "id" in entry["license"]}
    if not known:
        names = [entry["license"]["name"] for entry in declared]
        known = {CLASSIFIERS.get(each, each) for each in names} or {UNDECLARED.get(name, "")}
    if "" in known:
        raise SystemExit(f"{name} declares no licence: look at its files and add it to UNDECLARED.")
    return [{"license": {"id" if identified(each) else "name": each}} for each in sorted(known)]


def identified(name: str) -> bool:
    return not name.startswith("LicenseRef-")


def model() -> dict[str, Any]:
    """The bundled weights, checkpoint and bank."""
    sums = [line.split() for line in (MODEL / "SHA256SUMS").read_text().splitlines()]
    return {
        "type": "machine-learning-model",
        "bom-ref": "gram-mini",
        "name": "gram-mini",
        "description": "The bundled model, its GRAM checkpoint and prototype bank; see its MODEL_CARD.md",
        "licenses": [{"license": {"name": "LicenseRef-gram-mini"}}],
        "components": [
            {
                "type": "file",
                "bom-ref": f"gram-mini/{name}",
                "name": name,
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for digest, name in sums
        ],
    }


def root(document: dict[str, Any]) -> dict[str, Any]:
    """The product itself."""
    component = {k: v for k, v in document["metadata"]["component"].items() if k in KEPT}
    component["licenses"] = [{"expression": "Apache-2.0 AND LicenseRef-gram-mini"}]
    return component


def check(text: str) -> None:
    """Against CycloneDX's own schema; raises SystemExit."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    version = SchemaVersion.from_version(json.loads(text)["specVersion"])
    if wrong := JsonStrictValidator(version).validate_str(text):
        raise SystemExit(f"not a CycloneDX document: {wrong}")


def table(document: dict[str, Any]) -> str:
    """docs/licences.md: what `REUSE.toml` says of our files, and the packages."""
    rows = [
        (c["name"], c.get("version", ""), told(c["licenses"])) for c in document["components"] if c["type"] == "library"
    ]
    packages = "\n".join(f"| {name} | {version} | {licence} |" for name, version, licence in sorted(rows, key=lower))
    return HEAD + packages + "\n"


def lower(row: tuple[str, ...]) -> str:
    return row[0].lower()


def told(entries: list[dict[str, Any]]) -> str:
    return ", ".join(e.get("expression") or e["license"].get("id") or e["license"]["name"] for e in entries)


HEAD = """# Licences of what is shipped

Made by `make sbom`, which writes the same as a CycloneDX document with hashes, `docker/sbom.cdx.json`.

## Files of this repository

`REUSE.toml` gives every file its licence in the form of the [REUSE specification](https://reuse.software/spec/);
`make audit` checks that none is left out.

| Files | Licence |
|---|---|
| code, tests, recipes, benchmarks, documents, the web page, the dashboard | Apache-2.0, `LICENSES/Apache-2.0.txt` |
| `gram_core/assets/gram-mini/`: weights, checkpoint, prototype bank and their lists | LicenseRef-gram-mini, \
`LICENSES/LicenseRef-gram-mini.txt`: trained in part on images for non-commercial research; the model card beside them |
| `tests/data/baselines.json`: outputs of the functions of others | Apache-2.0, with the credit in `NOTICE` |

The wheel and the image hold `gram_core`, `prototypes` and `server` of these, with `LICENSE`, `NOTICE` and `LICENSES/`.

## Python packages of the image

As the packages declare it; their own texts lie beside them in the image. NVIDIA's libraries come as dependencies of
torch and faiss, under NVIDIA's licence for the redistributable parts of CUDA; a CPU does not need them, but they come
with the same wheels. The Debian packages below them (Python and what it needs) have their licences in the image, in
`/usr/share/doc/*/copyright`. The `ray` image adds what `requirements/ray.txt` has beyond these.

| Package | Version | Licence |
|---|---|---|
"""

if __name__ == "__main__":
    sys.exit(main())
