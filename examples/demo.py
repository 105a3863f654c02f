"""Start the real server, post twelve photographs in one request, print each answer before and after, stop it.

The photographs lie inside the scikit-image wheel, so nothing is downloaded. They are unlike each other, and
some are textures or grey: a demonstration of the whole path, not a measurement of accuracy.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[1]

PHOTOS = {  # file in skimage/data -> what a person would call it, in the words of CLASSES
    "astronaut.png": "astronaut",
    "brick.png": "brick wall",
    "camera.png": "photographer",
    "chelsea.png": "cat",
    "coffee.png": "cup of coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies",
    "motorcycle_left.png": "motorcycle",
    "page.png": "printed page",
    "rocket.jpg": "rocket",
}
DISTRACTORS = ("airplane", "bicycle", "dog", "pizza", "sailboat", "tree")
CLASSES = sorted({*PHOTOS.values(), *DISTRACTORS})
MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}

START_SECONDS = 240  # a cold disk and a busy machine; a few seconds otherwise
REQUEST_SECONDS = 120
STOP_SECONDS = 45  # above the server's own drain time
KEPT_SETTINGS = ("GRAM_DEVICE", "GRAM_PRECISION")  # of the caller's GRAM_* environment


class DemoFailed(Exception):
    """Something between start and stop went wrong; the message says what."""


@contextmanager
def running_server(log: Path) -> Iterator[str]:
    """Run `python -m server` with the bundled model on a free port; yield its address once it is ready."""
    with server_process(log) as (url, _):
        yield url


@contextmanager
def server_process(log: Path, flags: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same with flags of its own, and with the process beside its address.

    On leaving it is sent SIGTERM and must end with exit code 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAM_") or k in KEPT_SETTINGS}
    environment |= {"GRAM_HOST": "127.0.0.1", "GRAM_PORT": str(port), "GRAM_MODEL": "gram-mini"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *flags],
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        yield url, process
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DemoFailed(f"the server was still running {STOP_SECONDS} s after SIGTERM") from None
    if code != 0:
        raise DemoFailed(f"the server ended with exit code {code} after SIGTERM, expected 0")


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when /readyz answers 200; raise when the server ends first or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    answer = "no answer yet"
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise DemoFailed(f"the server ended with exit code {code} before it was ready")
        try:
            response = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
        except httpx.TransportError as error:
            answer = type(error).__name__
        else:
            if response.status_code == 200:
                return
            answer = f"status {response.status_code}"
        time.sleep(0.1)
    raise DemoFailed(f"the server was not ready after {START_SECONDS} s (last: {answer})")


def classify(url: str, photos: dict[str, bytes], classes: list[str]) -> dict[str, Any]:
    """Post all photographs in one multipart request; the answer as it came."""
    try:
        response = httpx.post(
            f"{url}/classify",
            files=[("image", (name, data, MEDIA_TYPES[Path(name).suffix])) for name, data in photos.items()],
            data={"classes": classes},
            timeout=REQUEST_SECONDS,
            trust_env=False,
        )
    except httpx.TransportError as error:
        raise DemoFailed(f"/classify gave no answer ({type(error).__name__})") from error
    if response.status_code != 200:
        raise DemoFailed(f"/classify answered {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


def table_of(answer: dict[str, Any]) -> Table:
    """One row per photograph; a label that a person would have given is green."""
    table = Table(title="zero-shot before, tuned on this request after")
    for heading in ("photograph", "top-1 before", "top-1 after"):
        table.add_column(heading, no_wrap=True)
    for heading in ("entropy before", "after", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (name, truth), result in zip(PHOTOS.items(), answer["results"], strict=True):
        adaptation = result["adaptation"]
        table.add_row(
            name,
            *(top_one(side, truth) for side in (result["baseline"], result)),
            f"{adaptation['entropy_before']:.2f}",
            f"{adaptation['entropy_after']:.2f}",
            f"{adaptation['ms']:.0f}",
        )
    return table


def top_one(side: dict[str, Any], truth: str) -> str:
    colour = "green" if side["label"] == truth else "yellow"
    return f"[{colour}]{escape(side['label'])}[/] {side['score']:.2f}"


def summary_of(answer: dict[str, Any], seconds: float) -> str:
    """What was done, in four lines."""
    results, truths = answer["results"], list(PHOTOS.values())
    adaptations = [result["adaptation"] for result in results]
    first = adaptations[0]
    before = sum(r["baseline"]["label"] == truth for r, truth in zip(results, truths, strict=True))
    after = sum(r["label"] == truth for r, truth in zip(results, truths, strict=True))
    outcomes = Counter("/".join(filter(None, (a["status"], a["reason"]))) for a in adaptations)
    return (
        f"{len(truths)} photographs, {len(CLASSES)} class names, one request: {seconds * 1000:.0f} ms; "
        f"as a person would say: {before} before, {after} after\n"
        f"method {first['method']}, scope {first['scope']}, {first['steps']} steps, {first['views']} views; "
        f"status: {', '.join(f'{outcome} ({count})' for outcome, count in outcomes.items())}\n"
        "entropy in nats, before the temperature that calibrates a tuned answer; scores after it\n"
        f"model {answer['model']['name']} (weights {answer['model']['weights_sha256'][:12]})"
    )


def main() -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    folder = files("skimage") / "data"
    photos = {name: (folder / name).read_bytes() for name in PHOTOS}
    with tempfile.TemporaryDirectory(prefix="gram-demo-") as scratch:
        log = Path(scratch) / "server.txt"
        try:
            with console.status("starting the server"), running_server(log) as url:
                start = time.perf_counter()
                answer = classify(url, photos, CLASSES)
                seconds = time.perf_counter() - start
                console.print(table_of(answer))
                console.print(summary_of(answer, seconds), markup=False, highlight=False)
        except DemoFailed as failure:
            tail = log.read_text(errors="replace").splitlines()[-30:] if log.exists() else []
            for line in ("last lines of the server's log:", *tail):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            console.print(f"demo failed: {failure}", style="bold red", markup=False, highlight=False)
            return 1
    console.print("server stopped with exit code 0", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
