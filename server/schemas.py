"""What may be asked, as types.

Types are strict and unknown fields are refused, so that a misspelt `adaptaton` can't switch adaptation
off in silence. Refusals name fields by path or index and never repeat what the caller wrote.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gram_core.types import Tuning
from server.errors import ApiError
from server.replay import MOST, Recorded, read
from server.settings import Settings

MAX_JSON_VALUES = 500_000
MAX_JSON_LISTS = 100_000  # and objects: each costs 70 bytes of memory for 3 on the wire, and time without a pause
MAX_DIGITS = 64  # of a number: one of 4,000 takes 0.1 ms
MAX_NAME, MAX_TEXT, MAX_TEXTS_PER_CLASS, MAX_TEMPLATES, MAX_ID = 256, 512, 100, 100, 128
MAX_PREDICTIONS = 50_000
MAX_EMBEDDING_TEXTS = 2048  # of one request, as OpenAI has it
MAX_FIELDS = 32  # more than there are; every unknown one would become an error of its own
# A reference instead of an image. A scheme is short; without a bound this would search through 22 MB of base64.
URL = re.compile(r"(?!data:)[A-Za-z][A-Za-z0-9+.\-]{0,63}:|//", re.IGNORECASE)
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates
PARSING = threading.Lock()  # one body, or one large text of base64, at a time: see read_json
INTEGER = re.compile(r"-?[0-9]{1,18}")
TRUTH = {"true": True, "false": False}
SPEAKING = {  # pydantic's own sentences, where they hold our limits and nothing of the input
    "int_type": "must be an integer",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "missing": "is required",
}
BOUNDED = {"greater_than_equal", "less_than_equal", "literal_error", "string_pattern_mismatch"}


class Posted(NamedTuple):
    """One image as posted: base64 text or raw bytes, the caller's own name for it, and classes of its own, if any."""

    data: str | bytes | bytearray
    id: str | None = None
    classes: Any = None


class Strict(BaseModel):
    """Base of everything that is asked."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


SESSION = "A session's id: its images are tuned along, and its classes are asked about."
REPLAY = "The token of an answer; goes with no other field of this object."


class Adaptation(Strict):
    """How to adapt; a missing field means the model's own default."""

    method: Literal["gram", "infomax", "tpt", "none"] | None = None
    host: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")] | None = None
    scope: Literal["auto", "image", "batch"] = "auto"
    steps: Annotated[int, Field(ge=0, le=64)] | None = None
    views: Annotated[int, Field(ge=1, le=128)] | None = None
    budget_ms: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    on_overload: Literal["shed", "reject"] = "shed"
    replay: Annotated[str, Field(description=REPLAY, json_schema_extra={"maxLength": MOST})] | None = None
    _recorded: Recorded | None = PrivateAttr(None)

    @field_validator("steps", "views")
    @classmethod
    def within_settings(cls, value: int | None, info: ValidationInfo) -> int | None:
        """The operator may set lower limits than the wire's."""
        limit = getattr(_settings(info), f"max_{info.field_name}")
        if value is not None and value > limit:
            raise _invalid(f"must be at most {limit} on this server", f"adaptation.{info.field_name}")
        return value

    @model_validator(mode="after")
    def alone(self, info: ValidationInfo) -> Adaptation:
        """A token says everything; what it says is bounded as a request is."""
        if self.replay is None:
            return self
        if self.model_fields_set != {"replay"}:
            raise _invalid("goes with no other field; it holds the whole plan", "adaptation.replay")
        self._recorded = read(self.replay)
        plan, settings = self._recorded.plan, _settings(info)
        if max(plan.steps - settings.max_steps, plan.views - settings.max_views) > 0:
            raise _invalid("asks for more steps or views than this server allows", "adaptation.replay")
        return self

    @property
    def recorded(self) -> Recorded | None:
        """What `replay` holds."""
        return self._recorded

    def tuning(self) -> Tuning:
        """The core's form of it."""
        return Tuning(**self.model_dump(exclude={"budget_ms", "on_overload", "replay"}))


# What the OpenAPI document says of the fields below, as near as JSON Schema comes. Nothing is checked with these:
# `_classes`, `_templates` and `_images` know more, count by index and take no time on long lists.
PLAIN = r"[^\x00-\x1f\x7f-\x9f]"  # no control character
SPOKEN = rf"^{PLAIN}*[^\s\x00-\x1f\x7f-\x9f]{PLAIN}*$"  # and not blank
NAME: dict[str, Any] = {
    "minLength": 1,
    "maxLength": MAX_NAME,
    "pattern": SPOKEN,
    "description": "Counted and compared after Unicode NFC and trimming.",
}
Name = Annotated[str, Field(json_schema_extra=NAME)]
Sentence = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=SPOKEN)]
Template = Annotated[
    str,
    Field(
        min_length=2,
        max_length=MAX_TEXT,
        pattern=r"^[^{}\x00-\x1f\x7f-\x9f]*\{\}[^{}\x00-\x1f\x7f-\x9f]*$",
        description="Exactly one {}, where the name goes, and no other brace.",
    ),
]
Base64 = Annotated[
    str,
    Field(
        description="Base64 of a JPEG, PNG or WEBP, or a data URL of it: standard alphabet, with padding; line breaks "
        "are ignored. Any other URL is refused.",
        json_schema_extra={"format": "byte", "contentEncoding": "base64"},
    ),
]


class ClassSetReference(Strict):
    """A class set posted before."""

    class_set: str


Names = Annotated[list[Name], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
Sentences = Annotated[list[Sentence], Field(min_length=1, max_length=MAX_TEXTS_PER_CLASS)]
Described = Annotated[dict[str, Sentences], Field(min_length=1, json_schema_extra={"propertyNames": NAME})]
Templates = Annotated[list[Template], Field(max_length=MAX_TEMPLATES)]
CLASSES = Names | Described | ClassSetReference


class ImageItem(Strict):
    """An image, the caller's own name for it, and its own classes instead of the request's."""

    data: Base64
    id: Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=rf"^{PLAIN}+$")] | None = None
    classes: CLASSES | None = None


Images = Annotated[list[Base64 | ImageItem], Field(min_length=1)]
Classes = list[str] | dict[str, list[str]] | ClassSetReference


def _classes(value: Any, info: ValidationInfo) -> Classes:
    return read_classes(value, _settings(info))


def read_classes(value: Any, settings: Settings, param: str = "classes", most_texts: int | None = None) -> Classes:
    """Names, sentences by name, or a class set posted before; raises ApiError 422."""
    if isinstance(value, dict):
        if set(value) == {"class_set"} and isinstance(value["class_set"], str):
            return ClassSetReference(class_set=value["class_set"])
    elif not isinstance(value, list):
        raise _invalid("must be a list of names, or an object of names and their sentences", param)
    if len(value) > settings.max_classes:
        sentence = f"{len(value)} classes, the limit is {settings.max_classes} (GRAM_MAX_CLASSES)."
        raise ApiError("too_many_classes", sentence, param=param)
    names = _names(list(value), param)
    if isinstance(value, list):
        return names
    most = MAX_TEXTS_PER_CLASS
    sentences = [_texts(own, f"{param}.{index}", most) for index, own in enumerate(value.values())]
    if any(not own for own in sentences):
        raise _invalid("a class has no sentence; give at least one, or a list of names", param)
    bound_texts(sum(map(len, sentences)), settings.max_texts if most_texts is None else most_texts)
    return dict(zip(names, sentences, strict=True))


def read_templates(value: Any, _: ValidationInfo) -> list[str] | None:
    """Texts with a place for the name; what they hold is checked by the tokenizer."""
    return None if value is None else _texts(value, "templates", MAX_TEMPLATES)


def _images(value: Any, info: ValidationInfo) -> list[Posted]:
    if not isinstance(value, list):
        raise _invalid("must be a list", "images")
    settings = _settings(info)
    bound_images(len(value), settings)
    return [posted_image(item, f"images.{index}", settings) for index, item in enumerate(value)]


def _requiring_classes(schema: dict[str, Any]) -> None:
    """Only where a session is named may the classes be left out, which is too much for a schema to say."""
    schema["required"] = ["classes", *schema.get("required", ())]
    schema["properties"]["classes"].pop("default", None)


class Question(Strict):
    """Everything about a request but its images; the form and raw-body requests hold no more."""

    model_config = ConfigDict(json_schema_extra=_requiring_classes)

    classes: Annotated[Any, PlainValidator(_classes, json_schema_input_type=CLASSES)] = None
    templates: Annotated[Any, PlainValidator(read_templates, json_schema_input_type=Templates | None)] = None
    adaptation: Adaptation = Adaptation.model_construct()
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = 5
    score: Literal["softmax", "cosine", "logit"] = "softmax"
    errors: Literal["fail", "per_item"] = "fail"
    explain: bool = False
    timeout_ms: Annotated[int, Field(ge=1)] | None = None
    session: Annotated[str, Field(description=SESSION)] | None = None
    update: Annotated[bool, Field(description="Whether the session may keep these images.")] = True

    @model_validator(mode="after")
    def fits(self, info: ValidationInfo) -> Question:
        """The rules between fields, and the operator's limits."""
        settings = _settings(info)
        if self.classes is None and self.session is None:
            raise _invalid("is required", "classes")
        if self.templates is not None and not isinstance(self.classes, list):
            sentence = "templates go with a list of names, neither with sentences nor with a class set or a session."
            raise ApiError("templates_not_allowed", sentence, param="templates")
        if isinstance(self.classes, list):
            bound_texts(len(self.classes) * max(1, len(self.templates or ())), settings.max_texts)
        if self.timeout_ms is not None and self.timeout_ms > settings.max_timeout_ms:
            raise _invalid(f"must be at most {settings.max_timeout_ms} (GRAM_MAX_TIMEOUT_MS)", "timeout_ms")
        return self


class ClassifyRequest(Question):
    """The JSON body of `/v1/classify`."""

    images: Annotated[Any, PlainValidator(_images, json_schema_input_type=Images)]


# ---- reading ----


def read_json(body: bytes | bytearray) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN, bounded in values, depth and the length of numbers.

    The parser holds the interpreter; only the functions handed to it let others have their turn. So one body is parsed
    at a time: nothing is lost, and the event loop never waits for two.
    """
    lists = sum(map(body.count, (b"[", b"{")))
    if lists > MAX_JSON_LISTS or lists + body.count(b",") > MAX_JSON_VALUES:
        sentence = f"the JSON body has more than {MAX_JSON_VALUES} values, or {MAX_JSON_LISTS} lists and objects."
        raise ApiError("malformed_body", sentence)
    try:
        with PARSING:
            return json.loads(
                body.decode("utf-8"),
                object_pairs_hook=_unique,
                parse_constant=_no_constant,
                parse_int=_integer,
                parse_float=_number,
            )
    except (ValueError, RecursionError):
        sentence = "the body is not JSON: UTF-8, unique keys, finite numbers."
        raise ApiError("malformed_body", sentence) from None


def ask(kind: type[Strict], data: Any, settings: Settings) -> Any:
    """Validate `data`; the first thing wrong with it becomes the answer."""
    if not isinstance(data, dict):
        raise ApiError("invalid_request", "the request must be a JSON object.")
    if max(len(data), len(own) if isinstance(own := data.get("adaptation"), dict) else 0) > MAX_FIELDS:
        raise ApiError("invalid_request", f"an object has more than {MAX_FIELDS} fields.")
    try:
        return kind.model_validate(data, context=settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path, wrong = list(first["loc"]), first["type"]
        if wrong == "extra_forbidden":  # the last step is the caller's own word
            fields = Adaptation.model_fields if path[:-1] else kind.model_fields
            close = difflib.get_close_matches(str(path[-1])[:64], fields, n=1)
            hint = f"perhaps {close[0]} was meant" if close else f"known here: {', '.join(sorted(fields))}"
            raise _invalid(f"unknown field; {hint}", ".".join(map(str, path[:-1])) or None) from None
        sentence = SPEAKING.get(wrong) or (_lower(first["msg"]) if wrong in BOUNDED else "is not valid")
        where = ".".join(map(str, path))
        raise _invalid(sentence if where else f"the request {sentence}", where or None) from None


def question_of(fields: Iterable[tuple[str, str]], settings: Settings) -> Question:
    """The form and query way to ask: repeated names make lists, digits make integers, `explain` is true or false."""
    data: dict[str, Any] = {}
    options: dict[str, Any] = {}
    lists: dict[str, list[str]] = {}
    for name, text in fields:
        if name in ("classes", "templates"):
            lists.setdefault(name, []).append(text)
            continue
        into = options if name in Adaptation.model_fields else data
        if name in into or name in ("adaptation", "classes"):
            raise _invalid("a field is given twice, or can't be given in a form", None)
        if name in ("explain", "update"):
            into[name] = TRUTH.get(text, text)
        elif name == "session":
            into[name] = text
        else:
            into[name] = int(text) if INTEGER.fullmatch(text) else text
    if "class_set" in data:
        data["classes"] = {"class_set": str(data.pop("class_set"))}
    if data.keys() & lists.keys():
        raise _invalid("send either classes or a class_set", "classes")
    data |= lists
    question: Question = ask(Question, {**data, "adaptation": options}, settings)
    return question


def bound_images(count: int, settings: Settings) -> None:
    """1 to GRAM_MAX_IMAGES."""
    if count == 0:
        raise _invalid("no image; send at least one", "images")
    if count > settings.max_images:
        sentence = f"{count} images, the limit is {settings.max_images} (GRAM_MAX_IMAGES). Send fewer."
        raise ApiError("too_many_images", sentence, param="images")


def bound_predictions(question: Question, groups: Iterable[tuple[int, int]]) -> None:
    """What depends on how many classes there are: groups of (classes, images). Bounds the size of the answer."""
    total = 0
    for classes, images in groups:
        if classes == 1 and question.score == "softmax":
            raise _invalid("with one class the softmax is always 1; ask for cosine or logit", "score")
        total += images * min(question.top_k or classes, classes)
    if total > MAX_PREDICTIONS:
        raise _invalid(f"the answer would hold {total} predictions; {MAX_PREDICTIONS} at most", "top_k")


def _names(values: Sequence[Any], param: str) -> list[str]:
    if not values:
        raise _invalid("no class; give at least one", param)
    names: dict[str, int] = {}
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise _invalid("class names must be strings", f"{param}.{index}")
        name = unicodedata.normalize("NFC", value[: 4 * MAX_NAME]).strip()
        if not 1 <= len(name) <= MAX_NAME or len(value) > 4 * MAX_NAME:
            raise _invalid(f"class names have 1 to {MAX_NAME} characters", f"{param}.{index}")
        if UNPRINTABLE.search(name):
            raise _invalid("class names hold no control characters", f"{param}.{index}")
        if (first := names.setdefault(name, index)) != index:
            sentence = f"class {index} has the same name as class {first}; names must differ."
            raise ApiError("duplicate_class", sentence, param=f"{param}.{index}")
    return list(names)


def _texts(value: Any, param: str, most: int) -> list[str]:
    if not isinstance(value, list):
        raise _invalid("must be a list of strings", param)
    if len(value) > most:
        raise _invalid(f"has {len(value)} texts, the limit is {most}", param)
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise _invalid("must be a string", f"{param}.{index}")
        if not 1 <= len(text) <= MAX_TEXT or not text.strip():
            raise _invalid(f"must have 1 to {MAX_TEXT} characters", f"{param}.{index}")
        if UNPRINTABLE.search(text):
            raise _invalid("must hold no control characters", f"{param}.{index}")
    return list(value)


def posted_image(item: Any, param: str, settings: Settings) -> Posted:
    """One image of a JSON body: base64, a data URL, or an object with it; raises ApiError 422."""
    name = classes = None
    if isinstance(item, dict):
        if "url" in item:
            raise _no_urls(param)
        if set(item) - {"data", "id", "classes"} or "data" not in item:
            raise _invalid("an image is a base64 string, or an object with data and maybe id and classes", param)
        if (own := item.get("classes")) is not None:
            classes = read_classes(own, settings, f"{param}.classes")
        name, item = item.get("id"), item["data"]
        fine = name is None or (isinstance(name, str) and 1 <= len(name) <= MAX_ID and name.isprintable())
        if not fine:
            raise _invalid(f"must have 1 to {MAX_ID} printable characters", f"{param}.id")
    if not isinstance(item, str):
        raise _invalid("an image is a base64 string, or an object with data and maybe id and classes", param)
    if URL.match(item):
        raise _no_urls(param)
    return Posted(item, name, classes)


def bound_lists(lists: Iterable[Classes | None], templates: Sequence[str] | None, settings: Settings) -> None:
    """The texts of all images' own classes together, before any is tokenized; raises ApiError 422."""
    total = 0
    for own in {repr(each): each for each in lists if each is not None}.values():
        if isinstance(own, dict):
            total += sum(map(len, own.values()))
        elif isinstance(own, list):
            total += len(own) * max(1, len(templates or ()))
    bound_texts(total, settings.max_texts)


def bound_texts(count: int, most: int) -> None:
    """At most so many texts; raises ApiError 422."""
    if count > most:
        sentence = f"the classes make {count} texts, the limit is {most}."
        raise ApiError("too_many_classes", sentence, param="classes")


def _settings(info: ValidationInfo) -> Settings:
    assert isinstance(info.context, Settings)
    return info.context


def _invalid(sentence: str, param: str | None) -> ApiError:
    return ApiError("invalid_request", f"{param}: {sentence}." if param else f"{sentence}.", param=param)


def _no_urls(param: str) -> ApiError:
    sentence = "this server opens no URLs. Send the image itself, as bytes or base64."
    return ApiError("url_input_unsupported", sentence, param=param)


def _lower(sentence: str) -> str:
    return sentence.replace("Input should be", "must be").replace("String should", "must")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_constant(_: str) -> Any:
    raise ValueError


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError
    return int(digits)


def _number(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise ValueError
    return float(digits)
