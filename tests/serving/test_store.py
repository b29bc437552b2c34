"""Writers of one process take turns, on either database; a cluster of several nodes has one that serves them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rows import ADDED, fill
from sqlalchemy import func, select, text

from serving.store import connect, open_store, reading
from serving.tables import lineage

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_on_two_nodes_the_service_refuses_sqlite_and_says_why(sqlite_url, postgres_url):
    with tempfile.TemporaryDirectory(prefix="rn-", dir="/tmp", ignore_cleanup_errors=True) as short:  # Ray's sockets
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "serving" / "two_nodes.py", sqlite_url, postgres_url],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled"}
            | {"RAY_SERVE_ENABLE_HA_PROXY": "0"},  # those of two nodes on one machine would want the same ports
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, answered = json.loads(done.stdout.splitlines()[-1])
    assert "is a file, and this cluster has 2 nodes with a disk each; give the URL of a PostgreSQL" in refused
    assert json.loads(answered) == {"status": "ok"}
    with reading(connect(postgres_url)) as connection:  # its tables are there: the replica came past the check
        assert connection.execute(select(func.count()).select_from(lineage)).scalar() == 0


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

    def write(writer, again):
        for k in range(again):
            with engine.begin() as connection:
                connection.execute(text("DELETE FROM lineage"))
                done.append(f"{writer}{k}")

    with ThreadPoolExecutor(5) as threads:
        with engine.begin() as first:
            first.execute(text("DELETE FROM lineage"))
            for writer in "abcd":  # they wait, in this order
                threads.submit(write, writer, 3)
                time.sleep(0.2)
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
    assert time.perf_counter() - started < 5


def test_readers_never_wait_for_a_writer(sqlite_url):
    engine = open_store(sqlite_url)
    with engine.begin() as writer:
        writer.execute(text("DELETE FROM lineage"))
        started = time.perf_counter()
        with reading(engine) as reader:
            assert reader.execute(select(lineage)).all() == []
        assert time.perf_counter() - started < 1
