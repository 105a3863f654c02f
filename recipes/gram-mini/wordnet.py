"""WordNet's nouns as Debian's `wordnet-base` ships them: synsets, senses and the tree above ImageNet's classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sources import require

# Lexicographer files of things that can be photographed:
# animal, artifact, body, food, object, person, plant, substance.
CONCRETE = frozenset({5, 6, 8, 13, 17, 18, 20, 27})


@dataclass(frozen=True)
class Synset:
    """One noun sense: WordNet id (n + offset), lexicographer file, lemmas, hypernyms and gloss."""

    wnid: str
    lex: int
    words: tuple[str, ...]
    hypernyms: tuple[str, ...]
    gloss: str


class WordNet:
    """The noun part of WordNet 3.0."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[str, Synset] = {}
        self.senses: dict[str, tuple[str, ...]] = {}
        self.irregular: dict[str, str] = {}
        for line in require(folder / "data.noun", "WordNet").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            parts = head.split()
            count = int(parts[3], 16)
            words = tuple(parts[4 + 2 * i].replace("_", " ") for i in range(count))
            rest = parts[5 + 2 * count :]
            hypernyms = tuple("n" + rest[i + 1] for i in range(0, len(rest), 4) if rest[i] in ("@", "@i"))
            wnid = "n" + parts[0]
            self.synsets[wnid] = Synset(wnid, int(parts[1]), words, hypernyms, gloss.split(";")[0].strip())
        for line in require(folder / "index.noun", "WordNet").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                self.senses[parts[0].replace("_", " ")] = tuple("n" + x for x in parts[-int(parts[2]) :])
        for line in require(folder / "noun.exc", "WordNet").read_text(encoding="utf-8").splitlines():
            plural, single = line.split()[:2]
            self.irregular[plural.replace("_", " ")] = single.replace("_", " ")

    def lemma(self, phrase: str) -> str | None:
        """The singular noun for a phrase, or None when WordNet does not know it."""
        candidates = [self.irregular.get(phrase, phrase), phrase]
        if phrase.endswith("ies"):
            candidates.append(phrase[:-3] + "y")
        if phrase.endswith("es"):
            candidates.append(phrase[:-2])
        if phrase.endswith("s") and not phrase.endswith("ss"):
            candidates.insert(0, phrase[:-1])
        return next((c for c in candidates if c in self.senses), None)

    def concrete_sense(self, lemma: str) -> Synset | None:
        """The first sense when it is a thing one can photograph, else None."""
        first = self.synsets[self.senses[lemma][0]]
        return first if first.lex in CONCRETE else None

    def ancestors(self, wnid: str) -> list[str]:
        """First hypernyms, nearest first."""
        out: list[str] = []
        while self.synsets[wnid].hypernyms:
            wnid = self.synsets[wnid].hypernyms[0]
            out.append(wnid)
        return out

    def names(self, max_words: int) -> list[str]:
        """Lemmas whose first sense is concrete: lower case letters, at most `max_words` words."""
        return [
            x
            for x in self.senses
            if len(x) > 2
            and x.replace(" ", "").replace("-", "").isalpha()
            and len(x.split()) <= max_words
            and (sense := self.concrete_sense(x)) is not None
            and any(word == x for word in sense.words)  # written in lower case: no proper names
        ]


@dataclass
class Tree:
    """The first-hypernym tree over some leaves; `below[node]` are leaf positions."""

    leaves: tuple[str, ...]
    children: dict[str, list[str]] = field(default_factory=dict)
    root: str = "n00001740"

    @classmethod
    def over(cls, wordnet: WordNet, leaves: Iterable[str]) -> Tree:
        """Build it; a leaf that is an ancestor of another keeps its own entry below itself."""
        tree = cls(tuple(leaves))
        for leaf in tree.leaves:
            chain = [leaf, *wordnet.ancestors(leaf)]
            for child, parent in itertools.pairwise(chain):
                siblings = tree.children.setdefault(parent, [])
                if child not in siblings:
                    siblings.append(child)
        return tree

    @cached_property
    def below(self) -> dict[str, list[int]]:
        """Leaf positions under every node, a leaf's own included."""
        position = {leaf: i for i, leaf in enumerate(self.leaves)}
        out: dict[str, list[int]] = {}

        def walk(node: str) -> list[int]:
            found = [position[node]] if node in position else []
            for child in self.children.get(node, []):
                found.extend(walk(child))
            out[node] = found
            return found

        walk(self.root)
        return out

    def cut(self, rng: np.random.Generator, *, stop: float, largest: int) -> list[str]:
        """A random set of disjoint nodes: walk down, stop with probability `stop` below `largest` leaves."""
        out: list[str] = []
        stack = [self.root]
        while stack:
            node = stack.pop()
            children = self.children.get(node, [])
            if not children or (len(self.below[node]) <= largest and rng.random() < stop):
                out.append(node)
            else:
                stack.extend(children)
        return out

    def membership(self, nodes: Sequence[str]) -> NDArray[np.float32]:
        """(nodes, leaves) of 0 and 1: probabilities of leaves times its transpose are those of nodes."""
        out = np.zeros((len(nodes), len(self.leaves)), np.float32)
        for row, node in enumerate(nodes):
            out[row, self.below[node]] = 1.0
        return out
