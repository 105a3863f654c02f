"""A server that listens opens no connection, starts no process and unpickles nothing, whatever is asked of it.

An audit hook inside the server's process records every attempt, and a listening sink on this machine every arrival:
all URLs that are sent, all proxies and all exporters point there.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save

from tests import zoo
from tests.apart_fixtures import PROGRAM, Apart, apart, talk
from tests.server_fixtures import Live, answered, b64, body, live, png, until

WATCHED = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg",
    "subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
    "pickle.find_class", "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect",
    "webbrowser.open", "shutil.unpack_archive",
)  # fmt: skip
# The hook goes in first and stays; what happens before the server listens is marked by a line of its own.
HOOK = """
import os, sys
_out = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_watched = frozenset(%r)
def _hook(event, args):
    if event in _watched:
        os.write(_out, (event + " " + repr(args)[:200].replace(chr(10), " ") + chr(10)).encode())
sys.addaudithook(_hook)
""" % (WATCHED,)  # noqa: UP031
REAL = "from server.__main__ import main\nimport json, sys\nsys.exit(main(json.loads(sys.argv[1])['argv']))\n"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY")


class Sink:
    """Accepts whatever connects, and counts."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.visits: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.visits.append(b"")
                connection.close()


@contextmanager
def sink() -> Iterator[Sink]:
    found = Sink()
    yield found
    found.socket.close()


def environment(at: Sink, audit: Path) -> dict[str, str]:
    """Everything that could make a library of ours talk, pointed at the sink."""
    url = f"http://127.0.0.1:{at.port}"
    return {
        **dict.fromkeys(PROXIES, url),
        "AUDIT_LOG": str(audit),
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_SERVICE_NAME": "server",
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "",
        "FASTAPI_CLOUD_URL": url,
        "HF_ENDPOINT": url,
        "PROMETHEUS_PUSHGATEWAY": url,
        "SENTRY_DSN": f"http://key@127.0.0.1:{at.port}/1",
    }


def happened(audit: Path) -> list[str]:
    """What the hook recorded, in order."""
    return audit.read_text().splitlines()


# ---- what is sent ----


def urls(port: int) -> list[str]:
    at = f"127.0.0.1:{port}"
    return [
        f"http://{at}/a.png",
        f"https://{at}/a.png",
        f"HTTP://{at}/a.png",
        f"ftp://{at}/a.png",
        f"gopher://{at}/_GET",
        f"ws://{at}/",
        f"s3://{at}/bucket",
        f"dict://{at}/",
        f"ldap://{at}/",
        f"jar:http://{at}!/",
        f"file:///proc/self/environ?{at}",
        "file:/etc/hostname",
        f"//{at}/a.png",
        f"\\\\{at}\\share",
        f"http:\\\\{at}\\a.png",
        f" http://{at}/a.png",
        f"\thttp://{at}/a.png",
        f"h\nttp://{at}/a.png",
        f"url(http://{at}/a.png)",
        f"data:text/uri-list;base64,{b64(f'http://{at}/'.encode())}",
        f"data:http://{at}/a.png",
        f"data:image/png;base64,http://{at}/a.png",
        f"data:image/svg+xml;base64,{b64(svg(port))}",
        f"http://localhost:{port}/a.png",
        f"http://[::ffff:127.0.0.1]:{port}/a.png",
        f"http://2130706433:{port}/a.png",
    ]


def svg(port: int) -> bytes:
    url = f"http://127.0.0.1:{port}/a"
    return (
        f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY e SYSTEM "{url}">]>'
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<image xlink:href="{url}"/><style>@import "{url}";</style><text>&e;</text></svg>'
    ).encode()


def carriers(port: int) -> dict[str, bytes]:
    """Files that name the sink wherever a file can name something."""
    url = f"http://127.0.0.1:{port}/a"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" rdf:about="{url}"><a href="{url}"/></x:xmpmeta>'.encode()
    jpeg = zoo.encoded(zoo.picture(), "JPEG")
    tags = b"II*\0" + (8).to_bytes(4, "little") + b"\1\0" + b"\x0e\1\2\0" + len(url).to_bytes(4, "little")
    exif = b"Exif\0\0" + tags + (26).to_bytes(4, "little") + bytes(4) + url.encode()
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    text.add_text("URL", url)
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as archive:
        archive.writestr("a.url", f"[InternetShortcut]\nURL={url}")
    return {
        "exif": zoo.with_segments(jpeg, zoo.segment(0xE1, exif)),
        "xmp of a jpeg": zoo.with_segments(jpeg, zoo.segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        "xmp of a png": zoo.encoded(zoo.picture(), "PNG", pnginfo=text),
        "xmp of a webp": zoo.encoded(zoo.picture(), "WEBP", xmp=xmp),
        "profile": zoo.encoded(zoo.picture(), "JPEG", icc_profile=url.encode() * 10),
        "svg": svg(port),
        "svg under a png's signature": zoo.PNG_SIGNATURE + svg(port),
        "postscript": f"%!PS-Adobe-3.0 EPSF-3.0\n({url}) (r) file pop\nshowpage\n".encode(),
        "playlist": f"#EXTM3U\n{url}\n".encode(),
        "html": f'<meta http-equiv="refresh" content="0;url={url}"><img src="{url}">'.encode(),
        "plain": url.encode(),
        "archive": link.getvalue(),
    }


class Marker:
    """Pickles to something that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def tensors(marker: Path) -> dict[str, bytes]:
    """Arrays and objects in the forms that others take from requests."""
    evil = pickle.dumps(Marker(marker))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
    arrays = io.BytesIO()
    np.save(arrays, np.array([Marker(marker)], dtype=object), allow_pickle=True)
    return {
        "application/x-python-pickle": evil,
        "application/x-pytorch": zipped.getvalue(),
        "application/x-npy": arrays.getvalue(),
        "application/x-safetensors": save({"a": np.zeros(3, np.float32)}),
        "application/vnd.apache.arrow.stream": b"ARROW1\0\0" + evil,
        "application/x-joblib": b"\x80\x04\x95" + evil,
    }


def ask_everything(server: Apart, port: int, marker: Path) -> int:
    """Each URL and each file in every place of every route and form; returns how many requests that were."""
    post, asked, get = server.client.post, 0, server.client.get
    links = urls(port)

    def send(expected: Sequence[int], **request: Any) -> httpx.Response:
        nonlocal asked
        asked += 1
        response = answered(post(**request))
        assert response.status_code in expected, (request, response.text)
        assert str(port) not in response.text or response.status_code == 200
        return response

    for path in ("/v1/classify", "/classify"):
        for url in links if path == "/v1/classify" else links[::5]:  # it is the same handler
            for image in (
                url,
                {"data": url},
                {"data": png_text(), "url": url},
                {"url": url},
                {"image_url": {"url": url}},
            ):
                send((400, 415, 422), url=path, json={**body(), "images": [image]})
            form = {"classes": ["a", "b"], "method": "none"}
            send((415,), url=path, data=form, files={"image": ("a", url.encode())})
            send((415,), url=path, files=[("image", (None, url)), ("classes", (None, "a")), ("classes", (None, "b"))])
            send((422,), url=path, files=[("image", ("a", png())), ("url", (None, url)), ("classes", (None, "a"))])
            send((415,), url=f"{path}?classes=a&classes=b", content=url.encode(), headers={"content-type": "image/png"})
            send((422,), url=path, params={"classes": ["a", "b"], "images": url, "url": url}, content=png(),
                 headers={"content-type": "image/png"})  # fmt: skip
            send((415,), url=path, content=url.encode(), headers={"content-type": "text/uri-list"})
        for name, data in carriers(port).items():
            expected = (200,) if name.startswith(("exif", "xmp", "profile")) else (415, 422)
            send(expected, url=path, json=body(data))
            send(expected, url=path, data={"classes": ["a", "b"]}, files={"image": ("a.svg", data, "image/svg+xml")})
            raw = {"content-type": "image/svg+xml"}
            send(expected, url=f"{path}?classes=a&classes=b", content=data, headers=raw)
        for media, data in tensors(marker).items():
            send((415,), url=path, content=data, headers={"content-type": media})
            octets = {"content-type": "application/octet-stream"}
            send((415,), url=f"{path}?classes=a&classes=b", content=data, headers=octets)
            send((415,), url=path, data={"classes": ["a", "b"]}, files={"image": ("a.pt", data, media)})
            send((415,), url=path, json=body(data))
    names = [url.strip().replace("\n", "")[:200] for url in links]
    send((200,), url="/classify", json=body(classes=[*dict.fromkeys(names)], top_k=3))
    send((200,), url="/classify", json=body(classes={"a": names[:9], "b": ["b"]}))
    send((200,), url="/classify", json=body(templates=[names[0] + " {}"]))
    for field in ("score", "errors", "model", "callback", "webhook"):
        send((422,), url="/classify", json=body(**{field: links[0]}))
    for field in ("method", "host", "scope", "checkpoint"):
        send((422,), url="/classify", json=body(adaptation={field: links[0]}))
    asked += ask_the_other_routes(server, port, marker)
    for header in (
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "Forwarded",
        "Referer",
        "Via",
        "X-Original-URL",
        "Traceparent",
    ):
        send((200,), url="/classify", json=body(), headers={header: links[0]})
    for target in (*links[:8], "/ui/" + links[0], "/models/" + links[0]):
        talk(server, b"GET " + target.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        asked += 1
    others = ("/", "/ui/app.js", "/v1/models", "/v2", "/v1/class-sets")
    for path in ("/livez", "/readyz", "/startupz", "/health", "/metrics", "/info", "/openapi.json", *others):
        get(path, headers={"host": f"127.0.0.1:{port}"})
        asked += 1
    return asked


def ask_the_other_routes(server: Apart, port: int, marker: Path) -> int:
    """The same where class sets, sessions and other clients come in."""
    asked = 0

    def send(expected: Sequence[int], **request: Any) -> httpx.Response:
        nonlocal asked
        asked += 1
        response = server.client.post(**request)
        assert response.status_code in expected, (request, response.text)
        assert response.status_code < 400 or str(port) not in response.text
        return response

    octets, session = {"content-type": "application/octet-stream"}, "/v1/sessions/import"
    for url in urls(port):
        hugging = {"inputs": url, "parameters": {"candidate_labels": ["a", "b"]}}
        send((400, 415, 422), url="/hf/zero-shot-image-classification", json=hugging)
        send((400, 415, 422), url="/models/fake", json=hugging)
        send((400, 415, 422), url="/v1/embeddings", json={"input": url, "modality": "image"})
        send((404,), url="/v1/embeddings", json={"input": "a", "model": url})
        send((422,), url="/v1/sessions", json={"classes": ["a", "b"], "method": url})
        send((404,), url="/v1/classify", json=body(session=url))
        send((404,), url="/v1/classify", json=body(classes={"class_set": url}))
        send((422,), url=session, content=url.encode(), headers=octets)
    names = list(dict.fromkeys(url.strip().replace("\n", "")[:200] for url in urls(port)))
    send((201,), url="/v1/class-sets", json={"classes": names})
    send((201,), url="/v1/sessions", json={"classes": names})
    send((200,), url="/v1/embeddings", json={"input": [name for name in names if name]})
    for media, data in tensors(marker).items():
        send((422,), url=session, content=data, headers=octets)
        send((415,), url=session, content=data, headers={"content-type": media})
        send((415,), url="/v1/embeddings", content=data, headers={"content-type": media})
        send((415, 422), url="/v1/embeddings", json={"input": b64(data), "modality": "image"})
    return asked


def png_text() -> str:
    return b64(png())


# ---- tests ----


def test_a_server_opens_nothing_whatever_it_is_sent(tmp_path: Path) -> None:
    audit, marker = tmp_path / "audit", tmp_path / "marker"
    with sink() as at:
        audit.touch()
        with apart(tmp_path / "log", HOOK + PROGRAM, environment(at, audit)) as server:
            asked = ask_everything(server, at.port, marker)
            server.assert_well()
            port = str(at.port).encode()
        assert asked > 450
        assert happened(audit) == []
        assert at.visits == []
    assert not marker.exists()
    assert port not in (tmp_path / "log").read_bytes()


@pytest.mark.slow
def test_a_real_model_is_loaded_and_answers_without_a_word_to_anyone(tmp_path: Path, tiny_dir: Path) -> None:
    audit = tmp_path / "audit"
    argv = ["--model", str(tiny_dir), "--device", "cpu", "--port", "0", "--default-views", "4"]
    with sink() as at:
        audit.touch()
        with apart(tmp_path / "log", HOOK + REAL, environment(at, audit), argv=argv) as server:
            before = len(happened(audit))
            ask_a_model(server, at.port)
            assert happened(audit)[before:] == []
        connections = [line for line in happened(audit) if line.startswith(("socket", "urllib", "http", "pickle"))]
        # Finding the address to listen on is all that it asks the system for, before it listens.
        assert [line.split()[0] for line in connections] == ["socket.getaddrinfo"], connections
        assert at.visits == []


def ask_a_model(server: Live, port: int) -> None:
    for method in ("none", "tpt"):
        assert server.ask(adaptation={"method": method}, explain=True).status_code == 200
    for data in carriers(port).values():
        assert server.ask(data).status_code in (200, 415, 422)
    assert server.ask(images=[f"http://127.0.0.1:{port}/"]).status_code == 422
    server.assert_well()


RECORDED: list[str] | None = None  # what threads other than the test's own did, while a test wants to know


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if RECORDED is not None and event in WATCHED and threading.current_thread() is not threading.main_thread():
        RECORDED.append(f"{event} {args!r}")


def test_a_model_answers_without_a_word_to_anyone(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, without the seconds that a process needs to load torch: this one has it."""
    sys.addaudithook(_listen)  # stays for good, and does nothing unless something is to be recorded
    for name in ("GRAM_MODEL", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    with sink() as at:
        for name in PROXIES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{at.port}")
        with live(fake=False, model=str(tiny_dir), device="cpu", default_views=4) as server:
            monkeypatch.setattr(sys.modules[__name__], "RECORDED", [])
            ask_a_model(server, at.port)
            assert RECORDED == []
            with ThreadPoolExecutor(1) as pool:
                pool.submit(socket.getaddrinfo, "127.0.0.1", at.port).result()
            assert len(RECORDED) == 1  # it does listen
        assert at.visits == []


ATTEMPTS = {
    "socket.connect": "import socket; socket.create_connection(('127.0.0.1', PORT))",
    "urllib.Request": "import urllib.request as r; r.urlopen('http://127.0.0.1:PORT/', timeout=5)",
    "socket.sendto": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', PORT))",
    "socket.getaddrinfo": "import socket; socket.getaddrinfo('localhost', PORT)",
    "subprocess.Popen": "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', ''])",
    "os.system": "import os; os.system('true')",
    "pickle.find_class": "import pickle; pickle.loads(pickle.dumps(len))",
    # What uvloop does by itself Python's hook does not see: that is what the sink is for.
    "": "import asyncio, uvloop; uvloop.run(asyncio.open_connection('127.0.0.1', PORT))",
}


def test_the_hook_and_the_sink_see_what_they_are_there_for(tmp_path: Path) -> None:
    """The same server, with a classifier that does what must not be done."""
    audit = tmp_path / "audit"
    with sink() as at:
        audit.touch()
        tries = "".join(
            f"        try:\n            {line}\n        except OSError:\n            pass\n"
            for line in ATTEMPTS.values()
        )
        bad = f"class Bad(FakeClassifier):\n    def warm_up(self):\n{tries.replace('PORT', str(at.port))}\n"
        program = PROGRAM.replace("log_to_stderr(", bad + "log_to_stderr(").replace("gs, FakeClassifier", "gs, Bad")
        with apart(tmp_path / "log", HOOK + program, environment(at, audit)):
            pass
        assert {*ATTEMPTS} - {""} <= {line.split()[0] for line in happened(audit)}
        until(lambda: len(at.visits) == 3, "the sink has a visitor of each kind")
