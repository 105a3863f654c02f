"""Ask a GRAM server from Python: `GramClient`, and `AsyncGramClient` with the same methods to await.

What to send and when to wait is written once, as generators of requests and pauses that the two clients carry out.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar

import httpx

T = TypeVar("T")
P = ParamSpec("P")
RETRIES, RETRYABLE, BACKOFF_S, LONGEST_BACKOFF_S = 4, (408, 429, 503), 0.5, 8.0
IDLE_S = 2.0  # less than the server waits: a connection that it is about to close is never used
AROUND = 256  # bytes of a body around one image
ADAPTATION = frozenset(("method", "host", "scope", "steps", "views", "budget_ms", "seed", "on_overload", "replay"))
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
Step = tuple[str, str, dict[str, Any], float] | float  # method, path, httpx's arguments and seconds; or a pause
Plan = Generator[Step, Any, T]


class GramError(Exception):
    """No answer: the server's refusal, or `status` 0 and `unreachable`, `timeout` or `connection_lost`."""

    def __init__(self, status: int, code: str, request_id: str | None, message: str, retry_after: int = 0) -> None:
        super().__init__(f"{status} {code}: {message}" if status else f"{code}: {message}")
        self.status, self.code, self.message = status, code, message
        self.request_id, self.retry_after = request_id, retry_after


class Classification(TypedDict):
    """The JSON of `/v1/classify`; a split list's is joined: usage and times add up, the rest is the first request's."""

    id: str
    created: int
    model: dict[str, str | None]
    class_set: dict[str, Any]
    results: list[dict[str, Any]]
    usage: dict[str, float]
    timings_ms: dict[str, float]


def encode(image: Any) -> bytes:
    """The encoded bytes of one image; a PIL image becomes a PNG. Raises OSError, and TypeError for anything else."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if hasattr(image, "save"):
        file, exif = BytesIO(), image.getexif()  # of which the server applies the orientation
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(file, format="PNG", exif=exif)
        return file.getvalue()
    if hasattr(image, "read") and isinstance(data := image.read(), bytes):
        return data
    raise TypeError(f"{type(image).__name__} is no image; give a path, bytes, a binary file or a PIL image.")


def pieces(items: Iterable[T], size: Callable[[T], int], most: int, most_bytes: float) -> Iterator[list[T]]:
    """Consecutive pieces within both limits, one in memory at a time; what is too large goes alone, nothing as []."""
    held, total = list[T](), 0
    for item in items:
        total += size(item)
        if held and (len(held) >= most or total > most_bytes):
            yield held
            held, total = [], size(item)
        held.append(item)
    yield held


def _public(plan: Callable[Concatenate[Any, P], Plan[Any]]) -> Callable[Concatenate[Any, P], Any]:
    @wraps(plan)
    def call(self: _Client, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        running = self._run(plan(self, *args, **kwargs))
        if isinstance(self, AsyncGramClient):
            return running
        try:
            running.send(None)  # to its end: nothing in it waits
        except StopIteration as end:
            return end.value

    return call


class _Client:
    """What both clients can do; `timeout` is seconds for a whole call, with every request, wait and retry."""

    def __init__(self, url: str | None = None, api_key: str | None = None, transport: Any = None) -> None:
        base = httpx.URL(url or os.environ.get("GRAM_URL") or "http://127.0.0.1:8000")
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError("the address of a server is http://HOST:PORT, or https://.")
        key = api_key or os.environ.get("GRAM_API_KEY")
        headers, limits = {"authorization": f"Bearer {key}"} if key else {}, httpx.Limits(keepalive_expiry=IDLE_S)
        far = base.host not in ("localhost", "127.0.0.1", "::1")  # no proxy leads to this machine itself
        given: Any = {"base_url": base, "headers": headers, "limits": limits, "trust_env": far, "transport": transport}
        super().__init__(**given)
        self.limits: dict[str, int] = {}
        self.posted: dict[str | None, Any] = {}  # class sets by id: the server may forget them

    @_public
    def info(self, *, timeout: float = 60.0) -> Plan[Any]:
        """What is served, and every limit (`/info`)."""
        return (yield from _ask(time.monotonic() + timeout, "GET", "/info"))

    @_public
    def ready(self, *, timeout: float = 5.0) -> Plan[bool]:
        """Whether a server is there and takes requests; asked once."""
        return getattr((yield "GET", "/readyz", {}, timeout), "status_code", 0) == 200

    @_public
    def classify(
        self, /, images: Any, classes: Any = None, *, class_set: Any = None, timeout: float = 60.0, **options: Any
    ) -> Plan[Classification]:
        """One result per image (path, bytes, file or PIL image), in order; `options` are any fields of the request.

        Lists beyond the server's limits become several requests of about equal length, each adapted by itself; never
        with `scope="batch"` or `replay`: there all images belong together, and too many are the server's error.
        """
        if isinstance(classes, str) or (classes, class_set, options.get("session")).count(None) != 2:
            raise TypeError("give one of: classes (a list of names, or a dict of sentences), class_set, session.")
        until, listed = time.monotonic() + timeout, _listed(images)
        question = {name: value for name, value in options.items() if name not in ADAPTATION}
        question["adaptation"] = {name: value for name, value in options.items() if name in ADAPTATION}
        if "session" not in question:
            question["classes"] = {"class_set": class_set} if class_set else classes
        form, most, room = json.dumps(question, default=list), len(listed), math.inf
        if most > 1 and options.get("scope") != "batch" and "replay" not in options:
            bounds = yield from self._bounds(until)
            most = math.ceil(most / math.ceil(most / bounds["max_images"]))  # about equal: none is adapted to alone
            room = bounds["max_body_bytes"] - len(form) - AROUND
        answers: list[Any] = []
        for piece in pieces(map(encode, listed), lambda data: len(data) + AROUND, most, room):
            files: list[Any] = [("image", ("image", data, "application/octet-stream")) for data in piece]
            files.append(("request", (None, form, "application/json")))
            answers.append((yield from _ask(until, "POST", "/v1/classify", self.posted.get(class_set), files=files)))
        return _joined(answers, "results")  # type: ignore[no-any-return]

    @_public
    def embed(self, texts: Any = None, *, images: Any = None, timeout: float = 60.0) -> Plan[Any]:
        """Unit vectors of a list of texts, or of images: `answer["data"][i]["embedding"]` belongs to input i."""
        if isinstance(texts, str) or (texts is None) == (images is None):
            raise TypeError("give a list of texts, or else images.")
        until, answers = time.monotonic() + timeout, list[Any]()
        kind, limit = ("text", "max_embedding_texts") if images is None else ("image", "max_images")
        items = texts if images is None else (base64.b64encode(encode(image)).decode() for image in _listed(images))
        most, room = (bounds := (yield from self._bounds(until)))[limit], bounds["max_body_bytes"] - AROUND
        for piece in pieces(items, lambda text: len(json.dumps(text)) + 2, most, room):
            question = {"input": piece, "modality": kind}
            answers.append((yield from _ask(until, "POST", "/v1/embeddings", json=question)))
        return _joined(answers, "data")

    @_public
    def class_set(self, classes: Any, templates: Any = None, *, timeout: float = 60.0) -> Plan[Any]:
        """Post classes once, then classify with `class_set=answer["id"]`; posted again if the server forgot them."""
        definition = {"classes": classes if isinstance(classes, dict) else list(classes)}
        definition |= {} if templates is None else {"templates": list(templates)}
        made = yield from _ask(time.monotonic() + timeout, "POST", "/v1/class-sets", json=definition)
        self.posted[made["id"]] = definition
        return made

    def _bounds(self, until: float) -> Plan[dict[str, int]]:
        self.limits = self.limits or (yield from _ask(until, "GET", "/info"))["limits"]
        return self.limits

    async def _run(self: Any, plan: Plan[Any]) -> Any:
        reply: Any = None
        while True:
            try:
                reply = await self._take(plan.send(reply))
            except StopIteration as end:
                return end.value
            except (httpx.ConnectError, httpx.ConnectTimeout):
                reply = GramError(0, "unreachable", None, "no server answers at this address; is it running?")
            except (TimeoutError, httpx.TimeoutException):
                reply = GramError(0, "timeout", None, "no answer in time; give a longer timeout, or ask for less.")
            except httpx.TransportError:
                reply = GramError(0, "connection_lost", None, "the connection was lost before an answer came.")


class GramClient(_Client, httpx.Client):
    """The server at `url` (GRAM_URL); `api_key` (GRAM_API_KEY) is sent along. Close it, or use it with `with`."""

    async def _take(self, step: Step) -> Any:
        if isinstance(step, float):
            return time.sleep(step)
        return self.request(step[0], step[1], timeout=max(0.001, step[3]), **step[2])


class AsyncGramClient(_Client, httpx.AsyncClient):
    """The same to await, with `async with`."""

    async def _take(self, step: Step) -> Any:
        if isinstance(step, float):
            return await asyncio.sleep(step)
        async with asyncio.timeout(step[3]):
            return await self.request(step[0], step[1], timeout=None, **step[2])


def _ask(until: float, method: str, path: str, forgotten: Any = None, **content: Any) -> Plan[Any]:
    for attempt in range(RETRIES + 2):
        answer = yield method, path, content, until - time.monotonic()
        error = answer if isinstance(answer, GramError) else _refusal(answer)
        if error is None:
            return answer.json()
        if error.code == "class_set_not_found" and forgotten is not None:
            yield from _ask(until, "POST", "/v1/class-sets", json=forgotten)
            forgotten = None
            continue
        pause = error.retry_after + random.uniform(0, min(LONGEST_BACKOFF_S, BACKOFF_S * 2**attempt))
        again = attempt < RETRIES and (error.status in RETRYABLE or error.code == "unreachable")
        if not again or time.monotonic() + pause >= until:
            raise error
        yield pause


def _refusal(answer: httpx.Response) -> GramError | None:
    code, message = "unexpected_answer", "this is no answer of a GRAM server; check the address."
    with suppress(ValueError, KeyError, TypeError):
        body = answer.json()
        if answer.is_success and isinstance(body, dict):
            return None
        code, message = (str(body["error"][name]) for name in ("code", "message"))
    tag, after = answer.headers.get("x-request-id"), answer.headers.get("retry-after", "")
    return GramError(answer.status_code, code, tag, message, int(after) if after.isdecimal() else 0)


def _listed(images: Any) -> list[Any]:
    single = isinstance(images, str | bytes | bytearray | os.PathLike) or hasattr(images, "save")
    return [images] if single or hasattr(images, "read") else list(images)


def _joined(answers: list[Any], rows: str) -> Any:
    every = (row for answer in answers for row in answer[rows])
    whole = {**answers[0], rows: [{**row, "index": index} for index, row in enumerate(every)]}
    for name in {"usage", "timings_ms"} & whole.keys():
        joins = {key: max if key == "brownout" else sum for key in whole[name]}
        whole[name] = {key: join(answer[name].get(key, 0) for answer in answers) for key, join in joins.items()}
    return whole
