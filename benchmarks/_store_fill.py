"""Millions of ratings for ``benchmarks.store``, the quick way: COPY in PostgreSQL, no syncing in SQLite."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import psycopg
from sqlalchemy import Engine

MEMBERS, CANDIDATES = 20, 16
IN_EXPERIMENT = 10
"""Every so many-th deliberation is in a (stopped) experiment of two arms."""
_TEXT = "We should pay for it together, look after those who have least, and say openly every year what it costs us. "


def name(kind: str, *numbers: int) -> str:
    """The id of a row: in no order, as the service's own are, but the same each time."""
    return f"{kind}_{hashlib.blake2s(f'{kind} {numbers}'.encode(), digest_size=8).hexdigest()}"


def deliberation_rows(first: int, last: int) -> dict[str, Iterator[tuple[Any, ...]]]:
    """Table -> rows of deliberations ``first`` to ``last`` with members, opinions and candidates, parents first."""
    span = range(first, last)
    mixed = [d for d in span if d % IN_EXPERIMENT == 0]
    versions = json.dumps({"policy": "default", "policy_weights": "sha256:x", "preference_model_weights": "sha256:y"})
    predicted = {d: json.dumps({name("mbr", d, m): 4.25 for m in range(MEMBERS)}) for d in span}
    return {
        "deliberations": (
            (name("del", d), "anybody", f"Question {d}? {_TEXT}", "{}", "rating", 1, name("i", d), "s",
             None, None, name("exp", 0) if d in set(mixed) else None, 1.0, None)
            for d in span
        ),
        "members": (
            (name("mbr", d, m), name("del", d), m, "A", name("t", d, m), True, 1.0)
            for d in span for m in range(MEMBERS)
        ),
        "opinions": ((name("mbr", d, m), 1, f"{m}: {_TEXT}{_TEXT}", 1.0) for d in span for m in range(MEMBERS)),
        "candidates": (
            (name("can", d, c), name("del", d), 1, c, f"{d}.{c}: {_TEXT}{_TEXT}", "default", versions, 4.0,
             predicted[d], c == 0, 1.0)
            for d in span for c in range(CANDIDATES)
        ),
        "exposures": (
            (name("del", d), arm, name("can", d, c), name("exp", 0), 0.5, 1.0, 1.0)
            for d in mixed for c, arm in enumerate(("old", "new"))
        ),
    }  # fmt: skip


def rating_rows(first: int, last: int, number: int) -> Iterator[tuple[Any, ...]]:
    """Everybody's rating of every candidate, counted from ``number``."""
    for d in range(first, last):
        for c in range(CANDIDATES):
            candidate = name("can", d, c)
            for m in range(MEMBERS):
                member, value = name("mbr", d, m), (d + 3 * c + 5 * m) % 7 + 1
                yield number, member, candidate, 1, True, value, 8 - value, None, 2.0
                number += 1


COLUMNS = {
    "experiments": "id owner name spec salt created stopped verdict",
    "deliberations": "id owner question settings state round invite salt generation problem experiment created closed",
    "members": "id deliberation number alias token consent created",
    "opinions": "member version text created",
    "candidates": "id deliberation round number statement policy versions welfare predicted winner created",
    "exposures": "deliberation arm candidate experiment propensity seconds shown",
    "ratings": "number member candidate version current agreement quality idempotency_key created",
}


def fill(engine: Engine, ratings: int, unrated: int) -> int:
    """Deliberations with at least so many ratings, and ``unrated`` ones that are waiting for some.

    Returns:
        Deliberations that are rated; those after them are not.
    """
    rated = -(-ratings // (MEMBERS * CANDIDATES))
    sink = _sqlite(engine) if engine.dialect.name == "sqlite" else _postgres(engine)
    next(sink)
    sink.send(("experiments", iter([(name("exp", 0), "anybody", "old and new", "{}", "s", 1.0, 2.0, "{}")])))
    for first in range(0, rated + unrated, 500):
        last = min(first + 500, rated + unrated)
        for item in deliberation_rows(first, last).items():
            sink.send(item)
        sink.send(("ratings", rating_rows(first, min(last, rated), 1 + first * MEMBERS * CANDIDATES)))
    sink.close()
    return rated


def _sqlite(engine: Engine) -> Any:
    connection = sqlite3.connect(str(engine.url.database), isolation_level=None)
    for pragma in ("synchronous=OFF", "cache_size=-3000000", "foreign_keys=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    try:
        while True:
            table, rows = yield
            marks = ", ".join("?" * len(COLUMNS[table].split()))
            connection.execute("BEGIN")
            connection.executemany(f"INSERT INTO {table} ({COLUMNS[table].replace(' ', ', ')}) VALUES ({marks})", rows)
            connection.execute("COMMIT")
    finally:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("ANALYZE")
        connection.close()


def _postgres(engine: Engine) -> Any:
    with psycopg.connect(plain_url(engine), autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        try:
            while True:
                table, rows = yield
                copy = f"COPY {table} ({COLUMNS[table].replace(' ', ', ')}) FROM STDIN"
                with connection.cursor().copy(copy) as out:
                    for row in rows:
                        out.write_row(row)
        finally:
            connection.execute("SELECT setval(pg_get_serial_sequence('ratings', 'number'), max(number)) FROM ratings")
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")


def plain_url(engine: Engine) -> str:
    """The URL as psycopg takes it."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
