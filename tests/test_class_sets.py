"""Class sets as resources, and classes of an image's own, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.auth import new_key
from server.settings import InvalidSettings
from tests.server_fixtures import Live, answered, b64, body, code, live, png

NAMES = ["cat", "dog", "fire truck"]


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[Live]:
    with live(fake=False, model=str(tiny_dir), device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def fake() -> Iterator[Live]:
    with live() as made:
        yield made


def post(server: Live, status: int | None = None, **fields: Any) -> dict[str, Any]:
    response = server.client.post("/v1/class-sets", json={"classes": NAMES, **fields})
    assert response.status_code in ((200, 201) if status is None else (status,)), response.text
    made: dict[str, Any] = response.json()
    return made


def results(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    return [(r["predictions"], r["baseline"]) for r in answered(response).json()["results"]]


def test_a_class_set_that_is_named_is_the_list_that_was_posted(server: Live) -> None:
    made = post(server)
    assert (made["size"], made["texts"], made["warm"]) == (3, 3, True)
    assert post(server, 200)["id"] == made["id"]
    listed = server.ask(png(1), png(2), classes=NAMES)
    named = server.ask(png(1), png(2), classes={"class_set": made["id"]})
    assert results(named) == results(listed)
    assert named.json()["class_set"] == {"id": made["id"], "size": 3, "text_cache": "hit"}  # warm before any request
    form = {"files": [("image", ("x.png", png(1)))], "data": {"class_set": made["id"]}}
    assert results(server.client.post("/v1/classify", **form)) == results(listed)[:1]
    raw = server.client.post(f"/classify?class_set={made['id']}", content=png(1), headers={"content-type": "image/png"})
    assert results(raw) == results(listed)[:1]


def test_the_id_is_the_content(server: Live) -> None:
    ids = [
        post(server, classes=["a", "b"])["id"],
        post(server, classes=["b", "a"])["id"],
        post(server, classes=["a", "b"], templates=["art of a {}."])["id"],
        post(server, classes={"a": ["an a."], "b": ["a b."]})["id"],
    ]
    assert len(set(ids)) == 4
    assert post(server, 200, classes=[" a ", "b"])["id"] == ids[0]
    sentences = server.ask(png(1), classes={"class_set": ids[3]})
    assert results(sentences) == results(server.ask(png(1), classes={"a": ["an a."], "b": ["a b."]}))


def test_they_can_be_listed_looked_at_and_forgotten(fake: Live) -> None:
    made = post(fake, classes=["listed", "once"])
    path = f"/v1/class-sets/{made['id']}"
    assert fake.client.get(path).json()["id"] == made["id"]
    assert made["id"] in [each["id"] for each in fake.client.get("/v1/class-sets").json()["data"]]
    assert fake.client.delete(path).status_code == 204
    for response in (fake.client.get(path), fake.client.delete(path), fake.ask(classes={"class_set": made["id"]})):
        assert (response.status_code, code(response)) == (404, "class_set_not_found")


@pytest.mark.parametrize("identity", ["cs_0", "..%2f..%2fetc%2fpasswd", "cs_" + "0" * 32, "cs_" + "G" * 32, "%00"])
def test_no_other_id_is_found(fake: Live, identity: str) -> None:
    for method in ("GET", "DELETE"):
        response = fake.client.request(method, f"/v1/class-sets/{identity}")
        assert response.status_code == 404
        assert code(response) in ("class_set_not_found", "not_found")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"classes": "cat"}, "invalid_request"),
        ({"classes": ["cat", "cat"]}, "duplicate_class"),
        ({"templates": ["no place"]}, "bad_template"),
        ({"classes": {"cat": ["a cat."]}, "templates": ["a {}."]}, "templates_not_allowed"),
        ({"classes": ["x " * 300]}, "invalid_request"),
        ({"images": []}, "invalid_request"),
    ],
)
def test_what_no_class_set_can_be_made_of_is_refused(fake: Live, fields: dict[str, Any], expected: str) -> None:
    assert code(fake.client.post("/v1/class-sets", json={"classes": NAMES, **fields})) == expected


def test_a_class_set_belongs_to_its_key(tmp_path: Path) -> None:
    keys = [new_key(name) for name in ("one", "two")]
    file = tmp_path / "keys"
    file.write_text("\n".join(line for _, line in keys))
    first, second = ({"authorization": f"Bearer {key}"} for key, _ in keys)
    for folder in (None, tmp_path / "sets"):
        with live(api_keys_file=file, class_set_dir=folder) as server:
            made = server.client.post("/v1/class-sets", json={"classes": NAMES}, headers=first).json()
            path = f"/v1/class-sets/{made['id']}"
            assert server.client.get(path, headers=first).status_code == 200
            assert code(server.client.get(path, headers=second)) == "class_set_not_found"
            assert code(server.client.delete(path, headers=second)) == "class_set_not_found"
            assert server.client.get("/v1/class-sets", headers=second).json()["data"] == []
            asked = body(classes={"class_set": made["id"]})
            assert code(server.client.post("/v1/classify", json=asked, headers=second)) == "class_set_not_found"
            assert server.client.post("/v1/classify", json=asked, headers=first).status_code == 200


def test_with_a_folder_they_outlive_the_server_and_its_replicas_share_them(tmp_path: Path) -> None:
    with live(class_set_dir=tmp_path) as one, live(class_set_dir=tmp_path) as other:
        made = post(one, classes=["ä", "b"], templates=["das {}."])
        assert results(other.ask(classes={"class_set": made["id"]})) == results(
            one.ask(classes={"class_set": made["id"]})
        )
        assert [each["id"] for each in other.client.get("/v1/class-sets").json()["data"]] == [made["id"]]
    (file,) = tmp_path.rglob("cs_*.json")
    with live(class_set_dir=tmp_path) as later:
        assert later.client.get(f"/v1/class-sets/{made['id']}").json()["created"] == made["created"]
        assert not list(tmp_path.rglob("*.tmp"))
    kept = json.loads(file.read_text())
    for broken in (json.dumps({**kept, "classes": ["other", "names"]}), "{", "[]", json.dumps({"id": made["id"]})):
        file.write_text(broken)
        with live(class_set_dir=tmp_path) as wrong:
            assert code(wrong.ask(classes={"class_set": made["id"]})) == "class_set_not_found"
            wrong.assert_well()


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with live(max_class_sets=2, class_set_dir=folder) as server:
            first, second = post(server, classes=["a", "b"]), post(server, classes=["c", "d"])
            server.ask(classes={"class_set": first["id"]})
            post(server, classes=["e", "f"])
            assert server.client.get(f"/v1/class-sets/{first['id']}").status_code == 200
            assert code(server.client.get(f"/v1/class-sets/{second['id']}")) == "class_set_not_found"
            assert server.metric("gram_class_sets") == 2


def test_they_can_be_switched_off_and_a_folder_must_be_writable(tmp_path: Path) -> None:
    with live(max_class_sets=0) as server:
        for response in (
            server.client.post("/v1/class-sets", json={"classes": NAMES}),
            server.ask(classes={"class_set": "cs_" + "0" * 32}),
            *(server.client.request(method, f"/v1/class-sets/cs_{'0' * 32}") for method in ("GET", "DELETE")),
            server.client.get("/v1/class-sets"),
        ):
            assert (response.status_code, code(response)) == (501, "class_sets_disabled")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InvalidSettings, match="GRAM_CLASS_SET_DIR can't be written to"),
        live(class_set_dir=tmp_path / "file" / "x"),
    ):
        pass


# ---- classes of an image's own ----


def test_images_with_classes_of_their_own_are_answered_as_if_they_had_come_apart(server: Live) -> None:
    items: list[Any] = [
        b64(png(1)),
        {"data": b64(png(2)), "classes": ["red", "blue"]},
        {"data": b64(png(3)), "classes": {"x": ["an x."], "y": ["a y."], "z": ["a z."]}},
        {"data": b64(png(4)), "classes": NAMES},
        {"data": b64(png(5)), "classes": {"class_set": post(server)["id"]}, "id": "five"},
    ]
    asked = {"images": items, "classes": NAMES, "adaptation": {"method": "tpt", "views": 4}}
    answer = answered(server.client.post("/v1/classify", json=asked)).json()
    assert [r["index"] for r in answer["results"]] == [0, 1, 2, 3, 4]
    assert answer["results"][4]["id"] == "five"
    assert len({r["class_set"] for r in answer["results"]}) == 3
    lists = [NAMES, ["red", "blue"], {"x": ["an x."], "y": ["a y."], "z": ["a z."]}, NAMES, NAMES]
    for n, (classes, result) in enumerate(zip(lists, answer["results"], strict=True)):
        (alone,) = results(server.ask(png(n + 1), classes=classes, adaptation={"method": "tpt", "views": 4}))
        assert (result["predictions"], result["baseline"]) == alone
    assert answer["usage"]["images"] == 5


def test_a_joint_tuning_is_of_images_with_the_same_classes(fake: Live) -> None:
    other = ["red", "blue"]
    items = [{"data": b64(png(n)), "classes": other} if n % 2 else b64(png(n)) for n in range(18)]
    asked = {"images": items, "classes": NAMES}
    answer = answered(fake.client.post("/v1/classify", json=asked)).json()["results"]
    assert {r["adaptation"]["status"] for r in answer} == {"completed"}  # nine of each
    fewer = answered(fake.client.post("/v1/classify", json={**asked, "images": items[:10]})).json()["results"]
    assert {r["adaptation"]["reason"] for r in fewer} == {"too_few_images"}  # five of each


def test_the_texts_of_all_lists_of_a_request_are_bounded_together() -> None:
    with live(max_texts=30) as server:
        lists = [[f"{n} {k}" for k in range(10)] for n in range(4)]
        items = [{"data": b64(png(n)), "classes": own} for n, own in enumerate(lists)]
        asked = {"images": items, "classes": NAMES}
        refused = server.client.post("/v1/classify", json=asked)
        assert (refused.status_code, code(refused)) == (422, "too_many_classes")
        assert server.client.post("/v1/classify", json={**asked, "images": items[:2]}).status_code == 200
        again = [{**item, "classes": lists[0]} for item in items]  # one list, however often
        assert server.client.post("/v1/classify", json={**asked, "images": again}).status_code == 200
        templates = [f"{n} {{}}" for n in range(4)]
        refused = server.client.post("/v1/classify", json={**asked, "images": items[:1], "templates": templates})
        assert code(refused) == "too_many_classes"


def test_a_folder_holds_no_more_than_it_may_whoever_filled_it(tmp_path: Path) -> None:
    with live(class_set_dir=tmp_path) as server:
        for n in range(6):
            post(server, classes=[f"a{n}", "b"])
    with live(class_set_dir=tmp_path, max_class_sets=3) as server:
        assert len(server.client.get("/v1/class-sets").json()["data"]) == 6  # to look deletes nothing
        made = post(server, classes=["new", "one"])
        assert len(list(tmp_path.rglob("cs_*.json"))) == 3
        assert made["id"] in [each["id"] for each in server.client.get("/v1/class-sets").json()["data"]]


def test_bad_images_and_bad_classes_of_one_image_are_its_own(fake: Live) -> None:
    items = [{"data": b64(b"no image"), "classes": ["a", "b"]}, b64(png(1))]
    asked = {"images": items, "classes": NAMES, "errors": "per_item"}
    answer = answered(fake.client.post("/v1/classify", json=asked)).json()["results"]
    assert answer[0]["error"]["code"] == "unsupported_image_format"
    assert answer[1]["label"] in NAMES
    for classes, expected in (([], "invalid_request"), (["a", "a"], "duplicate_class"), ("a", "invalid_request")):
        items[0] = {"data": b64(png(0)), "classes": classes}
        refused = fake.client.post("/v1/classify", json={**asked, "images": items})
        assert code(refused) == expected
        assert refused.json()["error"]["param"].startswith("images.0.classes")


# ---- any order of things ----

LISTS = st.sampled_from([("a", "b"), ("b", "a"), ("a", "b", "c"), ("x", "y")])


class Machine(RuleBasedStateMachine):
    """Post, use, look at and delete class sets in any order, on a server that keeps three; `kept` is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.running = live(max_class_sets=3)
        self.server = self.running.__enter__()
        self.kept: list[str] = []  # latest use last
        self.ids: dict[tuple[str, ...], str] = {}

    def used(self, identity: str) -> None:
        self.kept = [*(each for each in self.kept if each != identity), identity][-3:]

    @rule(names=LISTS)
    def post(self, names: tuple[str, ...]) -> None:
        response = self.server.client.post("/v1/class-sets", json={"classes": list(names)})
        identity = response.json()["id"]
        assert response.status_code == (200 if identity in self.kept else 201)
        assert self.ids.setdefault(names, identity) == identity
        self.used(identity)

    @rule(names=LISTS)
    def classify(self, names: tuple[str, ...]) -> None:
        identity = self.ids.get(names, "cs_" + "0" * 32)
        response = answered(self.server.client.post("/v1/classify", json=body(classes={"class_set": identity})))
        assert response.status_code == (200 if identity in self.kept else 404)
        if identity in self.kept:
            assert {p["label"] for p in response.json()["results"][0]["predictions"]} == set(names)
            self.used(identity)

    @rule(names=LISTS)
    def delete(self, names: tuple[str, ...]) -> None:
        identity = self.ids.get(names, "cs_" + "0" * 32)
        response = self.server.client.delete(f"/v1/class-sets/{identity}")
        assert response.status_code == (204 if identity in self.kept else 404)
        self.kept = [each for each in self.kept if each != identity]

    @invariant()
    def the_list_is_what_is_kept(self) -> None:
        listed = [each["id"] for each in self.server.client.get("/v1/class-sets").json()["data"]]
        assert listed == self.kept

    def teardown(self) -> None:
        self.running.__exit__(None, None, None)


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = hypothesis.settings(
    max_examples=12, stateful_step_count=25, derandomize=True, deadline=None, database=None
)
