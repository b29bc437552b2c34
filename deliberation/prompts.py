"""Prompt templates of Bakker et al. 2022 (arXiv 2211.15006, appendix), as pure string functions.

Opinions are data: every text is folded to one line, so none can fake an ``Opinion:`` line of its own.
"""

from __future__ import annotations

import re
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


def one_line(text: str) -> str:
    """Fold all white space (line breaks too) to single spaces and drop control characters."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"\s+", " ", printable).strip()


def _body(question: str, opinions: Sequence[str]) -> str:
    lines = [f"Question: {one_line(question)}", *(f"Opinion: {one_line(o)}" for o in opinions)]
    return "\n".join(lines)


def statement_prompt(question: str, opinions: Sequence[str]) -> str:
    """The zero-shot prompt, which is also the fine-tuned policy's. The completion is ``" " + statement``."""
    return f"{OPENING}\n{_body(question, opinions)}\n{CLOSING}"


def few_shot_statement_prompt(
    examples: Sequence[tuple[str, Sequence[str], str]], question: str, opinions: Sequence[str]
) -> str:
    """The few-shot prompt: worked examples of (question, opinions, consensus), then the new question."""
    blocks = [f"{_body(q, o)}\nConsensus: {one_line(s)}" for q, o, s in examples]
    return "\n".join([FEW_SHOT_OPENING, *blocks, f"{_body(question, opinions)}\nConsensus:"])


def preference_prefix(question: str, opinion: str) -> str:
    """What the preference model reads before the candidate: computed once a member, for all candidates."""
    return f"Question: {one_line(question)}\nOpinion: {one_line(opinion)}\nConsensus:"


def preference_suffix(statement: str) -> str:
    """What it reads after the prefix. Prefix and suffix are tokenised apart, in training and in scoring alike."""
    return f" {one_line(statement)}"


def clean_statement(completion: str) -> str:
    """A sampled completion as a statement: cut at the first line break, strip repeated prompt text and quotes."""
    text = completion.strip().split("\n", 1)[0].strip()
    for lead in (CLOSING, "Consensus:"):
        text = text.removeprefix(lead).strip()
    if len(text) >= 2 and text[0] in "\"'“‘" and text[-1] in "\"'”’":
        text = text[1:-1].strip()
    return one_line(text)
