"""What a session's memory keeps, forgets and says, and what bytes it takes back."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from gram_core.errors import InvalidMemory
from gram_core.memory import Memory

VIEWS, DIM = 3, 8


def seen(count: int, seed: int = 0) -> tuple[Tensor, list[bytes]]:
    """Unit features (count, VIEWS, DIM) and as many hashes."""
    made = torch.randn(count, VIEWS, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=-1), [hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(count)]


def balanced(kept: Memory) -> set[bytes]:
    """Hashes of what is held balanced."""
    snapshot = kept.snapshot()
    return {h for h, held in zip(snapshot.sha256, snapshot.balanced, strict=True) if held}


def memory(classes: int = 4, capacity: int = 16) -> Memory:
    return Memory(classes, views=VIEWS, dim=DIM, capacity=capacity)


def test_what_is_offered_is_kept_once_and_stays_frozen() -> None:
    kept = memory()
    views, hashes = seen(4)
    assert kept.add(views, hashes, [0, 1, 2, 3]) == 4
    assert kept.add(views, hashes, [3, 2, 1, 0]) == 0  # the same images again, whatever they are called now
    assert kept.counts == [1, 1, 1, 1]
    before = kept.snapshot()
    views.zero_()
    assert torch.equal(kept.snapshot().views, before.views)
    kept.clear()
    assert len(kept) == kept.nbytes == 0
    assert len(before.sha256) == 4


def test_no_class_outgrows_its_quota_and_a_flood_drives_nobody_out() -> None:
    kept = memory()
    assert kept.quota == 4
    views, hashes = seen(8)
    kept.add(views, hashes, [0, 1, 2, 3] * 2)
    flood, more = seen(500, seed=1)
    kept.add(flood, more, [2] * 500)
    assert kept.counts == [2, 2, 4, 2]
    others = {h for h, label in zip(hashes, [0, 1, 2, 3] * 2, strict=True) if label != 2}
    assert others <= balanced(kept)
    assert kept.nbytes == len(kept.snapshot().sha256) * VIEWS * DIM * 4 <= kept.most_bytes


def test_the_latest_are_held_besides_whatever_they_are() -> None:
    kept = memory()
    views, hashes = seen(100)
    for n in range(100):
        kept.add(views[n : n + 1], hashes[n : n + 1], [0])
    snapshot = kept.snapshot()
    recent = {h for h, age in zip(snapshot.sha256, snapshot.age, strict=True) if age >= 0}
    assert recent == set(hashes[-16:])
    assert snapshot.age[snapshot.sha256.index(hashes[-1])] == 0
    assert snapshot.age[snapshot.sha256.index(hashes[-3])] == 2
    assert len(balanced(kept)) == len(kept) == 4
    assert len(snapshot.sha256) == len(recent | balanced(kept))


def test_a_full_class_keeps_a_fair_sample_of_all_that_came() -> None:
    """Each of 40 images of one class is held at the end about as often as any other, over many streams."""
    held = torch.zeros(40)
    for stream in range(300):
        kept = memory(classes=1, capacity=8)
        views, hashes = seen(40, seed=1000 + stream)
        kept.add(views, hashes, [0] * 40)
        held += torch.tensor([float(h in balanced(kept)) for h in hashes])
    early, late = held[:20].sum() / held.sum(), held[20:].sum() / held.sum()
    assert 0.25 < float(early) < 0.75  # the oldest goes first, so late ones have some advantage, no more
    assert float(early + late) == pytest.approx(1)


def test_more_classes_than_places_share_what_there_is() -> None:
    kept = memory(classes=30, capacity=16)
    views, hashes = seen(60)
    kept.add(views, hashes, [n % 30 for n in range(60)])
    assert len(kept) == 16
    assert max(kept.counts) <= kept.quota
    few, more = seen(4, seed=5)
    kept.add(few, more, [29] * 4)
    assert len(kept) == 16


def test_the_same_stream_fills_the_same_memory() -> None:
    views, hashes = seen(100)
    labels = [n % 3 for n in range(100)]
    one, other = memory(), memory()
    one.add(views, hashes, labels)
    for n in range(0, 100, 7):
        other.add(views[n : n + 7], hashes[n : n + 7], labels[n : n + 7])
    assert one.digest == other.digest
    assert torch.equal(one.snapshot().views, other.snapshot().views)


def test_other_views_and_what_is_no_number_are_not_taken() -> None:
    kept = memory()
    views, hashes = seen(4)
    assert kept.add(views[:, :2], hashes, [0] * 4) == 0
    views[1, 0, 0] = torch.nan
    assert kept.add(views, hashes, [0] * 4) == 3


def test_a_snapshot_leaves_out_the_request_itself_and_looks_at_as_few_views() -> None:
    kept = memory()
    views, hashes = seen(4)
    kept.add(views, hashes, [0, 1, 2, 3])
    others = kept.snapshot().without(hashes[:1], 2)
    assert others.sha256 == tuple(hashes[1:])
    assert torch.equal(others.views, views[1:, :2])
    assert kept.snapshot().without([], VIEWS + 1).sha256 == ()


def test_drift_is_small_while_nothing_changes_and_large_when_everything_does() -> None:
    kept = memory(capacity=50)
    assert kept.drift is None
    here = F.normalize(torch.randn(60, VIEWS, DIM, generator=torch.Generator().manual_seed(0)) * 0.1 + 1, dim=-1)
    kept.add(here, seen(60)[1], [0] * 60)
    assert kept.drift is not None
    calm = kept.drift
    assert calm < 0.02
    kept.add(-here[:30], seen(30, seed=9)[1], [1] * 30)
    assert kept.drift > 1


def test_what_is_dumped_comes_back_as_it_was() -> None:
    kept = memory()
    views, hashes = seen(50)
    kept.add(views, hashes, [n % 4 for n in range(50)])
    data = kept.dump({"model": "m"})
    again, bound = Memory.restore(data)
    assert bound == {"model": "m"}
    assert (again.digest, again.counts, again.drift) == (kept.digest, kept.counts, kept.drift)
    more, others = seen(50, seed=3)
    for each in (kept, again):
        each.add(more, others, [n % 4 for n in range(50)])
    assert again.digest == kept.digest
    empty, _ = Memory.restore(memory().dump({}))
    assert len(empty) == 0


def test_no_other_bytes_are_taken() -> None:
    kept = memory()
    views, hashes = seen(8)
    kept.add(views, hashes, [0, 1, 2, 3] * 2)
    data = kept.dump({})
    generator = torch.Generator().manual_seed(0)
    bad = [b"", b"{}", b"\x80\x04.", data[:-1], data[:100], save({"views": views}), b"\xff" * 64]
    for _ in range(200):
        at = int(torch.randint(len(data), (), generator=generator))
        bad.append(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
    refused = 0
    for each in bad:
        try:
            again, _ = Memory.restore(each)
        except InvalidMemory:
            refused += 1
            continue
        assert max(again.counts) <= again.quota  # a bit of a feature may turn, its length may not
        assert float((again.snapshot().views.norm(dim=-1) - 1).abs().max()) <= 1e-3
    assert refused >= 100
    parts, state = (
        load(data),
        json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gram_memory"]),
    )
    for wrong in (
        {"dim": 10**14},
        {"views": 10**12},
        {"capacity": 10**18},
        {"classes": 2**40, "claimed": [0]},
        {"claimed": [2**64] * 4},
        {"claimed": [-1] * 4},
        {"format": 2},
        {"latest": ["00"]},
        {"balanced": state["balanced"] * 2},
        {"sha256": []},
        {"bound": {"a": 1}},
        {"bound": []},
    ):
        with pytest.raises(InvalidMemory):
            Memory.restore(save(parts, {"gram_memory": json.dumps({**state, **wrong})}))
    huge = save({**parts, "views": torch.zeros(0, 2**20, 2**20)}, {"gram_memory": json.dumps(state)})
    with pytest.raises(InvalidMemory):
        Memory.restore(huge)
    tensors = load(data)
    for name in tensors:
        header = {"gram_memory": "{}"}
        with pytest.raises(InvalidMemory):
            Memory.restore(save({n: t for n, t in tensors.items() if n != name}, header))
