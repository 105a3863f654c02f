"""Sessions over HTTP: nothing of them without being asked for, and what they do, keep, refuse and forget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gram_core.backbone import load
from gram_core.classifier import Classifier
from gram_core.images import decode
from gram_core.memory import Memory
from gram_core.types import Tuning
from server.auth import new_key
from server.metrics import Metrics
from server.sessions import Sessions
from server.settings import Settings
from tests.conftest import TINY, write_model
from tests.gram_fixtures import write_checkpoint
from tests.server_fixtures import HeldClassifier, Live, b64, code, live, png, until

NAMES = ["cat", "dog", "fire truck", "a red bus"]
IMAGES = [png(n, (30 + n % 9, 28 + n % 5)) for n in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("models") / "sessions", TINY, seed=3)
    write_checkpoint(made, load(str(made), device="cpu"))
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with live(fake=False, model=str(folder), device="cpu", brownout=(), queue_seconds=600.0) as made:
        yield made


@pytest.fixture(scope="module")
def fake() -> Iterator[Live]:
    with live() as made:
        yield made


def begin(server: Live, **fields: Any) -> dict[str, Any]:
    response = server.client.post("/v1/sessions", json={"classes": NAMES, **fields})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def ask(server: Live, numbers: range, **fields: Any) -> httpx.Response:
    question = {"images": [b64(IMAGES[n]) for n in numbers], "classes": NAMES, "top_k": None, **fields}
    return server.client.post("/v1/classify", json=question)


def scores(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [result["predictions"] for result in response.json()["results"]]


def facts(server: Live, session: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get(f"/v1/sessions/{session['id']}").json()
    return found


def test_a_session_remembers_and_its_memory_changes_answers(server: Live) -> None:
    session = begin(server)
    assert session["images"] == 0
    alone = scores(ask(server, range(8)))
    first = ask(server, range(8), session=session["id"])
    assert scores(first) == alone  # an empty memory is no memory, bit for bit
    assert first.json()["session"] == {"id": session["id"], "images": 8, "added": 8}
    told = facts(server, session)
    assert told["images"] == sum(told["counts"].values()) == 8
    assert told["bytes"] == 8 * told["views"] * 32 * 4
    second = ask(server, range(8, 16), session=session["id"])
    assert scores(second) != scores(ask(server, range(8, 16)))
    baselines = [r["baseline"] for r in second.json()["results"]]
    assert baselines == [r["baseline"] for r in ask(server, range(8, 16)).json()["results"]]


def test_the_harness_and_the_server_hold_the_same_session(server: Live, folder: Path) -> None:
    """Bit for bit: what is measured offline is what is served."""
    classifier = Classifier.load(str(folder), device="cpu")
    classes = classifier.class_set(NAMES)
    session = begin(server)
    memory = classifier.session(classes, 128, session["views"])
    for start, size in ((0, 8), (8, 3), (11, 12), (23, 1), (24, 33)):
        numbers = range(start, start + size)
        answer = ask(server, numbers, session=session["id"], explain=True).json()
        served = [result["adaptation"]["digest"] for result in answer["results"]]
        prepared = [classifier.prepare(decode(IMAGES[n])) for n in numbers]
        plan = classifier.plan(Tuning(), size + len(memory), classes)
        seen = classifier.see(prepared, plan.views, plan.seed, classifier.configs["gram"].view_scale)
        results = classifier.answer(seen, classes, plan, memory.snapshot())
        assert [result.adaptation.digest for result in results] == served
        memory.add(seen.views, seen.sha256, [int(result.baseline_cosines.argmax()) for result in results])
        assert answer["session"]["images"] == len(memory)
        assert all(result["explain"]["views"] for result in answer["results"])


def test_a_dry_run_reads_and_writes_nothing(server: Live) -> None:
    session = begin(server)
    ask(server, range(8), session=session["id"])
    dry = [ask(server, range(8, 16), session=session["id"], update=False) for _ in range(2)]
    assert scores(dry[0]) == scores(dry[1])
    assert dry[0].json()["session"] == {"id": session["id"], "images": 8, "added": 0}
    assert scores(ask(server, range(8, 16), session=session["id"])) == scores(dry[0])
    assert facts(server, session)["images"] > 8


def test_nothing_drifts_the_same_memory_gives_the_same_answer(server: Live) -> None:
    """No prompt is carried over: after any number of requests the answer depends on the memory and the images."""
    one, other = begin(server), begin(server)
    for session in (one, other):
        ask(server, range(8), session=session["id"])
    for _ in range(3):
        ask(server, range(20, 28), session=one["id"], update=False)
    assert scores(ask(server, range(8, 16), session=one["id"])) == scores(
        ask(server, range(8, 16), session=other["id"])
    )
    server.client.post(f"/v1/sessions/{one['id']}/reset")
    assert facts(server, one)["images"] == 0
    assert scores(ask(server, range(8), session=one["id"])) == scores(ask(server, range(8)))


def test_small_requests_fill_a_memory_until_it_is_enough_to_tune(server: Live) -> None:
    session = begin(server)
    statuses = []
    for start in range(0, 12, 3):
        answer = ask(server, range(start, start + 3), session=session["id"]).json()
        statuses.append(answer["results"][0]["adaptation"]["status"])
    assert statuses == ["skipped", "skipped", "completed", "completed"]


def test_an_exported_session_goes_on_elsewhere_as_if_it_had_stayed(server: Live) -> None:
    session = begin(server, method="infomax")
    ask(server, range(10), session=session["id"])
    data = server.client.get(f"/v1/sessions/{session['id']}/export").content
    headers = {"content-type": "application/octet-stream"}
    response = server.client.post("/v1/sessions/import", content=data, headers=headers)
    assert response.status_code == 201, response.text
    again = response.json()
    assert again["id"] != session["id"]
    assert (again["counts"], again["method"]) == (facts(server, session)["counts"], "infomax")
    both = [ask(server, range(10, 20), session=s["id"]) for s in (session, again)]
    assert scores(both[0]) == scores(both[1])
    for bad in (b"", data[:-3], b"PK\x03\x04", b"\x80\x04\x95."):
        refused = server.client.post("/v1/sessions/import", content=bad, headers=headers)
        assert (refused.status_code, code(refused)) == (422, "invalid_request")
    refused = server.client.post("/v1/sessions/import", json={})
    assert code(refused) == "unsupported_media_type"


def test_a_replay_knows_the_memory_it_was_made_with(server: Live) -> None:
    session = begin(server)
    ask(server, range(8), session=session["id"])
    made = ask(server, range(8, 16), session=session["id"], update=False).json()["results"][0]["adaptation"]
    replay = {"adaptation": {"replay": made["replay"]}, "session": session["id"], "update": False}
    again = ask(server, range(8, 16), **replay).json()["results"][0]["adaptation"]
    assert again["digest"] == made["digest"]
    ask(server, range(30, 38), session=session["id"])
    assert code(ask(server, range(8, 16), **replay)) == "replay_mismatch"


def test_a_single_image_of_a_session_can_be_replayed(server: Live) -> None:
    session = begin(server)
    ask(server, range(8), session=session["id"])
    (made,) = ask(server, range(8, 9), session=session["id"], update=False).json()["results"]
    assert made["adaptation"]["status"] == "completed"
    fields = {"adaptation": {"replay": made["adaptation"]["replay"]}, "session": session["id"], "update": False}
    (again,) = ask(server, range(8, 9), **fields).json()["results"]
    assert again["adaptation"]["digest"] == made["adaptation"]["digest"]
    assert again["adaptation"]["steps"] == made["adaptation"]["steps"]


def test_a_session_of_another_model_is_not_taken(server: Live) -> None:
    session = begin(server)
    data = server.client.get(f"/v1/sessions/{session['id']}/export").content
    memory, bound = Memory.restore(data)
    other = Memory(memory.classes, views=memory.views, dim=memory.dim + 1).dump(bound)
    foreign = memory.dump({**bound, "model": "another"})
    headers = {"content-type": "application/octet-stream"}
    refused = server.client.post("/v1/sessions/import", content=other, headers=headers)
    assert (refused.status_code, code(refused)) == (422, "invalid_request")
    refused = server.client.post("/v1/sessions/import", content=foreign, headers=headers)
    assert (refused.status_code, code(refused)) == (409, "session_conflict")
    for asked in ("[" * 100_000, "{}", "null"):
        refused = server.client.post(
            "/v1/sessions/import", content=memory.dump({**bound, "asked": asked}), headers=headers
        )
        assert (refused.status_code, code(refused)) == (422, "invalid_request")


def test_a_sessions_own_views_are_the_default_within_it(fake: Live) -> None:
    for views in (4, 16):
        session = begin(fake, views=views)
        answer = ask(fake, range(8), session=session["id"]).json()
        assert answer["session"]["added"] == 8
        assert answer["results"][0]["adaptation"]["views"] == views


def test_a_turn_that_comes_too_late_is_504_for_every_verb() -> None:
    classifier = HeldClassifier()
    with live(classifier, timeout_ms=300) as server, ThreadPoolExecutor(1) as pool:
        session = begin(server)
        first = pool.submit(ask, server, range(8), session=session["id"], timeout_ms=20_000)
        until(lambda: classifier.runs, "the first runs")
        late = server.client.post(f"/v1/sessions/{session['id']}/reset")
        assert (late.status_code, code(late)) == (504, "deadline_exceeded")
        assert code(server.client.get(f"/v1/sessions/{session['id']}/export")) == "deadline_exceeded"
        classifier.gate.set()
        assert first.result().status_code == 200
        assert server.client.post(f"/v1/sessions/{session['id']}/reset").json()["images"] == 0


def test_a_sessions_classes_are_its_own(fake: Live) -> None:
    session = begin(fake)
    other = ask(fake, range(8), session=session["id"], classes=["x", "y"])
    assert (other.status_code, code(other)) == (409, "session_conflict")
    question = {"images": [b64(IMAGES[n]) for n in range(8)], "session": session["id"]}
    assert fake.client.post("/v1/classify", json=question).status_code == 200  # classes may be left out
    item = {"data": b64(IMAGES[0]), "classes": ["x", "y"]}
    refused = fake.client.post("/v1/classify", json={**question, "images": [item]})
    assert code(refused) == "session_conflict"
    form = {"files": [("image", ("x.png", IMAGES[0]))], "data": {"session": session["id"], "update": "false"}}
    answer = fake.client.post("/v1/classify", **form).json()
    assert answer["session"]["added"] == 0


@pytest.mark.parametrize("identity", ["ss_" + "0" * 32, "../../etc/passwd", "ss_x", ""])
def test_an_unknown_session_is_404(fake: Live, identity: str) -> None:
    refused = ask(fake, range(1), session=identity)
    assert (refused.status_code, code(refused)) == (404, "session_not_found")


def test_a_request_without_a_session_has_nothing_of_one(fake: Live) -> None:
    begin(fake)
    assert ask(fake, range(8)).json()["session"] is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"classes": []}, "invalid_request"),
        ({"method": "tpt"}, "invalid_request"),
        ({"method": "gram"}, "method_unavailable"),  # the fake has no checkpoint
        ({"capacity": 0}, "invalid_request"),
        ({"ttl_s": 0}, "invalid_request"),
        ({"views": 129}, "invalid_request"),
        ({"capacity": 4096, "views": 128}, "invalid_request"),  # more bytes than a session may hold
        ({"unknown": 1}, "invalid_request"),
        ({"classes": {"class_set": "cs_" + "0" * 32}}, "class_set_not_found"),
    ],
)
def test_what_no_session_can_be_made_of_is_refused(fake: Live, fields: dict[str, Any], expected: str) -> None:
    assert code(fake.client.post("/v1/sessions", json={"classes": NAMES, **fields})) == expected


def test_a_session_keeps_no_more_views_than_it_has(fake: Live) -> None:
    session = begin(fake, views=4)
    assert ask(fake, range(8), session=session["id"], adaptation={"views": 4}).json()["session"]["added"] == 8
    refused = ask(fake, range(8), session=session["id"], adaptation={"views": 5})
    assert (refused.status_code, code(refused)) == (422, "invalid_request")


def test_a_session_belongs_to_its_key(tmp_path: Path) -> None:
    keys = {name: new_key(name) for name in ("one", "two")}
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line in keys.values()))
    with live(api_keys_file=file) as server:

        def bearer(name: str) -> dict[str, str]:
            return {"authorization": f"Bearer {keys[name][0]}"}

        made = server.client.post("/v1/sessions", json={"classes": NAMES}, headers=bearer("one")).json()
        path = f"/v1/sessions/{made['id']}"
        assert server.client.get(path, headers=bearer("one")).status_code == 200
        for method, way in (("GET", path), ("DELETE", path), ("POST", path + "/reset"), ("GET", path + "/export")):
            assert code(server.client.request(method, way, headers=bearer("two"))) == "session_not_found"
        question = {"images": [b64(IMAGES[0])], "session": made["id"]}
        assert code(server.client.post("/v1/classify", json=question, headers=bearer("two"))) == "session_not_found"
        assert server.client.delete(path, headers=bearer("one")).status_code == 204
        assert code(server.client.get(path, headers=bearer("one"))) == "session_not_found"
        assert server.metric("gram_session_evictions_total", reason="deleted") == 1


def test_the_least_recently_used_session_makes_room() -> None:
    with live(max_sessions=2) as server:
        first, second = begin(server), begin(server)
        facts(server, first)
        third = begin(server)
        assert code(server.client.get(f"/v1/sessions/{second['id']}")) == "session_not_found"
        assert facts(server, first)["id"] == first["id"]
        assert facts(server, third)["id"] == third["id"]
        assert server.metric("gram_sessions") == 2
        assert server.metric("gram_session_evictions_total", reason="capacity") == 1


def test_a_session_ends_when_nobody_came_for_its_time_to_live() -> None:
    now = [0.0]
    sessions = Sessions(Settings(), Metrics(), clock=lambda: now[0])
    from server.fake import FakeClassifier

    classifier = FakeClassifier()
    made = classifier.class_set(NAMES)
    memory = classifier.session(made, 128, 8)
    session = sessions.open(None, made, NAMES, None, memory, method=None, ttl_s=10.0)
    now[0] = 9.0
    assert sessions.find(None, session.id) is session
    now[0] = 18.0  # nine seconds after it was asked for
    assert sessions.find(None, session.id) is session
    now[0] = 29.0
    with pytest.raises(Exception, match="expired"):
        sessions.find(None, session.id)


def test_requests_on_one_session_run_one_after_the_other() -> None:
    classifier = HeldClassifier()
    with live(classifier) as server, ThreadPoolExecutor(3) as pool:
        session = begin(server)
        first = pool.submit(ask, server, range(8), session=session["id"])
        until(lambda: classifier.runs, "the first runs")
        second = pool.submit(ask, server, range(8, 16), session=session["id"])
        third = pool.submit(ask, server, range(16, 24), session=session["id"], timeout_ms=50)
        assert code(third.result()) == "deadline_exceeded"  # its turn came too late
        time.sleep(0.05)
        assert len(classifier.runs) == 1
        classifier.gate.set()
        assert [f.result().json()["session"]["images"] for f in (first, second)] == [8, 16]
        server.assert_well()


def test_sessions_can_be_switched_off() -> None:
    with live(max_sessions=0) as server:
        one = f"/v1/sessions/ss_{'0' * 32}"
        ways = [("GET", one), ("DELETE", one), ("POST", f"{one}/reset"), ("GET", f"{one}/export")]
        for refused in (
            server.client.post("/v1/sessions", json={"classes": NAMES}),
            server.client.post("/v1/classify", json={"images": [b64(png())], "session": "ss_" + "0" * 32}),
            *(server.client.request(method, way) for method, way in ways),
        ):
            assert (refused.status_code, code(refused)) == (501, "sessions_disabled")
