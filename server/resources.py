"""Routes of what outlives a request: class sets and sessions (api.md sections 7 and 7b)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gram_core.errors import GramError, InvalidClasses
from server import openapi
from server.answers import NOTHING
from server.engine import Classifier, Job
from server.errors import ApiError, from_core
from server.ingress import exchange_of
from server.schemas import ClassSetReference, ask, read_json
from server.service import JSON, Service, Taken, media_type
from server.sessions import Session
from server.shapes import ClassSetAsked, ClassSetFacts, ClassSetList, SessionAsked, SessionFacts

BYTES = "application/octet-stream"


class Resources:
    """The handlers, over what all routes of the app share."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def add_to(self, app: FastAPI) -> None:
        """Put the routes into the app."""
        sets, sessions = "/v1/class-sets", "/v1/sessions"
        one, verb = f"{sessions}/{{session}}", f"{sessions}/{{session}}/"
        routes: tuple[tuple[str, str, Any, int, type[BaseModel] | None, type[BaseModel] | bool], ...] = (
            (sets, "POST", self.post_class_set, 201, ClassSetFacts, ClassSetAsked),
            (sets, "GET", self.list_class_sets, 200, ClassSetList, False),
            (f"{sets}/{{class_set}}", "GET", self.get_class_set, 200, ClassSetFacts, False),
            (f"{sets}/{{class_set}}", "DELETE", self.delete_class_set, 204, None, False),
            (sessions, "POST", self.post_session, 201, SessionFacts, SessionAsked),
            (f"{sessions}/import", "POST", self.import_session, 201, SessionFacts, True),
            (one, "GET", self.get_session, 200, SessionFacts, False),
            (one, "DELETE", self.delete_session, 204, None, False),
            (verb + "reset", "POST", self.reset_session, 200, SessionFacts, False),
            (verb + "export", "GET", self.export_session, 200, None, False),
        )
        for path, method, handler, status, answer, asked in routes:
            more = openapi.resource(path, status, answer, asked)
            app.add_api_route(
                path, handler, methods=[method], operation_id=handler.__name__, status_code=status, **more
            )

    # ---- class sets ----

    async def post_class_set(self, request: Request) -> Response:
        """Post a class set; its text features are computed before the answer. 200 where it was known."""

        async def answer(taken: Taken) -> Response:
            classifier, owner = taken.classifier, taken.owner
            asked = await self.service.at_desk(self._asked, ClassSetAsked, taken)
            made, classes, templates = await self.service.tokenizing(self._made, owner, asked, classifier)
            await self._warm(owner, classifier, made)
            put = self.service.class_sets.put
            found, new = await self.service.at_desk(put, owner, made, classes, templates, classifier.info.name)
            return JSONResponse(found.facts(warm=True), 201 if new else 200)

        return await self.service.taking(request, answer, _json_only(request))

    async def list_class_sets(self, request: Request) -> Response:
        """The class sets of this key, latest use last."""
        classifier = self.service.classifier()
        owned = await self.service.at_desk(self.service.class_sets.owned, exchange_of(request.scope).owner)
        return JSONResponse({"object": "list", "data": [f.facts(warm=classifier.warm(f.id)) for f in owned]})

    async def get_class_set(self, request: Request) -> Response:
        """One class set."""
        classifier, identity = self.service.classifier(), request.path_params["class_set"]
        find = self.service.class_sets.find
        found = await self.service.at_desk(find, exchange_of(request.scope).owner, identity)
        return JSONResponse(found.facts(warm=classifier.warm(found.id)))

    async def delete_class_set(self, request: Request) -> Response:
        """Forget a class set; requests that use it finish."""
        drop, identity = self.service.class_sets.drop, request.path_params["class_set"]
        await self.service.at_desk(drop, exchange_of(request.scope).owner, identity)
        return Response(status_code=204)

    # ---- sessions ----

    async def post_session(self, request: Request) -> Response:
        """Begin a session: adaptation over a stream, for the requests that name it."""

        async def answer(taken: Taken) -> Response:
            classifier, owner = taken.classifier, taken.owner
            asked = await self.service.at_desk(self._asked, SessionAsked, taken)
            made, classes, templates = await self.service.tokenizing(self._made, owner, asked, classifier)
            views = self._views(classifier, asked.method, asked.views)
            memory = classifier.session(made, asked.capacity, views)
            open_ = self.service.sessions.open
            session = open_(owner, made, classes, templates, memory, method=asked.method, ttl_s=float(asked.ttl_s))
            return self._told(session, 201)

        return await self.service.taking(request, answer, _json_only(request))

    async def get_session(self, request: Request) -> Response:
        """What a session holds."""
        return self._told(self._session(request), 200)

    async def delete_session(self, request: Request) -> Response:
        """End a session; a request that is in it finishes."""
        self.service.sessions.close(exchange_of(request.scope).owner, request.path_params["session"])
        return Response(status_code=204)

    async def reset_session(self, request: Request) -> Response:
        """Forget every image, and stay open."""
        async with self._turn(request) as session:
            session.memory.clear()
            return self._told(session, 200)

    async def export_session(self, request: Request) -> Response:
        """The memory as safetensors, for `POST /v1/sessions/import` on any server with the same model."""
        classifier = self.service.classifier()
        async with self._turn(request) as session:
            bound = {
                "model": classifier.info.fingerprint,
                "class_set": session.class_set,
                "asked": json.dumps({"classes": session.classes, "templates": session.templates}),
                "method": session.method or "",
            }
            content = await self.service.at_desk(session.memory.dump, bound)
        return Response(content, media_type=BYTES)

    async def import_session(self, request: Request) -> Response:
        """Begin a session with what another one exported; it lives for an hour after its last use."""
        if media_type(request.headers) != BYTES:
            raise ApiError("unsupported_media_type", f"send what the export gave, as {BYTES}.")

        async def answer(taken: Taken) -> Response:
            classifier, owner = taken.classifier, taken.owner
            memory, asked, bound = await self.service.at_desk(self._restored, classifier, bytes(taken.body.pop()))
            made, classes, templates = await self.service.tokenizing(self._made, owner, asked, classifier)
            if bound.get("model") != classifier.info.fingerprint or bound.get("class_set") != made.id:
                raise ApiError("session_conflict", "this session was exported from another model. Begin a new one.")
            if memory.classes != len(made):
                raise ApiError("session_conflict", "this session's memory has other classes. Begin a new one.")
            open_ = self.service.sessions.open
            session = open_(owner, made, classes, templates, memory, method=asked.method, ttl_s=float(asked.ttl_s))
            return self._told(session, 201)

        return await self.service.taking(request, answer, BYTES)

    # ---- inside ----

    def _asked(self, kind: type[ClassSetAsked], taken: Taken) -> Any:
        return ask(kind, read_json(taken.body.pop()), self.service.settings)

    def _made(self, owner: str | None, asked: ClassSetAsked, classifier: Classifier) -> tuple[Any, Any, Any]:
        """The class set, and the classes and templates behind it."""
        classes, templates = asked.classes, asked.templates
        if isinstance(classes, ClassSetReference):
            known = self.service.class_sets.find(owner, classes.class_set)
            classes, templates = known.classes, known.templates
        try:
            return classifier.class_set(classes, templates), classes, templates
        except InvalidClasses as error:
            of_template = error.code in ("bad_template", "templates_not_allowed")
            raise from_core(error, "templates" if of_template else "classes") from error

    async def _warm(self, owner: str | None, classifier: Classifier, made: Any) -> None:
        engine, settings = self.service.engine, self.service.settings
        with engine.place(classifier.cost(NOTHING, 0, made)) as place:
            self.service.spend(owner, place.cost)
            due = engine.clock() + settings.timeout_ms / 1000
            try:
                await engine.submit(Job(place, (), made, NOTHING, due))
            except TimeoutError:
                raise ApiError("deadline_exceeded", f"no answer within {settings.timeout_ms} ms.") from None
            except GramError as error:
                raise from_core(error) from error

    def _views(self, classifier: Classifier, method: str | None, views: int | None) -> int:
        """How many views of an image a session keeps: as many as its method looks at, where nothing else is asked."""
        method = method or classifier.info.default_method
        if method not in classifier.info.methods or method not in ("gram", "infomax"):
            raise ApiError(
                "method_unavailable", "sessions need gram or infomax, which this model can't serve.", param="method"
            )
        most = self.service.settings.max_views
        if views is not None and views > most:
            raise ApiError("invalid_request", f"views: must be at most {most} on this server.", param="views")
        return int(classifier.info.defaults[method]["views"]) if views is None else views

    def _session(self, request: Request) -> Session:
        return self.service.sessions.find(exchange_of(request.scope).owner, request.path_params["session"])

    @asynccontextmanager
    async def _turn(self, request: Request) -> AsyncIterator[Session]:
        owner, settings = exchange_of(request.scope).owner, self.service.settings
        identity, seconds = request.path_params["session"], settings.timeout_ms / 1000
        try:
            async with self.service.sessions.turn(owner, identity, lambda: seconds) as session:
                assert session is not None
                yield session
        except TimeoutError:
            raise ApiError("deadline_exceeded", f"no answer within {settings.timeout_ms} ms.") from None

    def _told(self, session: Session, status: int) -> Response:
        return JSONResponse(session.facts(self.service.sessions.now()), status)

    def _restored(self, classifier: Classifier, data: bytes) -> tuple[Any, SessionAsked, dict[str, str]]:
        try:
            memory, bound = classifier.restored(data)
        except GramError as error:
            raise from_core(error) from error
        self.service.sessions.check(memory)
        try:
            given = {**json.loads(bound["asked"]), "capacity": memory.capacity, "views": memory.views}
            given |= {"method": bound["method"] or None}
        except (KeyError, ValueError, TypeError, RecursionError):
            raise ApiError("invalid_request", "this is no session that a server exported.") from None
        return memory, ask(SessionAsked, given, self.service.settings), bound


def _json_only(request: Request) -> str:
    media = media_type(request.headers)
    if media != JSON:
        raise ApiError("unsupported_media_type", "send application/json in UTF-8.")
    return media
