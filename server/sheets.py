"""Rows of a classification as text, JSON, JSON lines or CSV, written as they come and complete at every end."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

Row = Mapping[str, Any]  # a result of the server's answer, and the `path` of its image
COLUMNS = (
    "path",
    "label",
    "score",
    "baseline_label",
    "baseline_score",
    "changed",
    "method",
    "status",
    "reason",
    "error",
)


class Sheet(Protocol):
    """Takes rows in their order."""

    def begin(self, answer: Mapping[str, Any] | None) -> None:
        """What the first answer says of itself; None if there never was one."""

    def write(self, row: Row) -> None:
        """One image."""

    def end(self, told: Mapping[str, Any]) -> None:
        """The counts of the run."""


class Text:
    """A line for a person."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def begin(self, answer: Mapping[str, Any] | None) -> None:
        """Nothing to say."""

    def write(self, row: Row) -> None:
        """`path: label score`, and what zero-shot said if that is another label."""
        if row["error"] is not None:
            said = f"failed, {row['error']['code']}: {row['error']['message']}"
        else:
            before = f" (zero-shot: {row['baseline']['label']} {row['baseline']['score']:.3f})" if changed(row) else ""
            said = f"{row['label']} {row['score']:.3f}{before}"
        self.file.write(f"{printable(row['path'])}: {said}\n")

    def end(self, told: Mapping[str, Any]) -> None:
        """Nothing to say."""


class JsonLines(Text):
    """One object a line: the image's `path`, then what the server says of it."""

    def write(self, row: Row) -> None:
        """One line."""
        self.file.write(_json(row) + "\n")


class Json(Text):
    """One object: `model`, `class_set`, `results` (as JSON lines) and the counts of the run."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self.between = ""

    def begin(self, answer: Mapping[str, Any] | None) -> None:
        """All up to the first result."""
        facts = {name: None if answer is None else answer[name] for name in ("model", "class_set")}
        if facts["class_set"] is not None:
            facts["class_set"] = {name: facts["class_set"][name] for name in ("id", "size")}
        self.file.write(_json(facts)[:-1] + ', "results": [')

    def write(self, row: Row) -> None:
        """One element."""
        self.file.write(f"{self.between}\n{_json(row)}")
        self.between = ","

    def end(self, told: Mapping[str, Any]) -> None:
        """The rest."""
        self.file.write("\n], " + _json(told)[1:] + "\n")


class Csv(Text):
    """A header and one line for each image: `COLUMNS`."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self.rows = csv.writer(file, lineterminator="\n")

    def begin(self, answer: Mapping[str, Any] | None) -> None:  # noqa: ARG002
        """The header."""
        self.rows.writerow(COLUMNS)

    def write(self, row: Row) -> None:
        """One line; a failed image has its error's code in the last column and nothing before."""
        before, did, error = row["baseline"] or {}, row["adaptation"] or {}, row["error"] or {}
        facts = (row["label"], row["score"], before.get("label"), before.get("score"))
        flag = None if error else str(changed(row)).lower()
        self.rows.writerow(
            (row["path"], *facts, flag, *map(did.get, ("method", "status", "reason")), error.get("code"))
        )


SHEETS: dict[str, type[Text]] = {"text": Text, "json": Json, "jsonl": JsonLines, "csv": Csv}


def changed(row: Row) -> bool:
    """Whether adaptation gave the image another label than zero-shot."""
    return row["baseline"] is not None and row["label"] != row["baseline"]["label"]


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
