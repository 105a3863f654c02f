"""The exact text path against open_clip's own 77-token path: agreement and cost of one tuning step.

    python benchmarks/text_path.py [--classes 10 100 1000] [--repeats 3] [--model DIR]

One step is what test-time tuning of a context costs on the text side: forward with graph, backward to the context,
final forward without graph. Without --model a ViT-B-16 with random weights is made, saved as safetensors and loaded
by path (speed does not depend on weights). Both sides run in one process, alternating, on the same threads; the
figure is the ratio of medians. open_clip's side runs in chunks of 50 texts, which bounds its memory and costs it
nothing measurable. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from safetensors.torch import save_file
from torch.nn import functional as F

from gram_core.backbone import load
from gram_core.text import START_TEMPLATE, TextEncoder

CHUNK = 50


def random_model(name: str, folder: Path) -> Path:
    """A seeded random model of a known architecture as an open_clip directory."""
    folder.mkdir(parents=True)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def class_names(count: int) -> list[str]:
    """ImageNet's names, made distinct."""
    names = list(dict.fromkeys(IMAGENET_CLASSNAMES))
    return [*names, *(f"{n} two" for n in names)][:count]


class TheirStep:
    """Context tuning through open_clip's `encode_text`: embeddings at positions 1..N are replaced by a hook."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.model: Any = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
        tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.tokens = tokenize([START_TEMPLATE.replace("{}", n) for n in names])

    def features(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def replace(_: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + len(context) :]], dim=1)

        handle = self.model.token_embedding.register_forward_hook(replace)
        try:
            return F.normalize(self.model.encode_text(tokens), dim=-1)
        finally:
            handle.remove()

    def __call__(self, context: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = context.clone().requires_grad_(True)
        for i in range(0, len(self.tokens), CHUNK):
            (self.features(self.tokens[i : i + CHUNK], leaf) * weight[i : i + CHUNK]).sum().backward()
        with torch.no_grad():
            final = [self.features(self.tokens[i : i + CHUNK], leaf) for i in range(0, len(self.tokens), CHUNK)]
        assert leaf.grad is not None
        return torch.cat(final), leaf.grad


class OurStep:
    """The same step on the exact path."""

    def __init__(self, encoder: TextEncoder, names: list[str]) -> None:
        self.encoder, self.classes = encoder, encoder.class_set(names)

    def __call__(self, context: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = context.clone().requires_grad_(True)
        (self.encoder.encode_context(self.classes, leaf[None])[0] * weight).sum().backward()
        with torch.no_grad():
            final = self.encoder.encode_context(self.classes, leaf[None])[0]
        assert leaf.grad is not None
        return final, leaf.grad


def seconds(step: Callable[..., Any], *args: Any) -> float:
    started = time.perf_counter()
    step(*args)
    return time.perf_counter() - started


def main() -> None:
    logging.disable(logging.WARNING)  # open_clip warns of the random weights that are wanted here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="an open_clip directory; default: a random ViT-B-16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_model("ViT-B-16", Path(scratch) / "ViT-B-16")
        encoder = TextEncoder(load(str(folder), device="cpu"))
        rows = []
        for count in args.classes:
            names = class_names(count)
            ours, theirs = OurStep(encoder, names), TheirStep(folder, names)
            context = encoder.start_context() + 0.01 * torch.randn(
                encoder.context_tokens, encoder.start_context().shape[1], generator=torch.Generator().manual_seed(0)
            )
            weight = torch.randn(count, encoder.backbone.joint_dim, generator=torch.Generator().manual_seed(1))
            (mine, my_grad), (other, other_grad) = ours(context, weight), theirs(context, weight)
            times: dict[str, list[float]] = {"ours": [], "open_clip": []}
            for _ in range(args.repeats):
                times["ours"].append(seconds(ours, context, weight))
                times["open_clip"].append(seconds(theirs, context, weight))
            medians = {k: statistics.median(v) for k, v in times.items()}
            rows.append(
                {
                    "classes": count,
                    "max_feature_difference": float((mine - other).abs().max()),
                    "relative_gradient_error": float((my_grad - other_grad).norm() / other_grad.norm()),
                    "ours_s": round(medians["ours"], 4),
                    "open_clip_s": round(medians["open_clip"], 4),
                    "ratio": round(medians["open_clip"] / medians["ours"], 2),
                    "ratio_range": [
                        round(min(times["open_clip"]) / max(times["ours"]), 2),
                        round(max(times["open_clip"]) / min(times["ours"]), 2),
                    ],
                }
            )
    report = {
        "benchmark": "text_path",
        "date": datetime.date.today().isoformat(),
        "model": folder.name,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "rows": rows,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
