"""What operators load besides the server: alerts on metrics that exist, and that fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.settings import read_settings
from tests.server_fixtures import Live, live, png, until

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "gram.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
# Of a well server on a CPU: no device memory, nothing that went wrong, nothing that was shed.
WITHOUT_DATA = {"Alerts", "Device memory", "Out of memory", "Refused, by reason", "Clients that left"}
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")


def some_traffic(server: Live) -> None:
    server.ask(*(png(n) for n in range(8)))
    server.ask(png())
    server.ask(b"no image")
    server.ask(*(png(n) for n in range(8)), adaptation={"budget_ms": 0})


def test_alerts_and_dashboard_ask_for_metrics_and_labels_that_the_server_has() -> None:
    with live() as server:
        some_traffic(server)
        text = server.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    given = {"instance", "job", "alertstate"}  # by Prometheus
    for where, expr in [(rule["alert"], rule["expr"]) for rule in RULES] + QUERIES:
        for name, labels in re.findall(r"\b((?:gram|process)_\w+)(?:\{([^}]*)\})?", expr):
            family = families.get(re.sub(r"_(bucket|sum|count|total)$", "", name)) or families.get(name)
            assert family is not None, (where, name)
            known = {label for sample in family.samples for label in sample.labels} | given
            for label in re.findall(r"(\w+)\s*[=!]~?\"", labels):
                assert not family.samples or label in known, (where, name, label)


def test_every_alert_has_its_severity_its_test_and_its_line_in_the_operations_guide() -> None:
    guide, tests = (ROOT / "docs" / "operations.md").read_text(), (FOLDER / "alerts_test.yml").read_text()
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert f"| `{rule['alert']}` |" in guide
        assert tests.count(f'"{rule["alert"]}"') == 2  # one on which it fires, one on which it does not
    assert len({rule["alert"] for rule in RULES}) == len(RULES) == guide.count("| `Gram")


@promtool
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_prometheus_takes_the_files_and_every_alert_fires_when_it_should(command: str) -> None:
    done = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus with our rules that has scraped a live server before, during and after some traffic."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs Debian's package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    with live() as server:
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "alerts.yml", folder)
        place = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen(["prometheus", *place, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                scrapes = f'count_over_time(gram_cost_rate{{instance="127.0.0.1:{server.port}"}}[1m])'
                some_traffic(server)  # a series that is new has no rate until it is seen to grow
                until(lambda: ready(client), "Prometheus starts", 30.0)
                until(lambda: number(client, scrapes) >= 2, "Prometheus scrapes the server")
                some_traffic(server)
                seen = number(client, scrapes)
                until(lambda: number(client, scrapes) >= seen + 2, "Prometheus goes on")
                yield client
        finally:
            running.kill()
            running.wait()


def ask(client: httpx.Client, expr: str) -> list[dict[str, Any]]:
    """What Prometheus finds now."""
    answer = client.get("/api/v1/query", params={"query": expr}).json()
    assert answer["status"] == "success", (expr, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").is_success
    except httpx.ConnectError:
        return False


def number(client: httpx.Client, expr: str) -> float:
    found = ask(client, expr)
    return float(found[0]["value"][1]) if found else 0.0


def test_every_query_of_the_dashboard_finds_something_in_what_a_real_server_exports(prometheus: httpx.Client) -> None:
    empty = set()
    for title, expr in QUERIES:
        expr = expr.replace("$__rate_interval", "1m").replace("$instance", ".*")
        if not ask(prometheus, expr):
            empty.add(title)
    assert empty <= WITHOUT_DATA


def test_every_rule_is_healthy_in_a_real_prometheus(prometheus: httpx.Client) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert [(rule["name"], rule["health"]) for group in groups for rule in group["rules"]] == [
        (rule["alert"], "ok") for rule in RULES
    ]


def test_the_dashboard_is_laid_out_without_overlap_and_every_panel_has_a_source_that_is_provisioned() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    uid = source["datasources"][0]["uid"]
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells |= own
        for part in (panel, *panel.get("targets", [])):
            assert panel["type"] == "row" or part["datasource"] == {"type": "prometheus", "uid": uid}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "gram.yml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in COMPOSE["services"]["grafana"]["volumes"]


@pytest.mark.parametrize("file", ["compose.yaml", "docker/compose.yaml"])
def test_compose_files_hold_to_their_schema(file: str) -> None:
    command = [
        Path(sys.executable).with_name("check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        ROOT / file,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_container_is_published_beyond_this_host_or_keeps_more_rights_than_it_needs() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("privileged") is None, name
    for name in ("server", "server-cpu"):
        service = COMPOSE["services"][name]
        assert service["user"] == "gram", name
        assert "models:/models:ro" in service["volumes"], name


@pytest.mark.parametrize(("name", "profile"), [("server", "gpu"), ("server-cpu", "cpu")])
def test_compose_gives_the_server_settings_that_exist_and_time_to_drain(
    monkeypatch: pytest.MonkeyPatch, name: str, profile: str
) -> None:
    chosen = dict(line.split("=") for line in (ROOT / ".env").read_text().splitlines() if line[:1].isalpha())
    assert chosen == {"COMPOSE_PROFILES": "gpu", "GRAM_MODEL": "gram-mini"}
    service = COMPOSE["services"][name]
    assert service["profiles"] == [profile]
    assert [(ROOT / "docker" / path).resolve() for path in service["env_file"]] == [ROOT / ".env"]
    for variable, value in service["environment"].items():
        value = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)  # nothing is set on the host
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:\+[^}]*\}", "", value))
    settings = read_settings([])
    assert (settings.host, settings.port, settings.offline, settings.api_keys_file) == ("0.0.0.0", 8000, True, None)
    assert "server" in settings.allowed_hosts
    assert settings.drain_s < float(service["stop_grace_period"].removesuffix("s"))


def test_the_image_takes_in_every_package_of_the_project_and_only_what_the_build_copies() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()
    }
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert {"gram_core", "prototypes", "server"} <= copied
    assert all((ROOT / name).exists() for name in copied)
