"""Writers of one process take turns, on either database; a cluster of several nodes has one that serves them all."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from rows import ADDED, fill
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError

from deliberation.types import InputError
from serving import store
from serving.backup import backup
from serving.own_ray import RAY_ENVIRONMENT
from serving.sessions import Sessions
from serving.store import absolute, connect, open_store, reading
from serving.tables import deliberations, lineage

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_on_two_nodes_the_service_refuses_sqlite_and_says_why(sqlite_url, postgres_url):
    with tempfile.TemporaryDirectory(prefix="rn-", dir="/tmp", ignore_cleanup_errors=True) as short:  # Ray's sockets
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "serving" / "two_nodes.py", sqlite_url, postgres_url],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled"}
            | {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": RAY_ENVIRONMENT["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]}
            | {"RAY_SERVE_ENABLE_HA_PROXY": "0"},  # those of two nodes on one machine would want the same ports
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, answered = json.loads(done.stdout.splitlines()[-1])
    assert "is a file, and this cluster has 2 nodes with a disk each; give the URL of a PostgreSQL" in refused
    assert json.loads(answered) == {"status": "ok"}
    with reading(connect(postgres_url)) as connection:  # its tables are there: the replica came past the check
        assert connection.execute(select(func.count()).select_from(lineage)).scalar() == 0


def test_a_file_that_another_is_making_is_waited_for(sqlite_url):
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as other, ThreadPoolExecutor(1) as thread:
        other.execute("BEGIN IMMEDIATE")  # here SQLite refuses to turn its log on, without the wait it has elsewhere
        opened = thread.submit(open_store, sqlite_url)
        with pytest.raises(TimeoutError):
            opened.result(timeout=0.5)
        other.execute("COMMIT")
        with opened.result(timeout=60).connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_file_that_stays_locked_is_told(sqlite_url, monkeypatch):
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.1)
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="locked") as caught:
            open_store(sqlite_url)
    assert caught.value.field == "database"


def test_no_writer_is_lost_among_many(store_url):
    engine = open_store(store_url)

    def write(thread):
        for k in range(10):
            fill(engine, {"lineage": [ADDED["lineage"][0] | {"id": f"{thread}.{k}"}]})

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(write, range(12)))
    with reading(engine) as connection:
        assert connection.execute(select(func.count()).select_from(lineage)).scalar() == 120


def test_writers_to_a_file_take_turns(sqlite_url):
    engine, done = open_store(sqlite_url), []
    line = store._LOGS[engine].turns._line  # the first one has the turn, the others wait

    def until(waiting):
        deadline = time.monotonic() + store.BUSY_TIMEOUT_S
        while len(line) <= waiting and time.monotonic() < deadline:
            time.sleep(0.001)

    def write(writer, again):
        for k in range(again):
            with engine.begin() as connection:
                connection.execute(text("DELETE FROM lineage"))
                until(waiting=min(3, 11 - len(done)))  # whoever wrote before is back in the line
                done.append(f"{writer}{k}")

    with ThreadPoolExecutor(5) as threads:
        with engine.begin() as first:
            first.execute(text("DELETE FROM lineage"))
            for k, writer in enumerate("abcd"):  # they wait, in this order
                threads.submit(write, writer, 3)
                until(waiting=k + 1)
    assert done == [f"{writer}{k}" for k in range(3) for writer in "abcd"]


def test_a_writer_that_fails_gives_its_turn_back(sqlite_url):
    engine = open_store(sqlite_url)
    for _ in range(3):
        with pytest.raises(RuntimeError), engine.begin() as connection:
            connection.execute(text("DELETE FROM lineage"))
            raise RuntimeError("broken")
    with engine.connect() as connection:  # two transactions, one connection
        for _ in range(2):
            connection.execute(text("DELETE FROM lineage"))
            connection.commit()
    started = time.perf_counter()
    fill(engine, {"lineage": ADDED["lineage"]})
    assert time.perf_counter() - started < 0.8 * store.BUSY_TIMEOUT_S


def test_readers_never_wait_for_a_writer(sqlite_url):
    engine = open_store(sqlite_url)
    with engine.begin() as writer:
        writer.execute(text("DELETE FROM lineage"))
        started = time.perf_counter()
        with reading(engine) as reader:
            assert reader.execute(select(lineage)).all() == []
        assert time.perf_counter() - started < 0.8 * store.BUSY_TIMEOUT_S  # after which it would give up


def files_of(engine):
    """All bytes of an SQLite database: the file and its log."""
    place = Path(engine.url.database)
    return b"".join(path.read_bytes() for path in place.parent.iterdir())


def write_a_row(engine, url, file):
    fill(engine, {"lineage": ADDED["lineage"]})


def erase_another(engine, url, file):
    sessions = Sessions(engine)
    sessions.erase(sessions.create("anna", "Another?", {}, "inv_2"), "anna")


def back_up(engine, url, file):
    backup(connect(url), file)


def start_again(engine, url, file):
    open_store(url)


@pytest.mark.parametrize("then", [write_a_row, erase_another, back_up, start_again])
def test_what_somebody_read_while_it_was_erased_leaves_the_files_later(sqlite_url, tmp_path, monkeypatch, then):
    monkeypatch.setattr(store, "AGAIN_S", 0.0)
    engine, sessions = open_store(sqlite_url), Sessions(open_store(sqlite_url))
    name = sessions.create("anna", "My secret question?", {}, "inv_1")
    with closing(sqlite3.connect(engine.url.database, isolation_level=None)) as reader:  # as a backup does
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM deliberations").fetchone() == (1,)
        with ThreadPoolExecutor(1) as threads:
            started = time.perf_counter()
            erased = threads.submit(sessions.erase, name, "anna")
            for k in range(5):
                fill(engine, {"lineage": [ADDED["lineage"][0] | {"id": f"before_{k}"}]})
            erased.result()
            assert time.perf_counter() - started < 0.8 * store.BUSY_TIMEOUT_S  # neither waited for the reader
        with reading(engine) as connection:
            assert connection.execute(select(deliberations)).all() == []
        assert b"My secret question?" in files_of(engine)
    then(sessions.engine, sqlite_url, tmp_path / "backup.gz")
    assert b"My secret question?" not in files_of(engine)


def test_a_log_that_cannot_be_emptied_is_told_and_tried_again(caplog):
    class Broken:
        def execute(self, statement):
            if "checkpoint" in statement:
                raise sqlite3.OperationalError("disk I/O error")

    log = store.Log()
    assert not log.empty(Broken()) and log.left
    assert "disk I/O error" in caplog.text


def test_an_error_does_not_quote_what_was_written(store_url):
    engine = open_store(store_url)
    row = {"id": "del_1", "question": "My secret question?"}
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        connection.execute(insert(deliberations).values(row | {"experiment": "exp_none", "owner": "o", **_OF_ANY}))
    assert "secret" not in f"{caught.value}{caught.value!r}" and "INSERT" in str(caught.value)


_OF_ANY = {"settings": "{}", "state": "closed", "round": 1, "invite": "i", "salt": "s", "created": 1.0}


@pytest.mark.parametrize("kind", ["sqlite", "sqlite+pysqlite"])
def test_a_file_is_named_from_anywhere(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(f"{kind}:///runs/x.db") == f"{kind}:///{tmp_path}/runs/x.db"
    assert absolute(f"{kind}:////runs/x.db") == f"{kind}:////runs/x.db"
    for url in ("postgresql+psycopg://anna:p%40ss@host/name", f"{kind}://", f"{kind}:///:memory:"):
        assert absolute(url) == url
    with pytest.raises(InputError):
        absolute("service.db")
