"""`gram doctor`: whether a server with these settings would work here, check by check, and what to do where not.

Nothing is fetched, changed or kept. torch is imported by the checks that need it, not by this module.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gram_core.errors import GramError
from server.__main__ import SPARE_FILES, bind
from server.auth import read_keys
from server.service import load_classifier
from server.settings import InvalidSettings, Settings, UnknownFlag, read_settings
from server.telemetry import tracing_of

PROJECT = "gram-server"
TOOLS = ("dev",)  # extras that no server needs
RUNTIME_BYTES = 2**30  # Python, torch and its kernels
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

Status = Literal["ok", "FAIL", "skip"]


class Ailment(Exception):
    """What is wrong and what to do about it."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    message: str

    def line(self) -> str:
        """As printed."""
        return f"{self.status:<4}  {self.name:<8}  {self.message}"


def examine(argv: Sequence[str]) -> Iterator[Check]:
    """Every check in turn, for the settings of flags and environment; raises UnknownFlag for a flag that is none."""
    try:
        settings = read_settings(argv)
    except UnknownFlag:
        raise
    except InvalidSettings as error:
        yield Check("settings", "FAIL", f"{error} (the other checks need settings that can be read)")
        yield _check("versions", versions)
        return
    yield Check("settings", "ok", f"{len(settings.model_fields_set)} given, the rest are defaults (docs/settings.md)")
    yield _check("versions", versions)
    yield _check("keys", lambda: keys(settings))
    yield _check("port", lambda: port(settings))
    if settings.otlp_endpoint is not None:
        yield _check("traces", lambda: traces(settings.otlp_endpoint))
    device = _check("device", lambda: device_of(settings))
    files = _check("files", lambda: sums(settings))
    weights = _check("weights", lambda: weights_of(settings))
    yield from (device, files, weights)
    yield _check("limits", lambda: limits(settings))
    if any(check.status == "FAIL" for check in (device, files, weights)):
        yield from (Check(name, "skip", "needs the device, files and weights above") for name in ("model", "parity"))
        return
    yield _check("model", lambda: model(settings))
    yield _check("parity", lambda: forward(settings))


def versions() -> str:
    """Every dependency at or above its floor, and within its pins."""
    try:
        facts = metadata.metadata(PROJECT)
    except metadata.PackageNotFoundError:
        raise Ailment(f"{PROJECT} itself is not installed, so its floors are not known. Install it.") from None
    python = platform.python_version()
    if python not in SpecifierSet(facts["Requires-Python"] or ""):
        raise Ailment(f"Python is {python}, needed is {facts['Requires-Python']}.")
    extras = [extra for extra in facts.get_all("Provides-Extra") or () if extra not in TOOLS]
    wrong, fine = [], set()
    for line in metadata.requires(PROJECT) or ():
        wanted = Requirement(line)
        needed = _applies(wanted, "")
        if not needed and not any(_applies(wanted, extra) for extra in extras):
            continue
        found = _version(wanted.name)
        if found is not None and wanted.specifier.contains(found, prereleases=True):
            fine.add(wanted.name)
        elif needed or found is not None:
            wrong.append(f"{wanted.name} is {found or 'missing'}, needed is {wanted.specifier}")
    if wrong:
        raise Ailment(f"{'; '.join(wrong)}. Install them again from the lock file (make install), or with pip.")
    return f"Python {python}; {len(fine)} packages are at or above their floors"


def keys(settings: Settings) -> str:
    """The key file can be read and used."""
    if settings.api_keys_file is None:
        return "none: whoever reaches the port may ask (GRAM_API_KEYS_FILE)"
    return f"{len(read_keys(settings.api_keys_file))} keys"


def port(settings: Settings) -> str:
    """The address is free."""
    where = f"{settings.host}:{settings.port}"
    try:
        bind(settings).close()
    except OSError as error:
        raise Ailment(
            f"can't listen on {where}: {error.strerror}. Stop what listens there, or choose another GRAM_PORT or "
            "GRAM_HOST."
        ) from None
    return f"{where} is free"


def limits(settings: Settings) -> str:
    """What the limits allow at once fits into the memory and the open files that this process may have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = settings.max_connections + SPARE_FILES
    if most != resource.RLIM_INFINITY and most < files:
        raise Ailment(
            f"{files} open files are needed and {most} are allowed (ulimit -Hn). Allow more, or lower "
            "GRAM_MAX_CONNECTIONS."
        )
    needed = settings.max_inflight_bytes + settings.text_cache_bytes + RUNTIME_BYTES + _weights_bytes(settings)
    memory = memory_bytes()
    if needed > memory:
        raise Ailment(
            f"up to {_gib(needed)} may be needed and there are {_gib(memory)}. Lower GRAM_MAX_INFLIGHT_BYTES or "
            "GRAM_TEXT_CACHE_BYTES, choose a smaller model, or give the machine or container more memory."
        )
    return f"up to {_gib(needed)} of {_gib(memory)} memory, {files} open files"


def traces(endpoint: str | None) -> str:
    """The extra that sends them is installed. Nothing is sent."""
    tracing = tracing_of(endpoint)
    if tracing is not None:
        tracing.stop(0.1)
    return "the extra otel is installed; whether the collector answers was not tried"


def device_of(settings: Settings) -> str:
    """The device is there."""
    from gram_core.backbone import choose_device

    return f"{choose_device(settings.device)} (GRAM_DEVICE={settings.device})"


def sums(settings: Settings) -> str:
    """The model's files are what the SHA256SUMS beside them says."""
    from gram_core.backbone import check_sums, locate

    try:
        files = locate(settings.model, settings.model_dir)
    except GramError as error:
        if "/" in settings.model and not settings.offline:
            raise Ailment(f"{error.message} A model with a name is fetched when the server starts.") from None
        raise
    count = check_sums(files.folder)
    return f"{count} files are as SHA256SUMS says" if count else "the model's folder has no SHA256SUMS"


def weights_of(settings: Settings) -> str:
    """The weights are those that the operator expects."""
    from gram_core.backbone import file_sha256, locate

    found = file_sha256(locate(settings.model, settings.model_dir).weights)
    if settings.weights_sha256 is None:
        return f"{found}; GRAM_WEIGHTS_SHA256 is unset, so any would do"
    if settings.weights_sha256 != found:
        raise Ailment(f"{found} is not GRAM_WEIGHTS_SHA256. Fetch the weights again, or correct the setting.")
    return f"{found}, as GRAM_WEIGHTS_SHA256 says"


def model(settings: Settings) -> str:
    """Model and checkpoint load as they would at the start."""
    info = load_classifier(settings).info
    learned = f"checkpoint {info.checkpoint_sha256[:12]}" if info.checkpoint_sha256 else info.checkpoint_note
    return f"{info.name} on {info.device} in {info.dtype}, method {info.default_method}; {learned}"


def forward(settings: Settings) -> str:
    """Class features and zero-shot cosines are open_clip's own."""
    from gram_core.parity import TOLERANCE, parity

    difference = parity(settings.model, device=settings.device, model_dir=settings.model_dir)
    if difference > TOLERANCE:
        raise Ailment(
            f"features or cosines differ from open_clip's by {difference:.1e} in float32, allowed are {TOLERANCE:.0e}. "
            "Compare the versions with the lock file, and try GRAM_DEVICE=cpu: if that is right, suspect the device."
        )
    return f"within {difference:.1e} of open_clip in float32 (allowed {TOLERANCE:.0e})"


def memory_bytes() -> int:
    """What this machine or container has."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # `max`: no limit
            found.append(int(limit.read_text()))
    return min(found)


def _weights_bytes(settings: Settings) -> int:
    from gram_core.backbone import locate

    try:
        return 2 * locate(settings.model, settings.model_dir).weights.stat().st_size  # also once while it loads
    except (GramError, OSError):
        return 0  # another check says so


def _check(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", work())
    except GramError as error:
        return Check(name, "FAIL", error.message)
    except (Ailment, InvalidSettings) as error:
        return Check(name, "FAIL", str(error))
    except Exception as error:  # whatever it is: the other checks go on, and this one says what it met
        return Check(name, "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
