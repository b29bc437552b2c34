"""Prompt templates of Bakker et al. 2022 (arXiv 2211.15006, appendix), as pure string functions.

Opinions are data, never instructions: every text goes through :func:`sanitize`, so that none can look like a line of
the template. Training and scoring use the same functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

OPENING = (
    "A citizen's jury was tasked with coming up with consensus opinions on a range of different questions. "
    "Below we present one such question along with the opinions of each individual citizen followed by their "
    "consensus statement."
)
FEW_SHOT_OPENING = (
    "A citizen's jury was tasked with coming up with consensus opinions on a range of different questions. "
    "Below we list these questions along with the opinions of each individual citizen followed by their "
    "consensus statement."
)
CLOSING = "After a good debate, the citizen's jury came to the following consensus view:"


# ---------------------------------------------------------------- what users write

_JOINING = "\u0600-\u0dff"  # Arabic to Sinhala: here ZWNJ and ZWJ are spelling (Persian, Hindi, Malayalam ...)
_SYMBOLS = "\u00a9\u00ae\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_INVISIBLE = re.compile(
    f"(?<![{_JOINING}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINING}])"
    f"|(?<![{_SYMBOLS}])[\ufe0e\ufe0f]"  # a symbol may say once that it is text or emoji
    # The rest of Unicode's Default_Ignorable_Code_Point, tags and bidi controls among them, and the annotation marks.
    "|[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def one_line(text: str) -> str:
    """Unicode NFC on one line: white space and control characters are single spaces, what cannot be seen is gone.

    ZWNJ and ZWJ stay between letters of Arabic and Indic scripts, whose spelling needs them, and nowhere else: an emoji
    joined from several falls apart. Idempotent; takes any string, lone surrogates too.
    """
    while True:  # what goes may bring marks together that NFC then puts in another order: seldom more than one pass
        seen = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
        shown = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in seen)
        folded = " ".join(unicodedata.normalize("NFC", shown).split())
        if folded == text:
            return folded
        text = folded


def _loosely(sentence: str) -> str:
    """A pattern for the sentence with or without its spaces and its last stop, and with any apostrophe."""
    words = (re.escape(word).replace("'", "['’‘ʼ`´]") for word in sentence.rstrip(".:").lower().split())
    return " ?".join(words)


_SENTENCES = {s for text in (OPENING, FEW_SHOT_OPENING, CLOSING) for s in re.split(r"(?<=\.) ", text)}
_COLON = "[:∶꞉ː׃]"
_STRUCTURE = re.compile(
    f"(?:{'|'.join(map(_loosely, sorted(_SENTENCES)))})(?: ?(?:\\.|{_COLON}))?"
    f"|(?P<label>question|opinion|consensus) ?{_COLON}"
)


def _skeleton(line: str) -> str:
    """The line, character for character, in lower case and without fullwidth and other compatibility forms."""
    if line.isascii():
        return line.lower()
    forms = ((c, unicodedata.normalize("NFKC", c).lower()) for c in line)
    return "".join(form if len(form) == 1 else c for c, form in forms)


def sanitize(text: str) -> str:
    """``one_line`` without what the template itself writes: ``Opinion:`` is ``Opinion,``, its sentences are ``...``.

    Labels and sentences are found in any case, with or without spaces and in fullwidth letters too; look-alike letters
    of other scripts are other letters, and stay. Texts without any of it stay as they are. Idempotent.
    """
    line = one_line(text)
    parts, end = [], 0
    for found in _STRUCTURE.finditer(_skeleton(line)):
        label = line[slice(*found.span("label"))] if found["label"] else None
        parts += [line[end : found.start()], "..." if label is None else f"{label},"]
        end = found.end()
    return "".join([*parts, line[end:]])


REPEATED_WORDS = 5
"""Words at the end of a sentence that are a repetition if the text has said them before: fewer may be chance."""
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+(?=\s)|$)")


def said_once(line: str) -> str:
    """The text without ends of sentences that it has said before: saying a thing often gives it no weight.

    Sentences that say nothing else go whole, of others the beginning stays, with ``...``. Case and punctuation make no
    difference. Texts that do not repeat themselves stay as they are. Idempotent.

    Args:
        line: of ``sanitize``.
    """
    said, kept = " ", []
    for sentence in _SENTENCE.findall(line):
        words = sentence.split()
        plain = [re.sub(r"\W+", "", word).casefold() or word for word in words]
        repeated = REPEATED_WORDS - 1
        while repeated < len(words) and f" {' '.join(plain[-repeated - 1 :])} " in said:
            repeated += 1
        said += " ".join(plain) + " "
        if repeated < REPEATED_WORDS:
            kept.append(sentence)
        elif repeated < len(words):
            kept.append(" ".join(words[:-repeated]) + " ...")
    return " ".join(kept)


# ---------------------------------------------------------------- templates


def _body(question: str, opinions: Sequence[str]) -> str:
    lines = [f"Question: {sanitize(question)}", *(f"Opinion: {said_once(sanitize(o))}" for o in opinions)]
    return "\n".join(lines)


def statement_prompt(question: str, opinions: Sequence[str]) -> str:
    """The zero-shot prompt, which is also the fine-tuned policy's. The completion is ``" " + statement``."""
    return f"{OPENING}\n{_body(question, opinions)}\n{CLOSING}"


def few_shot_statement_prompt(
    examples: Sequence[tuple[str, Sequence[str], str]], question: str, opinions: Sequence[str]
) -> str:
    """The few-shot prompt: worked examples of (question, opinions, consensus), then the new question."""
    blocks = [f"{_body(q, o)}\nConsensus: {sanitize(s)}" for q, o, s in examples]
    return "\n".join([FEW_SHOT_OPENING, *blocks, f"{_body(question, opinions)}\nConsensus:"])


def preference_prefix(question: str, opinion: str) -> str:
    """What the preference model reads before the candidate: computed once a member, for all candidates."""
    return f"Question: {sanitize(question)}\nOpinion: {sanitize(opinion)}\nConsensus:"


def preference_suffix(statement: str) -> str:
    """What it reads after the prefix. Prefix and suffix are tokenised apart, in training and in scoring alike."""
    return f" {sanitize(statement)}"


def clean_statement(completion: str) -> str:
    """A sampled completion as a statement: cut at the first line break, strip repeated prompt text and quotes around it
    (not those of a first and a last word)."""
    text = completion.strip().split("\n", 1)[0].strip()
    for lead in (CLOSING, "Consensus:"):
        text = text.removeprefix(lead).strip()
    if len(text) >= 2 and text[0] in "\"'“‘" and text[-1] in "\"'”’":
        marks = f"[{text[0]}{text[-1]}]"
        if not re.search(f"(?<!\\w){marks}|{marks}(?!\\w)", text[1:-1]):  # between letters it is an apostrophe
            text = text[1:-1].strip()
    return sanitize(text)
