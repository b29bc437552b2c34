"""Stances: opinions and statements of the human benchmark whose agreement follows from reading both.

People's votes tell little of the person (most of what can be predicted of them is which statements are popular). Here
no statement is popular: half of the members hold the opposite view on a public debate question (the data folder's
``train`` split).
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from benchmarks.human_people import Row, read

GROUPS, MEMBERS = 67, 8
"""Groups, and members of each."""
QUESTIONS = 5
"""Debate questions of one topic that a group's members hold stances on."""


def stance_rows(folder: Path, rng: random.Random) -> list[Row]:
    """Members who state their side on some questions of a topic, and vote on both sides of those."""
    topics: dict[int, list[Row]] = defaultdict(list)
    for r in read(folder, "questions.jsonl", ("affirming_statement", "negating_statement", "topic", "split")):
        if r["split"] == "train":
            topics[r["topic"]].append(r)
    large = sorted(topic for topic, questions in topics.items() if len(questions) > QUESTIONS)
    rows: list[Row] = []
    for number in range(GROUPS):
        questions = rng.sample(topics[rng.choice(large)], QUESTIONS)
        sides = [(q["negating_statement"], q["affirming_statement"]) for q in questions]
        for member in range(MEMBERS):
            stance = [rng.random() < 0.5 for _ in questions]
            said = rng.sample(range(QUESTIONS), rng.randint(2, QUESTIONS - 1))
            head = {
                "deliberation_id": f"stance/{number}",
                "member": member,
                "question": "What do you think of these matters?",
                "opinion": "\n".join(sides[k][stance[k]] for k in said),
                "topic": "stance",
            }
            for k in said:
                for side in (False, True):
                    rows.append(head | {"statement": sides[k][side], "vote": 1 if side == stance[k] else -1})
    return rows
