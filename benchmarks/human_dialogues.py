"""Dialogues as training data: votes and choices, and what an MLP says of statements a person was not shown.

Only statements that training people were shown: an answer that nobody of them met is left to the validation splits.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.human_people import Row, Settings, grouped, held_out, read, row
from benchmarks.human_teacher import Answers, Reader, fit_reader, p_agree
from deliberation.types import InputError

Encoder = Callable[[Sequence[str]], Tensor]
"""Texts -> unit vectors [texts, width]."""

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
        shown: texts each profile was asked about, in votes and in choices, whatever they said.
    """

    questions: dict[str, str]
    profiles: dict[str, Row]
    votes: dict[str, list[tuple[str, int]]]
    choices: dict[str, list[tuple[str, str]]]
    shown: dict[str, set[str]]

    def statements(self, place: str) -> list[str]:
        """Texts that somebody of these was shown on one question, in order of the alphabet."""
        return sorted({
            text for name, profile in self.profiles.items() if profile["conversation_id"] == place
            for text in self.shown[name]
        })  # fmt: skip


def dialogues(folder: Path) -> Dialogues:
    """Read from the folder's tables."""
    questions = {r["question_id"]: r["question"] for r in read(folder, "remesh_questions.jsonl", ("question",))}
    text = {r["statement_id"]: r["text"] for r in read(folder, "remesh_statements.parquet", ("statement_id", "text"))}
    profiles = {
        r["profile_id"]: r
        for r in read(folder, "remesh_profiles.parquet", ("profile_id", "opinion_text"))
        if r["split"] == "train" and not held_out(r["participant_id"])
    }
    found = Dialogues(questions, profiles, defaultdict(list), defaultdict(list), defaultdict(set))
    for r in read(folder, "remesh_targets.parquet", ("profile_id", "statement_id", "label")):
        if r["profile_id"] in profiles:
            found.votes[r["profile_id"]].append((text[r["statement_id"]], 1 if r["label"] else -1))
            found.shown[r["profile_id"]].add(text[r["statement_id"]])
    for r in read(folder, "remesh_preferences.parquet", ("profile_id", "choice")):
        if r["profile_id"] in profiles:
            a, b = text[r["statement_a"]], text[r["statement_b"]]
            found.shown[r["profile_id"]] |= {a, b}
            if r["choice"] in ("a", "b") and a != b:
                found.choices[r["profile_id"]].append((a, b) if r["choice"] == "a" else (b, a))
    return found


def dialogue_rows(folder: Path, settings: Settings, encode: Encoder) -> tuple[list[Row], list[Row], list[Row]]:
    """Votes, choices and soft votes of the dialogues' training people, every profile in ``settings.repeats`` groups."""
    rng, known = random.Random(f"remesh {settings.seed}"), dialogues(folder)
    likely = Teacher(known, settings.seed, encode)
    people: dict[str, list[str]] = defaultdict(list)
    for name, profile in known.profiles.items():
        people[profile["conversation_id"]].append(name)
    asked = {place: known.statements(place) for place in people}
    votes: list[Row] = []
    choices: list[Row] = []
    soft: list[Row] = []
    for repeat in range(settings.repeats):
        for place, members in people.items():
            for number, group in enumerate(grouped(members, 2 * settings.group, rng)):
                for member, name in enumerate(group):
                    opinion = known.profiles[name]["opinion_text"]
                    head = row(f"{place}/{repeat}/{number}", member, known.questions[place], opinion, place)
                    votes += [head | {"statement": text, "vote": vote} for text, vote in known.votes[name]]
                    few = rng.sample(known.choices[name], min(CHOICES, len(known.choices[name])))
                    choices += [head | {"chosen": chosen, "rejected": rejected} for chosen, rejected in few]
                    new = [text for text in asked[place] if text not in known.shown[name] and text != opinion]
                    new = rng.sample(new, min(settings.unseen, len(new)))
                    soft += [
                        head | {"statement": text, "p_agree": p}
                        for text, p in zip(new, likely(opinion, new), strict=True)
                    ]
    return votes, choices, soft


class Teacher:
    """The MLP of ``human_teacher``, fitted to all votes and choices of these people.

    Raises:
        InputError: field ``data``, if there are no votes.
    """

    def __init__(self, known: Dialogues, seed: int, encode: Encoder):
        opinions = {name: profile["opinion_text"] for name, profile in known.profiles.items()}
        texts = sorted(set(opinions.values()).union(*known.shown.values()))
        self.number = {text: k for k, text in enumerate(texts)}
        votes = [
            (self.number[opinions[name]], self.number[text], vote > 0)
            for name in opinions
            for text, vote in known.votes[name]
        ]
        choices = [
            (self.number[opinions[name]], self.number[chosen], self.number[rejected])
            for name in opinions
            for chosen, rejected in known.choices[name]
        ]
        if not votes:
            raise InputError("data", "remesh_targets.parquet", "has no vote of training people; give others")
        vectors = encode(texts).clone()
        self.vectors = vectors * vectors.shape[1] ** 0.5
        table = torch.tensor(votes)
        self.networks = fit_reader(
            Answers(self.vectors, table[:, :2], table[:, 2].float(), torch.tensor(choices).reshape(-1, 3)),
            Reader(),
            seed,
        )

    def __call__(self, opinion: str, statements: Sequence[str]) -> list[float]:
        """P(agree) of one opinion with each statement."""
        rows = torch.tensor([self.number[text] for text in statements], dtype=torch.long)
        return p_agree(self.networks, self.vectors[self.number[opinion]], self.vectors[rows]).tolist()
