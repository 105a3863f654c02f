"""`python -m prototypes build | inspect | draw`: grow a tree and its bank from a feature cache, and look at them.

Exit codes: 0 done, 2 an option is wrong, 65 the cache, tree, bank or images can't be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prototypes.bank import PrototypeBank, load_bank, save_bank
from prototypes.cache import FeatureCache
from prototypes.cluster import KINDS, ClusterConfig, Sizes, grow
from prototypes.complexity import CONTROLS
from prototypes.draw import nearest_keys, page, thumbnails
from prototypes.hierarchy import CONCEPT, LEVELS, MODE, THEME, Hierarchy, load_hierarchy, save_hierarchy
from prototypes.vectors import Floats

OK, USAGE, BAD_DATA, INTERRUPTED = 0, 2, 65, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run with command-line `words`; returns the exit code."""
    options = _parser().parse_args(words)
    said = Console(stderr=True)
    try:
        work = {"build": build, "inspect": inspect, "draw": draw}[options.command]
        work(options, said)
    except ValueError as error:
        said.print(str(error), style="red", markup=False, highlight=False)
        return BAD_DATA
    except OSError as error:
        said.print(f"{error.filename}: {error.strerror}", style="red", markup=False, highlight=False)
        return BAD_DATA
    except KeyboardInterrupt:
        said.print("interrupted; run the same command again.", style="yellow")
        return INTERRUPTED
    return OK


def _parser() -> argparse.ArgumentParser:
    defaults = ClusterConfig()
    parser = argparse.ArgumentParser("python -m prototypes", description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("build", help="feature cache -> tree and bank")
    made.add_argument("cache", type=Path, metavar="CACHE", help="folder of cached features")
    made.add_argument("--out", type=Path, required=True, metavar="DIR")
    made.add_argument("--seed", type=_at_least(0), default=defaults.seed)
    made.add_argument("--kind", choices=list(KINDS), default=defaults.kind, help="the tree, or an ablation of it")
    made.add_argument("--complexity", choices=CONTROLS, default=defaults.complexity, help="measured, or a control")
    made.add_argument(
        "--quantile", type=_share, default=defaults.quantile, help="share of least agreeing pairs to drop"
    )
    made.add_argument("--duplicate", type=float, default=defaults.duplicate, help="image cosine of near-duplicates")
    made.add_argument("--leaks", type=Path, metavar="CACHE", help="feature cache of test images to keep out")
    made.add_argument("--leak", type=float, default=defaults.leak, help="image cosine to them from which a pair goes")
    made.add_argument("--logit-scale", type=float, default=defaults.logit_scale)
    made.add_argument("--themes", type=_at_least(1), help="instead of the number that follows from the pairs")
    seen = commands.add_parser("inspect", help="the tree in the terminal")
    seen.add_argument("dir", type=Path, metavar="DIR", help="what build wrote")
    seen.add_argument("--depth", type=int, choices=(THEME, CONCEPT, MODE), default=CONCEPT, help="1 themes ... 3 modes")
    drawn = commands.add_parser("draw", help="the tree as one HTML page")
    drawn.add_argument("dir", type=Path, metavar="DIR", help="what build wrote")
    drawn.add_argument("--cache", type=Path, metavar="CACHE", help="the cache it was built from: for images")
    drawn.add_argument("--images", type=Path, nargs="+", default=[], metavar="SHARD.tar", help="WebDataset shards")
    drawn.add_argument("--nearest", type=_at_least(1), default=3, help="images of each prototype")
    drawn.add_argument("--side", type=_at_least(8), default=56, help="pixels of an image")
    drawn.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    return parser


def _at_least(low: int) -> type[int]:
    def whole(word: str) -> int:
        value = int(word)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        return value

    return whole  # type: ignore[return-value]  # argparse calls it; a type is what it is declared to want


def _share(word: str) -> float:
    value = float(word)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def build(options: argparse.Namespace, said: Console) -> None:
    """Grow, save and summarise."""
    cache = FeatureCache.open(options.cache)
    leaks: Floats | None = None
    if options.leaks:
        leaks = FeatureCache.open(options.leaks, fingerprint=cache.fingerprint).image
    sizes = None
    if options.themes:
        base = vars(Sizes.of(round(len(cache) * (1.0 - options.quantile))))
        sizes = Sizes(**{**base, "themes": options.themes})
    config = ClusterConfig(
        kind=options.kind,
        complexity=options.complexity,
        seed=options.seed,
        quantile=options.quantile,
        duplicate=options.duplicate,
        leak=options.leak,
        logit_scale=options.logit_scale,
        sizes=sizes,
    )
    started = time.perf_counter()

    def report(line: str) -> None:
        said.print(f"{time.perf_counter() - started:6.1f} s  {line}", markup=False, highlight=False)

    tree = grow(cache, config, leaks=leaks, report=report)
    bank = PrototypeBank.build(tree, cache, seed=options.seed)
    save_hierarchy(options.out, tree)
    save_bank(options.out, bank)
    report(f"{len(bank.names):,} prototypes; tree and bank written to {options.out}")
    summary(tree, bank)


def summary(tree: Hierarchy, bank: PrototypeBank) -> None:
    """Nodes, prototypes and sizes of every level."""
    table = Table("level", "nodes", "prototypes", "smallest", "median", "largest", "complexity", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for level in range(len(LEVELS)):
        nodes = tree.nodes(level)
        sizes = sorted(tree.sizes[nodes].tolist())
        kappa = tree.kappa[nodes]
        table.add_row(
            LEVELS[level],
            f"{len(nodes):,}",
            f"{len(bank.rows(level)):,}",
            *(f"{n:,}" for n in (sizes[0], sizes[len(sizes) // 2], sizes[-1])),
            f"{kappa.min():.2f} to {kappa.max():.2f}",
        )
    out = Console()
    out.print(table)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in tree.facts.get("dropped", {}).items())
    out.print(f"dropped: {dropped or 'nothing'}", markup=False, highlight=False)


def inspect(options: argparse.Namespace, said: Console) -> None:  # noqa: ARG001 (one signature for all commands)
    """Print the tree."""
    tree, bank = _load(options.dir)
    Console().print(tree.tree(depth=options.depth), highlight=False)
    summary(tree, bank)


def _load(folder: Path) -> tuple[Hierarchy, PrototypeBank]:
    tree = load_hierarchy(folder, fingerprint=None)
    bank = load_bank(folder, fingerprint=tree.fingerprint)
    if bank is None:
        raise ValueError(f"{folder} holds a tree but no bank; build it again.")
    return tree, bank


def draw(options: argparse.Namespace, said: Console) -> None:
    """Write the page."""
    tree, bank = _load(options.dir)
    nearest: dict[int, list[str]] = {}
    images: dict[str, bytes] = {}
    if options.images and not options.cache:
        raise ValueError("images are chosen by their features: give --cache, the cache that the tree was built from.")
    if options.images:
        cache = FeatureCache.open(options.cache, fingerprint=tree.fingerprint)
        nearest = nearest_keys(tree, bank, cache, options.nearest)
        wanted = {key for keys in nearest.values() for key in keys}
        images, damaged = thumbnails(options.images, wanted, options.side)
        missing = len(wanted) - len(images)
        if missing:
            said.print(f"{missing} of {len(wanted)} images left out, {damaged} of them damaged", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(tree, bank, nearest, images), encoding="utf-8")
    said.print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
