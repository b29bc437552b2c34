"""Requests that outlive a process: those with an idempotency key, and those answered in the background.

A request is *running* while its runner renews a lease. When a runner dies the lease runs out, and whoever meets the
request next may carry it out: answers are a pure function of request and seed, so doing it twice does no harm.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from serving.problems import ApiError
from serving.store import forget, may_be_id, reading
from serving.tables import request_events, requests

RUNNING, DONE, FAILED = "running", "done", "failed"
LEASE_S = 6.0
"""How long a runner may be silent; clients of a dead one wait so long at most."""
GONE = "no request of that id; it may have been erased"
SWEEP_EVERY_S = 60.0
"""A process looks at most so often for requests to erase."""


@dataclass(frozen=True)
class Entry:
    """A recorded request.

    Attributes:
        id: names it in URLs.
        body: the request as JSON.
        state: ``running``, ``done`` or ``failed``.
        answer: JSON of the response, or of the problem; None while running.
        runner: who carries it out.
        lease, created: seconds since 1970.
    """

    id: str
    body: str
    state: str
    answer: str | None
    runner: str
    lease: float
    created: float


@dataclass(frozen=True)
class Event:
    """One step of a request: ``number`` from 0, ``type`` and JSON ``data``."""

    number: int
    type: str
    data: str


def fingerprint(body: str) -> str:
    """SHA-256 of a request's JSON: whether two requests are the same."""
    return hashlib.sha256(body.encode()).hexdigest()


class Ledger:
    """The record of requests in a database.

    Args:
        engine: of ``store.open_store``.
        clock: seconds since 1970; all processes must share it roughly (within a second or two).
        retention_s: requests and answers are erased after so long; None erases nothing.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time, retention_s: float | None = None):
        self._engine, self._clock, self._retention_s = engine, clock, retention_s
        self._swept = -math.inf

    def open(self, owner: str, key: str | None, body: str) -> tuple[Entry, bool]:
        """Record a request, or find the one with the same owner and idempotency key.

        Returns:
            The entry, and whether the caller is to carry it out now.

        Raises:
            ApiError: ``idempotency-mismatch``, if the key came with another body before.
        """
        self._erase_old()
        known = None if key is None else self._known(owner, key, body)
        if known is not None:
            return known
        try:
            return self._new(owner, key, body), True
        except IntegrityError:  # somebody came between the two steps
            return self.open(owner, key, body)

    def _new(self, owner: str, key: str | None, body: str) -> Entry:
        now = self._clock()
        entry = Entry(f"con_{secrets.token_hex(12)}", body, RUNNING, None, _runner(), now + LEASE_S, now)
        row = vars(entry) | {"owner": owner, "idempotency_key": key, "fingerprint": fingerprint(body)}
        with self._engine.begin() as connection:
            connection.execute(insert(requests).values(row))
        return entry

    def _known(self, owner: str, key: str, body: str) -> tuple[Entry, bool] | None:
        where = (requests.c.owner == owner) & (requests.c.idempotency_key == key)
        with reading(self._engine) as connection:
            row = connection.execute(select(requests).where(where)).one_or_none()
        if row is None:
            return None
        if row.fingerprint != fingerprint(body):
            raise ApiError("idempotency-mismatch", "the Idempotency-Key came with another body before; use a new one")
        taken = self.take_over(row.id) if self.is_dead(row.state, row.lease) else None
        return (taken, True) if taken is not None else (_entry(row), False)

    def is_dead(self, state: str, lease: float) -> bool:
        """Whether a request in that state, with that lease, has lost its runner."""
        return state == RUNNING and lease < self._clock()

    def take_over(self, entry_id: str) -> Entry | None:
        """The entry, now carried out by the caller, if its runner has died; None otherwise."""
        now, runner = self._clock(), _runner()
        dead = (requests.c.id == entry_id) & (requests.c.state == RUNNING) & (requests.c.lease < now)
        with self._engine.begin() as connection:
            taken = connection.execute(update(requests).where(dead).values(runner=runner, lease=now + LEASE_S))
            if taken.rowcount == 0:
                return None
            connection.execute(delete(request_events).where(request_events.c.request == entry_id))
            return _entry(connection.execute(select(requests).where(requests.c.id == entry_id)).one())

    def renew(self, entry: Entry) -> bool:
        """Prolong the runner's lease; False if the entry was erased or taken over: stop."""
        with self._engine.begin() as connection:
            return _change(connection, entry, lease=self._clock() + LEASE_S)

    def finish(self, entry: Entry, state: str, answer: Any) -> bool:
        """Keep the answer (JSON-able), and say so as the last event; False if the entry is another's by now.

        A failure frees its idempotency key: the same request may be made again.
        """
        data = json.dumps(answer)
        freed = {"idempotency_key": None} if state == FAILED else {}
        with self._engine.begin() as connection:  # one transaction: no answer without its event
            if not _change(connection, entry, state=state, answer=data, **freed):
                return False
            _append(connection, entry, [("done" if state == DONE else "error", data)])
            return True

    def release(self, entry: Entry) -> None:
        """Forget an entry that came to nothing, so that its key may be used again."""
        with self._engine.begin() as connection:
            connection.execute(
                delete(requests).where((requests.c.id == entry.id) & (requests.c.runner == entry.runner))
            )

    def find(self, entry_id: str, owner: str) -> Entry:
        """The owner's entry of that id.

        Raises:
            ApiError: ``not-found``.
        """
        where = _named(entry_id, owner)
        with reading(self._engine) as connection:
            row = connection.execute(select(requests).where(where)).one_or_none()
        if row is None:
            raise ApiError("not-found", GONE)
        return _entry(row)

    def standing(self, entry_id: str, owner: str) -> tuple[str, float]:
        """State and lease of the owner's entry of that id: what ``find`` reads, but for the texts.

        Raises:
            ApiError: ``not-found``.
        """
        where = _named(entry_id, owner)
        with reading(self._engine) as connection:
            row = connection.execute(select(requests.c.state, requests.c.lease).where(where)).one_or_none()
        if row is None:
            raise ApiError("not-found", GONE)
        return row.state, row.lease

    def erase(self, entry_id: str, owner: str) -> None:
        """Remove request, events and answer; a runner at work notices at its next renewal.

        Raises:
            ApiError: ``not-found``.
        """
        where = _named(entry_id, owner)
        with self._engine.begin() as connection:
            if connection.execute(delete(requests).where(where)).rowcount == 0:
                raise ApiError("not-found", GONE)
        forget(self._engine, requests, request_events)

    def add_events(self, entry: Entry, events: Sequence[tuple[str, Any]]) -> None:
        """Append (type, JSON-able data), unless the entry was erased or taken over."""
        with self._engine.begin() as connection:
            if _change(connection, entry, lease=self._clock() + LEASE_S):
                _append(connection, entry, [(kind, json.dumps(data)) for kind, data in events])

    def events(self, entry_id: str, first: int) -> list[Event]:
        """Events of a request from number ``first`` on, in order."""
        where = (request_events.c.request == entry_id) & (request_events.c.number >= first)
        with reading(self._engine) as connection:
            rows = connection.execute(select(request_events).where(where).order_by(request_events.c.number)).all()
        return [Event(row.number, row.type, row.data) for row in rows]

    def _erase_old(self) -> None:
        now = self._clock()
        if self._retention_s is None or now - self._swept < SWEEP_EVERY_S:
            return
        self._swept = now
        # One that somebody still carries out is left until it ends
        old = (requests.c.created < now - self._retention_s) & (requests.c.lease < now)
        with self._engine.begin() as connection:
            erased = connection.execute(delete(requests).where(old)).rowcount
        if erased:
            forget(self._engine, requests, request_events)


def _named(entry_id: str, owner: str) -> ColumnElement[bool]:
    if not may_be_id(entry_id):
        raise ApiError("not-found", GONE)
    return (requests.c.id == entry_id) & (requests.c.owner == owner)


def _change(connection: Connection, entry: Entry, **values: Any) -> bool:
    """Change the entry while it runs and is its runner's; whether that was so."""
    mine = (requests.c.id == entry.id) & (requests.c.runner == entry.runner) & (requests.c.state == RUNNING)
    return connection.execute(update(requests).where(mine).values(**values)).rowcount == 1


def _append(connection: Connection, entry: Entry, events: Sequence[tuple[str, str]]) -> None:
    count = select(func.count()).where(request_events.c.request == entry.id)
    first = connection.execute(count).scalar_one()
    rows = [{"request": entry.id, "number": first + k, "type": t, "data": d} for k, (t, d) in enumerate(events)]
    connection.execute(insert(request_events), rows)


def _runner() -> str:
    return secrets.token_hex(8)


def _entry(row: Any) -> Entry:
    return Entry(row.id, row.body, row.state, row.answer, row.runner, row.lease, row.created)
