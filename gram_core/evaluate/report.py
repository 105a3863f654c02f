"""What a run of the harness found: tables for a terminal, and one HTML file that needs nothing beside itself.

It reads the summary and decides only what to show first; every figure was computed before. Names are data: they are
escaped, never interpreted, whether they end in HTML, in SVG or on a terminal. Rendering a summary twice gives the same
bytes. matplotlib is imported when a report is rendered, and its settings are left as they were.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gram_core.errors import InvalidConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Cell = tuple[str, str, int]  # protocol, kind, size
Interval = dict[str, float] | None  # mean, low, high
Rect = tuple[float, float, float, float]  # x0, y0, x1, y1

ROLES = ("reporting", "choosing", "all")
STAGES = ("decode", "views", "image", "text", "adapt")
DASH, MINUS, UNKNOWN = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{REPLACEMENT CHARACTER}"
# Okabe and Ito's colours without the yellow, four of Tol's and a dark yellow; the 12 markers have another period.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
COLOURS += ["#332288", "#882255", "#117733", "#aa4499", "#7a6a00"]
MARKERS = "s^DvPX<>phd8"
INK, SOFT = "#202124", "#5f6368"
ZERO_SHOT = (SOFT, "o")  # what everything is compared with
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gram",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; the page's own font replaces it and is narrower
    "font.size": 9,
    "figure.dpi": 72,  # one unit of the SVG
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    **{f"{axis}.{key}": value for axis in ("xtick", "ytick") for key, value in (("color", SOFT), ("major.size", 0))},
}
CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #202124; --soft: #5f6368; --line: #e3e5e8; --card: #f5f6f8;
  --up: #0b5fa5; --down: #b3430a }
@media (prefers-color-scheme: dark) { :root { --page: #17181a; --ink: #e8eaed; --soft: #a3a8ae; --line: #34373b;
  --card: #222428; --up: #7db8f0; --down: #f2955f } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem; letter-spacing: -.015em }
h2 { font-size: 1.3rem; margin: 3rem 0 .4rem } p { max-width: 46rem; margin: .4rem 0 }
.soft, dt, small, thead th { color: var(--soft); font-weight: 400 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0; font-size: .9rem }
dd { margin: 0; min-width: 0; font-variant-numeric: tabular-nums }
code { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; user-select: all }
dd code { display: block; padding: .5rem .7rem; background: var(--card); border-radius: 6px; white-space: pre-wrap }
.read { border-left: 3px solid var(--line); padding-left: 1rem; margin-top: 2rem } .read h2 { margin: 0 }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0 1.2rem;
  width: fit-content; max-width: 100% }
table { border-collapse: separate; border-spacing: 0; font-size: .84rem; line-height: 1.4; overflow-wrap: normal;
  font-variant-numeric: tabular-nums }
th, td { padding: .4rem .8rem; text-align: right; vertical-align: top; white-space: nowrap }
tr + tr > *, tbody > tr:first-child > * { border-top: 1px solid var(--line) }
thead th { vertical-align: bottom } th small, .under { display: block; font-size: .9em }
tr > th:first-child { position: sticky; left: 0; background: var(--page); border-right: 1px solid var(--line);
  text-align: left; font-weight: 500; white-space: normal; min-width: 11rem; max-width: 15rem; overflow-wrap: anywhere }
tr.group > th { background: var(--card) !important; font-weight: 600; max-width: none; border-right: 0 }
.text { text-align: left; white-space: normal; width: max-content; max-width: 30rem } .text code { font-size: .8em }
.up { color: var(--up); font-weight: 650 } .down { color: var(--down); font-weight: 650 }
i { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .5em;
  box-shadow: 0 0 0 1.5px #fff }
.plots { display: grid; gap: .9rem; margin: .8rem 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
figure { margin: 0; padding: .4rem; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  break-inside: avoid } svg { display: block; width: 100%; max-width: 100%; height: auto }
svg * { stroke-linejoin: round } svg text { paint-order: stroke; stroke: #fff; stroke-width: 2.5px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important }
details { border-top: 1px solid var(--line) } details:has(+ :not(details)) { border-bottom: 1px solid var(--line) }
summary { padding: .6rem 0; cursor: pointer; font-weight: 500 } summary small { margin-left: .6em }
:focus-visible { outline: 2px solid var(--up); outline-offset: 2px }
@media (max-width: 40rem) { body { padding: 1.5rem .9rem 3rem } h1 { font-size: 1.5rem } dd { margin-bottom: .5rem }
  dl { grid-template-columns: 1fr; gap: 0 } th, td { padding: .35rem .55rem }
  tr > th:first-child { min-width: 6.5rem; max-width: 8rem } }
@media print { @page { size: A4 landscape; margin: 10mm } body { max-width: none; padding: 0; font-size: 11px }
  .wide { overflow: visible; border: 0 } table { font-size: 6.5px } th, td { padding: .15rem .3rem }
  .role::details-content { content-visibility: visible; block-size: auto } }
"""


class _Book:
    """The summary by name: methods, sets and cells in their order, and the figures that belong to them."""

    def __init__(self, summary: Row) -> None:
        self.summary = summary
        means, cells = ([_bare(row) for row in summary[key]] for key in ("means", "cells"))
        rows = [*means, *cells]
        self.methods = {row["method"]: row["method"] for row in rows}
        named = {method["name"]: method["label"] for method in summary["methods"]}
        self.methods = named | {name: label for name, label in self.methods.items() if name not in named}
        roles = {s["name"]: s["role"] for s in summary["sets"]}
        self.sets = roles | {row["set"]: roles.get(row["set"], "unknown") for row in cells}
        self.columns = list(dict.fromkeys(map(_cell, rows)))
        self.cells = {(row["set"], _cell(row), row["method"]): row for row in cells}
        self.means = {(row["role"], _cell(row), row["method"]): row for row in means}
        counts = {role: max((m["sets"] for m in means if m["role"] == role), default=0) for role in ROLES}
        self.roles = {role: count for role, count in counts.items() if count}
        if len(self.roles) == 2 and len(set(self.roles.values())) == 1:
            self.roles.pop("all", None)  # it would repeat the other one
        others = [name for name in self.methods if not _is_zero_shot(name)]
        looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)}
        self.looks = {name: looks.get(name, ZERO_SHOT) for name in self.methods}
        protocols = list(dict.fromkeys(column[0] for column in self.columns))
        self.columns.sort(key=lambda column: protocols.index(column[0]))  # stable: else as they came
        best = sorted(self.columns, key=lambda column: column[1:] != ("iid", 32))
        self.first = {p: next(c for c in best if c[0] == p) for p in protocols}  # the cell to show of each
        self.chosen = self.first.get("batch") or next(iter(self.columns), None)

    def worst(self) -> Cell | None:
        """The cell of another kind, of the chosen one's protocol and if possible size, where gains are lowest."""
        protocol, kind, size = self.chosen or ("", "", 0)
        others = [c for c in self.columns if c[0] == protocol and c[1] != kind]
        gains = {
            c: [row["gain"]["mean"] for key, row in self.cells.items() if key[1] == c and row["gain"]] for c in others
        }
        return min((c for c in others if gains[c]), key=lambda c: (c[2] != size, fmean(gains[c])), default=None)


def _cell(row: Row) -> Cell:
    return row["protocol"], row["kind"], row["size"]


def _bare(row: Row) -> Row:
    """Zero-shot without its gain, which is over itself."""
    return row | {"gain": None} if _is_zero_shot(row["method"]) else row


def _total(ms: dict[str, float] | None) -> float | None:
    """Milliseconds of all stages; None where the towers' share was not measured."""
    return sum(ms.values()) if ms and "image" in ms else None


def _cell_name(cell: Cell) -> str:
    protocol, kind, size = cell
    return "One image at a time" if protocol == "image" else f"{protocol.capitalize()}, {kind}, {size} at a time"


def _is_zero_shot(name: str) -> bool:
    return re.sub("[^a-z]", "", name.lower()) == "zeroshot"


def _plain(value: object) -> str:
    """Text that can't move a cursor or break a line, whatever a name holds."""
    return "".join(c if c.isprintable() else UNKNOWN for c in str(value))


def _html(value: object) -> str:
    return escape(_plain(value))


def _number(value: float | None, form: str = ".1f") -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:{form}}".replace("-", MINUS)


def _signed(value: float) -> str:
    """With a second decimal where the first would hide on which side of zero it is."""
    return _number(value, "+.1f" if round(value, 1) else "+.2f") if value else "0.0"


def _cost(value: float | None) -> str:
    return _number(value, ",.0f" if value is not None and value >= 100 else ".3g")


def _side(gain: Interval) -> int:
    """1 or -1 where the interval lies on one side of zero, else 0."""
    return (gain["low"] > 0) - (gain["high"] < 0) if gain else 0


def _bounds(gain: dict[str, float]) -> str:
    return f"[{_signed(gain['low'])}, {_signed(gain['high'])}]"


def _show(value: object) -> str:
    """A small piece of JSON as a line of text."""
    if isinstance(value, dict):
        pairs = ((key, _show(own)) for key, own in value.items())
        return " · ".join(own if key == "name" else f"{key.replace('_', ' ')} {own}" for key, own in pairs) or DASH
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_show, value))
    if value is None:
        return DASH
    return f"{value:,}" if type(value) is int else f"{value:g}" if isinstance(value, float) else str(value)


def tables(summary: Row, console: Console) -> None:
    """Print the means of each protocol, then every set in one cell of each protocol, as wide as the console is."""
    book = _Book(summary)
    for protocol in book.first:
        columns = [column for column in book.columns if column[0] == protocol]
        sections = []
        for role, count in book.roles.items():
            found = {m: [book.means.get((role, c, m)) for c in columns] for m in book.methods}
            rows = [(book.methods[m], [_gain_text(row) for row in row_]) for m, row_ in found.items() if any(row_)]
            sections.append((f"{role}, {count} set{'s' * (count != 1)}", rows))
        _print(console, f"Mean gain, {protocol} protocol", [f"{kind}\n{size}" for _, kind, size in columns], sections)
    sections = []
    for name, role in book.sets.items():
        found = {m: [book.cells.get((name, c, m)) for c in book.first.values()] for m in book.methods}
        rows = [(book.methods[m], [t for row in row_ for t in _texts(row)]) for m, row_ in found.items() if any(row_)]
        sections.append((f"{name} ({role})", rows))
    headers = [f"{p} {k} {n}\n{what}" for p, k, n in book.first.values() for what in ("top-1", "ECE", "ms")]
    _print(console, "Each set: top-1, calibration error and milliseconds per image", headers, sections)
    words = "Gains are points of top-1 over zero-shot with 95 % intervals; * marks those that exclude zero."
    console.print(Text(words if book.columns else "Nothing was measured.", style="dim"))


def _gain_text(row: Row | None) -> Text:
    if not row or not row["gain"]:
        return Text(f"top-1 {_number(row['top1'])} " if row else f"{DASH} ", style="dim")
    side = _side(row["gain"])
    text = f"{_signed(row['gain']['mean'])} {_bounds(row['gain'])}{'*' if side else ' '}"
    return Text(text, style={1: "bold green", 0: "", -1: "bold red"}[side])


def _texts(row: Row | None) -> list[Text]:
    texts = [*(_number(row[key]) for key in ("top1", "ece")), _cost(_total(row["ms"]))] if row else [DASH] * 3
    return [Text(text) for text in texts]


def _print(console: Console, title: str, headers: list[str], sections: list[tuple[str, Any]]) -> None:
    """One table, or several with the same rows where the console is too narrow for all columns."""
    sections = [(heading, rows) for heading, rows in sections if rows]
    names = [_plain(name) for heading, rows in sections for name in (heading, *(f"  {row[0]}" for row in rows))]
    first = min(34, max(map(cell_len, names), default=0))
    bodies = [[cells[i].plain for _, rows in sections for _, cells in rows] for i in range(len(headers))]
    widths = [3 + max(map(cell_len, [*h.split("\n"), *body])) for h, body in zip(headers, bodies, strict=True)]
    start = 0
    while sections and start < len(headers):
        stop = start + 1
        while stop < len(headers) and first + 3 + sum(widths[start : stop + 1]) <= console.width:
            stop += 1
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", width=first, overflow="fold")
        for header in headers[start:stop]:
            table.add_column(Text(header), justify="right", no_wrap=True)
        for heading, rows in sections:
            table.add_section()
            table.add_row(Text(_plain(heading), style="bold"))
            for name, cells in rows:
                table.add_row(Text(f"  {_plain(name)}"), *cells[start:stop])
        console.print(table)
        start = stop


def write(summary: Row, path: Path) -> None:
    """Render to `path`; what was there stays until the new report is whole."""
    with beside(path) as aside:
        aside.write_text(render(summary), encoding="utf-8")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it replaces when the block ends well; else nothing is left of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def render(summary: Row) -> str:
    """The whole HTML document; InvalidConfig where matplotlib isn't installed."""
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except ImportError as error:
        raise InvalidConfig(
            'The HTML report draws with matplotlib, which is missing: pip install "gram-server[evaluate]".'
        ) from error
    book = _Book(summary)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # only widths are taken from it: the page's font is shown
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        plots = _plots(book)
    title = _html(summary["title"])
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<!doctype html>\n<html lang="en"><head>{meta}<title>{title}</title><style>{CSS}</style></head>'
    body = "".join((_facts(book), _means(book), plots, _every_cell(book), _methods(book), _sets(book)))
    settings = "".join(
        f"<dt>{_html(k.replace('_', ' '))}</dt><dd>{_html(_show(v))}</dd>" for k, v in summary["settings"].items()
    )
    return f"{head}\n<body><h1>{title}</h1>\n{body}<h2>Settings</h2><dl>{settings}</dl></body></html>\n"


def _facts(book: _Book) -> str:
    s = book.summary
    facts = {"Model": _show(s["model"]), "Larger model": _show(s["larger"]), "Hardware": _show(s["hardware"])}
    facts["Run"] = f"{s['date']} · commit {s['commit']} · {_cost(s['minutes'])} minutes"
    rows = "".join(f"<dt>{name}</dt><dd>{_html(value)}</dd>" for name, value in facts.items() if value != DASH)
    choosing, reporting, training = (_names(book, role) for role in ("choosing", "reporting", "training"))
    third = f"Settings were chosen on {choosing}; " if choosing else "No set here served to choose settings; "
    third += f"kept for reporting, with no part in that: {reporting}" if reporting else "none was kept for reporting"
    third += f"; the model was trained on images of {training}." if training else "."
    return f"""<dl>{rows}<dt>Command</dt><dd><code>{_html(s["command"])}</code></dd></dl>
<div class="read"><h2>How to read this</h2>
<p>A gain is a method's top-1 accuracy less zero-shot's on the same images, in percentage points, and ECE is the
expected calibration error in per cent. Brackets hold a 95&nbsp;% interval from a paired bootstrap, and a gain is bold
and coloured only where that interval excludes zero. {third}</p></div>
"""


def _names(book: _Book, role: str) -> str:
    names = [
        _html(name) for name, role_ in book.sets.items() if role == role_ or (role == "all" and role_ != "training")
    ]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _method(book: _Book, name: str) -> str:
    return f'<i style="background:{book.looks[name][0]}"></i>{_html(book.methods[name])}'


def _gain(gain: Interval) -> str:
    """A gain and its interval, marked where the interval excludes zero."""
    if not gain:
        return DASH
    mark = {1: ' class="up"', 0: "", -1: ' class="down"'}[_side(gain)]
    return f"<span{mark}>{_signed(gain['mean'])}</span> <small>{_bounds(gain)}</small>"


def _table(label: str, columns: Sequence[str], groups: dict[str, list[list[str]]]) -> str:
    """Rows of HTML under their group's heading, if it has one; the first column stays in sight."""
    body = ""
    for heading, rows in groups.items():
        body += f'<tr class="group"><th colspan="{len(columns)}" scope="colgroup">{heading}</th></tr>' * bool(
            heading and rows
        )
        for first, *cells in rows:
            body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    wide = f'<div class="wide" tabindex="0" role="region" aria-label="{_html(label)}">'
    return f"{wide}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n" if body else ""


def _fold(title: str, note: str, body: str, mark: str = "") -> str:
    return f"<details{mark}><summary>{title}<small>{note}</small></summary>{body}</details>\n" if body else ""


def _means(book: _Book) -> str:
    columns = ["Method", *(f"{_html(kind)}<small>{_html(p)} · {_html(n)}</small>" for p, kind, n in book.columns)]
    out = ""
    for field, words in (("gain", ""), ("gain_tpt", ", gain over TPT instead")):
        for role, count in book.roles.items():
            title = ("All sets" if role == "all" else f"{role.capitalize()} sets") + words
            rows = []
            for name in book.methods:
                found = [book.means.get((role, column, name)) for column in book.columns]
                if any(row and (row[field] or not words) for row in found):
                    rows.append([_method(book, name), *(_mean(row, field, count) for row in found)])
            mark = "" if words else ' class="role"' + " open" * (role == next(iter(book.roles)))
            out += _fold(title, _names(book, role), _table(title, columns, {"": rows}), mark)
    note = "In each cell: gain and its interval, then top-1 and ECE. Under a kind of request: its protocol and size."
    return f'<h2>Means over sets</h2><p class="soft">{note}</p>{out}' if out else ""


def _mean(row: Row | None, field: str, count: int) -> str:
    if row is None:
        return DASH
    under = f"{_number(row['top1'])} · ECE {_number(row['ece'])}" if field == "gain" else ""
    under += f" · {row['sets']} of {count} sets" if row["sets"] < count else ""
    return f'{_gain(row[field])}<small class="under">{under}</small>'


def _every_cell(book: _Book) -> str:
    columns = ["Method", "top-1", "gain", "over TPT", "ECE", "confidence", "top-1 by seed", "windows", "predictions"]
    columns += [*(f"{stage}, ms" for stage in STAGES), "all, ms", "statuses"]
    out = ""
    for name, role in book.sets.items():
        groups: dict[str, list[list[str]]] = {}
        for (set_, cell, method), row in book.cells.items():
            if set_ == name:
                ms, numbers = row["ms"] or {}, [_number(row[key]) for key in ("top1", "ece", "mean_confidence")]
                texts = [_method(book, method), numbers[0], _gain(row["gain"]), _gain(row["gain_tpt"]), *numbers[1:]]
                texts += [" ".join(map(_number, row["by_seed"])), f"{row['windows']:,}", f"{row['predictions']:,}"]
                texts += [_cost(value) for value in (*map(ms.get, STAGES), _total(ms))]
                groups.setdefault(_html(_cell_name(cell)), []).append([*texts, _html(_show(row["statuses"]))])
        out += _fold(_html(name), _html(role), _table(f"Every cell of {name}", columns, groups))
    return f"<h2>Every cell, set by set</h2>{out}" if out else ""


def _methods(book: _Book) -> str:
    columns = ["Method", "unit", "views", "crops", "image passes", "GFLOP per image", "ms per image"]
    columns += [*(f"{stage}, ms" for stage in STAGES), "peak MiB", "settings", "paper"]
    rows = []
    for m in book.summary["methods"]:
        costs = [m["image_passes"], m["gflops"], m["ms_per_image"], *map(m.get("ms", {}).get, STAGES)]
        texts = [_html(m["unit"]), _cost(m["views"]), _html(m["crops"] or DASH), *map(_cost, costs)]
        words = [f'<div class="text">{_html(text)}</div>' for text in (_show(m["settings"]), m["paper"] or DASH)]
        rows.append([_method(book, m["name"]), *texts, _number(m["peak_mib"]), *words])
    head = '<h2>Methods</h2><p class="soft">Milliseconds are per image, means over sets.</p>'
    return head + _table("Methods", columns, {"": rows}) if rows else ""


def _sets(book: _Book) -> str:
    columns = ["Set", "role", "classes", "images", "of", "corruption", "skipped", "ms", "notes", "SHA-256 of the files"]
    rows = []
    for s in book.summary["sets"]:
        texts = [s["name"], s["role"], *(f"{s[key]:,}" for key in ("classes", "images", "of")), _show(s["corruption"])]
        notes = "<br>".join(map(_html, s["notes"])) or DASH
        words = [f'<div class="text">{text}</div>' for text in (notes, f"<code>{_html(s['files_sha256'])}</code>")]
        rows.append([*map(_html, texts), *(_html(_show(s[key])) for key in ("skipped", "ms")), *words])
    return f"<h2>Sets</h2>{_table('Sets', columns, {'': rows})}" if rows else ""


def _plots(book: _Book) -> str:
    plots = _Plots(book)

    def group(title: str, words: str, panels: Iterable[str], least: int) -> str:
        joined = "\n".join(filter(None, panels))
        head = f'<h2>{title}</h2><p class="soft">{_html(words)}</p>'
        return f'{head}<div class="plots" style="--least:{least}px">{joined}</div>\n' if joined else ""

    axes = (("ms_per_image", "milliseconds"), ("gflops", "GFLOP"))
    costs = [plots.cost(cell, *axis) for cell in book.first.values() for axis in axes]
    words = f"Top-1, mean over {plots.role} sets. The grey line joins the methods that nothing cheaper beats."
    out = group("Accuracy against cost", words, costs, 400)
    for title, cell in (("Gain on each set", book.chosen), ("Gain on each set, worst kind of request", book.worst())):
        if cell:
            words = f"{_cell_name(cell)}. Bars are 95 % intervals; markers are filled where they exclude zero."
            out += group(title, words, plots.forest(cell), 320)
    rated = list(dict.fromkeys(map(_cell, book.summary["reliability"])))
    for cell in [cell for cell in rated if cell == book.chosen] or rated[:1]:
        words = f"{_cell_name(cell)}. Below the dotted line a method is overconfident; zero-shot in grey."
        out += group("Reliability", words, plots.reliability(cell), 230)
    for key, words in (("skew", "skew of the batch"), ("distance", "distance to the nearest prototype")):
        note = "Over all batches. The band is the 95 % interval; the bars below count the windows."
        out += group(f"Gain against {words}", note, plots.against(key), 230)
    return out


class _Plots:
    """Draws SVG elements that can stand together in one page; all of them in one scale of colours and markers."""

    def __init__(self, book: _Book) -> None:
        self.book, self.count, self.role = book, 0, next(reversed(book.roles), "all")

    def panel(self, width: int, height: int, left: int, title: str) -> tuple[Figure, Axes]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / 72, height / 72))
        figure.text(8 / width, 1 - 8 / height, _short(title, 46), va="top", weight="bold", size=10, color=INK)
        return figure, figure.add_axes((left / width, 36 / height, 1 - (left + 14) / width, 1 - 62 / height))

    def svg(self, figure: Figure, label: str) -> str:
        """The figure as one <svg> without prolog, metadata, page-wide style or ids that another could have."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
        body = text[text.index(">", text.index("<svg")) + 1 :].replace("xlink:href", "href")
        self.count += 1
        ids = re.compile(r'(\bid="|url\(#|href="#)')  # in tags alone: matplotlib escapes < and > wherever names stand
        body = re.sub(r"<[^>]*>", lambda tag: ids.sub(rf"\1p{self.count}-", tag[0]), body)
        width, height = (round(72 * inches) for inches in figure.get_size_inches())
        head = (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_html(label)}"><title>{_html(label)}</title>'
        )
        return f'<figure style="max-width:{1.55 * width:.0f}px">{head}{body}</figure>'

    def cost(self, cell: Cell, key: str, unit: str) -> str:
        """Top-1 against what an image costs."""
        costs = {method["name"]: method[key] for method in self.book.summary["methods"]}
        tops = {name: row["top1"] for name in costs if (row := self.book.means.get((self.role, cell, name)))}
        points = {name: (costs[name], top) for name, top in tops.items() if (costs[name] or 0) > 0}
        if not points:
            return ""
        figure, axes = self.panel(390, 310, 44, _cell_name(cell))
        xs, ys = zip(*points.values(), strict=True)
        room = 0.12 * (max(ys) - min(ys)) + 0.2
        axes.set(xscale="log", xlim=(min(xs) / 2, max(xs) * 2.5), ylim=(min(ys) - room, max(ys) + room))
        axes.set(xlabel=f"{unit} per image (log scale)", ylabel="top-1 %")
        _log_ticks(axes)
        front = [p for p in sorted(points.values()) if p[1] >= max(y for x, y in points.values() if x <= p[0])]
        axes.plot(*zip(*front, strict=True), color="#bdc1c6", lw=1.2, zorder=1)
        for name, (x, y) in points.items():
            colour, marker = self.book.looks[name]
            axes.plot(x, y, marker, color=colour, ms=7, mec="white", mew=0.6)
        _label(axes, [(x, y, _short(self.book.methods[name], 26)) for name, (x, y) in points.items()])
        return self.svg(figure, f"Top-1 accuracy against {unit} per image: {_cell_name(cell)}")

    def forest(self, cell: Cell) -> list[str]:
        """Gains with intervals, a panel per set; the same rows and the same scale in each."""
        gains = {(s, m): row["gain"] for (s, c, m), row in self.book.cells.items() if c == cell and row["gain"]}
        methods = [name for name in self.book.methods if any(method == name for _, method in gains)]
        low, high = min((0.0, *(g["low"] for g in gains.values()))), max((0.0, *(g["high"] for g in gains.values())))
        room, panels = 0.05 * (high - low) + 0.1, []
        for name in [name for name in self.book.sets if any(set_ == name for set_, _ in gains)]:
            figure, axes = self.panel(340, 70 + 19 * len(methods), 142, f"{_short(name, 30)} ({self.book.sets[name]})")
            axes.axvline(0, color=SOFT, lw=1)
            for y, method in enumerate(methods):
                if gain := gains.get((name, method)):
                    colour, marker = self.book.looks[method]
                    axes.plot((gain["low"], gain["high"]), (y, y), color=colour, lw=1.8, solid_capstyle="round")
                    fill = colour if _side(gain) else "white"
                    axes.plot(gain["mean"], y, marker, color=colour, mfc=fill, ms=6, mew=1.3)
            axes.set_yticks(range(len(methods)), [_short(self.book.methods[m], 24) for m in methods], color=INK)
            axes.set(
                xlim=(low - room, high + room), ylim=(len(methods) - 0.4, -0.6), xlabel="gain over zero-shot, points"
            )
            axes.grid(axis="y", visible=False)
            panels.append(self.svg(figure, f"Gain over zero-shot by method on {name}: {_cell_name(cell)}"))
        return panels

    def reliability(self, cell: Cell) -> list[str]:
        """Accuracy against confidence, a panel per method with zero-shot behind it."""
        entries = [e for e in self.book.summary["reliability"] if _cell(e) == cell and e["bins"]]
        base = [b for e in entries if _is_zero_shot(e["method"]) for b in e["bins"] if b["accuracy"] is not None]
        panels = []
        for entry in entries:
            figure, axes = self.curve(entry, "confidence", "accuracy", "share")
            axes.plot((0, 1), (0, 1), ":", color="#80868b", lw=1)
            axes.plot([b["confidence"] for b in base], [b["accuracy"] for b in base], color=SOFT, lw=1, alpha=0.6)
            axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
            panels.append(self.svg(figure, f"Reliability of {self.label(entry)}: {_cell_name(cell)}"))
        return panels

    def against(self, key: str) -> list[str]:
        """Gain against skew or distance, a panel per method on one scale."""
        entries = [e for e in self.book.summary[key] or [] if e["bins"]]
        low = min((b["low"] for e in entries for b in e["bins"]), default=0.0)
        high = max((b["high"] for e in entries for b in e["bins"]), default=0.0)
        panels = []
        for entry in entries:
            figure, axes = self.curve(entry, key, "gain", "windows")
            axes.axhline(0, color=SOFT, lw=1)
            xs, lows, highs = ([b[name] for b in entry["bins"]] for name in (key, "low", "high"))
            axes.fill_between(xs, lows, highs, color=axes.lines[0].get_color(), alpha=0.18, lw=0)
            axes.set(ylim=(min(low, 0) - 0.3, max(high, 0) + 0.3))
            panels.append(self.svg(figure, f"Gain over zero-shot of {self.label(entry)} against {key}"))
        return panels

    def label(self, entry: Row) -> str:
        return str(self.book.methods.get(entry["method"], entry["method"]))

    def curve(self, entry: Row, x: str, y: str, weight: str) -> tuple[Figure, Axes]:
        """One method's line above a strip of bars that says how much stands behind each point."""
        colour, marker = self.book.looks.get(entry["method"], ZERO_SHOT)
        figure, axes = self.panel(250, 230, 40, self.label(entry))
        x0, y0, width, height = axes.get_position().bounds
        axes.set_position((x0, y0 + 0.2 * height, width, 0.8 * height))
        strip = figure.add_axes((x0, y0, width, 0.15 * height), sharex=axes)
        kept = [b for b in entry["bins"] if b[x] is not None and b[y] is not None]
        xs = [b[x] for b in kept]
        axes.plot(xs, [b[y] for b in kept], marker=marker, color=colour, ms=4.5, lw=1.6)
        step = min((after - before for before, after in pairwise(sorted(xs)) if after > before), default=0.05)
        strip.bar(xs, [b[weight] for b in kept], width=0.7 * step, color=colour, alpha=0.45)
        strip.set(yticks=[], xlabel=f"{x} (bars: {weight})")
        strip.spines["left"].set_visible(False)
        strip.grid(visible=False)
        axes.tick_params(labelbottom=False)
        axes.set_ylabel(y)
        return figure, axes


def _short(text: str, limit: int) -> str:
    text = _plain(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _log_ticks(axes: Axes) -> None:
    """Ticks at 1, 2, 5 within two decades and at powers of ten beyond, as plain numbers: text is not mathematics."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in ((1, 2, 5) if high < 200 * low else (1,))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _label(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write each point's name where it covers the least of other points and names, nearest first."""
    x0, y0, x1, y1 = axes.get_window_extent().extents
    spots = [axes.transData.transform(point[:2]) for point in points]
    taken: list[Rect] = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for (px, py), (x, y, name) in zip(spots, points, strict=True):
        half, choices = 2.7 * len(name), []
        for distance in (7, 15, 25, 36):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                right, up = dx * (distance + half), dy * (distance + 2)
                rect = (px + right - half, py + up - 5, px + right + half, py + up + 5)
                outside = 20 * half - _overlap(rect, (x0, y0, x1, y1))
                choices.append(
                    (sum(_overlap(rect, other) for other in taken) + 9 * outside + distance, right, up, rect)
                )
        _, right, up, rect = min(choices, key=lambda choice: choice[0])
        taken.append(rect)
        line = {"arrowstyle": "-", "color": "#9aa0a6", "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
        far = math.hypot(max(0.0, abs(right) - half), up) > 14
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "color": INK}
        axes.annotate(name, (x, y), xytext=(right, up), arrowprops=line if far else None, **place)


def _overlap(a: Rect, b: Rect) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
