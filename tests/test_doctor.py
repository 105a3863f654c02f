"""`gram` on the command line: what the doctor finds, what it says to do, and that serving starts from here too."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from gram_core.backbone import ASSETS, check_sums, choose_device
from gram_core.errors import ModelUnavailable
from gram_core.parity import TOLERANCE, parity
from gram_core.text import TextEncoder
from server import doctor
from server.auth import Keys
from server.cli import app
from server.service import load_classifier
from server.settings import Settings, usage
from tests.server_fixtures import until

ROOT = Path(__file__).parents[1]
CHECKS = ["settings", "versions", "keys", "port", "device", "files", "weights", "limits", "model", "parity"]
FEW_FILES = 300
LINE = re.compile(r"(ok  |FAIL|skip)  (\w+) +(\S.*)")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRAM_")]:
        monkeypatch.delenv(name)


def gram(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return result.output


def examined(folder: Path, *flags: str, code: int = 0) -> dict[str, tuple[str, str]]:
    """Status and message of each check, for a server on this model."""
    output = gram("doctor", "--model", str(folder), "--device", "cpu", "--port", "0", *flags, code=code)
    matches = [LINE.fullmatch(line) for line in output.splitlines()]
    assert all(matches), output
    return {m[2]: (m[1].strip(), m[3]) for m in matches if m is not None}


def with_sums(source: Path, target: Path) -> Path:
    """A copy of a model that has a SHA256SUMS."""
    shutil.copytree(source, target)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(target.iterdir())]
    (target / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return target


# ---- the doctor ----


def test_the_shipped_model_passes_every_check() -> None:
    report = json.loads(gram("doctor", "--json", "--port", "0", "--device", "cpu"))
    assert report["ok"] is True
    assert [(check["name"], check["status"]) for check in report["checks"]] == [(name, "ok") for name in CHECKS]
    said = {check["name"]: check["message"] for check in report["checks"]}
    listed = [path for path in (ASSETS / "gram-mini").iterdir() if path.name != "SHA256SUMS"]
    assert said["files"] == f"{len(listed)} files are as SHA256SUMS says"
    assert "gram-mini on cpu in float32, method gram" in said["model"]


def test_every_check_of_a_healthy_server_is_one_line_that_says_ok(tiny_dir: Path, tmp_path: Path) -> None:
    key, line = json.loads(gram("doctor", "--new-key", "team", "--json")).values()
    (tmp_path / "keys").write_text(line)
    folder = with_sums(tiny_dir, tmp_path / "model")
    found = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    told = examined(
        folder, "--api-keys-file", str(tmp_path / "keys"), "--weights-sha256", found, "--otlp-endpoint", "http://x"
    )
    assert {status for status, _ in told.values()} == {"ok"}
    assert list(told) == [*CHECKS[:4], "traces", *CHECKS[4:]]
    assert told["keys"][1] == "1 keys"
    assert key not in str(told)
    assert told["weights"][1] == f"{found}, as GRAM_WEIGHTS_SHA256 says"


Prepare = Callable[[Path, Path], list[str]]


def altered(folder: Path, _: Path) -> list[str]:
    with (folder / "open_clip_config.json").open("a") as file:
        file.write(" ")
    return []


def emptied(folder: Path, _: Path) -> list[str]:
    (folder / "open_clip_config.json").unlink()
    return []


def broken_weights(folder: Path, _: Path) -> list[str]:
    (folder / "SHA256SUMS").unlink()
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return []


def key_file(text: str | None) -> Prepare:
    def make(_: Path, there: Path) -> list[str]:
        if text is not None:
            (there / "keys").write_text(text)
        return ["--api-keys-file", str(there / "keys")]

    return make


def flags(*words: str) -> Prepare:
    return lambda _, there: [word.format(there=there) for word in words]


@pytest.mark.parametrize(
    ("prepare", "failing", "said"),
    [
        (flags("--max-images", "0"), {"settings"}, "GRAM_MAX_IMAGES"),
        (flags("--timeout-ms", "120001"), {"settings"}, "GRAM_TIMEOUT_MS is above GRAM_MAX_TIMEOUT_MS"),
        (key_file(None), {"keys"}, "GRAM_API_KEYS_FILE can't be read: No such file or directory."),
        (key_file("# none\n"), {"keys"}, "gram doctor --new-key NAME makes one"),
        (key_file("me:secret\n"), {"keys"}, "line 1: expected name:sha256-hex, as gram doctor --new-key prints"),
        (flags("--host", "192.0.2.1"), {"port"}, "choose another GRAM_PORT or GRAM_HOST"),
        (flags("--max-inflight-bytes", str(2**60)), {"limits"}, "Lower GRAM_MAX_INFLIGHT_BYTES"),
        (flags("--text-cache-bytes", str(2**60)), {"limits"}, "GRAM_TEXT_CACHE_BYTES"),
        (flags("--max-connections", str(2**40)), {"limits"}, "lower GRAM_MAX_CONNECTIONS"),
        (flags("--device", "tpu"), {"device"}, "choose auto, cpu, cuda or cuda:N"),
        (flags("--device", "cuda:63"), {"device"}, "CUDA"),
        (altered, {"files"}, "open_clip_config.json in the model's folder is missing or is not what SHA256SUMS"),
        (emptied, {"files", "weights"}, "has no open_clip_config.json"),
        (flags("--weights-sha256", "0" * 64), {"weights"}, "is not GRAM_WEIGHTS_SHA256"),
        (flags("--model", "ViT-B-32/openai", "--model-dir", "{there}"), {"files", "weights"}, "when the server starts"),
        (flags("--checkpoint", "{there}"), {"model"}, "holds no GRAM checkpoint"),
        (flags("--default-method", "gram"), {"model"}, "gram is not served"),
        (broken_weights, {"model", "parity"}, "could not be built from its open_clip_config.json and weights"),
    ],
)
def test_each_ailment_fails_its_own_check_and_says_what_to_do(
    prepare: Prepare,
    failing: set[str],
    said: str,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not failing & {"model", "parity"}:  # the slow ones, which the tests above have run
        monkeypatch.setattr(doctor, "model", lambda _: "not tried")
        monkeypatch.setattr(doctor, "forward", lambda _: "not tried")
    folder = with_sums(tiny_dir, tmp_path / "model")
    words = prepare(folder, tmp_path)
    base = ["--model", str(folder), "--device", "cpu", "--port", "0"]
    kept = [
        word for name, value in zip(base[::2], base[1::2], strict=True) if name not in words for word in (name, value)
    ]
    output = gram("doctor", *kept, *words, code=1)
    told = {m[2]: (m[1].strip(), m[3]) for m in map(LINE.fullmatch, output.splitlines()) if m is not None}
    assert {name for name, (status, _) in told.items() if status == "FAIL"} == failing
    assert any(said in message for status, message in told.values() if status == "FAIL"), output
    skipped = {name for name, (status, _) in told.items() if status == "skip"}
    assert skipped == ({"model", "parity"} if failing & {"device", "files", "weights"} else set())
    assert list(told) == (CHECKS if failing != {"settings"} else CHECKS[:2])
    assert "secret" not in output


def test_a_port_in_use_fails(tiny_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ("--model", str(tiny_dir), "--device", "cpu", "--port", str(taken.getsockname()[1]))
        assert re.search(r"^FAIL  port +can't listen on .* in use\.", gram("doctor", *words, code=1), re.M)


def test_an_unknown_variable_fails_and_an_unknown_flag_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown flag --prot; did you mean --port?" in gram("doctor", "--prot", "1", code=2)
    assert "--port needs a value" in gram("doctor", "--port", code=2)
    monkeypatch.setenv("GRAM_PROT", "1")
    report = json.loads(gram("doctor", "--json", code=1))
    assert report["ok"] is False
    assert [check["status"] for check in report["checks"]] == ["FAIL", "ok"]
    assert report["checks"][0]["message"].startswith("unknown setting GRAM_PROT; did you mean GRAM_PORT?")


def test_a_server_without_the_extra_it_needs_is_told(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    status, message = examined(tiny_dir, "--otlp-endpoint", "http://127.0.0.1:4318", code=1)["traces"]
    assert (status, "pip install 'gram-server[otel]'" in message) == ("FAIL", True)


# ---- versions ----


def distribution(folder: Path, name: str, version: str, *lines: str) -> None:
    """As if this were installed in front of what is."""
    there = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    there.mkdir()
    text = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines]
    (there / "METADATA").write_text("\n".join(text) + "\n")


def test_a_version_below_its_floor_is_named_with_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert "packages are at or above their floors" in doctor.versions()
    distribution(tmp_path, "pillow", "12.3.0")
    distribution(tmp_path, "opentelemetry-sdk", "1.2.0")
    distribution(tmp_path, "safetensors", "0.9.0")
    with pytest.raises(doctor.Ailment) as found:
        doctor.versions()
    for words in ("pillow is 12.3.0, needed is >=13.0", "opentelemetry-sdk is 1.2.0, ", "safetensors is 0.9.0, "):
        assert words in str(found.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Requires-Dist: no-such-package>=1", "no-such-package is missing, needed is >=1"),
        ("Requires-Dist: no-such-package>=1; extra == 'ray'", None),
        ("Requires-Dist: no-such-package>=1; sys_platform == 'win32'", None),
        ("Requires-Dist: pytest>=99; extra == 'dev'", None),
        ("Requires-Dist: pytest>=99; extra == 'ray'", "needed is >=99"),
        ("Requires-Python: >=3.99", "needed is >=3.99"),
    ],
)
def test_what_is_needed_here_is_held_to_and_nothing_else(
    line: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "gram-server", "0", "Provides-Extra: ray", "Provides-Extra: dev", line)
    if said is None:
        doctor.versions()
    else:
        with pytest.raises(doctor.Ailment, match=re.escape(said)):
            doctor.versions()


def test_the_declared_floors_are_no_lower_than_the_last_known_faults() -> None:
    least = {"starlette": "1.6", "fastapi": "0.165", "python-multipart": "0.0.31", "pillow": "13.0", "torch": "2.10"}
    least |= {"ray": "2.54"}
    extras = PYPROJECT["optional-dependencies"]
    wanted = {r.name: r for r in map(Requirement, [*PYPROJECT["dependencies"], *extras["otel"], *extras["ray"]])}
    for name, version in least.items():
        assert all(Version(s.version) >= Version(version) for s in wanted[name].specifier if s.operator == ">="), name
    assert all(any(s.operator in (">=", "==", "~=") for s in r.specifier) for r in wanted.values())


# ---- hashes and parity ----


def test_files_are_held_to_their_sums_here_and_when_the_server_loads_them(tiny_dir: Path, tmp_path: Path) -> None:
    assert check_sums(tiny_dir) == 0
    folder = with_sums(tiny_dir, tmp_path / "model")
    assert check_sums(folder) == 2
    settings = Settings(model=str(folder), device="cpu")
    load_classifier(settings)
    (folder / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text() + " ")
    for check in (lambda: check_sums(folder), lambda: load_classifier(settings)):
        with pytest.raises(ModelUnavailable, match="is not what SHA256SUMS there says"):
            check()
    digest = "0" * 64
    for line in (f"{digest}  ../secret", f"{digest} one-space", digest, "", f"{digest}  a/b"):
        (folder / "SHA256SUMS").write_text(line + "\n")
        with pytest.raises(ModelUnavailable, match="line 1 of SHA256SUMS"):
            check_sums(folder)


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_features_that_are_not_open_clips_fail(error: float, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity(str(tiny_dir), device="cpu") < TOLERANCE / 10
    real = TextEncoder.features

    def wrong(self: TextEncoder, classes: Any) -> torch.Tensor:
        features = real(self, classes).clone()
        features[-1, -1] += error
        return features

    monkeypatch.setattr(TextEncoder, "features", wrong)
    status, message = examined(tiny_dir, code=1)["parity"]
    assert (status, "differ from open_clip's by" in message) == ("FAIL", True)


def test_an_image_tower_that_is_not_open_clips_fails(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gram_core.backbone import Backbone

    real = Backbone.encode_images
    turned = lambda self, pixels, **options: real(self, pixels, **options).roll(1, 0)  # noqa: E731
    monkeypatch.setattr(Backbone, "encode_images", turned)
    assert parity(str(tiny_dir), device="cpu") > 10 * TOLERANCE


def test_a_cuda_device_that_is_not_there_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(ModelUnavailable, match="torch finds 2 CUDA devices, counted from 0"):
        choose_device("cuda:2")


# ---- keys ----


def test_a_new_key_is_printed_once_with_a_line_that_lets_it_in(tmp_path: Path) -> None:
    key, line = gram("doctor", "--new-key", "team-1").split()
    assert len(base64.urlsafe_b64decode(key.removeprefix("gk_") + "=")) == 32
    (tmp_path / "keys").write_text(line)
    assert Keys(tmp_path / "keys").owner(key) == "team-1"
    again = json.loads(gram("doctor", "--new-key", "team-1", "--json"))
    assert set(again) == {"key", "line"}
    assert again["key"] != key


@pytest.mark.parametrize("words", [["a b"], [""], ["x" * 65], ["ok", "--port", "1"]])
def test_a_name_that_is_none_or_another_flag_beside_it_is_a_usage_error(words: list[str]) -> None:
    assert "gk_" not in gram("doctor", "--new-key", *words, code=2)


# ---- the console script ----


def test_usage_errors_exit_2_and_help_names_the_commands() -> None:
    gram(code=2)
    gram("serv", code=2)
    commands = ["serve", "doctor", "classify", "evaluate", "train", "tune", "bench", "pull"]
    assert re.findall(r"^  (\w+)  ", gram("--help"), re.M) == commands
    assert "--new-key" in gram("doctor", "--help")


def test_the_script_starts_without_torch_and_is_what_the_project_installs() -> None:
    assert PYPROJECT["scripts"] == {"gram": "server.cli:main"}
    script = "import sys, server.cli; sys.exit(any(name in sys.modules for name in ('torch', 'open_clip')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False).returncode == 0


def served(*words: str, log: Path) -> subprocess.Popen[bytes]:
    few = f"ulimit -Sn {FEW_FILES} && exec "  # as a shell that starts its processes with fewer than they need
    command = ["sh", "-c", few + '"$@"', "sh", sys.executable, "-m", "server.cli", "serve", *words]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def test_serve_takes_settings_as_flags_and_the_files_that_it_needs_and_ends_with_the_servers_exit_codes(
    tiny_dir: Path, tmp_path: Path
) -> None:
    refused = served("--max-imags", "7", log=tmp_path / "refused")
    helped = served("--help", log=tmp_path / "helped")
    process = served("--port", "0", "--model", str(tiny_dir), "--device=cpu", "--offline", log=tmp_path / "served")
    try:
        until(lambda: '"port":' in (tmp_path / "served").read_text(), "it has a port", patience_s=60)
        (port,) = re.findall(r'"port": (\d+)', (tmp_path / "served").read_text())
        until(lambda: answers(f"http://127.0.0.1:{port}/livez"), "it listens", patience_s=60)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert int(re.findall(r"Max open files +(\d+)", limits)[0]) > FEW_FILES
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        ended = (refused.wait(60), helped.wait(60))
    assert ended == (64, 0)
    assert "did you mean --max-images?" in (tmp_path / "refused").read_text()
    assert (tmp_path / "helped").read_text() == usage()


def test_the_server_takes_as_many_open_files_as_its_connections_need() -> None:
    program = """
import resource, sys
from server.__main__ import SPARE_FILES, _allow_files
from server.settings import Settings
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for soft, connections in ((64, 100), (1000, 100), (64, 10**6)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    _allow_files(Settings(max_connections=connections))
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)
"""
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 5000)
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard)),
    )
    assert run.stdout.split() == [b"100", b"744", str(hard - 256).encode()]
