"""Step C: everything end to end. Image tower, projection, text map and text tower share one loss.

The image tower sees augmented views and must say what the untouched classifier says about the clean ones,
in the words of the text map and of the text tower; the tower keeps following the map on the whole vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import augment
from corpus import Corpus
from losses import distil, multi, pairs
from settings import Finetune, Settings
from teacher import Teacher, clip_loss
from text_tower import Texts, distil_batch, text_groups
from torch import Tensor, nn
from torch.nn import functional as F
from towers import encode_text, pixels_to_input

log = logging.getLogger("gram-mini.finetune")
SHARES = {
    "flickr8k": 0.42,
    "imagenet-samples": 0.2,
    "tiny-imagenet-train": 0.2,
    "cifar10-train": 0.06,
    "noto-emoji": 0.12,
}


class Average:
    """Exponential moving average of every tensor, with a warm start."""

    def __init__(self, modules: dict[str, nn.Module], decay: float, every: int) -> None:
        self.modules, self.decay, self.every, self.count = modules, decay**every, every, 0
        self.mean = {k: {n: v.detach().clone() for n, v in m.state_dict().items()} for k, m in modules.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights, every few steps."""
        if step % self.every:
            return
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10.0))
        for key, module in self.modules.items():
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    self.mean[key][name].lerp_(value, 1.0 - decay)


def rate(step: int, cfg: Finetune, warm: int = 40) -> float:
    """Warm up, then a cosine to nearly zero."""
    if step < warm:
        return step / warm
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


def batch_views(corpus: Corpus, cfg: Finetune) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Views of each source for one batch."""
    return {n: corpus.draw(n, max(2, round(cfg.batch * s)), clean_share=cfg.clean_share) for n, s in SHARES.items()}


def step_losses(
    model: nn.Module, teacher: Teacher, texts: Texts, settings: Settings, size: int, clip: Tensor
) -> dict[str, Tensor]:
    """One step's losses, each already weighted."""
    cfg, weights, corpus = settings.finetune, settings.teacher, texts.corpus
    drawn = batch_views(corpus, cfg)
    rows = np.concatenate(list(drawn.values()))
    pixels = np.stack([corpus.views.pixels[r] for r in rows])
    image = F.normalize(model.visual(augment(pixels_to_input(pixels), size, corpus.rng)), dim=-1)
    emoji = len(rows) - len(drawn["noto-emoji"])
    photos, flickr = image[:emoji], image[: len(drawn["flickr8k"])]
    items = corpus.views.item[drawn["flickr8k"]]
    targets = corpus.targets(rows[:emoji])

    leaf_nodes, leaf_goal, leaf_prior = corpus.leaf_task(targets, weights.names_per_step)
    leaf_names = corpus.node_names(leaf_nodes, synonym=0.3)
    tree_nodes, tree_goal, tree_prior = corpus.tree_task(targets, weights.names_per_step // 2)
    tree_names = corpus.node_names(tree_nodes, synonym=0.2)
    nouns, present, noun_prior = corpus.noun_task(items, 200)
    captions, strings = corpus.caption_rows(items)
    emoji_names = [corpus.emoji[i] for i in corpus.views.item[drawn["noto-emoji"]]]

    def by_map(names: list[int]) -> Tensor:
        return teacher.text(corpus.name_vectors[names])

    said = teacher.text(corpus.caption_vectors[captions])
    losses = {
        "distil": weights.distil * distil(photos, by_map(leaf_names), leaf_goal, teacher.scale("names"), leaf_prior),
        "hypernyms": weights.hypernyms
        * distil(photos, by_map(tree_names), tree_goal, teacher.scale("names"), tree_prior),
        "captions": weights.captions * pairs(flickr, said, teacher.scale("captions")),
        "nouns": weights.nouns * multi(flickr, by_map(nouns), present, teacher.scale("nouns"), noun_prior),
        "emoji": weights.emoji * pairs(image[emoji:], by_map(emoji_names), teacher.scale("emoji")),
        "clip": clip_loss(teacher, corpus, clip, weights.clip),
    }
    # The text tower: one of the naming tasks in full, and the map's word on other names or on captions.
    turn = int(corpus.rng.choice(3, p=[0.25, 0.5, 0.25]))
    tasks = [(leaf_names, leaf_goal, leaf_prior), (tree_names, tree_goal, tree_prior), (nouns, present, noun_prior)]
    names, goal, prior = tasks[turn]
    half = cfg.text_batch // 2
    if turn < 2:
        keep = torch.from_numpy(
            np.sort((goal.sum(dim=0).numpy() + 1e-3 * corpus.rng.random(len(names))).argsort()[-half:])
        )
    else:
        keep = torch.from_numpy(np.sort(corpus.rng.permutation(len(names))[:half]))
    picked, goal, prior = [names[int(i)] for i in keep], goal[:, keep], prior[keep]
    others = texts.draw_names(cfg.text_batch - len(picked))
    ours = encode_text(model, texts.in_templates(picked + others))
    with torch.no_grad():
        theirs = by_map(picked + others)
    losses["text"] = cfg.self_distil * 2.0 * (1.0 - (ours * theirs).sum(dim=1)).mean()
    if turn < 2:
        losses["text names"] = 0.5 * distil(photos, ours[: len(picked)], goal, teacher.scale("names"), prior)
    else:
        losses["text names"] = 0.25 * multi(flickr, ours[: len(picked)], goal, teacher.scale("nouns"), prior)
    if turn == 0:
        losses["text captions"] = cfg.self_distil * distil_batch(model, texts.tokens(strings), said.detach(), 0.0)
    return losses


def finetune(
    model: nn.Module,
    teacher: Teacher,
    corpus: Corpus,
    clip: Tensor,
    settings: Settings,
    checkpoint: Path,
    report: Callable[[nn.Module, Teacher], str] | None = None,
) -> Average:
    """Train; resume from `checkpoint` when it exists; return the averaged weights."""
    cfg, texts = settings.finetune, Texts(corpus, settings.context)
    visual = [p for n, p in model.named_parameters() if n.startswith("visual.trunk.")]
    heads = [*model.visual.head.parameters(), *teacher.parameters()]
    groups = [
        {"params": [p for p in visual if p.ndim > 1], "lr": cfg.lr_trunk, "weight_decay": cfg.weight_decay},
        {"params": [p for p in visual if p.ndim == 1], "lr": cfg.lr_trunk, "weight_decay": 0.0},
        {"params": heads, "lr": cfg.lr_heads, "weight_decay": cfg.weight_decay},
        *text_groups(model, cfg.lr_text, cfg.weight_decay),
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    base = [float(g["lr"]) for g in optimiser.param_groups]
    average = Average({"model": model, "teacher": teacher}, cfg.ema, 4)
    first = 1
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        teacher.load_state_dict(state["teacher"])
        optimiser.load_state_dict(state["optimiser"])
        average.mean, average.count, first = state["mean"], state["count"], state["step"] + 1
        corpus.rng = np.random.default_rng([settings.seed, first])
        log.info("resumed after step %d", first - 1)
    start, sums = time.monotonic(), dict[str, float]()
    for step in range(first, cfg.steps + 1):
        for group, lr in zip(optimiser.param_groups, base, strict=True):
            group["lr"] = lr * rate(step, cfg)
        teacher.train()
        size = cfg.size_first if step <= cfg.steps * (1.0 - cfg.last_share) else cfg.size_last
        losses = step_losses(model, teacher, texts, settings, size, clip)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(visual, 5.0)
        nn.utils.clip_grad_norm_([p for g in groups[2:] for p in g["params"]], 5.0)
        optimiser.step()
        average.update(step)
        for key, value in losses.items():
            sums[key] = value.item() if key not in sums else 0.97 * sums[key] + 0.03 * value.item()
        if step % 25 == 0:
            parts = ", ".join(f"{k} {v:.3f}" for k, v in sums.items())
            log.info("step %d of %d, %.0f s: %s", step, cfg.steps, time.monotonic() - start, parts)
        if step % 200 == 0:
            state = {
                "model": model.state_dict(),
                "teacher": teacher.state_dict(),
                "optimiser": optimiser.state_dict(),
                "mean": average.mean,
                "count": average.count,
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
            if report and step % 400 == 0:
                teacher.eval()
                log.info("step %d now: %s", step, report(model, teacher))
    return average
