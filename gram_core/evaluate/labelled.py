"""A set of labelled images: what every reader makes and everything else takes.

It holds names and a way to get the encoded bytes of one image; it decodes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gram_core.errors import InvalidData

ROLES = ("choosing", "reporting", "training")


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledSet:
    """M images of K classes.

    Attributes:
        name: short and unique in a run, as `pacs/photo` or `cifar10/test`.
        classes: K names as a model is to read them, in label order; a class may have no image.
        keys: M names of the images, stable across runs and machines (relative paths), no two alike.
        labels: (M,) int64, each in [0, K).
        read: the encoded bytes of image i; raises OSError when they can't be had.
        role: `choosing` (settings may be chosen here), `reporting`, or `training` (the model saw these images).
        notes: what a reader should know, each a sentence; shown beside the table.
        identity: a hash of the content of image i that is cheaper than reading it; None: the hash of its bytes.
    """

    name: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], bytes]
    role: str = "reporting"
    notes: tuple[str, ...] = field(default=())
    identity: Callable[[int], bytes] | None = None

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise InvalidData(
                f"set {self.name!r} has {len(self.classes)} class; a classifier needs at least 2. Name the others with "
                "--classes, or give a folder that holds one folder per class."
            )
        if not self.keys:
            raise InvalidData(f"set {self.name!r} has no image in JPEG, PNG or WEBP form.")
        if len(self.keys) != len(self.labels) or len(set(self.keys)) != len(self.keys):
            raise InvalidData(f"set {self.name!r} needs one label for each of its {len(self.keys)} different images.")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise InvalidData(
                f"set {self.name!r} has labels up to {self.labels.max()}, but {len(self.classes)} classes."
            )
        if self.role not in ROLES:
            raise InvalidData(f"set {self.name!r} has role {self.role!r}; choose one of {', '.join(ROLES)}.")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def files_sha256(self) -> str:
        """Hash over the names of the images, their labels and the class names: two runs used the same list or not."""
        lines = [f"{key}\t{label}" for key, label in zip(self.keys, self.labels.tolist(), strict=True)]
        return hashlib.sha256("\n".join([*self.classes, "", *lines]).encode("utf-8", "surrogateescape")).hexdigest()

    def take(self, index: NDArray[np.int64]) -> LabelledSet:
        """The set with the images at `index` only, in that order; classes stay complete."""
        where = index.tolist()
        read, identity = self.read, self.identity
        return replace(
            self,
            keys=tuple(self.keys[i] for i in where),
            labels=self.labels[index],
            read=lambda i: read(where[i]),
            identity=None if identity is None else lambda i: identity(where[i]),
        )

    def subsample(self, count: int, seed: int) -> LabelledSet:
        """At most `count` images, as equal in class shares as the set allows, drawn by `seed`.

        Classes with few images give all they have; the rest is spread over the others.
        """
        if count >= len(self):
            return self
        rng = np.random.default_rng(seed)
        own = [rng.permutation(np.flatnonzero(self.labels == c)) for c in range(len(self.classes))]
        # the r-th image of every class stands before the (r+1)-th of any; within a round classes are in random order
        ranked = [(r, float(rng.random()), int(i)) for mine in own for r, i in enumerate(mine)]
        chosen = sorted(i for _, _, i in sorted(ranked)[:count])
        return self.take(np.array(chosen, dtype=np.int64))


def with_names(given: LabelledSet, names: Mapping[str, str]) -> LabelledSet:
    """The set under other class names, `names[old] = new`; names that are not mentioned stay."""
    return replace(given, classes=tuple(names.get(c, c) for c in given.classes))
