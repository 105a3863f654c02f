"""What was computed once and need not be computed again: one SQLite file of values under content hashes.

Every value is written in a transaction of its own batch, so a run that is killed leaves what it had finished, and the
next one goes on from there. Keys say everything a value depends on; the store itself knows nothing of their meaning.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gram_core.errors import InvalidData

CHUNK = 500  # keys asked for in one statement


def key_of(kind: str, **parts: Any) -> str:
    """A key from everything that the value depends on; parts are plain JSON."""
    content = json.dumps([kind, parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:40]


class Store:
    """`get` and `put` of (header, bytes) pairs. One writer at a time; a second process waits for its turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, header TEXT, value BLOB)")
        except (OSError, sqlite3.Error) as error:
            raise InvalidData(
                f"the cache {path} can't be used ({type(error).__name__}: {error}). Delete it, or name another folder "
                "with --cache."
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, tuple[Any, bytes]]:
        """What is there of `keys`: header and value of each."""
        return {key: (json.loads(header), value) for key, header, value in self._rows("key, header, value", keys)}

    def headers(self, keys: Sequence[str]) -> dict[str, Any]:
        """The headers alone: values are not read."""
        return {key: json.loads(header) for key, header in self._rows("key, header", keys)}

    def has(self, keys: Sequence[str]) -> set[str]:
        """Which of `keys` are there."""
        return {key for (key,) in self._rows("key", keys)}

    def put(self, values: Mapping[str, tuple[Any, bytes]]) -> None:
        """Keep all of `values`, or none of them."""
        try:
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO kept VALUES (?, ?, ?)",
                    [(key, json.dumps(header), value) for key, (header, value) in values.items()],
                )
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _rows(self, columns: str, keys: Sequence[str]) -> Iterator[Any]:
        for at in range(0, len(keys), CHUNK):
            part = keys[at : at + CHUNK]
            marks = ",".join("?" * len(part))
            try:
                yield from self._file.execute(f"SELECT {columns} FROM kept WHERE key IN ({marks})", part)
            except sqlite3.Error as error:
                raise self._broken(error) from error

    def _broken(self, error: sqlite3.Error) -> InvalidData:
        return InvalidData(
            f"the cache {self.path} can't be read or written ({error}). Free some space, or delete the file: what it "
            "holds is computed again."
        )
