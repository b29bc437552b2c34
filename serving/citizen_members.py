"""Simulated citizens as the members of a running service, over HTTP. Always simulated, never evidence about people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from random import Random
from statistics import fmean
from typing import Any

from deliberation.citizens import Citizen, Group, noisy_rating, rate_text
from serving.client import Client
from serving.session_client import Organiser, Participant
from serving.session_schemas import Created, DeliberationReport


def deliberate(
    url: str, groups: Sequence[Group], *, seed: int = 0, key: str | None = None, consent: bool = True, **fields: Any
) -> Iterator[DeliberationReport]:
    """Each group in turn writes, has candidates written, rates all it is shown, and closes.

    Args:
        url: of the service.
        groups: of citizens.
        seed: of the policy's samples, and of the noise on the ratings; the deliberation at an index has its own.
        key: API key of the organiser, where the service needs one.
        consent: whether the members consent to training.
        fields: further ones of ``NewDeliberation``: policy, n, shown, experiment.

    Yields:
        The report of each deliberation, once it is closed.

    Raises:
        ServiceError: what the service refuses.
    """
    with Client(url, key) as client:
        organiser = Organiser(client)
        for k, group in enumerate(groups):
            own = seed * 1_000_003 + k
            created = organiser.create(group.question.text, seed=own, **fields)
            with ExitStack() as stack:
                people = [stack.enter_context(_joined(url, created, m, consent)) for m in range(len(group.citizens))]
                for person, citizen in zip(people, group.citizens, strict=True):
                    person.write(citizen.opinion)
                organiser.generate(created.id, poll_s=0.02)
                for m, person in enumerate(people):
                    for candidate in person.look().candidates:
                        given = rating(group.citizens[m], group, candidate.statement, f"{own} {m}")
                        person.rate(candidate.id, *given)
            organiser.close(created.id)
            yield organiser.report(created.id)


def _joined(url: str, created: Created, number: int, consent: bool) -> Participant:
    return Participant.join(url, created.id, created.invite, f"citizen {number}", consent=consent)


def rating(citizen: Citizen, group: Group, statement: str, seed: str) -> tuple[int, int]:
    """Agreement and quality, 1 to 7, as a person gives them: with noise, and the same whatever was rated before."""
    gold, rng = rate_text(citizen, group.question, statement), Random(f"{seed} {statement}")
    return noisy_rating(gold.agreement, rng), noisy_rating(gold.quality, rng)


def gold_mean(group: Group, statement: str) -> float:
    """What a statement is worth to the group, without noise: mean agreement, 1 to 7."""
    return fmean(rate_text(citizen, group.question, statement).agreement for citizen in group.citizens)
