"""The whole path as a newcomer walks it: the demo's own process, a real server, real photographs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demo_answers_every_photograph_before_and_after_and_stops_cleanly() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env=os.environ | {"GRAM_PORT": "1", "GRAM_API_KEYS_FILE": "nowhere"},  # must not reach the demo's server
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"│ (\w+\.(?:png|jpg)) +│ \S.* \d\.\d\d +│ \S.* \d\.\d\d +│ +\d", result.stdout)
    assert len(rows) >= 8
    assert "method gram, scope batch" in result.stdout
    assert "exit code 0" in result.stdout
