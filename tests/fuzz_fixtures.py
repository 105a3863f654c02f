"""Requests made from the OpenAPI document, sent to the app in this process, and what every answer is held to.

The document has one request body with three forms, and rules between them (a query goes with a raw image only) that
OpenAPI can't say. So it is cut into one document per form, `FORMS`, each of which promises more than the whole.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import anyio
import hypothesis
import pytest
import requests
import schemathesis
from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, reject
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.core.transport import Response
from schemathesis.specs.openapi import checks as openapi_checks
from schemathesis.transport.serialization import Binary
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from server.answers import ErrorAnswer
from server.app import create_app
from server.errors import RETRYABLE, STATUS
from server.fake import FakeClassifier
from server.openapi import RAW_TYPES
from server.settings import Settings
from tests.server_fixtures import b64, png, until
from tests.zoo import zoo

Mode = Literal["positive", "negative"]
EXAMPLES = 50  # of a property
MANY, ROUNDS = 100, 25  # a slow run tries so many times as much, in rounds with a seed each
SLOW_S = 20.0  # of this process for one test of a slow run; `benchmarks/fuzz.py` has no such bound
SCALES = [pytest.param(1, id="same"), pytest.param(MANY, id="other", marks=pytest.mark.slow)]
HOST, FRIEND = "testserver", "https://friend.example"
ADDRESS = re.compile(r"0x[0-9a-f]{6,}|Traceback|\.py\b|(?<![\w<])/\w", re.IGNORECASE)
PARAM = re.compile(r"[a-z_]+(\.([a-z_]+|[0-9]{1,5}))*")
PATTERN = re.compile(r"'\^[^']*\$'")  # of a field, in our own sentence
OURS = re.compile(r"[A-Za-z0-9 .,:;'(){}_/+-]*")  # what our own sentences are made of
CHECKS = [
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.unsupported_method,
    openapi_checks.allow_header_conformance,
]
# Why a request may be refused though the document allows it: rules that JSON Schema can't say, by code and param.
UNSAID: dict[str, str] = {
    "class_sets_disabled": "classes",  # a server's own choice
    "class_set_not_found": r"(images\.\d+\.)?classes",  # what was posted before
    "session_not_found": "session",
    "sessions_disabled": "session",
    "duplicate_class": r"(images\.\d+\.)?classes\.\d+",  # equal only after NFC and trimming
    "templates_not_allowed": "templates",
    "method_unavailable": r"adaptation(\.host)?|",  # what this model has
    "undecodable_image": r"images\.\d+",  # what the bytes hold
    "unsupported_image_format": r"images\.\d+",
    "image_shape_unsupported": r"images\.\d+",
    "image_too_many_pixels": r"images\.\d+",  # a damaged header
    "image_too_complex": r"images\.\d+",
    "too_many_pixels": "images",
    "invalid_base64": r"images\.\d+",
    # one class; an operator's limit; NFC
    "invalid_request": r"score|timeout_ms|(images\.\d+\.)?classes\.\d+|images\.\d+\.id",
}


# ---- what is sent ----


@cache
def pictures() -> tuple[bytes, ...]:
    """Good images of every format, small enough to be decoded by the thousand."""
    small = [m.data for m in zoo() if m.code is None and not m.heavy and len(m.data) < 2000]
    return (png(1), png(2), *small)


def image_bytes() -> st.SearchStrategy[bytes]:
    """Mostly good images, some of them damaged, some of them noise."""
    good = st.sampled_from(pictures())
    cut = st.builds(lambda data, at: data[:at], good, st.integers(0, 200))
    flipped = st.builds(_flip, good, st.integers(0, 10_000), st.integers(1, 255))
    return st.one_of(good, good, good, good, cut | flipped | st.binary(max_size=64))


def _flip(data: bytes, at: int, mask: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@cache
def register() -> None:
    """Tell schemathesis what an image is; without it, no request would ever reach the classifier."""
    images = st.deferred(image_bytes)
    schemathesis.openapi.format("byte", images.map(b64))
    schemathesis.openapi.format("binary", images.map(Binary))
    for media in RAW_TYPES:
        schemathesis.openapi.media_type(media, images)


def fake_app() -> FastAPI:
    """The app of this suite. It keeps nothing of a request, which every test here relies on."""
    return create_app(Settings(allowed_hosts=(HOST,), cors_origins=(FRIEND,)), FakeClassifier())


@cache
def forms() -> Mapping[str, Any]:
    """The schemathesis schema of the whole document, and of each form of a classification alone."""
    register()
    whole = fake_app().openapi()
    cut = {name: _cut(copy.deepcopy(whole), media) for name, media in FORMS.items()}
    return {name: schemathesis.openapi.from_dict(document) for name, document in {"whole": whole, **cut}.items()}


FORMS = {"json": ("application/json",), "form": ("multipart/form-data",), "raw": RAW_TYPES}


def _cut(document: dict[str, Any], media: tuple[str, ...]) -> dict[str, Any]:
    document["paths"] = {"/v1/classify": document["paths"]["/v1/classify"]}
    post = document["paths"]["/v1/classify"]["post"]
    content = post["requestBody"]["content"]
    post["requestBody"]["content"] = {name: content[name] for name in media}
    raw = media == RAW_TYPES
    post["parameters"] = [
        {**parameter, "required": True, "schema": {**parameter["schema"], "minItems": 2}}
        if parameter.get("name") == "classes"
        else parameter
        for parameter in post["parameters"]
        if "$ref" in parameter or (raw and parameter["name"] not in ("class_set", "replay"))
    ]
    asked = document["components"]["schemas"]
    for form_of_it in ("ClassifyRequest", "Question"):  # with one class there is no softmax
        choices = asked[form_of_it]["properties"]["classes"]["anyOf"]
        names, described = choices[:2]
        names["minItems"] = described["minProperties"] = 2
        del choices[2:]  # a class set
    del asked["Adaptation"]["properties"]["replay"]  # only an answer has one that can be used
    if "multipart/form-data" in media:
        form = content["multipart/form-data"]["schema"]
        form["properties"]["classes"]["minItems"] = 2
        form["oneOf"] = [choice for choice in form["oneOf"] if choice["required"] != ["class_set"]]
        del form["properties"]["class_set"], form["properties"]["replay"]
    return document


def operations() -> list[tuple[str, str]]:
    """Every (form, operation) that is fuzzed."""
    whole = [("whole", operation.ok().label) for operation in forms()["whole"].get_all_operations()]
    return whole + [(form, "POST /v1/classify") for form in FORMS]


# ---- what is answered ----


class Tally:
    """What was sent and what came back; examples of properties, by the property's name."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str, str, str, int]] = Counter()
        self.examples: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(self.seen.values())

    def report(self) -> dict[str, Any]:
        """Cases by source, operation, form, mode and status, and their sums."""
        rows = [
            {"source": source, "operation": operation, "form": form, "mode": mode, "status": status, "cases": cases}
            for (source, operation, form, mode, status), cases in sorted(self.seen.items())
        ]
        statuses: Counter[int] = Counter()
        for (*_, status), cases in self.seen.items():
            statuses[status] += cases
        unexpected = sum(cases for status, cases in statuses.items() if status >= 500 and status not in (501, 504))
        return {
            "requests": len(self),
            "examples": self.examples.total(),
            "statuses": dict(sorted(statuses.items())),
            "5xx": unexpected,
            "properties": dict(self.examples),
            "rows": rows,
        }


TALLY = Tally()


@dataclass(frozen=True)
class Reply:
    """An answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


class Caller:
    """Calls an app that runs with bytes as they are: no client library changes a header or a query."""

    def __init__(self, app: ASGIApp, portal: BlockingPortal) -> None:
        self.app = app
        self.portal = portal
        self.name = ""  # of what is being tried

    def ask(
        self,
        content: bytes = b"",
        media: str | None = "application/json",
        *,
        method: str = "POST",
        path: str = "/v1/classify",
        query: bytes = b"",
        headers: Sequence[tuple[str, bytes]] = (),
        sent: Any = None,
    ) -> Reply:
        """One request; its answer is held to `held`, which looks for `sent` in it."""
        own = [("content-length", str(len(content)).encode()), *headers]
        if media is not None:
            own.append(("content-type", media.encode("latin-1")))
        if all(name != "host" for name, _ in headers):
            own.append(("host", HOST.encode()))
        reply = self._reply(method, path, query, own, content)
        TALLY.seen["property", f"{method} {path}", self.name, "", reply.status] += 1
        held(reply.status, reply.headers, reply.content, sent)
        return reply

    def send(self, case: Any) -> Response:
        """One case of schemathesis."""
        request = requests.Request(**case.as_transport_kwargs(base_url=f"http://{HOST}")).prepare()
        url = urlsplit(str(request.url))
        content = request.body or b""
        content = content.encode() if isinstance(content, str) else content
        headers = [(name.lower(), value.encode("latin-1")) for name, value in request.headers.items()]
        headers = [*headers, ("host", HOST.encode())]
        reply = self._reply(str(request.method), unquote(url.path), url.query.encode(), headers, content)
        answered = {name: [value] for name, value in reply.headers.items()}
        return Response(reply.status, answered, reply.content, request, 0.0, True, encoding="utf-8")

    def _reply(
        self, method: str, path: str, query: bytes, headers: Sequence[tuple[str, bytes]], content: bytes
    ) -> Reply:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query,
            "headers": [(name.encode("latin-1"), value) for name, value in headers],
            "client": ("127.0.0.1", 50_000),
            "server": (HOST, 80),
        }
        reply: Reply = self.portal.call(self._call, scope, content)
        return reply

    async def _call(self, scope: dict[str, Any], content: bytes) -> Reply:
        messages = [{"type": "http.request", "body": content}]
        out: list[Any] = []

        async def receive() -> Any:
            return messages.pop() if messages else await anyio.sleep_forever()

        async def send(message: Any) -> None:
            out.append(message)

        await self.app(scope, receive, send)
        start, *rest = out
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        return Reply(start["status"], headers, b"".join(part.get("body", b"") for part in rest))


@contextmanager
def calling(app: FastAPI) -> Iterator[Caller]:
    """The app, started and ready."""
    with TestClient(app) as client:
        until(lambda: app.state.service.engine.ready, "the engine is ready")
        assert client.portal is not None
        yield Caller(app, client.portal)


def held(status: int, headers: Mapping[str, Any], content: bytes, sent: Any) -> None:
    """What is true of every answer: no 5xx that nobody asked for, a small envelope, and nothing of the caller in it."""
    if status < 400:
        return
    words = set(_words(sent))
    if status >= 500:
        asked = {501: "class_set", 504: "timeout_ms"}.get(status)
        assert asked in words, f"{status}: {content[:500]!r}"
    assert len(content) <= 4096
    error = ErrorAnswer.model_validate_json(content).error
    assert STATUS[error.code] == status
    assert error.retryable == (status in RETRYABLE)
    assert error.request_id == _one(headers["x-request-id"])
    assert ("retry-after" in headers) == (status in (429, 503))
    assert error.param is None or PARAM.fullmatch(error.param), error.param
    assert error.message.isascii()
    assert not ADDRESS.search(error.message.replace("application/json", "")), error.message
    said = PATTERN.sub("", error.message)
    for word in words:
        assert OURS.fullmatch(word) or word not in said, f"an error repeats {word!r}, which was sent"


def _fair(sent: Any) -> Any:
    """Time enough, and no 5.0: that is an integer to JSON Schema, and none to a server whose types are strict."""
    if isinstance(sent, float) and sent.is_integer():
        return int(sent)
    if isinstance(sent, dict):
        fair = {name: _fair(value) for name, value in sent.items()}
        if str(ms := fair.get("timeout_ms")).isdigit():
            fair["timeout_ms"] = type(ms)(max(int(ms), 30_000))
        return fair
    return [_fair(value) for value in sent] if isinstance(sent, list) else sent


def _one(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)


def _words(sent: Any) -> Iterator[str]:
    """Every string of a request, keys included."""
    if isinstance(sent, str):
        yield sent
    elif isinstance(sent, Mapping):
        yield from chain.from_iterable(map(_words, sent))
        yield from chain.from_iterable(map(_words, sent.values()))
    elif isinstance(sent, list | tuple):
        yield from chain.from_iterable(map(_words, sent))


def attempt(caller: Caller, case: Any, form: str, source: str) -> int:
    """Send one case of schemathesis and hold its answer to the document and to `held`."""
    mode = case.meta.generation.mode.value
    if mode == "positive":
        case.body, case.query = _fair(case.body), _fair(case.query)
    response = caller.send(case)
    TALLY.seen[source, f"{case.method} {case.path}", form, mode, response.status_code] += 1
    # Of the other two forms schemathesis believes some requests to be wrong that are right by the time they are text.
    more = [checks.negative_data_rejection] if form == "json" else []
    case.validate_response(response, checks=[*CHECKS, *more])
    held(response.status_code, response.headers, response.content, [case.query, dict(case.headers or {}), case.body])
    if form in FORMS and mode == "positive" and response.status_code != 200:
        error = json.loads(response.content)["error"]
        told = UNSAID.get(error["code"])
        assert told is not None, f"the document allows what is refused: {error}"
        assert re.fullmatch(told, error["param"] or ""), f"the document allows what is refused: {error}"
    return int(response.status_code)


def fuzz(caller: Caller, form: str, label: str, mode: Mode, examples: int, seed: int | None = None) -> Counter[int]:
    """Random cases of one operation; the same ones each time unless there is a seed."""
    seen: Counter[int] = Counter()
    operation = forms()[form].find_operation_by_label(label)

    @given(_cases(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))))
    def any_case(case: Any) -> None:
        seen[attempt(caller, case, form, "random")] += 1

    run(any_case, examples, seed, smallest=False)  # that would take minutes
    return seen


@st.composite
def _cases(draw: st.DrawFn, cases: st.SearchStrategy[Any]) -> Any:
    try:
        return draw(cases)
    except ValueError as error:
        if "Unsupported type: 'Binary'" not in str(error):
            raise
        reject()  # schemathesis 4.32 can't check bytes in a form that it has made wrong elsewhere


def cover(caller: Caller, form: str, label: str) -> Counter[int]:
    """The limits of every field of one operation, and what lies just beyond them."""
    schema = forms()[form]
    operation = schema.find_operation_by_label(label)
    cases = schema.iter_coverage_cases(
        operation,
        generation_modes=list(schemathesis.GenerationMode),
        generation_config=schema.config.generation_for(operation=operation),
    )
    return Counter(attempt(caller, case, form, "limits") for case in cases)


def run(test: Callable[[], None], examples: int, seed: int | None, *, smallest: bool = True) -> None:
    """A hypothesis test as a function call; of what fails, `smallest` looks for the smallest."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    profile = hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        deadline=None,
        database=None,
        suppress_health_check=slow,
        print_blob=False,
        phases=[Phase.generate, *([Phase.shrink] if smallest else [])],
    )
    try:
        profile(test if seed is None else hypothesis.seed(seed)(test))()
    except BaseException as error:
        error.add_note(f"{examples} examples, seed {seed}")
        raise


def rounds(scale: int, examples: int) -> Iterator[tuple[int, int | None]]:
    """How many examples, and their seed: the same ones each time, or many others within `SLOW_S`."""
    if scale == 1:
        yield examples, None
        return
    end = time.process_time() + SLOW_S
    for _ in range(ROUNDS):
        yield scale * examples // ROUNDS, secrets.randbits(32)
        if time.process_time() > end:
            return


def fuzzed(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property as two tests: some cases that are always the same, and many that are not.

    Arguments without a strategy are fixtures that give a `Caller`.
    """

    def decorate(prop: Callable[..., None]) -> Callable[..., None]:
        fixtures = [name for name in inspect.signature(prop).parameters if name not in strategies]

        @pytest.mark.parametrize("scale", SCALES)
        def test(scale: int, request: pytest.FixtureRequest) -> None:
            callers = {name: request.getfixturevalue(name) for name in fixtures}
            for caller in callers.values():
                caller.name = prop.__name__

            def once(**values: Any) -> None:
                TALLY.examples[prop.__name__] += 1
                prop(**callers, **values)

            for examples, seed in rounds(scale, EXAMPLES):
                run(given(**strategies)(once), examples, seed)

        test.__name__ = test.__qualname__ = prop.__name__
        test.__doc__ = prop.__doc__
        return test

    return decorate
