"""The table of settings says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from server.settings import PREFIX, Settings, shown

ROOT = Path(__file__).parents[1]


def test_the_table_of_settings_has_every_name_with_its_default_and_no_other() -> None:
    rows = re.findall(r"^\| `(GRAM_\w+)` \| `?([^`|]+?)`? \| (.+) \|$", (ROOT / "docs/settings.md").read_text(), re.M)
    table = sorted((name, default) for name, default, _ in rows)
    assert table == sorted(
        (PREFIX + name.upper(), shown(field.default)) for name, field in Settings.model_fields.items()
    )
    assert all(len(meaning) > 10 for _, _, meaning in rows)


def test_defaults_are_written_as_they_would_be_typed() -> None:
    written = [None, (), ("a", "::1"), True, 4.0, 0.5, 8000, "auto", Path.home() / "x", Path("/etc/x")]
    assert [shown(value) for value in written] == [
        *("unset", "unset", "a,::1", "true", "4", "0.5", "8000", "auto", "~/x", "/etc/x"),
    ]


def test_every_default_can_be_given_as_it_is_shown() -> None:
    plain = Settings()
    for name, field in Settings.model_fields.items():
        if shown(field.default) != "unset":
            assert getattr(Settings(**{name: shown(field.default)}), name) == getattr(plain, name), name
