"""Step B: the text tower learns, from texts alone, to say what the teacher map says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import open_clip
import torch
from corpus import Corpus
from losses import relations
from minilm import MiniLM
from settings import Settings
from teacher import TextMap
from torch import Tensor, nn
from towers import encode_text
from words import TEMPLATES

log = logging.getLogger("gram-mini.text")


class Texts:
    """Names in templates and captions, as tokens beside their sentence vectors."""

    def __init__(self, corpus: Corpus, context: int) -> None:
        self.corpus = corpus
        self.tokenizer = open_clip.SimpleTokenizer(context_length=context)
        core = {n for node in corpus.nodes.values() for n in node["names"][:2]}
        core.update(corpus.clip, corpus.emoji, *corpus.nouns, *corpus.above)
        self.core = np.array(sorted(core))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(N, context) token ids."""
        return self.tokenizer(list(texts))  # type: ignore[no-any-return]

    def in_templates(self, names: Sequence[int], *, plain: float = 0.4) -> Tensor:
        """Tokens of names, each in a random template; the first template with probability `plain`."""
        rng = self.corpus.rng
        which = [0 if rng.random() < plain else int(rng.integers(len(TEMPLATES))) for _ in names]
        return self.tokens(
            [TEMPLATES[w].replace("{}", self.corpus.names[n]) for w, n in zip(which, names, strict=True)]
        )

    def draw_names(self, count: int, *, core_share: float = 0.4) -> list[int]:
        """Random names, this share of them among those that the image tasks use."""
        rng = self.corpus.rng
        core = rng.choice(self.core, int(count * core_share), replace=False)
        rest = rng.integers(len(self.corpus.names), size=count - len(core))
        return [int(n) for n in np.unique(np.concatenate([core, rest]))]


def start_tokens(model: nn.Module, tokenizer: open_clip.SimpleTokenizer) -> None:
    """Token table from MiniLM's word pieces: mean over a token's pieces, reduced by PCA, at the usual size."""
    encoder = MiniLM()
    pieces, table = encoder.word_pieces()
    table = table - table.mean(dim=0)
    width = model.token_embedding.weight.shape[1]
    _, _, v = torch.linalg.svd(table, full_matrices=False)
    reduced = table @ v[:width].T
    reduced = 0.03 * reduced / reduced.std()
    texts = [tokenizer.decode([i]).strip() for i in range(len(model.token_embedding.weight) - 2)]
    unknown = pieces["[UNK]"]
    with torch.no_grad():
        for i, encoding in enumerate(encoder.tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = [p for p in encoding.ids if p != unknown]
            if ids:
                model.token_embedding.weight[i] = reduced[ids].mean(dim=0)


def text_groups(model: nn.Module, lr: float, decay: float) -> list[dict[str, object]]:
    """Parameter groups of the text tower: only matrices decay, the token table does not (most rows rest)."""
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    matrices = [p for n, p in named if p.ndim == 2 and "embedding" not in n]
    rest = [p for n, p in named if p.ndim != 2 or "embedding" in n]
    return [{"params": matrices, "lr": lr, "weight_decay": decay}, {"params": rest, "lr": lr, "weight_decay": 0.0}]


def distil_batch(model: nn.Module, tokens: Tensor, target: Tensor, weight: float) -> Tensor:
    """1 - cosine, and the batch's relations."""
    ours = encode_text(model, tokens)
    return (1.0 - (ours * target).sum(dim=1)).mean() + weight * relations(ours, target)


def train_text(
    model: nn.Module,
    text_map: TextMap,
    corpus: Corpus,
    settings: Settings,
    *,
    steps: int,
    lr: float,
    core_share: float = 0.4,
    report: Callable[[nn.Module], str] | None = None,
) -> None:
    """Distil the map into the text tower; both are given, only the tower moves."""
    cfg, texts = settings.text, Texts(corpus, settings.context)
    with torch.no_grad():
        name_goal, caption_goal = text_map(corpus.name_vectors), text_map(corpus.caption_vectors)
    optimiser = torch.optim.AdamW(text_groups(model, lr, 0.05), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    model.zero_grad(set_to_none=True)
    start, mean = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        if corpus.rng.random() < cfg.captions_share:
            items = corpus.rng.integers(len(corpus.captions), size=cfg.batch // 2)
            rows, strings = corpus.caption_rows(items)
            loss = distil_batch(model, texts.tokens(strings), caption_goal[rows], cfg.relations)
        else:
            names = texts.draw_names(cfg.batch, core_share=core_share)
            loss = distil_batch(model, texts.in_templates(names), name_goal[names], cfg.relations)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if (step % 25 == 0 and step < 100) or step % 100 == 0 or step == steps:
            extra = report(model) if report and (step % 200 == 0 or step == steps) else ""
            log.info("step %d of %d, %.0f s: loss %.3f %s", step, steps, time.monotonic() - start, mean, extra)
