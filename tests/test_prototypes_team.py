"""Clustering by several processes: the tree and the bank of one, bit for bit, whatever the kind and the number."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from prototypes.bank import PrototypeBank
from prototypes.cleaning import distinct
from prototypes.cluster import KINDS, ClusterConfig, grow
from prototypes.hierarchy import Hierarchy
from prototypes.team import ALONE, Team
from prototypes.vectors import group_means, nearest, partition, spherical_kmeans, total, unit
from tests.prototypes_fixtures import SIZES, plant, together

TREE = ("level", "parent", "label", "visual", "text", "concentration", "rank", "confusion", "kappa", "visual_mean")
BANK = ("visual", "text", "concentration", "kappa", "parent", "level", "node", "count")


def content(made: tuple[Hierarchy, PrototypeBank]) -> tuple[object, ...]:
    tree, bank = made
    arrays = [getattr(tree, name).tobytes() for name in TREE] + [getattr(bank, name).tobytes() for name in BANK]
    return *arrays, tree.keys, tree.names, tree.facts, bank.names, bank.medoids


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which hundreds of pairs are as many blocks, cells and shared rounds as millions."""
    monkeypatch.setattr("prototypes.vectors.blocks.__defaults__", (32, ALONE))
    monkeypatch.setattr("prototypes.vectors.BLOCK", 64)
    monkeypatch.setattr("prototypes.vectors.TOGETHER", 50_000)
    monkeypatch.setattr("prototypes.cleaning.CELL", 50)
    monkeypatch.setattr("prototypes.cluster.MEASURED", 20)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kind", KINDS)
def test_two_and_three_processes_make_the_tree_and_bank_of_one(tmp_path: Path, kind: str) -> None:
    cache = plant(noise=0.15).write(tmp_path)
    config = ClusterConfig(kind=kind, quantile=0.1, duplicate=0.82, sizes=SIZES)
    leaks = np.asarray(cache.image[:3])

    def work(team: Team) -> tuple[object, ...]:
        tree = grow(cache, config, leaks=leaks, team=team)
        return content((tree, PrototypeBank.build(tree, cache, team=team)))

    alone = work(ALONE)
    assert alone[-3]["dropped"]["near-duplicates"] > 0  # type: ignore[index]
    for size in (2, 3):
        for one in together(size, work):
            assert one == alone


def test_every_task_is_dealt_to_one_process_and_the_load_is_even() -> None:
    costs = np.random.default_rng(0).pareto(1.5, 200)
    shares = [Team(rank, 7).deal(costs) for rank in range(7)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(200))
    loads = [costs[share].sum() for share in shares]
    # the dearest first is at most 4/3 - 1/(3 m) of the best possible (Graham 1969), which is at least both of these
    assert max(loads) <= (4 / 3) * max(costs.sum() / 7, costs.max())
    assert ALONE.deal(costs).tolist() == list(range(200))
    assert Team(2, 3).deal([]).tolist() == []


@pytest.mark.usefixtures("_small")
def test_sums_do_not_depend_on_the_number_of_processes() -> None:
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((500, 16)))
    labels = rng.integers(9, size=500)

    def work(team: Team) -> list[bytes]:
        take = x.__getitem__
        made = [total(take, 500, team), group_means(take, labels, 9, team), group_means(take, labels * 0, 1, team)]
        made += [spherical_kmeans(x, 20, 3, team=team), distinct(take, 500, 0.6, 1, team)]
        return [each.tobytes() for each in made]

    alone = work(ALONE)
    assert all(one == alone for size in (2, 5) for one in together(size, work))


def test_shared_rounds_are_those_of_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((30, 24))[rng.integers(30, size=4000)] + 0.2 * rng.standard_normal((4000, 24)))
    monkeypatch.setattr("prototypes.vectors.RESTARTS", 1)
    theirs = spherical_kmeans(x, 30, 0)
    monkeypatch.setattr("prototypes.vectors.TOGETHER", 0)
    # the same seeds and rounds; faiss adds a hundred rows in float32, each with an error of 6e-8
    np.testing.assert_allclose(spherical_kmeans(x, 30, 0), theirs, atol=1e-5)


def test_centres_without_rows_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prototypes.vectors.TOGETHER", 0)
    x = np.repeat(unit(np.eye(3, 8)), 20, axis=0)
    centres = spherical_kmeans(x, 5, 0)
    assert np.isfinite(centres).all()
    assert nearest(x, centres)[0].min() > 1 - 1e-6


@pytest.fixture
def _regions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CELL": 100, "REGIONAL": 1000, "REGION": 400}.items():
        monkeypatch.setattr(f"prototypes.cleaning.{name}", value)


@pytest.mark.usefixtures("_regions")
def test_many_rows_are_searched_region_by_region() -> None:
    x = np.tile(unit(np.random.default_rng(0).standard_normal((2000, 32))), (2, 1))
    assert distinct(x.__getitem__, len(x), 0.97, 0).tolist() == list(range(2000))


@pytest.mark.usefixtures("_regions")
def test_rows_that_nothing_tells_apart_are_survived() -> None:
    x = np.tile(unit(np.random.default_rng(0).standard_normal((1, 32))), (4000, 1))
    stay = distinct(x.__getitem__, len(x), 0.97, 0).tolist()
    assert stay[0] == 0
    assert len(stay) <= 4  # the last rows of a matrix product may be rounded otherwise, and so lie in another cell


def test_every_process_searches_on_the_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of faiss on a GPU only the call is tested here: which card it names."""
    cards: list[int] = []

    def search(_: object, x: np.ndarray, __: object, k: int, *, metric: int, device: int) -> tuple[np.ndarray, ...]:
        assert metric == faiss.METRIC_INNER_PRODUCT
        cards.append(device)
        return np.zeros((len(x), k), np.float32), np.zeros((len(x), k), np.int64)

    monkeypatch.setattr("prototypes.vectors.GPU_FROM", 0)
    for name, fake in {"get_num_gpus": lambda: 4, "StandardGpuResources": object, "knn_gpu": search}.items():
        monkeypatch.setattr(faiss, name, fake, raising=False)
    x = unit(np.random.default_rng(0).standard_normal((40, 8)))
    team = Team(5, 8, gpu=1)
    nearest(x, x[:3], team=team)
    nearest(x, x[:3], team=team.alone)
    assert cards == [1, 1]
    partition(x.__getitem__, np.arange(40), 3, 1, 0, Team(gpu=2))
    assert set(cards) == {1, 2}


def test_several_processes_that_nobody_connected_are_an_error_not_a_wrong_sum() -> None:
    Team().add(np.ones(3))
    with pytest.raises(NotImplementedError, match="of its own"):
        Team(rank=0, size=2).add(np.ones(3))
