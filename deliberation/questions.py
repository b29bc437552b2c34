"""Debate questions: ours, shipped inside the package and split by topic, or a reader's own file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from deliberation.datasets import read_table
from deliberation.lexicon import DATA, load_lexicon
from deliberation.types import InputError, Question

FOREIGN_COLUMNS = ("question", "affirming_statement", "negating_statement", "topic")
SPLITS = ("train", "validation", "test")
MAX_CLAIM_WORDS = 13
"""Claims longer than this are left out of foreign question files: the embedded models write one-line statements."""


@cache
def _shipped() -> tuple[tuple[str, Question], ...]:
    rows = read_table(DATA / "questions.jsonl", ("split", "id", "question", "affirming", "negating", "topic"))
    return tuple(
        (r["split"], Question(r["id"], r["question"], r["affirming"], r["negating"], r["topic"])) for r in rows
    )


def load_questions(split: str) -> list[Question]:
    """Our own debate questions of one split (``train``, ``validation`` or ``test``); whole topics are held out.

    Raises:
        InputError: on another split.
    """
    if split not in SPLITS:
        raise InputError("split", split, f"use one of {', '.join(SPLITS)}")
    return [question for name, question in _shipped() if name == split]


def read_questions(path: str | Path, *, splits: tuple[str, ...] = ()) -> list[Question]:
    """Questions of a JSONL file with ``question``, ``affirming_statement``, ``negating_statement``, ``topic``.

    Args:
        path: the file.
        splits: if given, only rows whose ``split`` is one of these.

    Raises:
        InputError: if the file or a column is missing, or the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("questions", str(path), "no such file; give a JSONL file of debate questions")
    found = []
    for number, row in enumerate(read_table(path, FOREIGN_COLUMNS), 1):
        affirming, negating = row["affirming_statement"], row["negating_statement"].replace(" NOT ", " not ")
        plain = not any(c in affirming + negating for c in ",;:") and affirming != negating
        wanted = not splits or row.get("split") in splits
        if plain and wanted and len(affirming.split()) <= MAX_CLAIM_WORDS:
            found.append(Question(str(row.get("id", number)), row["question"], affirming, negating, str(row["topic"])))
    return found


def invented_question(rng: Random, held_out: bool = False) -> Question:
    """A question built from the lexicon: endless new claims, so that a model learns to copy and not to recall."""
    lexicon = load_lexicon()
    if rng.random() < 0.25:
        kind = rng.choice(sorted(lexicon.measures))
        measure = rng.choice(lexicon.measures[kind]).format(np=lexicon.noun_phrase(rng, held_out))
        return Question(
            "invented",
            f"Should there be {measure}?",
            f"There should be {measure}.",
            f"There should not be {measure}.",
            "invented",
        )
    subject, act = lexicon.noun_phrase(rng, held_out), lexicon.draw("acts", rng, held_out)
    capital = subject[0].upper() + subject[1:]
    text = rng.choice([f"Should {subject} {act}?"] * 3 + [f"Is it right that {subject} should {act}?"])
    return Question("invented", text, f"{capital} should {act}.", f"{capital} should not {act}.", "invented")
