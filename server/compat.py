"""Routes that other clients already speak: Hugging Face's zero-shot task, OpenAI's embeddings and models, and the
health and metadata of the Open Inference Protocol (api.md section 8).

They ignore fields that they don't know, as their originals do. Limits, admission and keys are those of `/v1/classify`.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gram_core import __version__
from gram_core.errors import GramError, InvalidClasses
from gram_core.types import FloatArray
from server import openapi
from server.answers import NOTHING
from server.engine import Classifier, Job
from server.errors import ApiError, from_core
from server.schemas import (
    MAX_EMBEDDING_TEXTS,
    MAX_TEXT,
    ClassifyRequest,
    Question,
    ask,
    bound_images,
    posted_image,
    read_json,
)
from server.service import JSON, Call, Service, Taken, media_type
from server.shapes import (
    Embeddings,
    EmbeddingsAsked,
    HuggingFaceAsked,
    Label,
    ModelFacts,
    ModelList,
    ModelReady,
    ServerFacts,
)

TEMPLATE = "This is a photo of {}."  # of the Hugging Face task


class Compat:
    """The handlers, over what all routes of the app share."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def add_to(self, app: FastAPI) -> None:
        """Put the routes into the app."""
        routes: tuple[tuple[str, str, Any, Any, Any], ...] = (
            ("/hf/zero-shot-image-classification", "POST", self.hugging_face, list[Label], HuggingFaceAsked),
            ("/models/{model}", "POST", self.hugging_face_model, list[Label], HuggingFaceAsked),
            ("/v1/embeddings", "POST", self.embeddings, Embeddings, EmbeddingsAsked),
            ("/v1/models", "GET", self.models, ModelList, False),
            ("/v2", "GET", self.server, ServerFacts, False),
            ("/v2/models/{model}/ready", "GET", self.model_ready, ModelReady, False),
            ("/v2/models/{model}", "GET", self.model, ModelFacts, False),
        )
        for path, method, handler, answer, asked in routes:
            more = openapi.resource(path, 200, answer, asked)
            app.add_api_route(path, handler, methods=[method], operation_id=handler.__name__, **more)

    # ---- Hugging Face ----

    async def hugging_face(self, request: Request) -> Response:
        """Zero-shot image classification as the Hugging Face clients post it; all labels, best first."""
        media_type(request.headers)  # raises for what can't be read
        return await self.service.taking(request, self._hugging_face)

    async def hugging_face_model(self, request: Request) -> Response:
        """The same by the model's name."""
        self._mine(self.service.classifier(), request.path_params["model"])
        return await self.hugging_face(request)

    async def _hugging_face(self, taken: Taken) -> Response:
        def read() -> Any:
            given = _object(read_json(taken.body.pop()))
            parameters = _object(given.get("parameters", {}), "parameters")
            labels = parameters.get("candidate_labels", parameters.get("labels"))
            if isinstance(labels, str):
                labels = [label.strip() for label in labels.split(",")]
            if labels is None:
                raise ApiError("invalid_request", "parameters.candidate_labels: is required.", param="parameters")
            asked: dict[str, Any] = {"images": [given.get("inputs")], "classes": labels, "top_k": None}
            asked["templates"] = [parameters.get("hypothesis_template") or TEMPLATE]
            if "adaptation" in parameters:
                asked["adaptation"] = parameters["adaptation"]
            if isinstance(labels, list) and len(labels) == 1:
                asked["score"] = "cosine"  # the softmax of one label is always 1, which says nothing
            return ask(ClassifyRequest, asked, self.service.settings)

        question: ClassifyRequest = await self.service.at_desk(read)
        call = self.service.call(taken, question, question.images)
        outcome = await self.service.answered(call)
        (found,) = outcome.results()
        assert found is not None  # a bad image was an error
        result, group = found
        scores = result.scores(question.score)
        order = np.argsort(-scores, kind="stable")
        labels = [{"label": group.class_set.names[k], "score": float(scores[k])} for k in order]
        did = result.adaptation
        headers = {
            "x-gram-adaptation": ";".join(filter(None, (did.status, did.reason))),
            "x-gram-brownout": str(group.level),
        }
        return JSONResponse(labels, headers=headers)

    # ---- OpenAI ----

    async def embeddings(self, request: Request) -> Response:
        """Unit-length features of texts, or (`modality: image`) of images; never adapted."""
        media_type(request.headers)
        return await self.service.taking(request, self._embeddings)

    async def _embeddings(self, taken: Taken) -> Response:
        classifier = taken.classifier
        given = await self.service.at_desk(lambda: _object(read_json(taken.body.pop())))
        self._mine(classifier, given.get("model"))
        coding, modality = given.get("encoding_format", "float"), given.get("modality", "text")
        if coding not in ("float", "base64"):
            raise ApiError("invalid_request", "encoding_format: must be float or base64.", param="encoding_format")
        if modality not in ("text", "image"):
            raise ApiError("invalid_request", "modality: must be text or image.", param="modality")
        if given.get("dimensions") not in (None, classifier.info.joint_dim):
            sentence = f"dimensions: must be {classifier.info.joint_dim}, which is what this model has."
            raise ApiError("invalid_request", sentence, param="dimensions")
        inputs = given.get("input")
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(inputs, list) or not inputs or not all(isinstance(text, str) for text in inputs):
            raise ApiError("invalid_request", "input: must be a text or a list of texts.", param="input")
        question = ask(Question, {"classes": ["image"], "score": "cosine"}, self.service.settings)
        call = self.service.call(taken, question, [])
        work = self._images if modality == "image" else self._texts
        try:
            rows, tokens = await work(call, inputs)
        except TimeoutError:
            raise ApiError("deadline_exceeded", f"no answer within {call.timeout_ms} ms.") from None
        except GramError as error:
            raise from_core(error) from error

        def write() -> Response:
            data = [  # a row at a time: one call for all of them would hold the interpreter for a second
                json.dumps({"object": "embedding", "index": n, "embedding": _coded(row, coding)})
                for n, row in enumerate(rows)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            rest = json.dumps({"object": "list", "model": classifier.info.name, "usage": usage})
            return Response(f'{rest[:-1]}, "data": [{", ".join(data)}]}}', media_type=JSON)

        return await self.service.at_desk(write)

    async def _texts(self, call: Call, texts: list[str]) -> tuple[FloatArray, int]:
        if len(texts) > MAX_EMBEDDING_TEXTS:
            sentence = f"input: {len(texts)} texts, the limit is {MAX_EMBEDDING_TEXTS}. Send fewer."
            raise ApiError("invalid_request", sentence, param="input")
        for n, text in enumerate(texts):
            if not text.strip() or len(text) > MAX_TEXT:
                sentence = f"input.{n}: must have 1 to {MAX_TEXT} characters, not all of them blank."
                raise ApiError("invalid_request", sentence, param=f"input.{n}")

        def tokenize() -> Any:
            try:
                return call.classifier.class_set({str(n): [text] for n, text in enumerate(texts)})
            except InvalidClasses as error:
                raise from_core(error, "input") from error

        made = await self.service.tokenizing(tokenize)
        _, features = await self._features(call, 0, made)
        return features, made.tokens

    async def _images(self, call: Call, inputs: list[str]) -> tuple[FloatArray, int]:
        settings = self.service.settings
        bound_images(len(inputs), settings)
        call.posted[:] = [posted_image(item, f"input.{n}", settings) for n, item in enumerate(inputs)]
        made = await self.service.at_desk(call.classifier.class_set, ["image"])
        features, _ = await self._features(call, len(inputs), made)
        return features, 0

    async def _features(self, call: Call, count: int, made: Any) -> tuple[FloatArray, FloatArray]:
        """(B, D) of the call's images and (K, D) of the texts."""
        engine = self.service.engine
        with engine.place(call.classifier.cost(NOTHING, count, made)) as place:
            self.service.spend(call.exchange.owner, place.cost)
            images = await self.service.decoded(call) if count else ()
            job = Job(place, images, made, NOTHING, engine.clock() + call.left_s(), features=True)
            (answer,) = await self.service.run_all([job], call)
        assert answer.features is not None
        return answer.features

    async def models(self) -> Response:
        """The one model of this server."""
        info = self.service.classifier().info
        capabilities = ["classification", "embeddings", *info.methods]
        card = {"id": info.name, "object": "model", "created": int(self.service.started), "owned_by": "gram"}
        return JSONResponse({"object": "list", "data": [{**card, "capabilities": capabilities}]})

    # ---- Open Inference Protocol ----

    async def server(self) -> Response:
        """What this server is."""
        return JSONResponse({"name": "gram", "version": __version__, "extensions": []})

    async def model(self, request: Request) -> Response:
        """What the model takes and gives; inference has routes of its own (`/v1/classify`, `/v1/embeddings`)."""
        info = self.service.classifier().info
        self._mine(self.service.classifier(), request.path_params["model"])
        return JSONResponse(
            {
                "name": info.name,
                "versions": [info.weights_sha256[:12]],
                "platform": "gram_open_clip",
                "inputs": [
                    {"name": "images", "datatype": "BYTES", "shape": [-1]},
                    {"name": "classes", "datatype": "BYTES", "shape": [-1]},
                ],
                "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, -1]}],
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """Whether the model answers."""
        classifier = self.service.classifier()
        self._mine(classifier, request.path_params["model"])
        return JSONResponse({"name": classifier.info.name, "ready": True})

    def _mine(self, classifier: Classifier, name: Any) -> None:
        """Raises ApiError 404 for the name of another model; none is this one."""
        if name is not None and name != classifier.info.name:
            raise ApiError(
                "model_not_found", "this server has another model; its list of models names it.", param="model"
            )


def _object(value: Any, param: str | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError("invalid_request", f"{param or 'the request'} must be a JSON object.", param=param)
    return value


def _coded(row: FloatArray, coding: str) -> list[float] | str:
    if coding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(x) for x in row]
