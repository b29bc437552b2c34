"""Words that do not exist, in the place of known ones, so that the models learn to copy what they have never read."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from deliberation.grammar import CONNECTORS, OPINION_FRAMES, STATEMENT_FRAMES
from deliberation.lexicon import load_lexicon
from deliberation.questions import load_questions

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
    question = set(re.findall(r"[a-z]{4,}", texts[0].lower())) - _fixed_words(True)
    present = {w for t in texts for w in re.findall(r"[a-z]{3,}", t.lower())} - _fixed_words(paraphrases) | question
    share = rng.choice((0.15, 0.3, 0.5, 0.8))
    taken = {w for t in texts for w in re.findall("[a-z]+", t.lower())}  # a word in use could not be told apart again
    replaced = {}
    for word in sorted(present):
        if rng.random() < share and (new := made_up_word(rng, pieces)) not in taken:
            replaced[word] = new
            taken.add(new)
    return replaced


def rename(text: str, words: dict[str, str]) -> str:
    """``text`` with whole words replaced, capitals kept."""

    def replacement(found: re.Match[str]) -> str:
        word = found.group()
        new = words.get(word.lower(), word)
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+", replacement, text) if words else text
