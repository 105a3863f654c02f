"""The server from outside: the forms of a request, isolation, load, time, probes, metrics, start and stop."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from gram_core.errors import DeviceError, ModelUnavailable, OutOfMemory
from gram_core.images import decode
from gram_core.types import Plan
from server.app import create_app
from server.engine import Classifier
from server.errors import RETRYABLE, STATUS
from server.fake import FakeClassifier
from server.settings import InvalidSettings, Settings, read_settings, usage
from tests.server_fixtures import (
    FailingClassifier,
    HeldClassifier,
    Live,
    answered,
    b64,
    body,
    code,
    live,
    png,
    until,
)

ROOT = Path(__file__).parents[1]
PROBES = ("/livez", "/readyz", "/startupz", "/health", "/healthz", "/ping")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


def results(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text[:500]
    found: list[dict[str, Any]] = answered(response).json()["results"]
    return found


# ---- one question, many forms ----


def test_json_form_request_part_and_raw_body_give_the_same_answer(server: Live) -> None:
    options = {"method": "tpt", "views": "16", "seed": "7", "explain": "true"}
    asked = {
        "classes": ["cat", "dog", "a, b"],
        "adaptation": {"method": "tpt", "views": 16, "seed": 7},
        "explain": True,
    }
    file = {"image": ("a.jpg", png(3))}
    form = {"classes": asked["classes"], **options}
    query = [("classes", name) for name in asked["classes"]] + list(options.items())
    post = server.client.post
    answers = [
        post("/v1/classify", json={"images": [b64(png(3))], **asked}),
        post("/classify", json={"images": [{"data": b64(png(3)), "id": None}], **asked}),
        post("/classify", files=file, data=form),
        post("/classify", files={**file, "request": (None, json.dumps(asked), "application/json")}),
        post("/classify", files={**file, "request": ("blob", json.dumps(asked), "application/json")}),
        post("/classify", params=query, content=png(3), headers={"content-type": "image/jpeg"}),
        post("/classify", params=query, content=png(3), headers={"content-type": "application/octet-stream"}),
    ]
    seen = {json.dumps(results(answer)) for answer in answers}
    assert len(seen) == 1
    (only,) = results(answers[0])
    assert (only["adaptation"]["views"], only["adaptation"]["method"]) == (16, "tpt")
    assert len(only["explain"]["views"]) == 16


def test_an_answer_says_what_was_used_and_what_it_cost(server: Live) -> None:
    answer = server.ask(png(1), png(2), adaptation={"method": "tpt", "views": 10}).json()
    assert answer["object"] == "classification"
    assert abs(answer["created"] - time.time()) < 60
    info = FakeClassifier().info
    assert answer["model"] == {
        "name": "fake",
        "weights_sha256": info.weights_sha256,
        "checkpoint_sha256": None,
    }
    assert re.fullmatch("cs_[0-9a-f]{32}", answer["class_set"]["id"])
    assert answer["class_set"]["size"] == 2
    assert answer["usage"] == {
        "images": 2,
        "classes": 2,
        "image_passes": 2,
        "text_passes": 2,
        "cost": 22.0,
        "brownout": 0,
    }
    assert list(answer["timings_ms"]) == ["body", "decode", "queue", "text", "image", "adapt", "total"]
    assert answer["results"][1]["index"] == 1
    assert answer["results"][1]["image"] == {"width": 9, "height": 7, "format": "png", "notes": []}


def test_the_baseline_of_an_adapted_answer_is_what_method_none_returns(server: Live) -> None:
    (adapted,) = results(server.ask(png(4), adaptation={"method": "tpt"}))
    (plain,) = results(server.ask(png(4), adaptation={"method": "none"}))
    assert adapted["predictions"] != adapted["baseline"]["predictions"]
    assert adapted["baseline"] == plain["baseline"]
    assert plain["predictions"] == plain["baseline"]["predictions"]
    assert plain["adaptation"]["reason"] == "none_requested"


def test_reasons_are_told_when_asked_for_and_null_otherwise(server: Live) -> None:
    (silent,), (told,) = (results(server.ask(png(4), explain=asked)) for asked in (False, True))
    assert silent.pop("explain") is None
    assert set(told["explain"]) == {"views", "prototypes", "trust", "shift", "skew", "rho", "structure_share",
                                    "prompt_shift"}  # fmt: skip
    assert set(told["explain"]["views"][0]) == {"box", "flip", "entropy", "kept"}
    assert set(told["explain"]["prototypes"][0]) == {"name", "weight"}
    assert silent == {name: value for name, value in told.items() if name != "explain"}


@pytest.mark.parametrize("score", ["softmax", "cosine", "logit"])
def test_scores_are_the_cores_own_sorted_and_cut(server: Live, score: str) -> None:
    names = [f"class {n}" for n in range(20)]
    (result,) = results(server.ask(png(6), classes=names, top_k=7, score=score))
    fake = FakeClassifier()
    classes = fake.class_set(names)
    plan = Plan(method="none", host=None, scope="batch", steps=0, views=1, seed=0, skip="none_requested")
    expected = fake.classify([fake.prepare(decode(png(6)))], classes, plan).results[0].scores(score)
    ranked = sorted(range(20), key=lambda k: (-expected[k], k))[:7]
    assert [p["class_index"] for p in result["predictions"]] == ranked
    assert [p["score"] for p in result["predictions"]] == [float(expected[k]) for k in ranked]
    assert (result["label"], result["score"]) == (names[ranked[0]], float(expected[ranked[0]]))


def test_all_classes_are_listed_when_top_k_is_null(server: Live) -> None:
    (result,) = results(server.ask(classes=[f"c{n}" for n in range(30)], top_k=None))
    assert len(result["predictions"]) == 30
    assert sum(p["score"] for p in result["predictions"]) == pytest.approx(1.0, abs=1e-5)


def test_an_images_id_is_echoed(server: Live) -> None:
    images = [{"data": b64(png(n)), "id": f"shelf-\u00e9-{n}"} for n in range(3)]
    assert [r["id"] for r in results(server.ask(images=images))] == [image["id"] for image in images]


def test_eight_images_are_tuned_together_and_seven_are_not(server: Live) -> None:
    statuses = [results(server.ask(*(png(n) for n in range(count))))[0]["adaptation"]["status"] for count in (7, 8)]
    assert statuses == ["skipped", "completed"]


def test_an_image_that_drops_out_can_take_the_batch_below_its_size(server: Live) -> None:
    images = [b64(png(n)) for n in range(7)] + ["????"]
    found = results(server.ask(images=images, errors="per_item"))
    assert found[0]["adaptation"]["reason"] == "too_few_images"
    assert found[7]["error"]["code"] == "invalid_base64"


def test_the_operators_defaults_are_the_models_defaults() -> None:
    seen: dict[str, Any] = {}
    loaded = ast.parse((ROOT / "server" / "service.py").read_text())
    call = next(
        node for node in ast.walk(loaded) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Loaded.load"
    )
    for keyword in call.keywords:
        seen[str(keyword.arg)] = ast.unparse(keyword.value)
    for name in ("default_method", "default_steps", "default_views", "default_batch_views", "kl_cap", "checkpoint"):
        assert seen[name] == f"settings.{name}"


# ---- many at once ----


def test_concurrent_requests_never_see_each_other() -> None:
    """Every request has its own image, classes and form; an answer to another would differ in its labels."""
    with live() as server:

        def expected(seed: int) -> str:
            return json.dumps(results(ask(seed)))

        def ask(seed: int) -> httpx.Response:
            names = [f"{seed}-{n}" for n in range(3 + seed % 4)]
            if seed % 3 == 0:
                return server.client.post(
                    "/classify", files={"image": ("a", png(seed))}, data={"classes": names, "method": "tpt"}
                )
            return server.ask(png(seed), classes=names, adaptation={"method": "tpt"})

        alone = [expected(seed) for seed in range(24)]
        with ThreadPoolExecutor(12) as pool:
            crowd = list(pool.map(expected, list(range(24)) * 5))
        assert crowd == alone * 5
        server.assert_well()
        assert server.metric("gram_requests_inflight") == 1  # the scrape itself
        assert server.metric("gram_ingress_bytes") == 0
        assert server.metric("gram_queue_cost") == 0


def test_a_bug_in_one_request_is_its_own_500_and_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with live(FailingClassifier(ValueError("secret /path 0xdeadbeef"))) as server:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.ask, classes=["bad", "dog"] if n % 2 else ["cat", "dog"]) for n in range(12)]
        for n, future in enumerate(asked):
            response = future.result()
            assert response.status_code == (500 if n % 2 else 200)
            if n % 2:
                assert code(response) == "internal"
                assert "secret" not in response.text
                request_id = response.headers["x-request-id"]
                assert any(getattr(r, "fields", {}).get("request_id") == request_id for r in caplog.records)
        server.assert_well()


def test_a_bug_while_formatting_is_a_500_as_well() -> None:
    class Odd(FakeClassifier):
        def class_set(self, classes: Any, templates: Any = None) -> Any:
            return super().class_set(classes, templates) if "bad" not in classes else object()

    with live(Odd()) as server:
        assert code(server.ask(classes=["bad", "dog"])) == "internal"
        server.assert_well()


def test_out_of_memory_is_retryable_and_survived() -> None:
    with live(FailingClassifier(OutOfMemory("cuda 0x7f00"))) as server:
        response = server.ask(classes=["bad", "dog"])
        assert code(response) == "accelerator_failed"
        assert "0x7f" not in response.text
        server.assert_well()


def test_a_failed_device_turns_every_probe_at_once() -> None:
    with live(FailingClassifier(DeviceError("illegal access"))) as server:
        assert code(server.ask(classes=["bad", "dog"])) == "accelerator_failed"
        assert [server.client.get(path).status_code for path in ("/livez", "/readyz")] == [503, 503]
        assert code(server.ask()) == "accelerator_failed"
        assert server.metric("gram_device_healthy") == 0


# ---- load and time ----


@contextmanager
def busy(**settings: Any) -> Iterator[tuple[Live, HeldClassifier, ThreadPoolExecutor]]:
    """A server whose engine is held by one request until the gate is opened."""
    classifier = HeldClassifier()
    with live(classifier, **settings) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask)
        until(lambda: classifier.runs, "the engine is busy")
        try:
            yield server, classifier, pool
        finally:
            classifier.gate.set()
            assert first.result().status_code == 200
        server.assert_well()


def test_a_full_queue_is_429_with_retry_after_and_the_rest_is_answered() -> None:
    with busy(max_request_cost=3.0) as (server, classifier, pool):
        waiting = pool.submit(server.ask, png(1), png(2))
        until(lambda: server.service.engine.queue_cost == 2, "the second request waits")
        refused = server.ask(png(1), png(2))
        assert code(refused) == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert server.metric("gram_rejected_total", reason="queue") == 1
        assert server.metric("gram_queue_cost") == 2
        assert server.metric("gram_queue_requests") == 1
        assert server.client.get("/readyz").status_code == 200
        classifier.gate.set()
        assert waiting.result().status_code == 200


def test_a_request_that_costs_too_much_is_413() -> None:
    with live(max_request_cost=100.0) as server:
        response = server.ask(png(1), png(2), adaptation={"method": "tpt"})
        assert code(response) == "request_too_costly"
        assert "costs 130, the limit is 100" in response.json()["error"]["message"]
        server.assert_well()


def test_the_deadline_is_answered_on_time_even_for_a_queued_request() -> None:
    with busy() as (server, classifier, _):
        started = time.monotonic()
        assert code(server.ask(png(1), timeout_ms=60)) == "deadline_exceeded"
        assert time.monotonic() - started < 2
        assert server.service.engine.queue_cost == 0
        assert server.metric("gram_rejected_total", reason="deadline") == 1
        classifier.gate.set()
    assert len(classifier.runs) == 2  # the first, and the one that checks: never the late one


def test_the_deadline_of_a_running_request_is_answered_on_time_and_its_bytes_are_held_until_it_ends() -> None:
    classifier = HeldClassifier()
    with live(classifier) as server:

        def overtaken() -> bool:  # on a busy machine 60 ms can pass before the engine has the request: ask again
            assert code(server.ask(timeout_ms=60)) == "deadline_exceeded"
            return bool(classifier.runs)

        until(overtaken, "the deadline of a running request passes")
        assert server.service.budget.held > 0
        classifier.gate.set()
        until(lambda: server.service.budget.held == 0, "the bytes are given back")
        server.assert_well()


def test_bytes_in_flight_are_bounded() -> None:
    limits = {"max_body_bytes": 10_000, "max_image_pixels": 100, "max_request_pixels": 100}
    with busy(max_inflight_bytes=10_300, **limits) as (server, _, pool):
        big = body(classes=["x" * 250 + str(n) for n in range(36)])
        waiting = pool.submit(server.client.post, "/classify", json=big)
        until(lambda: server.service.engine.queue_cost == 1, "a large request waits")
        assert code(server.client.post("/classify", json=big)) == "overloaded"
        assert server.metric("gram_rejected_total", reason="bytes") == 1
        server.service.engine.classifier.gate.set()  # type: ignore[union-attr]
        assert waiting.result().status_code == 200


def test_a_client_that_leaves_while_queued_is_dropped_before_its_turn() -> None:
    with busy() as (server, classifier, _):
        with server.connect() as connection:
            connection.sendall(request_bytes(json.dumps(body(png(9))).encode()))
            until(lambda: server.service.engine._queue, "it waits")
        until(lambda: server.metric("gram_client_disconnects_total", stage="queue") == 1, "it is dropped")
        assert server.service.engine.queue_cost == 0
        assert server.metric("gram_requests_total", code="499", route="/classify") == 1
        classifier.gate.set()
    assert len(classifier.runs) == 2


def test_a_client_that_leaves_while_its_request_runs_gives_everything_back() -> None:
    classifier = HeldClassifier()
    with live(classifier) as server:
        with server.connect() as connection:
            connection.sendall(request_bytes(json.dumps(body()).encode()))
            until(lambda: classifier.runs, "it runs")
        until(lambda: server.metric("gram_client_disconnects_total", stage="adapt") == 1, "it is counted")
        classifier.gate.set()
        server.assert_well()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted() -> None:
    with live() as server:
        with server.connect() as connection:
            connection.sendall(request_bytes(b"x" * 1000)[:-500])
            until(lambda: server.service.budget.held == 1000, "the body is awaited")
        until(lambda: server.metric("gram_client_disconnects_total", stage="body") == 1, "it is counted")
        server.assert_well()


def test_probes_are_answered_while_the_engine_works_and_while_images_are_decoded() -> None:
    with busy() as (server, _, pool):
        uploads = [pool.submit(server.ask, *[png(n, (900, 900)) for n in range(4)]) for _ in range(3)]
        slowest = 0.0
        for _ in range(40):
            started = time.monotonic()
            assert server.client.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 1.0  # milliseconds in fact; the machine may be busy with other things
        server.service.engine.classifier.gate.set()  # type: ignore[union-attr]
        assert {upload.result().status_code for upload in uploads} == {200}


# ---- bodies on the wire ----


def request_bytes(content: bytes, *more: str, length: int | None = None) -> bytes:
    lines = [
        "POST /classify HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content) if length is None else length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def test_a_declared_length_above_the_cap_is_413_before_anything_is_read() -> None:
    with live(max_body_bytes=10_000) as server:
        head = server.raw(request_bytes(b"", length=10_001))
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_large" in head
        assert b"connection: close" in head.lower()
        assert server.raw(request_bytes(b"", length=10**17)).startswith(b"HTTP/1.1 413 ")
        assert code(server.client.post("/nowhere", content=bytes(10_001))) == "body_too_large"
        server.assert_well()


def test_a_large_upload_is_refused_without_breaking_an_ordinary_client() -> None:
    with live(max_body_bytes=10_000) as server:
        response = server.client.post("/classify", content=bytes(3_000_000), headers={"content-type": "image/png"})
        assert code(response) == "body_too_large"
        server.assert_well()


def test_a_chunked_body_is_cut_at_the_cap() -> None:
    with live(max_body_bytes=10_000) as server:

        def endless() -> Iterator[bytes]:
            while True:
                yield bytes(5000)

        headers = {"content-type": "application/json"}
        try:
            response = server.client.post("/classify", content=endless(), headers=headers)
        except httpx.WriteError:  # the server hung up while we were still talking
            pass
        else:
            assert code(response) == "body_too_large"
        server.assert_well()
        chunked = (json.dumps(body()).encode()[at : at + 50] for at in range(0, 9000, 50))
        response = server.client.post("/classify", content=chunked, headers=headers)
        assert response.status_code == 200


def test_a_body_that_does_not_arrive_is_408() -> None:
    with live(body_timeout_s=0.05) as server:
        answer = server.raw(request_bytes(b"{", length=100))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in answer
        server.assert_well()


@pytest.mark.parametrize(
    "head",
    [
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: five\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0"
        b"\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_what_is_not_http_is_answered_with_an_envelope_and_a_closed_connection(server: Live, head: bytes) -> None:
    answer = server.raw(head)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_body"
    server.assert_well()


# ---- headers and routes ----


def test_a_request_id_is_kept_if_it_is_harmless_and_replaced_if_not(server: Live) -> None:
    for given, kept in (("abc-1.2_3", True), ("x" * 129, False), ("a b", False), ("\u00e9", False), ("", False)):
        response = server.client.get("/livez", headers={"x-request-id": given.encode()})
        assert (response.headers["x-request-id"] == given) is kept
    response = server.client.post("/classify", json=body(), headers={"x-request-id": "mine"})
    assert response.json()["id"] == "mine"
    assert server.ask().json()["id"].startswith("req_")


def test_the_model_is_named_in_a_header(server: Live) -> None:
    tag = FakeClassifier().info.weights_sha256[:12]
    assert server.client.get("/livez").headers["x-gram-model"] == tag
    assert server.client.get("/nope").headers["x-gram-model"] == tag


@pytest.mark.parametrize(
    "path", ["/ui", "/ui/", "/docs", "/redoc", "/v1/classify/", "/v1//classify", "/V1/classify", "/livez/x"]
)
def test_unknown_paths_are_404_and_slashes_are_not_forgiven(server: Live, path: str) -> None:
    assert code(server.client.post(path, content=b"")) == "not_found"
    assert code(server.client.get(path)) == "not_found"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_405_with_the_right_one_named(server: Live, method: str) -> None:
    response = server.client.request(method, "/v1/classify")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        assert code(response) == "method_not_allowed"


@pytest.mark.parametrize("path", PROBES)
def test_probes_answer_get_and_head(server: Live, path: str) -> None:
    assert server.client.get(path).status_code == 200
    head = server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert server.client.post(path).status_code == 405


def test_info_names_the_model_and_every_limit(server: Live) -> None:
    info = server.client.get("/info").json()
    assert info["model"] == json.loads(json.dumps(asdict(FakeClassifier().info)))
    assert info["limits"]["max_images"] == 64
    assert {"max_image_bytes", "max_body_bytes", "max_classes", "max_texts", "max_request_cost"} <= set(info["limits"])


# ---- start-up ----


def test_a_server_that_loads_is_alive_but_not_ready_and_says_how_far_it_is() -> None:
    loaded = threading.Event()

    def load() -> Classifier:
        assert loaded.wait(10)
        return FakeClassifier()

    with live(load=load, wait=False) as server:
        until(lambda: server.client.get("/startupz").json()["phase"] == "load", "it loads")
        assert server.client.get("/startupz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        ready = server.client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"] == {
            "engine": True,
            "model": False,
            "weights": False,
            "warmup": False,
            "device": True,
            "not_draining": True,
        }
        assert code(server.ask()) == "not_ready"
        assert code(server.client.get("/info")) == "not_ready"
        assert "x-gram-model" not in ready.headers
        loaded.set()
        until(lambda: server.client.get("/readyz").status_code == 200, "it is ready")
        assert server.client.get("/startupz").json()["phase"] == "ready"
        assert server.metric("gram_startup_seconds", phase="load") > 0
        server.assert_well()


def test_a_server_is_not_ready_before_its_warm_up() -> None:
    warm = threading.Event()

    class Cold(FakeClassifier):
        def warm_up(self) -> None:
            assert warm.wait(10)

    with live(Cold(), wait=False) as server:
        until(lambda: server.client.get("/startupz").json()["phase"] == "warmup", "it warms up")
        assert server.client.get("/readyz").status_code == 503
        assert code(server.ask()) == "not_ready"
        warm.set()
        until(lambda: server.client.get("/readyz").status_code == 200, "it is ready")


def test_a_failed_load_is_visible() -> None:
    def load() -> Classifier:
        raise ModelUnavailable("no such model.")

    with live(load=load, wait=False) as server:
        until(lambda: server.client.get("/livez").status_code == 503, "the engine has ended")
        assert server.client.get("/readyz").status_code == 503
        assert code(server.ask()) == "accelerator_failed"


def test_a_draining_server_refuses_new_work() -> None:
    with live() as server:
        server.service.draining = True
        assert code(server.ask()) == "draining"
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200


def test_create_app_takes_a_classifier_or_a_way_to_load_one() -> None:
    with pytest.raises(ValueError, match="not both"):
        create_app(Settings(), FakeClassifier(), load=FakeClassifier)


# ---- metrics and the OpenAPI document ----


def test_metrics_count_what_happened() -> None:
    with live() as server:
        server.ask(*(png(n) for n in range(8)))
        server.ask(png(1), adaptation={"method": "tpt"})
        server.ask(classes=[])
        server.client.get("/unknown/" + "x" * 50)
        server.ask(b"GIF89a")
        until(lambda: server.metric("gram_requests_total", route="/v1/classify", code="415") == 1, "it is counted")
        assert server.metric("gram_requests_total", route="/v1/classify", code="200") == 2
        assert server.metric("gram_requests_total", route="/v1/classify", code="422") == 1
        assert server.metric("gram_requests_total", route="other", code="404") == 1
        assert server.metric("gram_images_total") == 9
        assert server.metric("gram_batches_total") == 2
        assert server.metric("gram_adaptation_total", method="infomax", scope="batch", status="completed") == 8
        assert server.metric("gram_adaptation_total", method="tpt", scope="image", status="completed") == 1
        assert server.metric("gram_image_decode_total", format="png", result="ok") == 9
        assert server.metric("gram_image_decode_total", result="unsupported_image_format") == 1
        assert server.metric("gram_stage_duration_seconds_count", stage="queue") == 2
        assert server.metric("gram_info", model="fake") == 1
        assert server.metric("gram_cost_rate") > 0


def test_two_apps_share_no_metrics() -> None:
    with live() as one, live() as other:
        one.ask()
        assert one.metric("gram_images_total") == 1
        assert other.metric("gram_images_total") == 0


def test_the_openapi_document_names_every_status_that_a_classification_can_have(server: Live) -> None:
    document = server.client.get("/openapi.json").json()
    assert {"/v1/classify", "/classify", "/info", "/metrics", *PROBES} <= set(document["paths"])
    for path in ("/v1/classify", "/classify"):
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", *(str(status) for status in {*STATUS.values()} - {405})}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    schemas = document["components"]["schemas"]
    assert schemas["ClassifyRequest"]["additionalProperties"] is False
    assert all(schemas[name]["properties"]["explain"]["default"] is False for name in ("ClassifyRequest", "Question"))
    assert "explain" in schemas["Result"]["required"]
    assert {"views", "prototypes", "structure_share"} <= set(schemas["Explanation"]["properties"])


def test_every_code_has_a_status_and_only_load_and_time_are_retryable() -> None:
    assert all(400 <= status < 600 for status in STATUS.values())
    assert {code for code, status in STATUS.items() if status in RETRYABLE} == {
        "body_timeout",
        "overloaded",
        "rate_limited",
        "not_ready",
        "draining",
        "accelerator_failed",
        "deadline_exceeded",
    }


# ---- settings ----


def test_flags_win_over_variables_and_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAM_MAX_IMAGES", "7")
    monkeypatch.setenv("GRAM_PORT", "9000")
    monkeypatch.setenv("GRAM_WEIGHTS_SHA256", "")
    settings = read_settings(["--port", "9001", "--offline", "--kl-cap=2.5"])
    assert (settings.max_images, settings.port, settings.offline, settings.kl_cap) == (7, 9001, True, 2.5)
    assert settings.max_classes == 10_000
    assert settings.weights_sha256 is None
    assert read_settings(["--offline=false"]).offline is False


@pytest.mark.parametrize(
    ("argv", "environ", "line"),
    [
        (["--max-imags", "7"], {}, "unknown flag --max-imags; did you mean --max-images?"),
        ([], {"GRAM_MAX_IMAGE": "7"}, "unknown setting GRAM_MAX_IMAGE; did you mean GRAM_MAX_IMAGES?"),
        (["serve"], {}, "unknown flag serve"),
        (["--port"], {}, "--port needs a value"),
        (["--port", "1", "--port", "2"], {}, "--port is given twice"),
        (["--port", "http"], {}, "GRAM_PORT: must be a valid integer"),
        (["--port", "70000"], {}, "GRAM_PORT: must be less than or equal to 65535"),
        ([], {"GRAM_OFFLINE": "perhaps"}, "GRAM_OFFLINE: must be a valid boolean"),
        ([], {"GRAM_DEFAULT_METHOD": "magic"}, "GRAM_DEFAULT_METHOD: must be 'auto'"),
        (["--queue-seconds", "inf"], {}, "GRAM_QUEUE_SECONDS: must be a finite number"),
        (["--timeout-ms", "200000"], {}, "GRAM_TIMEOUT_MS is above GRAM_MAX_TIMEOUT_MS"),
        (["--max-inflight-bytes", "1000"], {}, "GRAM_MAX_INFLIGHT_BYTES is below"),
        (["--weights-sha256", "abc"], {}, "GRAM_WEIGHTS_SHA256"),
        (["--metrics-port", "9100"], {}, "GRAM_METRICS_PORT is for Ray Serve alone"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(
    argv: list[str], environ: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as refused:
        read_settings(argv)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_help_lists_every_flag() -> None:
    assert all(f"--{name.replace('_', '-')} " in usage() for name in Settings.model_fields)


def test_a_real_model_is_loaded_warmed_up_and_answers(tiny_dir: Path) -> None:
    with live(fake=False, model=str(tiny_dir), device="cpu", default_views=8) as server:
        (plain,) = results(server.ask(adaptation={"method": "none"}))
        (tuned,) = results(server.ask(adaptation={"method": "tpt"}))
        assert tuned["adaptation"]["status"] in ("completed", "fallback")
        assert tuned["adaptation"]["views_requested"] == 8
        assert tuned["baseline"] == plain["baseline"]
        together = results(server.ask(*(png(n) for n in range(9)), adaptation={"method": "none"}))
        assert together[0]["baseline"] == plain["baseline"]
        assert code(server.ask(classes=["cat", "a " * 90])) == "class_text_too_long"
        assert code(server.ask(templates=["{} {}"])) == "bad_template"
        assert code(server.ask(adaptation={"method": "infomax"})) == "method_unavailable"  # it has no root
        assert code(server.ask(adaptation={"scope": "batch"})) == "method_unavailable"
        assert len(results(server.ask(templates=[]))) == len(results(server.ask(classes={"a": ["x"], "b": ["y"]})))
        assert server.client.get("/info").json()["model"]["weights_sha256"] != "random"
        server.assert_well()


def test_the_wire_layer_starts_without_torch() -> None:
    script = (
        "import sys, server.__main__, server.fake; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_product_never_reaches_for_the_fake() -> None:
    for path in (ROOT / "server").glob("*.py"):
        if path.name != "fake.py":
            imports = [
                ast.unparse(n)
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Import | ast.ImportFrom)
            ]
            assert not any("fake" in line for line in imports), path.name
