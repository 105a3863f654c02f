"""Who may ask: keys, hosts, origins and rates, and a walk over every route with and without a key."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from server import pages
from server.auth import Guard, Keys, Rates, new_key, read_keys
from server.errors import ApiError
from server.fake import FakeClassifier
from server.settings import InvalidSettings, Settings, read_settings
from tests.server_fixtures import Live, answered, body, code, live, png, until

ROOT = Path(__file__).parents[1]
KEY, OTHER = "gk_right", "gk_other"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "CLASSIFY", "__INIT__")
PUBLIC = {"/livez", "/readyz", "/startupz", "/health", "/healthz", "/ping", "/metrics",
          "/v2/health/live", "/v2/health/ready"}  # fmt: skip
UNKNOWN = ("/ui", "/docs", "/redoc", "/v1", "/v1/classify/x", "/v1/embeddings/", "/admin", "/static/../v1/classify")


def key_file(folder: Path, **keys: str) -> Path:
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in keys.items()]
    (folder / "keys").write_text("# who may ask\n\n" + "\n".join(lines) + "\n")
    return folder / "keys"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    file = key_file(tmp_path_factory.mktemp("keys"), team=KEY, other=OTHER)
    with live(api_keys_file=file) as server:
        yield server


def bearer(key: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ---- the walk ----


RESOURCES = {
    ("POST", "/v1/class-sets"),
    ("GET", "/v1/class-sets"),
    ("GET", "/v1/class-sets/{class_set}"),
    ("DELETE", "/v1/class-sets/{class_set}"),
    ("POST", "/v1/sessions"),
    ("POST", "/v1/sessions/import"),
    ("GET", "/v1/sessions/{session}"),
    ("DELETE", "/v1/sessions/{session}"),
    ("POST", "/v1/sessions/{session}/reset"),
    ("GET", "/v1/sessions/{session}/export"),
}
COMPATIBLE = {
    ("POST", "/hf/zero-shot-image-classification"),
    ("POST", "/models/{model}"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v2"),
    ("GET", "/v2/models/{model}"),
    ("GET", "/v2/models/{model}/ready"),
}


def routes(server: Live) -> set[tuple[str, str]]:
    """Every (method, path) that the app has."""
    app: Any = server.client.get("/openapi.json", headers=bearer()).json()
    return {(method.upper(), path) for path, item in app["paths"].items() for method in item}


def sent(server: Live, method: str, target: str, headers: str = "") -> tuple[int, bytes]:
    """Status and body of one request, written by hand: no client library changes the target or the method."""
    request = f"{method} {target} HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n"
    received = server.raw(request.encode())
    status = re.match(rb"HTTP/1.1 (\d{3})", received)
    assert status, (method, target, received[:200])
    return int(status[1]), received.partition(b"\r\n\r\n")[2]


def test_no_method_reaches_any_path_without_the_right_key(locked: Live) -> None:
    known = routes(locked)
    listed = {("POST", "/v1/classify"), ("POST", "/classify"), ("GET", "/info"), *RESOURCES, *COMPATIBLE}
    assert known == listed | {("GET", path) for path in PUBLIC}  # a new route is added here, and so to the walk
    pairs = 0
    for path in sorted({path for _, path in known} | {"/openapi.json"} | set(pages.FILES) | set(UNKNOWN)):
        for method in METHODS:
            open_ = path in PUBLIC and method in ("GET", "HEAD")
            host = "Host: localhost\r\n"
            for wrong in ("", "Authorization: Bearer gk_wrong\r\n", "X-API-Key: \r\n", "Authorization: Basic eDp5\r\n"):
                status, content = sent(locked, method, path, host + wrong)
                if open_:
                    assert status == (405 if (method, path) == ("HEAD", "/metrics") else 200), (method, path)
                elif status != 400:  # what the parser refuses as no HTTP method reaches nobody
                    assert status == 401, (method, path, wrong)
                    assert method == "HEAD" or json.loads(content)["error"]["code"] == "unauthenticated"
                pairs += 1
            status, _ = sent(locked, method, path, host + f"X-API-Key: {KEY}\r\n")
            assert status != 401, (method, path)
    paths = len({path for _, path in listed}) + len(PUBLIC) + 1 + len(pages.FILES) + len(UNKNOWN)
    assert pairs == 4 * len(METHODS) * paths
    locked.client.headers.update(bearer())
    locked.assert_well()
    locked.client.headers.pop("authorization")


@pytest.mark.parametrize(
    "target",
    [
        "//v1/classify",
        "/v1//classify",
        "/v1/classify/",
        "/V1/classify",
        "/%76%31/classify",
        "/livez/../v1/classify",
        "/livez%2f..%2fv1%2fclassify",
        "/livez;/v1/classify",
        "/v1/classify?x=/livez",
        "/v1/classify#/livez",
        "http://localhost/v1/classify",
        "http://localhost/livez/../v1/classify",
        "/info",
        "/%69nfo",
        "/openapi.json",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_spelling_of_a_path_gets_around_the_key(locked: Live, target: str, method: str) -> None:
    before = locked.metric("gram_batches_total")
    assert sent(locked, method, target, "Host: localhost\r\n")[0] == 401
    assert locked.metric("gram_batches_total") == before


@pytest.mark.parametrize("host", ["a/livez?x=", "a/?", "localhost/livez", "localhost@x", "", "localhost:x"])
def test_no_host_gets_around_the_key(locked: Live, host: str) -> None:
    assert sent(locked, "POST", "/v1/classify", f"Host: {host}\r\n")[0] in (401, 421)


@pytest.mark.parametrize("name", ["X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix", "X-HTTP-Method-Override"])
def test_no_header_gets_around_the_key(locked: Live, name: str) -> None:
    for value in ("/livez", "GET"):
        assert sent(locked, "POST", "/v1/classify", f"Host: localhost\r\n{name}: {value}\r\n")[0] == 401


def test_either_header_carries_the_key_and_two_that_differ_are_none(locked: Live) -> None:
    ask = locked.client.post
    assert ask("/classify", json=body(), headers=bearer()).status_code == 200
    assert ask("/classify", json=body(), headers=bearer(OTHER)).status_code == 200
    assert ask("/classify", json=body(), headers={"x-api-key": KEY}).status_code == 200
    assert ask("/classify", json=body(), headers={**bearer(), "x-api-key": KEY}).status_code == 200
    refused = ask("/classify", json=body(), headers={**bearer(), "x-api-key": OTHER})
    assert code(refused) == "unauthenticated"
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_refused_request_is_not_read(locked: Live) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 30000000\r\n\r\n"
    received = locked.raw(head + b"x" * 1000)
    assert b" 401 " in received.splitlines()[0]
    assert b"connection: close" in received.lower()
    assert locked.service.budget.held == 0


# ---- keys ----


def test_every_entry_is_compared_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(key_file(tmp_path, a="1", b="2", c="3"))
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    for presented, owner in (("1", "a"), ("2", "b"), ("3", "c"), ("4", None), ("\ud800", None)):
        compared.clear()
        assert keys.owner(presented) == owner
        assert len(compared) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        ("secret-in-clear\n", "line 1: expected name:sha256-hex"),
        ("a:" + "0" * 63 + "\n", "line 1"),
        ("a:" + "0" * 64 + "\na:" + "1" * 64 + "\n", "line 2: this name is there already"),
        ("a b:" + "0" * 64 + "\n", "line 1"),
    ],
)
def test_a_key_file_that_can_not_be_used_is_refused_by_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(InvalidSettings, match=said) as refused:
        Keys(tmp_path / "keys")
    assert "secret" not in str(refused.value)
    with pytest.raises(InvalidSettings, match="can't be read: No such file"):
        read_keys(tmp_path / "none")
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettings, match="UTF-8"):
        read_keys(tmp_path / "keys")


def test_a_new_key_opens_what_its_line_says(tmp_path: Path) -> None:
    key, line = new_key("team-1")
    assert key not in line
    (tmp_path / "keys").write_text(line)
    assert Keys(tmp_path / "keys").owner(key) == "team-1"
    assert new_key("team-1")[0] != key
    with pytest.raises(ValueError, match="1 to 64 letters"):
        new_key("team 1")


def test_keys_are_read_again_and_a_bad_file_keeps_the_old_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, a="1")
    keys = Keys(file)
    key_file(tmp_path, b="2")
    keys.reload()
    assert (keys.owner("1"), keys.owner("2")) == (None, "b")
    file.write_text("2")
    keys.reload()
    assert keys.owner("2") == "b"
    assert "kept as they were" in caplog.text


LOCKED_PROCESS = """
import socket, sys
from pathlib import Path
from server.__main__ import log_to_stderr, serve
from server.app import create_app
from server.fake import FakeClassifier
from server.settings import Settings

log_to_stderr("debug")
settings = Settings(api_keys_file=Path(sys.argv[1]))
sys.exit(serve(create_app(settings, FakeClassifier()), settings, socket.create_server(("127.0.0.1", 0))))
"""


def test_sighup_reads_the_keys_again_and_no_key_is_logged(tmp_path: Path) -> None:
    file = key_file(tmp_path, a=KEY)
    with (tmp_path / "log").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", LOCKED_PROCESS, str(file)], cwd=ROOT, stderr=out)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    try:
        until(lambda: any(line["event"] == "listening" for line in lines()), "it listens", patience_s=60)
        (port,) = (line["port"] for line in lines() if line["event"] == "listening")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            until(lambda: client.get("/readyz").status_code == 200, "it is ready")
            assert client.post("/classify", json=body(), headers=bearer()).status_code == 200
            key_file(tmp_path, a=OTHER)
            process.send_signal(signal.SIGHUP)
            until(lambda: client.post("/classify", json=body(), headers=bearer()).status_code == 401, "the old is gone")
            assert client.post("/classify", json=body(), headers=bearer(OTHER)).status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0
    text = (tmp_path / "log").read_text()
    assert not any(key in text for key in (KEY, OTHER))


def test_a_server_with_an_unusable_key_file_does_not_start(tmp_path: Path) -> None:
    environment = {"GRAM_API_KEYS_FILE": str(tmp_path / "none"), "GRAM_PORT": "0"}
    command = [sys.executable, "-m", "server"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 64
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert line["event"] == "GRAM_API_KEYS_FILE can't be read: No such file or directory."


# ---- hosts and origins ----


def test_only_named_hosts_are_served_and_probes_have_any() -> None:
    with live(allowed_hosts=("gram.example", "127.0.0.1")) as server:
        get = server.client.get
        assert get("/info", headers={"host": "gram.example"}).status_code == 200
        assert get("/info", headers={"host": "GRAM.example:8443"}).status_code == 200
        for host in ("evil.example", "gram.example.evil", "[::1]", "a/livez?x=", "gram.example, evil"):
            assert get("/info", headers={"host": host}).status_code == 421, host
        for path in sorted(PUBLIC):
            assert get(path, headers={"host": "10.1.2.3:8000"}).status_code == 200
        assert sent(server, "GET", "/info")[0] == 421
        assert sent(server, "GET", "/info", "Host: gram.example\r\nHost: gram.example\r\n")[0] in (400, 421)


def test_another_origins_page_can_not_spend_this_server() -> None:
    with live() as server:
        form = {"files": {"image": ("a.png", png())}, "data": {"classes": ["a", "b"]}}
        here = f"http://127.0.0.1:{server.port}"
        assert server.client.post("/classify", **form, headers={"origin": here}).status_code == 200
        for origin in (
            "https://evil.example",
            "null",
            f"http://localhost:{server.port}",
            "http://127.0.0.1",
            here + "/",
            "",
        ):
            refused = server.client.post("/classify", **form, headers={"origin": origin})
            assert (origin, code(refused)) == (origin, "origin_not_allowed")
            assert not [name for name in refused.headers if name.startswith("access-control")]
        assert server.metric("gram_batches_total") == 1


def test_a_page_that_is_allowed_may_ask_with_a_key_and_never_with_credentials(tmp_path: Path) -> None:
    page = "https://app.example"
    with live(cors_origins=(page,), api_keys_file=key_file(tmp_path, a=KEY)) as server:
        asks = {"origin": page, "access-control-request-method": "POST"}
        before = server.client.options("/classify", headers=asks)
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == page
        assert "x-api-key" in before.headers["access-control-allow-headers"]
        answer = answered(server.client.post("/classify", json=body(), headers={"origin": page, **bearer()}))
        assert answer.headers["access-control-allow-origin"] == page
        assert answer.headers["vary"] == "Origin"
        refused = server.client.post("/classify", json=body(), headers={"origin": page})
        assert code(refused) == "unauthenticated"
        assert refused.headers["access-control-allow-origin"] == page  # or the page could not read why
        for response in (before, answer, refused):
            assert "access-control-allow-credentials" not in response.headers
        other = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert server.client.options("/classify", headers=other).status_code == 403
        assert server.client.options("/classify", headers={"origin": page}).status_code == 401


def test_what_a_proxy_forwards_counts_only_from_a_trusted_one() -> None:
    told = {"x-forwarded-host": "gram.example"}
    with live(allowed_hosts=("gram.example", "127.0.0.1"), trusted_proxies=("127.0.0.0/8",)) as server:
        page = {"origin": "https://gram.example"}
        assert server.client.post("/classify", json=body(), headers={**told, **page}).status_code == 200
        assert server.client.get("/info", headers={"x-forwarded-host": "evil.example"}).status_code == 421
    with live(allowed_hosts=("gram.example", "127.0.0.1")) as server:
        assert code(server.client.post("/classify", json=body(), headers={**told, **page})) == "origin_not_allowed"
        assert server.client.get("/info", headers={"x-forwarded-host": "evil.example"}).status_code == 200


def test_the_guard_needs_no_server() -> None:
    guard = Guard(Settings())
    guard.admit("GET", "/info", Headers({"host": "localhost:8000"}), "127.0.0.1")
    with pytest.raises(ApiError, match="GRAM_ALLOWED_HOSTS"):
        guard.admit("GET", "/info", Headers({"host": "evil"}), "")


def test_lists_are_words_between_commas_and_bad_words_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAM_ALLOWED_HOSTS", "a.example, b.example")
    settings = read_settings(["--cors-origins", "https://a.example,http://b.example:8080"])
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert settings.cors_origins == ("https://a.example", "http://b.example:8080")
    with pytest.raises(InvalidSettings, match="GRAM_CORS_ORIGINS"):
        read_settings(["--cors-origins", "*"])
    with pytest.raises(InvalidSettings, match="GRAM_TRUSTED_PROXIES"):
        read_settings(["--trusted-proxies", "proxy.example"])


# ---- rates ----


def test_a_bucket_fills_with_time_and_a_debt_is_paid_first() -> None:
    now = [0.0]
    rates = Rates(10.0, 4.0, lambda: now[0])
    rates.spend("a", 30.0)
    rates.spend("a", 30.0)  # 10 were left: 20 in debt
    with pytest.raises(ApiError) as refused:
        rates.spend("a", 1.0)
    assert (refused.value.code, refused.value.retry_after) == ("rate_limited", 2)
    rates.spend("b", 1.0)  # others have their own
    now[0] = 2.1
    rates.spend("a", 1.0)
    now[0] = 1000.0
    rates.spend("a", 40.0)  # never more than four seconds' worth saved
    with pytest.raises(ApiError):
        rates.spend("a", 1.0)
    Rates(0.0, 4.0).spend("a", 1e9)


def test_a_key_that_asks_too_much_is_429_and_others_are_served(tmp_path: Path) -> None:
    file = key_file(tmp_path, a=KEY, b=OTHER)
    with live(FakeClassifier(), api_keys_file=file, rate_cost=0.25, queue_seconds=4.0) as server:
        ask = server.client.post
        for _ in range(2):  # the second overdraws what came back meanwhile
            assert ask("/classify", json=body(), headers=bearer()).status_code == 200
        refused = ask("/classify", json=body(), headers=bearer())
        assert code(refused) == "rate_limited"
        assert int(refused.headers["retry-after"]) >= 1
        assert ask("/classify", json=body(), headers=bearer(OTHER)).status_code == 200
        server.client.headers.update(bearer(OTHER))
        assert server.metric("gram_rejected_total", reason="rate") == 1
        until(lambda: server.service.engine.idle and server.service.budget.held == 0, "nothing is held")
