"""What the database gives at ten million ratings: durable ratings a second, reports, exports; beside plain SQL.

    python -m benchmarks.store --json
    python -m benchmarks.store --ratings 1000000 --only postgresql

On SQLite and on a PostgreSQL that is started for it, with both databases' full durability (an answer is given once the
disk has it). *Ratings*: 16 threads, each a member who rates through ``Ballots.rate``; beside it the same threads with a
bare INSERT and COMMIT of the driver. *Report*: one deliberation's. *Export*: all rows, in a process of its own, whose
peak memory is told; beside it a loop of hand-written SQL over the first million.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from sqlalchemy import Engine, text

from benchmarks import _postgres
from benchmarks._store_fill import CANDIDATES, COLUMNS, MEMBERS, fill, name, plain_url
from serving.ballots import Ballots
from serving.export import PAGE, export_rows
from serving.session_report import report
from serving.sessions import Member, Sessions
from serving.store import connect, open_store

THREADS = 16
SPARE = 40 * THREADS
"""Deliberations for one measurement of ratings a second: more than it can use up."""
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
"""Of the PostgreSQL; everything else, durability too, as it comes."""
_PLAIN_EXPORT = """
SELECT r.number, d.id, m.number, d.question,
    (SELECT text FROM opinions o WHERE o.member = m.id ORDER BY version DESC LIMIT 1),
    c.statement, r.agreement, r.quality, c.versions, r.created
FROM ratings r JOIN members m ON m.id = r.member JOIN candidates c ON c.id = r.candidate
JOIN deliberations d ON d.id = m.deliberation
WHERE r.number > {0} AND r.number <= {0} + {1} AND r.current AND m.consent ORDER BY r.number"""


def rated_by(rate: Callable[[int], Callable[[int, int, int], None]], first: int, seconds: float) -> dict[str, float]:
    """Ratings a second of all threads together, and how long one takes, milliseconds.

    Args:
        rate: thread number -> function that keeps a rating of (deliberation, member, candidate), all of them numbers.
        first: the first deliberation without ratings; threads share none.
        seconds: how long.
    """
    took: list[list[float]] = [[] for _ in range(THREADS)]
    gate, errors = threading.Barrier(THREADS + 1), []

    def work(thread: int) -> None:
        try:
            keep = rate(thread)
            gate.wait()
            until = time.perf_counter() + seconds
            own = range(first + thread, first + SPARE, THREADS)
            for d, m, c in itertools.product(own, range(MEMBERS), range(CANDIDATES)):
                started = time.perf_counter()
                if started > until:
                    return
                keep(d, m, c)
                took[thread].append(1000 * (time.perf_counter() - started))
        except Exception as error:  # told below: a thread that fails must not pass for a slow one
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if errors:
        raise errors[0]
    every = [one for each in took for one in each]
    return {"per_s": round(len(every) / elapsed, 1), **_percentiles(every)}


def ours(engine: Engine) -> Callable[[int], Callable[[int, int, int], None]]:
    """The service's way."""
    ballots = Ballots(engine)

    def of_thread(thread: int) -> Callable[[int, int, int], None]:
        def keep(d: int, m: int, c: int) -> None:
            member = Member(name("mbr", d, m), name("del", d), m)
            ballots.rate(member, name("can", d, c), 5, 4, f"key {d} {m} {c}")

        return keep

    return of_thread


def plain(engine: Engine) -> Callable[[int], Callable[[int, int, int], None]]:
    """An INSERT and a COMMIT, and nothing else."""
    columns = COLUMNS["ratings"].split()[1:]
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    sql = f"INSERT INTO ratings ({', '.join(columns)}) VALUES ({', '.join([mark] * len(columns))})"

    def of_thread(thread: int) -> Callable[[int, int, int], None]:
        connection = _bare(engine)

        def keep(d: int, m: int, c: int) -> None:
            row = (name("mbr", d, m), name("can", d, c), 1, True, 5, 4, f"key {d} {m} {c}", time.time())
            connection.execute(sql, row)

        return keep

    return of_thread


def _bare(engine: Engine) -> Any:
    """A connection of the driver's that commits each statement, as durable as the service's."""
    if engine.dialect.name != "sqlite":
        return psycopg.connect(plain_url(engine), autocommit=True)
    connection = sqlite3.connect(str(engine.url.database), timeout=60, isolation_level=None, check_same_thread=False)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def reports(engine: Engine, rated: int, count: int = 200) -> dict[str, float]:
    """How long the report of a deliberation takes, milliseconds."""
    sessions, rng, took = Sessions(engine), random.Random(0), []
    for d in [rng.randrange(rated) for _ in range(count)]:
        started = time.perf_counter()
        found = report(engine, sessions.get(name("del", d)))
        took.append(1000 * (time.perf_counter() - started))
        assert len(found.candidates) == CANDIDATES
    return _percentiles(took)


def exported(url: str, rows: int) -> dict[str, float]:
    """All rows through the export, as JSON; rows a second of the first ``rows`` too, and how far memory grew, MiB."""
    engine, count, first, size = connect(url), 0, 0.0, 0
    next(export_rows(engine))
    before, started = _peak_mib(), time.perf_counter()
    for count, row in enumerate(export_rows(engine), 1):
        size += len(json.dumps(row))
        if count == rows:
            first = rows / (time.perf_counter() - started)
    elapsed = time.perf_counter() - started
    peak = _peak_mib()
    return {
        "rows": count, "rows_per_s": round(count / elapsed), "first_rows_per_s": round(first or count / elapsed),
        "peak_mib": round(peak, 1), "grew_mib": round(peak - before, 1), "gib": round(size / 2**30, 2),
    }  # fmt: skip


def plain_export(url: str, rows: int) -> float:
    """Rows a second of a loop over pages of hand-written SQL, as JSON."""
    connection, count, last, started = _bare(connect(url)), 0, 0, time.perf_counter()
    while count < rows:
        page = connection.execute(_PLAIN_EXPORT.format(last, PAGE)).fetchall()
        if not page:
            break
        for row in page:
            json.dumps(row)
        count, last = count + len(page), page[-1][0]
    return round(count / (time.perf_counter() - started))


def measure(url: str, ratings: int, seconds: float) -> dict[str, Any]:
    """Fill the database at the URL, and measure."""
    engine, started = open_store(url), time.perf_counter()
    rated = fill(engine, ratings, 2 * SPARE)
    result: dict[str, Any] = {"ratings": rated * MEMBERS * CANDIDATES, "fill_s": round(time.perf_counter() - started)}
    result["gib"] = round(_size(engine) / 2**30, 2)
    _say(result)
    result["report_ms"] = reports(engine, rated)
    with multiprocessing.get_context("spawn").Pool(1) as apart:
        result["export"] = apart.apply(exported, (url, 1_000_000))
    with multiprocessing.get_context("spawn").Pool(1) as apart:
        result["export"]["plain_rows_per_s"] = apart.apply(plain_export, (url, 1_000_000))
    result["export"]["ratio"] = round(result["export"]["first_rows_per_s"] / result["export"]["plain_rows_per_s"], 2)
    _say(result)
    result["rate"] = rated_by(ours(engine), rated, seconds)
    result["rate"]["plain"] = rated_by(plain(engine), rated + SPARE, seconds)
    result["rate"]["ratio"] = round(result["rate"]["per_s"] / result["rate"]["plain"]["per_s"], 2)
    result["load_average"] = round(os.getloadavg()[0], 1)
    _say(result)
    return result


def _peak_mib() -> float:
    """The most memory this process has had."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def _size(engine: Engine) -> int:
    if engine.dialect.name == "sqlite":
        return os.stat(str(engine.url.database)).st_size
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(values, p)), 2) for p in (50, 99)}


def _say(value: Any) -> None:
    print(json.dumps(value), file=sys.stderr, flush=True)


def _urls(only: str | None, stack: ExitStack) -> Iterator[tuple[str, str]]:
    if only != "postgresql":
        with tempfile.TemporaryDirectory(prefix="store-") as folder:
            yield "sqlite", f"sqlite:///{folder}/service.db"
    if only != "sqlite":
        yield "postgresql", stack.enter_context(_postgres.running(**SETTINGS)).database()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of ratings a second")
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "store", "date": date.today().isoformat(), "threads": THREADS}
    with ExitStack() as stack:
        for kind, url in _urls(args.only, stack):
            result[kind] = measure(url, args.ratings, args.seconds)
    versions = f"SQLite {sqlite3.sqlite_version}, psycopg {psycopg.__version__}"
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, {versions}"
    if not args.json:
        print(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
