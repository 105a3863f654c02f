"""How the process starts, stops and ends: every exit code, and nothing lost that was admitted."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.__main__ import main
from tests.process_fixtures import Process
from tests.server_fixtures import body, code, png, until

FAKE_PROCESS = """
SECONDS = 0.3
import socket, sys, time
from server.__main__ import log_to_stderr, serve
from server.__main__ import main
from server.app import create_app
from server.fake import FakeClassifier
from server.settings import Settings

class Slow(FakeClassifier):
    def classify(self, images, classes, plan, **options):
        time.sleep(SECONDS)
        return super().classify(images, classes, plan, **options)

log_to_stderr("info")
settings = Settings(drain_s=1 if SECONDS > 1 else 5)
sys.exit(serve(create_app(settings, Slow()), settings, socket.create_server(("127.0.0.1", 0))))
"""


BROKEN_PROCESS = """
import socket, sys
from gram_core.errors import ModelUnavailable
from server.__main__ import log_to_stderr, serve
from server.app import create_app
from server.settings import Settings

def load():
    raise ModelUnavailable("its weights are truncated.")

log_to_stderr("info")
settings = Settings()
sys.exit(serve(create_app(settings, load=load), settings, socket.create_server(("127.0.0.1", 0))))
"""


def test_a_stop_signal_finishes_what_was_admitted_and_exits_0(start: Callable[..., Process]) -> None:
    process = start("-c", FAKE_PROCESS)
    with process.client() as client, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.post, "/classify", json=body(png(n))) for n in range(3)]
        until(lambda: "gram_requests_inflight 4.0" in client.get("/metrics").text, "all are admitted")
        process.popen.send_signal(signal.SIGTERM)
        assert [future.result().status_code for future in asked] == [200, 200, 200]
    assert process.ended(0) == "stopped"
    assert [entry["route"] for entry in process.lines() if entry["event"] == "request"] == ["/classify"] * 3


def test_work_that_outlasts_the_drain_time_is_abandoned_with_exit_83(start: Callable[..., Process]) -> None:
    process = start("-c", FAKE_PROCESS.replace("0.3", "30"))
    with process.client() as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/classify", json=body())
        until(lambda: "gram_requests_inflight 2.0" in client.get("/metrics").text, "it is admitted")
        process.popen.send_signal(signal.SIGTERM)
        assert "GRAM_DRAIN_S" in process.ended(83)
        assert code(asked.result()) == "draining"


def test_a_stop_signal_while_the_model_loads_ends_at_once(start: Callable[..., Process]) -> None:
    process = start("-c", BROKEN_PROCESS.replace("raise", "import time; time.sleep(60); raise"))
    with httpx.Client(base_url=process.url(), trust_env=False) as client:
        assert client.get("/startupz").json()["phase"] == "load"
    process.popen.send_signal(signal.SIGTERM)
    assert process.ended(0) == "stopped"


def test_a_second_stop_signal_means_now(start: Callable[..., Process]) -> None:
    process = start("-c", FAKE_PROCESS)
    with process.client() as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/classify", json=body())
        until(lambda: "gram_requests_inflight 2.0" in client.get("/metrics").text, "it is admitted")
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.02)  # two signals at once may arrive as one
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            asked.result()


def test_bad_settings_exit_64_with_one_line(start: Callable[..., Process]) -> None:
    by_flag = start("-m", "server", "--max-imags", "7")
    by_variable = start("-m", "server", GRAM_QUEUE_SECOND="1")
    assert by_flag.ended(64) == "unknown flag --max-imags; did you mean --max-images?"
    assert by_variable.ended(64) == "unknown setting GRAM_QUEUE_SECOND; did you mean GRAM_QUEUE_SECONDS?"
    assert len(by_flag.lines()) == len(by_variable.lines()) == 1


def test_a_port_in_use_exits_69_with_one_line(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("-m", "server", "--port", str(taken.getsockname()[1]))
        assert "can't listen on 127.0.0.1" in process.ended(69)


@pytest.mark.parametrize("model", ["no-such-architecture/no-such-tag", "hf-hub:nobody/nothing"])
def test_a_model_that_cannot_be_had_exits_65_before_the_server_listens(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.__main__.log_to_stderr", lambda *_: None)
    monkeypatch.setattr("server.__main__.serve", lambda *_: pytest.fail("it listens"))
    code = main(["--port", "0", "--model", model, "--model-dir", str(tmp_path), "--offline"])
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (code, last["code"]) == (65, 65)
    assert last["event"]


def test_a_model_that_cannot_be_loaded_exits_65(start: Callable[..., Process]) -> None:
    process = start("-c", BROKEN_PROCESS)
    assert process.ended(65) == "its weights are truncated."
    assert "traceback" not in process.log.read_text()


def test_a_delay_before_draining_is_not_ready_and_still_answers(start: Callable[..., Process]) -> None:
    """So that a load balancer sees the probe before a request is refused."""
    process = start("-c", FAKE_PROCESS.replace("Settings(", "Settings(drain_delay_s=0.5, "))
    with process.client() as client:
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503, "it is not ready")
        assert client.get("/readyz").json()["checks"]["not_draining"] is False
        assert client.post("/classify", json=body()).status_code == 200
    assert process.ended(0) == "stopped"


def misbehaving(what: str, settings: str = "") -> str:
    """A process whose classifier does `what` when a class is called `bad`."""
    return FAKE_PROCESS.replace("time.sleep(SECONDS)", f"if 'bad' in classes.names: {what}").replace(
        "settings = Settings(", f"settings = Settings({settings}"
    )


@pytest.mark.parametrize(
    ("what", "exit_code", "said"),
    [
        (
            "from gram_core.errors import DeviceError; raise DeviceError('the device is gone.')",
            80,
            "the device is gone.",
        ),
        ("raise SystemExit(3)", 70, "the engine ended; its traceback is above"),
    ],
)
def test_what_ends_the_engine_ends_the_process_with_its_own_code(
    start: Callable[..., Process], what: str, exit_code: int, said: str
) -> None:
    process = start("-c", misbehaving(what))
    with process.client() as client:
        assert client.post("/classify", json=body()).status_code == 200
        assert code(client.post("/classify", json=body(classes=("bad", "dog")))) == "accelerator_failed"
    assert process.ended(exit_code) == said


def test_weights_that_change_end_the_process_in_an_idle_moment(start: Callable[..., Process]) -> None:
    class_body = """
from gram_core.device import Sentinel
import torch

class Slow(FakeClassifier):
    def __init__(self):
        super().__init__()
        self.weights = torch.zeros(3)
        self.sentinel = Sentinel([self.weights])

    def classify(self, images, classes, plan, **options):
        self.weights += "bad" in classes.names
        return super().classify(images, classes, plan, **options)

log_to_stderr("info")
"""
    process = start("-c", FAKE_PROCESS.replace('log_to_stderr("info")\n', class_body))
    with process.client() as client:
        assert client.get("/readyz").json()["checks"]["weights"] is True
        assert client.post("/classify", json=body(classes=("bad", "dog"))).status_code == 200
    assert "weights in memory have changed" in process.ended(82)


def test_an_engine_that_hangs_ends_the_process(start: Callable[..., Process]) -> None:
    process = start("-c", misbehaving("time.sleep(60)", "stall_s=0.5, "))
    with process.client() as client, ThreadPoolExecutor(1) as pool:
        lost = pool.submit(client.post, "/classify", json=body(classes=("bad", "dog")))
        assert "GRAM_STALL_S" in process.ended(81)
        with pytest.raises(httpx.TransportError):
            lost.result()


def test_of_two_that_took_one_port_the_later_exits_69(start: Callable[..., Process]) -> None:
    race = """
from server.__main__ import bind
port = bind(Settings(port=0))
other = socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
other.bind(port.getsockname())
other.listen()
sys.exit(serve(create_app(Settings(), Slow()), Settings(), port))
"""
    process = start("-c", FAKE_PROCESS[: FAKE_PROCESS.rindex("settings = ")] + race)
    assert "can't listen on 127.0.0.1" in process.ended(69)


def test_a_stop_signal_the_moment_it_listens_ends_it_in_order(start: Callable[..., Process]) -> None:
    process = start("-c", FAKE_PROCESS)
    process.url()
    process.popen.send_signal(signal.SIGTERM)
    assert process.ended(0) == "stopped"


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_idle_threads_of_torch_give_up_their_core_unless_told_otherwise(
    start: Callable[..., Process], given: dict[str, str], policy: str
) -> None:
    loads = "import os; raise ModelUnavailable(os.environ['OMP_WAIT_POLICY'] + ' before torch is there.')"
    script = f"""
import sys
from gram_core.errors import ModelUnavailable
import server.app
from server.__main__ import main

def load(settings):
    assert "torch" not in sys.modules
    {loads}

server.app.load_classifier = load
sys.exit(main(["--port", "0"]))
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_WAIT_POLICY", raising=False)
        process = start("-c", script, **given)
    assert process.ended(65) == f"{policy} before torch is there."
