"""TOML files and `--name=value` words into frozen dataclasses; unknown names and wrong types are errors in words.

A field's type says what is accepted, its default what holds otherwise, its metadata what `--help` says. Precedence:
words over the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gram_core.errors import GramError, InvalidConfig

T = TypeVar("T")
OK, USAGE, BAD_DATA, INTERRUPTED = 0, 2, 65, 130
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def option(default: Any, text: str, *, whole: bool = False) -> Any:
    """A dataclass field with the line that `--help` shows; a list's words are split at commas unless `whole`."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text, "whole": whole})


def read(cls: type[T], path: Path | None, given: Mapping[str, Any]) -> T:
    """`cls` from the TOML file `path` and the values `given` by name, which are checked in the same way.

    Raises InvalidConfig naming the file, the key, what was got and what was expected.
    """
    values: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        try:
            with path.open("rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise InvalidConfig(f"{path} can't be read ({error.strerror}); name a recipe that exists.") from error
        except tomllib.TOMLDecodeError as error:
            raise InvalidConfig(f"{path} is not TOML: {error}.") from error
    made = _checked(cls, values, where) | _checked(cls, given, "the command line")
    return cls(**made)


def exit_code(work: Callable[[], object], said: Console) -> int:
    """Do the work of a command: 0 done, 2 an option was wrong, 65 data or model, 130 interrupted; one line says why."""
    try:
        work()
    except GramError as error:
        said.print(f"{type(error).__name__}: {error.message}", style="red", markup=False, highlight=False)
        return USAGE if isinstance(error, InvalidConfig) else BAD_DATA
    except OSError as error:
        said.print(f"{error.filename}: {error.strerror}", style="red", markup=False, highlight=False)
        return BAD_DATA
    except KeyboardInterrupt:
        said.print("interrupted; what was finished is kept: run the same command again to go on.", style="yellow")
        return INTERRUPTED
    return OK


def parse(cls: type[T], words: Sequence[str], *, program: str, description: str) -> T:
    """`cls` from command-line words: one `--flag` per field and `--recipe FILE.toml`; errors end with code 2."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE.toml", help="read these options from a file first")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass by contract
    for item in fields:
        flag = "--" + item.name.replace("_", "-")
        text = str(item.metadata.get("help", "")).replace("%", "%%")
        kind = _plain(hints[item.name])
        default = _shown(item.default if item.default is not dataclasses.MISSING else None)
        text += f" (default: {default})" if default else ""
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text, dest=item.name
            )
        elif typing.get_origin(kind) in (tuple, dict):
            parser.add_argument(
                flag,
                nargs="+",
                action="extend",
                default=argparse.SUPPRESS,
                help=text,
                dest=item.name,
                metavar=_mark(kind),
            )
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, help=text, dest=item.name, metavar=_mark(kind))
    given = vars(parser.parse_args(list(words)))
    recipe = given.pop("recipe")
    for item in fields:
        if isinstance(given.get(item.name), list) and not item.metadata.get("whole"):
            given[item.name] = [part.strip() for word in given[item.name] for part in word.split(",")]
    try:
        return read(cls, recipe, given)
    except InvalidConfig as error:
        parser.error(error.message)


def _checked(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidConfig(f"{where} has no key {name!r}; {hint}Keys: {', '.join(sorted(hints))}.")
        try:
            made[name] = _cast(hints[name], value)
        except (TypeError, ValueError):
            raise InvalidConfig(f"{where}: {name} is {value!r}; expected {_name(hints[name])}.") from None
    return made


def _cast(kind: Any, value: Any) -> Any:
    """`value` as `kind`; text becomes numbers, never the other way round."""
    if value is None or (value == "none" and _optional(kind)):
        if _optional(kind):
            return None
        raise TypeError
    kind = _plain(kind)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_cast(inner, part) for part in (value if isinstance(value, list | tuple) else [value]))
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        if isinstance(value, Mapping):
            return {str(k): _cast(inner, v) for k, v in value.items()}
        pairs = [word.rpartition("=") for word in value]
        if not all(mark and left for left, mark, _ in pairs):
            raise ValueError
        return {left: _cast(inner, right) for left, _, right in pairs}
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUE + FALSE:
            return str(value).lower() in TRUE
        raise ValueError
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise TypeError
        return kind(value)
    if kind in (str, Path):
        if not isinstance(value, str | Path):
            raise TypeError
        return kind(value)
    raise TypeError(kind)


def _optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind) and isinstance(kind, types.UnionType)


def _plain(kind: Any) -> Any:
    """`X` of `X | None`."""
    return next(a for a in typing.get_args(kind) if a is not type(None)) if _optional(kind) else kind


def _name(kind: Any) -> str:
    plain = _plain(kind)
    if typing.get_origin(plain) is tuple:
        return f"a list of {_name(typing.get_args(plain)[0])}"
    if typing.get_origin(plain) is dict:
        return "pairs NAME=VALUE"
    return {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}[plain]


def _mark(kind: Any) -> str:
    """What stands for a value in `--help`."""
    if typing.get_origin(kind) is dict:
        return "PATTERN=VALUE"
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    return {int: "N", float: "X", Path: "PATH"}.get(inner, "TEXT")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "" if value is None or value == {} else str(value)
