"""Who may ask: hosts, origins and keys, decided before anything of a request is read.

One `Guard` stands in front of every route, unknown paths included. It goes by the decoded path that the router uses,
by exact match, and never by a URL put together from what a client sent (Starlette CVE-2026-48710).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.errors import ApiError
from server.settings import InvalidSettings, Settings

PROBES = ("/livez", "/readyz", "/startupz", "/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready")
SCRAPE = "/metrics"
LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "authorization, content-type, x-api-key, x-request-id",
    "access-control-max-age": "600",
}
EXPOSED = "x-request-id, server-timing, x-gram-model, x-gram-adaptation, x-gram-brownout, retry-after"
DEFAULT_PORTS = {"http": 80, "https": 443}
MOST_BUCKETS = 10_000

log = logging.getLogger("server.auth")


class Keys:
    """The API keys of one file, as hashes; an empty file or a bad line is an error that names the line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = read_keys(file)

    def __len__(self) -> int:
        return len(self._entries)

    def owner(self, presented: str) -> str | None:
        """The name of the key, or None. Every entry is compared, so the time tells nothing of which one fits."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for name, kept in self._entries.items():
            if hmac.compare_digest(digest, kept):
                found = name
        return found

    def reload(self) -> None:
        """Read the file again; one that can't be used leaves the keys as they are, and says so in the log."""
        try:
            self._entries = read_keys(self._file)
        except InvalidSettings as error:
            log.error("keys kept as they were: %s", error)
        else:
            log.info("keys read again", extra={"fields": {"keys": len(self._entries)}})


def read_keys(file: Path) -> dict[str, str]:
    """Name to SHA-256 of each key; raises InvalidSettings, which repeats nothing of the file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidSettings(f"GRAM_API_KEYS_FILE can't be read: {reason}.") from None
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise InvalidSettings(
                f"GRAM_API_KEYS_FILE, line {number}: expected name:sha256-hex, as gram doctor --new-key prints."
            )
        if match[1] in entries:
            raise InvalidSettings(f"GRAM_API_KEYS_FILE, line {number}: this name is there already.")
        entries[match[1]] = match[2]
    if not entries:
        raise InvalidSettings(
            "GRAM_API_KEYS_FILE holds no key: gram doctor --new-key NAME makes one. Leave the setting out to serve "
            "without keys."
        )
    return entries


def new_key(name: str) -> tuple[str, str]:
    """A fresh 256-bit key, and its line for the file."""
    key = "gk_" + secrets.token_urlsafe(32)
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    if LINE.fullmatch(line) is None:
        raise ValueError("a key's name has 1 to 64 letters, digits, dots, underscores and hyphens.")
    return key, line


class Guard:
    """Host, then origin, then key. `public` are paths that GET and HEAD reach without a key."""

    def __init__(self, settings: Settings, public: Iterable[str] = ()) -> None:
        self.keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._origins = frozenset(origin.lower() for origin in settings.cors_origins)
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in settings.trusted_proxies]
        self._bare = frozenset({*PROBES, SCRAPE})
        self.public = frozenset({*PROBES, *public, *((SCRAPE,) if settings.metrics_public else ())})

    def admit(self, method: str, path: str, headers: Headers, peer: str) -> str | None:
        """The owner of the key, None where no keys are set or none is needed; raises ApiError 421, 403 or 401."""
        if path not in self._bare:
            host = self._host(headers, peer)
            if "origin" in headers and not _same(headers, host) and self.cors(headers) is None:
                sentence = "this page may not ask this server; its operator can allow it with GRAM_CORS_ORIGINS."
                raise ApiError("origin_not_allowed", sentence)
        if self.keys is None or (method in ("GET", "HEAD") and path in self.public):
            return None
        presented = _presented(headers)
        owner = None if presented is None else self.keys.owner(presented)
        if owner is None:
            refusal = ApiError("unauthenticated", "send a valid key: Authorization: Bearer KEY, or X-API-Key: KEY.")
            refusal.headers["www-authenticate"] = "Bearer"
            raise refusal
        return owner

    def cors(self, headers: Headers) -> dict[str, str] | None:
        """The headers that let another origin's page read the answer, or None."""
        origins = headers.getlist("origin")
        if len(origins) != 1 or origins[0].lower() not in self._origins:
            return None
        return {"access-control-allow-origin": origins[0], "vary": "Origin", "access-control-expose-headers": EXPOSED}

    def preflight(self, method: str, headers: Headers, peer: str) -> dict[str, str] | None:
        """Headers that answer a browser's question before it asks, or None where this is no such question.

        Browsers send no key with it, and it reaches no route.
        """
        allowed = self.cors(headers)
        if method != "OPTIONS" or allowed is None or "access-control-request-method" not in headers:
            return None
        self._host(headers, peer)
        return {**allowed, **PREFLIGHT}

    def _host(self, headers: Headers, peer: str) -> tuple[str, int | None]:
        """Host and port that the client asked for; a proxy that is trusted may tell."""
        given = headers.getlist("host")
        if "x-forwarded-host" in headers and self._trusted(peer):
            given = headers.getlist("x-forwarded-host")
        parts = _split(given[0]) if len(given) == 1 else None
        if parts is None or parts[0] not in self._hosts:
            raise ApiError("host_not_allowed", "this server has other names (GRAM_ALLOWED_HOSTS).")
        return parts

    def _trusted(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(address in proxy for proxy in self._proxies)


def _same(headers: Headers, host: tuple[str, int | None]) -> bool:
    """Whether the page came from this very host and port."""
    scheme, _, rest = headers["origin"].partition("://")
    theirs = _split(rest)
    if theirs is None or scheme not in DEFAULT_PORTS or len(headers.getlist("origin")) != 1:
        return False
    port = DEFAULT_PORTS[scheme]
    return (theirs[0], theirs[1] or port) == (host[0], host[1] or port)


def _presented(headers: Headers) -> str | None:
    """The one key that was sent; several that differ are none."""
    sent = {value.strip() for value in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            sent.add(key.strip())
    return sent.pop() if len(sent) == 1 else None


def _split(authority: str) -> tuple[str, int | None] | None:
    """Host in lower case and port of `host[:port]`, or None for anything that is not just that."""
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?|[A-Za-z0-9._-]+(:[0-9]{1,5})?", authority):
        return None
    parts = urlsplit(f"//{authority}")
    try:
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return None


class Rates:
    """A token bucket per key: `rate` cost a second, saved up for at most `seconds`. Used from the event loop only."""

    def __init__(self, rate: float, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._most = rate * seconds
        self._clock = clock
        self._buckets: OrderedDict[str | None, tuple[float, float]] = OrderedDict()

    def spend(self, owner: str | None, cost: float) -> None:
        """Take `cost`; raises ApiError 429 while the bucket is empty.

        One request may overdraw it, so that what costs more than a full bucket can be asked at all; the debt is paid
        before the next.
        """
        if self.rate <= 0:
            return
        now = self._clock()
        held, since = self._buckets.pop(owner, (self._most, now))
        held = min(self._most, held + (now - since) * self.rate)
        if held <= 0:
            self._buckets[owner] = (held, now)
            wait = max(1, min(30, math.ceil(-held / self.rate)))
            raise ApiError("rate_limited", "this key has used up its rate (GRAM_RATE_COST).", retry_after=wait)
        self._buckets[owner] = (held - cost, now)
        while len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
