"""Simulated citizens as the gold rater of a comparison. Always simulated, never evidence about people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import numpy as np

from deliberation.citizens import Group, draw_group, noisy_rating, rate
from deliberation.prompts import clean_statement
from deliberation.recogniser import read
from deliberation.types import InputError, Question, Rating
from evaluation.measures import Array
from reward.welfare import parse_welfare
from reward.welfare import welfare as aggregate


@dataclass(frozen=True)
class GroupRatings:
    """Noise-free ratings of one group, each [members, statements], floats from 1 to 7."""

    agreement: Array
    quality: Array
    agreement_without_voice: Array
    quality_without_voice: Array


class CitizenGold:
    """Asks the citizens themselves. ``groups[index]`` is the group of the deliberation at ``index``."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    def rate(self, index: int, statements: Sequence[str]) -> GroupRatings:
        """Every citizen's noise-free rating of every statement; any text may be rated, an empty one too."""
        group = self.groups[index]
        readings = [read(text, group.question) for text in statements]
        table = [[rate(citizen, reading) for reading in readings] for citizen in group.citizens]
        names = [field.name for field in fields(GroupRatings)]
        return GroupRatings(**{n: np.array([[getattr(gold, n) for gold in row] for row in table]) for n in names})


def held_out_groups(questions: Sequence[Question], count: int, seed: int) -> list[Group]:
    """``count`` groups of citizens, with held-out words, on ``questions`` in shuffled order (again and again).

    The group at an index depends on ``seed``, its question and the index only.

    Raises:
        InputError: if there are no questions or ``count`` is below 1.
    """
    if not questions:
        raise InputError("questions", "none", "give at least one debate question")
    if count < 1:
        raise InputError("num_deliberations", count, "must be at least 1")
    order = list(questions)
    Random(f"order {seed}").shuffle(order)
    picked = [order[i % len(order)] for i in range(count)]
    return [draw_group(q, Random(f"group {seed} {i} {q.id}"), held_out=True) for i, q in enumerate(picked)]


def noisy_ratings(group: Group, name: str, statements: Sequence[str], seed: str) -> list[Rating]:
    """Ratings as people give them: each citizen on each non-blank statement once, with noise, rounded.

    Args:
        name: the deliberation's id.
        seed: of the noise; another seed is another showing of the same statements to the same citizens.
    """
    rng, found = Random(seed), []
    for text in statements:
        reading = read(text, group.question)
        for member, citizen in enumerate(group.citizens):
            gold = rate(citizen, reading)
            agreement, quality = noisy_rating(gold.agreement, rng), noisy_rating(gold.quality, rng)
            if text.strip():
                found.append(Rating(name, member, group.question.text, citizen.opinion, text, agreement, quality,
                                    group.question.topic))  # fmt: skip
    return found


def make_gold_observer(groups: Sequence[Group], welfare: str | float) -> Callable[..., list[None]]:
    """A "reward function" that watches and never rewards: hand it to a trainer beside the real one.

    It logs the mean gold welfare of the completions of known groups as ``gold_welfare`` (``eval/gold_welfare`` in the
    log when ``groups`` are the held-out ones) and returns None for every completion, so that gold can neither train
    the policy nor stop it.

    Args:
        groups: the groups it knows, found again by question and opinions; others are passed over.
        welfare: the run's welfare function.
    """
    function = parse_welfare(welfare, clusters=False)
    places = {(g.question.text, tuple(c.opinion for c in g.citizens)): i for i, g in enumerate(groups)}
    gold = CitizenGold(groups)

    def gold_observer(
        prompts: Sequence[Any], completions: Sequence[Any], *, question: Sequence[str],
        opinions: Sequence[Sequence[str]], log_metric: Callable[[str, float], None], **columns: Any,
    ) -> list[None]:  # fmt: skip
        found = []
        for completion, asked, said in zip(completions, question, opinions, strict=True):
            place = places.get((asked, tuple(said)))
            if place is not None:
                text = completion if isinstance(completion, str) else completion[-1]["content"]
                found.append(float(aggregate(gold.rate(place, [clean_statement(text)]).agreement[:, 0], function)))
        if found:
            log_metric("gold_welfare", float(np.mean(found)))
        return [None] * len(completions)

    return gold_observer
