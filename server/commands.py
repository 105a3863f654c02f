"""What `gram classify`, `gram evaluate --url` and `gram bench` do once their options are read: results to stdout or a
file, everything else to stderr, and an exit code."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gram_core.errors import GramError as CoreError
from server import bench, bulk, local
from server.client import AsyncGramClient, GramError
from server.settings import InvalidSettings
from server.sheets import SHEETS, printable
from server.sorting import Sorter

OK, FAILED, USAGE, BAD_MODEL, INTERRUPTED = 0, 1, 2, 65, 130
HERE = "http://127.0.0.1:8000"
LOOK_S = 2.0  # for a server that nobody named
TOLD = 20  # names of files that were left out


@dataclass(frozen=True)
class Place:
    """Who answers: the server at `url`, or, if `here`, this process with `flags` of `gram serve`; else who is there."""

    url: str | None = None
    here: bool = False
    flags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Classify:
    """`gram classify`: `options` are the request's fields, `form` one of `SHEETS`, `how` one of `sorting.HOW`."""

    paths: Sequence[Path]
    classes: Sequence[str]
    options: Mapping[str, Any]
    place: Place = field(default_factory=Place)
    form: str = "text"
    out: Path | None = None
    sort_into: Path | None = None
    how: str = "copy"
    batch: int | None = None


@asynccontextmanager
async def connect(place: Place, say: Callable[[str], None]) -> AsyncIterator[AsyncGramClient]:
    """A client of whoever answers, once it can; says who that is."""
    if not place.here:
        async with AsyncGramClient(place.url or HERE) as client:
            there = place.url is not None
            if not there:
                try:
                    await client.info(timeout=LOOK_S)
                    there = True
                except GramError:
                    pass
            if there:
                say(f"asking the server at {client.base_url.scheme}://{client.base_url.netloc.decode()}")
                yield client
                return
    settings = local.local_settings(place.flags)
    why = "" if place.here else f"no server at {HERE}: "
    say(
        f"{why}running {Path(settings.model).name if Path(settings.model).is_dir() else settings.model} in this process"
    )
    async with (
        local.in_process(settings) as transport,
        AsyncGramClient(local.URL, transport=transport) as client,
    ):
        yield client


def classify_images(asked: Classify) -> int:
    """Classify, write and sort; returns the exit code."""
    said = Console(stderr=True)
    tally = bulk.Tally()
    try:
        found = bulk.find(asked.paths, besides=asked.sort_into)
    except FileNotFoundError as error:
        return _end(said, USAGE, f"{error.args[0]}: no such file or folder.")
    if not found.images:
        _left_out(said, found.left_out)
        return _end(said, USAGE, "no image to classify; name JPEG, PNG or WEBP files, or folders that hold some.")

    async def work(file: TextIO, progress: Progress) -> None:
        bar = progress.add_task("images", total=len(found.images))
        sorter = None if asked.sort_into is None else Sorter(asked.sort_into, asked.classes, asked.how)
        async with connect(asked.place, lambda line: _say(said, line)) as client:
            async for count in bulk.run(
                client,
                found.images,
                asked.classes,
                asked.options,
                batch=asked.batch,
                sheet=SHEETS[asked.form](file),
                sorter=sorter,
                tally=tally,
            ):
                file.flush()
                progress.advance(bar, count)

    try:
        with _output(asked.out) as file, _progress(said, quiet=file.isatty()) as progress:
            code = _run(work(file, progress), said)
    except OSError as error:
        return _end(said, USAGE, f"{asked.out}: {error.strerror}.")
    if tally.images:
        _summary(said, tally, asked)
    _left_out(said, found.left_out)
    return code or (FAILED if tally.failed or tally.unsorted else OK)


def evaluate_served(folder: Path, url: str, words: Sequence[str]) -> int:
    """`gram evaluate DIR --url URL`; returns the exit code."""
    from gram_core.config import parse
    from gram_core.evaluate.data import open_data
    from server.scoring import ScoreConfig, score

    config = parse(ScoreConfig, words, program="gram evaluate DIR --url URL", description="Ask a running server.")
    said = Console(stderr=True)
    made: list[dict[str, Any]] = []

    async def work(progress: Progress, write: Callable[[str], object]) -> None:
        sets = open_data(folder, splits=config.splits or None, classes_file=config.classes)
        async with connect(Place(url), lambda line: _say(said, line)) as client:
            for given in sets:
                chosen = given.subsample(config.images, seed=0) if config.images else given
                bar = progress.add_task(chosen.name, total=len(chosen))
                made.append(await score(client, chosen, config, write, partial(progress.advance, bar)))

    with ExitStack() as stack:
        lines: TextIO | None = None
        if config.predictions is not None:
            try:
                lines = stack.enter_context(config.predictions.open("w", encoding="utf-8"))
            except OSError as error:
                return _end(said, USAGE, f"{config.predictions}: {error.strerror}.")
        progress = stack.enter_context(_progress(said))
        code = _run(work(progress, lambda line: lines and lines.write(line + "\n")), said)
    if config.json and made:
        typer.echo(json.dumps({"sets": made}, ensure_ascii=False, indent=1))
    elif made:
        Console().print(_scores(made))
    return code


def load_served(
    place: Place, pictures: Sequence[bytes], question: dict[str, Any], *, as_json: bool, seconds: float, **load: Any
) -> int:
    """`gram bench`; returns the exit code: 1 where not a single request was answered."""
    said = Console(stderr=True)
    told: dict[str, Any] = {}

    async def work() -> None:
        async with connect(place, lambda line: _say(said, line)) as client:
            await client.info()  # is there anyone, and does the key fit?
            told.update(bench.report(await bench.fire(client, pictures, question, seconds=seconds, **load), seconds))

    code = _run(work(), said)
    if told and as_json:
        typer.echo(json.dumps(told))
    elif told:
        table = Table("", "", show_header=False)
        for name, value in told.items():
            shown = ", ".join(f"{k}: {n}" for k, n in value.items()) if isinstance(value, dict) else str(value)
            table.add_row(name, shown)
        Console().print(table)
    return code or (FAILED if told["goodput_per_s"] == 0 else OK)


# ---- inside ----


def _run(work: Coroutine[Any, Any, None], said: Console) -> int:
    """Run to an exit code; one line says why it is not 0."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        return _end(said, INTERRUPTED, "interrupted; what was written so far is complete.")
    except GramError as error:
        known = f" (request {error.request_id})" if error.request_id else ""
        return _end(said, FAILED, f"{error}{known}")
    except (ValueError, httpx.InvalidURL) as error:
        if not isinstance(error, InvalidSettings | httpx.InvalidURL) and "address of a server" not in str(error):
            raise
        sentence = str(error) if isinstance(error, InvalidSettings) else "the address of a server is http://HOST:PORT."
        return _end(said, USAGE, sentence)
    except CoreError as error:
        usage = type(error).__name__ == "InvalidConfig"
        return _end(said, USAGE if usage else BAD_MODEL, error.message)
    except BrokenPipeError:  # whoever read the results has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return OK


@contextmanager
def _output(out: Path | None) -> Iterator[TextIO]:
    if out is not None:
        with out.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        return
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be Unicode
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    yield sys.stdout


def _progress(said: Console, *, quiet: bool = False) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = quiet or not said.is_terminal  # rows on the same terminal are progress enough
    return Progress(*columns, console=said, disable=hidden, transient=True, redirect_stdout=False)


def _summary(said: Console, tally: bulk.Tally, asked: Classify) -> None:
    if tally.labels:
        table = Table("label", "images", "changed by adaptation")
        for label, count in tally.labels.most_common():
            table.add_row(Text(label), str(count), str(tally.changed[label]))
        said.print(table)
    line = f"{tally.images} images, {tally.failed} failed, {tally.changed.total()} changed by adaptation"
    if asked.sort_into is not None:
        did = {"copy": "copied", "move": "moved", "link": "linked"}[asked.how]
        line += f"; {tally.labels.total() - tally.unsorted} {did} into {asked.sort_into}"
        line += f", {tally.unsorted} could not be" if tally.unsorted else ""
    _say(said, line)


def _scores(made: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("set", "method", "top-1 %", "gain, 95 % interval", "ECE %", "ms per image")
    for row in made:
        for name, cell in row["methods"].items():
            gain = cell["gain"]
            shown = "" if name == "zero-shot" else f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
            ms = "" if name == "zero-shot" and len(row["methods"]) > 1 else f"{row['ms_per_image']:.1f}"
            table.add_row(Text(row["set"]), name, f"{cell['top1']:.2f}", Text(shown), f"{cell['ece']:.2f}", ms)
    return table


def _left_out(said: Console, files: Sequence[Path]) -> None:
    if files:
        more = f" and {len(files) - TOLD} more" if len(files) > TOLD else ""
        named = ", ".join(printable(str(file)) for file in files[:TOLD])
        _say(said, f"left out because no JPEG, PNG or WEBP, {len(files)}: {named}{more}")


def _say(said: Console, line: str) -> None:
    said.print(line, markup=False, highlight=False, soft_wrap=True)


def _end(said: Console, code: int, sentence: str) -> int:
    _say(said, sentence)
    return code
