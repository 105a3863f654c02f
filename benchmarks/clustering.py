"""Cost law of clustering: seconds and peak memory at 10^4, 10^5 (and, with --million, 10^6) synthetic pairs x 512.

    python benchmarks/clustering.py [--million] [--pairs N ...] [--dimension 512] [--folder DIR]

Plants a tree of themes, concepts and modes of the sizes that the product would choose, with noise as strong as the
signal, writes it as a feature cache, then grows a tree and a bank from it in a process of its own. Prints one JSON
object. `anonymous` is memory of the process itself; `resident` adds the pages of the memory-mapped cache that the
system happens to keep. Needs 4 KiB of disk for a pair.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from prototypes import cache
from prototypes.bank import PrototypeBank
from prototypes.cluster import Sizes, grow
from prototypes.hierarchy import CONCEPT, MODE, THEME
from prototypes.vectors import blocks, unit

# LAPACK on several threads that share their cores with other work was 3x slower than on one.
QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def plant(folder: Path, pairs: int, dimension: int) -> None:
    """Write a cache of `pairs` planted pairs, block by block."""
    rng = np.random.default_rng(0)
    sizes = Sizes.of(pairs)
    themes = sizes.themes
    concepts = themes * round(float(np.sqrt(sizes.concepts[0] * sizes.concepts[1])))
    modes = concepts * 3
    directions = [unit(rng.standard_normal((n, dimension))) for n in (2, themes, concepts, modes)]
    mode = rng.integers(modes, size=pairs)
    concept = mode // 3
    theme = concept * themes // concepts
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for i, name in enumerate(("image", "caption")):
        arrays[name] = np.memmap(folder / f"{name}.raw", np.float32, "w+", shape=(pairs, dimension))
        for part in blocks(pairs):
            x = directions[0][i] + 1.2 * directions[1][theme[part]] + directions[2][concept[part]]
            if name == "image":
                x = x + directions[3][mode[part]]
            arrays[name][part] = unit(x + rng.standard_normal(x.shape) / np.sqrt(dimension))
    order = np.argsort(concept, kind="stable")
    rows = np.split(order, np.searchsorted(concept[order], np.arange(1, concepts)))
    cache.write(
        folder,
        **arrays,
        phrase=unit(directions[0][1] + 1.2 * directions[1][np.arange(concepts) * themes // concepts] + directions[2]),
        keys=[f"{i:09d}" for i in range(pairs)],
        captions=[["planted"]] * pairs,
        phrases=[f"thing {i}" for i in range(concepts)],
        phrase_rows=[part[:1000].tolist() for part in rows],
        fingerprint="synthetic",
    )
    for name in arrays:
        (folder / f"{name}.raw").unlink()


def memory() -> dict[str, int]:
    """Bytes now: resident, and anonymous."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: 1024 * int(lines[field].split()[0]) for name, field in (("resident", "VmRSS"), ("anonymous", "RssAnon"))
    }


def measure(folder: Path) -> dict[str, object]:
    """Grow a tree and a bank, with the seconds of every stage and the peak of memory."""
    before, peak, over = memory(), memory(), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    thread = threading.Thread(target=watch)
    thread.start()
    stages: dict[str, float] = {}
    names = iter(["open", "clean", "themes", "concepts", "modes", "names"])
    last = started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[name] = round(now - last, 2)
        last = now

    pairs = cache.FeatureCache.open(folder)
    tree = grow(pairs, report=lambda _: lap(next(names)))
    lap("measure")
    bank = PrototypeBank.build(tree, pairs)
    lap("bank")
    total = time.perf_counter() - started
    over.set()
    thread.join()
    return {
        "pairs": len(pairs),
        "dimension": pairs.dimension,
        "seconds": round(total, 1),
        "stages_s": stages,
        "peak_anonymous_mb": round((peak["anonymous"] - before["anonymous"]) / 1e6),
        "peak_resident_mb": round(peak["resident"] / 1e6),
        "features_mb": round(2 * 4 * pairs.image.size / 1e6),
        "themes": len(tree.nodes(THEME)),
        "concepts": len(tree.nodes(CONCEPT)),
        "modes": len(tree.nodes(MODE)),
        "prototypes": len(bank.names),
        "kept": len(tree.keys),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--million", action="store_true", help="10^6 as well")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="for the synthetic caches; a temporary one by default")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure)))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for pairs in [*options.pairs, *([1_000_000] if options.million else [])]:
            place = Path(folder) / str(pairs)
            plant(place, pairs, options.dimension)
            command = [sys.executable, __file__, "--measure", str(place)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**QUIET, **os.environ})
            results.append(json.loads(done.stdout))
            for file in place.iterdir():
                file.unlink()
    summary = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "results": results,
    }
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
