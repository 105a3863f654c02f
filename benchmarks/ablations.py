"""Train GRAM's ablations and controls on the stages of a finished run: one folder below `--out` for each.

    python benchmarks/ablations.py --from OUT --out ABLATIONS --data DIR [--only NAME ...]

OUT is the `--out` of `python -m gram_core.train recipes/gram-mini/meta.toml`. Every variant has the same steps,
episodes and features; what differs is named in VARIANTS. A variant that is done is left alone, one that was stopped
goes on. Stages that a variant shares are hard links, since their files are only ever replaced: OUT and ABLATIONS lie on
one file system. Prints the command that measures all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

RECIPES = Path("recipes/gram-mini")
SEEDS = {"": [], "-seed-1": ["--meta.seed=1", "--episodes.seed=1"], "-seed-2": ["--meta.seed=2", "--episodes.seed=2"]}
PROTOTYPES = {
    "no-structure": ["--learner.prototypes=none"],
    "permuted-prototypes": ["--learner.prototypes=permuted"],
    "random-prototypes": ["--learner.prototypes=random"],
}
OWN_TREE = {
    "permuted-complexity": ["--tree.complexity=permuted", "--episodes.complexity=permuted"],
    "random-tree": ["--tree.kind=random"],
    "flat-tree": ["--tree.kind=flat"],
    "image-tree": ["--tree.kind=image"],
    "text-tree": ["--tree.kind=text"],
}
VARIANTS: dict[str, list[str]] = {
    "seed-1": SEEDS["-seed-1"],
    "seed-2": SEEDS["-seed-2"],
    **{name + seed: words + more for name, words in PROTOTYPES.items() for seed, more in SEEDS.items()},
    **OWN_TREE,
    "start-learned": ["--learner.start"],
    "gradient-turned": ["--learner.regulator=gram", "--learner.regulator-rate=1e-3"],
    "gradient-turned-structure": ["--learner.regulator=structure", "--learner.regulator-rate=1e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    given = parser.parse_args()
    for name in given.only:
        folder = given.out / name
        for stage in ("features", "views") + (() if name in OWN_TREE else ("tree",)):
            if not (folder / stage).exists():
                shutil.copytree(given.source / stage, folder / stage, copy_function=os.link)
        words = [str(RECIPES / "meta.toml"), "--data", str(given.data), "--out", str(folder), *VARIANTS[name]]
        subprocess.run([sys.executable, "-m", "gram_core.train", *words], check=True)
    rows = " ".join(f"{name}={given.out / name / 'checkpoint'}" for name in given.only)
    recipe = RECIPES / "evaluate-gram.toml"
    sys.stdout.write(f"python -m gram_core.evaluate --recipe {recipe} --data {given.data} --checkpoints {rows}\n")


if __name__ == "__main__":
    main()
