"""The OpenAPI document: what may be asked of each route, and every status that it answers with.

It is made from the models that check requests and answers; what JSON Schema can't say stands in a description.
`make openapi` writes it to `docs/openapi.json`, and a test holds that file to the app.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.responses import Response

from gram_core.types import ModelInfo
from server.answers import ErrorAnswer
from server.errors import STATUS
from server.schemas import Adaptation, ClassifyRequest, Name, Question, Template
from server.shapes import ClassSetAsked, EmbeddingsAsked, HuggingFaceAsked, SessionAsked

REFERENCE = "#/components/schemas/"
BINARY = {"type": "string", "format": "binary"}
RAW_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
ALWAYS = (400, 413, 500)  # what the outermost layer says to any request
GUARDED = (401, 403, 421)  # and where host, origin and key are checked
SECURITY: list[dict[str, list[str]]] = [{}, {"bearer": []}, {"key": []}]  # no key where the server has none
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The caller's own, where it can be used; it finds the request in the log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Server-Timing": {"description": "Milliseconds by stage.", "required": True, "schema": {"type": "string"}},
    "X-Gram-Model": {
        "description": "Tells one model from another; missing until it is loaded.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 12},
    },
    "Retry-After": {
        "description": "Seconds to wait before asking again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "maximum": 30},
    },
}
REQUEST_HEADERS = {
    "X-Request-Id": "Names the request in the answer and in the log: 1 to 128 letters, digits, dots, underscores and "
    "hyphens. Another one is replaced.",
    "traceparent": "W3C trace context, for the log.",
}


class Alive(BaseModel):
    """What `/livez` says."""

    status: Literal["ok", "dead"]


class Ready(BaseModel):
    """What `/readyz` and its aliases say; new checks may come."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, bool]


class Started(BaseModel):
    """What `/startupz` says."""

    phase: str
    seconds: float


class Info(BaseModel):
    """What is served, and every limit that a client needs; new fields may come."""

    version: str
    model: ModelInfo
    limits: dict[str, float]
    timeout_ms: int
    queue_seconds: float
    cost_rate: float | None
    uptime_seconds: float


ASKED: tuple[type[BaseModel], ...] = (
    ClassifyRequest,
    Question,
    Adaptation,
    ClassSetAsked,
    SessionAsked,
    HuggingFaceAsked,
    EmbeddingsAsked,
)
PICTURE = (  # a PNG of two by two pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mM8UaHBwMDAxMDAwMDAAAARqgFsexo+EQAAAABJRU5ErkJggg=="
)
EXAMPLES: dict[str, dict[str, Any]] = {
    "ClassifyRequest": {
        "images": [{"id": "shelf-3", "data": PICTURE}],
        "classes": ["cat", "dog"],
        "templates": ["a photo of a {}."],
        "adaptation": {"views": 8, "budget_ms": 500, "seed": 7},
        "top_k": 5,
    },
    "Question": {"classes": {"cat": ["a cat.", "a kitten."], "dog": ["a dog."]}, "adaptation": {"method": "none"}},
    "ClassSetAsked": {"classes": ["cat", "dog"], "templates": ["a photo of a {}."]},
    "SessionAsked": {"classes": ["cat", "dog"], "capacity": 128, "ttl_s": 3600},
    "HuggingFaceAsked": {"inputs": PICTURE, "parameters": {"candidate_labels": ["cat", "dog"]}},
    "EmbeddingsAsked": {"input": ["a photo of a cat.", "a photo of a dog."], "encoding_format": "base64"},
}
PLACE = re.compile(r"\{(\w+)\}")
KEPT = ("/v1/class-sets", "/v1/sessions")  # what a server may be told not to keep
ANSWERED: tuple[type[BaseModel], ...] = (ErrorAnswer, Alive, Ready, Started, Info)


# ---- of one route ----


def classify(answer: type[BaseModel]) -> dict[str, Any]:
    """A classification: three forms of a request, and every error but that of another method."""
    return {
        "responses": {**ok(answer), **errors(*sorted({*STATUS.values()} - {405}))},
        "openapi_extra": {
            "parameters": [*_headers(), *_query_fields()],
            "requestBody": request_body(),
            "security": SECURITY,
        },
    }


def probe(path: str) -> dict[str, Any]:
    """A probe: the same body whether its answer is yes (200) or no (503)."""
    answers: dict[str, type[BaseModel]] = {"/livez": Alive, "/v2/health/live": Alive, "/startupz": Started}
    answer = answers.get(path, Ready)
    no = {503: {**_json("No.", answer), "headers": _answer_headers(200)}}
    return {"responses": {**ok(answer), **errors(*ALWAYS), **no}, "openapi_extra": {"parameters": _headers()}}


def info() -> dict[str, Any]:
    """The facts about a server."""
    return {
        "responses": {**ok(Info), **errors(*ALWAYS, *GUARDED, 503)},
        "openapi_extra": {"parameters": _headers(), "security": SECURITY},
    }


def metrics() -> dict[str, Any]:
    """Text for Prometheus. A key is needed only where the operator says so."""
    text = {
        200: {
            "description": "OK",
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "headers": _answer_headers(200),
        }
    }
    return {
        "responses": {**text, **errors(*ALWAYS, 401)},
        "openapi_extra": {"parameters": _headers(), "security": SECURITY},
    }


def resource(path: str, status: int, answer: Any, asked: type[BaseModel] | bool) -> dict[str, Any]:
    """Any other route: what it answers with `status` (None: nothing, or bytes), and its JSON body, if it has one
    (True: bytes)."""
    codes = {*ALWAYS, *GUARDED, 404, 503} | ({408, 409, 415, 422, 429, 501, 504} if asked else {429, 504})
    codes |= {501} if path.startswith(KEPT) else set()
    fine: dict[int | str, dict[str, Any]]
    if answer is not None:
        fine = {status: {"model": answer, "headers": _answer_headers(status)}}
    elif status == 204:
        fine = {204: {"description": "Done.", "headers": _answer_headers(204)}}
    else:
        content = {"application/octet-stream": {"schema": BINARY}}
        fine = {status: {"description": "safetensors", "content": content, "headers": _answer_headers(status)}}
    if status == 201:
        fine[200] = {**fine[201], "description": "It was known."}
    more: dict[str, Any] = {
        "parameters": [
            *_headers(),
            *({"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in PLACE.findall(path)),
        ],
        "security": SECURITY,
    }
    if asked is True:
        more["requestBody"] = {"required": True, "content": {"application/octet-stream": {"schema": BINARY}}}
    elif asked:
        schema = {"$ref": f"{REFERENCE}{asked.__name__}"}
        more["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"responses": {**fine, **errors(*sorted(codes))}, "openapi_extra": more, "response_class": Response}


def ok(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answer of a route when all is well."""
    return {200: {"model": answer, "headers": _answer_headers(200)}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """An error for each of `statuses`, with the codes that it can have."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        codes = ", ".join(f"`{code}`" for code, its in STATUS.items() if its == status)
        found[status] = {**_json(f"Codes: {codes}.", ErrorAnswer), "headers": _answer_headers(status)}
    return found


def request_body() -> dict[str, Any]:
    """JSON, a form, or one image as it is."""
    raw = {"schema": {**BINARY, "description": "One image. What is asked stands in the query."}}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"{REFERENCE}ClassifyRequest"}},
            "multipart/form-data": {
                "schema": _form(),
                "encoding": {"request": {"contentType": "application/json"}},
            },
            **dict.fromkeys(RAW_TYPES, raw),
        },
    }


def _form() -> dict[str, Any]:
    """Images, and beside them either one `request` part or plain fields."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": BINARY, "minItems": 1},
            "request": {"$ref": f"{REFERENCE}Question"},
            **_fields(),
        },
        "oneOf": [
            {"required": ["request"], "maxProperties": 2},
            {"required": ["classes"], "properties": {"request": False, "class_set": False}},
            {"required": ["class_set"], "properties": {"request": False, "classes": False, "templates": False}},
        ],
    }


def _query_fields() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "query",
            "description": "With a raw image body only.",
            "schema": schema,
            **({"style": "form", "explode": True} if schema.get("type") == "array" else {}),
        }
        for name, schema in _fields().items()
    ]


def _headers() -> list[dict[str, Any]]:
    return [{"$ref": f"#/components/parameters/{name}"} for name in REQUEST_HEADERS]


def _answer_headers(status: int) -> dict[str, Any]:
    names = [name for name in HEADERS if name != "Retry-After" or status in (429, 503)]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _fields() -> dict[str, Any]:
    """What forms and queries may hold: the fields of a question and of its adaptation side by side, never null."""
    lists: dict[str, Any] = {
        "classes": {"type": "array", "items": _schema(Name), "minItems": 1, "uniqueItems": True},
        "templates": {"type": "array", "items": _schema(Template), "minItems": 1},
        "class_set": {"type": "string"},
    }
    plain = {
        name: _not_null(schema)
        for model in (Question, Adaptation)
        for name, schema in model.model_json_schema()["properties"].items()
        if name not in (*lists, "adaptation")
    }
    return {**lists, **plain}


def _not_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "title")}
    if rest.get("default", ...) is None:
        del rest["default"]
    return {**rest, **(kept[0] if len(kept) == 1 else {"anyOf": kept} if kept else {})}


def _schema(kind: Any) -> dict[str, Any]:
    schema: dict[str, Any] = TypeAdapter(kind).json_schema()
    return schema


def _json(description: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"{REFERENCE}{model.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


# ---- of the whole ----


def document(app: FastAPI) -> dict[str, Any]:
    """What `/openapi.json` says; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        made["components"]["schemas"] |= _definitions(ANSWERED, "serialization")
        made["components"]["schemas"] |= _definitions(ASKED, "validation")
        for name, example in EXAMPLES.items():
            made["components"]["schemas"][name]["examples"] = [example]
        made["components"] |= {
            "headers": HEADERS,
            "parameters": {
                name: {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
                for name, text in REQUEST_HEADERS.items()
            },
            "securitySchemes": SCHEMES,
        }
        app.openapi_schema = copy.deepcopy(made)  # the tables of this module are shared, a document is not
    return app.openapi_schema


def _definitions(models: tuple[type[BaseModel], ...], mode: JsonSchemaMode) -> dict[str, Any]:
    template = REFERENCE + "{model}"
    _, schemas = models_json_schema([(model, mode) for model in models], ref_template=template)
    found: dict[str, Any] = schemas["$defs"]
    return found


def text(app: FastAPI) -> str:
    """The document as `docs/openapi.json` holds it."""
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"
