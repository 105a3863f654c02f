"""Candidate phrases: the noun-phrase-like word groups of captions, by rules instead of a parser.

The rule. A caption is cut at punctuation, numbers and stop words (articles, prepositions, pronouns, conjunctions,
auxiliaries, adverbs, frequent verbs). Between the cuts stand runs of words, which are cut further:

1. at a word in -ing or -ed without a hyphen, unless it opens the run behind an article or at the start of a caption
   (`a running dog`, but `man | riding | bike`) or is on a short list of nouns (`building`, `swing`, `bed`);
2. at a word in -ly that isn't on a list of nouns;
3. behind `a` or `an`, at a later word in -s (not -ss, -us, -is, nor on a list): the noun there is singular, so that
   word is the verb (`a dog | catches | frisbee`).

Candidates are the groups of 1 to 3 neighbouring words of a run whose last word is fit for a head: not an adjective or
colour of a list, not a possessive, not in -ing, -ed, -ly, -ful, -less, -ous. A phrase counts once per caption. Kept is
what closes its run in at least a quarter of its captions: `teenage` (boy), `beer can` (hat) almost never do.
"""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LONGEST = 3  # words
CLOSING = 0.25  # of a phrase's captions, in which its last word is the last of the run: below it is part of another
HELD = 5_000_000  # distinct candidates held while counting; beyond, those seen once are dropped

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[^\w\s]|[\d_]\w*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _words("a an")
ARTICLES = SINGULAR | _words(
    "the some his her its their our my your this that these those another one two three four five six seven eight "
    "nine ten several many no each every both few"
)
STOP = ARTICLES | _words(
    # prepositions, conjunctions, particles
    "about above across after against along alongside amid amidst among amongst around as aside at atop away back "
    "before behind below beneath beside besides between beyond by despite down during except for from in inside into "
    "like near nearby next of off on onto opposite out outside over past per since through throughout till to toward "
    "towards under underneath until up upon upside via with within without and but or nor so yet if because than "
    "while whilst where when whereas whether which who whom whose what why how "
    # pronouns and their company
    "he she it they them him we us you i me himself herself itself themselves ourselves something someone somebody "
    "anything anyone everything everyone nothing none other others all any same such more most much less least lots "
    "lot couple bunch kind type sort pair pairs group groups set variety number dozen dozens hundred half part various "
    # auxiliaries and adverbs
    "is are was were be been being am do does did done has have had having can could will would shall should may might "
    "must not there here then now just very too also only almost apart together forward backward backwards forwards "
    "again ahead already along alone aloft always away else ever even high instead midair mid-air never often once "
    "outdoors indoors overhead quite rather sideways still soon straight though twice upwards upward downward well "
    "barely halfway left right "
    # frequent verbs of captions, and the participles that -ing and -ed miss
    "appear appears attempt attempts balance balances begin begins bend bends bite bites blow blows bounce bounces "
    "bring brings carry carries cast casts catch catches caught celebrate celebrates chase chases chew chews climb "
    "climbs come comes compete competes covers cross crosses crouch crouches cut cuts dig digs dive dives drag drags "
    "drive drives eat eats eaten enjoy enjoys enter enters fall falls fallen feed feeds fight fights float floats fly "
    "flies flip flips follow follows gather gathers get gets give gives go goes going gone grab grabs hang hangs "
    "held hit hits hold holds hug hugs hung interact interacts jog jogs jump jumps keep keeps kick kicks kiss kisses "
    "kneel kneels laugh laughs lay lays lead leads lean leans leap leaps leave leaves let lets lie lies lick "
    "licks lift lifts listen listens look looks made make makes move moves paddle paddles pass passes perform performs "
    "plays play point points pose poses prepare prepares pull pulls push pushes put puts race races raise raises reach "
    "reaches read reads rest rests ride rides roll rolls run runs sat say says see sees seen seem seems shake shakes "
    "share shares show shows shown sing sings sit sits skate skates skateboards slide slides sleep sleeps smile smiles "
    "sniff sniffs speak speaks splash splashes spread sprays stand stands stare stares start starts stick sticks stood "
    "stop stops strike strikes surf surfs swim swims swings take takes taken talk talks tackles think thinks throw "
    "throws thrown toss tosses touch touches travel travels tries try trying turn turns use uses wade wades wait waits "
    "walk walks watch watches wave wears wear work works worn wrestle wrestles write writes getting"
)
ADJECTIVES = _words(
    "red orange yellow green blue purple pink brown black white grey gray tan beige golden silver colorful "
    "colourful multicolored multi-colored tri-colored dark light bright blond blonde pale big small large little "
    "tiny huge tall short long wide narrow young old older elderly new middle-aged different same similar single "
    "several empty full wet dry dirty muddy snowy grassy sandy rocky wooden metal plastic hot cold warm cool happy "
    "sad angry funny beautiful pretty cute shiny fluffy furry hairy busy crowded calm clear open closed shallow "
    "deep steep flat round square thick thin heavy fast slow male female asian african american indian chinese "
    "japanese european bare shirtless barefoot naked clad nearby various outdoor indoor front top own first second "
    "third last whole main ready able unaware high low lush rough soft hard good bad nice fancy formal casual "
    "public foreign urban local modern traditional professional medium upper lower"
)
ING_NOUNS = _words(
    "building buildings swing swings ring rings king kings wing wings string strings thing things painting paintings "
    "clothing railing railings ceiling evening morning wedding awning siding drawing spring sling earring earrings "
    "lightning crossing landing parking ping duckling sibling siblings bling frosting icing topping lettering "
    "scaffolding sting fencing flooring padding pudding stocking stockings skiing surfing boxing wrestling bowling "
    "meeting opening"
)
ED_NOUNS = _words("bed sled shed seed weed reed breed bobsled speed steed moped flatbed feed seaweed watershed biped")
LY_NOUNS = _words("family belly fly butterfly jelly lily ally rally bully dolly trolley supply assembly monopoly")
S_SINGULARS = _words(
    "sports glasses sunglasses jeans pants shorts trousers clothes goggles leggings tights stairs steps overalls "
    "headphones binoculars scissors gymnastics series species news lens canvas christmas atlas texas mens womens "
    "ladies kids boys girls womans mans ours"
)


def candidates(caption: str) -> dict[str, bool]:
    """The noun-phrase-like groups of 1 to 3 words in one caption, in small letters; whether they close a run."""
    found: dict[str, bool] = {}
    for run in _runs(caption):
        for end, head in enumerate(run):
            if not _head(head):
                continue
            for start in range(max(0, end + 1 - LONGEST), end + 1):
                phrase = " ".join(run[start : end + 1])
                found[phrase] = found.get(phrase, False) or end == len(run) - 1
    return found


def _runs(caption: str) -> Iterator[list[str]]:
    run: list[str] = []
    before = "the"  # what stands in front of the run: a caption starts as if behind an article
    for word in (*_WORD.findall(caption.lower().replace("\u2019", "'")), "."):
        if not word[0].isalpha() or word in STOP or len(word) == 1:
            kept = False
        elif run:
            verb = before in SINGULAR and word.endswith("s") and not _singular(word)
            kept = not (_verbal(word) or verb)
        else:
            kept = not _verbal(word) or (before in ARTICLES and not word.endswith("ly"))
        if kept:
            run.append(word)
            continue
        if run:
            yield run
        run, before = [], word


def _verbal(word: str) -> bool:
    """Whether the ending is that of a verb form or an adverb."""
    if word in ADJECTIVES or "-" in word:
        return False  # red; long-haired
    return (
        (word.endswith("ing") and word not in ING_NOUNS)
        or (word.endswith("ed") and word not in ED_NOUNS)
        or (word.endswith("ly") and word not in LY_NOUNS)
    )


def _singular(word: str) -> bool:
    return word.endswith(("ss", "us", "is", "'s")) or word in S_SINGULARS


def _head(word: str) -> bool:
    endings = ("'s", "s'", "ful", "less", "ous")
    return not (word in ADJECTIVES or word.endswith(endings) or _verbal(word.rpartition("-")[2]))


# ---- counting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase, the number of captions that hold it, and the rows (at most so many, a seeded sample) that do."""

    text: str
    count: int
    rows: tuple[int, ...]


def frequent(captions: Iterable[Sequence[str]], least: int, most: int) -> list[str]:
    """The `most` phrases held by most captions, at least `least` of them; ties by the alphabet.

    Exact up to `HELD` distinct candidates. Beyond, those seen once so far are dropped (as lossy counting does: Manku
    and Motwani, VLDB 2002), which may cost rare phrases a count or two, never frequent ones their place.
    """
    counts: Counter[str] = Counter()
    closing: Counter[str] = Counter()
    for own in captions:
        for caption in own:
            found = candidates(caption)
            counts.update(found.keys())
            closing.update(phrase for phrase, closes in found.items() if closes)
        if len(counts) > HELD:
            counts = Counter({phrase: count for phrase, count in counts.items() if count > 1})
            closing = Counter({phrase: count for phrase, count in closing.items() if phrase in counts})
    ranked = sorted(
        (-count, phrase) for phrase, count in counts.items() if count >= least and closing[phrase] >= CLOSING * count
    )
    return [phrase for _, phrase in ranked[:most]]


def located(captions: Iterable[Sequence[str]], wanted: Sequence[str], rows: int, seed: int) -> list[Phrase]:
    """Exact counts of the `wanted` phrases and the rows that hold them, by falling count."""
    counts: Counter[str] = Counter()
    kept: dict[str, list[tuple[float, int]]] = {phrase: [] for phrase in wanted}
    for row, own in enumerate(captions):
        here: Counter[str] = Counter()
        for caption in own:
            here.update(candidates(caption).keys() & kept.keys())
        counts.update(here)
        draw = random.Random(seed * 2**40 + row).random()  # the same for all phrases: it decides which rows stay
        for phrase in here:
            heap = kept[phrase]
            if len(heap) < rows:
                heapq.heappush(heap, (-draw, row))
            elif -draw > heap[0][0]:
                heapq.heapreplace(heap, (-draw, row))
    ranked = sorted(wanted, key=lambda phrase: (-counts[phrase], phrase))
    return [
        Phrase(text=phrase, count=counts[phrase], rows=tuple(sorted(row for _, row in kept[phrase])))
        for phrase in ranked
    ]
