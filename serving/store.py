"""Where the service keeps what must outlive a process: a database by URL, SQLite by default.

The tables are in ``tables``; what is done with them in ``ledger`` (requests), ``keys``, ``sessions`` (deliberations)
and ``trials`` (experiments).
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from deliberation.types import InputError
from serving.migrate import migrate
from serving.turns import Turns

BUSY_TIMEOUT_S = 10
"""How long a writer waits for another one in SQLite."""

AUTOCOMMIT = "AUTOCOMMIT"


def open_store(url: str) -> Engine:
    """Connect, and bring the tables to this version of the service.

    Args:
        url: as SQLAlchemy takes it: ``sqlite:///runs/service.db``, ``postgresql+psycopg://user@host/name``.

    Raises:
        InputError: field ``database``, if the URL is not one, nothing answers there, or a later version of the service
            wrote it.
    """
    engine = connect(url)
    migrate(engine)
    return engine


def connect(url: str) -> Engine:
    """An engine for the URL; tables are left as they are.

    Raises:
        InputError: field ``database``, if the URL is not one.
    """
    try:
        parsed = make_url(url)
        return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, ImportError) as error:
        raise InputError("database", url, f"{error}; write a URL like sqlite:///runs/service.db") from error


def check_there(url: str) -> None:
    """Refuse an SQLite file that is not there, where nothing is to be made anew.

    Raises:
        InputError: field ``database``.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
        raise InputError("database", url, "no such file; go to where the service runs, or name its database")


def check_nodes(url: str, nodes: int) -> None:
    """Refuse a file as the database of a cluster: every node would write one of its own.

    Raises:
        InputError: field ``database``, for SQLite on more than one node.
    """
    if nodes > 1 and make_url(url).get_backend_name() == "sqlite":
        mend = f"is a file, and this cluster has {nodes} nodes with a disk each; give the URL of a PostgreSQL"
        raise InputError("database", url, mend)


def new_id(prefix: str) -> str:
    """A random id that names a row in URLs, e.g. ``del_`` and 16 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(8)}"


def reading(engine: Engine) -> Connection:
    """A connection for single look-ups, outside of any transaction: in SQLite it never waits for a writer."""
    return engine.connect().execution_options(isolation_level=AUTOCOMMIT)


def forget(engine: Engine, *tables: Table) -> None:
    """Leave nothing in the files of these tables of what was deleted.

    SQLite's write-ahead log would keep it for a while; PostgreSQL's tables would, until the next vacuum. PostgreSQL's
    own log and back-ups of either are the operator's (docs/operations.md).
    """
    vacuum = f"VACUUM {', '.join(table.name for table in tables)}"
    statement = "PRAGMA wal_checkpoint(TRUNCATE)" if engine.dialect.name == "sqlite" else vacuum
    with reading(engine) as connection:
        connection.exec_driver_sql(statement)


def _sqlite(url: Any) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    else:
        raise InputError("database", str(url), "name a file: every thread and process would have a memory of its own")
    # Kept open: opening one reads the whole schema. As many as there are threads, or one could wait for another's turn
    engine = create_engine(url, poolclass=QueuePool, max_overflow=-1, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    turns = Turns()  # SQLite's own wait is a poll that can pass a thread over for seconds

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != AUTOCOMMIT:
            if not connection.info.get("turn"):
                connection.info["turn"] = turns.take(BUSY_TIMEOUT_S)
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # a later upgrade from reader to writer could not wait

    @event.listens_for(engine, "checkin")
    def checkin(connection: Any, record: Any) -> None:
        if record.info.pop("turn", False):
            turns.give_back()

    return engine
