"""Stage `words`: every text the recipe uses, as positions in one list, written to words.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from settings import Settings
from sources import Source
from wordnet import CONCRETE, Tree, WordNet

# Function words that WordNet also lists as nouns (he: helium, can: a container ...), words that say where or how
# rather than what, and words about the photo itself.
NOT_NOUNS_TEXT = """
his her its the and are was were has had him she who out off one two three four for not but can may
will back front top side others other another each all any few more some onto into over with while
two-tone being having set middle edge bottom end background foreground left right line part close
area body way look pose use cover white down stand small large young old little behind climb colored
short watch hanging asian facing dry shallow steep have plain same helping shake wade eats american
tackle picture photo camera piece closeup male female sooner blond grey orange colorful
"""
NOT_NOUNS = frozenset(NOT_NOUNS_TEXT.split())
NOT_PHRASES = frozenset(
    ["small white", "large white", "young girl", "young man", "young woman", "old man", "little dog"]
)
TEMPLATES = (
    "a photo of a {}.", "a photo of the {}.", "{}", "a {}.", "the {}.", "an image of a {}.", "a picture of a {}.",
    "a close-up photo of a {}.", "a photo of one {}.", "a blurry photo of a {}.", "a low resolution photo of a {}.",
    "a drawing of a {}.", "a sketch of a {}.", "a painting of a {}.", "a cartoon {}.", "a photo of a small {}.",
    "a photo of my {}.", "art of a {}.",
)  # fmt: skip


class Vocabulary:
    """Strings to positions, in order of first use."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        text = " ".join(text.replace("_", " ").split())
        return self.index.setdefault(text, len(self.index))


def caption_nouns(captions: tuple[str, ...], wordnet: WordNet) -> dict[str, str]:
    """Things named in the captions of one image: lemma to WordNet id. Longest match first, up to three words."""
    found: dict[str, str] = {}
    for caption in captions:
        words = re.findall(r"[a-z][a-z'-]*", caption.lower())
        at = 0
        while at < len(words):
            for length in (3, 2, 1):
                phrase = " ".join(words[at : at + length])
                if at + length > len(words) or (length == 1 and (len(phrase) < 3 or phrase in NOT_NOUNS)):
                    continue
                lemma = None if phrase in NOT_PHRASES else wordnet.lemma(phrase)
                sense = wordnet.concrete_sense(lemma) if lemma and lemma not in NOT_NOUNS else None
                if lemma and sense:
                    found[lemma] = sense.wnid
                    at += length - 1
                    break
            at += 1
    return found


def clip_names(raw: list[str]) -> list[str]:
    """Names without the bracketed comments that tell senses apart."""
    return [re.sub(r"\s*\(.*?\)", "", x).strip() for x in raw]


def build_words(
    settings: Settings, sources: dict[str, Source], labels: list[str], clip: list[str], wordnet: WordNet, out: Path
) -> None:
    """Collect names, classes, tree nodes, caption nouns, glosses and captions."""
    rng = np.random.default_rng(settings.seed)
    vocab = Vocabulary()
    wnids = [x.split("\t")[0] for x in labels]
    tiny = sorted(set(sources["tiny-imagenet-train"].labels) - set(wnids))
    tree = Tree.over(wordnet, [*wnids, *tiny])

    nodes: dict[str, Any] = {}
    label_names = {}
    for wnid, line in zip(wnids, labels, strict=True):
        label_names[wnid] = [n.strip() for n in line.split("\t")[1].split(",")]
    glosses = Vocabulary()
    for wnid in tree.below:
        synset = wordnet.synsets[wnid]
        names = label_names.get(wnid, []) + [w for w in synset.words if w not in label_names.get(wnid, [])]
        names = list(dict.fromkeys(names))[:4]
        nodes[wnid] = {"names": [vocab(n) for n in names], "gloss": glosses(f"{names[0]}: {synset.gloss}")}

    per_image = [caption_nouns(c, wordnet) for c in sources["flickr8k"].captions]
    counts = Counter(noun for nouns in per_image for noun in nouns)
    nouns, above = [], []
    for found in per_image:
        mine = [n for n in found if counts[n] >= 3]
        nouns.append(sorted({vocab(n) for n in mine}))
        parents: set[int] = set()
        for noun in mine:
            for wnid in wordnet.ancestors(found[noun])[:5]:
                synset = wordnet.synsets[wnid]
                if synset.lex in CONCRETE and len(wordnet.ancestors(wnid)) >= 5:
                    parents.add(vocab(synset.words[0]))
            if "n00007846" in wordnet.ancestors(found[noun]):
                parents.add(vocab("person"))
        above.append(sorted(parents - set(nouns[-1])))
    emoji = [vocab(c[0]) for c in sources["noto-emoji"].captions]
    clip_rows = [vocab(n) for n in clip_names(clip)]
    general = wordnet.names(settings.words.max_words)
    for position in rng.permutation(len(general)):
        if len(vocab.index) >= settings.words.names:
            break
        vocab(general[position])
    content = {
        "names": list(vocab.index),
        "leaves": list(tree.leaves),
        "children": tree.children,
        "nodes": nodes,
        "glosses": list(glosses.index),
        "nouns": nouns,
        "above": above,
        "emoji": emoji,
        "clip": clip_rows,
        "captions": [list(c) for c in sources["flickr8k"].captions],
    }
    (out / "words.json").write_text(json.dumps(content), encoding="utf-8")
