"""What the process says on stderr: one line for each event, as a JSON object or as text.

A line is one line whatever was put into it. What went wrong below `critical` is told by the kinds and places of the
exceptions alone: their texts may repeat what a caller sent.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

WITHHELD = "text withheld; GRAM_LOG_LEVEL=debug shows it"
PLAIN = re.compile(r"[A-Za-z0-9_./:+@%-]+")

log = logging.getLogger("server")


class JsonLines(logging.Formatter):
    """One JSON object per line, in ASCII, whatever the message holds. With `texts`, exceptions are told in full."""

    def __init__(self, *, texts: bool = False) -> None:
        super().__init__()
        self.texts = texts

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, Any] = {
            "time": _stamp(record.created),
            "level": record.levelname.lower(),
            "event": _message(record),
            **getattr(record, "fields", {}),
        }
        if (error := _raised(record)) is not None:
            line["traceback"] = _told(error, texts=self.texts or record.levelno >= logging.CRITICAL)
        return self.render(line)

    def render(self, line: dict[str, Any]) -> str:
        """How a line's fields become its text."""
        return json.dumps({name: _finite(value) for name, value in line.items()}, default=repr)


class TextLines(JsonLines):
    """The same for a person's eyes: time, level, event, then `name=value`."""

    def render(self, line: dict[str, Any]) -> str:
        """Words as they are, everything else quoted, so that no value can look like another field."""
        time, level, event = (str(line.pop(name)) for name in ("time", "level", "event"))
        fields = "".join(f" {name}={_word(value)}" for name, value in line.items())
        return f"{time} {level.upper():<8} {_printable(event)}{fields}"


FORMATS: dict[str, type[JsonLines]] = {"json": JsonLines, "text": TextLines}


def log_to_stderr(level: str, form: str = "json") -> None:
    """Lines from here on, of everything that is said, warned of or raised where nobody catches it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATS[form](texts=level == "debug"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)  # other libraries' news can wait
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every bad form
    for ours in ("server", "gram_core"):
        logging.getLogger(ours).setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: log.error("uncaught in thread", exc_info=args.exc_value)


def last_words(code: int, message: str) -> int:
    """The last line, written even where no log was set up yet: why the process ends. Gives back the exit code."""
    formats = [handler.formatter for handler in logging.getLogger().handlers]
    formatter = next((f for f in formats if isinstance(f, JsonLines)), JsonLines())
    line = {"time": _stamp(time.time()), "level": "critical", "event": message, "code": code}
    sys.stderr.write(formatter.render(line) + "\n")
    return code


def _uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    log.critical("uncaught", exc_info=error)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # another library's line with the wrong number of arguments is still a line
        return str(record.msg)


def _raised(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if isinstance(record.exc_info, tuple) else None


def _told(error: BaseException, *, texts: bool) -> str:
    """The traceback with its causes; without `texts`, frames and kinds only."""
    if texts:
        return "".join(traceback.format_exception(error))
    told = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = "".join(traceback.format_tb(current.__traceback__))
        kind = type(current)
        told.append(f"{frames}{kind.__module__}.{kind.__qualname__}: {WITHHELD}\n")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "raised from here:\n".join(reversed(told))


def _finite(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(_finite(value), default=repr)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def _printable(text: str) -> str:
    return text if text.isprintable() and text.isascii() else json.dumps(text)


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
