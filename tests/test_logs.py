"""The log: one line for each event whatever it holds, and nothing in it that a caller sent."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.auth import new_key
from server.logs import FORMATS, JsonLines, TextLines, last_words
from tests.server_fixtures import Live, body, png, until

ROOT = Path(__file__).parents[1]
SECRET = "Überraschung"  # a word of the caller's, in every place where callers have words
SPELLINGS = (SECRET, SECRET.lower(), json.dumps(SECRET)[1:-1], "%C3%9Cberraschung", "berraschung", "BERRASCHUNG")
TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]{12}\+00:00 (DEBUG|INFO|WARNING|ERROR|CRITICAL) +\S.*")

PROCESS = """
import socket, sys, threading, warnings
from pathlib import Path
from server.__main__ import log_to_stderr, serve
from server.app import create_app
from server.fake import FakeClassifier
from server.settings import Settings

class Buggy(FakeClassifier):
    def class_set(self, classes, templates=None):
        made = super().class_set(classes, templates)
        if "bug" in classes:
            try:
                raise KeyError(classes[0])
            except KeyError as error:
                raise ValueError(" and ".join(classes)) from error
        return made

level, form, keys = sys.argv[1:]
log_to_stderr(level, form)
warnings.warn("one\\nwarning")
thread = threading.Thread(target=lambda: {}["missing\\nin a thread"])
thread.start()
thread.join()
settings = Settings(api_keys_file=Path(keys))
sys.exit(serve(create_app(settings, Buggy()), settings, socket.create_server(("127.0.0.1", 0))))
"""


@dataclass
class Logged:
    """A server of its own, a client with a key, and what it has said."""

    client: httpx.Client
    port: int
    file: Path
    key: str

    def text(self) -> str:
        return self.file.read_text()

    raw = Live.raw
    connect = Live.connect


@contextmanager
def logged(folder: Path, level: str, form: str) -> Iterator[Logged]:
    file, keys = folder / "log", folder / "keys"
    key, line = new_key("team")
    keys.write_text(line + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAM_")}
    with file.open("wb") as out:
        command = [sys.executable, "-c", PROCESS, level, form, str(keys)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=out)
    try:
        until(lambda: re.search(r'port"?[:=] ?(\d+)', file.read_text()), "it listens", patience_s=60)
        port = int(re.findall(r'port"?[:=] ?(\d+)', file.read_text())[0])
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
            until(lambda: client.get("/readyz").status_code == 200, "it is ready")
            yield Logged(client, port, file, key)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def everything_odd(server: Logged) -> None:
    """Requests that carry the secret, line breaks and other keys wherever a caller can put them."""
    post = server.client.post
    names = [SECRET, "two\r\nlines\u2028or three", "\u202ereversed"]
    assert post("/classify", json=body(png(), classes=[SECRET, "dog"])).status_code == 200
    assert post("/classify", json=body(png(), classes=[SECRET, "bug"])).status_code == 500
    assert post("/classify", json=body(png(), classes=names)).status_code == 422
    assert post("/classify", json=body(png(), **{SECRET: 1})).status_code == 422
    assert post("/classify", content=SECRET.encode()).status_code == 415
    assert post(f"/{SECRET}%0D%0A{{").status_code == 404
    assert post("/classify", params={"classes": SECRET}, content=png(), headers={"content-type": "image/png"}).is_error
    form = {"content-type": f"multipart/form-data; boundary={'b' * 20}"}
    assert post("/classify", content=SECRET.encode(), headers=form).status_code == 400
    assert post("/classify", headers={"authorization": "Bearer other-Key\u00e4".encode()}).status_code == 401
    assert server.client.request(SECRET[1:].upper(), "/classify").status_code == 400
    long = post("/classify", headers={"x-request-id": "x" * 10_000}).headers["x-request-id"]
    assert len(long) < 128
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    for line in (SECRET.encode(), b"a\nInjected: " + SECRET.encode(), b'"}\x0b{"event": "forged'):
        with suppress(ConnectionError):
            server.raw(head + b"X-Request-Id: " + line + b"\r\nContent-Length: 0\r\n\r\n")
    with suppress(ConnectionError):
        server.raw(SECRET.encode() + b"\r\n\r\n")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """The whole log of a server that was asked everything odd, by level and form."""

    @functools.cache
    def of(level: str, form: str) -> str:
        with logged(tmp_path_factory.mktemp("log"), level, form) as server:
            everything_odd(server)
        return server.text().replace(server.key, "THE KEY")

    return of


@pytest.mark.parametrize("level", ["info", "debug"])
def test_every_line_is_one_json_object_whatever_comes_in(level: str, said: Callable[[str, str], str]) -> None:
    lines = [json.loads(line) for line in said(level, "json").splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    events = [line["event"] for line in lines]
    assert events.count("request failed") == 1
    assert {"listening", "request", "uncaught in thread", "stopped"} <= set(events)
    assert any("one\nwarning" in event for event in events)
    assert "forged" not in events


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_that_a_caller_sent_is_logged(form: str, said: Callable[[str, str], str]) -> None:
    text = said("info", form)
    assert not [spelling for spelling in (*SPELLINGS, "THE KEY", "other-Key") if spelling in text]
    assert "builtins.ValueError: text withheld" in text  # what failed is known all the same,
    assert "builtins.KeyError: text withheld" in text  # its cause too,
    assert "in class_set" in text  # and where


def test_the_text_form_is_one_readable_line_for_each_event(said: Callable[[str, str], str]) -> None:
    lines = said("info", "text").splitlines()
    assert all(TEXT_LINE.fullmatch(line) for line in lines), lines
    asked = [line for line in lines if "route=/classify status=200" in line]
    assert re.fullmatch(
        r"\S+ INFO +request request_id=req_\w+ method=POST route=/classify status=200 stage=\w+ ms=\S+", asked[0]
    )


def record(message: str, *args: object, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("server", level, __file__, 1, message, args, None)
    made.fields = fields
    return made


def test_what_json_has_no_word_for_is_still_json() -> None:
    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = JsonLines().format(record("%s", "\ud800", ms=float("nan"), most=float("inf"), path=Path("a")))
    read = json.loads(line, parse_constant=strict)
    assert (read["event"], read["ms"], read["most"]) == ("\ud800", "nan", "inf")
    assert line.isascii()
    assert json.loads(JsonLines().format(record("%s and %s", 1)))["event"] == "%s and %s"


def test_no_value_of_the_text_form_can_pass_for_another_field() -> None:
    line = TextLines().format(record("done", name="a b=c\n", status=200, none=None))
    assert line.endswith('done name="a b=c\\n" status=200 none=null')
    assert "\n" not in TextLines().format(record("two\nlines"))


def test_the_end_of_the_process_is_told_with_the_texts_of_its_causes() -> None:
    said = "device-side assert"
    try:
        raise RuntimeError(said)
    except RuntimeError as error:
        made = record("engine ended", level=logging.CRITICAL)
        made.exc_info = (type(error), error, error.__traceback__)
        assert said in json.loads(JsonLines().format(made))["traceback"]
        made.levelno = logging.ERROR
        assert said not in JsonLines().format(made)
        assert said in JsonLines(texts=True).format(made)


def test_the_last_line_has_the_form_of_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    assert last_words(64, "unknown setting") == 64
    assert json.loads(capsys.readouterr().err)["code"] == 64
    handler = logging.StreamHandler()
    handler.setFormatter(TextLines())
    monkeypatch.setattr(root, "handlers", [handler])
    last_words(64, "unknown setting")
    assert re.fullmatch(r"\S+ CRITICAL unknown setting code=64\n", capsys.readouterr().err)
