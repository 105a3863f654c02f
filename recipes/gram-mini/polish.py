"""Step D: the text tower alone, long and cheap, towards the text map that step C left behind.

After step C the map names images far better than the tower does. The image tower rests, so its features are
computed once, and a step costs a few packed texts (`fast_text`): the tower sees each name dozens of times instead
of a few. Half of the steps are plain names that images are told apart by, with that task's own loss beside the
distance to the map; the others are the whole vocabulary in every template, and captions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus
from fast_text import encode_packed
from losses import distil, relations
from numpy.typing import NDArray
from settings import Settings
from teacher import Teacher
from text_tower import Texts, text_groups
from torch import Tensor, nn
from words import TEMPLATES

log = logging.getLogger("gram-mini.polish")
SAVE_EVERY = 500


class Rows:
    """Names and captions as token rows cut at their EOT; a name is tokenized once, whatever template it stands in."""

    def __init__(self, corpus: Corpus, texts: Texts, context: int) -> None:
        bpe = texts.tokenizer
        self.limit = context
        self.start, self.end = bpe.sot_token_id, bpe.eot_token_id
        self.names = [bpe.encode(n) for n in corpus.names]
        parts = [t.split("{}") for t in TEMPLATES]
        self.templates = [(bpe.encode(before), bpe.encode(after)) for before, after in parts]
        self.encode = bpe.encode

    def named(self, names: list[int], template: int) -> list[list[int]]:
        """Rows of names in one template."""
        before, after = self.templates[template]
        room = self.limit - len(before) - len(after) - 2
        return [[self.start, *before, *self.names[n][:room], *after, self.end] for n in names]

    def said(self, captions: list[str]) -> list[list[int]]:
        """Rows of captions."""
        return [[self.start, *self.encode(c)[: self.limit - 2], self.end] for c in captions]


class Seen:
    """Image features of the finished image tower for a seeded part of the views, photos only."""

    def __init__(self, rows: NDArray[np.int64], features: Tensor) -> None:
        self.rows, self.features = rows, features

    @staticmethod
    def choose(corpus: Corpus, count: int, seed: int) -> NDArray[np.int64]:
        """Rows of `count` views: three quarters unstyled, the rest in any style."""
        rng = np.random.default_rng([seed, 5])
        keep = corpus.rng
        corpus.rng = rng
        shares = {"flickr8k": 0.4, "imagenet-samples": 0.25, "tiny-imagenet-train": 0.25, "cifar10-train": 0.1}
        rows = [corpus.draw(name, int(count * share), clean_share=0.75) for name, share in shares.items()]
        corpus.rng = keep
        return np.unique(np.concatenate(rows))

    def batch(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], Tensor]:
        """Some rows with their features."""
        pick = rng.integers(len(self.rows), size=count)
        return self.rows[pick], self.features[torch.from_numpy(pick)]


def polish(
    model: nn.Module,
    teacher: Teacher,
    seen: Seen,
    corpus: Corpus,
    settings: Settings,
    checkpoint: Path,
    report: Callable[[nn.Module], str] | None = None,
) -> None:
    """Train the text tower; resumes from `checkpoint` when it exists."""
    cfg = settings.polish
    texts = Texts(corpus, settings.context)
    rows = Rows(corpus, texts, settings.context)
    with torch.no_grad():
        name_goal, caption_goal = teacher.text(corpus.name_vectors), teacher.text(corpus.caption_vectors)
        scale = teacher.scale("names").detach()
    optimiser = torch.optim.AdamW(text_groups(model, cfg.lr, cfg.weight_decay), betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cfg.lr, total_steps=cfg.steps, pct_start=0.05)
    first = 1
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"] + 1
        log.info("resumed after step %d", first - 1)
    start, sums = time.monotonic(), dict[str, float]()

    def follow(ours: Tensor, goal: Tensor) -> dict[str, Tensor]:
        return {"far": (1.0 - (ours * goal).sum(dim=1)).mean(), "relations": cfg.relations * relations(ours, goal)}

    def naming() -> dict[str, Tensor]:
        views, image = seen.batch(corpus.rng, cfg.images)
        targets = corpus.targets(views)
        task = corpus.leaf_task if corpus.rng.random() < 0.5 else corpus.tree_task
        nodes, goal, prior = task(targets, cfg.batch)
        names = corpus.node_names(nodes, synonym=0.3)
        ours = encode_packed(model, rows.named(names, 0))
        losses = follow(ours, name_goal[names])
        return losses | {"naming": cfg.naming * distil(image, ours, goal, scale, prior)}

    def vocabulary() -> dict[str, Tensor]:
        if corpus.rng.random() < 0.25:
            items = corpus.rng.integers(len(corpus.captions), size=cfg.batch // 2)
            which, strings = corpus.caption_rows(items)
            return follow(encode_packed(model, rows.said(strings)), caption_goal[which])
        names = texts.draw_names(cfg.batch, core_share=cfg.core_share)
        template = 0 if corpus.rng.random() < 0.4 else int(corpus.rng.integers(1, len(TEMPLATES)))
        return follow(encode_packed(model, rows.named(names, template)), name_goal[names])

    for step in range(first, cfg.steps + 1):
        corpus.rng = np.random.default_rng([settings.seed, 4, step])  # a resumed run draws what the whole run draws
        losses = naming() if step % 2 else vocabulary()
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
        schedule.step()
        for key, value in losses.items():
            sums[key] = value.item() if key not in sums else 0.97 * sums[key] + 0.03 * value.item()
        if step % 100 == 0 or step == cfg.steps:
            parts = ", ".join(f"{k} {v:.3f}" for k, v in sums.items())
            extra = f"; {report(model)}" if report else ""
            log.info("step %d of %d, %.0f s: %s%s", step, cfg.steps, time.monotonic() - start, parts, extra)
        if step % SAVE_EVERY == 0 or step == cfg.steps:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
