"""Sessions: adaptation over a stream, as an object that a request names (api.md section 7b).

A session holds a memory of frozen features (`gram_core.memory`), never pixels, prompts or class probabilities. Nothing
of it happens to a request that names none. Used from the event loop; requests on one session run one after the other.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from gram_core.types import Plan
from server.answers import Group
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import Settings

ID = re.compile(r"ss_[0-9a-f]{32}")


@dataclass(eq=False)
class Session:
    """One memory and what it belongs to; `turn` is held by the request that uses it."""

    id: str
    owner: str | None
    class_set: str
    names: tuple[str, ...]
    classes: Any
    templates: list[str] | None
    method: str | None
    views: int
    memory: Any
    ttl_s: float
    created: int
    used: float
    requests: int = 0
    added: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def bound(self, plan: Plan) -> Plan:
        """A plan that looks at no more views than the memory keeps; raises ApiError where that was asked for."""
        if plan.views > self.views:
            sentence = f"this session keeps {self.views} views an image; ask for no more, or make another session."
            raise ApiError("invalid_request", sentence, param="adaptation.views")
        return plan

    def keep(self, group: Group) -> int:
        """Offer the images of an answered request to the memory; how many it took."""
        if group.answer is None or group.answer.seen is None:
            return 0
        seen = group.answer.seen
        labels = [int(result.baseline_cosines.argmax()) for result in group.answer.results]
        taken: int = self.memory.add(seen.views, seen.sha256, labels)
        return taken

    def facts(self, now: float) -> dict[str, Any]:
        """What its owner is told: never an image, only how many of which class."""
        counts = dict(zip(self.names, self.memory.counts, strict=True))
        return {
            "id": self.id,
            "object": "session",
            "class_set": self.class_set,
            "method": self.method,
            "views": self.views,
            "capacity": self.memory.capacity,
            "quota": self.memory.quota,
            "images": len(self.memory),
            "counts": {name: count for name, count in counts.items() if count},
            "bytes": self.memory.nbytes,
            "drift": self.memory.drift,
            "requests": self.requests,
            "created": self.created,
            "ttl_s": self.ttl_s,
            "expires_in_s": round(max(0.0, self.ttl_s - (now - self.used)), 1),
        }


class Sessions:
    """Sessions by id; those of one key are invisible to every other. `clock` is monotonic seconds."""

    def __init__(self, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._most_bytes = settings.max_sessions, settings.session_bytes
        self._clock = clock
        self._metrics = metrics
        self._kept: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        metrics.gauge("sessions", "Sessions kept.", lambda: float(len(self._kept)))
        metrics.gauge("session_bytes", "Bytes of features that sessions keep.", self._bytes)

    def _bytes(self) -> float:
        return float(sum(session.memory.nbytes for session in list(self._kept.values())))

    def check(self, memory: Any) -> None:
        """Raises ApiError where a full memory would be larger than GRAM_SESSION_BYTES."""
        if memory.most_bytes > self._most_bytes:
            sentence = (
                f"a full session would hold {memory.most_bytes} bytes, the limit is {self._most_bytes} "
                "(GRAM_SESSION_BYTES). Ask for a smaller capacity or fewer views."
            )
            raise ApiError("invalid_request", sentence, param="capacity")

    def open(
        self,
        owner: str | None,
        class_set: Any,
        classes: Any,
        templates: list[str] | None,
        memory: Any,
        *,
        method: str | None,
        ttl_s: float,
    ) -> Session:
        """A new session; the least recently used that nobody is in makes room for it."""
        self._enabled()
        self.check(memory)
        self._expire()
        while len(self._kept) >= self._most:
            idle = next((s for s in self._kept.values() if not s.turn.locked()), None)
            if idle is None:
                raise ApiError("overloaded", "every session is in use. Try again later.", retry_after=1)
            self._end(idle, "capacity")
        identity, now = f"ss_{secrets.token_hex(16)}", self._clock()
        session = Session(
            id=identity,
            owner=owner,
            class_set=class_set.id,
            names=class_set.names,
            classes=classes,
            templates=templates,
            method=method,
            views=memory.views,
            memory=memory,
            ttl_s=ttl_s,
            created=int(time.time()),
            used=now,
        )
        self._kept[identity] = session
        return session

    def find(self, owner: str | None, identity: str) -> Session:
        """The owner's session; raises ApiError 404, and 501 where none are kept."""
        self._enabled()
        self._expire()
        session = self._kept.get(identity) if ID.fullmatch(identity) else None
        if session is None or session.owner != owner:
            sentence = "no such session, or it has expired. Make a new one."
            raise ApiError("session_not_found", sentence, param="session")
        session.used = self._clock()
        self._kept.move_to_end(identity)
        return session

    def close(self, owner: str | None, identity: str) -> None:
        """Delete; a request that is in it finishes."""
        self._end(self.find(owner, identity), "deleted")

    @asynccontextmanager
    async def turn(
        self, owner: str | None, identity: str | None, left_s: Callable[[], float]
    ) -> AsyncIterator[Session | None]:
        """The session, to oneself; None where none is named. Raises TimeoutError when the turn comes too late."""
        if identity is None:
            yield None
            return
        session = self.find(owner, identity)
        async with asyncio.timeout(left_s()):
            await session.turn.acquire()
        try:
            session.requests += 1
            session.added = 0
            yield session
            session.used = self._clock()
        finally:
            session.turn.release()

    def now(self) -> float:
        """Of this object's clock."""
        return self._clock()

    def _enabled(self) -> None:
        if self._most == 0:
            sentence = "this server keeps no sessions (GRAM_MAX_SESSIONS, and Ray Serve). Send the images together."
            raise ApiError("sessions_disabled", sentence, param="session")

    def _expire(self) -> None:
        now = self._clock()
        for session in [s for s in self._kept.values() if now - s.used > s.ttl_s and not s.turn.locked()]:
            self._end(session, "ttl")

    def _end(self, session: Session, reason: str) -> None:
        del self._kept[session.id]
        self._metrics.session_evictions.labels(reason).inc()
