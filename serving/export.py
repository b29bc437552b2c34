"""``consensus export``: members' ratings as JSON lines that ``consensus preference`` reads.

What goes out: the current ratings of members who consented and have written an opinion; none of an experiment that is
still running, so that nobody peeks. Rows are in the order of ``number``, which is never given twice: ask for those
after the last one you have. What was held back when you asked then stands before it; a whole export has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, bindparam, func, select, text

from deliberation.types import InputError
from serving.config import ServeConfig
from serving.files import replacing
from serving.store import open_store, reading
from serving.tables import candidates, deliberations, experiments, exposures, members, opinions, ratings

PAGE = 5000
"""Rows in memory at a time, and in one transaction."""


def export_rows(engine: Engine, after: int = 0, page: int = PAGE) -> Iterator[dict[str, Any]]:
    """The ratings behind number ``after`` that were there when it was asked for; each page as of the time it is read.

    Yields:
        Dictionaries with ``number``, ``deliberation_id``, ``member`` (number in the deliberation, from 0),
        ``question``, ``opinion`` (the newest version), ``statement``, ``agreement`` and ``quality`` (1 to 7), ``arm``
        (None without one, or where both arms wrote the statement), ``propensity`` (of the arm; 1.0 without one),
        ``policy_weights`` (print of the weights that wrote the statement) and ``created`` (seconds since 1970).
    """
    newest = _newest(engine)
    while after < newest:
        with reading(engine) as connection:
            if engine.dialect.name == "postgresql":  # compiling would take longer than a page does
                connection.exec_driver_sql("SET jit = off")
            edge = connection.execute(_EDGE, {"after": after, "skipped": page - 1}).scalar()
            edge = newest if edge is None else min(edge, newest)
            rows = connection.execute(_ROWS, {"after": after, "edge": edge}).all()
        for row in rows:
            found = dict(zip(COLUMNS, row, strict=True))
            if found["opinion"] is not None:
                yield found | {"policy_weights": _weights(found["policy_weights"])}
        after = edge


COLUMNS = (
    "number", "deliberation_id", "member", "question", "opinion", "statement", "agreement", "quality", "arm",
    "propensity", "policy_weights", "created",
)  # fmt: skip


@lru_cache(maxsize=1000)
def _weights(versions: str) -> str:
    return str(json.loads(versions)["policy_weights"])


def _newest(engine: Engine) -> int:
    """The last rating's number, once all with smaller ones are there: PostgreSQL's writers may finish out of turn."""
    with reading(engine) as connection:
        newest = connection.execute(select(func.max(ratings.c.number))).scalar() or 0
        if engine.dialect.name == "postgresql":
            writing = set(connection.execute(_WRITING).scalars())
            while writing:
                time.sleep(0.01)
                writing &= set(connection.execute(_WRITING).scalars())
    return newest


_WRITING = text(
    "SELECT virtualtransaction FROM pg_locks WHERE relation = CAST('ratings' AS regclass) AND mode = 'RowExclusiveLock'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
"""The transactions that write ratings now."""

_EDGE = (
    select(ratings.c.number)
    .where(ratings.c.number > bindparam("after"))
    .order_by(ratings.c.number)
    .offset(bindparam("skipped"))
    .limit(1)
)

_opinion = (
    select(opinions.c.text)
    .where(opinions.c.member == members.c.id)
    .order_by(opinions.c.version.desc())
    .limit(1)
    .scalar_subquery()
)
"""Not a join: PostgreSQL would read the whole table for every page."""


def _of_the_arm(column: Any) -> Any:
    """The value of the one arm that wrote the candidate; NULL if none did, or two."""
    one = select(func.min(column)).where(exposures.c.candidate == candidates.c.id).having(func.count() == 1)
    return one.scalar_subquery()


_ROWS = (
    select(
        ratings.c.number,
        deliberations.c.id.label("deliberation_id"),
        members.c.number.label("member"),
        deliberations.c.question,
        _opinion.label("opinion"),
        candidates.c.statement,
        ratings.c.agreement,
        ratings.c.quality,
        _of_the_arm(exposures.c.arm).label("arm"),
        func.coalesce(_of_the_arm(exposures.c.propensity), 1.0).label("propensity"),
        candidates.c.versions.label("policy_weights"),
        ratings.c.created,
    )
    .join(members, members.c.id == ratings.c.member)
    .join(candidates, candidates.c.id == ratings.c.candidate)
    .join(deliberations, deliberations.c.id == members.c.deliberation)
    .outerjoin(experiments, experiments.c.id == deliberations.c.experiment)
    .where(ratings.c.number > bindparam("after"), ratings.c.number <= bindparam("edge"), ratings.c.current)
    .where(members.c.consent)
    .where(deliberations.c.experiment.is_(None) | experiments.c.stopped.is_not(None))
    .order_by(ratings.c.number)
)


@dataclass
class ExportConfig:
    """Keys of ``consensus export``."""

    output: str = ""
    """The file to write, ``.jsonl``; what was there is replaced once all is written."""

    after: int = 0
    """Leave out ratings up to this number: that of the last one you have."""

    database: str = ServeConfig.database
    """URL of the service's database."""

    def __post_init__(self) -> None:
        if not self.output.endswith(".jsonl"):
            raise InputError("output", self.output, "name the file to write, with the ending .jsonl")
        if self.after < 0:
            raise InputError("after", self.after, "must be the number of a rating, or 0 for all")


def main(config: ExportConfig) -> None:
    """Write the file, and print how many ratings it has and from where to go on."""
    engine, count, last = open_store(config.database), 0, config.after
    with replacing("output", config.output) as out:
        for row in export_rows(engine, config.after):
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count, last = count + 1, row["number"]
    print(f"{config.output}: {count} ratings; next time, for those after them: --after {last}")
