"""Writers of one process take turns, on either database, and none is left out."""

from __future__ import annotations

import threading
import time

import pytest
from rows import ADDED, fill
from sqlalchemy import func, select, text

from serving.store import open_store, reading
from serving.tables import lineage


def test_writers_take_turns(store_url):
    engine, waits = open_store(store_url), []

    def write(thread):
        for k in range(10):
            started = time.perf_counter()
            fill(engine, {"lineage": [ADDED["lineage"][0] | {"id": f"{thread}.{k}"}]})
            waits.append(time.perf_counter() - started)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as connection:
        assert connection.execute(select(func.count()).select_from(lineage)).scalar() == 120
    assert len(waits) == 120 and max(waits) < 5, "a writer was passed over"


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
