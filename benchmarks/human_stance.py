"""Warm-up data of the human benchmark: opinions and statements whose agreement follows from reading both.

People's votes tell little of the person (most of what can be predicted of them is which statements are popular), so an
encoder that starts there learns statements alone. Here no statement is popular: half of the members hold the opposite
view. Stances on public debate questions (the data folder's ``train`` split), and simulated citizens as votes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from deliberation.citizens import draw_group
from deliberation.datasets import read_table
from deliberation.questions import load_questions
from deliberation.writer import write_statement
from evaluation.gold import noisy_ratings

GROUPS = 170
"""Groups of either kind."""
MEMBERS = 8
QUESTIONS = 5
"""Debate questions of one topic that a group's members hold stances on."""

Row = dict[str, Any]


def stance_rows(folder: Path, rng: random.Random) -> list[Row]:
    """Members who state their side on some questions of a topic, and vote on both sides of those."""
    topics: dict[int, list[Row]] = defaultdict(list)
    for r in read_table(folder / "questions.jsonl", ("affirming_statement", "negating_statement", "topic", "split")):
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


def citizen_rows(rng: random.Random) -> list[Row]:
    """Simulated citizens' noisy ratings of candidates, sides and each other's opinions; a neutral 4 is left out."""
    questions, rows = load_questions("train"), []
    for number in range(GROUPS):
        group = draw_group(rng.choice(questions), rng, size=MEMBERS)
        texts = list(dict.fromkeys(write_statement(group, rng) for _ in range(8)))
        texts += [group.question.affirming, group.question.negating]
        texts += rng.sample([citizen.opinion for citizen in group.citizens], 2)
        for r in noisy_ratings(group, f"citizens/{number}", texts, f"warm-up {number}"):
            if r.agreement != 4 and r.statement != r.opinion:
                rows.append({
                    "deliberation_id": r.deliberation_id, "member": r.member, "question": r.question,
                    "opinion": r.opinion, "topic": "citizens", "statement": r.statement,
                    "vote": 1 if r.agreement > 4 else -1,
                })  # fmt: skip
    return rows
