"""`gram`: the product's console script."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gram_core.errors import GramError
from server import bench, bulk
from server import doctor as doctors
from server.__main__ import BAD_MODEL, run
from server.auth import new_key as fresh_key
from server.commands import HERE, Classify, Place, classify_images, evaluate_served, load_served
from server.local import local_settings
from server.settings import CLIENT_URL, InvalidSettings, UnknownFlag

FAILED, USAGE = 1, 2
MOST_PICTURES = 256  # of a folder, in memory during a benchmark
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # the settings' own flags

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print what is none of the terminal's business
    rich_markup_mode=None,
    help="Test-time adaptation inference server.",
)


@app.callback()
def gram() -> None:
    """Keeps the commands commands, however few there are."""


@app.command(context_settings=PASSED_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Run the server; every setting is a flag."""
    run(context.args)


@app.command(context_settings=PASSED_ON)
def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only print a fresh key, once, and its line for the key file.")
    ] = None,
) -> None:
    """Check whether a server would work here.

    Takes the flags of gram serve; exit code 1 if any check fails.
    """
    if new_key is not None:
        if context.args:
            raise typer.BadParameter("it goes with no other flag but --json.", param_hint="--new-key")
        _print_key(new_key, as_json)
        return
    checks = []
    try:
        for check in doctors.examine(context.args):
            checks.append(check)
            if not as_json:
                typer.echo(check.line())
    except UnknownFlag as error:
        raise typer.BadParameter(str(error)) from None
    ok = not any(check.status == "FAIL" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=1))
    if not ok:
        raise typer.Exit(FAILED)


def _print_key(name: str, as_json: bool) -> None:
    try:
        key, line = fresh_key(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--new-key") from None
    typer.echo(json.dumps({"key": key, "line": line}) if as_json else f"{key}\n{line}")


@app.command()
def classify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images, and folders with images anywhere.")],
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="Class names.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line as it is; for names with commas.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The server to ask; else GRAM_URL, else port 8000 here.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Ask no server: load the model into this process.")] = False,
    model: Annotated[str | None, typer.Option(help="Model of --local, as GRAM_MODEL.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint of --local, as GRAM_CHECKPOINT.")] = None,
    device: Annotated[str | None, typer.Option(help="Device of --local, as GRAM_DEVICE.")] = None,
    method: Annotated[str | None, typer.Option(help="gram, infomax, tpt or none; else the model's default.")] = None,
    scope: Annotated[str | None, typer.Option(help="image, batch or auto (default).")] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps; else the method's own.")] = None,
    views: Annotated[int | None, typer.Option(help="Views of an image; else the method's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the views.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A text with one {} for the name; may be given more than once.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Predictions of an image in --json and --jsonl; 5.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, in --json and --jsonl.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a JSON object for each image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table for spreadsheets.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put every image into DIR/LABEL/; nothing is overwritten.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="With --sort-into: leave the image where it is (default).")
    ] = False,
    move: Annotated[bool, typer.Option("--move", help="With --sort-into: move the image.")] = False,
    link: Annotated[bool, typer.Option("--link", help="With --sort-into: make a symbolic link to it.")] = False,
    replay: Annotated[str | None, typer.Option(metavar="TOKEN", help="Run exactly what an answer recorded.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a request; else what the server takes.")] = None,
    errors: Annotated[
        str, typer.Option(help="per_item: a bad image is told and the rest goes on; fail: it ends the run.")
    ] = "per_item",
) -> None:
    """Classify images, before and after adaptation.

    A running server answers, or else this process.

    Images that arrive in one request are adapted to together (scope batch, or auto from 8 images on). Exit code 1 if an
    image failed, 2 for a wrong option, 130 if interrupted.
    """
    tuning = {"method": method, "scope": scope, "steps": steps, "views": views, "seed": seed}
    options: dict[str, Any] = {name: value for name, value in tuning.items() if value is not None}
    if replay is not None and options:
        raise typer.BadParameter(
            "holds the whole plan; leave method, scope, steps, views and seed out.", param_hint="--replay"
        )
    if errors not in ("per_item", "fail"):
        raise typer.BadParameter("choose per_item or fail.", param_hint="--errors")
    if scope not in (None, "auto", "image", "batch"):
        raise typer.BadParameter("choose auto, image or batch.", param_hint="--scope")
    given = {"replay": replay, "templates": template or None, "top_k": top_k, "explain": explain or None}
    options |= {name: value for name, value in given.items() if value is not None}
    form = _one({"json": as_json, "jsonl": as_jsonl, "csv": as_csv}) or "text"
    how = _one({"copy": copy, "move": move, "link": link})
    if how is not None and sort_into is None:
        raise typer.BadParameter("goes with --sort-into DIR.", param_hint=f"--{how}")
    flags = {"--model": model, "--checkpoint": checkpoint, "--device": device}
    asked = Classify(
        paths=paths,
        classes=_class_names(classes, classes_file),
        options=options | {"errors": errors},
        place=_place(url, local, flags),
        form=form,
        out=out,
        sort_into=sort_into,
        how=how or "copy",
        batch=batch,
    )
    raise typer.Exit(classify_images(asked))


@app.command(context_settings=PASSED_ON)
def evaluate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder for each class; comes first.")],
    url: Annotated[str | None, typer.Option(help="Ask this server.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Measure in this process (default).")] = False,
) -> None:
    """Measure zero-shot against adapted accuracy on labelled images.

    In this process it is python -m gram_core.evaluate --data DIR, and takes its flags; with --url it takes --method,
    --scope, --steps, --views, --stream-size, --images, --predictions FILE and --json (docs/client.md).
    """
    if url is not None and local:
        raise typer.BadParameter("choose one of --url and --local.", param_hint="--url")
    if str(folder).startswith("-"):
        raise typer.BadParameter("the folder comes first: gram evaluate DIR ...", param_hint="DIR")
    if not folder.exists():
        raise typer.BadParameter("no such file or folder.", param_hint="DIR")
    if url is not None:
        raise typer.Exit(evaluate_served(folder, url, context.args))
    from gram_core.evaluate.__main__ import main as harness

    raise typer.Exit(harness(["--data", str(folder), *context.args]))


@app.command(context_settings=PASSED_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Learn a checkpoint: python -m gram_core.train."""
    from gram_core.train import main as learn

    raise typer.Exit(learn(context.args))


@app.command(context_settings=PASSED_ON)
def tune(context: typer.Context) -> None:
    """Few-shot tuning; does not exist yet."""
    if importlib.util.find_spec("gram_core.tune") is None:
        typer.echo("few-shot tuning does not exist yet; gram train learns from image-text pairs.", err=True)
        raise typer.Exit(USAGE)
    raise typer.Exit(importlib.import_module("gram_core.tune").main(context.args))


@app.command("bench")
def bench_(
    url: Annotated[str | None, typer.Option(help="The server; else GRAM_URL, else port 8000 here.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, on average.")] = 5.0,
    seconds: Annotated[float, typer.Option(help="How long requests are sent.")] = 10.0,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Send these; else seeded pictures.")] = None,
    side: Annotated[int, typer.Option(min=1, max=4096, help="Pixels of a seeded picture's side.")] = 320,
    batch: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 1,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="Class names.")] = "cat,dog,car,tree",
    method: Annotated[str | None, typer.Option(help="gram, infomax, tpt or none; else the default.")] = None,
    scope: Annotated[str | None, typer.Option(help="image, batch or auto (default).")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put load on a running server, and time it.

    Poisson arrivals; percentiles of answered requests, goodput, refusals.

    Exit code 1 if no request was answered.
    """
    for name, value in {"--rate": rate, "--seconds": seconds, "--timeout": timeout}.items():
        if not 0 < value < math.inf:
            raise typer.BadParameter("must be a number above 0.", param_hint=name)
    if images is None:
        pictures = bench.synthetic(side, seed)
    else:
        try:
            pictures = [path.read_bytes() for path in bulk.find([images]).images[:MOST_PICTURES]]
        except OSError:
            raise typer.BadParameter("can't be read.", param_hint="--images") from None
        if not pictures:
            raise typer.BadParameter("holds no JPEG, PNG or WEBP file.", param_hint="--images")
    asked = {name: value for name, value in {"method": method, "scope": scope}.items() if value is not None}
    question = {"classes": _class_names(classes, None), "adaptation": asked}
    load = {"rate": rate, "batch": batch, "timeout_s": timeout, "seed": seed}
    place = Place(url or os.environ.get(CLIENT_URL) or HERE)
    raise typer.Exit(load_served(place, pictures, question, as_json=as_json, seconds=seconds, **load))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As GRAM_MODEL: NAME/TAG or hf-hub:ORG/REPO.")],
    model_dir: Annotated[Path | None, typer.Option(help="Where models lie, as GRAM_MODEL_DIR.")] = None,
) -> None:
    """Fetch a model for servers that are offline.

    Prints the SHA-256 of its weights and its name.

    Exit code 65 if it can't be had.
    """
    flags = ["--model", name, *(() if model_dir is None else ("--model-dir", str(model_dir)))]
    try:
        settings = local_settings(flags)
    except InvalidSettings as error:
        raise typer.BadParameter(str(error), param_hint="settings") from None
    typer.echo(f"looking for {name}", err=True)
    from gram_core.backbone import fetch, file_sha256, locate

    try:
        fetch(name, settings.model_dir, settings.offline)
        files = locate(name, settings.model_dir)
    except GramError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(BAD_MODEL) from None
    typer.echo(f"{file_sha256(files.weights)}  {files.name}")


def _nfc(name: str) -> str:
    """As the server writes it: file systems and terminals have other forms."""
    return unicodedata.normalize("NFC", name).strip()


def _class_names(classes: str | None, file: Path | None) -> list[str]:
    if (classes is None) == (file is None):
        raise typer.BadParameter("give either --classes A,B,... or --classes-file FILE.", param_hint="--classes")
    if file is None:
        names = [_nfc(name) for name in str(classes).split(",")]
    else:
        try:
            names = [_nfc(line) for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("can't be read as UTF-8 text.", param_hint="--classes-file") from None
    names = [name for name in names if name]
    hint = "--classes" if file is None else "--classes-file"
    if not names:
        raise typer.BadParameter("holds no class name.", param_hint=hint)
    if len(set(names)) != len(names):
        raise typer.BadParameter("holds a class name twice.", param_hint=hint)
    return names


def _one(choices: dict[str, bool]) -> str | None:
    chosen = [name for name, given in choices.items() if given]
    if len(chosen) > 1:
        raise typer.BadParameter(
            f"choose one of {', '.join('--' + name for name in choices)}.", param_hint=f"--{chosen[1]}"
        )
    return chosen[0] if chosen else None


def _place(url: str | None, local: bool, flags: dict[str, Any]) -> Place:
    words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    if url is not None and (local or words):
        raise typer.BadParameter("--local, --model, --checkpoint and --device go without it.", param_hint="--url")
    if local or words:
        return Place(here=True, flags=words)
    return Place(url or os.environ.get(CLIENT_URL) or None)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
