"""Class sets as resources: definitions that were posted once and are named by id afterwards (api.md section 7).

The id hashes the definition and the model, so posting again gives the same id on every replica and after every
restart. What is kept is the definition; tokens and features are the classifier's cache and may come and go. With
GRAM_CLASS_SET_DIR each definition is one JSON file besides. Safe under threads; files are read and written here, so
call from a pool.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gram_core.errors import InvalidClasses
from server.engine import Classifier
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import InvalidSettings, Settings

ID = re.compile(r"cs_[0-9a-f]{32}")
MOST_BYTES = 2**28  # of definitions in memory
Classes = Sequence[str] | Mapping[str, Sequence[str]]

log = logging.getLogger("server.class_sets")


@dataclass(frozen=True)
class Definition:
    """What was posted: names or sentences by name, templates, and what became of them."""

    id: str
    classes: Any
    templates: list[str] | None
    size: int
    texts: int
    model: str
    created: int
    last_used: int = 0

    def facts(self, *, warm: bool) -> dict[str, Any]:
        """What its owner is told."""
        names = (
            "id",
            "size",
            "texts",
            "model",
            "created",
            "last_used",
        )  # never a copy of what may be ten thousand names
        told = {name: getattr(self, name) for name in names}
        return {**told, "object": "class_set", "warm": warm}

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        own = self.classes.values() if isinstance(self.classes, dict) else ()
        texts = [*self.classes, *(text for each in own for text in each), *(self.templates or ())]
        return sum(map(sys.getsizeof, texts))


class ClassSets:
    """Definitions by owner and id; the least recently used beyond GRAM_MAX_CLASS_SETS are dropped."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._most = settings.max_class_sets
        self._folder = settings.class_set_dir
        self._kept: OrderedDict[tuple[str | None, str], Definition] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        if self._folder is not None:
            _writable(self._folder)
        metrics.gauge("class_sets", "Class sets kept.", lambda: float(len(self._kept)))

    def put(
        self, owner: str | None, made: Any, classes: Classes, templates: list[str] | None, model: str
    ) -> tuple[Definition, bool]:
        """Keep a definition that became the class set `made`; and whether it was new to its owner."""
        self._enabled()
        now = int(time.time())
        with self._lock:
            known = self._look_up(owner, made.id)
            found = known or Definition(made.id, classes, templates, len(made), made.texts, model, now)
            found = replace(found, last_used=now)
            if known is None and self._folder is not None:
                self._make_room()
                self._write(owner, found)
            self._keep(owner, found)
            return found, known is None

    def find(self, owner: str | None, identity: str) -> Definition:
        """The owner's definition; raises ApiError 404, which means: post it again."""
        self._enabled()
        with self._lock:
            found = self._look_up(owner, identity) if ID.fullmatch(identity) else None
            if found is None:
                raise not_found()
            found = replace(found, last_used=int(time.time()))
            self._keep(owner, found)
            if self._folder is not None:
                with suppress(OSError):
                    _used_now(self._file(owner, identity))
            return found

    def use(self, owner: str | None, identity: str, classifier: Classifier) -> Any:
        """The class set itself; raises ApiError 404 where it is unknown or is not what its id says."""
        found = self.find(owner, identity)
        try:
            made = classifier.class_set(found.classes, found.templates)
        except InvalidClasses:
            made = None
        if made is None or made.id != identity:
            log.error("a class set is not what its id says; it was dropped")
            self.drop(owner, identity)
            raise not_found()
        return made

    def owned(self, owner: str | None) -> list[Definition]:
        """The owner's, latest use last."""
        self._enabled()
        with self._lock:
            mine = {identity: found for (whose, identity), found in self._kept.items() if whose == owner}
            if self._folder is None:
                return list(mine.values())
            read = [mine.get(file.stem) or self._read(owner, file.stem) for file in self._files(owner)]
            return [found for found in read if found is not None]

    def drop(self, owner: str | None, identity: str) -> None:
        """Forget one; raises ApiError 404 where there is none."""
        self._enabled()
        with self._lock:
            if ID.fullmatch(identity) is None or self._look_up(owner, identity) is None:
                raise not_found()
            self._forget(owner, identity)

    def _enabled(self) -> None:
        if self._most == 0:
            sentence = (
                "this server keeps no class sets (GRAM_MAX_CLASS_SETS, and Ray Serve without GRAM_CLASS_SET_DIR). "
                "Send the classes themselves."
            )
            raise ApiError("class_sets_disabled", sentence, param="classes")

    # ---- inside, under the lock ----

    def _look_up(self, owner: str | None, identity: str) -> Definition | None:
        found = self._kept.get((owner, identity))
        if self._folder is None:
            return found
        if found is None:
            found = self._read(owner, identity)
            if found is not None:
                self._keep(owner, found)
        elif not self._file(owner, identity).exists():  # another replica dropped it
            self._forget(owner, identity)
            return None
        return found

    def _read(self, owner: str | None, identity: str) -> Definition | None:
        try:
            found = Definition(**json.loads(self._file(owner, identity).read_text(encoding="utf-8")))
            if found.id != identity or not isinstance(found.classes, list | dict):
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            log.error("a class set's file can't be read; it is taken as missing")
            return None
        return found

    def _keep(self, owner: str | None, found: Definition) -> None:
        old = self._kept.pop((owner, found.id), None)
        self._bytes += found.nbytes - (0 if old is None else old.nbytes)
        self._kept[owner, found.id] = found
        while len(self._kept) > self._most or (self._bytes > MOST_BYTES and len(self._kept) > 1):
            self._bytes -= self._kept.popitem(last=False)[1].nbytes  # its file, if there is one, stays

    def _make_room(self) -> None:
        """For one more file: the folder holds no more than GRAM_MAX_CLASS_SETS, whoever wrote them."""
        assert self._folder is not None
        files = [(file.stat().st_mtime_ns, file) for file in self._folder.glob("*/cs_*.json")]
        for _, file in sorted(files)[: max(0, len(files) - self._most + 1)]:
            name = file.parent.name
            self._forget(None if name == "anyone" else name.removeprefix("key-"), file.stem)

    def _forget(self, owner: str | None, identity: str) -> None:
        found = self._kept.pop((owner, identity), None)
        self._bytes -= 0 if found is None else found.nbytes
        if self._folder is not None:
            with suppress(OSError):
                self._file(owner, identity).unlink()

    def _write(self, owner: str | None, found: Definition) -> None:
        file = self._file(owner, found.id)
        try:
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
            _used_now(temporary)
            temporary.replace(file)
        except OSError:
            log.exception("a class set can't be written to GRAM_CLASS_SET_DIR; it is kept in memory alone")

    def _file(self, owner: str | None, identity: str) -> Path:
        assert self._folder is not None
        return self._folder / ("anyone" if owner is None else f"key-{owner}") / f"{identity}.json"

    def _files(self, owner: str | None) -> list[Path]:
        folder = self._file(owner, "x").parent
        found = [file for file in folder.glob("cs_*.json") if ID.fullmatch(file.stem)]
        return sorted(found, key=lambda file: file.stat().st_mtime_ns)


def not_found() -> ApiError:
    """404: there is none, or it is another's."""
    return ApiError("class_set_not_found", "no such class set. Post its classes again.")


def _writable(folder: Path) -> None:
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InvalidSettings(f"GRAM_CLASS_SET_DIR can't be written to: {error.strerror}.") from None


def _used_now(file: Path) -> None:
    """Every replica goes by the time of a file; the system's own is that of its last tick, the same for many."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))
