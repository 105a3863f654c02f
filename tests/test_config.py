"""Options from files and words: what is accepted, what wins, and what an error says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from gram_core.config import option, parse, read
from gram_core.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = option(1, "how many inside")
    some_rates: tuple[float, ...] = option((0.5,), "how far inside")
    loud: bool = option(False, "whether inside")


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = option(3, "how many")
    lr: float = option(0.5, "how far")
    name: str | None = option(None, "who")
    sizes: tuple[int, ...] = option((8, 32), "how large")
    texts: tuple[str, ...] = option((), "what is said", whole=True)
    roles: dict[str, str] = option({}, "which is which")
    clean: bool = option(True, "whether")
    folder: Path = option(Path("here"), "where")
    inner: Inner = option(Inner(), "what is inside")


def words(*given: str) -> Options:
    return parse(Options, given, program="test", description="A test.")


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_defaults_hold_without_a_word() -> None:
    assert words() == Options()


def test_words_become_the_types_of_their_fields() -> None:
    got = words("--steps", "5", "--lr", "1e-3", "--name", "x", "--no-clean", "--folder", "there")
    assert got == Options(steps=5, lr=1e-3, name="x", clean=False, folder=Path("there"))


def test_lists_are_given_with_commas_or_as_words() -> None:
    assert words("--sizes", "8,16").sizes == words("--sizes", "8", "16").sizes == (8, 16)


def test_a_whole_text_keeps_its_commas() -> None:
    assert words("--texts", "a photo, of a {}.", "a {}").texts == ("a photo, of a {}.", "a {}")


def test_pairs_are_split_at_the_last_equals_sign() -> None:
    assert words("--roles", "pacs/*=reporting", "a=b=choosing").roles == {"pacs/*": "reporting", "a=b": "choosing"}


def test_words_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'steps = 7\nlr = 2\nsizes = [4]\nroles = {"a/*" = "choosing"}\nclean = false\n')
    got = words("--recipe", str(path), "--steps", "9")
    assert got == Options(steps=9, lr=2.0, sizes=(4,), roles={"a/*": "choosing"}, clean=False)


def test_a_section_is_a_table_of_the_recipe_and_a_dotted_word(tmp_path: Path) -> None:
    path = recipe(tmp_path, "steps = 7\n[inner]\nsteps = 2\nloud = true\n")
    got = words("--recipe", str(path), "--inner.some_rates=1,2", "--inner.steps", "3")
    assert got == Options(steps=7, inner=Inner(steps=3, some_rates=(1.0, 2.0), loud=True))
    assert words("--inner.some-rates", "1", "2", "--no-inner.loud").inner == Inner(some_rates=(1.0, 2.0))


def test_the_recipe_may_be_the_first_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "steps = 7\n")
    got = parse(Options, [str(path), "--lr=2"], program="test", description="A test.", recipe="CONFIG.toml")
    assert got == Options(steps=7, lr=2.0)
    with pytest.raises(SystemExit):
        parse(Options, [], program="test", description="A test.", recipe="CONFIG.toml")
    assert "required: CONFIG.toml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Options, ["--help"], program="test", description="A test.", recipe="CONFIG.toml")
    shown = capsys.readouterr().out
    assert "[inner]:" in shown
    assert "--inner.steps N" in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[inner]\nstep = 1", r"recipe.toml \[inner\] has no key 'step'; did you mean 'steps'\?"),
        ("[inner]\nsteps = 1.5", r"recipe.toml \[inner\]: steps is 1.5; expected a whole number"),
        ("inner = 3", r"recipe.toml: inner is 3; expected a section \[inner\]"),
        ("step = 1", r"recipe.toml has no key 'step'; did you mean 'steps'\? Keys: clean, folder, inner, lr"),
        ('steps = "many"', "recipe.toml: steps is 'many'; expected a whole number"),
        ("steps = 1.5", "steps is 1.5; expected a whole number"),
        ("steps = true", "steps is True; expected a whole number"),
        ("sizes = [1, 'x']", "sizes is .*; expected a list of a whole number"),
        ("name = 3", "name is 3; expected text"),
        ("clean = 'maybe'", "clean is 'maybe'; expected true or false"),
        ("roles = ['x']", "roles is .*; expected pairs NAME=VALUE"),
        ("steps = ", "recipe.toml is not TOML"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        read(Options, recipe(tmp_path, text), {})


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"nowhere\.toml can't be read"):
        read(Options, tmp_path / "nowhere.toml", {})


@pytest.mark.parametrize("given", [("--steps", "x"), ("--step", "1"), ("--roles", "x")])
def test_wrong_words_end_with_code_2_and_a_sentence(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        words(*given)
    assert ended.value.code == 2
    assert given[0].lstrip("-") in capsys.readouterr().err
