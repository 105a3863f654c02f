"""The OpenAPI document: what may be asked of each route and every status that it answers with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.answers import ErrorAnswer
from server.schemas import ClassifyRequest, Question


def request_body() -> dict[str, Any]:
    """The three forms of a classification."""
    reference = {"$ref": "#/components/schemas/ClassifyRequest"}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "request": {"$ref": "#/components/schemas/Question"},
            "classes": {"type": "array", "items": {"type": "string"}},
        },
    }
    return {
        "required": True,
        "content": {
            "application/json": {"schema": reference},
            "multipart/form-data": {"schema": form},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def responses(answer: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answer of a route, and an error for each of `statuses`."""
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in statuses}
    return {**({200: {"model": answer}} if answer is not None else {}), **errors}


def document(app: FastAPI) -> dict[str, Any]:
    """What `/openapi.json` says; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        asked: list[tuple[type[BaseModel], Any]] = [(ClassifyRequest, "validation"), (Question, "validation")]
        _, schemas = models_json_schema(asked, ref_template="#/components/schemas/{model}")
        made["components"]["schemas"] |= schemas["$defs"]
        app.openapi_schema = made
    return app.openapi_schema
