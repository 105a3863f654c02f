"""Whatever is asked gets a documented status and a documented body, and nothing of the caller in an error.

Two sources: schemathesis makes requests from the OpenAPI document, right and wrong ones; hypothesis tries what the
document can't say, against small models of what should happen. The default run tries the same cases each time;
`-m slow` tries up to a hundred times as many, other ones each time, and names the seed of what fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import jsonschema_rs
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from server import openapi, pages
from server.app import create_app
from server.errors import STATUS
from server.fake import CONTEXT, FakeClassifier
from server.schemas import Adaptation, Question
from server.settings import Settings
from tests.fuzz_fixtures import (
    FRIEND,
    HOST,
    SCALES,
    TALLY,
    Caller,
    calling,
    cover,
    fake_app,
    fuzz,
    fuzzed,
    operations,
    rounds,
)
from tests.server_fixtures import b64, body, png

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "openapi.json"
REQUESTS = 30  # of an operation
TINY, CATS = b64(png()), b"classes=cat&classes=dog"


PATHS = {"/openapi.json", *pages.FILES, *json.loads(DOCUMENT.read_text())["paths"]}
ADAPTATION = jsonschema_rs.validator_for(json.loads(DOCUMENT.read_text())["components"]["schemas"]["Adaptation"])


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    """Say how much was tried (`pytest -rP`)."""
    yield
    report = TALLY.report()
    print({name: value for name, value in report.items() if name != "rows"})  # noqa: T201


@pytest.fixture(scope="module")
def app() -> Iterator[Caller]:
    with calling(fake_app()) as caller:
        yield caller


# ---- the document ----


def test_the_committed_document_is_what_the_app_says() -> None:
    app = create_app(Settings(), FakeClassifier())
    assert DOCUMENT.read_text(encoding="utf-8") == openapi.text(app), "run make openapi and look at the difference"


def test_every_status_is_documented_for_a_classification_with_its_codes() -> None:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    responses = document["paths"]["/v1/classify"]["post"]["responses"]
    for code, status in STATUS.items():
        if status not in (404, 405):  # of paths and methods that are not documented
            assert f"`{code}`" in responses[str(status)]["description"]
    assert document["paths"]["/classify"]["post"] == {
        **document["paths"]["/v1/classify"]["post"],
        "operationId": "classify",
    }


def test_what_is_asked_of_adaptation_and_what_is_answered_are_two_schemas() -> None:
    schemas = json.loads(DOCUMENT.read_text(encoding="utf-8"))["components"]["schemas"]
    assert set(schemas["Adaptation"]["properties"]) == set(Adaptation.model_fields)
    answered = schemas["Result"]["properties"]["adaptation"]["anyOf"][0]["$ref"].rpartition("/")[2]
    assert {"entropy_before", "digest", "replay"} <= set(schemas[answered]["properties"])


def test_forms_and_queries_document_every_field_of_a_question() -> None:
    post = json.loads(DOCUMENT.read_text(encoding="utf-8"))["paths"]["/v1/classify"]["post"]
    fields = {*Question.model_fields, *Adaptation.model_fields, "class_set"} - {"adaptation"}
    assert {p["name"] for p in post["parameters"] if "name" in p} == fields
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {*fields, "image", "request"}


# ---- requests made from the document ----


BYTES = ("/import", "/reset")  # no JSON, so that nothing of it can be wrong
REFUSABLE = [(form, label) for form, label in operations() if "POST" in label and not label.endswith(BYTES)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("form", "label"), operations())
def test_what_the_document_allows_is_answered_or_refused_for_a_reason_it_cannot_say(
    app: Caller, form: str, label: str, scale: int
) -> None:
    seen: Counter[int] = Counter()
    for examples, seed in rounds(scale, REQUESTS):
        seen += fuzz(app, form, label, "positive", examples, seed)
    least = 1.0 if "GET" in label else 0.0 if form == "whole" else 0.05  # the rules between fields are in the forms
    if "{" in label:  # no id is known
        least = 0.0
    assert seen[200] >= least * seen.total(), "nearly nothing reached the classifier"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("form", "label"), REFUSABLE)
def test_what_the_document_forbids_is_refused(app: Caller, form: str, label: str, scale: int) -> None:
    for examples, seed in rounds(scale, REQUESTS):
        assert fuzz(app, form, label, "negative", examples, seed).total() > 0


@pytest.mark.parametrize(("form", "label"), [o for o in operations() if o[0] != "whole" or "GET" in o[1]])
def test_every_limit_of_the_document_is_kept_and_other_methods_are_405(app: Caller, form: str, label: str) -> None:
    seen = cover(app, form, label)
    assert seen[405] >= 6  # a path has one method, or two
    assert seen[200] >= 3 or "{" in label  # no id is known


# ---- properties ----


def dumps(request: Any) -> bytes:
    """JSON that can hold what UTF-8 can't: lone surrogates as escapes."""
    return json.dumps(request).encode()


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates and control characters too
NAMES = st.lists(
    ANY_TEXT
    | st.sampled_from(["cat", " cat", "caf\u00e9", "cafe\u0301", "\u212b", "\u00c5", "class_set", "{}", "\x1ccat"])
    | st.builds(
        lambda text, count: text * count, st.sampled_from(["x", "\u0958", "w ", "e\u0301"]), st.integers(0, 1100)
    ),
    max_size=6,
)


def spoken(text: str) -> bool:
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)


@fuzzed(names=NAMES)
def test_any_names_are_answered_as_they_are_called_or_refused_by_index(app: Caller, names: list[str]) -> None:
    kept = [unicodedata.normalize("NFC", name).strip() for name in names]
    fine = [
        1 <= len(name) <= 256 and len(raw) <= 1024 and spoken(name) and len(name.split()) <= CONTEXT
        for raw, name in zip(names, kept, strict=True)
    ]
    expected = 200 if names and all(fine) and len(set(kept)) == len(kept) else 422
    request = body(classes=names, top_k=None, score="cosine")
    reply = app.ask(dumps(request), sent=names)
    assert reply.status == expected, (names, reply.content)
    if expected == 200:
        ranked = {p["class_index"]: p["label"] for p in reply.json()["results"][0]["predictions"]}
        assert [ranked[index] for index in range(len(kept))] == kept
    elif names and not fine[int((reply.json()["error"]["param"] or "classes.0").split(".")[1])]:
        return  # the one that is told is one that is wrong
    else:
        assert reply.json()["error"]["code"] in ("duplicate_class", "invalid_request")


TEMPLATES = st.lists(
    st.lists(
        st.sampled_from(["{}", "{", "}", "{{}}", "{0}", "{:>9999999}", "a photo of a ", "\n"]) | ANY_TEXT, max_size=5
    ).map("".join),
    max_size=4,
)


@fuzzed(templates=TEMPLATES)
def test_a_template_has_one_place_for_the_name_and_no_other_brace(app: Caller, templates: list[str]) -> None:
    fine = all(
        text.count("{}") == 1 and text.count("{") == text.count("}") == 1 and spoken(text) and len(text) <= 512
        for text in templates
    )
    reply = app.ask(dumps(body(templates=templates)), sent=templates)
    assert reply.status == (200 if fine else 422), (templates, reply.content)


@fuzzed(
    data=st.binary(max_size=60),
    breaks=st.lists(st.tuples(st.integers(0, 80), st.sampled_from(["\r", "\n", "\r\n"])), max_size=4),
    damage=st.none() | st.tuples(st.integers(0, 80), st.text(max_size=2) | st.sampled_from(["=", "-", "_", " ", "\t"])),
    head=st.sampled_from(["", "data:;base64,", "data:image/png;base64,", "DATA:text/html;x=y;BASE64,"]),
)
def test_base64_is_the_standard_alphabet_with_padding_and_any_line_breaks(
    app: Caller, data: bytes, breaks: list[tuple[int, str]], damage: tuple[int, str] | None, head: str
) -> None:
    text = base64.b64encode(data).decode()
    for at, piece in [*breaks, *([damage] if damage else [])]:
        text = text[:at] + piece + text[at:]
    plain = re.sub("[\r\n]", "", text)
    fine = re.fullmatch(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", plain)
    posted = app.ask(dumps(body(images=[head + text])), sent=[text]).json()["error"]["code"]
    if (head + text).startswith("//"):  # no image that is served begins like that
        assert posted == "url_input_unsupported"
        return
    assert (posted == "invalid_base64") == (fine is None), (text, posted)
    if fine is not None:
        assert posted == app.ask(base64.b64decode(plain), "image/png", query=CATS).json()["error"]["code"]


@fuzzed(name=ANY_TEXT | st.none() | st.integers() | st.just("x" * 128) | st.just("x" * 129))
def test_an_id_comes_back_as_it_was_or_is_refused(app: Caller, name: Any) -> None:
    fine = name is None or (isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable())
    reply = app.ask(dumps(body(images=[{"data": TINY, "id": name}])), sent=[name])
    assert reply.status == (200 if fine else 422)
    if fine:
        assert reply.json()["results"][0]["id"] == name


# ---- queries, forms, options ----


@fuzzed(
    query=st.binary(max_size=40).map(lambda raw: bytes(b for b in raw if 32 < b < 127 and b != 35))
    | st.lists(
        st.tuples(
            st.sampled_from([*Question.model_fields, *Adaptation.model_fields, "class_set", "images", "zebracrossing"]),
            ANY_TEXT | st.sampled_from(["cat", "dog", "none", "1", "true", "-1", "9" * 18, "9" * 5000]),
        ),
        max_size=6,
    ).map(lambda pairs: "&".join(f"{name}={quote(text, errors='surrogatepass')}" for name, text in pairs).encode())
)
def test_any_query_is_a_question_or_refused(app: Caller, query: bytes) -> None:
    reply = app.ask(png(), "image/png", query=query, sent=[query.decode(), "class_set", "timeout_ms"])
    assert reply.status in (200, 400, 422, 501, 504)


@fuzzed(
    names=st.lists(
        ANY_TEXT.filter(lambda text: spoken(text) and text.strip()),
        min_size=2,
        max_size=5,
        unique_by=lambda text: unicodedata.normalize("NFC", text).strip(),
    ),
    plus=st.booleans(),
)
def test_names_in_a_query_are_read_as_browsers_write_them(app: Caller, names: list[str], plus: bool) -> None:
    write = quote_plus if plus else quote
    query = "&".join("classes=" + write(name) for name in names).encode()
    asked = [app.ask(png(), "image/png", query=query), app.ask(dumps(body(classes=names)))]
    assert asked[0].status == asked[1].status == 200
    assert asked[0].json()["results"] == asked[1].json()["results"]


TOKEN = st.text(st.sampled_from("abcXYZ0189'()+_,-./:=?"), min_size=1, max_size=70)
FILENAME = st.none() | st.text(st.characters(exclude_characters='"\r\n\\', exclude_categories=["Cs"]), max_size=20)


@fuzzed(
    names=st.lists(
        st.text("abc \u00e9\u732b-\r\n", min_size=1, max_size=8).filter(str.strip),
        min_size=2,
        max_size=4,
        unique_by=str.strip,
    ),
    boundary=TOKEN,
    filename=FILENAME,
    more=st.lists(
        st.sampled_from(["Content-Type: text/html", "X-A: b", "Content-Transfer-Encoding: base64"]),
        max_size=3,
        unique=True,
    ),
    ends=st.tuples(st.sampled_from([b"", b"\r\n"]), st.sampled_from([b"", b"\r\n", b"\r\nafter--"])),
    swap=st.booleans(),
)
def test_a_well_formed_form_is_the_same_question_however_it_is_put_together(
    app: Caller,
    names: list[str],
    boundary: str,
    filename: str | None,
    more: list[str],
    ends: tuple[bytes, bytes],
    swap: bool,
) -> None:
    names = [name.strip() for name in names]
    parts = [_part("image", filename, png(), more), *(_part("classes", None, name.encode(), []) for name in names)]
    line = b"--" + boundary.encode()
    assume(all(b"\r\n" + line not in part for part in parts) and all(spoken(name) for name in names))
    ordered = [*parts[1:], parts[0]] if swap else parts
    content = ends[0] + b"".join(line + b"\r\n" + part + b"\r\n" for part in ordered) + line + b"--" + ends[1]
    reply = app.ask(content, f'multipart/form-data; boundary="{boundary}"')
    assert reply.status == 200, reply.content
    assert reply.json()["results"] == app.ask(dumps(body(classes=names))).json()["results"]


def _part(name: str, filename: str | None, data: bytes, more: list[str]) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = "\r\n".join([f'Content-Disposition: form-data; name="{name}"{file}', *more])
    return head.encode() + b"\r\n\r\n" + data


PIECES = st.lists(
    st.sampled_from(
        [
            b"--b", b"--b--", b"\r\n", b"\r\n\r\n", b"Content-Disposition: form-data; name=", b'"image"', b'"classes"',
            b'"request"', b'; filename="x"', b"cat", b'{"classes": ["a", "b"]}', b"\x00", b"\xff", b":", png(),
        ]
    )
    | st.binary(max_size=5),
    max_size=20,
).map(b"".join)  # fmt: skip


@fuzzed(
    content=PIECES,
    media=st.sampled_from(
        [
            "multipart/form-data; boundary=b",
            "multipart/form-data",
            'multipart/form-data; boundary="b',
            "MULTIPART/form-data;boundary=b;boundary=c",
        ]
    ),
)
def test_any_bytes_called_a_form_are_refused_or_answered(app: Caller, content: bytes, media: str) -> None:
    assert app.ask(content, media).status in (200, 400, 413, 415, 422)


OPTION = st.sampled_from([*Adaptation.model_fields])
VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
    | st.sampled_from(
        ["gram", "infomax", "tpt", "none", "auto", "image", "batch", "residual", "coop", "shed", "reject", ""]
    )
    | st.text(max_size=5)
    | st.lists(st.integers(0, 1), max_size=1)
)


@fuzzed(options=st.dictionaries(OPTION, VALUE, max_size=4))
def test_the_server_takes_the_adaptations_that_the_document_allows_and_no_others(
    app: Caller, options: dict[str, Any]
) -> None:
    documented = ADAPTATION.is_valid(options)
    reply = app.ask(dumps(body(adaptation=options)), sent=options)
    code = None if reply.status == 200 else reply.json()["error"]["code"]
    if documented and options.get("replay") is None:  # whether a text is a token, no schema tells
        assert code in (None, "method_unavailable"), (options, code)
    elif documented:
        assert code in ("invalid_request", "replay_mismatch"), (options, code)
    else:
        assert code == "invalid_request", (options, code)


# ---- headers ----


LINE = st.binary(max_size=20).map(lambda raw: raw.translate(None, b"\r\n\x00"))


@fuzzed(given=LINE | st.text("aZ09._-", max_size=130).map(str.encode), trace=LINE)
def test_a_request_id_is_kept_if_it_can_be_and_replaced_otherwise(app: Caller, given: bytes, trace: bytes) -> None:
    reply = app.ask(method="GET", path="/info", headers=[("x-request-id", given), ("traceparent", trace)])
    assert reply.status == 200
    kept = re.fullmatch(rb"[A-Za-z0-9._-]{1,128}", given)
    own = reply.headers["x-request-id"]
    assert own == given.decode() if kept else re.fullmatch("req_[0-9a-f]{28}", own)


@fuzzed(
    host=LINE
    | st.builds(
        lambda *parts: "".join(parts).encode(),
        st.sampled_from([HOST, HOST.upper(), "localhost", "a@" + HOST, HOST + ".evil"]),
        st.sampled_from(["", ":80", ":65536", ":", "/", ".", "?x=" + HOST, "#"]),
    )
)
def test_only_the_servers_own_names_are_answered_to(app: Caller, host: bytes) -> None:
    own = re.fullmatch(rf"{HOST}(:[0-9]{{1,5}})?", host.decode("latin-1"), re.IGNORECASE) is not None
    own = own and int(host.partition(b":")[2] or 0) <= 65_535
    reply = app.ask(method="GET", path="/info", headers=[("host", host)], sent=[host.decode("latin-1")])
    assert reply.status == (200 if own else 421)
    assert app.ask(method="GET", path="/livez", headers=[("host", host)]).status == 200


@fuzzed(
    origins=st.lists(
        LINE
        | st.sampled_from(
            [
                FRIEND,
                f"http://{HOST}",
                f"https://{HOST}",
                f"http://{HOST}:81",
                "null",
                "https://evil.example",
                FRIEND + ".evil",
            ]
        ).map(str.encode),
        min_size=1,
        max_size=2,
    )
)
def test_another_origin_is_refused_unless_it_is_a_friend(app: Caller, origins: list[bytes]) -> None:
    fine = len(origins) == 1 and origins[0].lower() in [
        o.encode() for o in (FRIEND, f"http://{HOST}", f"https://{HOST}")
    ]
    headers = [("origin", origin) for origin in origins]
    reply = app.ask(dumps(body()), headers=headers, sent=[origin.decode("latin-1") for origin in origins])
    assert reply.status == (200 if fine else 403), origins
    assert ("access-control-allow-origin" in reply.headers) == (origins == [FRIEND.encode()])


KEY = "gk_" + "k" * 40
GIVEN = st.sampled_from(
    [KEY, KEY[:-1], KEY + "x", KEY.upper(), "", "k", f"Bearer {KEY}", f"bearer  {KEY}", f"Basic {KEY}", f"Bearer{KEY}"]
).map(str.encode)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("team:" + hashlib.sha256(KEY.encode()).hexdigest() + "\n")
    settings = Settings(allowed_hosts=(HOST,), api_keys_file=file)
    with calling(create_app(settings, FakeClassifier())) as caller:
        yield caller


@fuzzed(sent=st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key"]), LINE | GIVEN), max_size=3))
def test_only_one_right_key_opens_anything(locked: Caller, sent: list[tuple[str, bytes]]) -> None:
    presented = set()
    for name, value in sent:
        scheme, _, key = value.decode("latin-1").partition(" ")
        if name == "x-api-key":
            presented.add(value.decode("latin-1").strip())
        elif scheme.lower() == "bearer":
            presented.add(key.strip())
    reply = locked.ask(method="GET", path="/info", headers=sent, sent=[value.decode("latin-1") for _, value in sent])
    assert reply.status == (200 if presented == {KEY} else 401), sent


@fuzzed(
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), method=st.sampled_from(["GET", "PUT", "X"])
)
def test_any_other_path_is_not_found(app: Caller, path: str, method: str) -> None:
    assume(f"/{path}" not in PATHS)
    assert app.ask(method=method, path=f"/{path}", sent=[path]).status == 404


# ---- replay ----


@fuzzed(
    changes=st.lists(st.tuples(st.integers(0, 1023), st.sampled_from("AZaz09-_.=\n\u00e9")), max_size=2),
    cut=st.none() | st.integers(0, 1023),
    other=st.sampled_from([{}, {"classes": ["cat", "cow"]}, {"images": [b64(png(5))]}]),
)
def test_a_token_runs_what_it_recorded_or_is_refused(
    app: Caller, changes: list[tuple[int, str]], cut: int | None, other: dict[str, Any]
) -> None:
    first = app.ask(dumps(body(adaptation={"method": "tpt", "steps": 3, "views": 5}))).json()["results"][0]
    token = first["adaptation"]["replay"]
    changed = token[:cut]
    for at, letter in changes:
        at %= max(1, len(changed))
        changed = changed[:at] + letter + changed[at + 1 :]
    reply = app.ask(dumps({**body(adaptation={"replay": changed}), **other}), sent=[changed])
    if changed == token:
        assert reply.status == (409 if other else 200)
        if not other:
            assert reply.json()["results"][0]["adaptation"]["digest"] == first["adaptation"]["digest"]
    else:
        assert reply.status in (200, 409, 413, 422)
