"""The report of a run: whole, self-contained, the same twice, and unmoved by what names hold."""

from __future__ import annotations

import io
import os
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gram_core.errors import InvalidConfig
from gram_core.evaluate import report

BATCH = [("batch", "iid", 8), ("batch", "iid", 32), ("batch", "single", 32)]
CELLS = [("image", "each", 1), *BATCH, ("stream", "sorted", 16)]
METHODS = {"zero-shot": "Zero-shot", "tpt": "TPT", "tda": "TDA", "infomax": "Infomax"}
SETS = {"cifar10/test": "choosing", "pets": "reporting", "dtd": "reporting"}
VOID = {"meta", "br"}


def interval(chance: random.Random, centre: float, width: float = 1.0) -> dict[str, float]:
    mean = centre + chance.gauss(0, 0.5)
    return {"mean": mean, "low": mean - width * chance.uniform(0.5, 1), "high": mean + width * chance.uniform(0.5, 1)}


def summary_of(
    methods: dict[str, str] = METHODS, sets: dict[str, str] = SETS, cells: list[tuple[str, str, int]] = CELLS
) -> dict[str, Any]:
    """A run that never happened: gains grow with the method's place and turn into losses for one-class batches."""
    chance, place = random.Random(0), {name: i for i, name in enumerate(methods)}

    def figures(cell: tuple[str, str, int], method: str, base: float) -> dict[str, Any]:
        zero = place[method] == 0
        centre = 0.7 * place[method] * (-2 if cell[1] == "single" and method.startswith("infomax") else 1)
        gain = {"mean": 0.0, "low": 0.0, "high": 0.0} if zero else interval(chance, centre)
        tpt = None if zero or "tpt" not in methods or method == "tpt" else interval(chance, centre - 0.7)
        row = {"protocol": cell[0], "kind": cell[1], "size": cell[2], "method": method, "gain": gain, "gain_tpt": tpt}
        return row | {"top1": base + gain["mean"], "ece": chance.uniform(2, 9)}

    def cell_of(name: str, cell: tuple[str, str, int], method: str) -> dict[str, Any]:
        row = figures(cell, method, 40.0 + 7 * list(sets).index(name))
        ms = {
            "image": 5.2 * 2 ** place[method],
            "views": 20.0,
            "text": 0.0,
            "adapt": 3.0 * place[method],
            "decode": 1.4,
        }
        seeds = [row["top1"] - 0.2, row["top1"], row["top1"] + 0.2]
        return row | {
            "set": name, "windows": 90, "predictions": 90 * cell[2], "mean_confidence": 50.0, "by_seed": seeds,
            "ms": ms, "statuses": {"completed": 88, "skipped": 2},
        }  # fmt: skip

    roles = {"all": len([role for role in sets.values() if role != "training"])} | {
        role: list(sets.values()).count(role) for role in ("choosing", "reporting")
    }
    bins = [i / 10 + 0.05 for i in range(10)]
    skews = [{"skew": b, "gain": 2 * b, "low": 2 * b - 0.9, "high": 2 * b + 0.8, "windows": 120 - 90 * b} for b in bins]
    return {
        "format": 1, "kind": "evaluation", "title": "gram-mini on a few sets", "minutes": 18.2, "date": "2026-11-25",
        "command": 'python -m gram_core.evaluate --sets "cifar10/test pets" --seeds 3', "commit": "abc123",
        "hardware": {"device": "cpu", "cores": 2, "cpu": "Intel Xeon",
                     "torch": "2.15.0", "dtype": "float32", "threads": 2},
        "model": {"name": "gram-mini", "fingerprint": "f00d" * 8, "weights_sha256": "beef" * 16, "image_size": 161,
                  "parameters": 18800000, "logit_scale": 38.1, "gflops_image": 0.3, "gflops_text": 0.02},
        "larger": None,
        "settings": {"templates": ["a photo of a {}."], "view_seed": 0, "seeds": 3, "windows": 30, "images": 600,
                     "bins": 15, "draws": 2000, "crops": "own"},
        "sets": [{"name": name, "role": role, "classes": 10, "images": 600, "of": 10000, "files_sha256": "c0de" * 16,
                  "skipped": {"undecodable_image": 1}, "notes": ["Half of it is blurred."], "corruption": None,
                  "ms": {"decode": 1.4, "views": 2.0, "image": 5.2, "text": 3.0}} for name, role in sets.items()],
        "methods": [{"name": name, "label": label, "paper": f"Somebody et al., NeurIPS {2020 + i}", "unit": "image",
                     "views": 64 if i else 1, "crops": "strong" if i else None, "settings": {"lr": 0.005} if i else {},
                     "image_passes": 64.0 if i else 1.0, "gflops": 0.3 * 1.7**i, "ms_per_image": 6.1 * 1.9**i,
                     "ms": {"decode": 1.4, "views": 20.0, "image": 5.2 * 2**i, "adapt": 3.0 * i},
                     "peak_mib": 130.5 + i} for i, (name, label) in enumerate(methods.items())],
        "cells": [cell_of(s, c, m) for s in sets for c in cells for m in methods],
        "means": [figures(c, m, 45.0) | {"role": role, "sets": count}
                  for role, count in roles.items() if count for c in cells for m in methods],
        "reliability": [{"method": m, "protocol": c[0], "kind": c[1], "size": c[2],
                         "bins": [{"confidence": b, "accuracy": b ** (1.5 - 0.07 * place[m]), "share": b * (1 - b)}
                                  for b in bins]}
                        for c in cells for m in methods],
        "skew": [{"method": m, "bins": skews} for m in methods if place[m]],
        "distance": None,
    }  # fmt: skip


LITTLE = {"zero-shot": "Zero-shot", "tpt": "TPT"}


class Page(HTMLParser):
    """What a browser would make of it: tags with attributes, ids, the text outside <style>, the text of each row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: Counter[str | None] = Counter()
        self.text, self.rows, self.drawn = "", [""], [""]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.rows += [""] * (tag == "tr")
        self.drawn += [""] * (tag == "text")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids.update(value for name, value in attrs if name == "id")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            self.rows[-1] += f"{data} " if "tr" in self.open else ""
            self.drawn[-1] += data if "text" in self.open else ""


@pytest.fixture(scope="module")
def text() -> str:
    return report.render(summary_of())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def printed(summary: dict[str, Any], width: int = 120) -> str:
    out = io.StringIO()
    report.tables(summary, Console(file=out, width=width))
    return out.getvalue()


def points(value: float, sign: bool = True) -> str:
    if sign and not round(value, 1):  # a second decimal tells the side of zero
        return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:{'+' if sign else ''}.1f}".replace("-", "\N{MINUS SIGN}")


def test_the_page_refers_to_nothing_outside_itself(text: str, page: Page) -> None:
    assert "://" not in text
    assert "@import" not in text
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "base",
        "image",
        "metadata",
    }
    links = [value or "" for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(link.startswith("#") for link in links)
    assert all(link.startswith("#") for link in re.findall(r"url\(['\"]?(.)", text))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_ids_are_unique_and_every_reference_finds_its_own(text: str, page: Page) -> None:
    assert max(page.ids.values()) == 1
    targets = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert targets
    assert set(targets) <= set(page.ids)


def test_every_plot_says_what_it_shows(page: Page) -> None:
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    # 3 protocols on 2 axes of cost, 3 sets in 2 cells, 4 methods' reliability, 3 methods' skew
    assert len(plots) == 6 + 6 + 4 + 3
    assert {attrs["role"] for attrs in plots} == {"img"}
    assert len({attrs["aria-label"] for attrs in plots}) == len(plots)


def test_every_cell_and_mean_is_in_the_page(page: Page) -> None:
    summary = summary_of()
    for row in summary["cells"]:
        pieces = [METHODS[row["method"]], points(row["top1"], False), points(row["ece"], False), "90", "completed 88"]
        pieces += [points(value, False) for value in row["by_seed"]]
        for gain in (row["gain"], row["gain_tpt"]):
            if gain and gain["high"]:
                pieces += [points(gain["mean"]), f"[{points(gain['low'])}, {points(gain['high'])}]"]
        assert any(all(piece in line for piece in pieces) for line in page.rows), row
    for row in summary["means"]:
        pieces = [METHODS[row["method"]], f"{points(row['top1'], False)} · ECE {points(row['ece'], False)}"]
        assert any(all(piece in line for piece in pieces) for line in page.rows), row


def test_the_page_names_model_machine_command_methods_and_sets(page: Page) -> None:
    summary = summary_of()
    facts = [
        summary["title"],
        summary["command"],
        "abc123",
        "2026-11-25",
        "Intel Xeon",
        "18,800,000",
        "a photo of a {}.",
    ]
    facts += [summary["model"]["fingerprint"], summary["model"]["weights_sha256"], "c0de" * 16, "undecodable image 1"]
    facts += ["Half of it is blurred.", "Somebody et al., NeurIPS 2021", "lr 0.005", "130.5", *METHODS.values(), *SETS]
    assert [fact for fact in facts if fact not in page.text] == []
    assert "Settings were chosen on cifar10/test; kept for reporting, with no part in that: pets and dtd." in page.text


def test_a_gain_is_marked_exactly_where_its_interval_excludes_zero(page: Page) -> None:
    summary = summary_of()
    gains = [row[key] for row in summary["cells"] + summary["means"] for key in ("gain", "gain_tpt") if row[key]]
    classes = Counter(attrs.get("class") for _, attrs in page.tags)
    assert classes["up"] == sum(gain["low"] > 0 for gain in gains) > 0
    assert classes["down"] == sum(gain["high"] < 0 for gain in gains) > 0


def test_the_plots_show_batches_of_32_iid_images_and_the_kind_that_does_worst(text: str) -> None:
    assert text.count('aria-label="Gain over zero-shot by method on pets: Batch, iid, 32 at a time"') == 1
    assert text.count('aria-label="Gain over zero-shot by method on pets: Batch, single, 32 at a time"') == 1


def test_a_summary_renders_to_the_same_bytes_twice() -> None:
    summary = summary_of(LITTLE, {"dtd": "reporting"}, CELLS[1:])
    assert report.render(summary) == report.render(summary)


def test_rendering_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "path", "lines.linewidth": 9.0}):
        before = dict(mpl.rcParams)
        assert "stroke-width: 9" not in report.render(summary_of(LITTLE, cells=CELLS[:1]))
        assert dict(mpl.rcParams) == before


HOSTILE = [
    "<script>alert(1)</script>",
    "$x_1$ & \"b\" 'c'",
    "[bold red]tags[/]",
    "two\nlines\x1b[31m",
    "_hidden",
    "図形",
]


def test_names_are_text_and_nothing_else() -> None:
    methods = {"zero-shot": "Zero-shot"} | {name: name for name in HOSTILE}
    summary = summary_of(methods, dict.fromkeys(HOSTILE, "reporting"), CELLS[1:2])
    summary |= {"title": HOSTILE[0], "command": " ".join(HOSTILE[:2])}
    summary["sets"][0]["notes"] = summary["settings"]["templates"] = HOSTILE[:2]
    summary["sets"][0]["corruption"] = {"of": HOSTILE[0], "name": "frost", "severity": 5}
    text = report.render(summary)
    page, seen = Page(text), [name.replace("\n", "\ufffd").replace("\x1b", "\ufffd") for name in HOSTILE]
    assert "<script" not in text
    assert "\x1b" not in text
    for name in seen:
        assert name in page.text
        assert any(name[:23] in drawn for drawn in page.drawn), name  # on the plots, long names end in an ellipsis
        assert name in printed(summary)
    assert "\x1b" not in printed(summary)


@pytest.mark.parametrize(
    "summary",
    [
        summary_of({}, {}, []),
        summary_of({"zero-shot": "Zero-shot"}, {"one": "reporting"}, CELLS[:1]),
        summary_of({"tpt": "TPT"}, {"one": "training"}, CELLS[1:2]),
        summary_of(LITTLE, cells=CELLS[-1:]),
        summary_of(LITTLE) | {"means": [], "reliability": [], "skew": []},
        summary_of(LITTLE) | {"cells": []},
        summary_of(LITTLE) | {"methods": [], "sets": []},
    ],
    ids=["nothing", "zero-shot alone", "no zero-shot", "a stream", "cells alone", "means alone", "unnamed"],
)
def test_parts_that_are_missing_are_left_out(summary: dict[str, Any]) -> None:
    page = Page(report.render(summary))
    assert page.text.count("How to read this") == 1
    assert ("Gain against skew" in page.text) == bool(summary["skew"])
    assert ("Means over sets" in page.text) == bool(summary["means"])
    assert ("Every cell" in page.text) == bool(summary["cells"])
    assert ("Nothing was measured" in printed(summary)) == (not summary["cells"] and not summary["means"])


def test_figures_that_were_not_measured_are_dashes() -> None:
    summary = summary_of(LITTLE, cells=CELLS[:2])
    for row in [*summary["cells"], *summary["means"]]:
        row |= {"gain": None, "gain_tpt": None, "ece": None}
    for row in summary["cells"]:
        row |= {"ms": None, "mean_confidence": float("nan")}
    for method in summary["methods"]:
        method |= {"gflops": None, "ms_per_image": None, "peak_mib": None}
    page = Page(report.render(summary))
    assert "nan" not in page.text
    assert "None" not in page.text
    assert "Accuracy against cost" not in page.text
    assert "None" not in printed(summary)


def test_only_zero_shot_has_no_gain_to_show() -> None:
    summary, nil = summary_of(LITTLE, {"dtd": "reporting"}, CELLS[1:2]), {"mean": 0.0, "low": 0.0, "high": 0.0}
    for row in [*summary["cells"], *summary["means"]]:
        row["gain"] = nil
    page = Page(report.render(summary))
    assert page.text.count("0.0 [0.0, 0.0]") == 2  # TPT's mean and TPT's cell
    assert "Gain on each set" in page.text
    assert printed(summary).count("0.0 [0.0, 0.0]") == 1


def test_milliseconds_are_summed_only_where_the_towers_were_measured() -> None:
    summary = summary_of(LITTLE, {"dtd": "reporting"}, CELLS[1:2])
    for row in summary["cells"]:
        row["ms"] = {"adapt": 0.25} if row["method"] == "tpt" else {"image": 5.0, "adapt": 0.25}
    assert re.search(r"Zero-shot .* 5\.25 *\n +TPT .* \N{EN DASH} *\n", printed(summary))


def test_all_sets_are_those_that_the_model_was_not_trained_on() -> None:
    sets = {"a": "choosing", "b": "reporting", "c": "training"}
    page = Page(report.render(summary_of(LITTLE, sets, CELLS[1:2])))
    assert "All setsa and b" in page.text
    assert "the model was trained on images of c." in page.text


def test_distance_and_a_larger_model_appear_once_they_are_there(page: Page) -> None:
    bins = [{"distance": 0.2 + i, "gain": 1.0, "low": 0.1, "high": 1.9, "windows": 40} for i in range(3)]
    more = {"distance": [{"method": "tpt", "bins": bins}], "larger": summary_of()["model"] | {"name": "big"}}
    changed = Page(report.render(summary_of(LITTLE, cells=CELLS[:1]) | more))
    for words in ("Gain against distance", "Larger model"):
        assert words in changed.text
        assert words not in page.text


def test_a_role_that_all_sets_share_is_shown_once() -> None:
    page = Page(report.render(summary_of(LITTLE, {"pets": "reporting", "dtd": "reporting"}, cells=CELLS[:1])))
    assert "Reporting sets" in page.text
    assert "All sets" not in page.text


def test_a_mean_over_fewer_sets_says_so() -> None:
    summary = summary_of(LITTLE, cells=CELLS[:1])
    summary["means"][-1]["sets"] -= 1
    assert Page(report.render(summary)).text.count("1 of 2 sets") == 1


def test_without_matplotlib_the_page_says_what_to_install_and_the_tables_still_print(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidConfig, match=r'pip install "gram-server\[evaluate\]"'):
        report.render(summary_of())
    assert "TPT" in printed(summary_of())


def test_a_report_that_fails_leaves_the_old_one_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, summary = tmp_path / "report.html", summary_of(LITTLE, {"dtd": "reporting"}, CELLS[:1])
    report.write(summary, path)
    old = path.read_text(encoding="utf-8")
    assert old == report.render(summary)
    with pytest.raises(KeyError):
        report.write({"title": "half a summary"}, path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(summary | {"title": "new"}, path)
    assert path.read_text(encoding="utf-8") == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_console_and_drop_nothing(width: int) -> None:
    summary = summary_of()
    out = printed(summary, width)
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    for row in summary["means"]:
        gain = row["gain"]
        if gain["high"]:
            mark = "*" if gain["low"] > 0 or gain["high"] < 0 else " "
            assert f"{points(gain['mean'])} [{points(gain['low'])}, {points(gain['high'])}]{mark}" in out
    for name, role in SETS.items():
        assert f"{name} ({role})" in out
    assert "reporting, 2 sets" in out
    assert "choosing, 1 set " in out
