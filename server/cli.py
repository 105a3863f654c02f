"""`gram`: the product's console script."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from server import doctor as doctors
from server.__main__ import run
from server.auth import new_key as fresh_key
from server.settings import UnknownFlag

FAILED = 1
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


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
