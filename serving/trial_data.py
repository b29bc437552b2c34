"""What an experiment's deliberations said, read from the database into arrays."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, Select, select

from serving.experiments import Spec, member_order
from serving.tables import assignments, candidates, deliberations, exposures, failures, members, ratings

Array = np.ndarray


@dataclass(frozen=True)
class Held:
    """One deliberation of an experiment.

    Attributes:
        id: of the deliberation.
        arm: which one it was given; None if paired.
        closed: when it was closed, seconds since 1970; None while it is pending.
        written: arm -> id of the candidate it wrote. Arms that wrote the same text have the same candidate.
        seconds: arm -> seconds that took.
        seen: whether a member has looked at the candidates.
        orders: one list of candidate ids a member, as this member sees them.
        agreement, quality: candidate id -> ratings [members], 1 to 7, NaN where missing.
    """

    id: str
    arm: str | None
    closed: float | None
    written: dict[str, str]
    seconds: dict[str, float]
    seen: bool
    orders: tuple[list[str], ...]
    agreement: dict[str, Array]
    quality: dict[str, Array]


@dataclass(frozen=True)
class Trial:
    """An experiment with all that happened in it.

    Attributes:
        id, name, spec: of the experiment.
        held: its deliberations: those closed in the order of closing, then those pending.
        failures: arm -> type of problem -> how often.
        versions: arm -> distinct prints (JSON) of the models that wrote for it.
    """

    id: str
    name: str
    spec: Spec
    held: tuple[Held, ...] = ()
    failures: dict[str, Counter[str]] = field(default_factory=dict)
    versions: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def closed(self) -> list[Held]:
        """Those that count, in the order of closing: what is known at one look stays as it is at the next."""
        return [held for held in self.held if held.closed is not None]


def load(connection: Connection, row: Row) -> Trial:
    """Read everything of the experiment in ``row``, in few queries whatever its size."""
    spec = Spec.from_json(row.spec)
    given = connection.execute(
        _in_trial(row.id, deliberations, deliberations.c.id).add_columns(assignments.c.arm)
    ).all()
    written = _by(connection, select(exposures).where(exposures.c.experiment == row.id), "deliberation")
    texts = _by(connection, _in_trial(row.id, candidates, candidates.c.deliberation), "deliberation")
    people = _by(connection, _in_trial(row.id, members, members.c.deliberation), "deliberation")
    marks = _by(connection, _ratings(row.id), "candidate")
    held = [_held(d, written[d.id], texts[d.id], sorted(people[d.id], key=lambda m: m.number), marks) for d in given]
    held.sort(key=lambda one: (math.inf if one.closed is None else one.closed, one.id))
    counts: dict[str, Counter[str]] = {name: Counter() for name in spec.names}
    for failure in connection.execute(select(failures).where(failures.c.experiment == row.id)):
        counts.setdefault(failure.arm, Counter())[failure.type] += 1
    prints = {text.id: text.versions for several in texts.values() for text in several}
    versions = {
        name: frozenset(prints[one.written[name]] for one in held if name in one.written) for name in spec.names
    }
    return Trial(row.id, row.name, spec, tuple(held), counts, versions)


def _in_trial(experiment: str, table: Any, deliberation: Any) -> Select:
    """Rows of ``table`` whose column ``deliberation`` names one of the experiment's."""
    joined = table.join(assignments, assignments.c.deliberation == deliberation)
    return select(table).select_from(joined).where(assignments.c.experiment == experiment)


def _ratings(experiment: str) -> Select:
    """Current ratings of the exposed candidates; once each, though two arms may have written the same."""
    exposed = select(exposures.c.candidate).where(exposures.c.experiment == experiment)
    return select(ratings).where(ratings.c.current & ratings.c.candidate.in_(exposed))


def _by(connection: Connection, query: Select, name: str) -> defaultdict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in connection.execute(query):
        found[getattr(row, name)].append(row)
    return found


def _held(row: Row, written: Sequence[Row], texts: Sequence[Row], people: Sequence[Row], marks: Any) -> Held:
    names = [member.id for member in people]
    shown = sorted(text.id for text in texts if text.round == row.round)
    written = [one for one in written if one.candidate in shown]  # else it is being erased at this moment
    rated = {one.candidate: marks[one.candidate] for one in written}
    return Held(
        id=row.id,
        arm=row.arm,
        closed=row.closed if row.state == "closed" and written else None,
        written={one.arm: one.candidate for one in written},
        seconds={one.arm: one.seconds for one in written},
        seen=any(one.shown is not None for one in written),
        orders=tuple(member_order(row.salt, name, shown) for name in names),
        agreement={name: _column(names, {r.member: r.agreement for r in rows}) for name, rows in rated.items()},
        quality={name: _column(names, {r.member: r.quality for r in rows}) for name, rows in rated.items()},
    )


def _column(names: Sequence[str], given: dict[str, int]) -> Array:
    return np.array([given.get(name, math.nan) for name in names], dtype=np.float64)
