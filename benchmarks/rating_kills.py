"""The API is SIGKILLed at random moments while ratings stream in through our client: is each acknowledged one kept?

    python -m benchmarks.rating_kills --kills 200 --json

Twelve members in three deliberations rate without a pause, one thread each; what was acknowledged is written down by
the clients and compared with the database at the end: lost (not there), doubled (two rows of one version, two current
rows, versions with gaps), torn (another value than acknowledged), and the database's own integrity check (``sound``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import httpx
from sqlalchemy import Connection, Engine, select

from benchmarks._ports import held_port
from benchmarks._postgres import running
from serving.client import Client
from serving.session_client import Organiser, Participant
from serving.store import connect
from serving.tables import ratings

GROUPS, MEMBERS, SHOWN = 3, 4, 16


@dataclass
class Server:
    """A server that can be killed and started again."""

    database: str
    port: int
    pid: int = 0
    forker: Any = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks._rating_server", self.database, str(self.port)]
        self.forker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        """Fork a server; it answers within a moment."""
        self.forker.stdin.write("\n")
        self.forker.stdin.flush()
        self.pid = int(self.forker.stdout.readline())

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the server and what forks it."""
        self.kill()
        self.forker.kill()
        self.forker.wait()


def wait_until_up(url: str) -> None:
    """Until the server answers."""
    with httpx.Client(trust_env=False) as http:
        for _ in range(600):
            try:
                if http.get(f"{url}/healthz", timeout=1).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.02)
    raise TimeoutError(f"{url} does not answer")


def wait_for_more(told: dict[str, list[tuple[str, int, int, int]]]) -> None:
    """Until another rating is acknowledged: on a busy machine a server could be killed before its first one."""
    before, deadline = sum(map(len, list(told.values()))), time.monotonic() + 30
    while sum(map(len, list(told.values()))) == before:
        if time.monotonic() > deadline:
            raise TimeoutError("no rating was acknowledged within 30 s")
        time.sleep(0.01)


def gather(url: str) -> list[Participant]:
    """Members of groups that are rating."""
    people = []
    with Client(url) as client:
        organiser = Organiser(client)
        for g in range(GROUPS):
            made = organiser.create(f"Question {g}?", shown=SHOWN)
            group = [
                Participant.join(url, made.id, made.invite, f"m{m}", consent=True, tries=60, pause_s=0.02)
                for m in range(MEMBERS)
            ]
            for member in group:
                member.look()
                member.write("An opinion.")
            organiser.generate(made.id)
            people += group
    return people


def stream(member: Participant, stop: threading.Event, said: list[tuple[str, int, int, int]], seed: int) -> None:
    """Rate until told to stop; ``said`` gets (candidate, agreement, quality, version) of each acknowledgement."""
    rng = random.Random(seed)
    names = [c.id for c in member.look().candidates]
    while not stop.is_set():
        kept = member.rate(rng.choice(names), rng.randint(1, 7), rng.randint(1, 7))
        said.append((kept.candidate, kept.agreement, kept.quality, kept.version))


def sound(connection: Connection) -> bool:
    """SQLite's integrity check, or amcheck of all tables and indexes in PostgreSQL.

    Raises:
        DatabaseError: if amcheck finds an index damaged.
    """
    if connection.dialect.name == "sqlite":
        return connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS amcheck")
    ours = "relnamespace = current_schema()::regnamespace"
    indexes = (
        f"SELECT bt_index_check(indexrelid, true) FROM pg_index JOIN pg_class ON pg_class.oid = indrelid WHERE {ours}"
    )
    checked = len(connection.exec_driver_sql(indexes).all())
    faults = f"SELECT count(*) FROM pg_class, LATERAL verify_heapam(pg_class.oid) WHERE relkind = 'r' AND {ours}"
    return checked > 0 and connection.exec_driver_sql(faults).scalar() == 0


def judge(engine: Engine, said: dict[str, list[tuple[str, int, int, int]]]) -> dict[str, Any]:
    """Compare what members were told with what is there."""
    there: dict[tuple[str, str], list[Any]] = defaultdict(list)
    with engine.connect() as connection:
        rows = list(connection.execute(select(ratings).order_by(ratings.c.number)))
        ok = sound(connection)
    for row in rows:
        there[row.member, row.candidate].append(row)
    lost = torn = 0
    for member, answers in said.items():
        for candidate, agreement, quality, version in answers:
            found = [row for row in there[member, candidate] if row.version == version]
            lost += not found
            torn += any((row.agreement, row.quality) != (agreement, quality) for row in found)
    doubled = 0
    for chain in there.values():
        doubled += [row.version for row in chain] != list(range(1, len(chain) + 1))
        doubled += [row.current for row in chain] != [False] * (len(chain) - 1) + [True]
        # the same values twice running would be one request kept twice: a member who says the same is not kept again
        values = [(row.agreement, row.quality) for row in chain]
        doubled += sum(a == b for a, b in zip(values, values[1:]))
    return {"rows": len(rows), "lost": lost, "torn": torn, "doubled": doubled, "integrity": ok}


def run(database: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times; what was acknowledged, and what is there."""
    with held_port() as port:  # also while the server is down
        return _run(database, kills, seed, port)


def _run(database: str, kills: int, seed: int, port: int) -> dict[str, Any]:
    url, rng, server = f"http://127.0.0.1:{port}", random.Random(seed), Server(database, port)
    stop, told = threading.Event(), defaultdict[str, list[tuple[str, int, int, int]]](list)
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []
    try:
        server.start()
        wait_until_up(url)
        people = gather(url)

        def work(k: int) -> None:
            try:
                stream(people[k], stop, told[people[k].look().member], seed * 1000 + k)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(people))]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        for k in range(kills):
            wait_for_more(told)
            time.sleep(rng.uniform(0.0, 0.4))
            server.kill()
            server.start()
            wait_until_up(url)
            if sys.stderr.isatty() or k % 20 == 19:
                print(f"kill {k + 1} of {kills}", file=sys.stderr, flush=True)
        seconds = time.monotonic() - begun
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        server.end()
    engine = connect(database)
    found = {"database": engine.dialect.name, "kills": kills, "seconds": round(seconds, 1), "errors": len(errors)}
    return found | {"acknowledged": sum(map(len, told.values()))} | judge(engine, told)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running() as postgresql:
        urls = (f"sqlite:///{folder}/service.db", postgresql.database())
        found = [run(url, args.kills, args.seed) for url in urls]
    if not args.json:
        print(json.dumps(found, indent=1))
    print(json.dumps({"found": found, "seed": args.seed, "date": date.today().isoformat(), "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
