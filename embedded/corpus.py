"""What the embedded models read: endless documents of the training world (held-out topics, words, phrases never)."""

from __future__ import annotations

from random import Random

from deliberation.citizens import Group, draw_group
from deliberation.lexicon import load_lexicon
from deliberation.prompts import statement_prompt
from deliberation.questions import invented_question, load_questions
from deliberation.types import Question
from deliberation.writer import write_statement

INVENTED_SHARE = 0.55
"""Share of documents on questions built from the lexicon, so that claims are copied and not recalled."""
FOREIGN_SHARE = 0.25
"""Share of documents in which some words are replaced, wherever they stand, by words that do not exist."""
SYLLABLES = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "on", "all")]


def training_question(rng: Random) -> Question:
    """An invented question or one of our training topics."""
    return invented_question(rng) if rng.random() < INVENTED_SHARE else rng.choice(load_questions("train"))


def foreign_words(texts: list[str], rng: Random) -> list[str]:
    """Replace one to four of the lexicon's words in all ``texts`` alike by made-up words."""
    lexicon = load_lexicon()
    known = set(lexicon.modifiers) | set(lexicon.heads)
    present = sorted({w.strip(".,?") for t in texts for w in t.lower().split()} & known)
    for word in rng.sample(present, min(len(present), rng.randint(1, 4))):
        new = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) + ("s" if word.endswith("s") else "")
        capital = (word[0].upper() + word[1:], new[0].upper() + new[1:])
        texts = [t.replace(word, new).replace(*capital) for t in texts]
    return texts


def writer_document(rng: Random) -> tuple[str, str]:
    """(prompt, completion) as the base writer reads it: a group's prompt and a mixed-quality statement."""
    group = training_group(rng)
    texts = [group.question.text, write_statement(group, rng), *(c.opinion for c in group.citizens)]
    if rng.random() < FOREIGN_SHARE:
        texts = foreign_words(texts, rng)
    return statement_prompt(texts[0], texts[2:]), f" {texts[1]}"


def training_group(rng: Random) -> Group:
    """A group of the training world."""
    return draw_group(training_question(rng), rng)
