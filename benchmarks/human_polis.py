"""Polis conversations as training data: profiles drawn anew, and what a matrix factorisation says of statements.

A profile is drawn for every draw from what its person wrote and agreed with, as the published ones were made: the
model sees many opinions a person and learns none by heart. People are put in small groups that judge the same
statements, none of them in the profile that is read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.human_people import Row, Settings, grouped, held_out, read, row
from benchmarks.human_teacher import Factorisation, factorise

MIN_VOTES = 6
"""Fewer votes than this, and there is no profile and rest to draw."""
WRITTEN, ENDORSED = 5, 8
"""A published profile has at most so many statements the person wrote, and agreed with."""


@dataclass(frozen=True)
class Conversations:
    """Training people's votes on accepted statements.

    Attributes:
        questions: by conversation.
        text: by statement.
        votes: 1 or -1 by person and statement.
        written: each person's own statements.
        people: of each conversation, those who voted often enough.
    """

    questions: dict[str, str]
    text: dict[str, str]
    votes: dict[str, dict[str, int]]
    written: dict[str, list[str]]
    people: dict[str, list[str]]


def conversations(folder: Path) -> Conversations:
    """What the folder says of training people who are not left out for calibration."""
    questions = {r["conversation_id"]: r["question"] for r in read(folder, "polis_conversations.jsonl", ("question",))}
    statements = [
        r
        for r in read(folder, "polis_statements.parquet", ("statement_id", "text"))
        if r["moderated"] >= 0 and r["text"].strip()
    ]
    text = {r["statement_id"]: r["text"] for r in statements}
    train = {
        r["participant_id"]
        for r in read(folder, "polis_participants.parquet", ("split",))
        if r["split"] == "train" and not held_out(r["participant_id"])
    }
    votes: dict[str, dict[str, int]] = defaultdict(dict)
    place: dict[str, str] = {}
    for r in read(folder, "polis_votes.parquet", ("participant_id", "statement_id", "vote")):
        if r["participant_id"] in train and r["statement_id"] in text and r["vote"]:
            votes[r["participant_id"]][r["statement_id"]] = r["vote"]
            place[r["participant_id"]] = r["conversation_id"]
    written: dict[str, list[str]] = defaultdict(list)
    for r in statements:
        written[r["author_id"]].append(r["statement_id"])
    people: dict[str, list[str]] = defaultdict(list)
    for person, own in votes.items():
        if len(own) >= MIN_VOTES:
            people[place[person]].append(person)
    return Conversations(questions, text, votes, written, people)


def polis_votes(folder: Path, settings: Settings) -> list[Row]:
    """Rows of every draw: profile, and what the teacher says of up to ``settings.statements`` statements."""
    rng, known = random.Random(f"polis {settings.seed}"), conversations(folder)
    rows: list[Row] = []
    for place, people in tqdm(known.people.items(), desc="conversations"):
        likely = teach({person: known.votes[person] for person in people}, settings.seed)
        for draw in range(settings.draws):
            for number, group in enumerate(grouped(people, settings.group, rng)):
                order = list(dict.fromkeys(s for person in group for s in known.votes[person]))
                rng.shuffle(order)
                for member, person in enumerate(group):
                    profile = drawn(known.votes[person], known.written[person], rng)
                    opinion = "\n".join(known.text[s] for s in profile)
                    head = row(f"{place}/{draw}/{number}", member, known.questions[place], opinion, place)
                    others = [s for s in order if s not in profile and s not in known.written[person]]
                    rows += [
                        head | {"statement": known.text[s], "p_agree": likely[person][s]}
                        for s in (others[: settings.statements] if profile else ())
                    ]
    return rows


def teach(votes: dict[str, dict[str, int]], seed: int) -> dict[str, dict[str, float]]:
    """P(agree) of every person of one conversation with every statement they voted on between them."""
    people, names = list(votes), sorted({s for own in votes.values() for s in own})
    number = {s: k for k, s in enumerate(names)}
    cast = [(i, number[s], vote > 0) for i, person in enumerate(people) for s, vote in votes[person].items()]
    who, what, agreed = zip(*cast, strict=True)
    table = factorise(who, what, agreed, Factorisation(), seed)
    return {person: dict(zip(names, table[i].tolist(), strict=True)) for i, person in enumerate(people)}


def drawn(votes: dict[str, int], written: list[str], rng: random.Random) -> list[str]:
    """Statements of a profile: some that the person wrote, and others the person agreed with, at most half of them."""
    lines = rng.randint(2, ENDORSED)
    agreed = [s for s, vote in votes.items() if vote > 0 and s not in written]
    endorsed = rng.sample(agreed, min(lines, len(agreed) // 2))
    return rng.sample(written, min(WRITTEN, len(written), max(1, lines // 2))) + endorsed
