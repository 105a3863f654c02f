"""The Python client: what it sends, when it waits, when it gives up, and that sync and async are one."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server import client as clients
from server.client import AsyncGramClient, GramClient, GramError, encode, pieces
from tests.server_fixtures import Live, b64, live, png

ROOT = Path(__file__).parents[1]
CLASSES = ["cat", "dog"]
BOTH = pytest.mark.parametrize("ask", ["sync", "async"], indirect=True)
Reply = tuple[int, dict[str, Any], dict[str, str]]
INFO: Reply = (200, {"limits": {"max_images": 4, "max_embedding_texts": 3, "max_body_bytes": 100_000}}, {})


@pytest.fixture
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a method of a client at `url`, sync or async."""
    monkeypatch.delenv("GRAM_URL", raising=False)
    monkeypatch.delenv("GRAM_API_KEY", raising=False)

    def sync(url: str, what: str, /, *args: Any, api_key: str | None = None, **options: Any) -> Any:
        with GramClient(url, api_key) as client:
            return getattr(client, what)(*args, **options)

    def later(url: str, what: str, /, *args: Any, api_key: str | None = None, **options: Any) -> Any:
        async def work() -> Any:
            async with AsyncGramClient(url, api_key) as client:
                return await getattr(client, what)(*args, **options)

        return asyncio.run(work())

    return sync if getattr(request, "param", "sync") == "sync" else later


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(max_images=4) as running:
        yield running


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of milliseconds."""
    monkeypatch.setattr(clients, "BACKOFF_S", 0.002)
    random.seed(0)


class StandIn:
    """A tiny HTTP server that answers from a list, and keeps what it was asked."""

    def __init__(self, replies: Callable[[str, Any], Reply]) -> None:
        self.replies = replies
        self.asked: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[tuple[str, int]] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                read = json.loads(body) if self.headers.get("content-type") == "application/json" else body
                outer.asked.append((self.path, read))
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                outer.connections.add(self.client_address)
                status, told, headers = outer.replies(self.path, read)
                sent = json.dumps(told).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(sent)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@contextmanager
def standing_in(*replies: Reply, by: Callable[[str, Any], Reply] | None = None) -> Iterator[StandIn]:
    queue = list(replies)
    server = StandIn(by or (lambda *_: queue.pop(0)))
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def answer(*labels: str) -> Reply:
    """As much of a classification as a client looks at."""
    rows = [{"index": n, "label": label} for n, label in enumerate(labels)]
    return 200, {"id": labels[0], "results": rows, "usage": {"images": len(rows)}, "timings_ms": {"total": 1.5}}, {}


def refusal(status: int, code: str, **headers: str) -> Reply:
    return status, {"error": {"code": code, "message": "no.", "request_id": "r"}}, {"x-request-id": "r", **headers}


def without_clock(told: dict[str, Any]) -> str:
    """An answer without what differs each time."""
    rows = [{**row, "adaptation": {**row["adaptation"], "ms": 0}} for row in told["results"]]
    return json.dumps({**told, "id": "", "created": 0, "timings_ms": {}, "results": rows})


# ---- one module ----


def test_the_client_is_one_small_module_on_httpx_and_the_standard_library() -> None:
    text = (ROOT / "server" / "client.py").read_text()
    assert len(text.splitlines()) <= 250
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"httpx", *sys.stdlib_module_names}


# ---- classify ----


@BOTH
def test_an_answer_is_the_servers_json(server: Live, ask: Callable[..., Any]) -> None:
    images = [png(n) for n in range(3)]
    url = str(server.client.base_url)
    options = {"templates": ["a {}."], "top_k": 1, "explain": True, "errors": "per_item"}
    ours = ask(url, "classify", images, CLASSES, method="tpt", seed=3, **options)
    body = {"images": [b64(image) for image in images], "classes": CLASSES, **options}
    theirs = server.client.post("/v1/classify", json={**body, "adaptation": {"method": "tpt", "seed": 3}})
    assert without_clock(ours) == without_clock(theirs.json())


@BOTH
def test_a_long_list_is_split_evenly_and_keeps_its_order(server: Live, ask: Callable[..., Any]) -> None:
    images = [png(n) for n in range(9)]
    before = server.metric("gram_requests_total", route="/v1/classify", code="200")
    whole = ask(str(server.client.base_url), "classify", images, CLASSES, method="none", top_k=None)
    assert server.metric("gram_requests_total", route="/v1/classify", code="200") == before + 3
    alone = [server.ask(image, adaptation={"method": "none"}, top_k=None).json()["results"][0] for image in images]
    assert [row["index"] for row in whole["results"]] == list(range(9))
    assert [row["predictions"] for row in whole["results"]] == [row["predictions"] for row in alone]
    assert whole["usage"]["images"] == 9


@BOTH
def test_a_batch_is_never_split(server: Live, ask: Callable[..., Any]) -> None:
    with pytest.raises(GramError) as caught:
        ask(str(server.client.base_url), "classify", [png(n) for n in range(5)], CLASSES, scope="batch")
    assert (caught.value.status, caught.value.code) == (413, "too_many_images")
    assert caught.value.request_id


def test_a_request_stays_within_the_bytes_that_a_server_takes(ask: Callable[..., Any]) -> None:
    bodies = [b"x" * 40_000] * 3
    with standing_in(INFO, answer("a", "b"), answer("c")) as server:
        whole = ask(server.url, "classify", bodies, CLASSES)
    assert [row["label"] for row in whole["results"]] == ["a", "b", "c"]
    assert all(len(body) <= 100_000 for _, body in server.asked)
    assert whole["timings_ms"] == {"total": 3.0}


def test_one_image_needs_no_look_at_the_limits_and_connections_are_kept() -> None:
    with standing_in(answer("a"), answer("b")) as server, GramClient(server.url) as client:
        for image in (png(), [png()]):
            client.classify(image, CLASSES)
        assert server.paths == ["/v1/classify"] * 2
        assert len(server.connections) == 1


def test_paths_bytes_files_and_pictures_are_the_same_image(tmp_path: Path) -> None:
    data = png(3)
    (tmp_path / "a.png").write_bytes(data)
    assert encode(tmp_path / "a.png") == encode(str(tmp_path / "a.png")) == encode(io.BytesIO(data)) == data
    assert encode(bytearray(data)) == data
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        sent = encode(picture)
        inky = encode(picture.convert("CMYK"))
    with (
        Image.open(io.BytesIO(sent), formats=["PNG"]) as theirs,
        Image.open(io.BytesIO(data), formats=["PNG"]) as ours,
    ):
        assert theirs.tobytes() == ours.tobytes()
    assert inky.startswith(b"\x89PNG")
    with pytest.raises(TypeError, match="int is no image"):
        encode(3)


def test_a_pictures_orientation_is_sent_along(server: Live) -> None:
    picture = Image.new("RGB", (9, 5))
    turned = picture.getexif()
    turned[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=turned)
    with GramClient(str(server.client.base_url)) as client, Image.open(file, formats=["JPEG"]) as read:
        (row,) = client.classify(read, CLASSES)["results"]
    assert (row["image"]["width"], row["image"]["height"]) == (5, 9)


def test_what_is_asked_wrongly_is_told_before_anything_is_sent(ask: Callable[..., Any]) -> None:
    for wrong in ({}, {"classes": "cat,dog"}, {"classes": ["a"], "class_set": "cs_1"}):
        with pytest.raises(TypeError, match="give one of"):
            ask("http://127.0.0.1:9", "classify", [png()], **wrong)
    with pytest.raises(TypeError, match="texts, or else images"):
        ask("http://127.0.0.1:9", "embed")
    for url in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="http://HOST:PORT"):
            GramClient(url)


# ---- keys, info, readiness ----


@BOTH
def test_info_and_readiness_are_asked_as_they_are(server: Live, ask: Callable[..., Any]) -> None:
    url = str(server.client.base_url)
    told, theirs = ask(url, "info"), server.client.get("/info").json()
    assert {**told, "uptime_seconds": 0} == {**theirs, "uptime_seconds": 0}
    assert ask(url, "ready") is True
    with socket.create_server(("127.0.0.1", 0)) as port:
        free = port.getsockname()[1]
    assert ask(f"http://127.0.0.1:{free}", "ready") is False


def test_a_key_comes_from_the_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(INFO, INFO, INFO) as server:
        monkeypatch.setenv("GRAM_API_KEY", "from-environment")
        monkeypatch.setenv("GRAM_URL", server.url)
        for client in (GramClient(), GramClient(api_key="given")):
            with client:
                client.info()
        monkeypatch.delenv("GRAM_API_KEY")
        with GramClient() as client:
            client.info()
    sent = [headers.get("authorization") for headers in server.headers]
    assert sent == ["Bearer from-environment", "Bearer given", None]


# ---- waiting and giving up ----


@BOTH
@pytest.mark.parametrize("status", [408, 429, 503])
def test_what_may_pass_is_tried_again(swift: None, ask: Callable[..., Any], status: int) -> None:  # noqa: ARG001
    with standing_in(refusal(status, "x"), refusal(status, "x"), answer("a")) as server:
        assert ask(server.url, "classify", [png()], CLASSES)["results"][0]["label"] == "a"
    assert len(server.asked) == 3
    assert len({body.split(b"\r\n\r\n", 1)[1][:40] for _, body in server.asked}) == 1


@BOTH
def test_it_waits_as_long_as_it_is_told_to(swift: None, ask: Callable[..., Any]) -> None:  # noqa: ARG001
    with standing_in(refusal(429, "overloaded", **{"retry-after": "1"}), answer("a")) as server:
        began = time.monotonic()
        ask(server.url, "classify", [png()], CLASSES)
    assert 1.0 <= time.monotonic() - began < 3.0
    assert len(server.asked) == 2


@BOTH
def test_it_never_waits_beyond_the_deadline(ask: Callable[..., Any]) -> None:
    with standing_in(refusal(503, "draining", **{"retry-after": "30"})) as server:
        began = time.monotonic()
        with pytest.raises(GramError) as caught:
            ask(server.url, "classify", [png()], CLASSES, timeout=2.0)
    assert time.monotonic() - began < 1.0
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (503, "draining", "r")
    assert caught.value.message == "no."


@BOTH
def test_four_retries_are_the_most(swift: None, ask: Callable[..., Any]) -> None:  # noqa: ARG001
    with standing_in(by=lambda *_: refusal(429, "overloaded")) as server, pytest.raises(GramError) as caught:
        ask(server.url, "classify", [png()], CLASSES)
    assert caught.value.status == 429
    assert len(server.asked) == 5


@BOTH
@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 415, 422, 500, 501, 504])
def test_nothing_else_is_tried_again(ask: Callable[..., Any], status: int) -> None:
    with standing_in(refusal(status, "code_of_tomorrow")) as server, pytest.raises(GramError) as caught:
        ask(server.url, "classify", [png()], CLASSES)
    assert (caught.value.status, caught.value.code) == (status, "code_of_tomorrow")
    assert len(server.asked) == 1


@BOTH
def test_a_server_that_is_not_there_yet_is_waited_for(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "BACKOFF_S", 0.4)
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = port.getsockname()[1]
    started: list[Any] = []

    def appear() -> None:
        def reply(handler: BaseHTTPRequestHandler) -> None:
            body = json.dumps(INFO[1]).encode()
            handler.send_response(200)
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        kind = type("H", (BaseHTTPRequestHandler,), {"do_GET": reply, "log_message": lambda *_: None})
        started.append(ThreadingHTTPServer(("127.0.0.1", number), kind))
        started[0].handle_request()

    later = threading.Timer(0.15, appear)
    later.start()
    assert ask(f"http://127.0.0.1:{number}", "info") == INFO[1]
    later.join()
    started[0].server_close()


@BOTH
def test_silence_has_codes_of_its_own(swift: None, ask: Callable[..., Any]) -> None:  # noqa: ARG001
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(GramError) as caught:
            ask(url, "info", timeout=0.2)
        assert time.monotonic() - began < 1.0
        assert (caught.value.status, caught.value.code, caught.value.request_id) == (0, "timeout", None)
    with pytest.raises(GramError) as caught:
        ask(url, "info")
    assert (caught.value.status, caught.value.code) == (0, "unreachable")


@BOTH
def test_another_kind_of_server_is_told_apart(ask: Callable[..., Any]) -> None:
    with standing_in((502, {"detail": "bad gateway"}, {})) as server, pytest.raises(GramError) as caught:
        ask(server.url, "info")
    assert (caught.value.status, caught.value.code) == (502, "unexpected_answer")


# ---- class sets and embeddings, to the contract ----


@BOTH
def test_a_forgotten_class_set_is_posted_again(ask: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    del ask
    made: Reply = (201, {"id": "cs_1", "size": 2, "texts": 2, "created": 1, "last_used": 1, "warm": True}, {})
    lost = refusal(404, "class_set_not_found")
    definition = {"classes": CLASSES, "templates": ["a {}."]}

    async def later(url: str) -> tuple[Any, Any]:
        async with AsyncGramClient(url) as client:
            known = await client.class_set(tuple(CLASSES), ["a {}."])
            return known, await client.classify([png()], class_set=known["id"])

    with standing_in(made, lost, made, answer("a")) as server:
        if request.node.callspec.params["ask"] == "sync":
            with GramClient(server.url) as client:
                known = client.class_set(tuple(CLASSES), ["a {}."])
                told = client.classify([png()], class_set=known["id"])
        else:
            known, told = asyncio.run(later(server.url))
    assert known == made[1]
    assert told["results"][0]["label"] == "a"
    assert server.paths == ["/v1/class-sets", "/v1/classify", "/v1/class-sets", "/v1/classify"]
    assert [body for path, body in server.asked if path == "/v1/class-sets"] == [definition] * 2
    assert b'"classes": {"class_set": "cs_1"}' in server.asked[-1][1]


def test_a_class_set_of_somebody_else_is_not_made_up(ask: Callable[..., Any]) -> None:
    with standing_in(refusal(404, "class_set_not_found")) as server, pytest.raises(GramError) as caught:
        ask(server.url, "classify", [png()], class_set="cs_2")
    assert caught.value.status == 404


@BOTH
def test_embeddings_come_in_the_order_of_what_was_given(ask: Callable[..., Any]) -> None:
    def embedded(path: str, body: Any) -> Reply:
        if path == "/info":
            return INFO
        rows = [{"object": "embedding", "index": n, "embedding": [len(text)]} for n, text in enumerate(body["input"])]
        return 200, {"object": "list", "data": rows, "model": "m", "usage": {"prompt_tokens": len(rows)}}, {}

    with standing_in(by=embedded) as server:
        texts = ask(server.url, "embed", ["a", "bb", "ccc", "dddd"])
        pictures = ask(server.url, "embed", images=[png(n) for n in range(5)])
    assert [row["embedding"] for row in texts["data"]] == [[1], [2], [3], [4]]
    assert [row["index"] for row in texts["data"]] == [0, 1, 2, 3]
    assert texts["usage"] == {"prompt_tokens": 4}
    assert [row["embedding"][0] for row in pictures["data"]] == [len(b64(png(n))) for n in range(5)]
    sent = [body for path, body in server.asked if path == "/v1/embeddings"]
    assert [body["modality"] for body in sent] == ["text", "text", "image", "image"]
    assert [len(body["input"]) for body in sent] == [3, 1, 4, 1]


# ---- pieces ----


def test_pieces_hold_everything_once_in_order_and_within_the_limits() -> None:
    rng = random.Random(0)
    for _ in range(200):
        items = [rng.randrange(1, 40) for _ in range(rng.randrange(0, 30))]
        most, room = rng.randrange(1, 8), rng.randrange(5, 90)
        made = list(pieces(items, int, most, room))
        assert [item for piece in made for item in piece] == items
        assert all(len(piece) <= most and (sum(piece) <= room or len(piece) == 1) for piece in made)
        if items:
            assert all(made)


def test_pieces_are_made_as_they_are_wanted() -> None:
    taken: list[int] = []
    made = pieces((taken.append(n) or n for n in range(1000)), lambda _: 1, 3, 100)  # type: ignore[func-returns-value]
    assert next(made) == [0, 1, 2]
    assert len(taken) == 4


def test_a_client_works_on_any_transport() -> None:
    def told(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=INFO[1], request=request)

    with GramClient("http://localhost", transport=httpx.MockTransport(told)) as client:
        assert client.info() == INFO[1]
