"""Promises P1 to P5: an answer depends on its own request and nothing else, and can be had again.

A real miniature CLIP with a root, a bank and a checkpoint, over real HTTP. Comparisons are bit for bit unless stated.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gram_core.backbone import load
from gram_core.classifier import Classifier
from server.auth import new_key
from tests.conftest import TINY, write_model
from tests.gram_fixtures import write_checkpoint
from tests.process_fixtures import Process
from tests.server_fixtures import Live, b64, body, code, live, png

NAMES = ["cat", "dog", "fire truck", "a red bus", "house", "tree"]
MOVES = ("ms", "replay")  # of an adaptation: time, and the token of a plan that may hold less
IMAGES = [png(n, (30 + n % 9, 28 + n % 5)) for n in range(24)]
QUESTIONS: list[dict[str, Any]] = [
    {"images": range(8)},
    {"images": range(8), "classes": NAMES[:3]},
    {"images": range(3, 14), "adaptation": {"method": "infomax", "steps": 3}},
    {"images": range(8, 16), "adaptation": {"method": "infomax", "host": "coop", "steps": 2, "views": 4}},
    {"images": [1], "adaptation": {"method": "tpt", "views": 8}},
    {"images": [2, 5, 9], "adaptation": {"method": "tpt", "views": 8, "steps": 2}},
    {"images": [3, 4], "adaptation": {"method": "tpt", "views": 6, "host": "residual", "seed": 9}},
    {"images": [6, 7], "adaptation": {"method": "gram", "scope": "image", "views": 4}},
    {"images": range(4), "adaptation": {"method": "none"}},
    {"images": [20, 21], "classes": {"a": ["a photo of a cat.", "a cat"], "b": ["a dog"]}},
    {"images": [22], "classes": ["one"], "score": "cosine"},
    {"images": range(9), "explain": True},
    {"images": range(8), "adaptation": {"budget_ms": 0}},
]
# alike in class set, so that their tunings share passes
SHARED = [{"images": [n], "adaptation": {"method": "tpt", "views": 8}} for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("models") / "isolated", TINY, seed=3)
    write_checkpoint(made, load(str(made), device="cpu"))
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with live(fake=False, model=str(folder), device="cpu", timeout_ms=60_000, brownout=(), queue_seconds=600.0) as made:
        made.client.timeout = httpx.Timeout(60)
        yield made


def request(question: dict[str, Any]) -> dict[str, Any]:
    fields = {"classes": NAMES, "top_k": None, **question}
    images = [IMAGES[n] for n in fields.pop("images")]
    return body(*images, **fields)


def ask(client: httpx.Client, question: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post("/v1/classify", json=request(question))
    assert response.status_code == 200, response.text[:500]
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def settled(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what may differ between two runs of the same."""
    return [{**r, "adaptation": {k: v for k, v in r["adaptation"].items() if k not in MOVES}} for r in results]


# ---- company ----


def test_32_clients_at_once_get_what_each_gets_alone(server: Live) -> None:
    """Beside neighbours that are refused, that leave, and that share their passes."""
    questions = [*QUESTIONS, *SHARED]
    alone = [settled(ask(server.client, question)) for question in questions]
    rng = random.Random(0)
    order = [rng.randrange(len(questions)) for _ in range(128)]

    def one(n: int) -> None:
        if n % 8 == 3:
            assert code(server.client.post("/classify", json=body(b"no image"))) == "unsupported_image_format"
        if n % 8 == 5:
            with pytest.raises(httpx.ReadTimeout):
                server.client.post("/classify", json=request(QUESTIONS[3]), timeout=0.02)
        assert settled(ask(server.client, questions[order[n]])) == alone[order[n]]

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(one, range(len(order))))
    batches, images = server.metric("gram_batches_total"), server.metric("gram_images_total")
    assert images > 1.5 * batches  # they did share
    server.assert_well()


def test_the_third_of_a_b_a_equals_the_first(server: Live) -> None:
    for other in QUESTIONS:
        first = settled(ask(server.client, QUESTIONS[0]))
        ask(server.client, other)
        assert settled(ask(server.client, QUESTIONS[0])) == first


def test_no_weight_has_changed_after_all_of_this(server: Live) -> None:
    classifier = server.service.engine.classifier
    assert isinstance(classifier, Classifier)
    classifier.sentinel.check(len(classifier.sentinel))  # type: ignore[arg-type]
    assert server.metric("gram_weights_intact") == 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_baseline_is_what_none_answers(server: Live, question: dict[str, Any]) -> None:
    plain = ask(server.client, {**question, "explain": False, "adaptation": {"method": "none"}})
    for adapted, none in zip(ask(server.client, question), plain, strict=True):
        assert adapted["baseline"] == none["baseline"]
        assert none["predictions"] == none["baseline"]["predictions"]


# ---- the same request in other words ----


def scores(results: list[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    return {r["id"] or str(r["index"]): [(p["label"], p["score"]) for p in r["predictions"]] for r in results}


@pytest.mark.parametrize("adaptation", [{}, {"method": "tpt", "views": 8}, {"method": "infomax", "steps": 2}])
def test_permuted_images_give_permuted_answers_and_equal_images_equal_ones(
    server: Live, adaptation: dict[str, Any]
) -> None:
    order = [*range(9), 0]
    first = ask(server.client, {"images": order, "adaptation": adaptation})
    shuffled = random.Random(1).sample(range(10), 10)
    second = ask(server.client, {"images": [order[n] for n in shuffled], "adaptation": adaptation})
    for place, n in enumerate(shuffled):
        assert second[place]["predictions"] == first[n]["predictions"]
        assert second[place]["adaptation"]["digest"] == first[n]["adaptation"]["digest"]
    assert first[0]["predictions"] == first[9]["predictions"]


@pytest.mark.parametrize("adaptation", [{"method": "none"}, {"method": "tpt", "views": 8}, {"method": "infomax"}])
def test_permuted_classes_give_the_same_scores(server: Live, adaptation: dict[str, Any]) -> None:
    first = ask(server.client, {"images": range(8), "adaptation": adaptation})
    second = ask(server.client, {"images": range(8), "adaptation": adaptation, "classes": NAMES[::-1]})
    for a, b in zip(first, second, strict=True):
        theirs = {p["label"]: p["score"] for p in b["predictions"]}
        assert all(abs(p["score"] - theirs[p["label"]]) < 1e-5 for p in a["predictions"])


def test_what_does_not_ask_for_another_answer_gets_the_same(server: Live) -> None:
    asked = {"images": range(8), "adaptation": {"seed": 5}}
    first = ask(server.client, asked)
    digests = [r["adaptation"]["digest"] for r in first]
    for more in ({"explain": True}, {"top_k": 1}, {"errors": "per_item"}, {"timeout_ms": 50_000}, {"score": "logit"}):
        assert [r["adaptation"]["digest"] for r in ask(server.client, {**asked, **more})] == digests
    parts = [("image", (f"{n}.png", IMAGES[n], "image/png")) for n in range(8)]
    fields = [("classes", (None, name)) for name in NAMES] + [("seed", (None, "5"))]
    form = server.client.post("/classify", files=[*parts, *fields])
    assert [r["adaptation"]["digest"] for r in form.json()["results"]] == digests
    named = {**request(asked), "images": [{"data": b64(IMAGES[n]), "id": f"n{n}"} for n in range(8)]}
    response = server.client.post("/classify", json=named)
    assert [r["adaptation"]["digest"] for r in response.json()["results"]] == digests
    sentences = {name: [f"a photo of a {name}."] for name in NAMES}
    for a, b in zip(first, ask(server.client, {**asked, "classes": sentences}), strict=True):
        assert a["baseline"] == b["baseline"]


def test_no_steps_from_the_default_template_are_zero_shot(server: Live) -> None:
    for result in ask(server.client, {"images": [1], "adaptation": {"method": "tpt", "steps": 0, "views": 4}}):
        before = {p["label"]: p["score"] for p in result["baseline"]["predictions"]}
        assert all(abs(p["score"] - before[p["label"]]) < 1e-5 for p in result["predictions"])


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_number_makes_sense(server: Live, question: dict[str, Any]) -> None:
    for result in ask(server.client, question):
        did = result["adaptation"]
        if question.get("score", "softmax") == "softmax":
            assert abs(sum(p["score"] for p in result["predictions"]) - 1) < 1e-5
        most = np.log(len(question.get("classes", NAMES))) + 1e-5
        assert -1e-6 <= did["entropy_before"] <= most
        assert -1e-6 <= did["entropy_after"] <= most
        assert did["kl"] >= -1e-6
        assert 0 <= did["steps"] <= did["steps_requested"] or did["status"] == "skipped"


# ---- replay ----


def replay(client: httpx.Client, question: dict[str, Any], result: dict[str, Any], **changed: Any) -> httpx.Response:
    asked = {**question, "adaptation": {"replay": result["adaptation"]["replay"]}, **changed}
    if result["adaptation"]["scope"] == "image" and "images" not in changed:
        asked["images"] = [list(question["images"])[result["index"]]]
    return client.post("/v1/classify", json=request(asked))


def replayed(client: httpx.Client, question: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Every token gives its own digest, and says of itself what was said at first."""
    for result in results:
        response = replay(client, question, result)
        assert response.status_code == 200, response.text
        place = 0 if result["adaptation"]["scope"] == "image" else result["index"]
        again = response.json()["results"][place]
        assert again["adaptation"]["digest"] == result["adaptation"]["digest"]
        assert again["predictions"] == result["predictions"]
        told = ("method", "host", "scope", "status", "reason", "steps", "steps_requested", "views", "views_requested")
        assert {k: again["adaptation"][k] for k in told} == {k: result["adaptation"][k] for k in told}
        assert again["adaptation"]["replay"] == result["adaptation"]["replay"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_token_gives_the_answer_again(server: Live, question: dict[str, Any]) -> None:
    results = ask(server.client, question)
    assert all(len(r["adaptation"]["replay"]) <= 1024 for r in results)
    replayed(server.client, question, results[:3])


def test_a_tuning_that_ran_out_of_time_can_be_had_again(server: Live) -> None:
    question = {"images": range(8), "adaptation": {"method": "infomax", "host": "coop", "steps": 64, "views": 8}}
    for budget_ms in (1, 40, 150):
        asked = {**question, "adaptation": {**question["adaptation"], "budget_ms": budget_ms}}
        results = ask(server.client, asked)
        assert {r["adaptation"]["reason"] for r in results} <= {"budget", "not_accepted", "kl_cap", "diverged"}
        assert results[0]["adaptation"]["steps"] < 64
        replayed(server.client, question, results[:1])


def test_what_differs_is_named(server: Live) -> None:
    question = QUESTIONS[0]
    (result, *_) = ask(server.client, question)

    def told(response: httpx.Response) -> str:
        assert code(response) == "replay_mismatch"
        return str(response.json()["error"]["message"])

    assert "another images" in told(replay(server.client, question, result, images=range(1, 9)))
    assert "another classes" in told(replay(server.client, question, result, classes=NAMES[:4]))
    both = replay(server.client, question, result, classes=NAMES[:4], images=range(7))
    assert "another classes" in told(both)


def test_a_token_outlives_the_process(server: Live, folder: Path, start: Callable[..., Process]) -> None:
    kept = [(question, ask(server.client, question)[:1]) for question in QUESTIONS]
    import torch

    threads = str(torch.get_num_threads())
    same = start("-m", "server", "--model", str(folder), "--device", "cpu", "--port", "0", OMP_NUM_THREADS=threads)
    with same.client() as client:
        for question, results in kept:
            replayed(client, question, results)


def test_a_token_is_bound_to_its_build(server: Live, folder: Path) -> None:
    question = QUESTIONS[4]
    (result,) = ask(server.client, question)
    with live(fake=False, model=str(folder), device="cpu", text_group=2) as other:
        response = replay(other.client, question, result)
        assert code(response) == "replay_mismatch"
        assert "another build" in response.json()["error"]["message"]


# ---- what one caller's images leave behind ----


def test_nothing_of_one_callers_image_reaches_another(folder: Path, tmp_path: Path) -> None:
    marker = b"CANARY-7f3a91"
    keys = [new_key(name) for name in ("one", "two")]
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line in keys))
    marked = IMAGES[0][:-12] + b"\x00\x00\x00\x15tEXtComment\x00" + marker + b"\0\0\0\0" + IMAGES[0][-12:]
    with live(fake=False, wait=False, model=str(folder), device="cpu", api_keys_file=file) as server:
        headers = [{"x-api-key": key} for key, _ in keys]
        while server.client.get("/readyz").status_code != 200:
            pass
        first = server.client.post("/classify", json=body(marked, explain=True), headers=headers[0])
        assert first.status_code in (200, 422)
        digest = hashlib.sha256(marked).hexdigest().encode()
        for n in range(40):
            asked = body(IMAGES[1 + n % 20], explain=True, classes=("cat", "dog"))
            other = server.client.post("/classify", json=asked, headers=headers[1])
            assert other.status_code == 200
            assert marker not in other.content
            assert b64(marker).encode() not in other.content
            assert digest not in other.content
