"""Dialogues as training data: votes and choices, and what an MLP says of statements a person was not shown."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.human_people import Row, Settings, grouped, held_out, read, row
from benchmarks.human_teacher import Answers, Networks, Reader, p_agree
from benchmarks.human_teacher import read as read_answers

Encoder = Callable[[Sequence[str]], Tensor]
"""Texts -> unit vectors [texts, width]."""


def dialogue_rows(folder: Path, settings: Settings, encode: Encoder) -> tuple[list[Row], list[Row], list[Row]]:
    """Votes, choices and soft votes of the dialogues' training people, every profile in ``settings.repeats`` groups."""
    rng = random.Random(f"remesh {settings.seed}")
    questions = {r["question_id"]: r["question"] for r in read(folder, "remesh_questions.jsonl", ("question",))}
    answers = read(folder, "remesh_statements.parquet", ("statement_id", "text", "question_id"))
    text = {r["statement_id"]: r["text"] for r in answers}
    profiles = {
        r["profile_id"]: r
        for r in read(folder, "remesh_profiles.parquet", ("profile_id", "opinion_text"))
        if r["split"] == "train" and not held_out(r["participant_id"])
    }
    judged: dict[str, list[Row]] = defaultdict(list)
    for r in read(folder, "remesh_targets.parquet", ("profile_id", "statement_id", "label")):
        judged[r["profile_id"]].append({"statement": text[r["statement_id"]], "vote": 1 if r["label"] else -1})
    preferred: dict[str, list[Row]] = defaultdict(list)
    for r in read(folder, "remesh_preferences.parquet", ("profile_id", "choice")):
        if r["choice"] in ("a", "b"):
            a, b = text[r["statement_a"]], text[r["statement_b"]]
            preferred[r["profile_id"]].append(
                {"chosen": a, "rejected": b} if r["choice"] == "a" else {"chosen": b, "rejected": a}
            )
    people: dict[str, list[str]] = defaultdict(list)
    for name, profile in profiles.items():
        people[profile["conversation_id"]].append(name)
    asked: dict[str, list[str]] = defaultdict(list)
    for r in answers:
        asked[r["question_id"]].append(r["text"])
    asked = {place: sorted(set(texts)) for place, texts in asked.items()}
    teacher, vector = dialogue_teacher(profiles, judged, preferred, list(text.values()), settings.seed, encode)
    votes: list[Row] = []
    choices: list[Row] = []
    soft: list[Row] = []
    for repeat in range(settings.repeats):
        for place, members in people.items():
            for number, group in enumerate(grouped(members, 2 * settings.group, rng)):
                for member, name in enumerate(group):
                    opinion = profiles[name]["opinion_text"]
                    head = row(f"{place}/{repeat}/{number}", member, questions[place], opinion, place)
                    votes += [head | judgement for judgement in judged[name]]
                    few = rng.sample(preferred[name], min(3, len(preferred[name])))
                    choices += [head | choice for choice in few if choice["chosen"] != choice["rejected"]]
                    known = {judgement["statement"] for judgement in judged[name]} | {opinion}
                    new = [t for t in asked[place] if t not in known]
                    unseen = rng.sample(new, min(settings.unseen, len(new)))
                    if not unseen:
                        continue
                    likely = p_agree(teacher, vector[opinion], torch.stack([vector[t] for t in unseen]))
                    soft += [head | {"statement": t, "p_agree": float(p)} for t, p in zip(unseen, likely, strict=True)]
    return votes, choices, soft


def dialogue_teacher(
    profiles: dict[str, Row],
    judged: dict[str, list[Row]],
    preferred: dict[str, list[Row]],
    texts: list[str],
    seed: int,
    encode: Encoder,
) -> tuple[Networks, dict[str, Tensor]]:
    """The MLP fitted to votes and choices of these profiles, and the vector of every text it may be asked about."""
    texts = list(dict.fromkeys(texts + [profile["opinion_text"] for profile in profiles.values()]))
    vectors = encode(texts).clone()
    vectors *= vectors.shape[1] ** 0.5
    number = {text: k for k, text in enumerate(texts)}
    opinion = {name: number[profile["opinion_text"]] for name, profile in profiles.items()}
    votes = [(opinion[name], number[r["statement"]], r["vote"] > 0) for name in profiles for r in judged[name]]
    choices = [
        (opinion[name], number[r["chosen"]], number[r["rejected"]]) for name in profiles for r in preferred[name]
    ]
    answers = Answers(
        vectors,
        torch.tensor([vote[:2] for vote in votes]),
        torch.tensor([float(vote[2]) for vote in votes]),
        torch.tensor(choices),
    )
    return read_answers(answers, Reader(), seed), dict(zip(texts, vectors, strict=True))
