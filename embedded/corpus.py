"""What the embedded models read: endless documents of the training world (held-out topics, words, phrases never)."""

from __future__ import annotations

from random import Random

from deliberation.citizens import SLOTS, Group, draw_group
from deliberation.prompts import statement_prompt
from deliberation.questions import invented_question, load_questions
from deliberation.types import Question
from deliberation.writer import MIX, write_statement
from embedded.disguise import draw_disguise, shown_opinions
from embedded.leads import own_leads
from embedded.words import Pieces

INVENTED_SHARE = 0.55
"""Share of documents on questions built from the lexicon, so that claims are copied and not recalled."""
LEADS_SHARE = 0.6
"""Share of documents in which opinions begin, or end, their sentences in other words."""
REASONS_SHARE = 0.5
"""Share of groups that say reasons as often as anything else, as people who type do."""
STATEMENTS = 4
"""Statements about one group in a document; none sees another (``embedded/packing.py``)."""


def training_question(rng: Random) -> Question:
    """An invented question or one of our training topics."""
    return invented_question(rng) if rng.random() < INVENTED_SHARE else rng.choice(load_questions("train"))


def writer_document(rng: Random, pieces: Pieces | None = None) -> list[str]:
    """[prompt, completion, ...] as the base writer reads it: a group's prompt and mixed-quality statements about it."""
    group = training_group(rng)
    disguise = draw_disguise(group, rng, pieces)
    kinds = [k for k in MIX if k != "list" or not disguise.phrases]  # lists hold items that no prompt shows
    chosen = rng.choices(kinds, [MIX[k] for k in kinds], k=STATEMENTS)
    statements = [disguise.show(write_statement(group, rng, kind)) for kind in chosen]
    texts = [disguise.show(group.question.text), *shown_opinions(group, disguise), *statements]
    if rng.random() < LEADS_SHARE:
        texts = own_leads(texts, rng, pieces)
    prompt = statement_prompt(texts[0], texts[1:-STATEMENTS])
    return [prompt, *(f" {text}" for text in texts[-STATEMENTS:])]


def training_group(rng: Random) -> Group:
    """A group of the training world."""
    slots = "cmrr" if rng.random() < REASONS_SHARE else SLOTS
    return draw_group(training_question(rng), rng, slots=slots)
