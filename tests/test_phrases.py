"""gram_core.phrases: which word groups of a caption stand for a thing, and how they are counted."""

from __future__ import annotations

import pytest

from gram_core import phrases
from gram_core.phrases import candidates, frequent, located


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A brown dog is running on the beach .", {"brown dog", "dog", "beach"}),
        ("A man riding a bike", {"man", "bike"}),
        ("a dog catches a frisbee", {"dog", "frisbee"}),
        ("Two dogs run through tall grass", {"dogs", "tall grass", "grass"}),
        ("a running dog, happily", {"running dog", "dog"}),
        ("the building's red bed", {"building's red bed", "red bed", "bed"}),
        ("girl in red hat", {"girl", "red hat", "hat"}),
        ("one long-haired dog is black-spotted", {"long-haired dog", "dog"}),
        ("A woman\u2019s sports car", {"woman's sports car", "sports", "sports car", "car", "woman's sports"}),
        ("Photo 12 of 3 CATS", {"photo", "cats"}),
        ("", set()),
        ("... , 77 !", set()),
        ("the of and is", set()),
    ],
)
def test_a_caption_gives_its_noun_phrases(caption: str, expected: set[str]) -> None:
    assert set(candidates(caption)) == expected


def test_no_candidate_is_longer_than_three_words_or_crosses_punctuation() -> None:
    found = candidates("wooden beach house door, garden gate")
    assert "beach house door" in found
    assert "garden gate" in found
    assert all(len(phrase.split()) <= 3 for phrase in found)
    assert "door garden" not in found


def test_planted_phrases_are_found_counted_and_placed() -> None:
    corpus = [[f"a red kite over the lake, number {i}", "the red kite"] for i in range(4)]
    corpus += [["a green boat"], ["a green boat on a lake"], ["a yellow hat"]]
    found = located(corpus, frequent(corpus, least=2, most=100), rows=100, seed=0)
    by_text = {phrase.text: phrase for phrase in found}
    assert by_text["red kite"].count == 8
    assert by_text["red kite"].rows == (0, 1, 2, 3)
    assert by_text["lake"].rows == (0, 1, 2, 3, 5)
    assert by_text["green boat"].count == 2
    assert "yellow hat" not in by_text  # held by one caption only
    assert [p.text for p in found] == sorted(by_text, key=lambda text: (-by_text[text].count, text))


def test_a_word_that_always_modifies_another_is_no_phrase_of_its_own() -> None:
    corpus = [["a teenage boy"]] * 9 + [["a garden chair"], ["a garden"]] * 3
    found = frequent(corpus, least=1, most=100)
    assert "teenage boy" in found
    assert "teenage" not in found
    assert "garden" in found


def test_only_the_most_frequent_phrases_are_kept() -> None:
    corpus = [["a kite"]] * 3 + [["a boat"]] * 2 + [["a hat"]]
    assert frequent(corpus, least=1, most=2) == ["kite", "boat"]


def test_the_rows_of_a_frequent_phrase_are_a_seeded_sample() -> None:
    corpus = [["a kite"]] * 500
    first, again, other = (located(corpus, ["kite"], rows=50, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.rows != other.rows
    assert len(set(first.rows)) == 50
    assert first.rows == tuple(sorted(first.rows))
    assert first.count == 500
    # the mean of 50 draws from 0..499 lies within 5 of its standard deviations (19.4) of 249.5
    assert abs(sum(first.rows) / 50 - 249.5) < 97


def test_frequent_phrases_survive_the_bound_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "HELD", 20)
    corpus = [["a kite", f"a thing{chr(97 + i % 26)}{chr(97 + i // 26)}"] for i in range(200)]
    assert frequent(corpus, least=100, most=10) == ["kite"]
