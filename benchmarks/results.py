"""Write `benchmarks/RESULTS.md` from the JSON in `benchmarks/results/` and the prose in `benchmarks/negatives.md`.

    python benchmarks/results.py [--check]

`--check` writes nothing and ends with 1 when the file is not what the JSON says. `evaluate-NAME.json` is the
`summary.json` of `python -m gram_core.evaluate --recipe recipes/gram-mini/evaluate-NAME.toml --data DIR`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORDER = ("evaluate", "evaluate-gram", "evaluate-zero-shot", "evaluate-variants", "evaluate-corruptions",
         "evaluate-training")  # fmt: skip
HEAD = """# Results

Written by `python benchmarks/results.py` from the JSON in `benchmarks/results/`; every table names the command that
made its JSON. Machines are shared: absolute times are upper bounds, ratios were taken in one run. Nothing here was
measured on a GPU.

Gains are points of top-1 over zero-shot with the same texts, with a 95 % paired bootstrap interval over requests and
images; **bold** where it excludes zero. ECE is the expected calibration error in points (equal-width bins). Sets marked
*choosing* were used to choose settings, *reporting* sets were not. How requests are drawn: `docs/evaluation.md`.
"""
Row = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def gain(row: Row | None) -> str:
    """`+1.2 [0.3, 2.1]`, bold where the interval excludes zero."""
    if row is None:
        return ""
    if row["method"] == "zero-shot":
        return f"top-1 {row['top1']:.1f}"
    return interval(row["gain"])


def interval(g: Row) -> str:
    """The same of a mean and its two ends."""
    text = f"{g['mean']:+.1f} [{g['low']:.1f}, {g['high']:.1f}]"
    return f"**{text}**" if g["low"] > 0 or g["high"] < 0 else text


def column(row: Row) -> str:
    """The name of a protocol's column."""
    if row["protocol"] == "image":
        return "each alone"
    return f"{row['kind']} {row['size']}" + (" stream" if row["protocol"] == "stream" else "")


def pivot(rows: Sequence[Row], labels: dict[str, str], columns: Sequence[str], show: Any) -> Iterator[str]:
    """Methods as rows, protocols as columns."""
    at = {(r["method"], column(r)): r for r in rows}
    body = [[labels[m], *(show(at.get((m, c))) for c in columns)] for m in labels if any((m, c) in at for c in columns)]
    yield from table(["", *columns], body)


def evaluation(name: str, summary: Row) -> Iterator[str]:
    """One summary of the harness."""
    hardware, settings = summary["hardware"], summary["settings"]
    yield f"## {summary['title']}"
    yield ""
    trained = [m["name"].removeprefix("gram:") for m in summary["methods"] if m["name"].startswith("gram:")]
    others = " --checkpoints " + " ".join(f"{each}=DIR" for each in trained) if trained else ""
    yield f"    python -m gram_core.evaluate --recipe recipes/gram-mini/{name}.toml --data DIR{others}"
    yield ""
    yield (
        f"{summary['date']}, commit {summary['commit']}, {hardware['cpu']}, {hardware['cores']} cores, device "
        f"{hardware['device']}, torch {hardware['torch']}, {hardware['dtype']}; model {summary['model']['name']} "
        f"({summary['model']['fingerprint'][:12]}), view seed {settings['view_seed']}, {settings['seeds']} seeds of "
        f"requests, {settings['windows']} requests a cell, {settings['draws']} bootstrap draws, {settings['bins']} "
        f"bins, crops: {settings['crops']}; {summary['minutes']:.1f} minutes."
    )
    yield ""
    rows = [
        [s["name"], s["role"], str(s["classes"]), str(s["images"]), s["files_sha256"][:12]] for s in summary["sets"]
    ]
    yield from table(["set", "role", "classes", "images", "list of files"], rows)
    labels = {m["name"]: m["label"] for m in summary["methods"]}
    for protocol in dict.fromkeys(c["protocol"] for c in summary["cells"]):
        for role in ("all", "reporting", "choosing"):
            means = [m for m in summary["means"] if m["protocol"] == protocol and m["role"] == role]
            if not means or (role != "all" and len({m["role"] for m in summary["means"]}) < 3):
                continue
            yield f"**{protocol}, mean of the {means[0]['sets']} {'' if role == 'all' else role + ' '}sets**"
            yield ""
            columns = list(dict.fromkeys(column(m) for m in means))
            for start in range(0, len(columns), 6):
                yield from pivot(means, labels, columns[start : start + 6], gain)
    yield from calibration(summary, labels)
    yield from by_set(summary, labels)
    yield from harm(summary, labels)
    yield "**Cost**, means over sets; milliseconds of one image by stage"
    yield ""
    cost = [
        [
            m["label"],
            f"{m['image_passes']:.0f}",
            f"{m['gflops']:.2f}",
            *(f"{m['ms'][stage]:.2f}" for stage in ("decode", "views", "image", "adapt")),
            f"{m['ms_per_image']:.1f}",
            f"{m['peak_mib']:.0f}",
        ]
        for m in summary["methods"]
    ]
    head = ["", "tower passes", "GFLOP", "decode", "views", "tower", "adapt", "sum, ms", "memory, MiB"]
    yield from table(head, cost)


def calibration(summary: Row, labels: dict[str, str]) -> Iterator[str]:
    """Expected calibration error, mean over all sets."""
    means = [m for m in summary["means"] if m["role"] == "all"]
    wanted = [m for m in means if m["size"] in (1, 32) or m["protocol"] == "stream"] or means
    columns = list(dict.fromkeys(column(m) for m in wanted))
    if wanted:
        yield "**ECE**, mean of all sets"
        yield ""
        yield from pivot(wanted, labels, columns, lambda row: "" if row is None else f"{row['ece']:.1f}")


def by_set(summary: Row, labels: dict[str, str]) -> Iterator[str]:
    """Top-1 and gain of every set, for one protocol of each name."""
    for protocol, size in (("image", 1), ("batch", 32), ("stream", None)):
        cells = [c for c in summary["cells"] if c["protocol"] == protocol and size in (None, c["size"])]
        for kind in list(dict.fromkeys(c["kind"] for c in cells)):
            mine = [c for c in cells if c["kind"] == kind]
            sets = list(dict.fromkeys(c["set"] for c in mine))
            yield f"**{column(mine[0])}, by set**: top-1 and gain"
            yield ""
            at = {(c["method"], c["set"]): c for c in mine}
            if len(sets) > 8:
                methods = [m for m in labels if any((m, s) in at for s in sets)]
                body = [[s, *(_top(at.get((m, s))) for m in methods)] for s in sets]
                yield from table(["set", *(labels[m] for m in methods)], body)
                continue
            body = [[labels[m], *(_top(at.get((m, s))) for s in sets)] for m in labels if (m, sets[0]) in at]
            yield from table(["", *sets], body)


def _top(cell: Row | None) -> str:
    if cell is None:
        return ""
    if cell["mean_size"] < cell["size"] / 2:
        return f"({cell['top1']:.1f}: {cell['mean_size']:.0f} images a request)"
    return f"{cell['top1']:.1f}" if cell["method"] == "zero-shot" else f"{cell['top1']:.1f}, {gain(cell)}"


def harm(summary: Row, labels: dict[str, str]) -> Iterator[str]:
    """How many cells are significantly below and above zero-shot."""
    yield "**Cells (one set, one kind, one size) whose interval lies below zero-shot, or above**"
    yield ""
    rows = []
    for method, label in labels.items():
        mine = [c for c in summary["cells"] if c["method"] == method]
        if method == "zero-shot" or not mine:
            continue
        below, above = (sum(c["gain"][end] * sign > 0 for c in mine) for end, sign in (("high", -1), ("low", 1)))
        worst = min(mine, key=lambda c: c["gain"]["mean"])
        rows.append([label, f"{below} of {len(mine)}", str(above), f"{worst['set']}, {column(worst)}: {gain(worst)}"])
    yield from table(["", "below", "above", "worst cell"], rows)


def text_path(reports: Sequence[Row]) -> Iterator[str]:
    """`benchmarks/text_path.py`."""
    yield "## The exact text path"
    yield ""
    yield "    python benchmarks/text_path.py"
    yield ""
    yield (
        f"One tuning step (forward, backward to the context, final forward), {reports[0]['model']} shapes, against "
        f"open_clip's 77-token path in the same process, alternating, {reports[0]['threads']} threads, torch "
        f"{reports[0]['torch']}, {reports[0]['date']}."
    )
    yield ""
    rows = [
        [
            str(row["classes"]),
            str(report["repeats"]),
            f"{row['max_feature_difference']:.1e}",
            f"{row['relative_gradient_error']:.1e}",
            f"{row['ours_s']:.2f}",
            f"{row['open_clip_s']:.2f}",
            f"{row['ratio']:.1f}",
            " - ".join(f"{r:.1f}" for r in row["ratio_range"]),
        ]
        for report in reports
        for row in report["rows"]
    ]
    head = ["classes", "repeats", "largest feature difference", "relative gradient error", "ours, s", "open_clip, s",
            "ratio of medians", "range"]  # fmt: skip
    yield from table(head, rows)


def throughput(report: Row) -> Iterator[str]:
    """`benchmarks/throughput.py`."""
    yield "## Throughput of /classify"
    yield ""
    yield f"    python benchmarks/throughput.py --requests {report['requests']} --clients {report['clients']}"
    yield ""
    yield (
        f"Real HTTP, server and client on the same machine ({report['device']}, {report['dtype']}, {report['date']}), "
        f"{report['model']}, {report['classes']} classes, closed loop, 256-pixel JPEGs."
    )
    yield ""
    rows = [
        [
            name,
            f"{row['images_per_s']:.1f}",
            f"{row['requests_per_s']:.2f}",
            f"{row['p50_ms']:.0f}",
            ", ".join(f"{k} {v}" for k, v in row["median_stage_ms"].items() if k != "total"),
        ]
        for name, row in report["rows"].items()
    ]
    yield from table(["request", "images/s", "requests/s", "p50 ms", "median stages, ms"], rows)


def contrast(name: str, report: Row) -> Iterator[str]:
    """`benchmarks/contrast.py`; `contrast-WHAT.json` is headed with WHAT."""
    where = name.removeprefix("contrast").strip("-")
    title = f"## {report['rows'][0]['method']} against others, mean over sets and kinds of request"
    yield f"{title} ({where})" if where else title
    yield ""
    yield f"    {report['command']}"
    yield ""
    yield "Paired bootstrap over requests; points of top-1, **bold** where the interval excludes zero."
    yield ""
    sizes = sorted({row["size"] for row in report["rows"]})
    others = list(dict.fromkeys(row["against"] for row in report["rows"]))
    place = {(row["against"], row["size"]): row for row in report["rows"]}
    rows = [[f"over {other}", *(interval(place[other, size]) for size in sizes)] for other in others]
    kinds = list(dict.fromkeys(row["kind"] for row in report["kinds"]))
    by_kind = {(row["kind"], row["size"]): row for row in report["kinds"]}
    rows += [[f"over {others[0]}, {kind}", *(interval(by_kind[kind, size]) for size in sizes)] for kind in kinds]
    yield from table(["", *(f"{size} images" for size in sizes)], rows)


def mechanism(report: Row) -> Iterator[str]:
    """`benchmarks/mechanism.py`."""
    yield "## Gradient regulators on held-out themes"
    yield ""
    yield f"    {report['command']}"
    yield ""
    yield (
        f"{report['date']}, {report['hardware']}, torch {report['torch']}; {report['seeds']} seeds, {report['steps']} "
        f"outer steps, one step of rms {report['step_rms']}; mean and 95 % interval over held-out episodes. Raw step: "
        "no regulator. Losses are the cross-domain query's cross-entropy less its value before the step."
    )
    yield ""
    names = ["cosine", "cosine change", "raw step", "regulated step", "regulated less raw"]
    rows = [
        [name, *(f"{row[n][0]:+.4f} ± {row[n][1]:.4f}" for n in names), str(row["cosine"][2])]
        for name, row in report["rows"].items()
    ]
    yield from table(["regulator", "cosine of raw step and query gradient", "its change", "query loss, raw step",
                      "query loss, regulated step", "regulated less raw", "episodes"], rows)  # fmt: skip


def gram_cost(report: Row) -> Iterator[str]:
    """`benchmarks/gram_cost.py`."""
    yield "## What GRAM adds to a request"
    yield ""
    yield f"    {report['command']}"
    yield ""
    yield (
        f"{report['machine']}, {report['date']}; {report['weights']} learned numbers, {report['bank_mb']} MB of "
        "prototypes in memory. Medians of a whole answer on cached features, without the image tower, which both need."
    )
    yield ""
    names = ["images", "classes", "infomax_ms", "gram_ms", "ratio"]
    head = ["images", "classes", "joint tuning, ms", "GRAM, ms", "ratio of medians"]
    yield from table(head, [[str(row[name]) for name in names] for row in report["rows"]])


def scale(report: Row) -> Iterator[str]:
    """`benchmarks/scale.py`."""
    yield "## How training grows with the corpus"
    yield ""
    sizes = " ".join(f"{row['pairs']}x{row['dimension']}" for row in report["rows"])
    yield f"    python benchmarks/scale.py --repeats {report['processes']['repeats']} --sizes {sizes}"
    yield ""
    yield (
        f"Synthetic pairs, one process with one thread, {report['machine']}, {report['date']}. Core-seconds, which "
        "other work disturbs least; memory is what the process has of its own, without pages of mapped files. "
        "Duplicates: near-duplicates dropped / pairs of them of which both stayed."
    )
    yield ""
    stages = [name for name in report["rows"][0]["core_s"] if name != "all"]
    rows = [
        [
            f"{row['pairs']:,} x {row['dimension']}",
            f"{row['core_s']['all']:,.0f}",
            ", ".join(f"{name} {row['core_s'][name]:.3g}" for name in stages),
            f"{row['memory_mb']:,}",
            f"{row['cache_mb']:,} + {row['tree_mb']:,}",
            " / ".join(f"{count:,}" for count in row["nodes"]),
            " / ".join(f"{count:,}" for count in row["duplicates"]),
            f"{row['search_us']:.0f}",
            f"{row['episode_ms']:.1f}",
        ]
        for row in report["rows"]
    ]
    head = ["pairs", "core-seconds", "by stage", "memory, MB", "disk: features + tree, MB",
            "themes / concepts / modes / prototypes", "duplicates", "a search, us", "an episode, ms"]  # fmt: skip
    yield from table(head, rows)
    yield "Power of the pairs, or of the dimension, that fits each stage (± half of a 95 % interval):"
    yield ""
    names = list(next(iter(report["laws"].values())))
    rows = [
        [name, *(f"{law[name]['power']:.2f} ± {law[name]['half']:.2f}" for law in report["laws"].values())]
        for name in names
    ]
    yield from table(["", *report["laws"]], rows)
    yield from shared(report["processes"])
    source = report["corpora"]["from"]
    yield "**What corpora would need**, estimated (assumptions: `docs/operations.md`)"
    yield ""
    yield (
        f"From {source['core_s']:,.0f} core-seconds and {source['memory_mb']:,} MB at {source['pairs']:,} x 512, by "
        f"the powers {max(source['power']['power'], 1):.2f} and {max(source['memory_power']['power'], 1):.2f} of the "
        f"pairs: those of {min(source['over']):,} to {max(source['over']):,} pairs x {source['dimension']} "
        f"({source['power']['power']:.2f} and {source['memory_power']['power']:.2f}), but 1 at least."
    )
    yield ""
    yield from corpora(report["corpora"])


def corpora(report: Row) -> Iterator[str]:
    """What is computed from the measured law; `docs/operations.md` repeats it."""
    rows = [
        [
            f"{name}, {row['pairs'] / 1e6:g} M",
            " / ".join(f"{hours:,.2g}" for hours in row["gpu_hours"].values()),
            f"{row['picture_core_hours']:,.0f}",
            f"{row['clustering_core_hours']:,.1f}",
            f"{row['memory_gb']:,.1f}",
            f"{row['features_gb']:,.0f} + {row['text_gb']:,.1f}",
        ]
        for name, row in report["rows"].items()
    ]
    models = " / ".join(next(iter(report["rows"].values()))["gpu_hours"])
    head = ["corpus, pairs", f"towers, GPU-hours ({models})", "pictures to tensors, core-hours",
            "tree and bank, core-hours", "memory of each process, GB", "disk: features + text, GB"]  # fmt: skip
    yield from table(head, rows)


def shared(report: Row) -> Iterator[str]:
    """Two processes against one, of `benchmarks/scale.py`."""
    yield "**One process and two**"
    yield ""
    yield (
        f"One thread each, on the same two cores, by turns, {report['repeats']} runs of each: medians, their ratio and "
        f"its range over pairs of runs. Other work on the machine took {report['others_cores']:.1f} of the two cores "
        "meanwhile, which seconds contain; core-seconds of the busier process say how evenly work is dealt, and "
        f"leave out waiting. Training of `gram-mini` on {report['pictures']:,} pictures, {report['meta_steps']} steps; "
        f"clustering and bank of {report['planted']} planted pairs. Different checkpoints among the runs: "
        f"{report['checkpoints']} (1: bit for bit the same)."
    )
    yield ""
    rows = []
    for stage, row in report["stages"].items():
        cells = [stage]
        for what in ("core", "wall"):
            one, two = row[what]["s"]
            low, high = row[what]["range"]
            cells += [f"{one:.1f} / {two:.1f}", f"{row[what]['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(cells)
    yield from table(["stage", "core-seconds, one / busier of two", "ratio", "seconds, one / two", "ratio"], rows)


def load(report: Row) -> Iterator[str]:
    """`benchmarks/load.py`."""
    yield "## Load"
    yield ""
    flags = f" -- {' '.join(report['flags'])}" if report["flags"] else ""
    yield f"    python benchmarks/load.py --seconds {report['seconds']:g} --mix {' '.join(report['mixes'])}{flags}"
    yield ""
    yield (
        f"{served(report)}. Open loop, Poisson arrivals, {report['seconds']:g} s a rate, {report['image']}, latency of "
        f"accepted requests from their scheduled time; percentiles: {report['percentiles']}. C is found by a closed "
        "loop without refusals or brown-out. Cores stolen: what the host of this virtual machine gave to others."
    )
    yield ""
    for name, found in report["mixes"].items():
        limit = found["capacity"]
        yield (
            f"**{name}**: C = {limit['per_s']:.2f} requests/s ({limit['clients']} clients), service time "
            f"{limit['service_ms']:.0f} ms"
        )
        yield ""
        last = {**found["after"], "factor": "after the burst, 0.5"}
        yield from table(LOAD_HEAD, [load_row(row, limit["per_s"]) for row in (*found["rates"], last)])
        yield from lines_of(found["verdict"])


LOAD_HEAD = ["rate", "sent = answered + cancelled", "goodput /s", "p50 / p95 / p99 / max, ms", "rejects p50 / p99, ms",
             "adaptation", "level", "/livez p50 / p99 / max, ms", "late sending p99, ms", "cores stolen"]  # fmt: skip


def load_row(row: Row, per_s: float) -> list[str]:
    """One rate."""
    answered = ", ".join(f"{n} x {status}" for status, n in row["answered"].items()) or "none"
    return [
        f"{row['factor']} x {per_s:.1f}",
        f"{row['sent']} = {answered} + {row['cancelled']}",
        f"{row['goodput']:.2f}",
        marks(row["latency_ms"], "p50", "p95", "p99", "max"),
        marks(row["reject_ms"], "p50", "p99"),
        percents(row["adaptation"]),
        percents(row["brownout"]),
        marks(row["livez_ms"], "p50", "p99", "max"),
        marks(row["generator_lag_ms"], "p99"),
        f"{row['stolen_cores']:g}",
    ]


def soak(report: Row) -> Iterator[str]:
    """`benchmarks/soak.py`."""
    yield "## Soak"
    yield ""
    flat, ends = report["memory"], report["ends"]
    yield f"    python benchmarks/soak.py --minutes {report['seconds'] / 60:g} --clients {report['clients']}"
    yield ""
    yield (
        f"{served(report)}. {report['requests']:,} requests from {report['clients']} clients: "
        f"{', '.join(f'{n:,} {end}' for end, n in ends.items())}. Resident memory, MiB: "
        f"{', '.join(f'{what} {mib:.0f}' for what, mib in flat['rss_mib'].items())}. Class sets: "
        f"{report['class_sets']}."
    )
    yield ""
    yield from lines_of(report["verdict"])
    yield from table(["request: status", "answers"], [[what, f"{n:,}"] for what, n in report["answers"].items()])


def batching(report: Row) -> Iterator[str]:
    """`benchmarks/batching.py`."""
    yield "## Requests answered together"
    yield ""
    flags = " ".join(flag for flag in report["flags"]["batched"])
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))
    chosen = " ".join(f'"{mode}"' for mode in modes)
    yield f"    python benchmarks/batching.py --seconds {report['block_seconds']:g} --mode {chosen}"
    yield ""
    yield (
        f"{served(report)}; flags of both servers: {flags or 'none'}. Closed loop, shared classes, blocks of "
        f"{report['block_seconds']:g} s in turn; ratio of medians, interval of the sign test over "
        f"pairs ({100 * report['rows'][0]['coverage']:.0f} %)."
    )
    if report["missing"]:
        yield f"**This server had no {', '.join(report['missing'])}: both ran the same.**"
    yield ""
    rows = [
        [
            row["mode"],
            str(row["clients"]),
            f"{row['one']['per_s']:.2f}",
            f"{row['batched']['per_s']:.2f}",
            f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            f"{row['batched']['requests_per_run']:.1f}",
            f"{row['one']['p50_ms']:.0f} / {row['batched']['p50_ms']:.0f}",
        ]
        for row in report["rows"]
    ]
    yield from table(["request", "clients", "one by one, requests/s", "together, requests/s", "ratio", "requests a run",
                      "p50 one by one / together, ms"], rows)  # fmt: skip


def served(report: Row) -> str:
    """What a figure of the server means nothing without."""
    return (
        f"{report['date']}, commit {report['commit']}, {report['machine']}, torch {report['torch']}, "
        f"{report['device']}, {report['dtype']}; {report['model']}, default method {report['default_method']}"
    )


def lines_of(verdict: Sequence[Row]) -> Iterator[str]:
    """Criteria, what was found, and whether they are met."""
    words = {True: "met", False: "**not met**", None: "not decided"}
    rows = [[line["criterion"], worded(line["value"]), words[line["passed"]]] for line in verdict]
    yield from table(["criterion", "found", ""], rows)


def worded(value: Any) -> str:
    """A value of a verdict as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {worded(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(worded(each) for each in value)
    return "" if value is None else str(value)


def marks(values: Row, *names: str) -> str:
    """`1 / 2 / 3`; nothing where there were no values."""
    return " / ".join(f"{values[name]:.0f}" for name in names) if values[names[0]] is not None else ""


def percents(shares: Row) -> str:
    """`completed 98 %, skipped 2 %`."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def document(folder: Path) -> str:
    """The whole file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    lines = [HEAD]
    for name in (*ORDER, *(n for n in found if n.startswith("evaluate-") and n not in ORDER)):
        if name in found:
            lines += evaluation(name, found[name])
    for name in found:
        if name.startswith("contrast"):
            lines += contrast(name, found[name])
    if "mechanism" in found:
        lines += mechanism(found["mechanism"])
    if "gram_cost" in found:
        lines += gram_cost(found["gram_cost"])
    if "scale" in found:
        lines += scale(found["scale"])
    lines += text_path([found[n] for n in found if n.startswith("text_path")])
    lines += throughput(found["throughput"])
    for name, show in (("batching", batching), ("load", load), ("soak", soak)):
        if name in found:
            lines += show(found[name])
    lines += ["## Kept negatives", "", (folder / "negatives.md").read_text().strip(), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path, text = HERE / "RESULTS.md", document(HERE)
    if not args.check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("benchmarks/RESULTS.md is not what the JSON says; run python benchmarks/results.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
