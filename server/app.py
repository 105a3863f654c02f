"""The app: its routes, wired to what they share (`server.service`); nothing here is global."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gram_core import __version__
from server import openapi, pages
from server.answers import ClassifyAnswer
from server.auth import SCRAPE
from server.compat import Compat
from server.engine import Classifier
from server.errors import ApiError
from server.ingress import Ingress
from server.resources import Resources
from server.service import Service, load_classifier
from server.settings import Settings


def create_app(
    settings: Settings,
    classifier: Classifier | None = None,
    *,
    load: Callable[[], Classifier] | None = None,
    metrics: bool = True,
) -> FastAPI:
    """The server as an ASGI app.

    Args:
        settings: every limit and default; see `server.settings`.
        classifier: one that is loaded already, for example `server.fake.FakeClassifier()`.
        load: makes one instead, in the engine's thread; without either, `settings` names the model.
        metrics: whether `/metrics` is among the routes; `metrics_app` serves it apart.
    """
    if classifier is not None and load is not None:
        raise ValueError("Use either 'classifier' or 'load', not both.")
    if classifier is not None:
        load = lambda: classifier  # noqa: E731
    service = Service(settings, load or (lambda: load_classifier(settings)))
    app = _bare(lifespan=service.lifespan)
    app.state.service = service
    for path in ("/v1/classify", "/classify"):
        app.add_api_route(
            path,
            service.classify,
            methods=["POST"],
            operation_id=path.strip("/").replace("/", "_"),
            summary="Classify images, before and after adaptation",
            **openapi.classify(ClassifyAnswer),
        )
    probes: dict[str, Callable[[], Any]] = {
        "/livez": service.livez,
        "/startupz": service.startupz,
        "/v2/health/live": service.livez,
    }
    for path in ("/readyz", "/health", "/healthz", "/ping", "/v2/health/ready"):
        probes[path] = service.readyz
    for path, probe in probes.items():
        app.add_api_route(path, probe, operation_id=path[1:].replace("/", "_"), **openapi.probe(path))
        app.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
    Resources(service).add_to(app)
    Compat(service).add_to(app)
    app.add_api_route("/info", service.info, operation_id="info", **openapi.info())
    if metrics:
        _add_metrics(app, service)
    pages.add(app, settings)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return _behind_ingress(app, service)


def metrics_app(service: Service) -> FastAPI:
    """`/metrics` of a service alone, under the rules of `create_app`, for a port of its own."""
    app = _bare()
    _add_metrics(app, service)
    return _behind_ingress(app, service)


def _bare(**options: Any) -> FastAPI:
    return FastAPI(
        title="GRAM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _refused_by_framework},
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        **options,
    )


def _add_metrics(app: FastAPI, service: Service) -> None:
    app.add_api_route(SCRAPE, service.scrape, operation_id="metrics", response_class=Response, **openapi.metrics())


def _behind_ingress(app: FastAPI, service: Service) -> FastAPI:
    app.add_middleware(
        Ingress,
        settings=service.settings,
        guard=service.guard,
        metrics=service.metrics,
        paths=frozenset(route.path for route in app.routes if hasattr(route, "path")),
        model=service.model_tag,
        draining=lambda: service.draining,
        tracing=service.tracing,
    )
    return app


async def _refused_by_framework(request: Request, error: Exception) -> NoReturn:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refusal = ApiError("method_not_allowed", "this path has other methods.")
        own = [route for route in request.app.routes if isinstance(route, Route)]
        there = [route.methods or () for route in own if route.path_regex.match(request.scope["path"])]
        refusal.headers |= {"allow": ", ".join(sorted({method for methods in there for method in methods}))}
    elif error.status_code == 404:
        refusal = ApiError("not_found", "no such path.")
    else:
        refusal = ApiError("malformed_body", "the request can't be read.")
    raise refusal from error
