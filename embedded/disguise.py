"""A group in disguise: the models see phrases and words that the gold rater turns back before it reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random

from deliberation.citizens import Group, Wish
from deliberation.lexicon import load_lexicon
from deliberation.types import Deliberation
from embedded.leads import own_leads
from embedded.phrases import clause, noun_phrase
from embedded.words import Pieces, foreign_words, rename

FOREIGN_SHARE = 0.8
"""Share of documents in which some words are replaced, wherever they stand, by words that do not exist: the claims and
phrases of a new topic are made of words, and of pieces of words, that a model must copy without knowing them."""
OPEN_SHARE = 0.55
"""Share of documents in which each wish is put in one wording throughout, most by a phrase of no known build
(``embedded/phrases.py``), and in which the words around a noun are replaced too: what a person writes is to be copied,
not to be turned into the nearest thing a citizen would say."""


@dataclass(frozen=True)
class Disguise:
    """How a group's texts are shown to a model: other phrases, then other words. The gold rater reads the originals.

    Attributes:
        phrases: every wording of a wish -> the one it is shown in.
        wordings: the one it is shown in -> the wish as the gold rater knows it.
        words: known word -> made-up word.
    """

    phrases: dict[str, str] = field(default_factory=dict)
    wordings: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def rephrase(self, text: str) -> str:
        """``text`` with the wishes' phrases replaced."""
        return _replace_phrases(text, self.phrases)

    def show(self, text: str) -> str:
        """``text`` as a model sees it."""
        return rename(self.rephrase(text), self.words)

    def phrases_back(self, text: str) -> str:
        """A rephrased ``text`` as the gold rater reads it."""
        return _replace_phrases(text, self.wordings)

    def read_back(self, text: str) -> str:
        """A shown ``text`` as the gold rater reads it; what was copied wrongly stays foreign."""
        return self.phrases_back(rename(text, {new.lower(): old for old, new in self.words.items()}))


def _replace_phrases(text: str, phrases: dict[str, str]) -> str:
    """``text`` with whole phrases replaced, longest first, a capital at the start kept."""
    if not phrases:
        return text
    longest_first = sorted(phrases, key=len, reverse=True)
    known = "|".join(f"[{p[0].lower()}{p[0].upper()}]{re.escape(p[1:])}" for p in longest_first)

    def replacement(found: re.Match[str]) -> str:
        old = found.group()
        new = phrases.get(old) or phrases[f"{old[0].lower()}{old[1:]}"]
        return f"{new[0].upper()}{new[1:]}" if old[0].isupper() else new

    return re.sub(rf"\b(?:{known})\b", replacement, text)


def wishes_of(group: Group) -> Iterator[Wish]:
    """Every item that a member holds a view on."""
    for c in group.citizens:
        yield from (*c.wants, *c.dislikes, *c.red_lines, *((c.condition,) if c.condition else ()))


def draw_disguise(group: Group, rng: Random, pieces: Pieces | None = None) -> Disguise:
    """Other phrases in ``OPEN_SHARE`` of the groups, made-up words in ``FOREIGN_SHARE``, drawn apart."""
    phrases: dict[str, str] = {}
    wordings: dict[str, str] = {}
    is_open = rng.random() < OPEN_SHARE
    for wish in wishes_of(group) if is_open else ():
        if wish.text in phrases:
            continue
        new = wish.text if rng.random() < 0.3 else (clause if wish.slot == "reason" else noun_phrase)(rng)
        if any(new in other or other in new for other in wordings):
            new = wish.text  # two wishes shown alike could not be told apart again
        wordings[new] = wish.text
        phrases.update(dict.fromkeys(_wordings(wish), new))
    if rng.random() >= FOREIGN_SHARE:
        return Disguise(phrases, wordings)
    # a made-up word that no prompt shows could not be predicted
    prompted = [_replace_phrases(t, phrases) for t in (group.question.text, *(c.opinion for c in group.citizens))]
    return Disguise(phrases, wordings, foreign_words(prompted, rng, pieces, paraphrases=is_open))


def _wordings(wish: Wish) -> list[str]:
    """All paraphrases of a wish."""
    if wish.slot == "reason":
        return [wish.text]
    lexicon = load_lexicon()
    table = lexicon.concerns if wish.slot == "concern" else lexicon.measures
    return [phrase.format(np=" ".join(wish.words)) for phrase in table[wish.kind]]


def shown_opinions(group: Group, disguise: Disguise) -> list[str]:
    """The members' opinions as a model sees them."""
    return [disguise.show(c.opinion) for c in group.citizens]


def rephrased(deliberation: Deliberation, group: Group, rng: Random) -> Deliberation:
    """A group's deliberation in other words: disguised, its sentences said otherwise."""
    disguise = draw_disguise(group, rng)
    opinions = tuple(own_leads(shown_opinions(group, disguise), rng))
    return replace(deliberation, question=disguise.show(group.question.text), opinions=opinions)
