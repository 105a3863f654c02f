"""Whatever is sent ends in its documented status and envelope, and the next request is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ApiError
from server.ingress import split_multipart
from server.schemas import MAX_JSON_LISTS, MAX_JSON_VALUES, Adaptation, ClassifyRequest, ask, question_of, read_json
from server.settings import Settings
from tests.server_fixtures import Live, answered, b64, body, code, live, png
from tests.zoo import MEDIA_TYPES, Member, zoo

JSON = {"content-type": "application/json"}
SECRET = "zebracrossing"  # appears in what is sent and must not come back
LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|\.py\b|zebracrossing", re.IGNORECASE)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(max_request_pixels=64_000_000, max_steps=40) as running:
        yield running


def refused(server: Live, response: httpx.Response, status: int, expected: str) -> dict[str, Any]:
    """The error, checked; the server must be well afterwards."""
    assert (response.status_code, code(response)) == (status, expected), response.text[:500]
    assert not LEAKS.search(response.text)
    server.assert_well()
    error: dict[str, Any] = response.json()["error"]
    return error


def image(**fields: Any) -> dict[str, Any]:
    return {"images": [{"data": b64(png()), **fields}]}


# name: (fields that differ from a good request, status, code, param)
FIELDS: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "no_classes": ({"classes": []}, 422, "invalid_request", "classes"),
    "classes_null": ({"classes": None}, 422, "invalid_request", "classes"),
    "classes_a_string": ({"classes": SECRET}, 422, "invalid_request", "classes"),
    "class_a_number": ({"classes": ["cat", 7]}, 422, "invalid_request", "classes.1"),
    "class_null": ({"classes": [None, "cat"]}, 422, "invalid_request", "classes.0"),
    "class_a_list": ({"classes": ["cat", [SECRET]]}, 422, "invalid_request", "classes.1"),
    "class_empty": ({"classes": ["cat", ""]}, 422, "invalid_request", "classes.1"),
    "class_blank": ({"classes": ["cat", " \t\u3000"]}, 422, "invalid_request", "classes.1"),
    "class_too_long": ({"classes": ["cat", "x" * 257]}, 422, "invalid_request", "classes.1"),
    "class_huge": ({"classes": ["cat", SECRET * 90_000]}, 422, "invalid_request", "classes.1"),
    "class_control_character": ({"classes": ["cat", "do\x00g"]}, 422, "invalid_request", "classes.1"),
    "class_lone_surrogate": ({"classes": ["cat", "\ud800"]}, 422, "invalid_request", "classes.1"),
    "class_twice": ({"classes": ["cat", "dog", SECRET, SECRET]}, 422, "duplicate_class", "classes.3"),
    "class_twice_after_trimming": ({"classes": ["cat", " cat "]}, 422, "duplicate_class", "classes.1"),
    "class_twice_after_nfc": ({"classes": ["caf\u00e9", "cafe\u0301"]}, 422, "duplicate_class", "classes.1"),
    "class_beyond_the_context": ({"classes": ["cat", "a " * 90]}, 422, "class_text_too_long", "classes.1"),
    "10001_classes": ({"classes": [f"c{n}" for n in range(10_001)]}, 422, "too_many_classes", "classes"),
    "too_many_texts": (
        {"classes": [f"c{n}" for n in range(5000)], "templates": [f"{n} {{}}" for n in range(5)]},
        422,
        "too_many_classes",
        "classes",
    ),
    "one_class_softmax": ({"classes": ["cat"]}, 422, "invalid_request", "score"),
    "classes_object_empty": ({"classes": {}}, 422, "invalid_request", "classes"),
    "sentences_empty": ({"classes": {"cat": [], "dog": ["a dog"]}}, 422, "invalid_request", "classes"),
    "sentences_a_string": ({"classes": {"cat": "a cat"}}, 422, "invalid_request", "classes.0"),
    "sentence_a_number": ({"classes": {"cat": ["a cat", 1]}}, 422, "invalid_request", "classes.0.1"),
    "sentence_too_long": ({"classes": {"cat": ["x" * 513]}}, 422, "invalid_request", "classes.0.0"),
    "101_sentences": ({"classes": {"cat": ["x"] * 101}}, 422, "invalid_request", "classes.0"),
    "class_set": ({"classes": {"class_set": "cs_" + "0" * 32}}, 404, "class_set_not_found", "classes"),
    "template_without_braces": ({"templates": ["a photo"]}, 422, "bad_template", "templates.0"),
    "template_with_two": ({"templates": ["{}", "{} {}"]}, 422, "bad_template", "templates.1"),
    "template_with_format": ({"templates": ["{:>20000000}"]}, 422, "bad_template", "templates.0"),
    "template_with_attribute": ({"templates": ["{0.__class__}"]}, 422, "bad_template", "templates.0"),
    "templates_a_string": ({"templates": "a {}"}, 422, "invalid_request", "templates"),
    "101_templates": ({"templates": ["{}"] * 101}, 422, "invalid_request", "templates"),
    "templates_with_sentences": (
        {"classes": {"cat": ["a cat"], "dog": ["a dog"]}, "templates": ["{}"]},
        422,
        "templates_not_allowed",
        "templates",
    ),
    "no_images": ({"images": []}, 422, "invalid_request", "images"),
    "images_null": ({"images": None}, 422, "invalid_request", "images"),
    "images_an_object": ({"images": {"data": SECRET}}, 422, "invalid_request", "images"),
    "image_a_number": ({"images": [5]}, 422, "invalid_request", "images.0"),
    "image_without_data": ({"images": [{"id": SECRET}]}, 422, "invalid_request", "images.0"),
    "image_unknown_key": (image(name=SECRET), 422, "invalid_request", "images.0"),
    "image_id_a_number": (image(id=5), 422, "invalid_request", "images.0.id"),
    "image_id_too_long": (image(id="x" * 129), 422, "invalid_request", "images.0.id"),
    "image_id_unprintable": (image(id="a\nb"), 422, "invalid_request", "images.0.id"),
    "image_url": ({"images": [f"https://{SECRET}/a.png"]}, 422, "url_input_unsupported", "images.0"),
    "image_file_url": ({"images": [f"FILE:///{SECRET}"]}, 422, "url_input_unsupported", "images.0"),
    "image_scheme_relative": ({"images": [f"//{SECRET}/a.png"]}, 422, "url_input_unsupported", "images.0"),
    "image_scheme_of_64_letters": ({"images": ["x" * 64 + ":" + SECRET]}, 422, "url_input_unsupported", "images.0"),
    # What is longer is no scheme: looking for its end would search through all of an image's base64.
    "image_scheme_of_65_letters": ({"images": ["x" * 65 + ":" + SECRET]}, 400, "invalid_base64", "images.0"),
    "image_url_key": ({"images": [{"url": SECRET}]}, 422, "url_input_unsupported", "images.0"),
    "65_images": ({"images": ["AAAA"] * 65}, 413, "too_many_images", "images"),
    "base64_garbage": ({"images": ["not base64!"]}, 400, "invalid_base64", "images.0"),
    "base64_without_padding": ({"images": ["QUI"]}, 400, "invalid_base64", "images.0"),
    "base64_url_safe": ({"images": [b64(png()), "-_-_"]}, 400, "invalid_base64", "images.1"),
    "base64_padding_inside": ({"images": ["QQ==QUFB"]}, 400, "invalid_base64", "images.0"),
    "base64_spaces": ({"images": ["QUFB QUFB"]}, 400, "invalid_base64", "images.0"),
    "base64_not_ascii": ({"images": ["\u00e9\u00e9\u00e9\u00e9"]}, 400, "invalid_base64", "images.0"),
    "base64_padding_in_an_early_slice": (
        {"images": ["A" * (2**20 - 4) + "QQ==" + "AAAA" * 4]},
        400,
        "invalid_base64",
        "images.0",
    ),
    "data_url_not_base64": ({"images": ["data:image/png,abc"]}, 400, "invalid_base64", "images.0"),
    "image_empty": ({"images": [""]}, 422, "undecodable_image", "images.0"),
    "image_text": ({"images": [b64(SECRET.encode())]}, 415, "unsupported_image_format", "images.0"),
    "first_bad_image_decides": (
        {"images": [b64(png()), b64(b"GIF89a"), "?"]},
        415,
        "unsupported_image_format",
        "images.1",
    ),
    "top_k_zero": ({"top_k": 0}, 422, "invalid_request", "top_k"),
    "top_k_1001": ({"top_k": 1001}, 422, "invalid_request", "top_k"),
    "top_k_a_string": ({"top_k": "5"}, 422, "invalid_request", "top_k"),
    "top_k_a_bool": ({"top_k": True}, 422, "invalid_request", "top_k"),
    "top_k_a_float": ({"top_k": 5.0}, 422, "invalid_request", "top_k"),
    "answer_too_big": (
        {"images": ["AAAA"] * 60, "classes": [f"c{n}" for n in range(1000)], "top_k": 1000},
        422,
        "invalid_request",
        "top_k",
    ),
    "score_unknown": ({"score": SECRET}, 422, "invalid_request", "score"),
    "errors_unknown": ({"errors": SECRET}, 422, "invalid_request", "errors"),
    "explain_a_string": ({"explain": "true"}, 422, "invalid_request", "explain"),
    "explain_a_number": ({"explain": 1}, 422, "invalid_request", "explain"),
    "explain_null": ({"explain": None}, 422, "invalid_request", "explain"),
    "timeout_zero": ({"timeout_ms": 0}, 422, "invalid_request", "timeout_ms"),
    "timeout_too_long": ({"timeout_ms": 120_001}, 422, "invalid_request", "timeout_ms"),
    "adaptation_a_string": ({"adaptation": "tpt"}, 422, "invalid_request", "adaptation"),
    "adaptation_null": ({"adaptation": None}, 422, "invalid_request", "adaptation"),
    "method_unknown": ({"adaptation": {"method": SECRET}}, 422, "invalid_request", "adaptation.method"),
    "method_without_its_parts": ({"adaptation": {"method": "gram"}}, 422, "method_unavailable", None),
    "scope_without_its_method": (
        {"adaptation": {"method": "tpt", "scope": "batch"}},
        422,
        "method_unavailable",
        None,
    ),
    "host_unknown": ({"adaptation": {"host": SECRET}}, 422, "method_unavailable", "adaptation.host"),
    "host_odd": ({"adaptation": {"host": "../" + SECRET}}, 422, "invalid_request", "adaptation.host"),
    "scope_unknown": ({"adaptation": {"scope": SECRET}}, 422, "invalid_request", "adaptation.scope"),
    "steps_negative": ({"adaptation": {"steps": -1}}, 422, "invalid_request", "adaptation.steps"),
    "steps_above_the_setting": ({"adaptation": {"steps": 41}}, 422, "invalid_request", "adaptation.steps"),
    "views_zero": ({"adaptation": {"views": 0}}, 422, "invalid_request", "adaptation.views"),
    "views_129": ({"adaptation": {"views": 129}}, 422, "invalid_request", "adaptation.views"),
    "seed_negative": ({"adaptation": {"seed": -1}}, 422, "invalid_request", "adaptation.seed"),
    "seed_too_big": ({"adaptation": {"seed": 2**32}}, 422, "invalid_request", "adaptation.seed"),
    "unknown_field": ({SECRET: 1}, 422, "invalid_request", None),
    "unknown_option": ({"adaptation": {SECRET: 1}}, 422, "invalid_request", "adaptation"),
    "labels": ({"labels": ["cat"]}, 422, "invalid_request", None),
    "replay": ({"adaptation": {"replay": "gr1.x"}}, 422, "invalid_request", "adaptation.replay"),
    "replay and more": (
        {"adaptation": {"replay": "gr1.x", "seed": 1}},
        422,
        "invalid_request",
        "adaptation.replay",
    ),
    "another version's replay": ({"adaptation": {"replay": "gr2.x"}}, 409, "replay_mismatch", "adaptation.replay"),
    "a negative budget": ({"adaptation": {"budget_ms": -1}}, 422, "invalid_request", "adaptation.budget_ms"),
    "an overload rule that is none": (
        {"adaptation": {"on_overload": "wait"}},
        422,
        "invalid_request",
        "adaptation.on_overload",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_field_is_refused_by_name(server: Live, name: str) -> None:
    fields, status, expected, param = FIELDS[name]
    content = json.dumps({**body(), **fields})
    response = server.client.post("/classify", content=content, headers=JSON)
    assert refused(server, response, status, expected)["param"] == param


def test_a_misspelt_field_is_told_what_was_meant(server: Live) -> None:
    error = refused(server, server.ask(adaptaton={}), 422, "invalid_request")
    assert "perhaps adaptation was meant" in error["message"]


def test_a_truth_that_is_none_is_told_so(server: Live) -> None:
    assert "explain: must be true or false." in server.ask(explain="yes").json()["error"]["message"]


def test_numbers_that_are_not_strings_are_told_so(server: Live) -> None:
    assert "class names must be strings" in server.ask(classes=["cat", 1]).json()["error"]["message"]


@pytest.mark.parametrize("missing", ["images", "classes"])
def test_a_required_field_is_asked_for(server: Live, missing: str) -> None:
    response = server.client.post("/classify", json={k: v for k, v in body().items() if k != missing})
    assert refused(server, response, 422, "invalid_request")["param"] == missing


GOOD = json.dumps(body())
JSON_BODIES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "malformed_body"),
    "not_json": (b"classes=cat", 400, "malformed_body"),
    "trailing_garbage": (GOOD.encode() + b"x", 400, "malformed_body"),
    "cut_off": (GOOD.encode()[:-1], 400, "malformed_body"),
    "byte_order_mark": (b"\xef\xbb\xbf" + GOOD.encode(), 400, "malformed_body"),
    "utf_16": (GOOD.encode("utf-16"), 400, "malformed_body"),
    "bad_utf_8": (GOOD.encode().replace(b"cat", b"c\xfft"), 400, "malformed_body"),
    "duplicate_key": (GOOD.encode()[:-1] + b', "classes": ["a", "b"]}', 400, "malformed_body"),
    "duplicate_key_deep": (
        GOOD.encode()[:-1] + b', "adaptation": {"seed": 1, "seed": 2}}',
        400,
        "malformed_body",
    ),
    "nan": (GOOD.encode()[:-1] + b', "top_k": NaN}', 400, "malformed_body"),
    "infinity": (GOOD.encode()[:-1] + b', "top_k": -Infinity}', 400, "malformed_body"),
    "overflowing_float": (GOOD.encode()[:-1] + b', "top_k": 1e999}', 422, "invalid_request"),
    "integer_of_10_kB": (GOOD.encode()[:-1] + b', "top_k": ' + b"9" * 10_000 + b"}", 400, "malformed_body"),
    "integer_of_64_digits": (GOOD.encode()[:-1] + b', "top_k": ' + b"9" * 64 + b"}", 422, "invalid_request"),
    "integer_of_65_digits": (GOOD.encode()[:-1] + b', "top_k": ' + b"9" * 65 + b"}", 400, "malformed_body"),
    "number_of_65_digits": (GOOD.encode()[:-1] + b', "top_k": 0.' + b"9" * 63 + b"}", 400, "malformed_body"),
    "100k_nested_arrays": (b"[" * 100_000 + b"]" * 100_000, 400, "malformed_body"),
    "100k_nested_objects": (b'{"a":' * 100_000, 400, "malformed_body"),
    "too_many_values": (b"[" + b"1," * MAX_JSON_VALUES + b"1]", 400, "malformed_body"),
    "too_many_lists": (b"[" + b"[]," * MAX_JSON_LISTS + b"[]]", 400, "malformed_body"),
    "a_key_that_is_no_text": (GOOD.encode()[:-1] + rb', "\ud800": 1}', 422, "invalid_request"),
    "a_huge_key": (b'{"' + b"adaptation" * 500_000 + b'": 1}', 422, "invalid_request"),
    "100k_unknown_fields": (json.dumps({f"k{n}": n for n in range(100_000)}).encode(), 422, "invalid_request"),
    "100k_unknown_options": (
        json.dumps({**body(), "adaptation": {f"k{n}": n for n in range(100_000)}}).encode(),
        422,
        "invalid_request",
    ),
    "an_array": (b"[]", 422, "invalid_request"),
    "a_string": (b'"zebracrossing"', 422, "invalid_request"),
    "null": (b"null", 422, "invalid_request"),
}


@pytest.mark.parametrize("name", JSON_BODIES)
def test_a_body_that_is_not_a_json_request_is_refused(server: Live, name: str) -> None:
    content, status, expected = JSON_BODIES[name]
    refused(server, server.client.post("/classify", content=content, headers=JSON), status, expected)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonx"},
        {"content-type": "application/x-python-pickle"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "image/png", "content-encoding": "br"},
    ],
    ids=str,
)
def test_another_content_type_or_encoding_is_refused(server: Live, headers: dict[str, str]) -> None:
    request = server.client.build_request("POST", "/classify?classes=a&classes=b", content=png())
    request.headers.pop("content-type", None)
    request.headers.update(headers)
    refused(server, server.client.send(request), 415, "unsupported_media_type")


# ---- forms and raw bodies ----

BOUNDARY = "limit"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str | None, data: bytes, filename: str | None = None, more: str = "") -> bytes:
    disposition = "form-data"
    if name is not None:
        disposition += f'; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n{more}\r\n"
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
PNG_PART = part("image", png(), "a.png")
CLASSES = part("classes", b"cat") + part("classes", b"dog")
REQUEST = part("request", json.dumps({"classes": ["cat", "dog"]}).encode())
FORMS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "malformed_body"),
    "zero_parts": (END, 422, "invalid_request"),
    "no_closing_boundary": (PNG_PART + CLASSES, 400, "malformed_body"),
    "other_boundary": (b"--other\r\n\r\n\r\n--other--\r\n", 400, "malformed_body"),
    "part_without_name": (part(None, b"x") + END, 400, "malformed_body"),
    "part_without_disposition": (b"--limit\r\nX-A: b\r\n\r\nx\r\n" + END, 400, "malformed_body"),
    "name_in_extended_syntax": (
        b"--limit\r\nContent-Disposition: form-data; name*=utf-8''image\r\n\r\nx\r\n" + END,
        400,
        "malformed_body",
    ),
    "endless_part_header": (b"--limit\r\nX-A: " + b"b" * 100_000, 400, "malformed_body"),
    "100_part_headers": (part("image", png(), "a.png", "X-A: b\r\n" * 100) + END, 400, "malformed_body"),
    "line_breaks_only": (b"\r\n" * 200_000, 400, "malformed_body"),
    "100k_fields": (b"".join([part("classes", b"c")] * 20_000) + END, 422, "invalid_request"),
    "65_images": (PNG_PART * 65 + CLASSES + END, 413, "too_many_images"),
    "no_image": (CLASSES + END, 422, "invalid_request"),
    "no_classes": (PNG_PART + END, 422, "invalid_request"),
    "one_class": (PNG_PART + part("classes", b"cat") + END, 422, "invalid_request"),
    "unknown_field": (PNG_PART + CLASSES + part("zebracrossing", b"1") + END, 422, "invalid_request"),
    "adaptation_field": (PNG_PART + CLASSES + part("adaptation", b"{}") + END, 422, "invalid_request"),
    "field_twice": (PNG_PART + CLASSES + part("seed", b"1") * 2 + END, 422, "invalid_request"),
    "views_not_a_number": (PNG_PART + CLASSES + part("views", b"ten") + END, 422, "invalid_request"),
    "explain_not_a_truth": (PNG_PART + CLASSES + part("explain", b"yes") + END, 422, "invalid_request"),
    "explain_twice": (PNG_PART + CLASSES + part("explain", b"true") * 2 + END, 422, "invalid_request"),
    "class_set": (PNG_PART + part("class_set", b"cs_0") + END, 404, "class_set_not_found"),
    "classes_and_class_set": (PNG_PART + part("class_set", b"cs") + CLASSES + END, 422, "invalid_request"),
    "class_set_and_classes": (PNG_PART + CLASSES + part("class_set", b"cs") + END, 422, "invalid_request"),
    "field_not_utf_8": (PNG_PART + CLASSES + part("classes", b"\xff") + END, 400, "malformed_body"),
    "request_and_fields": (PNG_PART + REQUEST + CLASSES + END, 422, "invalid_request"),
    "request_twice": (PNG_PART + REQUEST * 2 + END, 422, "invalid_request"),
    "request_not_json": (PNG_PART + part("request", b"{") + END, 400, "malformed_body"),
    "request_with_images": (
        PNG_PART + part("request", json.dumps(body()).encode()) + END,
        422,
        "invalid_request",
    ),
    "image_empty": (part("image", b"", "a.png") + CLASSES + END, 422, "undecodable_image"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_cannot_be_used_is_refused(server: Live, name: str) -> None:
    content, status, expected = FORMS[name]
    refused(server, server.client.post("/classify", content=content, headers=FORM), status, expected)


def test_a_form_without_a_boundary_is_refused(server: Live) -> None:
    for media in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 300,
    ):
        response = server.client.post("/classify", content=PNG_PART + END, headers={"content-type": media})
        refused(server, response, 400, "malformed_body")


@pytest.mark.parametrize(
    ("query", "status", "expected"),
    [
        ("", 422, "invalid_request"),
        ("classes=cat", 422, "invalid_request"),
        ("classes=cat&classes=dog&zebracrossing=1", 422, "invalid_request"),
        ("classes=cat&classes=dog&steps=x", 422, "invalid_request"),
        ("classes=cat&classes=dog&method=zebracrossing", 422, "invalid_request"),
        ("classes=cat&classes=dog&explain=1", 422, "invalid_request"),
        ("classes=cat&classes=dog&explain=True", 422, "invalid_request"),
        ("classes=cat&classes=dog&explain=", 422, "invalid_request"),
        ("classes=cat&classes=cat", 422, "duplicate_class"),
        ("classes=cat&classes=%ff", 400, "malformed_body"),
        ("class_set=cs_0", 404, "class_set_not_found"),
        ("classes=cat&classes=dog&images=1", 422, "invalid_request"),
    ],
)
def test_a_raw_image_with_wrong_parameters_is_refused(server: Live, query: str, status: int, expected: str) -> None:
    response = server.client.post(f"/classify?{query}", content=png(), headers={"content-type": "image/png"})
    refused(server, response, status, expected)


def test_query_parameters_beside_a_json_body_are_refused_rather_than_ignored(server: Live) -> None:
    refused(server, server.client.post("/classify?method=none", json=body()), 422, "invalid_request")


# ---- images ----


@pytest.mark.parametrize("member", [m for m in zoo() if not m.heavy], ids=lambda member: member.name)
def test_every_image_of_the_zoo_is_answered_or_refused_as_documented(server: Live, member: Member) -> None:
    media = member.claims if member.claims.startswith("image/") else MEDIA_TYPES.get(member.format, "image/png")
    response = server.client.post(
        "/classify?classes=cat&classes=dog", content=member.data, headers={"content-type": media}
    )
    if member.code is not None:
        statuses = {"unsupported_image_format": 415, "image_too_large": 413}
        refused(server, response, statuses.get(member.code, 422), member.code)
        return
    assert answered(response).status_code == 200, response.text[:300]
    facts = response.json()["results"][0]["image"]
    assert (facts["width"], facts["height"]) == member.size
    assert facts["format"] == member.format
    assert facts["notes"] == list(member.notes)


def test_an_image_above_its_own_limit_is_refused_in_every_form_before_it_is_decoded() -> None:
    with live(max_image_bytes=1000) as server:
        just_over, raw = bytes(1001), {"content-type": "image/png"}
        for text in (b64(just_over), "A" * 3000, "data:image/png;base64," + b64(just_over)):
            refused(server, server.ask(images=[text]), 413, "image_too_large")
        form = part("image", just_over, "a.png") + CLASSES + END
        refused(server, server.client.post("/classify", content=form, headers=FORM), 413, "image_too_large")
        response = server.client.post("/classify?classes=a&classes=b", content=just_over, headers=raw)
        refused(server, response, 413, "image_too_large")
        assert code(server.ask(bytes(1000))) == "unsupported_image_format"


def test_the_pixels_of_a_whole_request_are_bounded_before_any_is_decoded(server: Live) -> None:
    before = server.metric("gram_image_decode_total", result="ok")
    big = next(member.data for member in zoo() if member.heavy and member.code is None)
    error = refused(server, server.ask(*[big] * 3), 413, "too_many_pixels")
    assert error["param"] == "images"
    done = server.metric("gram_image_decode_total", result="ok") - before
    assert done == 1  # the good request afterwards


def test_one_bad_image_fails_alone_when_asked_to(server: Live) -> None:
    images = [b64(png(1)), "????", b64(b"GIF89a"), b64(png(2)[:60]), b64(png(3))]
    response = server.ask(images=images, errors="per_item")
    assert response.status_code == 200
    results = response.json()["results"]
    codes = [result["error"] and result["error"]["code"] for result in results]
    assert codes == [None, "invalid_base64", "unsupported_image_format", "undecodable_image", None]
    assert [result["index"] for result in results] == [0, 1, 2, 3, 4]
    for index, seed in ((0, 1), (4, 3)):
        alone = server.ask(png(seed)).json()["results"][0]
        assert results[index]["predictions"] == alone["predictions"]
    assert results[1]["label"] is None
    assert results[1]["predictions"] == []
    server.assert_well()


def test_a_request_of_bad_images_only_is_answered_without_the_engine(server: Live) -> None:
    before = server.metric("gram_batches_total")
    response = server.ask(b"", b"x", errors="per_item")
    assert response.status_code == 200
    assert [result["error"]["code"] for result in response.json()["results"]] == [
        "undecodable_image",
        "unsupported_image_format",
    ]
    assert response.json()["usage"]["cost"] == 0
    assert server.metric("gram_batches_total") == before
    server.assert_well()


# ---- what must be accepted ----


def test_10000_classes_are_answered(server: Live) -> None:
    response = server.ask(classes=[f"class {n}" for n in range(10_000)])
    assert response.status_code == 200
    assert response.json()["class_set"]["size"] == 10_000


def test_one_class_is_answered_with_a_score_that_means_something(server: Live) -> None:
    for score in ("cosine", "logit"):
        result = server.ask(classes=["cat"], score=score).json()["results"][0]
        assert result["label"] == "cat"
        assert result["adaptation"]["reason"] == "single_class"


def test_names_are_trimmed_composed_and_otherwise_kept(server: Live) -> None:
    response = server.ask(classes=[" cafe\u0301\n", "a, b; {c} <d>", "\u732b"], top_k=None)
    labels = {p["class_index"]: p["label"] for p in response.json()["results"][0]["predictions"]}
    assert labels == {0: "caf\u00e9", 1: "a, b; {c} <d>", 2: "\u732b"}


def test_a_class_may_be_called_class_set_if_it_has_sentences(server: Live) -> None:
    response = server.ask(classes={"class_set": ["a set of classes"], "cat": ["a cat", "one cat"]})
    assert response.status_code == 200


def test_base64_may_be_broken_into_lines_and_wrapped_in_a_data_url(server: Live) -> None:
    text = b64(png(5))
    lines = "\r\n".join(text[at : at + 60] for at in range(0, len(text), 60))
    forms = [
        text,
        lines,
        "data:image/png;base64," + text,
        "data:;base64," + lines,
        "DATA:text/x;a=b;base64," + text,
    ]
    results = server.ask(images=forms).json()["results"]
    assert len({json.dumps(result["predictions"]) for result in results}) == 1


# ---- whatever comes ----

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)
LIMITS = Settings()
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["gram", "none", "auto", "{}", "cat", "data:;base64,", "http:", "//"])
)
NAME = st.text(max_size=5) | st.sampled_from(["class_set", "method", "steps", "host", "data", "id", "url"])
VALUE = st.recursive(LEAF, lambda of: st.lists(of, max_size=4) | st.dictionaries(NAME, of, max_size=4), max_leaves=4)
FIELD = st.sampled_from([*ClassifyRequest.model_fields, *Adaptation.model_fields, "class_set", "other"])
PIECE = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="image"',
        b'; filename="',
        *b'\r\n\r\n|\r\n|--b|--|:|=|;|x|name|\x00|\xff|"'.split(b"|"),
    ]
)


def only_api_errors(work: Callable[[], object]) -> None:
    with suppress(ApiError):
        work()


@repeatable
@given(st.dictionaries(FIELD, VALUE, max_size=9))
def test_any_json_object_is_a_request_or_an_api_error(data: dict[str, Any]) -> None:
    only_api_errors(lambda: ask(ClassifyRequest, data, LIMITS))


@repeatable
@given(st.lists(st.tuples(FIELD, st.text(max_size=10) | st.sampled_from(["1", "-1", "tpt", "cat"])), max_size=6))
def test_any_list_of_fields_is_a_question_or_an_api_error(fields: list[tuple[str, str]]) -> None:
    only_api_errors(lambda: question_of(fields, LIMITS))


@repeatable
@given(st.lists(PIECE, max_size=25).map(b"".join))
def test_any_bytes_are_a_form_or_an_api_error(content: bytes) -> None:
    only_api_errors(lambda: split_multipart(content, "multipart/form-data; boundary=b", max_parts=3))


@repeatable
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_json_or_an_api_error(content: bytes) -> None:
    only_api_errors(lambda: read_json(content))
