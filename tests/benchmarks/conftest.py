"""A made-up folder of people, opinions, statements and votes, in the schema the benchmark reads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SPLITS = {"train": 24, "val_participant": 12, "new_conversation": 12}
STATEMENTS = 8
TRAINED_PEOPLE, TRAINED_STATEMENTS = 120, 14
"""Of each place in the fixture ``folder``."""
TOPICS = "parks buses schools rivers".split()


def write_folder(
    folder: Path, *, sets: tuple[str, ...] = ("polis", "remesh"), splits: dict[str, int] | None = None, seed: int = 0
) -> Path:
    """Write a folder; ``splits``: people a split. Half of all people like the topic they are asked about."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sets:
        _write_set(folder, name, SPLITS if splits is None else splits, np.random.default_rng(seed))
    return folder


@pytest.fixture
def people():
    """``write_folder``."""
    return write_folder


def _write_set(folder: Path, name: str, splits: dict[str, int], rng: np.random.Generator) -> None:
    profiles, targets, choices, statements, conversations = [], [], [], [], []
    for split, people in splits.items():
        for half in range(2):
            topic = TOPICS[(len(conversations)) % len(TOPICS)]
            place = f"{name}-{split}-{half}"
            conversations.append({"conversation_id": place, "question_id": place, "question": f"More {topic}?"})
            for k in range(STATEMENTS):
                verb = "want more" if k % 2 else "need fewer"
                text = f"We {verb} {topic}" + " indeed" * k
                statements.append({"statement_id": f"{place}/s{k}", "conversation_id": place, "text": text})
            for i in range(people // 2):
                likes = bool(i % 2)
                who, profile = f"{place}/p{i}", f"{place}/p{i}#q"
                opinion = f"I {'want more' if likes else 'need fewer'} {topic}\nnumber {i}"
                common = {"profile_id": profile, "conversation_id": place, "participant_id": who, "split": split}
                profiles.append({**common, "opinion_text": opinion})
                for k in range(STATEMENTS):
                    label = int((bool(k % 2) == likes) != (rng.random() < 0.2))
                    row = {"statement_id": f"{place}/s{k}", "label": label, "label_raw": 2 * label - 1}
                    targets.append({**common, **row})
                sides = {"statement_a": f"{place}/s0", "statement_b": f"{place}/s1", "question_id": place}
                choices.append({**common, **sides, "choice": "b" if likes else "a"})
                choices.append({**common, **sides, "choice": "unsure"})
    rows = {"profiles": profiles, "targets": targets, "statements": statements}
    rows |= {"preferences": choices} if name == "remesh" else {}
    for table, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / f"{name}_{table}.parquet")
    file = "polis_conversations.jsonl" if name == "polis" else "remesh_questions.jsonl"
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in conversations))


@pytest.fixture
def folder(tmp_path):
    """Made-up people in the benchmark's schema: two conversations, every third person outside ``train``."""
    rng = random.Random(0)

    def write(name, rows):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")

    def lines(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, key in (("polis", "conversation_id"), ("remesh", "question_id")):
        places = [f"{name}-{k}" for k in range(2)]
        people = [
            (f"{place}/p{i}", place, "train" if i % 3 else "val") for place in places for i in range(TRAINED_PEOPLE)
        ]
        statements = [
            {
                "statement_id": f"{place}/s{k}",
                "question_id": place,
                "text": f"{place} says {k}",
                "author_id": f"{place}/p{k}",
                "moderated": 0 if k else -1,
            }
            for place in places
            for k in range(TRAINED_STATEMENTS)
        ]
        table = {"polis": "conversations", "remesh": "questions"}[name]
        lines(f"{name}_{table}", [{key: place, "question": f"{place}?"} for place in places])
        write(f"{name}_statements", statements)
        profiles = [
            {
                "profile_id": f"{who}#",
                "conversation_id": place,
                "participant_id": who,
                "split": split,
                "opinion_text": f"{who} thinks",
            }
            for who, place, split in people
        ]
        votes = [
            {
                "participant_id": who,
                "conversation_id": place,
                "statement_id": f"{place}/s{k}",
                "vote": rng.choice((1, 1, -1, 0)),
                "profile_id": f"{who}#",
                "label": rng.randint(0, 1),
                "split": split,
            }
            for who, place, split in people
            for k in range(TRAINED_STATEMENTS)
        ]
        write(f"{name}_profiles", profiles)
        write(f"{name}_targets", votes)
        write(f"{name}_votes", votes)
        write(f"{name}_participants", [{"participant_id": who, "split": split} for who, _, split in people])
        choices = [
            {
                "profile_id": f"{who}#",
                "statement_a": f"{place}/s1",
                "statement_b": f"{place}/s2",
                "choice": rng.choice(("a", "b", "unsure")),
                "split": split,
            }
            for who, place, split in people
        ]
        write(f"{name}_preferences", choices)
    sides = [
        {"affirming_statement": f"yes {k}", "negating_statement": f"no {k}", "topic": 1, "split": "train"}
        for k in range(8)
    ]
    lines("questions", [*sides, {**sides[0], "affirming_statement": "held out", "split": "val_question"}])
    return tmp_path
