"""Votes of real people as index arrays: one folder of profiles, statements and votes in, one ``VoteSet`` a set out.

Only texts leave this file: a predictor reads question, opinion and statement, never another person's vote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deliberation.types import InputError

SETS = ("polis", "remesh")
TRAIN = "train"
IntArray = NDArray[np.int64]

_QUESTIONS = {
    "polis": ("polis_conversations.jsonl", "conversation_id"),
    "remesh": ("remesh_questions.jsonl", "question_id"),  # a profile's conversation_id is the question's id there
}


@dataclass(frozen=True)
class Split:
    """The votes and the a/b choices of one split; persons are numbered 0 .. ``persons`` - 1 within it.

    Attributes:
        name: e.g. ``val_participant``.
        persons: number of people with a vote or a choice.
        pairs: (profile, statement) of each vote, int [votes, 2], indices into the ``VoteSet``.
        labels: 1 agree, 0 disagree, [votes].
        person: who voted, [votes].
        preferred, other: (profile, statement) of the chosen and of the rejected statement, int [choices, 2].
        chooser: who chose, [choices].
    """

    name: str
    persons: int
    pairs: IntArray
    labels: IntArray
    person: IntArray
    preferred: IntArray
    other: IntArray
    chooser: IntArray


@dataclass(frozen=True)
class VoteSet:
    """One set of a folder: ``polis`` or ``remesh``.

    Attributes:
        name: the set.
        opinions, questions: what a model may read of each profile.
        places: (conversation, split) of each profile; swaps stay inside it.
        owners: person id of each profile.
        statements: text of each statement.
        splits: by name, in order of first appearance in the targets.
    """

    name: str
    opinions: list[str]
    questions: list[str]
    places: list[tuple[str, str]]
    owners: list[str]
    statements: list[str]
    splits: dict[str, Split]

    @property
    def measured(self) -> list[Split]:
        """Every split but ``train``."""
        return [split for name, split in self.splits.items() if name != TRAIN]


def load_sets(folder: str | Path) -> dict[str, VoteSet]:
    """The sets whose targets are in ``folder``.

    Raises:
        InputError: no folder, neither set, a file or a column missing, or an id that points nowhere.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError("data", str(path), "is not a folder; give one with polis_targets.parquet and its tables")
    present = [name for name in SETS if (path / f"{name}_targets.parquet").is_file()]
    if not present:
        raise InputError("data", str(path), f"has neither {' nor '.join(f'{name}_targets.parquet' for name in SETS)}")
    return {name: _load(path, name) for name in present}


def limited(split: Split, persons: int, rng: np.random.Generator) -> Split:
    """The split with at most ``persons`` people, drawn at random; numbers are given anew."""
    if persons >= split.persons:
        return split
    kept = np.sort(rng.choice(split.persons, persons, replace=False))
    number = np.full(split.persons, -1, dtype=np.int64)
    number[kept] = np.arange(persons)
    votes, choices = number[split.person] >= 0, number[split.chooser] >= 0
    return replace(
        split,
        persons=persons,
        pairs=split.pairs[votes],
        labels=split.labels[votes],
        person=number[split.person[votes]],
        preferred=split.preferred[choices],
        other=split.other[choices],
        chooser=number[split.chooser[choices]],
    )


def swapped_profiles(data: VoteSet, profiles: IntArray, rng: np.random.Generator) -> IntArray:
    """For each profile another person's, uniform over its conversation and split; -1 where there is none.

    A profile that stands several times in ``profiles`` gets the same stand-in each time.
    """
    pools: dict[tuple[str, str], list[int]] = {}
    for i, place in enumerate(data.places):
        pools.setdefault(place, []).append(i)
    stand_in = {}
    for i in np.unique(profiles).tolist():
        others = [k for k in pools[data.places[i]] if data.owners[k] != data.owners[i]]
        stand_in[i] = others[rng.integers(len(others))] if others else -1
    return np.array([stand_in[i] for i in profiles.tolist()], dtype=np.int64)


def _load(path: Path, name: str) -> VoteSet:
    profiles = _table(path / f"{name}_profiles.parquet", "profile_id conversation_id participant_id split opinion_text")
    statements = _table(path / f"{name}_statements.parquet", "statement_id text")
    targets = _table(path / f"{name}_targets.parquet", "profile_id participant_id statement_id label split")
    choices = _choices(path, name)
    questions = _questions(path, name)
    for conversation in profiles["conversation_id"]:
        if conversation not in questions:
            raise InputError(f"{name}_profiles", conversation, f"has no question in {_QUESTIONS[name][0]}")
    profile, statement = _numbers(profiles["profile_id"]), _numbers(statements["statement_id"])
    splits = {}
    for split in dict.fromkeys(targets["split"]):
        splits[split] = _split(split, targets, choices, profile, statement)
    return VoteSet(
        name,
        profiles["opinion_text"],
        [questions[c] for c in profiles["conversation_id"]],
        list(zip(profiles["conversation_id"], profiles["split"], strict=True)),
        profiles["participant_id"],
        statements["text"],
        splits,
    )


def _split(
    name: str, targets: dict[str, list], choices: dict[str, list], profile: dict[str, int], statement: dict[str, int]
) -> Split:
    votes = [i for i, split in enumerate(targets["split"]) if split == name]
    sides = [i for i, split in enumerate(choices["split"]) if split == name and choices["choice"][i] in ("a", "b")]
    voters = [targets["participant_id"][i] for i in votes]
    choosers = [choices["participant_id"][i] for i in sides]
    person = _numbers(sorted({*voters, *choosers}))
    labels = np.array([targets["label"][i] for i in votes], dtype=np.int64)
    if not np.isin(labels, (0, 1)).all():
        raise InputError("label", np.unique(labels).tolist(), "must be 0 (disagree) or 1 (agree)")
    first, second = [choices["statement_a"][i] for i in sides], [choices["statement_b"][i] for i in sides]
    took_a = [choices["choice"][i] == "a" for i in sides]
    own = _look_up(profile, [choices["profile_id"][i] for i in sides], "profile_id")
    better = [a if took else b for a, b, took in zip(first, second, took_a, strict=True)]
    worse = [b if took else a for a, b, took in zip(first, second, took_a, strict=True)]
    return Split(
        name,
        len(person),
        np.stack(
            [
                _look_up(profile, [targets["profile_id"][i] for i in votes], "profile_id"),
                _look_up(statement, [targets["statement_id"][i] for i in votes], "statement_id"),
            ],
            axis=1,
        ),
        labels,
        _look_up(person, voters, "participant_id"),
        np.stack([own, _look_up(statement, better, "statement_id")], axis=1),
        np.stack([own, _look_up(statement, worse, "statement_id")], axis=1),
        _look_up(person, choosers, "participant_id"),
    )


def _choices(path: Path, name: str) -> dict[str, list]:
    """The a/b choices; empty where the set has none."""
    columns = "profile_id participant_id statement_a statement_b choice split"
    file = path / f"{name}_preferences.parquet"
    return _table(file, columns) if file.is_file() else {column: [] for column in columns.split()}


def _table(file: Path, columns: str) -> dict[str, list]:
    if not file.is_file():
        raise InputError(file.name, str(file.parent), "is missing there; a set needs profiles, statements and targets")
    missing = set(columns.split()) - set(pq.read_schema(file).names)
    if missing:
        raise InputError(file.name, sorted(missing), "are missing columns")
    return pq.read_table(file, columns=columns.split()).to_pydict()


def _questions(path: Path, name: str) -> dict[str, str]:
    file, key = _QUESTIONS[name]
    if not (path / file).is_file():
        raise InputError(file, str(path), "is missing there; it holds the question of each conversation")
    rows: list[dict[str, Any]] = [json.loads(line) for line in (path / file).read_text().splitlines() if line.strip()]
    return {row[key]: row["question"] for row in rows}


def _numbers(ids: Iterable[str]) -> dict[str, int]:
    return {value: i for i, value in enumerate(ids)}


def _look_up(number: dict[str, int], ids: list[str], field: str) -> IntArray:
    for value in ids:
        if value not in number:
            raise InputError(field, value, "is not in its table")
    return np.array([number[value] for value in ids], dtype=np.int64)
