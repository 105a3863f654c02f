"""What is dropped before clustering: pairs that don't agree, near-duplicates, and images of the user's test data.

One pass over image and caption features checks them as well: NaN or unnormalised rows are refused by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prototypes.cache import FeatureCache
from prototypes.team import ALONE, Team
from prototypes.vectors import Floats, Ints, Take, assign, blocks, nearest, spherical_kmeans

__all__ = ["Kept", "clean", "distinct"]

UNIT_TOLERANCE = 1e-2  # float16 towers normalise to about 1e-3
STEP = 1_024  # rows of one step of the search for duplicates
CELL = 20_000  # rows up to which every pair is compared; beyond, only pairs in one cell
REGION = 2**16  # rows of the regions that more rows than `REGIONAL` are cut into first, so that work stays linear
REGIONAL, REGIONS = 2**20, 1_024
PASSES = 2  # over differently cut cells: a pair that one cut parts is found by the other


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows (n,) of the cache in the order of their keys, those keys, and how many rows each rule dropped."""

    rows: Ints
    keys: tuple[str, ...]
    dropped: dict[str, int]


def clean(
    cache: FeatureCache,
    *,
    quantile: float,
    duplicate: float,
    leak: float,
    leaks: Floats | None,
    seed: int,
    team: Team = ALONE,
) -> Kept:
    """Apply the rules in turn: captions, agreement above `quantile`, cosine to `leaks` (L, D), near-duplicates.

    Of near-duplicates (image cosine above `duplicate`) the one with the first key stays. The answer depends on
    keys and features only, never on the order of the rows.
    """
    names, captioned = cache.keys(), cache.captioned()
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    dropped: dict[str, int] = {}
    rows = order[captioned[order]]
    dropped["no caption"] = len(order) - len(rows)
    if len(rows):
        agreement = _agreement(cache, rows, names, team)
        kept = agreement >= np.quantile(agreement, quantile)
        dropped["low agreement"] = int((~kept).sum())
        rows = rows[kept]
    if leaks is not None:
        if leaks.ndim != 2 or leaks.shape[1] != cache.dimension or not np.isfinite(leaks).all():
            raise ValueError(
                f"the images to keep out have shape {leaks.shape}, expected finite (L, {cache.dimension}); "
                "cache them with the same model."
            )
        cosine = np.zeros(len(rows))
        for part in blocks(len(rows), team=team):
            cosine[part] = nearest(cache.image[rows[part]], leaks, team=team)[0][:, 0]
        team.add(cosine)
        kept = cosine <= leak
        dropped["test images"] = int((~kept).sum())
        rows = rows[kept]
    before = len(rows)
    for attempt in range(PASSES if len(rows) > CELL else 1):
        sofar = rows
        # mypy has no type for a lambda with a default, which binds this turn's rows
        take: Take = lambda p, sofar=sofar: cache.image[sofar[p]]  # type: ignore[misc]  # noqa: E731
        rows = rows[distinct(take, len(rows), duplicate, seed + attempt, team)]
    dropped["near-duplicates"] = before - len(rows)
    return Kept(rows, tuple(names[row] for row in rows), dropped)


def _agreement(cache: FeatureCache, rows: Ints, names: Sequence[str], team: Team) -> NDArray[np.float64]:
    """(n,) cosine of image and caption; refuses rows that are not finite and of unit norm."""
    found = np.zeros(len(rows))
    for part in blocks(len(rows), team=team):
        pair = [np.asarray(array[rows[part]], np.float64) for array in (cache.image, cache.caption)]
        for x, kind in zip(pair, ("image", "caption"), strict=True):
            wrong = np.flatnonzero(~(np.abs(np.linalg.norm(x, axis=1) - 1.0) <= UNIT_TOLERANCE))
            if len(wrong):
                norm = float(np.linalg.norm(x[wrong[0]]))
                what = f"norm {norm:.3f}" if np.isfinite(norm) else "values that are not finite"
                raise ValueError(
                    f"the {kind} feature of {names[rows[part][wrong[0]]]!r} has {what}, expected norm 1 "
                    f"({len(wrong)} such rows nearby); make the cache in {cache.folder} again."
                )
        found[part] = (pair[0] * pair[1]).sum(axis=1)
    team.add(found)
    return found


def distinct(take: Take, count: int, threshold: float, seed: int, team: Team = ALONE) -> Ints:
    """Positions (m,) that stay when everything with cosine above `threshold` to an earlier one that stays is dropped.

    Exact up to `CELL` rows. Beyond, rows are cut into about sqrt(n) cells first and compared inside their cell; beyond
    `REGIONAL` rows into regions that are cut once more, so that no row meets more than some 2,000 others.
    """
    if count <= CELL:
        return _first(take, np.arange(count), threshold)
    stays = np.zeros(count, np.int64)
    cells = _cells(take, np.arange(count), seed, team)
    for i in team.deal([len(cell) * np.sqrt(len(cell)) for cell in cells]):
        stays[_within(take, cells[i], threshold, seed, team.alone)] = 1
    team.add(stays)
    return np.flatnonzero(stays).astype(np.int64)


def _within(take: Take, members: Ints, threshold: float, seed: int, team: Team) -> Ints:
    """The rule inside one cell."""
    cells = _cells(take, members, seed, team) if len(members) > CELL else [members]
    if len(cells) == 1:  # small, or nothing tells its rows apart
        return _first(take, members, threshold)
    return np.concatenate([_within(take, cell, threshold, seed, team) for cell in cells])


def _cells(take: Take, members: Ints, seed: int, team: Team) -> list[Ints]:
    """`members` by the nearest of some centres, each in their order; cells without any are left out."""
    n = len(members)
    count = int(np.sqrt(n)) if n <= REGIONAL else min(REGIONS, -(-n // REGION))
    rng = np.random.default_rng([seed, n])
    sample = np.sort(rng.choice(n, min(n, 32 * count), replace=False)).astype(np.int64)
    centres = spherical_kmeans(np.asarray(take(members[sample]), np.float32), count, seed, team=team)
    cell = assign(take, members, centres, team)
    order = np.argsort(cell, kind="stable").astype(np.int64)
    groups = np.split(members[order], np.searchsorted(cell[order], np.arange(1, count)))
    return [group for group in groups if len(group)]


def _first(take: Take, members: Ints, threshold: float) -> Ints:
    """The greedy rule among `members`, in their order; memory of the rows that stay and one step."""
    stay: list[Ints] = []
    kept: list[Floats] = []
    for part in blocks(len(members), STEP):
        ids = members[part]
        x = np.asarray(take(ids), np.float32)
        free = np.ones(len(ids), bool)
        for earlier in kept:
            free[free] = nearest(x[free], earlier)[0][:, 0] <= threshold if free.any() else True
        close = np.tril(x @ x.T > threshold, -1)
        for i in np.flatnonzero(close.any(axis=1)):
            if free[i]:
                free[i] = not (close[i] & free).any()
        stay.append(ids[free])
        kept = _merge(kept, x[free])
    return np.concatenate([*stay, np.empty(0, np.int64)])


def _merge(kept: list[Floats], x: Floats) -> list[Floats]:
    """`kept` with `x`; pieces double in size, so that there are few and each row is copied seldom."""
    while kept and len(kept[-1]) <= len(x):
        x = np.concatenate([kept.pop(), x])
    return [*kept, x] if len(x) else kept
