"""Step A: a map from sentence vectors into the image features' space, learned with the image projection.

The classifier teaches it what its 1,000 classes and their hypernyms look like, captions what people and
places look like, and CLIP's published text features how names relate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from corpus import Corpus
from losses import distil, multi, pairs
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger("gram-mini.teacher")


class TextMap(nn.Module):
    """Sentence vector (384) to unit feature (D): linear + MLP."""

    def __init__(self, width: int, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x) + self.mlp(x), dim=-1)


class Teacher(nn.Module):
    """The text map, the image projection, a head to CLIP's space, and one scale per task."""

    def __init__(self, settings: Settings, features: int, width: int) -> None:
        super().__init__()
        cfg = settings.teacher
        self.text = TextMap(width, settings.embed_dim, cfg.hidden, cfg.dropout)
        self.project = nn.Linear(features, settings.embed_dim)
        self.to_clip = nn.Linear(settings.embed_dim, 512)
        self.log_scale = nn.ParameterDict(
            {k: nn.Parameter(torch.tensor(30.0).log()) for k in ("names", "captions", "nouns", "emoji")}
        )

    def image(self, features: Tensor) -> Tensor:
        """Unit image features."""
        return F.normalize(self.project(features), dim=-1)

    def scale(self, task: str) -> Tensor:
        """The positive scale of a task, at most 100."""
        return self.log_scale[task].exp().clamp(max=100.0)


def start_from_classifier(teacher: Teacher, corpus: Corpus, steps: int) -> None:
    """Projection: the directions that the classifier reads, features centred. Map: names of the tree's nodes
    to the mean of their leaves' classifier rows in those directions."""
    with torch.no_grad():
        rows = corpus.classifier.weight
        _, _, v = torch.linalg.svd(rows, full_matrices=False)
        mean = corpus.features[corpus.views.kind == 0][:8000].float().mean(dim=0)
        teacher.project.weight.copy_(v[: teacher.project.out_features])
        teacher.project.bias.copy_(-teacher.project.weight @ mean)
        goal = F.normalize((rows - rows.mean(dim=0)) @ teacher.project.weight.T, dim=1)
        nodes = list(corpus.nodes)
        share = torch.from_numpy(corpus.tree.membership(nodes))
        goal = F.normalize((share @ goal) / share.sum(dim=1, keepdim=True), dim=1)
    optimiser = torch.optim.AdamW(teacher.text.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        pick = corpus.rng.permutation(len(nodes))[:512]
        said = teacher.text(_vectors(corpus, [nodes[i] for i in pick]))
        optimiser.zero_grad(set_to_none=True)
        (1.0 - (said * goal[torch.from_numpy(pick)]).sum(dim=1)).mean().backward()
        optimiser.step()


def teacher_losses(teacher: Teacher, corpus: Corpus, settings: Settings) -> dict[str, Tensor]:
    """One step's losses, each already weighted."""
    cfg, names = settings.teacher, corpus.name_vectors
    n = cfg.batch // 8
    shares = {"flickr8k": 3, "imagenet-samples": 2, "tiny-imagenet-train": 2, "cifar10-train": 1}
    rows = np.concatenate([corpus.draw(name, share * n) for name, share in shares.items()])
    image = teacher.image(corpus.features[rows].float())
    targets = corpus.targets(rows)
    scale = {task: teacher.scale(task) for task in teacher.log_scale}
    losses: dict[str, Tensor] = {}
    nodes, goal, prior = corpus.leaf_task(targets, cfg.names_per_step)
    losses["distil"] = cfg.distil * distil(image, teacher.text(_vectors(corpus, nodes)), goal, scale["names"], prior)
    nodes, goal, prior = corpus.tree_task(targets, cfg.names_per_step // 2)
    text = teacher.text(_vectors(corpus, nodes))
    losses["hypernyms"] = cfg.hypernyms * distil(image, text, goal, scale["names"], prior)

    views = corpus.draw("flickr8k", cfg.batch // 2)
    items = corpus.views.item[views]
    image = teacher.image(corpus.features[views].float())
    caption, _ = corpus.caption_rows(items)
    said = teacher.text(corpus.caption_vectors[caption])
    losses["captions"] = cfg.captions * pairs(image, said, scale["captions"])
    nouns, present, prior = corpus.noun_task(items, 200)
    losses["nouns"] = cfg.nouns * multi(image, teacher.text(names[nouns]), present, scale["nouns"], prior)

    views = corpus.draw("noto-emoji", cfg.batch // 4)
    text = teacher.text(names[[corpus.emoji[i] for i in corpus.views.item[views]]])
    losses["emoji"] = cfg.emoji * pairs(teacher.image(corpus.features[views].float()), text, scale["emoji"])
    return losses


def clip_loss(teacher: Teacher, corpus: Corpus, clip: Tensor, weight: float) -> Tensor:
    """Cosine distance to CLIP's own text features through one linear head."""
    pick = torch.from_numpy(corpus.rng.permutation(len(corpus.clip))[:256])
    text = teacher.text(corpus.name_vectors[[corpus.clip[int(i)] for i in pick]])
    return weight * (1.0 - F.cosine_similarity(teacher.to_clip(text), clip[pick])).mean()


def _vectors(corpus: Corpus, nodes: list[str]) -> Tensor:
    """Sentence vectors of nodes: mostly a name, at times the name with its gloss."""
    vectors = corpus.name_vectors[corpus.node_names(nodes, synonym=0.3)]
    swap = corpus.rng.random(len(nodes)) < 0.15
    for i in swap.nonzero()[0]:
        vectors[i] = corpus.gloss_vectors[corpus.nodes[nodes[i]]["gloss"]]
    return vectors


def train_teacher(
    corpus: Corpus, clip: Tensor, settings: Settings, report: Callable[[Teacher], str] | None = None
) -> Teacher:
    """Train the map and the projection on cached features."""
    cfg = settings.teacher
    teacher = Teacher(settings, corpus.features.shape[1], corpus.name_vectors.shape[1])
    start_from_classifier(teacher, corpus, cfg.first_steps)
    if report:
        log.info("start: %s", report(teacher.eval()))
    optimiser = torch.optim.AdamW(teacher.parameters(), lr=cfg.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cfg.lr, total_steps=cfg.steps, pct_start=0.05)
    start = time.monotonic()
    for step in range(1, cfg.steps + 1):
        teacher.train()
        losses = teacher_losses(teacher, corpus, settings)
        losses["clip"] = clip_loss(teacher, corpus, clip, cfg.clip)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        schedule.step()
        if step % max(1, cfg.steps // 10) == 0:
            teacher.eval()
            parts = ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            log.info(
                "step %d, %.0f s: %s; %s", step, time.monotonic() - start, parts, report(teacher) if report else ""
            )
    return teacher.eval()
