"""Brings a database to a version of the tables: Alembic, with the steps of ``serving/migrations/versions``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import OperationalError

from deliberation.types import InputError

STEPS = Path(__file__).parent / "migrations"
BASELINE = "0001"
"""The tables of 0.1.0, which were made without Alembic."""
NEWEST = "0003"
"""The tables of this version; those of ``serving.tables``."""
KNOWN = (BASELINE, "0002", NEWEST)
"""All revisions, the oldest first."""
_LOCK = 7021_4821
"""PostgreSQL's advisory lock: several API processes start at once, one of them migrates."""


def migrate(engine: Engine, revision: str = NEWEST) -> None:
    """Bring the tables to ``revision``, up or down, all or nothing.

    Raises:
        InputError: field ``database``, if nothing answers there, it has a revision that this version does not know, or
            rows that the tables of this version do not allow.
    """
    with answering(engine), engine.begin() as connection:
        bring(connection, revision)


@contextmanager
def answering(engine: Engine) -> Iterator[None]:
    """Say so where nothing answers.

    Raises:
        InputError: field ``database``.
    """
    try:
        yield
    except OperationalError as error:
        url = engine.url.render_as_string(hide_password=True)
        reason = " ".join(str(error.orig).split())
        raise InputError("database", url, f"cannot be opened ({reason}); is it there, and may we write?") from error


def bring(connection: Connection, revision: str) -> None:
    """``migrate`` in a transaction of the caller's; until its end no other process migrates.

    Raises:
        InputError: as ``current``.
    """
    lock(connection)
    found = current(connection)
    if found != revision:
        _run(connection, found, revision)


def lock(connection: Connection) -> None:
    """Wait until no other process migrates or restores; none does until the end of the transaction.

    In SQLite the transaction itself is a writer's lock.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))


def current(connection: Connection) -> str | None:
    """The revision of a database; None for an empty one.

    Raises:
        InputError: field ``database``, on one that this version does not know.
    """
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        return BASELINE if "api_keys" in tables else None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if found not in (None, *KNOWN):
        mend = f"has tables of a later version ({found}, this one knows {NEWEST}); update the service"
        raise InputError("database", connection.engine.url.render_as_string(hide_password=True), mend)
    return found


def _run(connection: Connection, found: str | None, revision: str) -> None:
    from alembic import command  # only here: most starts have nothing to do
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(STEPS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if found == BASELINE:
        command.stamp(config, BASELINE)
    if found is not None and revision < found:
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)
