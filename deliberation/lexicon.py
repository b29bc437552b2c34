"""The simulated citizens' words: noun phrases built from parts, reasons, concerns and measures with paraphrases.

Every fifth entry of each list of parts is *held out*: training worlds never see it, test worlds prefer it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).parent / "data"
HELD_OUT_EVERY = 5
"""Entry k of a list is held out when k % 5 == 4."""
HELD_OUT_SHARE = 0.6
"""In a held-out world, the probability that a part is drawn from the held-out entries."""


@dataclass(frozen=True)
class Lexicon:
    """Word lists. ``concerns`` and ``measures`` map a kind to paraphrases with one ``{np}`` slot."""

    modifiers: tuple[str, ...]
    heads: tuple[str, ...]
    tails: tuple[str, ...]
    predicates: tuple[str, ...]
    acts: tuple[str, ...]
    concerns: dict[str, tuple[str, ...]]
    measures: dict[str, tuple[str, ...]]

    def draw(self, part: str, rng: Random, held_out: bool) -> str:
        """One entry of the list ``part``; the held-out entries are drawn in held-out worlds only."""
        entries = getattr(self, part)
        seen = [e for k, e in enumerate(entries) if k % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        if held_out and rng.random() < HELD_OUT_SHARE:
            return rng.choice(entries[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        return rng.choice(seen)

    def noun_phrase(self, rng: Random, held_out: bool) -> str:
        """A plural noun phrase: [modifier] head [tail]."""
        head = self.draw("heads", rng, held_out)
        shape = rng.random()
        if shape < 0.65:
            head = f"{self.draw('modifiers', rng, held_out)} {head}"
        if shape > 0.85:
            head = f"{head} {self.draw('tails', rng, held_out)}"
        return head

    def reason(self, rng: Random, held_out: bool) -> str:
        """A clause: noun phrase + predicate."""
        return f"{self.noun_phrase(rng, held_out)} {self.draw('predicates', rng, held_out)}"


@cache
def load_lexicon() -> Lexicon:
    """The lexicon shipped in ``deliberation/data/lexicon.json``."""
    raw: dict[str, Any] = json.loads((DATA / "lexicon.json").read_text())
    lists: dict[str, Any] = {k: tuple(raw[k]) for k in ("modifiers", "heads", "tails", "predicates", "acts")}
    for name in ("concerns", "measures"):
        lists[name] = {kind: tuple(paraphrases) for kind, paraphrases in raw[name].items()}
    return Lexicon(**lists)


@cache
def noun_phrase_words() -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, ...]]]:
    """Modifiers, heads and tails (as word tuples), held-out ones too: what makes a noun phrase well formed."""
    lexicon = load_lexicon()
    return frozenset(lexicon.modifiers), frozenset(lexicon.heads), frozenset(tuple(t.split()) for t in lexicon.tails)


def is_noun_phrase(words: tuple[str, ...]) -> bool:
    """Whether ``words`` read [modifier] head [tail] with parts of the lexicon."""
    modifiers, heads, tails = noun_phrase_words()
    if words and words[0] in modifiers:
        words = words[1:]
    return bool(words) and words[0] in heads and (len(words) == 1 or words[1:] in tails)
