"""Names for nodes, from the phrases of their members' captions.

The score of a phrase in a node is c-TF-IDF against the node's siblings (BERTopic, Grootendorst 2022), times how far its
share in the node exceeds an even one, times the cosine of the phrase's feature with what sets the node's captions apart
from its siblings'. Siblings never share a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prototypes.cache import FeatureCache
from prototypes.vectors import Floats, Ints, unit

__all__ = ["Phrasebook"]

SUPPORT = 0.15  # share of a node's pairs below which a phrase counts for less: rare words are no labels


@dataclass(frozen=True, eq=False)
class Phrasebook:
    """Candidate phrases and which kept pairs hold them: entry i says that pair `position[i]` holds `phrase[i]`."""

    words: tuple[str, ...]
    feature: Floats  # (P, D) raw unit features
    centred: Floats  # (P, D) the mean over phrases subtracted
    phrase: Ints
    position: Ints
    weight: NDArray[np.float64]

    @classmethod
    def of(cls, cache: FeatureCache, rows: Ints) -> Phrasebook:
        """The phrases of `cache`, for the kept pairs `rows` (n,)."""
        feature = np.array(cache.phrase, np.float32)
        if not len(feature):
            raise ValueError(
                f"the feature cache in {cache.folder} holds no phrases, so concepts can't be named; "
                "make it from pairs with captions."
            )
        if not np.isfinite(feature).all():
            bad = int(np.flatnonzero(~np.isfinite(feature).all(axis=1))[0])
            raise ValueError(f"the feature of phrase {cache.phrases()[bad]!r} is not finite; make the cache again.")
        position = np.full(len(cache), -1, np.int64)
        position[rows] = np.arange(len(rows))
        held = cache.phrase_rows()
        kept = position[held.row] >= 0
        phrase, where = held.phrase[kept], position[held.row[kept]]
        order = np.lexsort((where, phrase))
        words = tuple(cache.phrases())
        return cls(words, feature, unit(feature - feature.mean(axis=0)), phrase[order], where[order], held.weight)

    def split(self, labels: Ints, groups: int) -> list[Phrasebook]:
        """One book for each of the labels 0..groups-1 of the kept pairs (n,): the entries of its pairs."""
        of = labels[self.position]
        order = np.argsort(of, kind="stable")
        parts = np.split(order, np.searchsorted(of[order], np.arange(1, groups)))
        return [replace(self, phrase=self.phrase[part], position=self.position[part]) for part in parts]

    def words_of(self, number: Ints, fallback: str) -> list[str]:
        """The names of sibling nodes by the numbers of their phrases; `fallback` and a count where that is -1."""
        return [self.words[p].strip() if p >= 0 else f"{fallback} {i + 1}" for i, p in enumerate(number)]

    def choose(self, labels: Ints, sizes: Ints, text: Floats, origin: Floats) -> Ints:
        """The number of a phrase for each of K sibling nodes, every one another; -1 where none fits.

        `labels` (n,) says which sibling each pair of this book is in, `sizes` (K,) are the siblings' pairs, `text`
        (K, D) their raw mean caption features. Directions are taken from the siblings' mean; from `origin` (D,) where
        there is only one.
        """
        k = len(text)
        node = labels[self.position]
        present, local = np.unique(self.phrase, return_inverse=True)
        counts, pairs = np.zeros((k, len(present))), sizes[:, None]
        np.add.at(counts, (node, local), self.weight[self.phrase])
        total = np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
        share = counts / total
        score = share * np.log1p(total.sum() / k / counts.sum(axis=0))
        if k > 1:  # a phrase that siblings share evenly tells none of them apart
            score *= np.maximum(share / share.sum(axis=0) - 1.0 / k, 0.0)
        score *= np.minimum(counts / (SUPPORT * pairs), 1.0)
        direction = unit(text - (text.mean(axis=0) if k > 1 else origin)).astype(np.float64)
        score *= np.maximum(direction @ self.centred[present].T.astype(np.float64), 0.0)
        number = np.full(k, -1, np.int64)
        taken: set[str] = set()
        for flat in _descending(score):
            i, j = divmod(int(flat), len(present))
            word = self.words[present[j]].strip()
            if number[i] < 0 and word and word.casefold() not in taken:
                number[i] = present[j]
                taken.add(word.casefold())
                if (number >= 0).all():
                    break
        return number


def _descending(score: NDArray[np.float64]) -> Ints:
    """Flat indices of the positive scores, largest first; equal scores in the order of the phrases."""
    positive = np.flatnonzero(score.ravel() > 0)
    return positive[np.argsort(-score.ravel()[positive], kind="stable")].astype(np.int64)
