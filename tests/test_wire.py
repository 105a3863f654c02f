"""What a connection may do before a request exists, and after its answer is written. Raw sockets, real server."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.wire import MAX_PIPELINED, MAX_TINY_CHUNKS, TINY, Protocol
from tests import zoo
from tests.apart_fixtures import probed, push, until_closed
from tests.server_fixtures import Live, b64, body, live, png, until

HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def server() -> Iterator[Live]:
    with live(header_timeout_s=0.2, max_connections=50, max_header_bytes=4096) as running:
        yield running
        running.assert_well()


def received(connection: socket.socket) -> bytes:
    """Everything until the server hangs up; a reset counts as hanging up."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            content += piece
    return content


def test_uvicorn_still_has_what_is_overridden_here() -> None:
    ours = {name for name, value in vars(Protocol).items() if callable(value) and not name.startswith("_")}
    assert ours == {
        "connection_made",
        "connection_lost",
        "data_received",
        "on_url",
        "on_header",
        "on_headers_complete",
        "on_chunk_header",
        "on_body",
        "on_message_complete",
        "send_400_response",
        "pause_writing",
        "resume_writing",
    }
    for name in ours - {"on_chunk_header"}:  # which the parser alone knows
        assert callable(getattr(HttpToolsProtocol, name)), name


@pytest.mark.parametrize(
    "header",
    [
        b"X: " + b"a" * 8_388_608,
        b"X: a\r\n" * 100_000,
        b"X" * 8_388_608,
        b"X: " + b"a" * 4096 + b"\r\n\r\n",
    ],
    ids=["one long value", "many lines", "one long name", "complete but too long"],
)
def test_a_header_beyond_its_cap_is_hung_up_on(server: Live, header: bytes) -> None:
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(HEAD + header)
        content = received(connection)
    if content:  # what was still on its way when the server hung up may have cost us the answer
        assert content.startswith(b"HTTP/1.1 400 ")
        assert json.loads(content.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_body"
    if header.startswith(b"X: " + b"a" * 4096 + b"\r"):
        assert b"4096 bytes" in content
    until(lambda: not server_connections(server), "the connection is gone")


def server_connections(server: Live) -> bool:
    """Whether anyone but the test's own client is connected."""
    return server.metric("gram_requests_inflight") > 1


def test_a_target_beyond_the_cap_is_hung_up_on(server: Live) -> None:
    assert server.raw(b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("begun", [b"", b"GET", HEAD, b"\r\n\r\n\r\n"], ids=["nothing", "a verb", "no end", "newlines"])
def test_a_header_that_does_not_come_ends_the_connection(server: Live, begun: bytes) -> None:
    started = time.monotonic()
    with server.connect() as connection:
        connection.sendall(begun)
        content = received(connection)
    assert content.startswith(b"HTTP/1.1 408 ")
    assert 0.15 < time.monotonic() - started < 5


def test_a_header_that_drips_ends_the_connection(server: Live) -> None:
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        end = time.monotonic() + 5
        for byte in HEAD * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
            assert time.monotonic() < end, "it may drip for ever"


def test_newlines_that_drip_between_requests_end_the_connection(server: Live) -> None:
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        end = time.monotonic() + 5
        while True:
            connection.sendall(b"\r\n")
            time.sleep(0.01)
            assert time.monotonic() < end, "it may drip for ever"


def test_a_kept_connection_answers_many_requests_of_the_allowed_size(server: Live) -> None:
    long = HEAD + b"X: " + b"a" * 3000 + b"\r\n\r\n"
    with server.connect() as connection:
        for _ in range(20):
            connection.sendall(long)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(long * 20)  # pipelined
        content = b""
        while content.count(b"HTTP/1.1 200 ") < 20:
            piece = connection.recv(65536)
            assert piece
            content += piece


def test_a_slow_body_is_not_taken_for_a_slow_header(server: Live) -> None:
    content = json.dumps(body(png())).encode()
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content))
        for start in range(0, len(content), 100):
            time.sleep(0.4 / len(range(0, len(content), 100)))
            connection.sendall(content[start : start + 100])
        assert received(connection).startswith(b"HTTP/1.1 200 ")


def test_connections_beyond_the_bound_are_told_and_let_go(server: Live) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    head += b"Content-Length: 5\r\n\r\n"  # a body that does not come
    with contextlib.ExitStack() as stack:
        for _ in range(49):  # and the test's own client
            stack.enter_context(server.connect()).sendall(head)
        until(lambda: server.metric("gram_requests_inflight") == 50, "all are connected")
        refused = received(stack.enter_context(server.connect()))
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in refused
        assert server.client.get("/livez").status_code == 200
    until(lambda: server.metric("gram_requests_inflight") == 1, "they are gone")


@pytest.mark.parametrize(
    "tail", [b"0\r\nX: ", b"0\r\n" + b"X: a\r\n" * 1000, b"1;x="], ids=["long", "many", "extension"]
)
def test_a_trailer_that_does_not_end_is_hung_up_on(server: Live, tail: bytes) -> None:
    head = b"POST /classify?classes=a&classes=b HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n" + tail)
        sent = 0
        while sent < 100_000_000:
            connection.sendall(b"a" * 65536)
            sent += 65536
        pytest.fail("it takes whatever comes")


def test_an_upgrade_is_an_ordinary_request(server: Live) -> None:
    for upgrade in (b"websocket", b"h2c"):
        lines = b"Connection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n"
        with server.connect() as connection:
            connection.sendall(HEAD + lines)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_reader_that_does_not_read_is_let_go_and_others_are_served() -> None:
    names = [f"{n} " + "x" * 200 for n in range(1000)]
    ask = json.dumps({"images": [b64(png())] * 50, "classes": names, "top_k": 1000}).encode()
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with live(body_timeout_s=0.5) as server, server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(ask) + ask)
        until(lambda: server.metric("gram_requests_total", route="/classify") >= 1, "it is answered or let go")
        assert server.metric("gram_requests_inflight") == 1
        server.assert_well()


RAW = b"POST /classify?classes=a&classes=b HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
CHUNKED = RAW + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_in_crumbs_is_hung_up_on_and_does_not_hold_the_event_loop() -> None:
    with live() as server, probed(server), ThreadPoolExecutor(4) as pool:

        def send(_: int) -> bytes:
            with server.connect() as connection:
                push(connection, CHUNKED + b"1\r\na\r\n" * 500_000 + b"0\r\n\r\n")
                return until_closed(connection)

        assert list(pool.map(send, range(8))) == [b""] * 8
        server.assert_well()


def test_a_body_in_small_chunks_is_read() -> None:
    with live() as server:
        small = b"1\r\na\r\n" * MAX_TINY_CHUNKS + b"0\r\n\r\n"
        content = zoo.encoded(zoo.picture(), "JPEG") + bytes(TINY * MAX_TINY_CHUNKS)
        pieces = [content[at : at + TINY] for at in range(0, len(content), TINY)]
        larger = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        assert len(pieces) > MAX_TINY_CHUNKS
        for body, status in ((small, b"415"), (larger, b"200")):
            assert server.raw(CHUNKED + body).startswith(b"HTTP/1.1 " + status)


def test_requests_behind_a_hundred_others_are_hung_up_on() -> None:
    with live() as server, server.connect() as connection:
        push(connection, (HEAD + b"\r\n") * 50_000)
        assert until_closed(connection).count(b"HTTP/1.1 ") <= MAX_PIPELINED + 1
        assert server.raw((HEAD + b"\r\n") * 90 + HEAD + b"Connection: close\r\n\r\n").count(b"HTTP/1.1 200 ") == 91
        server.assert_well()
