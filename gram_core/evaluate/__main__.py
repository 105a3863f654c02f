"""`python -m gram_core.evaluate --data DIR...`: the table in the terminal, `summary.json` and `report.html` in `--out`.

Exit codes: 0 done, 2 an option or recipe is wrong, 65 data or model can't be used, 130 interrupted (run the same
command again: it goes on where it stopped).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gram_core.config import exit_code, parse
from gram_core.evaluate import report
from gram_core.evaluate.options import EvaluateConfig
from gram_core.evaluate.run import evaluate

PROGRAM = "python -m gram_core.evaluate"
PATHS = ("--data", "--out", "--cache", "--model-dir", "--checkpoint", "--checkpoints")


def main(words: Sequence[str] | None = None) -> int:
    """Run with command-line `words`; returns the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    config = parse(EvaluateConfig, words, program=PROGRAM, description=__doc__.partition("\n\n")[0])
    said = Console(stderr=True)

    def work() -> None:
        summary = evaluate(config, said, command=public(words))
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "summary.json", summary)
        report.write(summary, config.out / "report.html")
        said.print(f"{config.out}: summary.json and report.html written", markup=False, highlight=False)
        report.tables(summary, Console())

    return exit_code(work, said)


def write_json(path: Path, summary: dict[str, object]) -> None:
    """One line for each entry of a list, so that a diff shows what changed; written beside and renamed."""
    parts = []
    for name, value in summary.items():
        rows = [json.dumps(row, ensure_ascii=False) for row in value] if isinstance(value, list) else []
        body = "[\n  " + ",\n  ".join(rows) + "\n ]" if rows else json.dumps(value, ensure_ascii=False)
        parts.append(f" {json.dumps(name)}: {body}")
    with report.beside(path) as aside:
        aside.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def public(words: Sequence[str]) -> str:
    """The command as anyone can run it: folders of this machine become DIR."""
    shown: list[str] = []
    hide = named = False
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            hide, named = flag in PATHS, flag == "--checkpoints"
            word = f"{flag}=DIR" if hide and equals and value else word
        elif hide:
            word = f"{flag}=DIR" if equals and named else "DIR"
        elif os.path.isabs(word):
            word = Path(word).name
        if not (word == "DIR" and shown and shown[-1] == "DIR"):
            shown.append(word if " " not in word else repr(word))
    return " ".join([PROGRAM, *shown])


if __name__ == "__main__":
    sys.exit(main())
