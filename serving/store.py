"""Where the service keeps what must outlive a process: a database by URL, SQLite by default.

The tables are in ``tables``; what is done with them in ``ledger`` (requests), ``keys``, ``sessions`` (deliberations)
and ``trials`` (experiments).
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from deliberation.types import InputError
from serving.migrate import migrate
from serving.turns import Turns

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 10
"""How long a writer waits for another one in SQLite."""

FORGET_TRIES, FORGET_PAUSE_S = 5, 0.02
"""An erasure waits so often, and so long, for those who read SQLite's log at this moment."""

AGAIN_S = 1.0
"""Where that was not enough, a writer tries again; a process does at most so often."""

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
    empty_log(engine)  # a process that was killed may not have come to it
    return engine


def connect(url: str) -> Engine:
    """An engine for the URL; tables are left as they are.

    Raises:
        InputError: field ``database``, if the URL is not one.
    """
    parsed = _parsed(url)
    try:
        # Without hide_parameters an error would quote what people wrote, and end in a log
        return _sqlite(parsed) if _is_file(parsed) else create_engine(parsed, pool_pre_ping=True, hide_parameters=True)
    except (ArgumentError, ImportError) as error:
        raise _no_url(url, error) from error


def absolute(url: str) -> str:
    """The URL with an SQLite file's path made absolute; that of a server as it is.

    Raises:
        InputError: field ``database``, if it is no URL.
    """
    parsed = _parsed(url)
    if not _is_file(parsed) or parsed.database in (None, "", ":memory:"):
        return url
    return parsed.set(database=str(Path(str(parsed.database)).resolve())).render_as_string(hide_password=False)


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise _no_url(url, error) from error


def _no_url(url: str, error: Exception) -> InputError:
    return InputError("database", url, f"{error}; write a URL like sqlite:///runs/service.db")


def _is_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def check_there(url: str) -> None:
    """Refuse an SQLite file that is not there, where nothing is to be made anew.

    Raises:
        InputError: field ``database``.
    """
    parsed = _parsed(url)
    if _is_file(parsed) and not Path(str(parsed.database)).is_file():
        raise InputError("database", url, "no such file; go to where the service runs, or name its database")


def check_nodes(url: str, nodes: int) -> None:
    """Refuse a file as the database of a cluster: every node would write one of its own.

    Raises:
        InputError: field ``database``, for SQLite on more than one node.
    """
    if nodes > 1 and _is_file(_parsed(url)):
        mend = f"is a file, and this cluster has {nodes} nodes with a disk each; give the URL of a PostgreSQL"
        raise InputError("database", url, mend)


def new_id(prefix: str) -> str:
    """A random id that names a row in URLs, e.g. ``del_`` and 16 hexadecimal digits."""
    return f"{prefix}_{secrets.token_hex(8)}"


def may_be_id(text: str) -> bool:
    """Whether a row could have this id: PostgreSQL refuses even to look for a text with a NUL character."""
    return "\0" not in text


def reading(engine: Engine) -> Connection:
    """A connection for single look-ups, outside of any transaction: in SQLite it never waits for a writer."""
    return engine.connect().execution_options(isolation_level=AUTOCOMMIT)


def forget(engine: Engine, *tables: Table) -> None:
    """Leave nothing in the files of these tables of what was deleted.

    SQLite's write-ahead log would keep it for a while; PostgreSQL's tables would, until the next vacuum. PostgreSQL's
    own log and back-ups of either are the operator's (docs/operations.md). While somebody reads from SQLite's log, such
    as a backup, it stays: a later writer of this process, or the end of that backup, empties it then.
    """
    if engine.dialect.name == "sqlite":
        empty_log(engine)
    else:
        with reading(engine) as connection:
            connection.exec_driver_sql(f"VACUUM {', '.join(table.name for table in tables)}")


def empty_log(engine: Engine) -> None:
    """Move all of SQLite's write-ahead log to the file, or have a later writer do so; PostgreSQL has none of the kind.

    Args:
        engine: of ``connect``.
    """
    if engine.dialect.name != "sqlite":
        return
    state = _LOGS[engine]
    state.left = True
    for k in range(FORGET_TRIES):
        if k:
            time.sleep(FORGET_PAUSE_S)
        with reading(engine) as connection:
            connection.info["turn"] = state.turns.take(BUSY_TIMEOUT_S)
            state.empty(connection.connection.dbapi_connection)
        if not state.left:
            return


class Log:
    """SQLite's write-ahead log, as one process knows it.

    Attributes:
        left: whether something that was erased may still be in it.
        turns: of this process's writers.
    """

    def __init__(self) -> None:
        self.left, self.turns = False, Turns()
        self._tried = 0.0

    def due(self) -> bool:
        """Whether a writer should try to empty it now."""
        return self.left and time.monotonic() - self._tried >= AGAIN_S

    def empty(self, connection: Any) -> bool:
        """Empty it, unless somebody reads from it: nobody waits for them. To be called in a writer's turn.

        Args:
            connection: SQLite's own, outside of a transaction.

        Returns:
            Whether it is empty.
        """
        self._tried, self.left = time.monotonic(), True
        try:
            connection.execute("PRAGMA busy_timeout = 0")  # else it would hold writers up while it waits for readers
            try:
                self.left = bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            finally:
                connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_TIMEOUT_S}")
        except sqlite3.Error as error:  # what was erased is deleted all the same, and its transaction is over
            log.warning("SQLite's write-ahead log could not be emptied: %s", error)
        return not self.left


_LOGS: WeakKeyDictionary[Engine, Log] = WeakKeyDictionary()


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn on the write-ahead log. Where others open a new file too, SQLite refuses this without its usual wait."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(FORGET_PAUSE_S)


def _sqlite(url: Any) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    else:
        raise InputError("database", str(url), "name a file: every thread and process would have a memory of its own")
    # Kept open: opening one reads the whole schema. As many as there are threads, or one could wait for another's turn
    options = {"poolclass": QueuePool, "max_overflow": -1, "connect_args": {"timeout": BUSY_TIMEOUT_S}}
    engine = create_engine(url, hide_parameters=True, **options)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        _write_ahead(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    state = _LOGS[engine] = Log()
    turns = state.turns  # SQLite's own wait is a poll that can pass a thread over for seconds

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != AUTOCOMMIT:
            if not connection.info.get("turn"):
                connection.info["turn"] = turns.take(BUSY_TIMEOUT_S)
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # a later upgrade from reader to writer could not wait

    @event.listens_for(engine, "checkin")
    def checkin(connection: Any, record: Any) -> None:
        if record.info.pop("turn", False):
            if connection is not None and state.due():
                state.empty(connection)
            turns.give_back()

    return engine
