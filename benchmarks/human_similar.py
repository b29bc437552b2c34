"""Likeness: a first lesson in comparing statement and opinion, for a model that will learn votes afterwards.

Votes alone do not teach an encoder to compare the two texts in reasonable time: which statements are popular tells more
of a vote, and is learnt first. Here no statement is popular. A group's members judge statements that were picked as
near to one of them (their own lines, or what the sentence encoder's cosine puts next to their opinion), and a member
says yes to those that are nearer to them than to others: the cosine less what opinion and statement have on average.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.human_dialogues import Encoder, dialogues
from benchmarks.human_people import Row, Settings, grouped, row
from benchmarks.human_polis import conversations, drawn

HITS = 2
"""Statements a group judges for each of its members."""
OWN = 0.7
"""Chance that such a statement is one of the opinion's own lines, where it has any among the statements."""
NEAREST = 12
"""The others are drawn from so many nearest ones."""
YES, NO = 1.0, 0.0
"""Likeness, in standard deviations of a place's, above which a member says yes and below which no."""


@dataclass(frozen=True)
class Place:
    """A conversation or a dialogue question: its opinions, one a training person, and its statements."""

    name: str
    question: str
    opinions: list[str]
    statements: list[str]


def places(folder: Path, rng: random.Random) -> Iterator[Place]:
    """Of the folder's training people who are not left out for calibration; Polis profiles are drawn anew."""
    polis = conversations(folder)
    for name, people in polis.people.items():
        profiles = (drawn(polis.votes[person], polis.written[person], rng) for person in people)
        opinions = ["\n".join(polis.text[s] for s in profile) for profile in profiles if profile]
        asked = sorted({polis.text[s] for person in people for s in polis.votes[person]})
        yield Place(name, polis.questions[name], opinions, asked)
    remesh = dialogues(folder)
    said: dict[str, list[str]] = defaultdict(list)
    for profile in remesh.profiles.values():
        said[profile["conversation_id"]].append(profile["opinion_text"])
    for name, opinions in said.items():
        yield Place(name, remesh.questions[name], opinions, sorted({*remesh.statements(name), *opinions}))


def likeness(opinions: Sequence[str], statements: Sequence[str], encode: Encoder) -> Tensor:
    """Cosine of every opinion (the mean vector of its lines) and statement without the means of both, in standard
    deviations, [opinions, statements]."""
    lines = [opinion.split("\n") for opinion in opinions]
    vectors = encode([line for own in lines for line in own])
    means = torch.stack([own.mean(dim=0) for own in vectors.split([len(own) for own in lines])])
    cosine = means / means.norm(dim=1, keepdim=True) @ encode(statements).T
    cosine = cosine - cosine.mean(dim=1, keepdim=True)
    cosine = cosine - cosine.mean(dim=0)
    return cosine / cosine.std()


def similar_rows(folder: Path, settings: Settings, encode: Encoder) -> list[Row]:
    """Votes of groups of ``settings.group`` members on whether a statement is like what they said."""
    rng = random.Random(f"similar {settings.seed}")
    return [r for place in places(folder, rng) for r in _rows(place, settings.group, encode, rng)]


def _rows(place: Place, size: int, encode: Encoder, rng: random.Random) -> Iterator[Row]:
    if len(place.opinions) < 2:
        return  # nobody to be nearer than
    number = {text: k for k, text in enumerate(place.statements)}
    alike = likeness(place.opinions, place.statements, encode)
    nearest = alike.topk(min(NEAREST, len(number)), dim=1).indices.tolist()
    names = [str(k) for k in range(len(place.opinions))]
    for count, group in enumerate(grouped(names, size, rng)):
        members = [int(name) for name in group]
        judged: dict[int, None] = {}
        for k in members:
            own = [number[line] for line in place.opinions[k].split("\n") if line in number]
            for _ in range(HITS):
                judged[rng.choice(own if own and rng.random() < OWN else nearest[k])] = None
        for member, k in enumerate(members):
            head = row(f"{place.name}/similar/{count}", member, place.question, place.opinions[k], place.name)
            for s in judged:
                likes = float(alike[k, s])
                if not NO <= likes <= YES:
                    yield head | {"statement": place.statements[s], "vote": 1 if likes > YES else -1}
