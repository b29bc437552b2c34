"""A PostgreSQL of our own, for tests and benchmarks: in a temporary folder, on a loopback port, gone at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from benchmarks._ports import held_port

PACKAGE = "PostgreSQL's initdb is not on this machine; install the Debian package postgresql (15 or later)"
SUPERUSER = "owner"
_UNTIL_WE_ARE_GONE = 'exec 3<&0; "$@" 3<&- & pid=$!; (cat <&3 >/dev/null; kill -QUIT $pid) & wait $pid'
"""Ends the server at once (nothing of it is kept) when our end of the pipe closes, as it does should we be killed."""


class Missing(RuntimeError):
    """There is no PostgreSQL to start."""


def find(name: str) -> str:
    """Path of one of PostgreSQL's programs; the newest where there are several versions.

    Raises:
        Missing: naming the package.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    found = shutil.which(name) or (shutil.which(name, path=str(folders[-1])) if folders else None)
    if found is None:
        raise Missing(PACKAGE)
    return found


class Server:
    """A running server; each ``database`` is a new, empty one."""

    def __init__(self, port: int):
        self.port = port

    def database(self) -> str:
        """URL of a new database."""
        name = f"db_{secrets.token_hex(6)}"
        with psycopg.connect(self._words("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{SUPERUSER}@127.0.0.1:{self.port}/{name}"

    def disconnect(self, url: str) -> None:
        """End all connections to a database: engines that nobody uses any more keep theirs until they are collected."""
        with psycopg.connect(self._words("postgres"), autocommit=True) as connection:
            ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(ours, [url.rsplit("/", 1)[1]])

    def _words(self, name: str) -> str:
        return f"host=127.0.0.1 port={self.port} user={SUPERUSER} dbname={name}"

    def answers(self) -> bool:
        """Whether it takes connections."""
        try:
            psycopg.connect(self._words("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def running(**settings: str) -> Iterator[Server]:
    """A server, up until the block ends; ``settings`` as in postgresql.conf.

    Raises:
        Missing: if PostgreSQL is not installed.
    """
    initdb, postgres = find("initdb"), find("postgres")
    user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as place, held_port() as port:
        if user is not None:
            shutil.chown(place, user)
        folder, log = Path(place) / "data", Path(place) / "log"
        create = [initdb, "-D", folder, "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(create, check=True, user=user, cwd=place, stdout=subprocess.DEVNULL)
        words = [postgres, "-D", folder, "-p", str(port), "-h", "127.0.0.1", "-k", place]
        for name, value in settings.items():
            words += ["-c", f"{name}={value}"]
        with log.open("wb") as out:
            command = ["sh", "-c", _UNTIL_WE_ARE_GONE, "sh", *words]
            process = subprocess.Popen(command, user=user, cwd=place, stdin=subprocess.PIPE, stdout=out, stderr=out)
        try:
            server, deadline = Server(port), time.monotonic() + 300
            while not server.answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL does not start: {log.read_text()}")
                time.sleep(0.05)
            yield server
        finally:
            process.communicate()  # closes its standard input
