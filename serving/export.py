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

from sqlalchemy import Connection, Engine, Select, bindparam, func, select, text

from deliberation.types import InputError
from serving.config import ServeConfig
from serving.files import replacing
from serving.store import open_store, reading
from serving.tables import candidates, deliberations, experiments, exposures, members, opinions, ratings

PAGE = 5000
"""Ratings in memory at a time."""


def export_rows(engine: Engine, after: int = 0, page: int = PAGE) -> Iterator[dict[str, Any]]:
    """The ratings behind number ``after`` that were there when it was asked for; each page as of the time it is read.

    Yields:
        Dictionaries with ``number``, ``deliberation_id``, ``member`` (number in the deliberation, from 0),
        ``question``, ``opinion`` (the newest version), ``statement``, ``arm`` (None without one, or where both arms
        wrote the statement), ``propensity`` (of the arm; 1.0 without one), ``policy_weights`` (print of the weights
        that wrote the statement), ``agreement`` and ``quality`` (1 to 7) and ``created`` (seconds since 1970).
    """
    newest = _newest(engine)
    while after < newest:
        with reading(engine) as connection:
            if engine.dialect.name == "postgresql":  # compiling would take longer than a page does
                connection.exec_driver_sql("SET jit = off")
            rated = connection.execute(_RATED, {"after": after, "newest": newest, "page": page}).all()
            said = _by_id(connection, _SAID, {row.member for row in rated})
            written = _by_id(connection, _WRITTEN, {row.candidate for row in rated if row.member in said})
        for row in written.values():
            row["policy_weights"] = _weights(row["policy_weights"])
        for number, member, candidate, current, agreement, quality, created in rated:
            if current and member in said and candidate in written:
                yield {
                    "number": number, **said[member], **written[candidate],
                    "agreement": agreement, "quality": quality, "created": created,
                }  # fmt: skip
        after = rated[-1].number if rated else newest


def _by_id(connection: Connection, query: Select, ids: set[str]) -> dict[str, dict[str, Any]]:
    rows = map(dict, connection.execute(query, {"ids": list(ids)}).mappings())
    return {row.pop("id"): row for row in rows}


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


# Three look-ups a page, put together here: one join would send each question, opinion and statement many times over
_RATED = (
    select(ratings.c.number, ratings.c.member, ratings.c.candidate, ratings.c.current)
    .add_columns(ratings.c.agreement, ratings.c.quality, ratings.c.created)
    .where(ratings.c.number > bindparam("after"), ratings.c.number <= bindparam("newest"))
    .order_by(ratings.c.number)
    .limit(bindparam("page"))
)
_SAID = (
    select(members.c.id, members.c.deliberation.label("deliberation_id"), members.c.number.label("member"))
    .add_columns(deliberations.c.question, _opinion.label("opinion"))
    .join(deliberations, deliberations.c.id == members.c.deliberation)
    .outerjoin(experiments, experiments.c.id == deliberations.c.experiment)
    .where(members.c.id.in_(bindparam("ids", expanding=True)), members.c.consent, _opinion.is_not(None))
    .where(deliberations.c.experiment.is_(None) | experiments.c.stopped.is_not(None))
)
"""Members whose ratings may go out."""
_WRITTEN = select(
    candidates.c.id,
    candidates.c.statement,
    _of_the_arm(exposures.c.arm).label("arm"),
    func.coalesce(_of_the_arm(exposures.c.propensity), 1.0).label("propensity"),
    candidates.c.versions.label("policy_weights"),
).where(candidates.c.id.in_(bindparam("ids", expanding=True)))


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
