"""Dialogues as training data: votes and choices.

Who chose neither of two answers because they agree, or disagree, with both has voted on both.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.human_people import Row, Settings, grouped, held_out, read, row

BOTH = {"agree_both": 1, "disagree_both": -1}
"""Answers to the choice between two that are votes on each."""

CHOICES = 5
"""Most choices of one profile in one group."""


@dataclass(frozen=True)
class Dialogues:
    """What training people who are not left out for calibration did in dialogues.

    Attributes:
        questions: by dialogue question.
        profiles: by profile.
        votes: (statement, 1 or -1) of each profile.
        choices: (chosen, rejected) of each profile.
    """

    questions: dict[str, str]
    profiles: dict[str, Row]
    votes: dict[str, list[tuple[str, int]]]
    choices: dict[str, list[tuple[str, str]]]


def dialogues(folder: Path) -> Dialogues:
    """Read from the folder's tables."""
    questions = {r["question_id"]: r["question"] for r in read(folder, "remesh_questions.jsonl", ("question",))}
    text = {r["statement_id"]: r["text"] for r in read(folder, "remesh_statements.parquet", ("statement_id", "text"))}
    profiles = {
        r["profile_id"]: r
        for r in read(folder, "remesh_profiles.parquet", ("profile_id", "opinion_text"))
        if r["split"] == "train" and not held_out(r["participant_id"])
    }
    found = Dialogues(questions, profiles, defaultdict(list), defaultdict(list))
    for r in read(folder, "remesh_targets.parquet", ("profile_id", "statement_id", "label")):
        if r["profile_id"] in profiles:
            found.votes[r["profile_id"]].append((text[r["statement_id"]], 1 if r["label"] else -1))
    for r in read(folder, "remesh_preferences.parquet", ("profile_id", "choice")):
        if r["profile_id"] in profiles:
            a, b = text[r["statement_a"]], text[r["statement_b"]]
            if r["choice"] in ("a", "b") and a != b:
                found.choices[r["profile_id"]].append((a, b) if r["choice"] == "a" else (b, a))
            if r["choice"] in BOTH:
                voted = {answer for answer, _ in found.votes[r["profile_id"]]}
                new = [answer for answer in dict.fromkeys((a, b)) if answer not in voted]
                found.votes[r["profile_id"]] += [(answer, BOTH[r["choice"]]) for answer in new]
    return found


def dialogue_rows(folder: Path, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Votes and choices of the dialogues' training people, every profile in ``settings.repeats`` groups."""
    rng, known = random.Random(f"remesh {settings.seed}"), dialogues(folder)
    people: dict[str, list[str]] = defaultdict(list)
    for name, profile in known.profiles.items():
        people[profile["conversation_id"]].append(name)
    votes: list[Row] = []
    choices: list[Row] = []
    for repeat in range(settings.repeats):
        for place, members in people.items():
            for number, group in enumerate(grouped(members, 2 * settings.group, rng)):
                for member, name in enumerate(group):
                    opinion = known.profiles[name]["opinion_text"]
                    head = row(f"{place}/{repeat}/{number}", member, known.questions[place], opinion, place)
                    votes += [head | {"statement": text, "vote": vote} for text, vote in known.votes[name]]
                    few = rng.sample(known.choices[name], min(CHOICES, len(known.choices[name])))
                    choices += [head | {"chosen": chosen, "rejected": rejected} for chosen, rejected in few]
    return votes, choices
