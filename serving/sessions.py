"""Deliberations that people take part in: who is in them, and what they wrote. What they judge is in ``ballots``.

States: *collecting* opinions, *generating* candidates, *rating* them, *closed*. Tokens are random and kept as digests.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, tuple_, update

from deliberation.types import MAX_MEMBERS, InputError
from serving import trials
from serving.keys import digest
from serving.problems import ApiError
from serving.store import forget, may_be_id, new_id, reading
from serving.tables import (
    candidates,
    comparisons,
    critiques,
    deliberations,
    members,
    opinions,
    ratings,
    request_events,
    requests,
)

COLLECTING, GENERATING, RATING, CLOSED = "collecting", "generating", "rating", "closed"
MEMBER_PREFIX, INVITE_PREFIX = "mem_", "inv_"
OF_MEMBERS = (members, opinions, ratings, comparisons, critiques)
"""Tables whose rows go with a member."""


@dataclass(frozen=True)
class Member:
    """Who a member's token stands for: ids of the member and of the deliberation, and the number in it, from 0."""

    id: str
    deliberation: str
    number: int


def new_token(prefix: str) -> str:
    """A token of 192 random bits."""
    return prefix + secrets.token_urlsafe(24)


class Sessions:
    """Deliberations in a database.

    Args:
        engine: of ``store.open_store``.
        clock: seconds since 1970.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time):
        self.engine, self.clock = engine, clock

    # --- the organiser's ----------------------------------------------------------------------------------------

    def create(
        self, owner: str, question: str, settings: dict[str, Any], invite: str, experiment: str | None = None
    ) -> str:
        """Begin a deliberation, or find the owner's with the same invite token: creating is safe to repeat.

        Args:
            settings: ``policy``, ``n``, ``welfare``, ``seed`` and ``shown`` (statements that members rate).

        Returns:
            Its id.

        Raises:
            ApiError: ``wrong-state``, if the experiment has stopped; ``not-found``, if the owner has none of that id;
                ``idempotency-mismatch``, if the token is another deliberation's.
        """
        row = {
            "id": new_id("del"), "owner": owner, "question": question, "settings": json.dumps(settings),
            "state": COLLECTING, "round": 1, "invite": digest(invite), "salt": secrets.token_hex(32),
            "experiment": experiment, "created": self.clock(),
        }  # fmt: skip
        with self.engine.begin() as connection:
            found = connection.execute(select(deliberations).where(deliberations.c.invite == row["invite"])).first()
            if found is not None:
                same = (found.owner, found.question, found.settings, found.experiment)
                if same != (owner, question, row["settings"], experiment):
                    raise ApiError("idempotency-mismatch", "the invite token is another deliberation's; use a new one")
                return str(found.id)
            if experiment is not None:
                trials.check_open(connection, experiment, owner)
            connection.execute(insert(deliberations).values(row))
        return str(row["id"])

    def get(self, deliberation_id: str, owner: str | None = None) -> Row:
        """The row of a deliberation.

        Raises:
            ApiError: ``not-found``, also where it is another owner's.
        """
        with reading(self.engine) as connection:
            return _get(connection, deliberation_id, owner)

    def owned(self, owner: str, limit: int, after: str | None = None) -> tuple[list[Row], str | None]:
        """A page of the owner's deliberations, the newest first, and the mark of its end; None where nothing follows.

        Args:
            limit: rows at most, >= 1.
            after: the mark of the page before. It stays good when rows are erased.

        Raises:
            InputError: field ``after``, if it is no mark.
        """
        created, name = deliberations.c.created, deliberations.c.id
        where = deliberations.c.owner == owner
        if after is not None:
            where &= tuple_(created, name) < tuple_(*_place(after))
        page = select(deliberations).where(where).order_by(created.desc(), name.desc()).limit(limit + 1)
        with reading(self.engine) as connection:
            rows = list(connection.execute(page))
        last = rows[limit - 1] if len(rows) > limit else None
        return rows[:limit], None if last is None else f"{last.created!r}_{last.id}"

    def freeze(self, deliberation_id: str, owner: str, revise: bool) -> None:
        """End the writing, and say that candidates are being written.

        Args:
            revise: begin the second round, with the members' critiques of the first one's winner.

        Repeated while they are being written, it changes nothing.

        Raises:
            ApiError: ``not-found``; ``wrong-state``, if there is nothing to write from.
        """
        with self.engine.begin() as connection:
            row = _get(connection, deliberation_id, owner, lock=True)
            before, number = (RATING, 2) if revise else (COLLECTING, 1)
            if row.state == GENERATING and row.round == number:
                return
            if row.state != before or (revise and row.round != 1):
                raise _wrong_state(row, f"this needs one that is {before}{', in its first round' if revise else ''}")
            if not written(connection, deliberation_id):
                raise ApiError("wrong-state", "nobody has written an opinion yet")
            if revise and not _critiques(connection, deliberation_id):
                raise ApiError("wrong-state", "nobody has criticised the winner yet; POST /v1/critiques")
            if row.experiment is not None and revise:
                raise ApiError("wrong-state", "a deliberation of an experiment has one round: its arms are compared")
            if row.experiment is not None:
                trials.enroll(connection, row.experiment, deliberation_id)
            change = update(deliberations).where(deliberations.c.id == deliberation_id)
            values = {"state": GENERATING, "round": number, "problem": None, "generation": new_id("gen")}
            connection.execute(change.values(values))

    def close(self, deliberation_id: str, owner: str) -> None:
        """End the rating, for good.

        Raises:
            ApiError: ``not-found``; ``wrong-state`` before there are candidates.
        """
        with self.engine.begin() as connection:
            row = _get(connection, deliberation_id, owner, lock=True)
            if row.state not in (RATING, CLOSED):
                raise _wrong_state(row, "only one that is rating can be closed")
            if row.state == RATING:
                change = update(deliberations).where(deliberations.c.id == row.id)
                connection.execute(change.values(state=CLOSED, closed=self.clock()))

    def erase(self, deliberation_id: str, owner: str) -> None:
        """Remove a deliberation, everything in it, and what the ledger has of the writing of its candidates.

        Raises:
            ApiError: ``not-found``.
        """
        with self.engine.begin() as connection:
            _get(connection, deliberation_id, owner, lock=True)
            connection.execute(delete(deliberations).where(deliberations.c.id == deliberation_id))
            connection.execute(delete(requests).where(requests.c.owner == deliberation_id))
        forget(self.engine, deliberations, candidates, requests, request_events, *OF_MEMBERS)

    # --- the members' -------------------------------------------------------------------------------------------

    def join(self, deliberation_id: str, invite: str, alias: str, consent: bool, token: str) -> Member:
        """Make a member who has the token, or find the one who has it: joining is safe to repeat.

        Raises:
            ApiError: ``unauthorized`` on a wrong invite, ``wrong-state`` once opinions are frozen or the group is full.
        """
        with self.engine.begin() as connection:
            found = _find(connection, deliberation_id, lock=True)
            if found is None or not secrets.compare_digest(found.invite, digest(invite)):
                raise ApiError("unauthorized", "no deliberation has this id and this invite token")
            known = connection.execute(select(members).where(members.c.token == digest(token))).first()
            if known is not None and known.deliberation == deliberation_id:
                return Member(known.id, known.deliberation, known.number)
            if known is not None or found.state != COLLECTING:
                raise _wrong_state(found, "members join while opinions are collected")
            of = members.c.deliberation == deliberation_id
            last = connection.execute(select(func.max(members.c.number)).where(of)).scalar()
            number = 0 if last is None else last + 1
            if number >= MAX_MEMBERS:
                raise ApiError("wrong-state", f"the group is full: {MAX_MEMBERS} members")
            row = {
                "id": new_id("mbr"), "deliberation": deliberation_id, "number": number, "alias": alias,
                "token": digest(token), "consent": consent, "created": self.clock(),
            }  # fmt: skip
            connection.execute(insert(members).values(row))
            return Member(str(row["id"]), deliberation_id, number)

    def member(self, token: str) -> Member | None:
        """Who has this token."""
        with reading(self.engine) as connection:
            row = connection.execute(select(members).where(members.c.token == digest(token))).first()
        return None if row is None else Member(row.id, row.deliberation, row.number)

    def about(self, member: Member) -> tuple[Row, int, str | None]:
        """The member's row, and version and text of the opinion: 0 and None before there is one."""
        with reading(self.engine) as connection:
            row = connection.execute(select(members).where(members.c.id == member.id)).one()
            newest = connection.execute(_versions(member).limit(1)).first()
        return (row, 0, None) if newest is None else (row, newest.version, newest.text)

    def set_consent(self, member: Member, consent: bool) -> None:
        """Let training have what the member said and will say, or not; exports follow at once."""
        with self.engine.begin() as connection:
            connection.execute(update(members).where(members.c.id == member.id).values(consent=consent))

    def write_opinion(self, member: Member, text: str, expected: int | None) -> int:
        """Keep a new version of the member's opinion; an equal text is not a new one.

        Args:
            expected: the version that the member last saw, 0 for none; None does not know.

        Returns:
            The version now, from 1.

        Raises:
            ApiError: ``precondition-failed``, if there is another version than expected; ``wrong-state`` once frozen.
        """
        with self.engine.begin() as connection:
            row = _get(connection, member.deliberation, lock=True)
            if row.state != COLLECTING:
                raise _wrong_state(row, "opinions are frozen")
            newest = connection.execute(_versions(member).limit(1)).first()
            version = 0 if newest is None else newest.version
            if newest is not None and newest.text == text:
                return version  # a repeated request
            if version != expected and not (expected is None and version == 0):
                raise ApiError("precondition-failed", f"the opinion is at version {version}; send it as If-Match")
            values = {"member": member.id, "version": version + 1, "text": text, "created": self.clock()}
            connection.execute(insert(opinions).values(values))
            return version + 1

    def erase_member(self, member: Member) -> None:
        """Remove a member with opinions, ratings, comparisons, critiques and what was predicted of them.

        Raises:
            ApiError: ``not-found``, if the deliberation was erased meanwhile.
        """
        with self.engine.begin() as connection:
            _get(connection, member.deliberation, lock=True)  # else two who leave at once write each other's id back
            connection.execute(delete(members).where(members.c.id == member.id))
            for row in connection.execute(select(candidates).where(candidates.c.deliberation == member.deliberation)):
                predicted = json.loads(row.predicted)
                if predicted.pop(member.id, None) is not None:
                    change = update(candidates).where(candidates.c.id == row.id)
                    connection.execute(change.values(predicted=json.dumps(predicted)))
        forget(self.engine, candidates, *OF_MEMBERS)

    # --- what generation reads and writes -----------------------------------------------------------------------

    def written(self, deliberation_id: str) -> list[tuple[str, str]]:
        """(member id, newest opinion) of all who wrote one, in the order of joining."""
        with reading(self.engine) as connection:
            return written(connection, deliberation_id)

    def criticised(self, deliberation_id: str) -> tuple[str, dict[str, str]]:
        """The first round's winner, and member id -> critique of it."""
        with reading(self.engine) as connection:
            row = connection.execute(_winner(deliberation_id)).one()
            return row.statement, _critiques(connection, deliberation_id)

    def keep(
        self, deliberation_id: str, generation: str, rows: list[dict[str, Any]], arms: list[dict[str, Any]]
    ) -> None:
        """Keep a round's candidates, and which arm of an experiment wrote which; rating begins.

        Where another generation is going on by now, or none, it changes nothing. What was predicted of members who
        have left meanwhile is dropped.

        Args:
            generation: which one wrote them.
            rows: of ``candidates``, without ids' owner, round and time.
            arms: for ``trials.expose``.
        """
        with self.engine.begin() as connection:
            row = _get(connection, deliberation_id, lock=True)
            if row.state != GENERATING or row.generation != generation:
                return
            common = {"deliberation": deliberation_id, "round": row.round, "created": self.clock()}
            there = select(members.c.id).where(members.c.deliberation == deliberation_id)
            here = set(connection.execute(there).scalars())
            kept = [each | common | {"predicted": _of_members(each["predicted"], here)} for each in rows]
            connection.execute(insert(candidates), kept)
            if arms:
                trials.expose(connection, deliberation_id, arms)
            change = update(deliberations).where(deliberations.c.id == deliberation_id)
            connection.execute(change.values(state=RATING))

    def failed(self, deliberation_id: str, generation: str, problem: dict[str, Any], arm: str | None) -> None:
        """Go back to where generation began, and keep why; an experiment counts the arm's failure, if it was one's.

        Where another generation is going on by now, or the deliberation was erased, it changes nothing.
        """
        with self.engine.begin() as connection:
            row = _find(connection, deliberation_id, lock=True)
            if row is None or row.state != GENERATING or row.generation != generation:
                return
            if row.experiment is not None and arm is not None:
                trials.note_failure(connection, row.experiment, deliberation_id, arm, problem["type"])
            back = {"state": COLLECTING, "round": 1} if row.round == 1 else {"state": RATING, "round": 1}
            change = update(deliberations).where(deliberations.c.id == deliberation_id)
            connection.execute(change.values(problem=json.dumps(problem), **back))


def written(connection: Connection, deliberation_id: str) -> list[tuple[str, str]]:
    """``Sessions.written``, inside a transaction."""
    later = opinions.alias()
    newest = (
        ~select(later).where((later.c.member == opinions.c.member) & (later.c.version > opinions.c.version)).exists()
    )
    found = (
        select(members.c.id, opinions.c.text)
        .join(opinions, opinions.c.member == members.c.id)
        .where((members.c.deliberation == deliberation_id) & newest)
        .order_by(members.c.number)
    )
    return [(row.id, row.text) for row in connection.execute(found)]


def _get(connection: Connection, deliberation_id: str, owner: str | None = None, lock: bool = False) -> Row:
    row = _find(connection, deliberation_id, owner, lock)
    if row is None:
        raise ApiError("not-found", "no deliberation of that id; it may have been erased")
    return row


def _find(connection: Connection, deliberation_id: str, owner: str | None = None, lock: bool = False) -> Row | None:
    if not may_be_id(deliberation_id):
        return None
    where = deliberations.c.id == deliberation_id
    if owner is not None:
        where &= deliberations.c.owner == owner
    found = select(deliberations).where(where)
    return connection.execute(found.with_for_update() if lock else found).first()


def _place(mark: str) -> tuple[float, str]:
    """When the last deliberation of a page was created, and its id."""
    found = re.fullmatch(r"(\d{1,12}\.\d{1,12})_(\w{1,40})", mark, re.ASCII)
    if found is None:
        raise InputError("after", mark, "give `next` of the page before")
    return float(found[1]), found[2]


def _of_members(predicted: str, here: set[str]) -> str:
    """JSON of member id -> predicted agreement, for those who are here."""
    return json.dumps({member: value for member, value in json.loads(predicted).items() if member in here})


def _wrong_state(row: Row, why: str) -> ApiError:
    return ApiError("wrong-state", f"the deliberation is {row.state}: {why}")


def _versions(member: Member) -> Any:
    return select(opinions).where(opinions.c.member == member.id).order_by(opinions.c.version.desc())


def _winner(deliberation_id: str) -> Any:
    mine = (candidates.c.deliberation == deliberation_id) & (candidates.c.round == 1) & candidates.c.winner
    return select(candidates).where(mine)


def _critiques(connection: Connection, deliberation_id: str) -> dict[str, str]:
    found = connection.execute(
        select(critiques.c.member, critiques.c.text)
        .join(candidates, candidates.c.id == critiques.c.candidate)
        .where((candidates.c.deliberation == deliberation_id) & candidates.c.winner)
    )
    return {row.member: row.text for row in found}


def check_token(field: str, token: str, prefix: str) -> str:
    """A token that a client made itself.

    Raises:
        InputError: unless it has the prefix and 32 to 100 characters behind it.
    """
    rest = token.removeprefix(prefix)
    if not token.startswith(prefix) or not 32 <= len(rest) <= 100 or not rest.isascii() or not rest.isprintable():
        raise InputError(field, token[:8], f"write {prefix} and 32 to 100 random characters, or leave it out")
    return token
