"""What training steps draw from: view features and targets, texts by position, the class tree. All in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import Classifier1000
from numpy.typing import NDArray
from safetensors.torch import load_file
from sources import SOURCES, Source
from torch import Tensor
from views import FIRST_RESTYLE, Views
from wordnet import Tree

Positions = NDArray[np.int64]
LABEL_SHARE = {"imagenet-samples": 0.5, "tiny-imagenet-train": 0.85}


class Corpus:
    """The cached work of the earlier stages, with samplers."""

    def __init__(
        self, work: Path, views: Views, sources: dict[str, Source], classifier: Classifier1000, *, seed: int
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.views = views
        self.features = torch.from_numpy(np.load(work / "features.npy"))
        words: dict[str, Any] = json.loads((work / "words.json").read_text(encoding="utf-8"))
        self.names: list[str] = words["names"]
        self.captions: list[list[str]] = words["captions"]
        self.glosses: list[str] = words["glosses"]
        self.nodes: dict[str, dict[str, Any]] = words["nodes"]
        self.nouns: list[list[int]] = words["nouns"]
        self.above: list[list[int]] = words["above"]
        self.emoji: list[int] = words["emoji"]
        self.clip: list[int] = words["clip"]
        self.tree = Tree(tuple(words["leaves"]), words["children"])
        sentences = load_file(work / "sentences.safetensors")
        self.name_vectors, self.gloss_vectors = sentences["names"], sentences["glosses"]
        starts = np.cumsum([0] + [len(c) for c in self.captions])
        self.caption_start = starts[:-1]
        self.caption_vectors = sentences["captions"]
        leaf = {w: i for i, w in enumerate(self.tree.leaves)}
        self.label = np.full(len(views.source), -1)
        for name in LABEL_SHARE:
            rows = views.of(name)
            labels = np.array([leaf[x] for x in sources[name].labels])
            self.label[rows] = labels[views.item[rows]]
        self.classifier = classifier
        self.by_source = {name: views.of(name) for name in SOURCES}
        photos = np.flatnonzero(views.source != SOURCES.index("noto-emoji"))
        self.leaf_prior = self.targets(self.rng.choice(photos, 8192)).mean(dim=0)
        seen = [n for nouns in (*self.nouns, *self.above) for n in nouns]
        self.noun_prior = torch.from_numpy(np.bincount(seen, minlength=len(self.names)) / len(self.nouns)).float()

    def targets(self, rows: Positions) -> Tensor:
        """(B, leaves): the classifier's softmax of the clean parent view, mixed with the label where there is one."""
        probs = self.classifier(self.features[self.views.parent[rows]])
        for name, share in LABEL_SHARE.items():
            mine = np.flatnonzero(self.views.source[rows] == SOURCES.index(name))
            if len(mine):
                probs[mine] *= 1.0 - share
                probs[mine, self.label[rows[mine]]] += share
        return probs

    def draw(self, name: str, count: int, *, clean_share: float | None = None) -> Positions:
        """Random views of one source, optionally with this share of unstyled ones."""
        rows = self.by_source[name]
        if clean_share is None:
            return self.rng.choice(rows, count)
        clean = self.views.kind[rows] < FIRST_RESTYLE
        take = int(self.rng.binomial(count, clean_share)) if (~clean).any() else count
        parts = [self.rng.choice(rows[clean], take)]
        if count > take:
            parts.append(self.rng.choice(rows[~clean], count - take))
        return np.concatenate(parts)

    def node_names(self, nodes: list[str], *, synonym: float) -> list[int]:
        """One name position per node: its first name, or with probability `synonym` any of its names."""
        out = []
        for node in nodes:
            names = self.nodes[node]["names"]
            out.append(int(self.rng.choice(names)) if self.rng.random() < synonym else names[0])
        return out

    def leaf_task(self, targets: Tensor, count: int) -> tuple[list[str], Tensor, Tensor]:
        """(nodes, (B, count) targets, prior): some random ImageNet classes, the likely ones of the batch among them."""
        likely = targets.topk(2, dim=1).indices.flatten().unique().numpy()
        likely = self.rng.permutation(likely)[: count // 2]
        rest = self.rng.permutation(len(self.tree.leaves))
        seen = dict.fromkeys([*likely.tolist(), *rest.tolist()])
        pick = np.array(list(seen)[:count])
        return [self.tree.leaves[i] for i in pick], targets[:, pick], self.leaf_prior[pick]

    def tree_task(self, targets: Tensor, count: int) -> tuple[list[str], Tensor, Tensor]:
        """(nodes, (B, K) targets, prior): a random cut of the tree, the heavier nodes kept more often."""
        cut = self.tree.cut(
            self.rng, stop=float(self.rng.uniform(0.1, 0.7)), largest=int(self.rng.choice([40, 130, 400]))
        )
        member = torch.from_numpy(self.tree.membership(cut)).T
        sums, prior = targets @ member, self.leaf_prior @ member
        if len(cut) > count:
            weight = sums.mean(dim=0).numpy() ** 0.5 + 1e-3
            keep = self.rng.choice(len(cut), count, replace=False, p=weight / weight.sum())
            cut, sums, prior = [cut[i] for i in keep], sums[:, keep], prior[keep]
        return cut, sums, prior

    def noun_task(self, items: NDArray[np.int32], count: int) -> tuple[list[int], Tensor, Tensor]:
        """(names, (B, K) targets, prior): things named in the captions of these items, and their kinds."""
        per_item = [self.nouns[i] + self.above[i] for i in items]
        pool = list({n for i in items for n in self.nouns[i]}), list({n for i in items for n in self.above[i]})
        pick = [*self.rng.permutation(pool[0])[: 2 * count // 3], *self.rng.permutation(pool[1])[: count // 3]]
        names = [int(n) for n in dict.fromkeys(pick)]
        column = {n: j for j, n in enumerate(names)}
        target = torch.zeros(len(items), len(names))
        for i, mine in enumerate(per_item):
            for n in mine:
                if n in column:
                    target[i, column[n]] = 1.0
        return names, target, self.noun_prior[names]

    def caption_rows(self, items: NDArray[np.int32]) -> tuple[NDArray[np.int64], list[str]]:
        """One random caption per item: its row in `caption_vectors` and its text."""
        which = [int(self.rng.integers(len(self.captions[i]))) for i in items]
        rows = np.array([self.caption_start[i] + w for i, w in zip(items, which, strict=True)])
        return rows, [self.captions[i][w] for i, w in zip(items, which, strict=True)]
