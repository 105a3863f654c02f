"""The web page: its files, read once at start and answered from memory. What it asks of the server is none of this.

The files lie in `server/page/`. The page is one of them at `/`, the others are what it names under `/ui/`; there is
no folder that a path could walk through, only the table below.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from server.settings import Settings

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": "index.html",
    "/ui/app.css": "app.css",
    "/ui/app.js": "app.js",
    "/ui/dom.js": "dom.js",
    "/ui/photos.js": "photos.js",
    "/ui/results.js": "results.js",
    "/ui/snippets.js": "snippets.js",
    "/ui/words.js": "words.js",
    "/ui/favicon.svg": "favicon.svg",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (  # nothing but our own files, and nobody around them
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def public(settings: Settings) -> tuple[str, ...]:
    """The paths of the page that need no key, by the operator's word."""
    return tuple(FILES) if settings.ui and settings.ui_public else ()


def add(app: FastAPI, settings: Settings) -> None:
    """Serve the page, unless GRAM_UI is false; its routes are no part of the API's document."""
    if settings.ui:
        for path, name in FILES.items():
            app.add_api_route(path, _route(name), methods=["GET", "HEAD"], include_in_schema=False)


def _route(name: str) -> Callable[[], Awaitable[Response]]:
    content, kind = (FOLDER / name).read_bytes(), TYPES[Path(name).suffix]

    async def file() -> Response:
        return Response(content, headers={"content-security-policy": POLICY, "content-type": kind})

    return file
