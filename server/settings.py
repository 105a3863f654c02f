"""Every knob of the server: one class, read from `GRAM_*` variables and from flags of the same names.

An unknown name or a bad value is an error that says which name was probably meant. Nothing else in
this package reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gram_core.images import PILLOW_MAX_PIXELS

PREFIX = "GRAM_"
CLIENT_URL, CLIENT_KEY = "GRAM_URL", "GRAM_API_KEY"  # what `server.client` reads
BYTES_PER_PIXEL = 3  # a decoded image is 8-bit RGB while it waits


def _words(value: object) -> object:
    """`a, b` as ("a", "b")."""
    return tuple(word for part in value.split(",") if (word := part.strip())) if isinstance(value, str) else value


def _levels(value: object) -> object:
    """`0.5,0.75,0.9` as three rising numbers, `off` as none."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "off":
        return ()
    try:
        levels = tuple(float(part) for part in value.split(","))
    except ValueError:
        levels = ()
    if len(levels) != 3 or not all(0 < level <= 1 for level in levels) or list(levels) != sorted(levels):
        raise ValueError("must be off, or three rising numbers up to 1, as 0.5,0.75,0.9")
    return levels


def _network(value: str) -> str:
    ipaddress.ip_network(value, strict=False)
    return value


Origin = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9._\-\[\]:]+$")]
Endpoint = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9._\-\[\]:]+(/[A-Za-z0-9._~/\-]*)?$")]
Network = Annotated[str, AfterValidator(_network)]


class InvalidSettings(ValueError):
    """A setting that can't be used; the message is one line for the operator."""


class UnknownFlag(InvalidSettings):
    """A flag that is none, is given twice, or has no value."""


class Settings(BaseSettings):
    """The server's settings; each is `GRAM_NAME` in the environment and `--name` on the command line."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    model: str = "gram-mini"
    model_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Path("~/.cache/gram").expanduser()
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    offline: bool = False
    checkpoint: Annotated[Path, AfterValidator(Path.expanduser)] | None = None  # None: beside the model, if any

    default_method: Literal["auto", "gram", "infomax", "tpt", "none"] = "auto"
    default_steps: NonNegativeInt | None = None  # None: the method's own
    default_views: PositiveInt | None = None  # for scope image; None: the model's own
    default_batch_views: PositiveInt | None = None
    default_budget_ms: NonNegativeInt | None = None  # None: no budget
    deterministic: bool = False
    text_group: Annotated[int, Field(ge=1, le=64)] | None = None  # None: 4 on a CPU, 8 on a CUDA device
    max_steps: Annotated[int, Field(ge=0, le=64)] = 64
    max_views: Annotated[int, Field(ge=1, le=128)] = 128
    kl_cap: PositiveFloat = 5.0

    timeout_ms: PositiveInt = 30_000
    max_timeout_ms: PositiveInt = 120_000
    header_timeout_s: PositiveFloat = 5.0
    body_timeout_s: PositiveFloat = 30.0
    stall_s: PositiveFloat = 60.0
    drain_s: PositiveInt = 30
    drain_delay_s: NonNegativeFloat = 0.0

    max_connections: PositiveInt = 1024
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32_768
    max_body_bytes: PositiveInt = 33_554_432
    max_image_bytes: PositiveInt = 16_777_216
    max_inflight_bytes: PositiveInt = 1_073_741_824
    max_images: PositiveInt = 64
    max_image_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = 32_000_000
    max_request_pixels: PositiveInt = 256_000_000
    max_aspect_ratio: PositiveInt = 100
    max_classes: PositiveInt = 10_000
    max_texts: PositiveInt = 20_000
    max_request_cost: PositiveFloat = 16_384.0
    max_batch_cost: PositiveFloat = 2080.0
    batch_wait_ms: NonNegativeFloat = 5.0
    queue_seconds: PositiveFloat = 4.0
    brownout: Annotated[tuple[float, ...], NoDecode, BeforeValidator(_levels)] = (0.5, 0.75, 0.9)
    decode_threads: Annotated[int, Field(ge=1, le=64)] = 4
    decode_inflight_pixels: PositiveInt = 64_000_000
    text_cache_bytes: NonNegativeInt = 268_435_456
    class_set_dir: Annotated[Path, AfterValidator(Path.expanduser)] | None = None  # None: in memory alone
    max_class_sets: NonNegativeInt = 1_000  # 0: none are kept
    max_class_set_texts: PositiveInt = 100_000
    max_sessions: NonNegativeInt = 100  # 0: none are kept
    session_bytes: PositiveInt = 8_388_608

    api_keys_file: Annotated[Path, AfterValidator(Path.expanduser)] | None = None  # None: no keys
    metrics_public: bool = True
    ui: bool = True
    ui_public: bool = False  # without a key, where keys are set
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ("localhost", "127.0.0.1", "::1")
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_words)] = ()
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_words)] = ()
    rate_cost: NonNegativeFloat = 0.0  # cost a second for each key; 0: no limit
    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: Endpoint | None = None  # None: no traces
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None  # under Ray Serve alone; None: no listener

    @model_validator(mode="after")
    def limits_agree(self) -> Settings:
        """Refuse limits under which a request within every limit could never be served."""
        needed = self.max_body_bytes + BYTES_PER_PIXEL * self.max_request_pixels
        rules = (
            (self.timeout_ms <= self.max_timeout_ms, "TIMEOUT_MS is above GRAM_MAX_TIMEOUT_MS"),
            (
                self.max_image_pixels <= self.max_request_pixels,
                "MAX_IMAGE_PIXELS is above GRAM_MAX_REQUEST_PIXELS",
            ),
            (
                needed <= self.max_inflight_bytes,
                f"MAX_INFLIGHT_BYTES is below {needed}, what one request within GRAM_MAX_BODY_BYTES and "
                "GRAM_MAX_REQUEST_PIXELS needs",
            ),
            ((self.default_steps or 0) <= self.max_steps, "DEFAULT_STEPS is above GRAM_MAX_STEPS"),
            ((self.default_views or 1) <= self.max_views, "DEFAULT_VIEWS is above GRAM_MAX_VIEWS"),
            (
                (self.default_batch_views or 1) <= self.max_views,
                "DEFAULT_BATCH_VIEWS is above GRAM_MAX_VIEWS",
            ),
        )
        for kept, broken in rules:
            if not kept:
                raise ValueError(PREFIX + broken)
        return self


def read_settings(
    argv: Sequence[str], besides: Collection[str] = (CLIENT_URL,), *, under_ray: bool = False
) -> Settings:
    """Flags over environment over defaults; raises `InvalidSettings`.

    `besides` are variables that belong to others. A client's key is not among them: whoever gives it to a server
    means to protect that server, and it would protect nothing.
    """
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in (*known, *besides):
            raise InvalidSettings(f"unknown setting {name}{_nearest(name.upper(), known)}")
    try:
        settings = Settings(**_flags(argv))  # type: ignore[arg-type]  # pydantic converts
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + str(first["loc"][0]).upper() + ": " if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise InvalidSettings(name + message) from None
    if settings.metrics_port is not None and not under_ray:
        raise InvalidSettings("GRAM_METRICS_PORT is for Ray Serve alone; this server answers /metrics on GRAM_PORT")
    return settings


def usage() -> str:
    """What `--help` prints."""
    rows = [f"  --{name.replace('_', '-'):<22} {shown(field.default)}" for name, field in Settings.model_fields.items()]
    return (
        "gram serve [--NAME VALUE ...] or python -m server; every flag is also a GRAM_NAME variable.\n\n"
        + "\n".join(rows)
        + "\n"
    )


def shown(default: object) -> str:
    """A default as one would write it: what `--help` and docs/settings.md say."""
    if default is None or default == ():
        return "unset"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Path) and default.is_relative_to(Path.home()):
        return f"~/{default.relative_to(Path.home())}"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _flags(argv: Sequence[str]) -> dict[str, str]:
    flags = {"--" + name.replace("_", "-"): name for name in Settings.model_fields}
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if flag not in flags:
            raise UnknownFlag(f"unknown flag {flag}{_nearest(flag, flags)}")
        if flags[flag] in values:
            raise UnknownFlag(f"{flag} is given twice")
        if not given and bool in (kind := Settings.model_fields[flags[flag]].annotation, *get_args(kind)):
            value = "true"  # --offline
        elif not given:
            if not rest:
                raise UnknownFlag(f"{flag} needs a value")
            value = rest.pop(0)
        values[flags[flag]] = value
    return values


def _nearest(name: str, known: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""
