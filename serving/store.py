"""Where the service keeps what must outlive a process: a database by URL, SQLite by default.

Tables are SQLAlchemy's; what is done with them is in ``ledger`` (requests) and ``keys``. Times are seconds since 1970.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from deliberation.types import InputError

BUSY_TIMEOUT_S = 10
"""How long a writer waits for another one in SQLite."""

AUTOCOMMIT = "AUTOCOMMIT"

metadata = MetaData()

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the secret, which is kept nowhere
    Column("scopes", String(200), nullable=False),
    Column("rate_per_minute", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

requests = Table(
    "consensus_requests",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(40), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(12), nullable=False),
    Column("answer", Text),  # JSON: the response, or the problem
    Column("runner", String(40), nullable=False),
    Column("lease", Float, nullable=False),
    Column("created", Float, nullable=False, index=True),
    UniqueConstraint("owner", "idempotency_key"),
)

request_events = Table(
    "consensus_events",
    metadata,
    Column("request", String(40), ForeignKey("consensus_requests.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("type", String(20), nullable=False),
    Column("data", Text, nullable=False),
)


def open_store(url: str) -> Engine:
    """Connect, and make the tables that are missing.

    Args:
        url: as SQLAlchemy takes it: ``sqlite:///runs/service.db``, ``postgresql+psycopg://user@host/name``.

    Raises:
        InputError: field ``database``, if the URL is not one or nothing answers there.
    """
    try:
        parsed = make_url(url)
        engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, ImportError) as error:
        raise InputError("database", url, f"{error}; write a URL like sqlite:///runs/service.db") from error
    metadata.create_all(engine)
    return engine


def reading(engine: Engine) -> Connection:
    """A connection for single look-ups, outside of any transaction: in SQLite it never waits for a writer."""
    return engine.connect().execution_options(isolation_level=AUTOCOMMIT)


def forget(engine: Engine) -> None:
    """Leave nothing on disk of what was deleted: in SQLite the write-ahead log would keep it for a while."""
    if engine.dialect.name == "sqlite":
        with reading(engine) as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def _sqlite(url: Any) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    else:
        raise InputError("database", str(url), "name a file: every thread and process would have a memory of its own")
    # A connection a call: they are cheap, and none is shared among threads
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != AUTOCOMMIT:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # a later upgrade from reader to writer could not wait

    return engine
