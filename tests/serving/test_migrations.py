"""Databases of every version are brought to this one, and back, with what is in them; on SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from rows import ADDED, RELEASED, fill, held
from sqlalchemy import inspect, text

import cli
from deliberation.types import InputError
from serving.keys import create_key, list_keys
from serving.ledger import Ledger
from serving.migrate import BASELINE, KNOWN, NEWEST, STEPS, current, migrate
from serving.store import connect, open_store
from serving.tables import metadata

RELEASED_SQL = (Path(__file__).parent / "released.sql").read_text()
ROWS = {"0001": RELEASED, "0002": RELEASED | ADDED, "0003": RELEASED | ADDED}
"""Revision -> rows for each of its tables."""


def released(url):
    """A database as 0.1.0 leaves it, with rows in every table."""
    engine = connect(url)
    with engine.begin() as connection:
        for statement in RELEASED_SQL.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    fill(engine, RELEASED)
    return engine


def differences(engine):
    """What Alembic would change to make the tables those of ``serving.tables``."""
    with engine.connect() as connection:
        options = {"compare_type": True, "target_metadata": metadata}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def revision(engine):
    with engine.connect() as connection:
        return current(connection)


def shape(engine):
    """Everything the database tells of its tables."""
    found = inspect(engine)
    names = sorted(found.get_table_names())
    return {
        name: (
            str(found.get_columns(name)),
            str(found.get_pk_constraint(name)),
            sorted(map(str, found.get_foreign_keys(name))),
            sorted(map(str, found.get_unique_constraints(name))),
            sorted(map(str, found.get_indexes(name))),
            sorted(map(str, found.get_check_constraints(name))),
        )
        for name in names
        if name != "alembic_version"
    }


def test_a_database_of_the_first_release_is_opened_with_its_rows(store_url):
    before = released(store_url)
    old = held(before)
    assert {name: len(rows) for name, rows in old.items()} == {name: len(rows) for name, rows in RELEASED.items()}
    engine = open_store(store_url)
    now = held(engine)
    assert {name: now[name] for name in old} == old
    assert all(not rows for name, rows in now.items() if name not in old)
    assert revision(engine) == NEWEST and differences(engine) == []
    # and it serves: what is recorded is found, what is new is taken, what goes takes its events along
    ledger = Ledger(engine, clock=lambda: 5.0)
    assert ledger.find("con_1", "key_1").answer == '"yes"' and len(ledger.events("con_1", 0)) == 3
    ledger.erase("con_1", "key_1")
    assert held(engine)["consensus_events"] == []
    create_key(engine, "ben")
    assert [key.name for key in list_keys(engine)] == ["anna", "Žofie 🌱", "ben"]


def test_the_first_step_makes_what_the_first_release_made(store_url, tmp_path, request):
    engine = connect(store_url)
    migrate(engine, BASELINE)
    other = request.getfixturevalue("postgres_server").database() if "postgresql" in store_url else None
    assert shape(engine) == shape(released(other or f"sqlite:///{tmp_path}/released.db"))


@pytest.mark.parametrize("start", KNOWN)
def test_from_each_revision_to_the_newest_and_back(store_url, start):
    engine = connect(store_url)
    migrate(engine, start)
    fill(engine, ROWS[start])
    before, shapes = held(engine), shape(engine)
    assert all(before.values()), "a table has no rows"
    migrate(engine)
    assert revision(engine) == NEWEST and differences(engine) == []
    assert {name: rows for name, rows in held(engine).items() if name in before} == before
    migrate(engine, start)
    assert revision(engine) == start and held(engine) == before and shape(engine) == shapes
    migrate(engine, BASELINE)  # what is older is kept, whatever goes
    assert held(engine) == {name: rows for name, rows in before.items() if name in RELEASED}
    migrate(engine)
    assert differences(engine) == []


def test_a_new_database_is_one_that_was_brought_up(store_url, tmp_path, request):
    other = request.getfixturevalue("postgres_server").database() if "postgresql" in store_url else None
    old = released(other or f"sqlite:///{tmp_path}/released.db")
    migrate(old)
    new = open_store(store_url)
    assert revision(new) == NEWEST == KNOWN[-1] and differences(new) == []
    assert shape(new) == shape(old)


def test_every_revision_has_a_step():
    steps = sorted(path.name[:4] for path in (STEPS / "versions").glob("0*.py"))
    assert steps == list(KNOWN)


def test_many_processes_open_an_empty_database_at_once(store_url):
    code = f"from serving.store import open_store; print('ready', flush=True); input(); open_store({store_url!r})"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    many = [subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) for _ in range(6)]
    assert [process.stdout.readline() for process in many] == ["ready\n"] * 6
    for process in many:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120)[1] for process in many]
    assert [process.returncode for process in many] == [0] * 6, told
    assert differences(connect(store_url)) == []


def test_a_later_version_is_refused_and_left_as_it_is(store_url, capsys):
    engine = open_store(store_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
        connection.execute(text("ALTER TABLE ratings ADD COLUMN later INTEGER"))
    before = shape(engine)
    with pytest.raises(InputError, match="later version") as caught:
        open_store(store_url)
    assert caught.value.field == "database" and "0099" in str(caught.value)
    assert shape(engine) == before
    assert cli.main(["keys", "list", "--database", store_url]) == 2
    assert "update the service" in capsys.readouterr().err


def test_a_step_that_fails_changes_nothing(store_url):
    engine = released(store_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE lineage (x INTEGER)"))  # somebody's own, in the way of the step
    before, rows = shape(engine), held(engine)
    with pytest.raises(Exception, match="lineage"):
        open_store(store_url)
    assert shape(engine) == before and held(engine) == rows


def test_two_experiments_of_one_name_are_named_and_left_as_they_are(store_url, capsys):
    """0003 allows an owner one of each name; which of the two keeps it, people must say."""
    engine = connect(store_url)
    migrate(engine, "0002")
    fill(engine, RELEASED | ADDED)
    (one,) = ADDED["experiments"]
    fill(engine, {"experiments": [one | {"id": "exp_2", "stopped": None}, one | {"id": "exp_3", "owner": "key_2"}]})
    before, shapes = held(engine), shape(engine)
    with pytest.raises(InputError, match="exp_1, exp_2") as caught:
        open_store(store_url)
    assert caught.value.field == "database" and "two models" in str(caught.value) and "exp_3" not in str(caught.value)
    assert held(engine) == before and shape(engine) == shapes and revision(engine) == "0002"
    assert cli.main(["store", "migrate", "--database", store_url]) == 2
    assert "exp_1, exp_2" in capsys.readouterr().err
    with engine.begin() as connection:
        connection.execute(text("UPDATE experiments SET name = 'two models again' WHERE id = 'exp_2'"))
    migrate(engine)
    assert revision(engine) == NEWEST and differences(engine) == []


def test_nothing_at_the_url_is_bad_input(tmp_path):
    for url in ("postgresql+psycopg://nobody@127.0.0.1:1/none", f"sqlite:///{tmp_path}"):
        with pytest.raises(InputError) as caught:
            open_store(url)
        assert caught.value.field == "database"
