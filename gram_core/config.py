"""TOML files and `--name=value` words into frozen dataclasses; unknown names and wrong types are errors in words.

A field's type says what is accepted, its default what holds otherwise, its metadata what `--help` says. A field that
is itself such a dataclass is a section: a table of the file, `--section.name=value` in words. Precedence: words over
the file over the defaults.
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
    return _made(cls, _checked(cls, values, where), _checked(cls, given, "the command line"))


def _made(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """`cls` from checked values, later ones over earlier ones, section by section."""
    values = {name: value for layer in layers for name, value in layer.items()}
    for name, kind in typing.get_type_hints(cls).items():
        if name in values and dataclasses.is_dataclass(kind):
            values[name] = _made(kind, *(layer[name] for layer in layers if name in layer))  # type: ignore[arg-type]  # a type, by the hint
    return cls(**values)


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


def parse(cls: type[T], words: Sequence[str], *, program: str, description: str, recipe: str | None = None) -> T:
    """`cls` from command-line words: one `--flag` per field and `--recipe FILE.toml`; errors end with code 2.

    With `recipe`, its name in `--help`, the file is the first word instead, and has to be there.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if recipe:
        parser.add_argument("recipe", type=Path, metavar=recipe, help="the options, as a TOML file")
    else:
        parser.add_argument("--recipe", type=Path, metavar="FILE.toml", help="read these options from a file first")
    whole = _add_flags(parser, cls, "")
    given = vars(parser.parse_args([_dashed(word) for word in words]))
    path = given.pop("recipe")
    values: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, list) and name not in whole:
            value = [part.strip() for word in value for part in word.split(",")]
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    try:
        return read(cls, path, values)
    except InvalidConfig as error:
        parser.error(error.message)


def _dashed(word: str) -> str:
    """A flag as it is declared: names of a file work as they are written there."""
    flag, mark, value = word.partition("=")
    return flag.replace("_", "-") + mark + value if word.startswith("--") else word


def _add_flags(parser: argparse._ActionsContainer, cls: type[Any], section: str) -> set[str]:
    """One flag per field; the names of those whose words are not split at commas."""
    hints = typing.get_type_hints(cls)
    whole: set[str] = set()
    for item in dataclasses.fields(cls):
        name = section + item.name
        flag = "--" + name.replace("_", "-")
        text = str(item.metadata.get("help", "")).replace("%", "%%")
        kind = _plain(hints[item.name])
        if dataclasses.is_dataclass(kind):
            whole |= _add_flags(parser.add_argument_group(f"[{name}]", text), kind, f"{name}.")  # type: ignore[arg-type]  # a type, by the hint
            continue
        whole |= {name} if item.metadata.get("whole") else set()
        default = _shown(item.default if item.default is not dataclasses.MISSING else None)
        text += f" (default: {default})" if default else ""
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text, dest=name
            )
        elif typing.get_origin(kind) in (tuple, dict):
            parser.add_argument(
                flag, nargs="+", action="extend", default=argparse.SUPPRESS, help=text, dest=name, metavar=_mark(kind)
            )
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, help=text, dest=name, metavar=_mark(kind))
    return whole


def _checked(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidConfig(f"{where} has no key {name!r}; {hint}Keys: {', '.join(sorted(hints))}.")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise InvalidConfig(f"{where}: {name} is {value!r}; expected a section [{name}].")
            made[name] = _checked(hints[name], value, f"{where} [{name}]")
            continue
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
