"""What the routes beside classification are asked and what they answer, as the OpenAPI document tells it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, model_validator

from server.errors import ApiError
from server.schemas import (
    CLASSES,
    Adaptation,
    Base64,
    Classes,
    Name,
    Strict,
    Template,
    Templates,
    bound_texts,
    read_classes,
    read_templates,
)
from server.settings import Settings


class Loose(BaseModel):
    """What only documents: fields that nobody knows are ignored."""

    model_config = ConfigDict(extra="allow")


# ---- class sets and sessions ----


class ClassSetFacts(BaseModel):
    """One class set; new fields may come."""

    id: str
    object: Literal["class_set"]
    size: int
    texts: int
    model: str
    created: int
    last_used: int
    warm: bool


class ClassSetList(BaseModel):
    """The class sets of one key."""

    object: Literal["list"]
    data: list[ClassSetFacts]


class SessionFacts(BaseModel):
    """One session: what it holds, never an image; new fields may come."""

    id: str
    object: Literal["session"]
    class_set: str
    method: str | None
    views: int
    capacity: int
    quota: int
    images: int
    counts: dict[str, int]
    bytes: int
    drift: float | None
    requests: int
    created: int
    ttl_s: float
    expires_in_s: float


def _classes(value: Any, info: ValidationInfo) -> Classes:
    assert isinstance(info.context, Settings)
    return read_classes(value, info.context, most_texts=info.context.max_class_set_texts)


class ClassSetAsked(Strict):
    """The body of `POST /v1/class-sets`."""

    most: ClassVar[str] = "max_class_set_texts"  # the setting that bounds its texts

    classes: Annotated[Any, PlainValidator(_classes, json_schema_input_type=CLASSES)]
    templates: Annotated[Any, PlainValidator(read_templates, json_schema_input_type=Templates | None)] = None

    @model_validator(mode="after")
    def fits(self, info: ValidationInfo) -> ClassSetAsked:
        """Templates go with names alone, and there is a bound on the texts."""
        assert isinstance(info.context, Settings)
        if self.templates is not None and not isinstance(self.classes, list):
            raise ApiError("templates_not_allowed", "templates go with a list of names alone.", param="templates")
        if isinstance(self.classes, list):
            bound_texts(len(self.classes) * max(1, len(self.templates or ())), getattr(info.context, self.most))
        return self


class SessionAsked(ClassSetAsked):
    """The body of `POST /v1/sessions`."""

    most: ClassVar[str] = "max_texts"

    method: Literal["gram", "infomax"] | None = None
    capacity: Annotated[int, Field(ge=1, le=4096)] = 128
    views: Annotated[int, Field(ge=1, le=128)] | None = None
    ttl_s: Annotated[int, Field(ge=1, le=604_800)] = 3600


# ---- compatible routes ----


class Label(BaseModel):
    """One label and its score."""

    label: str
    score: float


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts; none for images."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """OpenAI's list of embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """One model, as OpenAI lists them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    capabilities: list[str]


class ModelList(BaseModel):
    """The one model of a server."""

    object: Literal["list"]
    data: list[ModelCard]


class ServerFacts(BaseModel):
    """Open Inference Protocol: the server."""

    name: str
    version: str
    extensions: list[str]


class TensorFacts(BaseModel):
    """Open Inference Protocol: what a model takes or gives."""

    name: str
    datatype: str
    shape: list[int]


class ModelFacts(BaseModel):
    """Open Inference Protocol: the model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]


class ModelReady(BaseModel):
    """Open Inference Protocol: whether the model answers."""

    name: str
    ready: bool


class HuggingFaceParameters(Loose):
    """The task's parameters; `labels` is another name of `candidate_labels`, and a text is split at commas."""

    candidate_labels: list[Name] | str | None = None
    labels: list[Name] | str | None = None
    hypothesis_template: Template | None = None
    adaptation: Adaptation | None = None


class HuggingFaceAsked(Loose):
    """The body of the Hugging Face task."""

    inputs: Base64
    parameters: HuggingFaceParameters


class EmbeddingsAsked(Loose):
    """The body of `POST /v1/embeddings`; images come as base64 or data URLs."""

    input: str | list[str]
    model: str | None = None
    modality: Literal["text", "image"] = "text"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
