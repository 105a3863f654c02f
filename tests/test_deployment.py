"""What operators load besides the server: alerts on metrics that exist, and that fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server_fixtures import live, png

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "prometheus"
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")


def test_every_alert_asks_for_metrics_and_labels_that_the_server_has() -> None:
    with live() as server:
        server.ask(*(png(n) for n in range(8)))
        server.ask(b"no image")
        text = server.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for rule in RULES:
        for name, labels in re.findall(r"\b(gram_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            family = families.get(re.sub(r"_(bucket|total)$", "", name))
            assert family is not None, (rule["alert"], name)
            known = {label for sample in family.samples for label in sample.labels}
            for label in re.findall(r"(\w+)\s*=~?", labels):
                assert not family.samples or label in known, (rule["alert"], name, label)


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
