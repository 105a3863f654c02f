"""Build gram-mini, the bundled model, from public ingredients: see model.toml for the command, cost and figures.

Stages run in order, each leaves its result in --work and is skipped when that result exists:
split, views, features, words, sentences, teacher (step A), text (step B), finetune (step C), polish (step D), export,
root.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from pathlib import Path

# Large activations come and go every step; without this glibc maps and unmaps them each time (1.4x slower).
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
STAGES = ("split", "views", "features", "words", "sentences", "teacher", "text", "finetune", "polish", "export", "root")
log = logging.getLogger("gram-mini")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the training images")
    parser.add_argument("--models", type=Path, required=True, help="folder with the MobileNetV2 and CLIP text arrays")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's data.noun and index.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--work", type=Path, default=Path("gram-mini-work"), help="folder for caches and checkpoints")
    parser.add_argument("--config", type=Path, default=here / "model.toml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", choices=STAGES, default="root", help="stop after this stage")
    parser.add_argument("--skip-finetune", action="store_true", help="leave steps C and D out: a quick first model")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the stages up to `args.until`."""
    import numpy as np
    import torch
    from settings import load_settings
    from stages import Recipe

    settings = load_settings(args.config)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(settings, data=args.data, models=args.models, wordnet=args.wordnet, work=args.work, out=args.out)
    for stage in STAGES[: STAGES.index(args.until) + 1]:
        if stage in ("finetune", "polish") and args.skip_finetune:
            continue
        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        start = time.monotonic()
        ran = getattr(recipe, stage)()
        log.info("%s: %s", stage, f"{time.monotonic() - start:.0f} s" if ran else "already there")
        if ran:
            with (args.work / "seconds.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"stage": stage, "seconds": round(time.monotonic() - start, 1)}) + "\n")


def main() -> None:
    """Restart once with the allocator settings above, then build."""
    args = parse()
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    run(args)


if __name__ == "__main__":
    main()
