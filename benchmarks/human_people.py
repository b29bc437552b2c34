"""What the parts of the human benchmark's training data share: settings, reading tables, who is left out, groups."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deliberation.datasets import read_table
from deliberation.types import InputError

CALIBRATION_SHARE = 0.08
"""Share of the training people who are left out of training for calibration."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is drawn: ``draws`` profiles a Polis person and ``repeats`` of each dialogue profile, in groups of
    ``group`` members (twice as many in dialogues). A Polis member judges ``statements`` statements."""

    draws: int = 3
    repeats: int = 2
    group: int = 8
    statements: int = 16
    seed: int = 0


def held_out(person: str) -> bool:
    """Whether a training person is left out for calibration: decided by a hash of the id."""
    return int(hashlib.sha256(person.encode()).hexdigest()[:8], 16) / 16**8 < CALIBRATION_SHARE


def read(folder: Path, name: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows of one table of the folder, with an error that names what is missing."""
    if not (folder / name).is_file():
        raise InputError("data", str(folder), f"has no {name}; give a folder of the benchmark's schema")
    return read_table(folder / name, columns)


def grouped(people: list[str], size: int, rng: random.Random) -> list[list[str]]:
    """People in random groups of ``size``; the last may be smaller."""
    order = list(people)
    rng.shuffle(order)
    return [order[k : k + size] for k in range(0, len(order), size)]


def row(deliberation: str, member: int, question: str, opinion: str, topic: str) -> Row:
    return {"deliberation_id": deliberation, "member": member, "question": question, "opinion": opinion, "topic": topic}
