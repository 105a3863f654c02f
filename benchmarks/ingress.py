"""What a client that only asks `/livez` sees while others attack the server, on this machine.

    python benchmarks/ingress.py [--seconds 5] [--workers 4] [--only NAME ...] > ingress.json

Starts the server with a fake classifier and default limits in one process, the probe in another and the attackers in
this one. The probe asks every 10 ms; a question that takes longer counts for all that would have been asked meanwhile,
so that the percentiles (nearest rank) are of moments rather than of answers. `flips` sends 4,000 damaged images of
each format and counts what they end in. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import zoo
from tests.apart_fixtures import LIVEZ, Apart, apart, push, until_closed
from tests.server_fixtures import b64, body, png

MIB = 1 << 20
DUE_S = 0.01
QUERY = b"POST /classify?classes=cat&classes=dog HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED = QUERY + b"Content-Type: image/png\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


# ---- the probe, in a process of its own that imports little ----

PROBE = """
import json, sys, threading, time
from http.client import HTTPConnection

done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
connection, times = HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60), []
due = float(sys.argv[2])
while not done.is_set():
    started = time.monotonic()
    connection.request("GET", "/livez")
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    if not times:
        print("ready", flush=True)
    took = time.monotonic() - started
    times.append(took)
    times += [took - n * due for n in range(1, int(took / due))]  # those that would have been asked meanwhile
    time.sleep(max(0.0, due - took))
json.dump([1000 * took for took in times[1:]], sys.stdout)
"""


@contextmanager
def probing(port: int, into: list[float]) -> Iterator[None]:
    """Run the probe and leave its times in `into`."""
    command = [sys.executable, "-S", "-c", PROBE, str(port), str(DUE_S)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        yield
        time.sleep(2 * DUE_S)
    finally:
        into += json.loads(process.communicate()[0])


def percentile(times: list[float], share: float) -> float:
    ranked = sorted(times)
    return round(ranked[max(0, -(-int(share * len(ranked)) // 100) - 1)], 1)


# ---- attacks: each is one round of it, done again and again by every worker ----


def send(port: int, content: bytes) -> str:
    """The status of the answer, or `closed`."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        push(connection, content)
        found = re.match(rb"HTTP/1.1 (\d{3})", until_closed(connection))
    return found[1].decode() if found else "closed"


def post(content: bytes, media: str = "application/json", head: bytes = POST) -> bytes:
    lines = f"Content-Type: {media}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head + lines.encode() + content


def image(data: bytes) -> bytes:
    return post(data, "image/png", QUERY + b"Connection: close\r\n")


def quoted(text: str) -> bytes:
    return post(json.dumps({"images": [text], "classes": ["cat", "dog"]}).encode())


@cache
def large() -> Image.Image:
    return zoo.picture(6000, 5000)


def stuffed(size: int = 16 * MIB) -> bytes:
    """A good picture of exactly that many bytes."""
    jpeg = zoo.encoded(zoo.picture(), "JPEG")
    return jpeg + bytes(size - len(jpeg))


def form(*fields: tuple[bytes, bytes]) -> bytes:
    parts = (b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % field for field in fields)
    return post(b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x")


PAYLOADS: dict[str, Callable[[], bytes]] = {
    "3 MB of 1-byte chunks": lambda: CHUNKED + b"1\r\na\r\n" * 500_000 + b"0\r\n\r\n",
    "a body without end": lambda: CHUNKED + (b"10000\r\n" + bytes(65536) + b"\r\n") * 1024,
    "a header of 150 MiB": lambda: LIVEZ + b"X: " + b"a" * (150 * MIB),
    "100k header lines": lambda: LIVEZ + b"X: a\r\n" * 100_000,
    "5k header lines": lambda: LIVEZ + b"X: a\r\n" * 5000 + b"Connection: close\r\n\r\n",
    "2,000 pipelined probes": lambda: (LIVEZ + b"\r\n") * 2000 + LIVEZ + b"Connection: close\r\n\r\n",
    "json: 99k lists": lambda: post(b"[" + b"[]," * 99_990 + b"[]]"),
    "json: 10M lists": lambda: post(b"[" + b"[]," * (10 * MIB) + b"[]]"),
    "json: 499k strings": lambda: post(json.dumps([f"{n:x}" for n in range(499_000)]).encode()),
    "json: numbers of 4,300 digits": lambda: post(b"[" + (b"9" * 4300 + b",") * 7000 + b"1]"),
    "json: 30 MB of escapes": lambda: post(b'["' + b"\\u00e9" * (5 * MIB) + b'"]'),
    "json: 30 MB and an astral character": lambda: post(b'["' + b"a" * (30 * MIB) + "\U0001f600".encode() + b'"]'),
    "json: 30 MB nested": lambda: post(b"[" * (30 * MIB)),
    "form: 100k fields": lambda: form(*[(b"classes", b"c")] * 100_000),
    "form: 16 MiB of line ends": lambda: post(b"\r\n" * (8 * MIB), "multipart/form-data; boundary=x"),
    "form: 30 MB almost ending": lambda: form((b"image", b"\r\n--" * (7 * MIB))),
    "base64: the largest image": lambda: quoted(b64(stuffed())),
    "base64: 22 MB of one letter": lambda: quoted("A" * (22 * MIB)),
    "base64: 22 MB of line ends": lambda: quoted("\r\n" * (5 * MIB)),
    "jpeg: 16 MiB of fill bytes": lambda: image(b"\xff\xd8".ljust(16 * MIB, b"\xff")),
    "jpeg: 10,000 scans": lambda: image(zoo.with_scans(10_000)),
    "jpeg: 30 Mpx": lambda: image(zoo.encoded(large(), "JPEG")),
    "jpeg: 30 Mpx, 63 scans": lambda: image(zoo.with_scans(63, 6000, 5000)),
    "png: 30 Mpx": lambda: image(zoo.one_colour_png(6000, 5000, depth=8, colour=2)),
    "png: 30 Mpx of 16-bit grey": lambda: image(zoo.one_colour_png(6000, 5000, depth=16)),
    "png: 65500 x 65500": lambda: image(zoo.one_colour_png(65_500, 65_500)),
    "png: 200 MB of text": lambda: image(
        zoo.png(np.asarray(zoo.picture()), 8, 2, before=zoo.chunk(b"zTXt", b"a\0\0" + zoo.zeros(200 * MIB)))
    ),
    "webp: 30 Mpx": lambda: image(zoo.encoded(large(), "WEBP", quality=50, method=0)),
    "webp: 1,000 frames": lambda: image(zoo.animation(1000)),
    "64 images": lambda: post(json.dumps(body(*(png(n, (64, 64)) for n in range(64)))).encode()),
    "10k classes": lambda: post(json.dumps(body(classes=[f"thing {n}" for n in range(10_000)])).encode()),
}


def together(server: Apart, count: int, begin: bytes, hold_s: float) -> Counter[str]:
    """That many connections that begin and then wait."""
    with ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(count)]
        for connection in held:
            push(connection, begin)
        time.sleep(hold_s)
        ends: Counter[str] = Counter()
        for connection in held:
            connection.setblocking(False)
            with suppress(OSError):
                ends[connection.recv(65536)[9:12].decode() or "closed"] += 1
    ends["open"] = count - ends.total()
    return +ends


def uploads(server: Apart, _: float) -> Counter[str]:
    """50 bodies of the largest size at once."""
    content = quoted(b64(stuffed(24_000_000 - 4096)))  # 32 MB of base64: refused as an image, once it is there
    start = threading.Barrier(50)

    def one(_: int) -> str:
        start.wait()
        return send(server.port, content)

    with ThreadPoolExecutor(50) as pool:
        return Counter(pool.map(one, range(50)))


def leaving(server: Apart, seconds: float) -> Counter[str]:
    """Clients that leave as soon as they have asked."""
    content, end, count = post(json.dumps(body()).encode()), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(content[: len(content) // (1 + count % 2)])
        count += 1
    return Counter({"left": count})


CROWDS: dict[str, Callable[[Apart, float], Counter[str]]] = {
    "nothing": lambda _, seconds: (time.sleep(seconds), Counter())[1],
    "1,000 idle connections": lambda server, seconds: together(server, 1000, LIVEZ + b"\r\n", min(seconds, 4.0)),
    "200 slow headers": lambda server, seconds: together(server, 200, b"GET / HTTP/1.1\r\nA", min(seconds, 6.0)),
    "50 uploads of 32 MB": uploads,
    "clients that leave": leaving,
}


def repeated(content: bytes, workers: int) -> Callable[[Apart, float], Counter[str]]:
    """The same bytes from every worker until the time is up."""

    def attack(server: Apart, seconds: float) -> Counter[str]:
        end = time.monotonic() + seconds

        def work(_: int) -> Counter[str]:
            seen: Counter[str] = Counter()
            while time.monotonic() < end:
                seen[send(server.port, content)] += 1
            return seen

        with ThreadPoolExecutor(workers) as pool:
            return sum(pool.map(work, range(workers)), Counter())

    return attack


def flips(server: Apart, count: int) -> dict[str, dict[str, int]]:
    """What damaged images end in, by format; 50 a request."""
    found: dict[str, dict[str, int]] = {}
    for kind, seeds in zoo.mutation_seeds().items():
        ends: Counter[str] = Counter()
        copies = [copy for n, data in enumerate(seeds) for copy in zoo.flips(data, count // len(seeds), seed=n)]
        for start in range(0, len(copies), 50):
            files = [("image", ("image", copy)) for copy in copies[start : start + 50]]
            fields = {"classes": ["cat", "dog"], "method": "none", "errors": "per_item"}
            answer = server.client.post("/classify", data=fields, files=files)
            assert answer.status_code == 200, answer.text
            ends.update((result["error"] or {"code": "answered"})["code"] for result in answer.json()["results"])
        found[kind] = dict(ends.most_common())
    return found


# ---- running them ----


def attacked(server: Apart, attack: Callable[[Apart, float], Counter[str]], seconds: float) -> dict[str, Any]:
    """Run one attack; what the probe saw, what the attackers got, and what the server held."""
    times: list[float] = []
    held, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            with suppress(Exception):
                held.append(server.held()["ingress_bytes"])

    Path(f"/proc/{server.popen.pid}/clear_refs").write_text("5")
    before = server.kib("VmRSS")
    watcher = threading.Thread(target=watch)
    with probing(server.port, times):
        watcher.start()
        ends = attack(server, seconds)
        done.set()
        watcher.join()
    grown = (server.kib("VmHWM") - before) / 1024
    server.assert_well()
    return {
        "livez_ms": {"p50": percentile(times, 50), "p99": percentile(times, 99), "max": percentile(times, 100)},
        "probes": len(times),
        "ends": dict(sorted(ends.items())),
        "rss_peak_grown_mib": round(grown),
        "ingress_bytes_max": int(max(held)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--flips", type=int, default=4000)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "workers": given.workers,
        "seconds": given.seconds,
        "attacks": {},
    }
    with tempfile.TemporaryDirectory() as folder, apart(Path(folder) / "log") as server:
        for name in [*CROWDS, *PAYLOADS]:
            if given.only and not any(word in name for word in given.only):
                continue
            attack = CROWDS[name] if name in CROWDS else repeated(PAYLOADS[name](), given.workers)
            report["attacks"][name] = attacked(server, attack, given.seconds)
            sys.stderr.write(f"{name}: {json.dumps(report['attacks'][name])}\n")
        if given.flips and not given.only:
            report["flips"] = flips(server, given.flips)
        report["load_average_after"] = round(os.getloadavg()[0], 1)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
