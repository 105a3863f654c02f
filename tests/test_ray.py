"""Ray Serve: what a replica offers and tells, how it ends, and that no request is lost with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import yaml

from gram_core.errors import DeviceError
from server.answers import ErrorAnswer
from server.auth import new_key
from server.client import AsyncGramClient
from server.fake import FakeClassifier
from server.service import Service
from server.settings import InvalidSettings, Settings
from tests.process_fixtures import Process
from tests.server_fixtures import PATIENCE_S, FailingClassifier, HeldClassifier, body, code, live, png, until

ray = pytest.importorskip("ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pydantic, about Ray's own models
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from server import ray_app
    from server.ray_app import AGAIN, METRICS_PORTS, Options, Replica, Retry, application, build, by_load, replica_app

ROOT = Path(__file__).parents[1]
NAMES = ("cat", "dog")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting but those of a test; a CPU, so that nobody asks Ray for its devices."""
    for name in [name for name in os.environ if name.startswith("GRAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRAM_DEVICE", "cpu")


def deployed(options: Options) -> Any:
    """The deployment of an application."""
    return application(replica_app, options)._bound_deployment


# ---- the application ----


def test_a_replica_takes_a_gpu_where_the_settings_ask_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    took = lambda options: deployed(options).ray_actor_options  # noqa: E731
    assert took(Options()) == {"num_cpus": 1, "num_gpus": 0}
    assert took(Options(gpus=0.5, cpus=4)) == {"num_cpus": 4, "num_gpus": 0.5}
    monkeypatch.setenv("GRAM_DEVICE", "cuda")
    assert took(Options())["num_gpus"] == 1


def test_ray_waits_longer_than_the_server_drains_and_scales_by_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAM_DRAIN_S", "100")
    config = deployed(Options(min_replicas=2, max_replicas=5))._deployment_config
    assert config.graceful_shutdown_timeout_s > 100
    assert config.max_ongoing_requests == 256
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.policy.policy_function == "server.ray_app:by_load"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("GRAM_MAX_IMAGE", "7", "unknown setting GRAM_MAX_IMAGE; did you mean GRAM_MAX_IMAGES?"),
        ("GRAM_MAX_SESSIONS", "5", "GRAM_MAX_SESSIONS must be 0 or unset under Ray Serve"),
        (
            "GRAM_MAX_CLASS_SETS",
            "5",
            "GRAM_MAX_CLASS_SETS must be 0 or unset under Ray Serve without GRAM_CLASS_SET_DIR",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_fails_the_build_with_one_line(
    name: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as refused:
        build({})
    assert str(refused.value) == line


def test_an_argument_that_cannot_be_used_likewise() -> None:
    with pytest.raises(InvalidSettings, match=r"^argument gpu: Extra inputs are not permitted$"):
        build({"gpu": 1})
    with pytest.raises(InvalidSettings, match=r"^argument cpus: Input should be greater than 0$"):
        build({"cpus": "0"})


@pytest.mark.parametrize("file", ["ray-serve.yaml", "kuberay.yaml"])
def test_the_example_configurations_fit_rays_schema_and_our_settings(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = yaml.safe_load((ROOT / "docker" / file).read_text())
    if file == "kuberay.yaml":
        given = yaml.safe_load(given["spec"]["serveConfigV2"])
    (app,) = ServeDeploySchema.model_validate(given).applications
    assert (app.import_path, app.route_prefix) == ("server.ray_app:build", "/")
    for name, value in cast(dict[str, Any], app.runtime_env)["env_vars"].items():
        monkeypatch.setenv(name, value)
    call_user_app_builder_with_args_if_necessary(build, app.args)  # as Ray does


# ---- one replica, without a cluster ----


@dataclass
class Alone:
    """A replica's app in this process, and what Ray would ask of it."""

    replica: Replica
    service: Service
    client: httpx.AsyncClient

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/classify", json=body(**fields))


async def soon(fact: Callable[[], Any]) -> None:
    """`until`, on an event loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not fact():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def alone(classifier: FakeClassifier | None = None) -> AsyncIterator[Alone]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_app, "log_to_stderr", lambda *_: None)
        patch.setattr(ray_app, "settle", lambda: None)  # nothing of this process is to stay for good
        app = replica_app(load=lambda: classifier or FakeClassifier())
    replica = Replica()
    replica.app = app
    async with app.router.lifespan_context(app):
        transport: Any = httpx.ASGITransport(cast(Any, app))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Alone(replica, app.state.service, client)


def test_a_replica_has_loaded_its_model_before_its_start_is_over() -> None:
    async def check() -> None:
        class Late(FakeClassifier):
            def warm_up(self) -> None:
                time.sleep(0.3)

        async with alone(Late()) as one:
            assert one.service.engine.ready
            await one.replica.check_health()
            assert (await one.ask()).status_code == 200

    asyncio.run(check())


def test_what_one_replica_alone_would_keep_is_501_and_its_metrics_are_404(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def check() -> list[tuple[int, str]]:
        async with alone() as one:
            answers = [
                await one.client.get("/metrics"),
                await one.client.post("/v1/sessions", json={"classes": NAMES}),
                await one.client.get(f"/v1/sessions/ss_{'0' * 32}"),
                await one.client.get("/v1/class-sets"),
            ]
            limits = (await one.client.get("/info")).json()["limits"]
            assert limits["max_sessions"] == 0
            posted = await one.client.post("/v1/class-sets", json={"classes": NAMES})
            return [*((each.status_code, code(each)) for each in answers), (posted.status_code, str(posted.text))]

    *told, (status, text) = asyncio.run(check())
    assert told == [
        (404, "not_found"),
        (501, "sessions_disabled"),
        (501, "sessions_disabled"),
        (501, "class_sets_disabled"),
    ]
    assert status == 501
    assert "GRAM_CLASS_SET_DIR" in text
    monkeypatch.setenv("GRAM_CLASS_SET_DIR", str(tmp_path))
    assert ray_app.replica_settings().max_class_sets > 0


def free_ports() -> int:
    """The first of a row of ports, of which the first two are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            number: int = probe.getsockname()[1]
        try:
            socket.create_server(("127.0.0.1", number + 1)).close()
        except OSError:
            continue
        return number


def test_metrics_are_answered_on_the_first_port_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, line = new_key("scraper")
    (tmp_path / "keys").write_text(line + "\n")
    first = free_ports()
    monkeypatch.setenv("GRAM_METRICS_PORT", str(first))

    async def check() -> None:
        async with alone() as one, httpx.AsyncClient(trust_env=False) as scraper:
            assert listening(first)
            async with alone() as other:
                assert (await other.ask()).status_code == 200
                for port, asked in ((first, 0), (first + 1, 1)):
                    scrape = await scraper.get(f"http://127.0.0.1:{port}/metrics")
                    assert scrape.status_code == 200
                    assert scrape.text.count('route="/classify"} 1.0') >= asked
                    assert "gram_info{" in scrape.text
                    assert scrape.headers["content-type"].startswith("text/plain; version=0.0.4")
                assert code(await scraper.get(f"http://127.0.0.1:{first}/info")) == "not_found"
                assert one.service is not other.service
        monkeypatch.setenv("GRAM_API_KEYS_FILE", str(tmp_path / "keys"))
        monkeypatch.setenv("GRAM_METRICS_PUBLIC", "false")
        async with alone(), httpx.AsyncClient(trust_env=False) as scraper:
            with_key = {"authorization": f"Bearer {key}"}
            url = f"http://127.0.0.1:{first}/metrics"
            await soon(lambda: listening(first))
            assert code(await scraper.get(url)) == "unauthenticated"
            assert (await scraper.get(url, headers=with_key)).status_code == 200

    asyncio.run(check())


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_without_a_free_port_the_replica_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAM_METRICS_PORT", str(free_ports()))

    def refuse(_: Settings) -> socket.socket:
        raise OSError("taken")

    monkeypatch.setattr(ray_app, "bind", refuse)

    async def check() -> None:
        async with alone() as one:
            assert (await one.ask()).status_code == 200

    asyncio.run(check())
    assert f"none of {METRICS_PORTS} ports" in caplog.text


def test_a_replica_tells_how_many_of_its_kind_its_work_would_need() -> None:
    async def check() -> None:
        held = HeldClassifier()
        async with alone(held) as one:
            idle = await one.replica.record_autoscaling_stats()
            asked = asyncio.ensure_future(one.ask())
            await soon(lambda: held.runs)
            await one.replica.record_autoscaling_stats()
            await asyncio.sleep(0.2)
            busy = await one.replica.record_autoscaling_stats()
            held.gate.set()
            assert (await asked).status_code == 200
            assert idle["load"] == 0
            assert busy["load"] == pytest.approx(1 / ray_app.FULL, rel=0.05)

    asyncio.run(check())


def test_the_policy_wants_as_many_replicas_as_the_work_needs() -> None:
    def wanted(loads: dict[str, float] | None, requests: float = 0.0) -> float:
        config = SimpleNamespace(get_target_ongoing_requests=lambda: 8.0)
        metrics = {} if loads is None else {"load": loads}
        context: Any = SimpleNamespace(
            aggregated_metrics=metrics,
            current_num_replicas=2,
            target_num_replicas=2,
            total_num_requests=requests,
            config=config,
            policy_state={},
        )
        return by_load(context)[0]

    assert wanted({"a": 0.4, "b": 0.5}) == pytest.approx(0.9)
    assert wanted({"a": 4.0, "b": 3.5}, requests=0) == 7.5
    assert wanted(None, requests=32) == 4  # nobody has told yet: by requests, eight each


# ---- how a replica ends ----

REPLICA = """
import asyncio, sys, time
import httpx
from gram_core.errors import DeviceError, ModelUnavailable
from server import ray_app
from server.fake import FakeClassifier
from server.ray_app import Replica, replica_app

class Bad(FakeClassifier):
    def classify(self, images, classes, plan, **options):
        {what}

def load():
    {load}
    return Bad()

async def main():
    replica = Replica()
    replica.app = app = replica_app(load=load)
    async with app.router.lifespan_context(app):
        try:
            await replica.check_health()
        except RuntimeError as error:
            print(error, flush=True)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
        sent = asyncio.ensure_future(client.post("/classify?classes=a&classes=b", content={png!r},
                                                 headers={{"content-type": "image/png"}}))
        for _ in range(100):
            await asyncio.sleep(0.1)
            try:
                await replica.check_health()
            except RuntimeError as error:
                print(error, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("what", "exit_code", "said"),
    [
        ("raise DeviceError('the device is gone.')", 80, "the device is gone."),
        ("raise SystemExit(3)", 70, "the engine ended; its traceback is above"),
        ("time.sleep(60)", 81, "the engine showed no life for 0.5 s (GRAM_STALL_S)"),
    ],
)
def test_what_ends_the_engine_ends_the_replica_with_the_servers_own_code(
    start: Callable[..., Process], what: str, exit_code: int, said: str
) -> None:
    program = REPLICA.format(what=what, load="pass", png=png())
    process = start("-c", program, GRAM_DEVICE="cpu", GRAM_STALL_S="0.5")
    assert process.ended(exit_code) == said


def test_a_model_that_cannot_be_loaded_is_what_the_first_health_check_says(start: Callable[..., Process]) -> None:
    program = REPLICA.format(what="pass", load="raise ModelUnavailable('its weights are truncated.')", png=png())
    process = start("-c", program, GRAM_DEVICE="cpu")
    assert process.ended(65) == "its weights are truncated."


def test_a_replica_that_has_failed_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_app, "leave_soon", lambda _: None)

    async def check() -> None:
        async with alone(FailingClassifier(DeviceError("the device is gone."))) as one:
            assert code(await one.ask(classes=("bad", "dog"))) == "accelerator_failed"
            with pytest.raises(RuntimeError, match=r"the device is gone\. \(code 80\)"):
                await one.replica.check_health()

    asyncio.run(check())


def test_a_cancelled_request_is_a_client_that_left() -> None:
    """Ray's proxy cancels; uvicorn says that the connection is gone. Either way it is the same to the log."""

    async def check() -> None:
        held = HeldClassifier()
        async with alone(held) as one:
            asked = asyncio.ensure_future(one.ask())
            await soon(lambda: held.runs)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            held.gate.set()
            text = one.service.metrics.render().decode()
            assert 'gram_requests_total{code="499",route="/classify"} 1.0' in text
            assert 'gram_client_disconnects_total{stage="adapt"} 1.0' in text
            assert (await one.ask()).status_code == 200

    asyncio.run(check())


# ---- what Ray's proxy does when a replica dies ----

Reply = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]


async def dies(_: Any, receive: Any, __: Any) -> None:
    """Ray's proxy, when the replica dies with the request: nothing is sent."""
    while (await receive()).get("more_body"):
        pass


async def dies_between(scope: Any, receive: Any, send: Any) -> None:
    await dies(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def echoes(_: Any, receive: Any, send: Any) -> None:
    """Sends back what it was sent."""
    sent, more = b"", True
    while more:
        message = await receive()
        sent, more = sent + message["body"], message.get("more_body", False)
    twice = [(b"x-request-id", b"ours"), (b"X-Request-ID", b"theirs"), (b"a", b"1"), (b"a", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": twice})
    await send({"type": "http.response.body", "body": sent})


def through(
    replies: Sequence[Reply],
    method: str = "POST",
    path: str = "/v1/classify",
    size: int = 3,
    identity: str = "mine",
) -> Any:
    """One request through the middleware; replies are those of its tries."""
    left = list(replies)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await left.pop(0)(scope, receive, send)

    async def content() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield b"abc"

    async def ask() -> httpx.Response:
        transport: Any = httpx.ASGITransport(cast(Any, Retry(app)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"x-request-id": identity}
            return await client.request(method, path, content=content() if size else None, headers=headers)

    response = asyncio.run(ask())
    assert not left
    return response


@pytest.mark.parametrize("death", [dies, dies_between])
def test_a_request_whose_replica_died_is_given_to_another_with_its_whole_body(death: Reply) -> None:
    response = through([death, echoes])
    assert (response.status_code, response.content) == (200, b"abc" * 3)
    assert response.headers["x-request-id"] == "ours"
    assert response.headers.get_list("a") == ["1", "2"]
    assert through([death, echoes], "GET", "/anything", 0).status_code == 200


def test_what_kills_two_replicas_is_503_and_so_is_what_must_not_be_asked_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = [through([dies, dies]), through([dies], path="/another/apps/order")]
    monkeypatch.setattr(ray_app, "KEPT_BYTES", 8)
    refused.append(through([dies]))  # its body was not kept
    for response in refused:
        error = ErrorAnswer.model_validate_json(response.content).error
        assert (response.status_code, error.code, error.request_id) == (503, "accelerator_failed", "mine")
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-request-id"] == "mine"


def test_a_refusal_of_the_proxy_repeats_no_request_id_that_the_server_would_not() -> None:
    response = through([dies, dies], identity="x" * 10_000)
    assert len(response.content) <= 4096
    assert ErrorAnswer.model_validate_json(response.content).error.request_id == response.headers["x-request-id"]


def test_the_posts_that_are_asked_again_are_those_of_the_app_that_work_under_ray() -> None:
    with live() as server:
        app = server.client.get("/openapi.json").json()
    posts = {path for path, methods in app["paths"].items() if "post" in methods and "/v1/sessions" not in path}
    assert all(AGAIN.fullmatch(path.replace("{model}", "gram")) for path in posts)


# ---- a cluster ----


@dataclass
class Cluster:
    """A local Ray with the app on two replicas; `tests.ray_fixtures` runs it."""

    url: str
    pids: Path
    driver: subprocess.Popen[bytes]

    def alive(self) -> set[int]:
        """The processes of replicas."""
        return {pid for pid in map(int, os.listdir(self.pids)) if runs(pid)}

    def deploy(self, replicas: tuple[int, int] = (2, 2), **settings: str) -> None:
        """Put the app there, or update it; `replicas` are least and most."""
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        options = {"cpus": 0.5, "min_replicas": replicas[0], "max_replicas": replicas[1]}
        self.driver.stdin.write(json.dumps([options, settings]).encode() + b"\n")
        self.driver.stdin.flush()
        assert any(line == b"deployed\n" for line in self.driver.stdout)  # Ray's news come before it


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def of_ray(folder: str) -> set[int]:
    """Ray's own processes, which name its folder."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if folder in file.read_text() and runs(int(file.parent.name)):
                found.add(int(file.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Everything that it starts has ended after it, whatever happens."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GRAM_", "RAY_", "OMP_"))}
    environ |= {
        "GRAM_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray_app:retrying",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "log"
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short name: its sockets have 107 characters
        (pids := Path(folder) / "pids").mkdir()
        command = [sys.executable, "-m", "tests.ray_fixtures", folder, str(port)]
        with (
            log.open("wb") as file,
            subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            ) as driver,
        ):
            made = Cluster(f"http://127.0.0.1:{port}", pids, driver)
            try:
                made.deploy()
                yield made
            finally:
                assert driver.stdin is not None
                driver.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    driver.wait(30)
                for pid in of_ray(folder) | made.alive():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                until(lambda: not of_ray(folder) | made.alive(), "Ray has ended")


async def under_load(url: str, meanwhile: Callable[[], None], clients: int = 8) -> Counter[str]:
    """Ask by the project's client until `meanwhile` is over; answers by whether they are the right one."""
    told: Counter[str] = Counter()
    reference = expected()
    over = asyncio.Event()

    async def ask(client: AsyncGramClient, seed: int) -> None:
        while not over.is_set():
            seed = (seed * 7 + 3) % len(reference)
            answer = await client.classify(png(seed), list(NAMES), method="none")
            told["right" if answer["results"][0]["predictions"] == reference[seed] else "wrong"] += 1

    async with AsyncGramClient(url) as client:
        asking = [asyncio.ensure_future(ask(client, seed)) for seed in range(clients)]
        await asyncio.sleep(1.5)
        await asyncio.to_thread(meanwhile)
        await asyncio.sleep(1.5)
        over.set()
        await asyncio.gather(*asking)
    return told


def expected() -> list[Any]:
    """The predictions of the same classifier without Ray, for each picture."""
    with live() as server:
        answers = [server.ask(png(seed), adaptation={"method": "none"}).json() for seed in range(40)]
    return [answer["results"][0]["predictions"] for answer in answers]


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_no_request_and_comes_back(cluster: Cluster) -> None:
    before = cluster.alive()
    assert len(before) == 2
    victim = min(before)
    told = asyncio.run(under_load(cluster.url, lambda: os.kill(victim, signal.SIGKILL)))
    assert set(told) == {"right"}
    assert told["right"] > 20
    until(lambda: len(cluster.alive()) == 2, "another replica is there", patience_s=60)
    assert victim not in cluster.alive()


@pytest.mark.slow
def test_a_rolling_update_under_load_loses_no_request(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.alive()
    update = lambda: cluster.deploy(GRAM_MAX_IMAGES="7", GRAM_CLASS_SET_DIR=str(tmp_path))  # noqa: E731
    told = asyncio.run(under_load(cluster.url, update))
    assert set(told) == {"right"}
    until(lambda: len(cluster.alive()) == 2, "the old ones have ended", patience_s=60)
    assert not before & cluster.alive()
    with httpx.Client(base_url=cluster.url, trust_env=False) as client:
        assert {client.get("/info").json()["limits"]["max_images"] for _ in range(10)} == {7}
        made = client.post("/v1/class-sets", json={"classes": NAMES}).json()  # in the folder that they share
        asked = [client.post("/classify", json=body(classes={"class_set": made["id"]})) for _ in range(20)]
        assert {response.status_code for response in asked} == {200}
        assert client.delete(f"/v1/class-sets/{made['id']}").status_code == 204
        left = [client.get(f"/v1/class-sets/{made['id']}") for _ in range(20)]
        assert {response.status_code for response in left} == {404}


@pytest.mark.slow
def test_work_that_waits_brings_another_replica(cluster: Cluster) -> None:
    cluster.deploy(replicas=(1, 1))
    until(lambda: len(cluster.alive()) == 1, "there is one replica", patience_s=60)
    cluster.deploy(replicas=(1, 2))
    two = lambda: until(lambda: len(cluster.alive()) == 2, "there are two replicas", patience_s=90)  # noqa: E731
    told = asyncio.run(under_load(cluster.url, two, clients=4))  # too few for Ray's usual rule to want two
    assert set(told) == {"right"}
