"""What the embedded models read: endless documents of the training world (held-out topics, words, phrases never)."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from deliberation.citizens import Group, draw_group
from deliberation.grammar import (
    CONNECTORS,
    OPINION_CONCERN,
    OPINION_FRAMES,
    OPINION_MEASURE,
    OPINION_REASON,
    STATEMENT_FRAMES,
)
from deliberation.lexicon import load_lexicon
from deliberation.prompts import statement_prompt
from deliberation.questions import invented_question, load_questions
from deliberation.types import Question
from deliberation.writer import write_statement

INVENTED_SHARE = 0.55
"""Share of documents on questions built from the lexicon, so that claims are copied and not recalled."""
FOREIGN_SHARE = 0.8
"""Share of documents in which some words are replaced, wherever they stand, by words that do not exist: the claims and
phrases of a new topic are made of words, and of pieces of words, that a model must copy without knowing them."""
OPEN_SHARE = 0.7
"""Share of those documents in which the words of paraphrases are replaced too, and share of all documents in which
opinions begin their sentences in other words."""
LEADS = {
    "concern": (
        """I worry about|I care about|I am worried about|I think of|Think of|Think about|Do not forget|
        Nobody talks about|It is all about|We must not ignore|We need to protect|My concern is|I am afraid of|
        The real issue is|Most of all I care about|I keep thinking of|There is also"""
    ),
    "measure": (
        """We need|We should have|Give us|I propose|Why not try|I hope for|The answer is|It would help to have|
        I would be happy with|Let us have|I would support|There must be|I ask for"""
    ),
    "reason": (
        """The fact is that|After all|I have seen that|Remember that|The trouble is that|Everyone knows that|
        I hear that"""
    ),
    "condition": (
        """I could live with it if there were|I could accept it if we had|It would be fine with|I would agree if we got|
        Fine by me if there were|I would say yes to it with|I might agree given"""
    ),
}
"""Ways to begin a sentence of an opinion that the citizens' grammar does not know: people who type have their own."""
STATEMENTS = 4
"""Statements about one group in a document; none sees another (``embedded/packing.py``)."""
FIXED = frozenset(
    """should would could there right better with without that this from into more less than and are but for had has
    have its may nor not one our out own she the their them they too two was were what when where which while who whom
    will you your about after all any been being can did does each every how some such those these under over""".split()
)
"""Words of the frames around a claim and function words, never replaced."""
ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sl sp st str t th tr v w".split()
VOWELS = "a e i o u a e i o u ai ea ee ou oa ie".split()
CODAS = "b ck ct d ft g ght l ld ll lt m mp n nce nd ng nk nt p r rd rk rn rs s sh sk ss st t th x".split()
ENDINGS = "s es ing ed er ers tion tions ment ments al ity ness able age ists ies ance ees".split()


def training_question(rng: Random) -> Question:
    """An invented question or one of our training topics."""
    return invented_question(rng) if rng.random() < INVENTED_SHARE else rng.choice(load_questions("train"))


Pieces = tuple[tuple[str, ...], tuple[str, ...]]
"""Pieces of the tokenizer's vocabulary that start a word, and that go on with one."""


def made_up_word(rng: Random, pieces: Pieces | None = None) -> str:
    """A word that does not exist: pieces of the vocabulary (if given), syllables, or the halves of two known words.

    Pieces make every entry of the vocabulary one that has been copied, also those that no training text uses.
    """
    if pieces and rng.random() < 0.6:
        return rng.choice(pieces[0]) + "".join(rng.choices(pieces[1], k=rng.choice((0, 1, 1, 2))))
    if rng.random() < 0.5:
        syllables = ["".join((rng.choice(ONSETS), rng.choice(VOWELS), rng.choice(CODAS))) for _ in range(2)]
        return "".join(syllables[: rng.choice((1, 1, 2))]) + (rng.choice(ENDINGS) if rng.random() < 0.7 else "")
    first, last = rng.choice(_content_words()), rng.choice(_content_words())
    return first[: rng.randint(2, len(first) - 1)] + last[-rng.randint(2, len(last) - 1) :]


@cache
def _content_words() -> tuple[str, ...]:
    """The training world's longer words."""
    texts = [f"{q.text} {q.affirming}" for q in load_questions("train")]
    rng, lexicon = Random("content words"), load_lexicon()
    texts += [lexicon.reason(rng, False) for _ in range(2000)]
    return tuple(sorted({w for t in texts for w in re.findall(r"[a-z]{5,}", t.lower())}))


@cache
def _fixed_words(paraphrases: bool) -> frozenset[str]:
    """Words of the frames, which carry the grammar, and, unless they are open too, of the lexicon's paraphrases."""
    lexicon, frames = load_lexicon(), (*STATEMENT_FRAMES, *OPINION_FRAMES)
    parts = [word for frame in frames for word in (*frame.pre, *frame.post)]
    parts += [word for words in CONNECTORS for word in words]
    for table in () if paraphrases else (lexicon.concerns, lexicon.measures):
        parts += [word for phrases in table.values() for phrase in phrases for word in phrase.split()]
    return FIXED | frozenset(parts)


def foreign_words(
    texts: list[str], rng: Random, pieces: Pieces | None = None, paraphrases: bool = False
) -> dict[str, str]:
    """A replacement for some of the words of ``texts`` outside the grammar: known word -> made-up word.

    Few of them in some texts, nearly all in others: a new topic's words are all unknown. With ``paraphrases`` the words
    of the lexicon's phrases around a noun are replaced too, as a person's own way to put a concern is unknown.
    """
    question = set(re.findall(r"[a-z]{4,}", texts[0].lower())) - FIXED
    present = {w for t in texts for w in re.findall(r"[a-z]{3,}", t.lower())} - _fixed_words(paraphrases) | question
    share = rng.choice((0.15, 0.3, 0.5, 0.8))
    return {word: made_up_word(rng, pieces) for word in sorted(present) if rng.random() < share}


def rename(text: str, words: dict[str, str]) -> str:
    """``text`` with whole words replaced, capitals kept."""

    def replacement(found: re.Match[str]) -> str:
        word = found.group()
        new = words.get(word.lower(), word)
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+", replacement, text) if words else text


def own_leads(texts: list[str], rng: Random, pieces: Pieces | None = None) -> list[str]:
    """``texts`` with the openings of opinion sentences that take something up put in other words, alike in all."""
    for frame in OPINION_CONCERN + OPINION_MEASURE + OPINION_REASON:
        if not frame.pre or frame.post or frame.value != 1 or rng.random() < 0.3:
            continue
        choices = [" ".join(c.split()) for c in LEADS[frame.use if frame.use == "condition" else frame.slot].split("|")]
        made_up = " ".join(made_up_word(rng, pieces) for _ in range(rng.randint(1, 4))).capitalize()
        known = " ".join(frame.pre)
        known = f"{known[0].upper()}{known[1:]}"
        if frame.slot == "reason" and rng.random() < 0.5:  # most people just say it: "Parents cannot get to work."
            texts = [re.sub(f"{known} ([a-z])", lambda found: found.group(1).upper(), text) for text in texts]
            continue
        lead = rng.choice(choices) if rng.random() < 0.7 else made_up
        texts = [text.replace(f"{known} ", f"{lead} ") for text in texts]
    return texts


def writer_document(rng: Random, pieces: Pieces | None = None) -> list[str]:
    """[prompt, completion, ...] as the base writer reads it: a group's prompt and mixed-quality statements about it."""
    group = training_group(rng)
    statements = [write_statement(group, rng) for _ in range(STATEMENTS)]
    texts = [group.question.text, *(c.opinion for c in group.citizens), *statements]
    if rng.random() < FOREIGN_SHARE:
        prompted = texts[:-STATEMENTS]  # a made-up word that no prompt shows could not be predicted
        words = foreign_words(prompted, rng, pieces, paraphrases=rng.random() < OPEN_SHARE)
        texts = [rename(t, words) for t in texts]
    if rng.random() < OPEN_SHARE:
        texts = own_leads(texts, rng, pieces)
    prompt = statement_prompt(texts[0], texts[1:-STATEMENTS])
    return [prompt, *(f" {text}" for text in texts[-STATEMENTS:])]


def training_group(rng: Random) -> Group:
    """A group of the training world."""
    return draw_group(training_question(rng), rng)
