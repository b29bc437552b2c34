"""Backups: what is restored is what was there, from either kind of database to either; torn files are refused."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from threading import Barrier

import pytest
from rows import ADDED, RELEASED, fill, held
from sqlalchemy import delete, insert, select

import cli
from deliberation.types import InputError
from serving.backup import backup, check, restore, snapshot
from serving.migrate import BASELINE, NEWEST, bring, migrate
from serving.sessions import Sessions
from serving.store import connect, open_store
from serving.tables import api_keys, deliberations, ratings

ROWS = RELEASED | ADDED
COUNTS = {name: len(rows) for name, rows in ROWS.items()}


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request, tmp_path):
    """URL of a second empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/target/service.db"
    return request.getfixturevalue("postgres_server").database()


@pytest.fixture
def full(store_url):
    engine = open_store(store_url)
    fill(engine, ROWS)
    return engine


@pytest.fixture
def file(tmp_path):
    return tmp_path / "backups" / "service.jsonl.gz"


def add_rating(engine, member="mbr_1", candidate="can_1"):
    """The number that a new rating gets."""
    values = {"member": member, "candidate": candidate, "version": 1, "current": True, "agreement": 4, "quality": 4}
    with engine.begin() as connection:
        return connection.execute(insert(ratings).values(values | {"created": 9.0})).inserted_primary_key[0]


def test_what_is_restored_is_what_was_there(full, file, target_url):
    assert backup(full, file) == COUNTS
    target = connect(target_url)
    assert restore(target, file) == COUNTS
    assert held(target) == held(full)
    assert check(target) == (NEWEST, COUNTS)
    assert add_rating(target) == 8  # numbers go on after the last


def test_a_number_that_was_given_is_not_given_again(full, file, target_url):
    last = add_rating(full)
    with full.begin() as connection:
        connection.execute(delete(ratings).where(ratings.c.number >= 7))
    backup(full, file)
    target = connect(target_url)
    restore(target, file)
    assert add_rating(target) == add_rating(full) == last + 1


def test_a_backup_of_the_first_release_is_restored_into_this_one(store_url, file, target_url):
    old = connect(store_url)
    migrate(old, BASELINE)
    fill(old, RELEASED)
    backup(old, file)
    with gzip.open(file, "rt") as lines:
        assert json.loads(next(lines))["revision"] == BASELINE
    target = open_store(target_url)  # its tables are there already, without rows
    restore(target, file)
    assert check(target)[0] == NEWEST
    assert {name: rows for name, rows in held(target).items() if rows} == held(old)


def test_a_database_with_rows_is_left_alone(full, file, target_url):
    backup(full, file)
    target = open_store(target_url)
    fill(target, {"lineage": ADDED["lineage"]})
    before = held(target)
    with pytest.raises(InputError, match="empty") as caught:
        restore(target, file)
    assert caught.value.field == "database" and held(target) == before


def test_a_restore_waits_for_a_service_that_starts_and_sees_what_it_wrote(full, file, target_url):
    backup(full, file)
    service, target = connect(target_url), connect(target_url)
    with ThreadPoolExecutor(1) as pool:
        with service.begin() as connection:  # the tables are being made, and get a row
            bring(connection, NEWEST)
            connection.execute(insert(api_keys), RELEASED["api_keys"][0] | {"id": "key_9", "digest": "d9"})
            restored = pool.submit(restore, target, file)
            with pytest.raises(TimeoutError):
                restored.result(timeout=1)
        with pytest.raises(InputError, match="has rows") as caught:
            restored.result(timeout=60)
    assert caught.value.field == "database"
    assert [row["id"] for row in held(target)["api_keys"]] == ["key_9"]


def test_of_two_restores_at_once_one_is_refused(full, file, target_url):
    backup(full, file)
    gate = Barrier(2)

    def once(_):
        target = connect(target_url)
        with target.connect():
            gate.wait(timeout=60)
        try:
            return restore(target, file)
        except InputError as error:
            return error.field

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(once, range(2)))
    assert told in ([COUNTS, "database"], ["database", COUNTS])
    assert held(connect(target_url)) == held(full)


def cut(data):
    return data[: len(data) // 2]


def without_end(data):
    lines = gzip.decompress(data).splitlines(keepends=True)
    return gzip.compress(b"".join(lines[:-1]))


def without_a_row(data):
    lines = gzip.decompress(data).splitlines(keepends=True)
    return gzip.compress(b"".join(lines[:-2] + lines[-1:]))


def with_another_value(data):
    return gzip.compress(gzip.decompress(data).replace(b"No free tea.", b"No free tee."))


def with_more(data):
    return data + gzip.compress(b"[1]\n")


def of_a_later_version(data):
    return gzip.compress(gzip.decompress(data).replace(NEWEST.encode(), b"0099"))


@pytest.mark.parametrize(
    "harm",
    [cut, without_end, without_a_row, with_another_value, with_more, of_a_later_version,
     lambda data: b"", lambda data: b"{}", lambda data: gzip.compress(b"[]\n")],
)  # fmt: skip
def test_a_harmed_file_is_refused_and_nothing_is_changed(full, file, target_url, harm):
    backup(full, file)
    file.write_bytes(harm(file.read_bytes()))
    target = open_store(target_url)
    with pytest.raises(InputError) as caught:
        restore(target, file)
    assert caught.value.field == "file" and not any(held(target).values())


def test_a_backup_that_fails_leaves_the_one_before(full, file):
    backup(full, file)
    before = file.read_bytes()
    with full.begin() as connection:  # a value that no JSON takes
        connection.exec_driver_sql(
            "CREATE TABLE zz (x BLOB)" if full.dialect.name == "sqlite" else "CREATE TABLE zz (x BYTEA)"
        )
        connection.exec_driver_sql("INSERT INTO zz VALUES ('x')")
        if full.dialect.name == "sqlite":
            connection.exec_driver_sql("UPDATE zz SET x = x'00'")
    with pytest.raises(TypeError):
        backup(full, file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    assert os.stat(file).st_mode & 0o077 == 0  # it holds what people wrote


def test_the_service_writes_on_during_a_backup(full, file):
    """One state is written, that of the beginning; no writer waits."""
    with snapshot(full) as connection:
        assert len(connection.execute(select(ratings)).all()) == 4
        add_rating(full)
        assert len(connection.execute(select(ratings)).all()) == 4
    assert backup(full, file)["ratings"] == 5


def test_what_is_erased_during_a_backup_is_gone_when_it_ends(sqlite_url, tmp_path):
    engine = open_store(sqlite_url)
    sessions = Sessions(engine)
    name = sessions.create("anna", "My secret question?", {}, "inv_1")
    with snapshot(connect(sqlite_url)) as connection:
        assert len(connection.execute(select(deliberations)).all()) == 1
        sessions.erase(name, "anna")
        assert len(connection.execute(select(deliberations)).all()) == 1
    assert not any(b"My secret" in path.read_bytes() for path in (tmp_path / "store").iterdir())


def test_memory_does_not_grow_with_the_rows(store_url, file, tmp_path):
    engine = open_store(store_url)
    key = {"scopes": "x", "rate_per_minute": 1, "created": 1.0}
    peaks = []
    for part, count in enumerate((4_000, 16_000)):
        rows = [{"id": f"{part}.{k}", "name": "n" * 200, "digest": f"{part}.{k}", **key} for k in range(count)]
        with engine.begin() as connection:
            connection.execute(insert(api_keys), rows)
        del rows
        tracemalloc.start()
        backup(engine, file)
        restore(connect(f"sqlite:///{tmp_path}/{part}.db"), file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 20 * 2**20


def test_damage_is_told(sqlite_url, tmp_path, capsys):
    engine = open_store(sqlite_url)
    fill(engine, ROWS)
    place = tmp_path / "store/service.db"
    raw = sqlite3.connect(place)
    raw.execute("DELETE FROM members WHERE id = 'mbr_0'")  # this connection does not mind foreign keys
    raw.commit()
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    with pytest.raises(InputError, match="without its members"):
        check(engine)
    data = bytearray(place.read_bytes())
    data[len(data) // 3 : 2 * len(data) // 3] = bytes(len(data) // 3)
    place.write_bytes(data)
    assert cli.main(["store", "check", "--database", sqlite_url]) == 2
    assert "restore a backup" in capsys.readouterr().err


def test_the_command_backs_up_checks_and_restores(full, file, target_url, capsys):
    source = full.url.render_as_string(hide_password=False)
    assert cli.main(["store", "backup", "--database", source, "--file", str(file)]) == 0
    assert cli.main(["store", "check", "--database", source]) == 0
    assert f"revision {NEWEST}: {sum(COUNTS.values())} rows" in capsys.readouterr().out
    assert cli.main(["store", "migrate", "--database", target_url]) == 0
    assert cli.main(["store", "restore", "--database", target_url, "--file", str(file)]) == 0
    assert "4 ratings" in capsys.readouterr().out and held(connect(target_url)) == held(full)
    assert cli.main(["store", "restore", "--database", target_url, "--file", str(file)]) == 2
    assert "has rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "field"),
    [(["burn"], "action"), (["backup"], "file"), (["restore"], "file"), (["check"], "database"),
     (["backup", "--file", "x.gz"], "database"), (["check", "--database", "postgresql+psycopg://x@127.0.0.1:1/x"],
      "database")],
)  # fmt: skip
def test_what_cannot_be_done_is_bad_input(words, field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["store", *words]) == 2
    assert capsys.readouterr().err.startswith(f"consensus store: error: {field} = ")
    assert list(tmp_path.rglob("*.db")) == list(tmp_path.glob("*.gz")) == []


def test_a_place_that_cannot_be_written_is_bad_input(full, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "backup"):
        with pytest.raises(InputError) as caught:
            backup(full, place)
        assert caught.value.field == "file"
