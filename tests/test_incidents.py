"""What has happened to others: each incident below has a test, here or elsewhere, that would see it happen to us.

A release reads the advisories again and adds a row for each new incident of a peer.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import json
import pkgutil
import shutil
import tarfile
import time
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import gram_core
import prototypes
import server as server_package
from gram_core.backbone import Backbone
from gram_core.errors import InvalidCheckpoint, InvalidClasses, InvalidImage
from gram_core.images import PILLOW_MAX_PIXELS, decode, inspect
from gram_core.text import TextEncoder
from prototypes import store
from tests import zoo
from tests.apart_fixtures import LIVEZ, Apart, answers, apart, probed, push, talk, until_closed
from tests.server_fixtures import LEAKS, Live, answered, b64, code, live, png, until
from tests.test_supply_chain import BUNDLED, READERS
from tests.zoo import Member

TESTS = Path(__file__).parent

INCIDENTS: dict[str, tuple[str, ...]] = {
    "vLLM CVE-2025-62164, CVE-2026-56340: tensors deserialised from requests": (
        "test_egress::test_a_server_opens_nothing_whatever_it_is_sent",
    ),
    "PyTorch CVE-2025-32434, CVE-2026-24747, Stanza 1.12: trust in weights_only, falling back to the unsafe load": (
        "test_supply_chain::test_a_pickle_under_the_name_of_weights_is_refused_and_never_run",
        "test_supply_chain::test_weights_in_a_pickle_are_never_taken_for_want_of_others",
        "test_supply_chain::test_a_pickle_under_the_name_of_a_checkpoint_or_a_bank_is_refused_and_never_run",
        "test_supply_chain::test_a_server_on_forged_weights_exits_65",
    ),
    "BentoML CVE-2025-27520, SGLang CVE-2026-3059, LMDeploy CVE-2026-76850, LightLLM CVE-2026-103395: pickle": (
        "test_architecture::test_shipped_code_can_not_run_what_a_file_says",
    ),
    "vLLM GHSA-3f6c-7fw2-ppm4, CVE-2026-24779, CVE-2026-25960, LMDeploy CVE-2026-33626, CVE-2026-63764, "
    "BentoML CVE-2025-54381, Roboflow GHSA-hjmm-hr52-vrp2: the server opens image URLs": (
        "test_egress::test_a_server_opens_nothing_whatever_it_is_sent",
        "test_egress::test_a_model_answers_without_a_word_to_anyone",
        "test_egress::test_the_hook_and_the_sink_see_what_they_are_there_for",
    ),
    "FASTAPI_OTEL_AUTO_CONFIGURE, infinity's telemetry: the environment opens a connection": (
        "test_egress::test_a_server_opens_nothing_whatever_it_is_sent",
    ),
    "vLLM CVE-2026-22778: the text of an exception in the answer": (
        "test_incidents::test_what_tells_of_the_machine_would_be_seen",
        "test_supply_chain::test_no_answer_can_repeat_an_exception_or_what_a_client_sent",
        "test_server::test_a_bug_in_one_request_is_its_own_500_and_leaks_nothing",
    ),
    "FastAPI's own 422: repeats a megabyte of input": (
        "test_incidents::test_a_megabyte_of_nonsense_anywhere_is_not_repeated",
    ),
    "vLLM CVE-2026-22773: an image of 1 x 1 ends the engine": (
        "test_incidents::test_images_of_few_pixels_are_answered_by_a_model",
        "test_bad_requests::test_every_image_of_the_zoo_is_answered_or_refused_as_documented",
    ),
    "vLLM CVE-2026-100650, -130686, -54233: limits after decoding, none for the whole request": (
        "test_incidents::test_ten_thousand_tiny_images_are_refused_before_one_is_decoded",
        "test_bad_requests::test_the_pixels_of_a_whole_request_are_bounded_before_any_is_decoded",
        "test_ingress::test_a_gigabyte_in_chunks_is_cut_at_the_cap",
    ),
    "SGLang CVE-2026-109229, TorchServe: Pillow's own limit switched off for the whole process": (
        "test_incidents::test_pillows_limits_are_ours_after_importing_everything",
        "test_incidents::test_bad_images_among_good_ones_fail_alone",
    ),
    "Pillow CVE-2026-25990, -42311, -40192, -59197 to -59200, -55798: forty parsers within reach": (
        "test_images::test_no_other_plugin_of_pillow_is_called",
        "test_images::test_each_file_is_opened_as_the_one_format_its_bytes_show",
    ),
    "extreme aspect ratio: the resized short side wants gigabytes": (
        "test_incidents::test_an_image_that_would_take_gigabytes_takes_none",
        "test_images::test_no_bomb_takes_memory_and_decoding_needs_no_torch",
    ),
    "libjpeg, Red Hat bug 1344214: unlimited progressive scans": (
        "test_incidents::test_too_many_scans_are_refused_at_once",
        "test_incidents::test_as_many_scans_as_are_allowed_on_the_largest_image_are_answered",
        "test_images::test_an_end_marker_inside_a_comment_does_not_hide_the_scans_behind_it",
    ),
    "vLLM GHSA-rxc4-3w6r-4v47, uvicorn issue 157: no limit on headers": (
        "test_incidents::test_a_header_of_any_size_takes_no_memory",
        "test_wire::test_a_header_beyond_its_cap_is_hung_up_on",
        "test_wire::test_a_header_that_drips_ends_the_connection",
    ),
    "Triton CVE-2025-23310, -23311: tiny chunks": (
        "test_wire::test_a_body_in_crumbs_is_hung_up_on_and_does_not_hold_the_event_loop",
    ),
    "Starlette CVE-2026-48710, PYSEC-2026-248: a key asked for by the path of a URL": (
        "test_auth::test_no_spelling_of_a_path_gets_around_the_key",
        "test_auth::test_no_host_gets_around_the_key",
        "test_supply_chain::test_no_answer_can_repeat_an_exception_or_what_a_client_sent",
    ),
    "Starlette CVE-2026-48817: unknown methods reach attributes": (
        "test_auth::test_no_method_reaches_any_path_without_the_right_key",
    ),
    "Starlette CVE-2024-47874, CVE-2026-54283, python-multipart CVE-2024-53981 and later, BentoML CVE-2024-9056: "
    "forms without limits": (
        "test_ingress::test_a_form_is_read_or_refused_within_bounds",
        "test_bad_requests::test_a_form_that_cannot_be_used_is_refused",
        "test_supply_chain::test_no_version_with_a_known_fault_may_be_installed",
    ),
    "LangChain CVE-2025-65106, CVE-2026-40087: templates that are format strings": (
        "test_incidents::test_a_template_is_never_a_format_string",
    ),
    "vLLM's open routes, Ray CVE-2023-48022, CVE-2025-62593, CVE-2026-27482, ShellTorch: keys by prefix or method": (
        "test_auth::test_no_method_reaches_any_path_without_the_right_key",
    ),
    "faiss 5400: files of an index are code paths": (
        "test_incidents::test_arrays_changed_anywhere_under_a_header_that_vouches_for_them_never_crash",
        "test_prototypes_bank::test_two_hundred_corrupted_files_are_each_refused_cleanly",
        "test_checkpoint::test_a_file_cut_off_or_changed_anywhere_is_refused",
    ),
    "MLServer CVE-2026-109156, BentoML CVE-2026-24123: archives, and paths from users": (
        "test_incidents::test_no_archive_is_unpacked_and_no_path_is_followed",
    ),
    "Ray 66140, 50046, 41057, 38249, clip-as-service 850: one exception or a storm of cancels wedges the batcher": (
        "test_engine::test_every_job_of_a_random_storm_ends_exactly_once",
        "test_faults::test_a_bug_anywhere_is_one_requests_500",
        "test_faults::test_2000_requests_of_which_three_in_ten_leave",
        "test_ingress::test_thirty_of_a_hundred_clients_that_leave_cost_the_others_nothing",
    ),
    "vLLM 6907, clip-retrieval PR 81, Biodiversity 662: memory and gradients kept": (
        "test_incidents::test_tuning_leaves_no_tensor_behind",
        "test_faults::test_memory_that_runs_out_in_a_forward_pass_is_tried_once_more",
    ),
    "transformers PR 21861, ailia-models 1141: a thousand classes take minutes or all memory": (
        "test_incidents::test_a_thousand_classes_are_encoded_once",
    ),
    "clip-as-service 906: one bad image fails all": (
        "test_incidents::test_bad_images_among_good_ones_fail_alone",
        "test_bad_requests::test_one_bad_image_fails_alone_when_asked_to",
    ),
    "infinity's /health: 200 while the engine is dead": (
        "test_server::test_a_failed_device_turns_every_probe_at_once",
        "test_server::test_a_failed_load_is_visible",
    ),
}


@cache
def found_in(module: str) -> frozenset[str]:
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("incident", INCIDENTS)
def test_every_incident_has_a_test_that_exists(incident: str) -> None:
    assert INCIDENTS[incident]
    for place in INCIDENTS[incident]:
        module, _, name = place.partition("::")
        assert name in found_in(module), place


def test_every_test_of_this_file_is_about_an_incident() -> None:
    named = {place.partition("::")[2] for places in INCIDENTS.values() for place in places}
    about_the_table = {
        "test_every_incident_has_a_test_that_exists",
        "test_every_test_of_this_file_is_about_an_incident",
    }
    assert {name for name in found_in("test_incidents") if name.startswith("test_")} <= named | about_the_table


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with apart(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def real(tiny_dir: Path) -> Iterator[Live]:
    with live(fake=False, model=str(tiny_dir), device="cpu", default_views=4) as running:
        yield running


# ---- answers ----


@pytest.mark.parametrize(
    "text",
    [
        b"cannot identify image file <_io.BytesIO object at 0x7f31c0a9d0>",
        b"Traceback (most recent call last)",
        b'File "/usr/lib/python3.11/json/decoder.py", line 355',
        b"no such file: /home/user/model",
        b"in decode.py",
    ],
)
def test_what_tells_of_the_machine_would_be_seen(text: bytes) -> None:
    assert LEAKS.search(text)  # every error that any test receives is searched for it


def test_a_megabyte_of_nonsense_anywhere_is_not_repeated(server: Live) -> None:
    word = "zebracrossing" * 80_000
    wrong: list[dict[str, Any]] = [
        {"images": [word]},
        {"images": [{"data": word}]},
        {"images": [{"data": b64(png()), "id": word}]},
        {"images": [{"data": b64(png()), word: 1}]},
        {"images": word},
        {"classes": ["cat", word]},
        {"classes": {word: ["a"], "b": ["b"]}},
        {"classes": {"a": [word]}},
        {"classes": word},
        {"templates": [word]},
        {"adaptation": {"method": word}},
        {"adaptation": {"host": word}},
        {"adaptation": {word: 1}},
        {"adaptation": word},
        {"score": word},
        {"top_k": word},
        {word: 1},
    ]
    for fields in wrong:
        response = server.ask(**fields)
        assert 400 <= response.status_code < 500
        assert len(response.content) <= 1024
        assert b"zebra" not in response.content
        assert not [value for value in response.headers.values() if "zebra" in value]


# ---- images ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_of_few_pixels_are_answered_by_a_model(real: Live, kind: str) -> None:
    sizes = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 100), (100, 1)]
    files = [zoo.encoded(Image.new("RGB", size, (200, 30, 90)), kind) for size in sizes]
    response = real.ask(*files, adaptation={"method": "tpt"})
    assert response.status_code == 200
    assert [found["error"] for found in response.json()["results"]] == [None] * len(sizes)
    real.assert_well()


def test_ten_thousand_tiny_images_are_refused_before_one_is_decoded(server: Live) -> None:
    before = server.service.metrics.render()
    tiny = zoo.one_colour_png(1, 1)
    assert code(server.ask(images=[b64(tiny)] * 10_000)) == "too_many_images"
    head = b'--limit\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    form = (head + tiny + b"\r\n") * 10_000 + b"--limit--\r\n"
    media = {"content-type": "multipart/form-data; boundary=limit"}
    assert code(server.client.post("/classify", content=form, headers=media)) == "too_many_images"
    counted = [line for line in before.splitlines() if line.startswith(b"gram_image_decode_total")]
    after = server.service.metrics.render()
    assert [line for line in after.splitlines() if line.startswith(b"gram_image_decode_total")] == counted


def modules(package: ModuleType) -> Iterator[str]:
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            yield found.name


def test_pillows_limits_are_ours_after_importing_everything() -> None:
    for package in (gram_core, prototypes, server_package):
        for name in modules(package):
            importlib.import_module(name)
    assert Image.MAX_IMAGE_PIXELS == PILLOW_MAX_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def requests_of(members: list[Member], most_bytes: int = 12_000_000) -> Iterator[list[Member]]:
    """As many at a time as a request takes."""
    batch: list[Member] = []
    for member in members:
        if batch and (len(batch) == 32 or sum(len(m.data) for m in batch) + len(member.data) > most_bytes):
            yield batch
            batch = []
        batch.append(member)
    yield batch


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
def test_bad_images_among_good_ones_fail_alone(server: Live, form: bool) -> None:
    """The whole zoo, each member beside a good picture that has the answer that it has alone."""
    members = [m for m in zoo.zoo() if not m.heavy and (form or len(m.data) < 1 << 24)]
    good = png(42)
    alone = server.ask(good, adaptation={"method": "none"}).json()["results"][0]["predictions"]
    for batch in requests_of(members):
        files = [data for member in batch for data in (member.data, good)]
        if form:
            named = [("image", (m.filename, m.data, m.claims)) for m in batch]
            parts = [part for file in named for part in (file, ("image", ("good.png", good)))]
            fields = {"classes": ["cat", "dog"], "method": "none", "errors": "per_item"}
            response = answered(server.client.post("/classify", data=fields, files=parts))
        else:
            response = server.ask(*files, errors="per_item", adaptation={"method": "none"})
        assert response.status_code == 200, response.text
        found = response.json()["results"]
        assert len(found) == len(files)
        for member, result in zip(batch, found[::2], strict=True):
            assert (result["error"] or {}).get("code") == member.code, member.name
        assert all(result["predictions"] == alone for result in found[1::2])
    server.assert_well()
    assert Image.MAX_IMAGE_PIXELS == PILLOW_MAX_PIXELS


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (65_500, 65_500), (6401, 5000)])
def test_an_image_that_would_take_gigabytes_takes_none(process: Apart, size: tuple[int, int]) -> None:
    data = zoo.one_colour_png(*size)
    with process.flat(16):
        assert code(process.ask(data)) in ("image_shape_unsupported", "image_too_many_pixels")
    process.assert_well()


def test_too_many_scans_are_refused_at_once(process: Apart) -> None:
    data = zoo.with_scans(2009)
    with process.flat(16), probed(process):
        started = time.monotonic()
        assert code(process.ask(data)) == "image_too_complex"
        assert time.monotonic() - started < 2  # 2 ms in fact; 37 s at 5600 x 5600 if they are decoded


@pytest.mark.slow
def test_as_many_scans_as_are_allowed_on_the_largest_image_are_answered() -> None:
    data = zoo.with_scans(63, 5600, 5536)
    started = time.monotonic()
    assert decode(data).rgb.size == (5600, 5536)
    assert time.monotonic() - started < 30
    with pytest.raises(InvalidImage):
        inspect(zoo.with_scans(65, 5600, 5536))


# ---- the wire ----


@pytest.mark.parametrize(
    "header",
    [
        b"X: " + b"a" * (150 << 20),
        b"X" * (8 << 20) + b": a\r\n",
        b"X: a\r\n" * 100_000,
        b"\r\n" + b"\r\n" * (8 << 20),
        b"X:" + b" " * (8 << 20),
        b"Cookie: a=b\r\n" * 1_000_000,
    ],
    ids=["150 MiB", "a name", "100k lines", "line ends", "spaces", "a million lines"],
)
def test_a_header_of_any_size_takes_no_memory(process: Apart, header: bytes) -> None:
    with process.flat(16), probed(process), process.connect() as connection:
        sent = push(connection, LIVEZ + header)
        found = answers(until_closed(connection))
    assert sent < 8 << 20, "it takes whatever comes"  # what fits into the buffers on the way
    assert [answer.code for answer in found if answer.status != 200] in ([], ["malformed_body"])
    process.assert_well()


def test_no_archive_is_unpacked_and_no_path_is_followed(process: Apart) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        entry = tarfile.TarInfo("../../../tmp/gram-was-here")
        entry.size = 4
        file.addfile(entry, BytesIO(b"here"))
    for data in (packed.getvalue(), zoo.archive(), b"PK\x05\x06" + bytes(18)):
        assert code(process.ask(data)) == "unsupported_image_format"
    for media in ("application/zip", "application/x-tar", "application/gzip", "application/x-7z-compressed"):
        posted = process.client.post("/classify", content=packed.getvalue(), headers={"content-type": media})
        assert code(posted) == "unsupported_media_type"
    assert not Path("/tmp/gram-was-here").exists()
    for target in (
        "/../../etc/passwd",
        "/ui/../../etc/passwd",
        "/ui/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/class-sets/../../etc/passwd",
        "/v1/class-sets/..%2f..%2fetc%2fpasswd",
        "/v1/class-sets/cs_" + "0" * 31 + "%00",
        "/models/..\\..\\etc\\passwd",
        "/static//etc/passwd",
        "/file:///etc/passwd",
    ):
        (answer,) = talk(process, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert (answer.status, answer.code) in (
            (404, "not_found"),
            (404, "class_set_not_found"),
            (405, "method_not_allowed"),
        )
        assert b"root:" not in answer.content
    for name in ("../../etc/passwd", "cs_" + "0" * 32 + "/..", "/etc/passwd", "cs_\u0660"):
        response = process.ask(classes={"class_set": name})
        assert code(response) in ("class_sets_disabled", "class_set_not_found")
        assert "passwd" not in response.text


# ---- classes ----

PIECES = st.sampled_from(
    ["{", "}", "{}", "{{", "}}", "{0}", "{:>20000000}", "{!r}", "{a.b}", "{0.__class__}", "%s", "$x", "a"]
)


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.lists(PIECES | st.text("{}a", max_size=4), min_size=1, max_size=6).map("".join))
def test_a_template_is_never_a_format_string(tiny: Backbone, template: str) -> None:
    encoder = TextEncoder(tiny)
    fine = template.count("{}") == 1 and template.count("{") == template.count("}") == 1
    if not fine:
        with pytest.raises(InvalidClasses) as caught:
            encoder.class_set(["%s {}", "dog"], [template])
        assert caught.value.code == "bad_template"
        return
    made = encoder.class_set(["%s {}", "dog"], [template])
    plain = encoder.class_set({"a": [template.replace("{}", "%s {}")], "b": [template.replace("{}", "dog")]})
    assert [group[0].tolist() for group in made.groups] == [group[0].tolist() for group in plain.groups]


def test_a_thousand_classes_are_encoded_once(real: Live) -> None:
    names = [f"thing number {n}" for n in range(1000)]
    first, second = (real.ask(classes=names, adaptation={"method": "none"}).json() for _ in range(2))
    assert (first["usage"]["text_passes"], first["class_set"]["text_cache"]) == (1000, "miss")
    assert (second["usage"]["text_passes"], second["class_set"]["text_cache"]) == (0, "hit")
    assert first["results"] == second["results"]


def test_tuning_leaves_no_tensor_behind(real: Live) -> None:
    """A graph that outlives its request would show as tensors that are still there."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    def ask(seed: int) -> None:
        tuning = {"method": "tpt", "scope": "image", "seed": seed}
        assert real.ask(png(seed), png(seed + 1), adaptation=tuning).status_code == 200

    for seed in range(3):
        ask(seed)
    real.assert_well()
    before = alive()
    for seed in range(12):
        ask(seed)
    real.assert_well()
    until(lambda: alive() <= before, "every tensor of a request has gone")


# ---- files ----


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_arrays_changed_anywhere_under_a_header_that_vouches_for_them_never_crash(
    tmp_path: Path, name: str, count: int
) -> None:
    """Whoever can change the arrays can change the digest beside them: what is read must still be whole, or refused."""
    arrays, header = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
    for path in (arrays, header):
        shutil.copy(BUNDLED / path.name, path)
    fingerprint = json.loads((BUNDLED / "root.json").read_text())["fingerprint"]
    whole, inner = arrays.read_bytes(), json.loads(header.read_text()).get("header")
    start = 8 + int.from_bytes(whole[:8], "little")  # names, shapes and offsets: flips there break most
    refusals = 0
    for number, copy in enumerate(zoo.flips(whole[:start], count, seed=len(name))):
        data = copy + whole[start:] if number % 4 else whole[: len(whole) * number // count]
        arrays.write_bytes(data)
        if inner is not None:
            header.write_bytes(store._text(inner | {"arrays_sha256": hashlib.sha256(data).hexdigest()}))
        try:
            assert READERS[name](tmp_path, fingerprint) is not None
        except (ValueError, InvalidCheckpoint):
            refusals += 1
    assert refusals > count // 2
