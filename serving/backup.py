"""The whole database as one file, and back: gzipped JSON lines, from SQLite to PostgreSQL and the other way too.

The file has a header with the tables' revision; for each table, parents first, its columns, the last number it gave
out, and its rows; and a last line with the count of rows and the SHA-256 of all lines before: a torn file is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, func, insert, select, text
from sqlalchemy.exc import DatabaseError

from deliberation.types import InputError
from serving.files import replacing
from serving.migrate import KNOWN, NEWEST, bring, current, lock
from serving.store import empty_log, reading

FORMAT = 1
_BATCH = 2000
"""Rows in memory at a time."""


def backup(engine: Engine, file: str | Path) -> dict[str, int]:
    """Write all tables, of whatever revision, as they are at one moment; the service may go on.

    Returns:
        Table -> rows written.

    Raises:
        InputError: ``database`` without our tables, or a ``file`` that cannot be written.
    """
    with (
        snapshot(engine) as connection,
        replacing("file", file) as out,
        gzip.GzipFile(fileobj=out, mode="wb") as packed,
    ):
        digest, rows = hashlib.sha256(), {}

        def write(value: Any) -> None:
            line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            packed.write(line)

        write({"format": FORMAT, "revision": current(connection), "created": datetime.now(UTC).isoformat()})
        for table in _tables(connection):
            columns = [column.name for column in table.columns]
            write({"table": table.name, "columns": columns, "last": _last_number(connection, table)})
            rows[table.name] = 0
            for row in connection.execute(select(table), execution_options={"yield_per": _BATCH}):
                write(list(row))
                rows[table.name] += 1
        write({"rows": sum(rows.values()), "sha256": digest.hexdigest()})
    return rows


def restore(engine: Engine, file: str | Path) -> dict[str, int]:
    """Fill an empty database from a backup and bring it to this version: all of it, or nothing.

    Returns:
        Table -> rows restored.

    Raises:
        InputError: a ``database`` that has rows, or a ``file`` that is none of ours, torn, or of a later version.
    """
    with engine.begin() as connection:
        lock(connection)  # before we look: no service that starts, nor another restore, may fill it meanwhile
        for table in _tables(connection):
            if connection.execute(select(table).limit(1)).first() is not None:
                url = engine.url.render_as_string(hide_password=True)
                raise InputError("database", url, f"has rows ({table.name}); restore into an empty one")
        lines = _read(Path(file))
        bring(connection, _revision(file, next(lines)))
        tables = {table.name: table for table in _tables(connection)}
        rows = dict.fromkeys(tables, 0)
        for head, values in _sections(lines):
            table = tables[head["table"]]
            for batch in _batches(dict(zip(head["columns"], row, strict=True)) for row in values):
                connection.execute(insert(table), batch)
                rows[table.name] += len(batch)
            _set_last_number(connection, table, head["last"])
        bring(connection, NEWEST)
    return rows


def check(engine: Engine) -> tuple[str, dict[str, int]]:
    """Look for damage; in PostgreSQL, whether all rows can be read.

    Returns:
        The tables' revision, and table -> rows.

    Raises:
        InputError: field ``database``, if it is damaged, or has none of our tables.
    """
    url = engine.url.render_as_string(hide_password=True)
    try:
        with snapshot(engine) as connection:
            if engine.dialect.name == "sqlite":
                found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check") if row[0] != "ok"]
                orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                found += [f"{row[0]} has a row without its {row[2]}" for row in orphans]
                if found:
                    raise InputError("database", url, f"is damaged ({found[0]}, {len(found)} in all); restore a backup")
            count = select(func.count())
            rows = {t.name: connection.execute(count.select_from(t)).scalar_one() for t in _tables(connection)}
            return str(current(connection)), rows
    except DatabaseError as error:
        reason = " ".join(str(error.orig).split())
        raise InputError("database", url, f"cannot be read ({reason}); restore a backup") from error


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection that sees the database as it is now, whatever is written meanwhile; no writer waits.

    At its end, what was erased meanwhile leaves SQLite's log, which kept it for this connection.

    Raises:
        InputError: field ``database``, if none of our tables are there.
    """
    sqlite = engine.dialect.name == "sqlite"
    if sqlite and not Path(str(engine.url.database)).is_file():
        raise InputError("database", str(engine.url), "is not there; name the service's database")
    options = {} if sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with reading(engine) if sqlite else engine.connect().execution_options(**options) as connection:
        if sqlite:
            connection.exec_driver_sql("BEGIN")  # deferred, where the engine's own begin would lock writers out
        if current(connection) is None:
            raise InputError("database", engine.url.render_as_string(hide_password=True), "has no tables of ours")
        yield connection
    empty_log(engine)


def _tables(connection: Connection) -> list[Table]:
    """The tables that are there, parents first."""
    found = MetaData()
    found.reflect(connection)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def _last_number(connection: Connection, table: Table) -> int | None:
    """The last number that the table gave a row by itself; None where it gives none."""
    column = table.autoincrement_column
    if column is None:
        return None
    if connection.dialect.name == "sqlite":
        found = text("SELECT seq FROM sqlite_sequence WHERE name = :name")
        return connection.execute(found, {"name": table.name}).scalar() or 0
    last, used = connection.exec_driver_sql(f"SELECT last_value, is_called FROM {_sequence(connection, table)}").one()
    return int(last) if used else 0


def _set_last_number(connection: Connection, table: Table, last: int | None) -> None:
    """Go on counting after ``last``: a number that was given once is not given again, though its row be gone."""
    if not last:
        return
    if connection.dialect.name == "sqlite":
        connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": table.name})
        row = {"name": table.name, "last": last}
        connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :last)"), row)
    else:
        row = {"name": _sequence(connection, table), "last": last}
        connection.execute(text("SELECT setval(CAST(:name AS regclass), :last)"), row)


def _sequence(connection: Connection, table: Table) -> str:
    column = table.autoincrement_column
    assert column is not None
    of = {"table": table.name, "column": column.name}
    return str(connection.execute(text("SELECT pg_get_serial_sequence(:table, :column)"), of).scalar_one())


def _read(path: Path) -> Iterator[Any]:
    """The file's lines but the last, which is checked.

    Raises:
        InputError: field ``file``.
    """
    digest, rows, last = hashlib.sha256(), 0, None
    try:
        with gzip.open(path) as lines:
            for line in lines:
                if last is not None:
                    raise ValueError("there is more after its end")
                value = json.loads(line)
                if isinstance(value, dict) and "sha256" in value:
                    last = value
                    continue
                digest.update(line)
                rows += isinstance(value, list)
                yield value
        if last is None or (last["rows"], last["sha256"]) != (rows, digest.hexdigest()):
            raise ValueError("its last line is not there" if last is None else "it was changed")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError("file", str(path), f"is no whole backup ({error}); give one of consensus store") from error


def _revision(file: str | Path, header: Any) -> str:
    found = header.get("revision") if isinstance(header, dict) and header.get("format") == FORMAT else None
    if found not in KNOWN:
        raise InputError("file", str(file), f"has tables of revision {found}, this version knows {', '.join(KNOWN)}")
    return str(found)


def _sections(lines: Iterator[Any]) -> Iterator[tuple[dict[str, Any], Iterator[list[Any]]]]:
    """(Head, rows) of each table; the rows are to be read before the next head."""
    head = next(lines, None)
    while head is not None:
        following: list[dict[str, Any]] = []
        yield head, _rows(lines, following)
        head = following[0] if following else None


def _rows(lines: Iterator[Any], following: list[dict[str, Any]]) -> Iterator[list[Any]]:
    for value in lines:
        if isinstance(value, dict):
            following.append(value)
            return
        yield value


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
