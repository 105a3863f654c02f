"""The server's own app inside this process, for commands that need no server: the same code answers, without a port."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from server.__main__ import WAIT_QUIETLY, fetch_model
from server.app import create_app
from server.engine import Classifier
from server.settings import CLIENT_KEY, CLIENT_URL, Settings, read_settings

URL = "http://localhost"  # of requests that never leave the process
LOOK_S = 0.01


def local_settings(flags: Sequence[str]) -> Settings:
    """Those of `gram serve` with these flags; whoever runs the command needs no key. Raises InvalidSettings."""
    settings = read_settings(flags, besides=(CLIENT_URL, CLIENT_KEY))
    return settings.model_copy(update={"api_keys_file": None, "rate_cost": 0.0, "otlp_endpoint": None})


@asynccontextmanager
async def in_process(
    settings: Settings, load: Callable[[], Classifier] | None = None
) -> AsyncIterator[httpx.AsyncBaseTransport]:
    """A transport for `AsyncGramClient` to the app, once its model is warm; raises the GramErrors of loading one."""
    os.environ.setdefault(*WAIT_QUIETLY)  # read when torch is imported, which is later
    await asyncio.to_thread(fetch_model, settings)
    app: Any = create_app(settings, load=load)
    async with app.router.lifespan_context(app):
        engine = app.state.service.engine
        while not engine.ready:
            if engine.failure is not None:
                raise engine.failure
            await asyncio.sleep(LOOK_S)
        yield httpx.ASGITransport(app)
