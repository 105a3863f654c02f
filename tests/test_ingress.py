"""Whatever bytes arrive: bounded time and memory, a documented end, and the next request is served.

Raw sockets against a server in a process of its own. During every attack another client asks `/livez`.
"""

from __future__ import annotations

import binascii
import json
import random
import resource
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from server import images
from server.errors import ApiError
from server.schemas import MAX_JSON_LISTS
from tests import zoo
from tests.apart_fixtures import LIVEZ, Answer, Apart, answers, apart, probed, push, talk, until_closed
from tests.server_fixtures import Live, answered, b64, body, live, png, until

MIB = 1 << 20
ROOM = 16  # MiB that the allocator may take where nothing is meant to be kept
POST = b"POST /classify HTTP/1.1\r\nHost: localhost\r\n"
RAW = b"POST /classify?classes=cat&classes=dog HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
SMUGGLED = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module", params=[4, pytest.param(32, marks=pytest.mark.slow)], ids="{}MiB".format)
def cap(request: pytest.FixtureRequest) -> int:
    """GRAM_MAX_BODY_BYTES; the default under `slow`, where every attack takes its full size."""
    return int(request.param) * MIB


@pytest.fixture(scope="module")
def process(cap: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with apart(tmp_path_factory.mktemp("server") / "log", max_body_bytes=cap, max_image_bytes=cap // 2) as running:
        yield running


@pytest.fixture
def server(process: Apart) -> Iterator[Apart]:
    """The server, watched while the test runs and well afterwards."""
    with probed(process):
        yield process
    process.assert_well()


def length(content: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(content)


def request(content: bytes, media: bytes = JSON, head: bytes = POST, close: bool = True) -> bytes:
    return head + media + length(content) + (CLOSE if close else b"") + b"\r\n" + content


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def repr_of(content: bytes) -> str:
    """A short name of a case."""
    return repr(content[:30] + b"..." if len(content) > 30 else content)


def only(found: list[Answer], status: int, code: str | None = None) -> Answer:
    assert [(answer.status, answer.code) for answer in found] == [(status, code)]
    return found[0]


PNG = png()
GOOD = json.dumps(body()).encode()


# ---- the body's length ----


@pytest.mark.parametrize(
    "value",
    [b"-1", b"+5", b"5 5", b"5,5", b"0x5", b"5.0", b"1e3", b"five", b"\xb2", b"9" * 19, b"9" * 5000],
    ids=repr_of,
)
def test_a_length_that_is_no_length_is_refused(server: Apart, value: bytes) -> None:
    found = talk(server, RAW + b"Content-Length: " + value + b"\r\n\r\n" + SMUGGLED)
    assert found[0].status in (400, 413)
    assert len(found) == 1, "what followed was taken for a request"


AMBIGUOUS = {
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "one length twice": b"Content-Length: 5\r\nContent-Length: 5\r\n",
    "length, chunked": b"Content-Length: 5\r\n" + CHUNKED,
    "chunked, length": CHUNKED + b"Content-Length: 5\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n",
    "chunked on two lines": CHUNKED + CHUNKED,
    "chunked, then identity": b"Transfer-Encoding: chunked, identity\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "gzip, chunked": b"Transfer-Encoding: gzip, chunked\r\n",
    "chunked in quotes": b'Transfer-Encoding: "chunked"\r\n',
    "chunked behind a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "chunked on a folded line": b"Transfer-Encoding:\r\n chunked\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n",
    "a name with a line feed": b"A\nTransfer-Encoding: chunked\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_body_whose_end_two_readers_could_see_differently_hides_no_request(server: Apart, name: str) -> None:
    smuggle = b"5\r\nhello\r\n0\r\n\r\n" + SMUGGLED
    found = talk(server, RAW + AMBIGUOUS[name] + b"\r\n" + smuggle)
    assert [answer.status for answer in found] in ([400], [415], []), "what followed was taken for a request"


@pytest.mark.parametrize(
    "chunk",
    [
        b"g\r\nx\r\n",
        b"-1\r\nx\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b" 1\r\nx\r\n",
        b"\r\nx\r\n",
        b"1\r\nxx\r\n",
        b"2\r\nx\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nx\r\n",
        b"1\nx\n0\n\n",
        b"1;\x00\r\nx\r\n",
        b"0\r\nX: a\x00b\r\n\r\n",
        b"0\r\nContent-Length : 5\r\n\r\n",
    ],
    ids=repr_of,
)
def test_a_chunk_that_is_none_ends_the_connection(server: Apart, chunk: bytes) -> None:
    found = talk(server, RAW + CHUNKED + b"\r\n" + chunk + SMUGGLED)
    assert [answer.status for answer in found] in ([], [400], [415], [422])


def test_a_length_above_the_cap_is_refused_without_asking_for_the_body(server: Apart, cap: int) -> None:
    head = RAW + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (cap + 1)
    answer = only(talk(server, head), 413, "body_too_large")
    assert answer.headers["connection"] == "close"


def test_a_gigabyte_in_chunks_is_cut_at_the_cap(server: Apart, cap: int) -> None:
    piece = b"10000\r\n" + bytes(65536) + b"\r\n"
    with server.flat(3 * cap / MIB + ROOM), server.connect() as connection:
        connection.sendall(RAW + CHUNKED + b"\r\n")
        sent = 0
        with suppress(ConnectionError):
            while sent < 1024 * MIB:
                connection.sendall(piece)
                sent += len(piece)
        until_closed(connection)
    assert sent < cap + 16 * MIB  # what fits into the buffers on the way comes on top


def test_a_client_that_asks_first_is_told_to_go_on(server: Apart) -> None:
    with server.connect() as connection:
        connection.sendall(POST + JSON + length(GOOD) + CLOSE + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(GOOD)
        only(answers(until_closed(connection)), 200)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"zstd", b"identity, gzip", b"x" * 1000], ids=repr_of)
def test_an_encoded_body_is_refused_unread(server: Apart, encoding: bytes) -> None:
    head = POST + JSON + b"Content-Encoding: " + encoding + b"\r\nContent-Length: 1000000\r\n\r\n"
    only(talk(server, head), 415, "unsupported_media_type")


def test_pipelined_requests_are_answered_in_their_order_and_each_with_its_own(server: Apart) -> None:
    asked, expected = b"", []
    for number in range(30):
        content = json.dumps(body(png(number), classes=[f"a{number}", f"b{number}"])).encode()
        if number % 3 == 2:
            content = content[:-1]
        asked += request(content, close=number == 29)
        expected.append(None if number % 3 == 2 else number)
    found = talk(server, asked)
    assert len(found) == 30
    for number, answer in zip(expected, found, strict=True):
        assert answer.status == (400 if number is None else 200)
        if number is not None:
            alone = server.ask(png(number), classes=[f"a{number}", f"b{number}"]).json()
            assert json.loads(answer.content)["results"] == alone["results"]


def test_clients_that_leave_in_the_middle_of_a_body_are_each_counted_once(server: Apart) -> None:
    before = server.metric("gram_requests_total", code="499", route="/classify")
    with ExitStack() as stack:
        for number in range(50):
            connection = stack.enter_context(server.connect())
            connection.sendall(request(GOOD)[: -1 - number])
        until(lambda: server.held()["requests_inflight"] == 51, "all wait for the rest")
    until(lambda: server.held()["requests_inflight"] == 1, "all are gone")
    assert server.metric("gram_requests_total", code="499", route="/classify") == before + 50


def test_a_body_that_drips_is_408_when_its_time_is_up() -> None:
    with live(body_timeout_s=0.3) as server, probed(server), server.connect() as connection:
        connection.sendall(RAW + b"Content-Length: 100000\r\n\r\n")
        connection.settimeout(0.01)
        received = b""
        for _ in range(1000):
            connection.sendall(b"x")
            with suppress(TimeoutError):
                received += connection.recv(65536)
            if received:
                break
        connection.settimeout(10)
        only(answers(received + until_closed(connection)), 408, "body_timeout")


# ---- what is no request at all ----


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100_000,
        b"\xff" * 100_000,
        b"\r\n" * 100_000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1 \r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET \r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\r\n\r\n",
        b"GET / HTTP/1.1\r\n: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\rX: c\r\n\r\n",
        b"GET / HTTP/1.1\r\n A: b\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http:///livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-client\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET /nowhere\r\n\r\n",
    ],
    ids=repr_of,
)
def test_what_is_no_http_request_is_told_so_and_hung_up_on(server: Apart, content: bytes) -> None:
    found = talk(server, content)
    assert [answer.code for answer in found] in ([], ["malformed_body"], ["not_found"], ["host_not_allowed"])


@pytest.mark.parametrize(
    "lines",
    [
        b"X-Request-Id: " + b"a" * 10_000,
        b"X-Request-Id: caf\xc3\xa9",
        b"X-Request-Id: \xff\xfe",
        b"X-Request-Id: a%0d%0aX-Evil: b",
        b"X-Request-Id: a\tb",
        b'X-Request-Id: "}{',
        b"X-Request-Id: a\r\nX-Request-Id: b c",
        b"X-Request-Id:",
    ],
    ids=repr_of,
)
def test_a_request_id_that_could_do_harm_is_replaced(server: Apart, lines: bytes) -> None:
    answer = only(talk(server, LIVEZ + lines + b"\r\n" + CLOSE + b"\r\n"), 200)
    given = answer.headers["x-request-id"]
    assert given.startswith("req_") or given == "a"
    assert "x-evil" not in answer.headers


def test_no_carriage_return_of_a_header_comes_back(server: Apart) -> None:
    for ending in (b"\r", b"\n", b"\r\r\n", b"\x0b"):
        received = talk(server, LIVEZ + b"X-Request-Id: a" + ending + b"X-Evil: b\r\n" + CLOSE + b"\r\n")
        for answer in received:
            assert "x-evil" not in answer.headers


# ---- JSON ----

FULL: dict[str, Any] = {
    "images": [{"data": b64(PNG), "id": "one"}, b64(PNG)],
    "classes": {"cat": ["a cat", "one cat"], "dog": ["a dog"]},
    "templates": ["a {}"],
    "adaptation": {"method": "tpt", "host": "coop", "scope": "image", "steps": 1, "views": 2, "seed": 3},
    "top_k": 1,
    "score": "cosine",
    "errors": "fail",
    "explain": True,
    "timeout_ms": 1000,
}


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`, itself included."""
    yield ()
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from ((key, *rest) for rest in places(value[key]))


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(copy[place[0]], place[1:], by)
    return copy


@pytest.mark.parametrize(
    "by",
    [None, "\ud800", True, -1, 1.5, "x" * 100_000, [], {}, [[]], {"": None}],
    ids=["null", "surrogate", "true", "negative", "fraction", "long", "list", "object", "nested", "empty key"],
)
def test_any_value_in_any_place_is_answered_or_refused(server: Apart, by: Any) -> None:
    by = json.loads(json.dumps(by))
    for base in (FULL, {**FULL, "classes": ["cat", "dog"], "adaptation": {}}):
        for place in places(base):
            content = json.dumps(replaced(base, place, by)).encode()
            response = server.client.post("/classify", content=content, headers={"content-type": "application/json"})
            assert answered(response).status_code in (200, 400, 415, 422), (place, response.text)


HEAVY_JSON: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
    "as many lists as may be": lambda _: b"[" + b"[]," * (MAX_JSON_LISTS - 2) + b"[]]",
    "nested": lambda size: b"[" * size,
    "objects": lambda size: b"[" + b"{}," * (size // 3) + b"{}]",
    "numbers": lambda size: b"[" + b"1," * (size // 2) + b"1]",
    "digits": lambda size: b"[" + b"9" * size + b"]",
    "numbers of 4300 digits": lambda size: b"[" + (b"9" * 4300 + b",") * (size // 4301) + b"1]",
    "escapes": lambda size: b'["' + b"\\u00e9" * (size // 6) + b'"]',
    "spaces": lambda size: b" " * size + b"[]",
    "quotes": lambda size: b'"' * size,
    "backslashes": lambda size: b'["' + b"\\" * size + b'"]',
    "one astral character": lambda size: b'["' + b"a" * size + "\U0001f600".encode() + b'"]',
}


@pytest.mark.parametrize("name", HEAVY_JSON)
def test_json_of_any_weight_is_refused_within_bounds(server: Apart, cap: int, name: str) -> None:
    content = HEAVY_JSON[name](cap * 9 // 10)
    # As received, as bytes, as text of up to four bytes a character, and as the value of that text.
    with server.flat(10 * cap / MIB + ROOM):
        (answer,) = talk(server, request(content))
    assert answer.status in (400, 422)


# ---- forms ----

FORM = b"Content-Type: multipart/form-data; boundary=limit\r\n"
END = b"--limit--\r\n"


def part(name: bytes, data: bytes, disposition: bytes = b"", lines: bytes = b"") -> bytes:
    head = b'--limit\r\nContent-Disposition: form-data; name="' + name + b'"' + disposition + b"\r\n" + lines + b"\r\n"
    return head + data + b"\r\n"


TWO = part(b"classes", b"cat") + part(b"classes", b"dog")
NESTED = b"--in\r\n\r\nx\r\n--in--"
IMAGE = part(b"image", PNG, b'; filename="a.png"')
FORMS: dict[str, tuple[Callable[[int], bytes], int, str | None]] = {
    "plain": (lambda _: IMAGE + TWO + END, 200, None),
    "an epilogue": (lambda _: IMAGE + TWO + END + b"that was it\r\n" * 1000, 200, None),
    "an endless epilogue": (lambda size: IMAGE + TWO + END + bytes(size), 200, None),
    "line ends first": (lambda _: b"\r\n" * 10 + IMAGE + TWO + END, 200, None),
    "nothing but line ends": (lambda size: b"\r\n" * (size // 2), 400, "malformed_body"),
    "a preamble": (lambda _: b"this is a form\r\n" + IMAGE + TWO + END, 400, "malformed_body"),
    "countless fields": (lambda size: part(b"classes", b"c") * min(size // 60, 100_000) + END, 422, "invalid_request"),
    "10k images": (lambda _: part(b"image", b"") * 10_000 + END, 413, "too_many_images"),
    "a name of 64 KiB": (lambda _: IMAGE + TWO + part(b"classes", b"x" * 65_537) + END, 422, "invalid_request"),
    "an endless number": (lambda size: IMAGE + TWO + part(b"top_k", b"9" * size) + END, 422, "invalid_request"),
    "an endless part": (lambda size: part(b"image", bytes(size)) + TWO + END, 413, "image_too_large"),
    "an endless part header": (lambda size: b"--limit\r\nX: " + b"x" * size, 400, "malformed_body"),
    "endless part headers": (lambda size: b"--limit\r\n" + b"X: a\r\n" * (size // 6), 400, "malformed_body"),
    "an endless name": (lambda size: part(b"x" * size, b""), 400, "malformed_body"),
    "only dashes": (lambda size: b"-" * size, 400, "malformed_body"),
    "only boundaries": (lambda size: b"--limit\r\n" * (size // 9), 400, "malformed_body"),
    "a filename in extended syntax": (
        lambda _: part(b"image", PNG, b"; filename*=utf-8''%2e%2e%2fa") + TWO + END,
        200,
        None,
    ),
    "a filename that is a path": (
        lambda _: part(b"image", PNG, b'; filename="../../etc/passwd"') + TWO + END,
        200,
        None,
    ),
    "a filename with a zero": (lambda _: part(b"image", PNG, b'; filename="a\0b"') + TWO + END, 200, None),
    "a boundary that is no text": (lambda _: IMAGE.replace(b"limit", b"l\xffmit") + TWO + END, 400, "malformed_body"),
    "a form inside a form": (
        lambda _: part(b"image", NESTED, b"", b"Content-Type: multipart/mixed; boundary=in\r\n") + TWO + END,
        415,
        "unsupported_image_format",
    ),
    "a transfer encoding of a part": (
        lambda _: part(b"image", b64(PNG).encode(), b"", b"Content-Transfer-Encoding: base64\r\n") + TWO + END,
        415,
        "unsupported_image_format",
    ),
    "a charset of a part": (
        lambda _: IMAGE + part(b"classes", b"\xff\xfed\0", b"", b"Content-Type: text/plain; charset=utf-16\r\n") + END,
        400,
        "malformed_body",
    ),
    "line feeds alone": (lambda _: (IMAGE + TWO + END).replace(b"\r\n", b"\n"), 400, "malformed_body"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read_or_refused_within_bounds(server: Apart, cap: int, name: str) -> None:
    make, status, code = FORMS[name]
    with server.flat(4 * cap / MIB + ROOM):
        only(talk(server, request(make(cap * 9 // 10), FORM)), status, code)


@pytest.mark.parametrize("lure", [b"\r\n--limi", b"\r\n--", b"--limit--", b"\r\n-", b"\r", b"\r\n--Limit"], ids=repr_of)
def test_bytes_that_almost_end_a_part_are_part_of_it(server: Apart, lure: bytes) -> None:
    data = zoo.png(zoo.ramp16(3), 8, 2, before=zoo.chunk(b"prVt", lure * 5000))
    (answer,) = talk(server, request(part(b"image", data) + TWO + END, FORM))
    alone = server.ask(data)
    assert json.loads(answer.content)["results"] == alone.json()["results"]


@pytest.mark.parametrize(
    "media",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"x" * 30_000,
        b"multipart/form-data; boundary*=utf-8''limit",
        b"multipart/form-data; " + b"a=b; " * 5000,
        b"multipart/form-data; boundary=\xff",
        b"multipart/mixed; boundary=limit",
        b"multipart/form-data; boundary=limit; boundary=other",
        b"multipart/form-data, multipart/form-data; boundary=limit",
    ],
    ids=repr_of,
)
def test_a_form_whose_boundary_can_not_be_known_is_refused(server: Apart, media: bytes) -> None:
    (answer,) = talk(server, request(IMAGE + TWO + END, b"Content-Type: " + media + b"\r\n"))
    assert answer.code in ("malformed_body", "unsupported_media_type")


# ---- base64 ----


def padded(size: int) -> bytes:
    """A good picture of exactly `size` bytes."""
    jpeg = zoo.encoded(zoo.picture(), "JPEG")
    return jpeg + bytes(size - len(jpeg))


def quoted(text: str) -> bytes:
    return json.dumps({"images": [text], "classes": ["cat", "dog"]}).encode()


def lines(text: str) -> str:
    return "\n".join(text[at : at + 76] for at in range(0, len(text), 76))


BASE64: dict[str, tuple[Callable[[int], str], int, str | None]] = {
    "the largest image": (lambda size: b64(padded(size)), 200, None),
    "the largest image in lines": (lambda size: lines(b64(padded(size))), 200, None),
    "a byte more": (lambda size: b64(padded(size + 1)), 413, "image_too_large"),
    "line ends alone": (lambda size: "\r\n" * (size // 4), 422, "undecodable_image"),
    "letters alone": (lambda size: "A" * (size // 3 * 4), 415, "unsupported_image_format"),
    "padding alone": (lambda size: "=" * (size // 3 * 4), 400, "invalid_base64"),
    "padding first": (lambda size: "=" + b64(padded(size))[1:], 400, "invalid_base64"),
    "a bad last letter": (lambda size: b64(padded(size))[:-1] + "-", 400, "invalid_base64"),
    "data urls in data urls": (lambda size: "data:;base64," * min(size // 13, 100_000), 400, "invalid_base64"),
    "fill bytes of a jpeg": (lambda size: b64(b"\xff\xd8".ljust(size, b"\xff")), 422, "undecodable_image"),
    "stuffed bytes of a jpeg": (lambda size: b64(b"\xff\xd8" + b"\xff\0" * (size // 2 - 1)), 422, "undecodable_image"),
}


@pytest.mark.parametrize("name", BASE64)
def test_the_largest_base64_is_decoded_or_refused_within_bounds(server: Apart, cap: int, name: str) -> None:
    make, status, code = BASE64[name]
    with server.flat(6 * cap / MIB + ROOM):
        only(talk(server, request(quoted(make(cap // 2)))), status, code)


def test_base64_in_slices_is_base64_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SLICE", 8)

    def whole(text: str) -> bytes | None:
        joined = text.replace("\r", "").replace("\n", "")
        try:
            return binascii.a2b_base64(joined, strict_mode=True) if len(joined) % 4 == 0 else None
        except binascii.Error:
            return None

    def sliced(text: str) -> bytes | None:
        try:
            return images._encoded(text, 0, 1000)
        except ApiError as error:
            return None if error.code == "invalid_base64" else b"?"

    rng, fine = random.Random(0), 0
    for _ in range(3000):
        letters = list(b64(rng.randbytes(rng.randrange(40))))
        for _ in range(rng.randrange(4)):
            letters.insert(rng.randrange(len(letters) + 1), rng.choice(["\n", "\r\n", "\n", "=", "A", "-"]))
        text = "".join(letters) + rng.choice(["", "", "\n" * 20, "=", "QUFB", "\n" * 9 + "QUFB"])
        assert sliced(text) == whole(text), text
        fine += whole(text) is not None
    assert 500 < fine < 2500
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        images._encoded(b64(bytes(1001)), 0, 1000)
    assert images._encoded(b64(bytes(1000)), 0, 1000) == bytes(1000)


# ---- many at once ----


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    """As many open sockets as the attacks need, here and in the server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_idle_connections_keep_nobody_out(server: Apart) -> None:
    with server.flat(64), ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(1000)]
        for connection in idle:
            connection.sendall(LIVEZ + b"\r\n")
        assert {connection.recv(65536)[:12] for connection in idle} == {b"HTTP/1.1 200"}
        server.assert_well()


def test_two_hundred_slow_headers_keep_nobody_out_and_are_let_go(tmp_path: Path) -> None:
    with apart(tmp_path / "log", header_timeout_s=0.5) as server:
        with probed(server), server.flat(32), ExitStack() as stack:
            slow = [stack.enter_context(server.connect()) for _ in range(200)]
            for connection in slow:
                connection.sendall(b"GET /livez HTTP/1.1\r\n")
            server.assert_well()
            for connection in slow[:100]:
                push(connection, b"X: a\r\n")
            ends = Counter(until_closed(connection)[:12] for connection in slow)
        assert set(ends) <= {b"HTTP/1.1 408", b""}
        assert ends[b"HTTP/1.1 408"] >= 100
        server.assert_well()


def test_fifty_full_uploads_at_once_never_hold_more_than_they_may() -> None:
    cap, most = 2 * MIB, 13 * MIB  # six bodies, and their pixels
    content = quoted(b64(padded(cap * 3 // 4 - 100)))
    assert cap - 1000 < len(content) <= cap
    limits = {"max_body_bytes": cap, "max_image_pixels": MIB, "max_request_pixels": MIB, "max_inflight_bytes": most}
    with live(**limits) as server:
        peak = held_at_most(server)
        start = threading.Barrier(50)

        def upload(number: int) -> str:
            with server.connect() as connection:
                start.wait()
                sent = push(connection, request(content, close=True))
                found = answers(until_closed(connection))
            if not found:
                assert sent < len(content), number  # hung up on while still talking: the refusal is lost on its way
                return "refused"
            return {200: "answered", 429: "refused"}[found[0].status]

        with probed(server), ThreadPoolExecutor(50) as pool:
            ends = Counter(pool.map(upload, range(50)))
        assert sum(ends.values()) == 50
        assert ends["answered"] >= 6
        assert cap < max(peak) <= most
        server.assert_well()


def held_at_most(server: Live) -> list[int]:
    """What the byte budget holds after each of its changes, from here on."""
    budget, held = server.service.budget, []
    take = budget.take

    def spy(size: int) -> None:
        take(size)
        held.append(budget.held)

    budget.take = spy  # type: ignore[method-assign]
    return held


def test_thirty_of_a_hundred_clients_that_leave_cost_the_others_nothing(server: Apart) -> None:
    """A third of them in the middle of the body, a third after it, a third by resetting the connection."""

    def ask(number: int) -> bool:
        names = [f"{number}-{n}" for n in range(4)]
        asked = request(json.dumps(body(png(number), classes=names)).encode())
        with server.connect() as connection:
            if number % 10 < 3:
                connection.sendall(asked[: len(asked) // 2] if number % 10 == 0 else asked)
                if number % 10 == 1:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return True
            connection.sendall(asked)
            answer = only(answers(until_closed(connection)), 200)
        labels = {found["label"] for found in json.loads(answer.content)["results"][0]["predictions"]}
        return labels == set(names)

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(100)))


# ---- the log ----


def test_every_line_of_the_log_is_one_json_object_and_none_repeats_what_was_sent(server: Apart) -> None:
    word = b"zebracrossing"
    talk(server, POST.replace(b"/classify", b"/%0a{" + word + b"}%22%0d") + CLOSE + b"\r\n")
    talk(server, b"GET /" + word + b"?" + word + b"=%0a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    talk(server, LIVEZ + b"X-Request-Id: " + word + b"\xe2\x80\xa8\r\n" + CLOSE + b"\r\n")
    talk(server, LIVEZ + b"Authorization: Bearer " + word + b"\r\nTraceparent: " + word + b"\r\n" + CLOSE + b"\r\n")
    talk(server, word + b" / HTTP/1.1\r\n\r\n")
    talk(server, LIVEZ.replace(b"localhost", word) + CLOSE + b"\r\n")
    talk(server, request(json.dumps(body(classes=[word.decode(), "\n"])).encode()))
    talk(server, request(json.dumps({word.decode(): 1}).encode()))
    talk(server, request(part(word, word, b'; filename="' + word + b'"') + END, FORM))
    talk(server, request(word * 100, b"Content-Type: image/" + word + b"\r\n"))
    talk(server, request(quoted("https://" + word.decode())))
    server.assert_well()
    assert len(server.lines()) > 10
    assert all(isinstance(line, dict) and line["event"] for line in server.lines())
    assert word not in server.log.read_bytes()
    assert word.decode() not in server.client.get("/metrics").text
