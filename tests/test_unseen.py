"""gram_core.unseen: the views of unseen images are those of test time, survive kills, and bad images are counted."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from rich.console import Console

from gram_core import pairs
from gram_core.backbone import Backbone, load
from gram_core.classifier import Classifier
from gram_core.domains import DOMAINS
from gram_core.errors import FingerprintMismatch, InvalidConfig, InvalidData
from gram_core.images import decode
from gram_core.pairs import PairsConfig, open_sources
from gram_core.unseen import PLAIN, UnseenConfig, ViewCache, build, listed
from tests.conftest import TINY, write_model
from tests.test_pairs import ended, forked, one_thread, picture, shard, zipped

HALF = {"rtol": 0, "atol": 5e-4}  # numbers of unit vectors rounded to 11 bits
FILES = ["header.json", "rows.jsonl", "views.f16"]


def made(out: Path, backbone: Backbone, *data: Path, keys: Any = ("d/",), **options: Any) -> dict[str, Any] | None:
    ranks = {name: options.pop(name) for name in ("rank", "world") if name in options}
    config = UnseenConfig(**({"views": 3, "styled_views": 2, "part": 3, "workers": 2} | options))
    said = Console(file=io.StringIO(), width=400)
    return build(open_sources(PairsConfig(data=data)), keys, out, backbone, said, config, **ranks)


def photos(path: Path, count: int) -> Path:
    return shard(path, [(f"s{i:02d}.jpg", picture(i)) for i in range(count)])


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# ---- which pairs


@pytest.mark.parametrize(
    ("entry", "key", "taken"),
    [
        ("s/a.jpg", "s/a.jpg", True),
        ("a.jpg", "s/a.jpg", True),
        ("train/a.jpg", "s/train/a.jpg", True),
        ("a.jpg", "s/aa.jpg", False),
        ("s/", "s/a.jpg", True),
        ("s/val/", "s/val/cat/a.jpg", True),
        ("val/", "s/val/cat/a.jpg", False),
        ("s", "s/a.jpg", False),
        ("s/a", "s/a.jpg", False),
    ],
)
def test_an_entry_takes_a_key_its_end_or_a_whole_folder(entry: str, key: str, taken: bool) -> None:
    assert listed([entry])(key) is taken


def test_only_the_listed_pairs_are_computed(tiny: Backbone, tmp_path: Path) -> None:
    data = photos(tmp_path / "d.tar", 9)
    header = made(tmp_path / "out", tiny, data, keys=["s03", "d/s07", "other/s01"], share=0.0)
    cache = ViewCache.open(tmp_path / "out", fingerprint=tiny.fingerprint)
    assert cache.keys == ("d/s03", "d/s07")
    assert set(cache.domains) == {PLAIN}
    assert header is not None
    assert header["counts"] == {PLAIN: 2}
    with pytest.raises(InvalidData, match="none of the 1 keys is there, the first is nothing"):
        made(tmp_path / "none", tiny, data, keys=["nothing"])


# ---- the views


def test_the_views_are_those_that_the_classifier_sees_at_test_time(
    tiny: Backbone, tiny_dir: Path, tmp_path: Path
) -> None:
    made(tmp_path / "out", tiny, photos(tmp_path / "d.tar", 5), share=0.0, views=4, seed=7)
    cache = ViewCache.open(tmp_path / "out", fingerprint=tiny.fingerprint)
    classifier = Classifier.load(str(tiny_dir), device="cpu")
    seen = classifier.see([classifier.prepare(decode(picture(i))) for i in range(5)], 4, 7, (0.85, 1.0)).views
    assert cache.features.shape == (5, 4, 32)
    np.testing.assert_allclose(cache.views(range(5)), seen.numpy(), **HALF)
    np.testing.assert_allclose(np.linalg.norm(cache.views([2, 4]), axis=-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(cache.originals([2, 4]), cache.views([2, 4])[:, 0])
    assert cache.views([0]).dtype == np.float32


def test_restyled_images_are_a_seeded_share_and_their_views_repeat(tiny: Backbone, tmp_path: Path) -> None:
    data = photos(tmp_path / "d.tar", 24)
    made(tmp_path / "out", tiny, data, views=4, styled_views=2)
    cache = ViewCache.open(tmp_path / "out", fingerprint=None)
    keys = {domain: {k for k, d in zip(cache.keys, cache.domains, strict=True) if d == domain} for domain in DOMAINS}
    assert len({frozenset(own) for own in keys.values()}) == 1  # the same images in every domain
    assert 3 <= len(keys["pencil"]) <= 21  # of 24 fair draws; outside with a chance of 4e-5
    rows = [i for i, domain in enumerate(cache.domains) if domain != PLAIN]
    features = cache.views(rows)
    np.testing.assert_array_equal(features[:, :2], features[:, 2:])
    assert (features[:, 0] != features[:, 1]).any()
    made(tmp_path / "fewer", tiny, data, keys=[f"s{i:02d}" for i in range(0, 24, 2)], views=4, styled_views=2)
    fewer = ViewCache.open(tmp_path / "fewer", fingerprint=None)
    every = dict(zip(zip(cache.keys, cache.domains, strict=True), cache.features, strict=True))
    for key, domain, own in zip(fewer.keys, fewer.domains, fewer.features, strict=True):
        np.testing.assert_array_equal(own, every[key, domain])  # whoever else is there
    assert sum(d != PLAIN for d in fewer.domains) == 3 * len(keys["pencil"] & set(fewer.keys))


def test_zip_members_and_images_without_a_caption_have_views_too(tiny: Backbone, tmp_path: Path) -> None:
    data = zipped(tmp_path / "set.zip", {"val/cat/1.jpg": picture(1), "val/dog/2.jpg": picture(2), "3.jpg": picture(3)})
    made(tmp_path / "out", tiny, data, keys=["set/val/", "3.jpg"], share=0.0)
    assert ViewCache.open(tmp_path / "out", fingerprint=None).keys == (
        "set/3.jpg",
        "set/val/cat/1.jpg",
        "set/val/dog/2.jpg",
    )


# ---- bad input


def test_bad_images_are_counted_and_left_out(tiny: Backbone, tmp_path: Path) -> None:
    members = {"a.jpg": picture(0), "b.jpg": b"nothing", "c.txt": b"a caption", "e.jpg": picture(0)[:300]}
    data = shard(tmp_path / "d.tar", list(members.items()))
    header = made(tmp_path / "out", tiny, data, share=0.0)
    assert header is not None
    assert header["skipped"] == {"no_image": 1, "undecodable_image": 1, "unsupported_image_format": 1}
    assert ViewCache.open(tmp_path / "out", fingerprint=None).keys == ("d/a",)
    with pytest.raises(InvalidData, match="none of the chosen images can be used"):
        made(tmp_path / "none", tiny, data, keys=["b", "c"])


def test_features_that_are_not_numbers_are_an_error_in_words(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "encode_images", lambda pixels, **_: torch.full((len(pixels), 32), torch.nan))
    with pytest.raises(InvalidData, match=r"NaN or empty features for 9 of 9 inputs, the first is 'd/s00'"):
        made(tmp_path / "out", tiny, photos(tmp_path / "d.tar", 3), share=0.0)


def test_a_folder_of_another_model_or_other_views_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    other = load(str(write_model(tmp_path / "other", TINY, seed=5)), device="cpu")
    data = photos(tmp_path / "d.tar", 3)
    first = made(tmp_path / "out", tiny, data)
    before = content(tmp_path / "out")
    assert made(tmp_path / "out", tiny, data) == first
    with pytest.raises(FingerprintMismatch, match="features of model 'tiny'"):
        made(tmp_path / "out", other, data)
    with pytest.raises(InvalidData, match="of other data or options"):
        made(tmp_path / "out", tiny, data, seed=1)
    with pytest.raises(FingerprintMismatch, match=r"the view cache in .* is of model"):
        ViewCache.open(tmp_path / "out", fingerprint=other.fingerprint)
    assert content(tmp_path / "out") == before


def test_a_missing_unfinished_or_damaged_cache_is_an_error_in_words(tiny: Backbone, tmp_path: Path) -> None:
    made(tmp_path / "out", tiny, photos(tmp_path / "d.tar", 3))
    good = content(tmp_path / "out")
    header = json.loads(good["header.json"])
    cases: list[tuple[str, bytes | None, str]] = [
        ("header.json", None, "is no view cache"),
        ("header.json", b"{", "is damaged"),
        ("header.json", json.dumps(header | {"complete": False}).encode(), "is unfinished"),
        ("header.json", json.dumps(header | {"format": 99}).encode(), "has format 99"),
        ("views.f16", good["views.f16"][:-2], "is cut off"),
        ("views.f16", None, "has 0 bytes"),
        ("rows.jsonl", good["rows.jsonl"].splitlines()[0], "are no view cache"),
        ("rows.jsonl", b"[]\n", "can't be read"),
        ("rows.jsonl", None, "can't be read"),
    ]
    for name, content_, words in cases:
        path = tmp_path / "out" / name
        path.unlink() if content_ is None else path.write_bytes(content_)
        with pytest.raises(InvalidData, match=words):
            ViewCache.open(tmp_path / "out", fingerprint=tiny.fingerprint)
        path.write_bytes(good[name])
    assert len(ViewCache.open(tmp_path / "out", fingerprint=tiny.fingerprint)) == header["rows"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": 2, "styled_views": 3}, "views is 2; it must be at least styled_views, 3"),
        ({"styled_views": 0}, "styled_views is 0"),
        ({"domains": ("pencil", "oil")}, "no domain 'oil'; choose from pencil, contour, cartoon"),
        ({"share": 1.5}, "share is 1.5"),
        ({"scale": (0.5,)}, "give two shares"),
        ({"scale": (0.9, 0.5)}, "give two shares"),
    ],
)
def test_options_outside_their_range_are_errors_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        UnseenConfig(**options)


# ---- kills and ranks


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", [1, 2, 4, 6, 7, 8])  # header, parts 1, 3, rows, views, header of ten images
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tiny: Backbone, tmp_path: Path, moment: int) -> None:
    data = photos(tmp_path / "d.tar", 10)

    @contextmanager
    def deadly(path: Path) -> Iterator[BinaryIO]:
        deadly.count += 1  # type: ignore[attr-defined]
        with plain(path) as file:
            yield file
            if deadly.count >= moment:  # type: ignore[attr-defined]
                file.truncate(max(1, file.tell() // 2))
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        pairs.beside = deadly
        made(tmp_path / "out", tiny, data)

    plain = pairs.beside
    deadly.count = 0  # type: ignore[attr-defined]
    with one_thread():
        made(tmp_path / "good", tiny, data)
        assert ended(forked(killed)) == -signal.SIGKILL
        with pytest.raises(InvalidData, match="is unfinished" if moment > 1 else "is no view cache"):
            ViewCache.open(tmp_path / "out", fingerprint=None)
        there = [path.name for path in (tmp_path / "out" / "parts").iterdir() if not path.name.startswith(".")]
        with pytest.MonkeyPatch.context() as patch:
            again: list[str] = []
            patch.setattr(pairs, "beside", lambda path: (again.append(path.name), plain(path))[1])
            made(tmp_path / "out", tiny, data)
    assert len(there) == min(4, max(0, moment - 2))
    assert not set(there) & set(again)  # what was finished is not computed again
    assert content(tmp_path / "out") == content(tmp_path / "good")
    assert sorted(content(tmp_path / "out")) == FILES


def test_ranks_share_the_parts_and_rank_0_puts_them_together(
    tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "PATIENCE_S", 0.3)
    data = photos(tmp_path / "d.tar", 10)
    made(tmp_path / "whole", tiny, data)
    with pytest.raises(InvalidData, match="parts of the other processes don't come"):
        made(tmp_path / "out", tiny, data, rank=0, world=2)
    assert made(tmp_path / "out", tiny, data, rank=1, world=2) is None
    made(tmp_path / "out", tiny, data, rank=0, world=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
