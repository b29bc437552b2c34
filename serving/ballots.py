"""What members think of the candidates: ratings, comparisons, critiques.

A rating is acknowledged once it is durably there. The newest one counts; a changed mind keeps the earlier ones beside
it. Repeating a request, with or without an idempotency key, adds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, bindparam, insert, select, update

from serving import trials
from serving.experiments import member_order
from serving.problems import ApiError
from serving.sessions import CLOSED, RATING, Member
from serving.store import reading
from serving.tables import candidates, comparisons, critiques, deliberations, members, ratings


@dataclass(frozen=True)
class Rating:
    """A kept rating: candidate, agreement and quality (1 to 7), and its version, from 1."""

    candidate: str
    agreement: int
    quality: int
    version: int


class Ballots:
    """Members' judgements in a database.

    Args:
        engine: of ``store.open_store``.
        clock: seconds since 1970.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time):
        self.engine, self.clock = engine, clock

    def shown(self, member: Member) -> list[Row]:
        """The round's candidates in the member's own order, once there are any; an experiment counts them as seen."""
        with reading(self.engine) as connection:
            row = connection.execute(select(deliberations).where(deliberations.c.id == member.deliberation)).one()
            found = list(connection.execute(_round(row)))
        if found and row.experiment is not None:
            with self.engine.begin() as connection:
                trials.first_shown(connection, row.id)
        by_id = {candidate.id: candidate for candidate in found}
        return [by_id[name] for name in member_order(row.salt, member.id, sorted(by_id))]

    def mine(self, member: Member) -> list[Rating]:
        """The member's current ratings."""
        where = (ratings.c.member == member.id) & ratings.c.current
        with reading(self.engine) as connection:
            return [_rating(row) for row in connection.execute(select(ratings).where(where))]

    def rate(self, member: Member, candidate: str, agreement: int, quality: int, key: str | None = None) -> Rating:
        """Keep a rating, each of 1 to 7.

        Raises:
            ApiError: ``not-found``, if the member is not shown such a candidate; ``wrong-state``, if rating has ended;
                ``idempotency-mismatch``, if the key came with another rating before.
        """
        with self.engine.begin() as connection:
            _in_turn(connection, member)
            found = _found(connection, member, candidate, key)
            if found.once is not None:
                if (found.once, found.once_agreement, found.once_quality) != (candidate, agreement, quality):
                    raise ApiError("idempotency-mismatch", "the Idempotency-Key came with another rating before")
                return Rating(candidate, agreement, quality, found.once_version)
            _check_rated(found)
            if (found.agreement, found.quality) == (agreement, quality):
                return Rating(candidate, agreement, quality, found.version)
            if found.number is not None:
                connection.execute(_REPLACED, {"replaced": found.number})
            version = 1 if found.number is None else found.version + 1
            values = {
                "member": member.id, "candidate": candidate, "version": version, "current": True,
                "agreement": agreement, "quality": quality, "idempotency_key": key, "created": self.clock(),
            }  # fmt: skip
            connection.execute(_NEW, values)
            return Rating(candidate, agreement, quality, version)

    def compare(self, member: Member, better: str, worse: str, tie: bool) -> None:
        """Keep which of two candidates the member prefers; the newest of a pair counts.

        Raises:
            ApiError: as ``rate``.
        """
        with self.engine.begin() as connection:
            _in_turn(connection, member)
            for candidate in (better, worse):
                _check_rated(_found(connection, member, candidate))
            pair = comparisons.c.better.in_((better, worse)) & comparisons.c.worse.in_((better, worse))
            mine = (comparisons.c.member == member.id) & comparisons.c.current & pair
            before = connection.execute(select(comparisons).where(mine)).first()
            if before is not None and (before.better, before.worse, before.tie) == (better, worse, tie):
                return
            connection.execute(update(comparisons).where(mine).values(current=False))
            values = {"member": member.id, "better": better, "worse": worse, "tie": tie, "current": True}
            connection.execute(insert(comparisons).values(values | {"created": self.clock()}))

    def criticise(self, member: Member, text: str) -> str:
        """Keep what the member has against the winner, in place of what they said before; returns the candidate's id.

        Raises:
            ApiError: ``wrong-state``, if nothing is being rated, or in an experiment: it has one round, and a winner an
                arm.
        """
        with self.engine.begin() as connection:
            _in_turn(connection, member)
            found = select(deliberations).where(deliberations.c.id == member.deliberation)
            row = connection.execute(found.with_for_update(read=True)).one()
            _check_rating(row)
            if row.experiment is not None:
                raise ApiError("wrong-state", "a deliberation of an experiment has one round: nothing is revised")
            won = connection.execute(_round(row).where(candidates.c.winner)).one()
            same = (critiques.c.member == member.id) & (critiques.c.candidate == won.id)
            values = {"text": text, "created": self.clock()}
            if connection.execute(update(critiques).where(same).values(values)).rowcount == 0:
                connection.execute(insert(critiques).values(values | {"member": member.id, "candidate": won.id}))
            return str(won.id)


def _round(row: Row) -> Any:
    """The candidates that a deliberation's members are shown: those of the last finished round."""
    number = row.round if row.state in (RATING, CLOSED) else row.round - 1
    return (
        select(candidates)
        .where((candidates.c.deliberation == row.id) & (candidates.c.round == number))
        .order_by(candidates.c.number)
    )


def _in_turn(connection: Connection, member: Member) -> None:
    """One ballot of a member at a time: PostgreSQL would let two find the same newest version.

    The deliberation is locked before the member, as an erasure does: in another order they could wait for each other.
    """
    if connection.dialect.name != "sqlite":  # there writers take turns anyway
        connection.execute(_TURN, {"member": member.id, "deliberation": member.deliberation})


def _found(connection: Connection, member: Member, candidate: str, key: str | None = None) -> Row:
    """All that a rating needs to know, in one statement: rating is what the service does most.

    The lock keeps the deliberation from being closed meanwhile.

    Raises:
        ApiError: ``not-found``, if the member's deliberation has no such candidate.
    """
    values = {"member": member.id, "deliberation": member.deliberation, "candidate": candidate, "key": key}
    row = connection.execute(_FOUND, values).first()
    if row is None:
        raise _not_shown()
    return row


def _check_rated(found: Row) -> None:
    _check_rating(found)
    if found.of_round != found.round:
        raise _not_shown()


def _not_shown() -> ApiError:
    return ApiError("not-found", "no candidate of that id in this round of the member's deliberation")


def _check_rating(row: Row) -> None:
    if row.state != RATING:
        raise ApiError("wrong-state", f"the deliberation is {row.state}: there is nothing to judge now")


def _rating(row: Row) -> Rating:
    return Rating(row.candidate, row.agreement, row.quality, row.version)


# Made once: SQLAlchemy takes longer to put such a statement together than SQLite to answer it
_mine, _once = ratings.alias("mine"), ratings.alias("once")
_FOUND = (
    select(deliberations.c.state, deliberations.c.round, candidates.c.round.label("of_round"))
    .add_columns(_mine.c.number, _mine.c.version, _mine.c.agreement, _mine.c.quality)
    .add_columns(_once.c.candidate.label("once"), _once.c.version.label("once_version"))
    .add_columns(_once.c.agreement.label("once_agreement"), _once.c.quality.label("once_quality"))
    .join(candidates, candidates.c.deliberation == deliberations.c.id)
    .outerjoin(
        _mine, (_mine.c.candidate == candidates.c.id) & (_mine.c.member == bindparam("member")) & _mine.c.current
    )
    .outerjoin(_once, (_once.c.member == bindparam("member")) & (_once.c.idempotency_key == bindparam("key")))
    .where((candidates.c.id == bindparam("candidate")) & (deliberations.c.id == bindparam("deliberation")))
    .with_for_update(read=True, of=deliberations)
)
"""State of the deliberation, round of the candidate; the member's current rating and the one with the key, or NULLs."""
_locked = (
    select(deliberations.c.id)
    .where(deliberations.c.id == bindparam("deliberation"))
    .with_for_update(read=True)
    .cte("locked")
)
_TURN = (  # a member's row is found, and locked, by way of the locked deliberation's
    select(members.c.id)
    .join(_locked, _locked.c.id == members.c.deliberation)
    .where(members.c.id == bindparam("member"))
    .with_for_update(of=members)
)
_REPLACED = update(ratings).where(ratings.c.number == bindparam("replaced")).values(current=False)
_NEW = insert(ratings)
