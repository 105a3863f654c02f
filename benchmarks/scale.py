"""How training's cost grows with the corpus: a cost law from synthetic features, and what two processes save.

    python benchmarks/scale.py [--sizes PAIRSxDIMENSION ...] [--repeats 3] [--folder DIR] [--from RESULT.json]

Plants a tree of themes, concepts and modes of the sizes that the product would choose, uneven, with noise as strong as
the signal and one near-duplicate in a hundred, as the feature cache of so many pairs; grows a tree and a bank from it,
searches the bank and draws episodes, in a process of its own with one thread. Fits core-seconds of every stage,
a power of the pairs, and computes from them what CC3M, CC12M and LAION-400M would need. Then trains on made-up pictures
with the bundled model, and grows a tree, in one process and in two, one thread each. Prints one JSON object; needs
8 bytes of disk for a pair and dimension. `--repeats 0` leaves the processes out; `--from` takes the sizes that an
earlier result has, and measures the others.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.figures import stolen_s
from gram_core import meta, pairs, train, unseen
from gram_core.config import read
from gram_core.episodes import EpisodeConfig, Tasks
from gram_core.images import ImageLimits, decode
from gram_core.unseen import ViewCache
from prototypes import cache
from prototypes.bank import PrototypeBank, save_bank
from prototypes.cluster import Sizes, grow
from prototypes.hierarchy import CONCEPT, MODE, THEME, save_hierarchy
from prototypes.vectors import BLOCK, blocks, unit

SIZES = ["10000x512", "30000x512", "100000x512", "300000x512", "100000x64", "100000x128", "100000x256"]
ONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
STAGES = ("clean", "themes", "concepts", "modes", "names", "measure", "bank", "save")
QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}  # of Student's t, 97.5 %
UNSEEN, VIEWS, DRAWN, QUERIES = 20_000, 4, 200, 2_000

CORPORA = {"CC3M": 3.3e6, "CC12M": 12.4e6, "LAION-400M": 413e6}
GFLOP = {"ViT-B-32": (8.82, 5.96), "ViT-B-16": (35.13, 5.96)}  # an image, a text of 77 tokens: formulas of the layers
GPU_TFLOPS, GPU_SHARE = 790.0, 0.3  # dense bf16 of an H100 or H200, and the part of it that is assumed to be had
TEXT = 150  # bytes of a pair's key and captions, assumed
PICTURES, META_STEPS, SHARED = 1_024, 40, "100000x64"
RECIPE = f"""
pairs = ["things.zip"]
unseen = ["things/unseen/"]
least = 1
workers = 1
tree = {{quantile = 0.0, duplicate = 1.1, themes = 6}}
views = {{views = 2, styled_views = 2, share = 0.0}}
episodes = {{held_out = 0.4}}
learner = {{survey = 64, settle = 64}}
meta = {{steps = {META_STEPS}, episodes = 8, validate_episodes = 0}}
"""


# ---- the cost law


def plant(folder: Path, count: int, dimension: int) -> None:
    """The cache of `count` planted pairs, written block by block."""
    rng = np.random.default_rng(0)
    sizes = Sizes.of(count)
    themes = sizes.themes
    concepts = themes * round(float(np.sqrt(sizes.concepts[0] * sizes.concepts[1])))
    directions = [unit(rng.standard_normal((n, dimension))) for n in (2, themes, concepts, 3 * concepts)]
    often = rng.pareto(3.0, 3 * concepts) + 0.5
    mode = rng.choice(3 * concepts, size=count, p=often / often.sum())
    concept = mode // 3
    theme = concept * themes // concepts
    folder.mkdir(parents=True)
    with (folder / "image.f32").open("wb") as image, (folder / "caption.f32").open("wb") as caption:
        for part in blocks(count):
            for i, file in enumerate((image, caption)):
                x = directions[0][i] + 1.2 * directions[1][theme[part]] + directions[2][concept[part]]
                x = x + directions[3][mode[part]] if i == 0 else x
                x = unit(x + rng.standard_normal(x.shape, np.float32) / np.float32(np.sqrt(dimension)))
                copies = np.arange(100, len(x), 100)
                noise = rng.standard_normal((len(copies), dimension), np.float32) / np.float32(np.sqrt(dimension))
                x[copies] = unit(x[copies - 50] + 0.1 * noise)  # a cosine of 0.995
                file.write(x.astype("<f4").tobytes())
    phrase = unit(directions[0][1] + 1.2 * directions[1][np.arange(concepts) * themes // concepts] + directions[2])
    (folder / "phrase.f32").write_bytes(phrase.astype("<f4").tobytes())
    order = np.argsort(concept, kind="stable")
    rows = np.split(order, np.searchsorted(concept[order], np.arange(1, concepts)))
    with (folder / "keys.jsonl").open("w") as file:
        file.writelines(f'{{"key": "shard/{i:09d}", "captions": ["a planted thing"]}}\n' for i in range(count))
    with (folder / "phrases.jsonl").open("w") as file:
        file.writelines(f'{{"phrase": "thing {i}", "count": {len(own)}}}\n' for i, own in enumerate(rows))
    with (folder / "phrase_rows.jsonl").open("w") as file:
        file.writelines(json.dumps(own[: cache.ROWS_PER_PHRASE].tolist()) + "\n" for own in rows)
    header = {"format": 1, "fingerprint": "synthetic", "model": "made up", "dtype": "float32", "complete": True}
    header |= {"dimension": dimension, "pairs": count, "phrases": concepts}
    (folder / "header.json").write_text(json.dumps(header))


@contextmanager
def peak(found: dict[str, int]) -> Iterator[None]:
    """Most memory of its own in the block (bytes), less what there was before; pages of mapped files don't count."""

    def now() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines["RssAnon"].split()[0])

    before, most, over = now(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found["memory"] = most[0] - before


def measure(folder: Path) -> dict[str, Any]:
    """Core-seconds and seconds of every stage on a planted cache, memory and disk."""
    core: dict[str, float] = {}
    wall: dict[str, float] = {}
    found: dict[str, int] = {}
    names, last = iter((None, *STAGES[:5])), [time.process_time(), time.perf_counter()]

    def lap(name: str | None) -> None:
        if name is None:  # it is about to begin
            return
        now = [time.process_time(), time.perf_counter()]
        core[name], wall[name] = (round(b - a, 3) for a, b in zip(last, now, strict=True))
        last[:] = now

    with peak(found):
        whole = cache.FeatureCache.open(folder)
        tree = grow(whole, report=lambda _: lap(next(names)))
        lap("measure")
        bank = PrototypeBank.build(tree, whole)
        lap("bank")
    save_hierarchy(folder / "tree", tree)
    save_bank(folder / "tree", bank)
    lap("save")
    rng = np.random.default_rng(1)
    queries = unit(whole.image[np.sort(rng.integers(len(whole), size=QUERIES))] + 0)
    last[:] = [time.process_time(), time.perf_counter()]
    bank.search(queries, 16, level=MODE)
    lap("search")
    keys = [tree.keys[i] for i in np.linspace(0, len(tree.keys) - 1, min(UNSEEN, len(tree.keys))).astype(np.int64)]
    halves = rng.standard_normal((len(keys), VIEWS, 16)).astype(np.float16)  # what is drawn doesn't depend on them
    views = ViewCache("synthetic", tuple(keys), ("plain",) * len(keys), halves)
    tasks = Tasks(tree, bank, views, EpisodeConfig(), held_out=False)
    lap("episodes, once")
    for i in range(DRAWN):
        tasks.episode(i, i / DRAWN)
    lap("episodes")
    copies = np.arange(len(whole)) % BLOCK % 100 == 0
    row_of = np.array([int(key.rpartition("/")[2]) for key in tree.keys])
    pair = np.isin(row_of, np.flatnonzero(copies & (np.arange(len(whole)) % BLOCK > 0)))
    both = np.isin(row_of[pair] - 50, row_of)
    return {
        "pairs": len(whole),
        "dimension": whole.dimension,
        "core_s": {name: core[name] for name in STAGES} | {"all": round(sum(core[name] for name in STAGES), 2)},
        "wall_s": round(sum(wall[name] for name in STAGES), 1),
        "search_us": round(1e6 * core["search"] / QUERIES, 1),
        "episode_ms": round(1e3 * core["episodes"] / DRAWN, 2),
        "memory_mb": round(found["memory"] / 1e6),
        "cache_mb": round(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6),
        "tree_mb": round(sum(path.stat().st_size for path in (folder / "tree").iterdir()) / 1e6),
        "nodes": [len(tree.nodes(level)) for level in (THEME, CONCEPT, MODE)] + [len(bank.names)],
        "kept": len(tree.keys),
        "duplicates": [int(tree.facts["dropped"]["near-duplicates"]), int(both.sum())],
    }


def law(x: list[float], y: list[float]) -> dict[str, float]:
    """y = constant x^power by least squares on logarithms, the power with half the width of its 95 % interval."""
    a, b = np.log(np.array(x, np.float64)), np.log(np.maximum(np.array(y, np.float64), 1e-3))
    power, shift = np.polyfit(a, b, 1)
    free = len(a) - 2
    spread = np.sqrt(((b - power * a - shift) ** 2).sum() / free / ((a - a.mean()) ** 2).sum()) if free else 0.0
    half = QUANTILES[min(free, 8)] * spread if free else float("nan")
    return {"power": round(float(power), 3), "half": round(float(half), 3), "constant": float(f"{np.exp(shift):.3g}")}


def laws(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per dimension, each stage over pairs (of which there are three sizes at least); and over the dimension."""
    made = {}
    for dimension in sorted({row["dimension"] for row in rows}):
        own = sorted((row for row in rows if row["dimension"] == dimension), key=lambda row: row["pairs"])
        if len(own) >= 3:
            n = [row["pairs"] for row in own]
            made[f"pairs, D = {dimension}"] = {
                name: law(n, [row["core_s"][name] for row in own]) for name in own[0]["core_s"]
            } | {"memory, MB": law(n, [row["memory_mb"] for row in own])}
    for count in sorted({row["pairs"] for row in rows}):
        own = [row for row in rows if row["pairs"] == count]
        if len(own) >= 3:
            d = [row["dimension"] for row in own]
            made[f"dimension, {count:,} pairs"] = {
                name: law(d, [row["core_s"][name] for row in own]) for name in own[0]["core_s"]
            } | {"memory, MB": law(d, [row["memory_mb"] for row in own])}
    return made


# ---- what corpora would need


def corpora(rows: list[dict[str, Any]], picture_ms: float) -> dict[str, Any]:
    """Estimates for D = 512: from the largest measured size at 512, on by the power of the widest range of sizes, but 1
    at least."""
    wide = max({row["dimension"] for row in rows}, key=lambda d: max(r["pairs"] for r in rows if r["dimension"] == d))
    over = sorted((r for r in rows if r["dimension"] == wide and r["pairs"] >= 1e5), key=lambda r: r["pairs"])
    at = max((row for row in rows if row["dimension"] == 512), key=lambda row: row["pairs"])
    n = [row["pairs"] for row in over]
    core, memory = law(n, [r["core_s"]["all"] for r in over]), law(n, [r["memory_mb"] for r in over])
    made = {}
    for name, count in CORPORA.items():
        grown = count / at["pairs"]
        made[name] = {
            "pairs": count,
            "gpu_hours": {
                m: round(count * sum(g) / (1e3 * GPU_TFLOPS * GPU_SHARE) / 3600, 2) for m, g in GFLOP.items()
            },
            "picture_core_hours": round(count * picture_ms / 3.6e6, 1),
            "clustering_core_hours": round(at["core_s"]["all"] * grown ** max(core["power"], 1.0) / 3600, 1),
            "memory_gb": round(at["memory_mb"] * grown ** max(memory["power"], 1.0) / 1e3, 1),
            "features_gb": round(count * (2 * 4 * 512) / 1e9, 1),
            "text_gb": round(count * TEXT / 1e9, 1),
        }
    return {
        "from": {"pairs": at["pairs"], "core_s": at["core_s"]["all"], "memory_mb": at["memory_mb"], "dimension": wide,
                 "power": core, "memory_power": memory, "over": n},
        "gpu": {"tflops": GPU_TFLOPS, "share": GPU_SHARE, "gflop": GFLOP},
        "picture_ms": picture_ms,
        "rows": made,
    }  # fmt: skip


def picture_ms() -> float:
    """Milliseconds of a core to decode a 256-pixel JPEG and make a 224-pixel tensor of it."""
    content = io.BytesIO()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(256, size=(40, 48, 3), dtype=np.uint8))
    small.resize((308, 256), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    from torchvision.transforms import v2

    made = v2.Compose([v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage()])
    started = time.process_time()
    for _ in range(200):
        made(decode(content.getvalue(), ImageLimits()).rgb).float()
    return round(1e3 * (time.process_time() - started) / 200, 2)


# ---- processes


def pictures(folder: Path, count: int = PICTURES) -> None:
    """`things.zip`: eight class folders of seeded pictures, and the recipe that trains on them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("apple", "boat", "cat", "dog", "egg", "fish", "goat", "hat")
    with zipfile.ZipFile(folder / "things.zip", "w") as file:
        for i in range(count):
            rng = np.random.default_rng(i)
            k = i % len(names)
            y, x = np.mgrid[:128, :128] / 128
            wave = np.sin(40 * (x * (1 + k % 3) + y * (1 + k // 3)) + rng.uniform(0, 6))[..., None]
            colour = 255 * np.array([k & 1, k >> 1 & 1, k >> 2 & 1]) + rng.normal(0, 20, (128, 128, 3))
            content = io.BytesIO()
            Image.fromarray((0.6 * colour + 60 * wave + 50).clip(0, 255).astype(np.uint8)).save(content, "JPEG")
            half = ("seen", "unseen")[i % 16 // 8]
            file.writestr(f"{half}/{names[k]}/{i:05d}.jpg", content.getvalue())
    (folder / "recipe.toml").write_text(RECIPE)


def shared(folder: Path, planted: Path, out: Path) -> None:
    """One of the processes of a run: all stages of training, then tree and bank of a planted cache; rank 0 prints
    seconds and the core-seconds of whichever process spent most."""
    took: dict[str, list[float]] = {}

    @contextmanager
    def lap(stage: str) -> Iterator[None]:
        world = meta.World.here()
        world.gather(stage)
        wall, core = time.perf_counter(), time.process_time()
        yield
        busiest = max(world.gather(time.process_time() - core))
        took[stage] = [time.perf_counter() - wall, busiest]

    def timed(module: Any, name: str, stage: str) -> None:
        whole: Callable[..., Any] = getattr(module, name)

        def one(*args: Any, **options: Any) -> Any:
            with lap(stage):
                return whole(*args, **options)

        setattr(module, name, one)

    timed(pairs, "build", "features")
    timed(unseen, "build", "views")
    timed(meta, "train", "meta-training")
    with meta.joined():
        world = meta.World.here()
        given = {"data": folder, "out": out, "device": "cpu"}
        train.run(read(train.TrainConfig, folder / "recipe.toml", given), Console(file=io.StringIO()))
        team = train._Team(world.rank, world.size)
        with lap("clustering"):
            whole = cache.FeatureCache.open(planted)
            PrototypeBank.build(grow(whole, team=team), whole, team=team)
        if world.rank == 0:
            sys.stdout.write(json.dumps(took))


def processes(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each stage in one and two processes, by turns; ratios of medians."""
    pictures(folder / "pictures")
    plant(folder / "planted", *map(int, SHARED.split("x")))
    runs: dict[int, list[dict[str, list[float]]]] = {1: [], 2: []}
    hashes = set()
    before, own, began = busy_s(), spent_s(), time.perf_counter()
    for turn in range(2 * repeats):
        size, out = 1 + (turn + turn // 2) % 2, folder / "out"  # 1 2 2 1 1 2: neither always comes first
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        words = [__file__, "--share", str(folder / "pictures"), str(folder / "planted"), str(out)]
        done = subprocess.run(
            [sys.executable, *start, *words], check=True, stdout=subprocess.PIPE, env=os.environ | ONE
        )
        runs[size].append(json.loads(done.stdout))
        hashes.add(json.loads((out / "checkpoint" / "gram.json").read_text())["sha256"])
        shutil.rmtree(out)
    others = (busy_s() - before - (spent_s() - own)) / (time.perf_counter() - began)
    made = {}
    for stage in runs[1][0]:
        made[stage] = {}
        for i, what in enumerate(("wall", "core")):
            one, two = ([run[stage][i] for run in runs[size]] for size in (1, 2))
            pairwise = sorted(round(a / b, 2) for a, b in zip(one, two, strict=True))
            medians = [round(statistics.median(values), 2) for values in (one, two)]
            made[stage][what] = {
                "s": medians,
                "ratio": round(medians[0] / medians[1], 2),
                "range": [pairwise[0], pairwise[-1]],
            }
    return {"repeats": repeats, "pictures": PICTURES, "meta_steps": META_STEPS, "planted": SHARED, "stages": made,
            "checkpoints": len(hashes), "others_cores": round(others, 2)}  # fmt: skip


def busy_s() -> float:
    """Core-seconds that all cores of this machine have been busy with anything, or stolen."""
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def spent_s() -> float:
    """Core-seconds of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="PAIRSxDIMENSION")
    parser.add_argument("--repeats", type=int, default=3, help="runs of one and of two processes")
    parser.add_argument("--folder", type=Path, help="for the synthetic caches; a temporary one by default")
    parser.add_argument("--from", type=Path, dest="earlier", metavar="RESULT.json", help="what was measured before")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure)))
        return
    if options.share:
        shared(*options.share)
        return
    earlier = json.loads(options.earlier.read_text()) if options.earlier else {"rows": []}
    rows = {f"{row['pairs']}x{row['dimension']}": row for row in earlier["rows"]}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for size in options.sizes:
            if size in rows:
                continue
            plant(folder / size, *map(int, size.split("x")))
            command = [sys.executable, __file__, "--measure", str(folder / size)]
            before = stolen_s()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | ONE)
            rows[size] = json.loads(done.stdout)
            rows[size]["stolen_s"] = round(stolen_s() - before, 1)
            shutil.rmtree(folder / size)
            sys.stderr.write(f"{size}: {rows[size]['core_s']['all']} core-seconds, {rows[size]['wall_s']} s\n")
        measured = sorted(rows.values(), key=lambda row: (row["dimension"], row["pairs"]))
        both = processes(folder / "processes", options.repeats) if options.repeats else earlier.get("processes")
    summary = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "rows": measured,
        "laws": laws(measured),
        "processes": both,
    }
    if any(row["dimension"] == 512 for row in measured) and len(measured) > 3:
        summary["corpora"] = corpora(measured, picture_ms())
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
