"""Routes that other clients speak, asked by those clients unchanged."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from openai import NotFoundError, OpenAI
from torch.nn import functional as F

from gram_core.backbone import Backbone
from gram_core.images import decode
from gram_core.text import TextEncoder
from gram_core.views import prepare
from server.auth import new_key
from server.client import GramClient
from tests.server_fixtures import Live, b64, code, live, png

NAMES = ["cat", "dog", "fire truck"]
TASK = "/hf/zero-shot-image-classification"


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[Live]:
    with live(fake=False, model=str(tiny_dir), device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def fake() -> Iterator[Live]:
    with live() as made:
        yield made


def name(server: Live) -> str:
    found: str = server.client.get("/v1/models").json()["data"][0]["id"]
    return found


# ---- Hugging Face ----


def test_the_hugging_face_client_gets_what_the_native_route_says(server: Live) -> None:
    client = InferenceClient(model=f"http://127.0.0.1:{server.port}{TASK}")
    picture = png(3, (40, 30))
    found = client.zero_shot_image_classification(picture, candidate_labels=NAMES)
    native = server.ask(picture, classes=NAMES, templates=["This is a photo of {}."], top_k=None).json()["results"][0]
    assert [(each.label, each.score) for each in found] == [(p["label"], p["score"]) for p in native["predictions"]]
    mine = client.zero_shot_image_classification(
        picture, candidate_labels=NAMES, hypothesis_template="a drawing of a {}."
    )
    native = server.ask(picture, classes=NAMES, templates=["a drawing of a {}."], top_k=None).json()["results"][0]
    assert [(each.label, each.score) for each in mine] == [(p["label"], p["score"]) for p in native["predictions"]]


def test_the_task_says_in_headers_what_its_answer_has_no_place_for(fake: Live) -> None:
    asked = {"inputs": b64(png(1)), "parameters": {"candidate_labels": NAMES, "adaptation": {"method": "none"}}, "x": 1}
    response = fake.client.post(TASK, json=asked)
    assert response.headers["x-gram-adaptation"] == "skipped;none_requested"
    assert response.headers["x-gram-brownout"] == "0"
    assert sorted(each["label"] for each in response.json()) == sorted(NAMES)
    tuned = {**asked, "parameters": {"labels": "cat, dog", "adaptation": {"method": "tpt", "scope": "image"}}}
    response = fake.client.post(f"/models/{name(fake)}", json=tuned)
    assert response.headers["x-gram-adaptation"] == "completed"
    assert sorted(each["label"] for each in response.json()) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ({"inputs": "x", "parameters": {"candidate_labels": NAMES}}, 400, "invalid_base64"),
        (
            {"inputs": "http://example.com/x.png", "parameters": {"candidate_labels": NAMES}},
            422,
            "url_input_unsupported",
        ),
        ({"inputs": b64(png()), "parameters": {}}, 422, "invalid_request"),
        ({"inputs": b64(png())}, 422, "invalid_request"),
        ({"parameters": {"candidate_labels": NAMES}}, 422, "invalid_request"),
        (
            {"inputs": b64(png()), "parameters": {"candidate_labels": NAMES, "hypothesis_template": "x"}},
            422,
            "bad_template",
        ),
        ({"inputs": b64(png()), "parameters": {"candidate_labels": 3}}, 422, "invalid_request"),
        (
            {"inputs": b64(png()), "parameters": {"candidate_labels": NAMES, "adaptation": {"steps": "x"}}},
            422,
            "invalid_request",
        ),
        ([], 422, "invalid_request"),
    ],
)
def test_what_the_task_can_not_answer_is_refused(fake: Live, asked: Any, status: int, expected: str) -> None:
    response = fake.client.post(TASK, json=asked)
    assert (response.status_code, code(response)) == (status, expected)


def test_another_models_name_is_404(fake: Live) -> None:
    asked = {"inputs": b64(png()), "parameters": {"candidate_labels": NAMES}}
    for response in (
        fake.client.post("/models/other", json=asked),
        fake.client.post("/v1/embeddings", json={"input": "a cat", "model": "other"}),
        fake.client.get("/v2/models/other"),
        fake.client.get("/v2/models/other/ready"),
    ):
        assert (response.status_code, code(response)) == (404, "model_not_found")


# ---- OpenAI ----


def test_the_openai_client_gets_the_towers_features(server: Live, tiny: Backbone) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    texts = ["a photo of a cat.", "a photo of a dog.", "a photo of a cat."]
    found = client.embeddings.create(input=texts, model=name(server))  # the client asks for base64
    got = torch.tensor([each.embedding for each in found.data])
    encoder = TextEncoder(tiny)
    expected = encoder.features(encoder.class_set(texts[:2], []))
    torch.testing.assert_close(got[:2], expected, rtol=0, atol=1e-6)
    assert torch.equal(got[0], got[2])
    assert [each.index for each in found.data] == [0, 1, 2]
    assert found.usage.prompt_tokens == found.usage.total_tokens > 3 * 5
    plain = client.embeddings.create(input=texts[0], model=name(server), encoding_format="float", dimensions=32)
    np.testing.assert_allclose(plain.data[0].embedding, got[0].numpy(), atol=1e-6)
    with pytest.raises(NotFoundError):
        client.embeddings.create(input="x", model="text-embedding-3-small")
    assert client.models.list().data[0].id == name(server)


def test_images_are_embedded_as_they_are_classified(server: Live, tiny: Backbone) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    pictures = [png(n, (40, 30)) for n in range(3)]
    coded = [b64(pictures[0]), "data:image/png;base64," + b64(pictures[1]), b64(pictures[2])]
    found = client.embeddings.create(input=coded, model=name(server), extra_body={"modality": "image"})
    got = torch.tensor([each.embedding for each in found.data])
    originals = torch.stack([prepare(tiny, decode(picture)).original for picture in pictures])
    torch.testing.assert_close(got, tiny.encode_images(originals), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
    texts = client.embeddings.create(input=[f"a photo of a {each}." for each in NAMES], model=name(server))
    features = F.normalize(torch.tensor([each.embedding for each in texts.data]), dim=-1)
    asked = {"classes": NAMES, "score": "cosine", "adaptation": {"method": "none"}, "top_k": None}
    answer = server.ask(*pictures, **asked).json()["results"]
    for row, result in zip(got @ features.T, answer, strict=True):
        said = {p["label"]: p["score"] for p in result["predictions"]}
        np.testing.assert_allclose(row, [said[each] for each in NAMES], atol=1e-5)


def test_our_own_client_asks_the_same_routes(server: Live) -> None:
    pictures = [png(n, (40, 30)) for n in range(3)]
    with GramClient(f"http://127.0.0.1:{server.port}") as client:
        rows = client.embed(["a cat", "a dog"])["data"]
        plain = server.client.post("/v1/embeddings", json={"input": ["a cat", "a dog"]}).json()["data"]
        assert [row["embedding"] for row in rows] == [row["embedding"] for row in plain]
        assert len(client.embed(images=pictures)["data"]) == 3
        made = client.class_set(NAMES)
        named = client.classify(pictures, class_set=made["id"], top_k=None)["results"]
        listed = server.ask(*pictures, classes=NAMES, top_k=None).json()["results"]
        assert [r["predictions"] for r in named] == [r["predictions"] for r in listed]
        server.client.delete(f"/v1/class-sets/{made['id']}")
        assert client.classify(pictures, class_set=made["id"])["class_set"]["id"] == made["id"]  # posted again


def test_a_key_pays_for_embeddings_and_class_sets_too(tmp_path: Path) -> None:
    key, line = new_key("one")
    (tmp_path / "keys").write_text(line)
    with live(api_keys_file=tmp_path / "keys", rate_cost=2.0, queue_seconds=1.0) as server:
        server.client.headers["authorization"] = f"Bearer {key}"
        asked = {"input": [b64(png(n)) for n in range(2)], "modality": "image"}
        statuses = [server.client.post("/v1/embeddings", json=asked).status_code for _ in range(4)]
        assert statuses[0] == 200
        assert 429 in statuses


def test_base64_is_float32_little_endian(fake: Live) -> None:
    asked = {"input": ["a cat", "a dog"]}
    plain = fake.client.post("/v1/embeddings", json=asked).json()["data"]
    coded = fake.client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()["data"]
    for one, other in zip(plain, coded, strict=True):
        np.testing.assert_array_equal(
            np.float32(one["embedding"]), np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "invalid_request"),
        ({"input": []}, "invalid_request"),
        ({"input": [1, 2, 3]}, "invalid_request"),
        ({"input": " "}, "invalid_request"),
        ({"input": "x" * 513}, "invalid_request"),
        ({"input": ["x"] * 2049}, "invalid_request"),
        ({"input": "x " * 100}, "class_text_too_long"),
        ({"input": "x", "encoding_format": "int8"}, "invalid_request"),
        ({"input": "x", "dimensions": 7}, "invalid_request"),
        ({"input": "x", "modality": "sound"}, "invalid_request"),
        ({"input": "eA==", "modality": "image"}, "unsupported_image_format"),
        ({"input": "http://example.com/", "modality": "image"}, "url_input_unsupported"),
        ({"input": ["eA=="] * 65, "modality": "image"}, "too_many_images"),
        ("x", "invalid_request"),
    ],
)
def test_what_can_not_be_embedded_is_refused(server: Live, asked: Any, expected: str) -> None:
    assert code(server.client.post("/v1/embeddings", json=asked)) == expected
    server.assert_well()


# ---- Open Inference Protocol ----


def test_health_and_metadata_are_the_protocols(fake: Live) -> None:
    assert fake.client.get("/v2/health/live").status_code == 200
    assert fake.client.get("/v2/health/ready").status_code == 200
    assert fake.client.get("/v2").json()["name"] == "gram"
    model = fake.client.get(f"/v2/models/{name(fake)}").json()
    assert (model["name"], [each["datatype"] for each in model["outputs"]]) == ("fake", ["FP32"])
    assert fake.client.get(f"/v2/models/{name(fake)}/ready").json() == {"name": "fake", "ready": True}
    assert fake.client.post(f"/v2/models/{name(fake)}/infer", json={}).status_code == 404


def test_the_routes_need_a_key_where_one_is_set(tmp_path: Path) -> None:
    key, line = new_key("one")
    (tmp_path / "keys").write_text(line)
    with live(api_keys_file=tmp_path / "keys") as server:
        client = InferenceClient(model=f"http://127.0.0.1:{server.port}{TASK}", api_key=key)
        assert len(client.zero_shot_image_classification(png(1), candidate_labels=NAMES)) == 3
        assert OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key).models.list().data
        assert server.client.get("/v2/health/live").status_code == 200
        for path in ("/v1/models", "/v2", "/v2/models/fake"):
            assert code(server.client.get(path)) == "unauthenticated"


def test_every_example_of_the_openapi_document_is_answered(server: Live) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    examples = {name: schema["examples"][0] for name, schema in schemas.items() if "examples" in schema}
    routes = {
        "ClassifyRequest": "/v1/classify",
        "ClassSetAsked": "/v1/class-sets",
        "SessionAsked": "/v1/sessions",
        "HuggingFaceAsked": TASK,
        "EmbeddingsAsked": "/v1/embeddings",
    }
    assert set(examples) == {*routes, "Question"}
    for kind, path in routes.items():
        if kind == "SessionAsked":
            continue  # this model has no root: below
        response = server.client.post(path, json=examples[kind])
        assert response.status_code in (200, 201), (kind, response.text)
    parts: list[Any] = [("image", ("x.png", png())), ("request", (None, json.dumps(examples["Question"])))]
    assert server.client.post("/v1/classify", files=parts).status_code == 200
    with live() as fake:
        assert fake.client.post("/v1/sessions", json=examples["SessionAsked"]).status_code == 201
