"""Databases for tests, a SQLite file and a PostgreSQL that is started once, when the first test asks for it; a port."""

from __future__ import annotations

import os
import secrets
from random import Random

import pytest

from benchmarks import _postgres
from serving.own_ray import own_ports


@pytest.fixture(scope="session")
def postgres_server():
    """The session's PostgreSQL; without the package, continuous integration fails and other machines skip."""
    try:
        _postgres.find("initdb")
    except _postgres.Missing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    with _postgres.running(fsync="off") as server:  # nothing here outlives the session
        yield server


@pytest.fixture
def same_ids(request, monkeypatch):
    """Ids and salts that are the same in every run: they decide who sees what first, and who is in which arm.

    Left to chance, one experiment in a thousand would have an alert of the sample ratio, one in a hundred one of the
    order: that is what the alerts' levels mean.
    """
    drawn = Random(request.node.name)
    monkeypatch.setattr(secrets, "token_hex", lambda nbytes=32: drawn.randbytes(nbytes).hex())


@pytest.fixture
def postgres_url(postgres_server):
    """URL of an empty PostgreSQL database of the test's own."""
    url = postgres_server.database()
    yield url
    postgres_server.disconnect(url)


@pytest.fixture
def sqlite_url(tmp_path):
    """URL of a SQLite file that is not there yet, alone in its folder."""
    return f"sqlite:///{tmp_path}/store/service.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request):
    """URL of an empty database of each kind."""
    return request.getfixturevalue("postgres_url" if request.param == "postgresql" else "sqlite_url")


@pytest.fixture
def port():
    """One that the system draws for nobody else meanwhile: a proxy is long in coming to listen."""
    with own_ports() as ports:
        yield ports[0]
