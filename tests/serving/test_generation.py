"""Candidates of a deliberation are written once, and whatever goes wrong, the deliberation does not stay behind."""

from __future__ import annotations

import asyncio
import time

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from stub import StubServices
from test_sessions import PATH, Room

from serving.api import make_app
from serving.config import ServeConfig
from serving.problems import Overloaded
from serving.store import open_store
from serving.tables import request_events


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def config(store_url):
    return ServeConfig(database=store_url, background_timeout_s=60)


@pytest.fixture
def room(services, config):
    with TestClient(make_app(services, config), raise_server_exceptions=False) as client:
        yield Room(client)


def settled(room, within_s=60.0):
    """The deliberation once nothing is being written."""
    deadline = time.monotonic() + within_s
    while (found := room.client.get(f"{PATH}/{room.id}").json())["state"] == "generating":
        assert time.monotonic() < deadline, "it is generating for ever"
        time.sleep(0.02)
    return found


def test_out_of_time_the_opinions_are_open_again(services, room, config):
    services.gate = asyncio.Event()  # the policy never answers
    config.background_timeout_s = 0.3
    assert room.do("generate").status_code == 202
    found = settled(room)
    assert found["state"] == "collecting" and found["problem"]["type"].endswith(":out-of-time")
    assert services.calls == 1
    services.gate, config.background_timeout_s = None, 60  # what is to succeed has time, however busy the machine is
    assert room.do("generate").status_code == 202
    assert settled(room)["state"] == "rating"


def test_candidates_that_cannot_be_kept_are_not_written_again_and_again(services, room, config):
    engine = open_store(config.database)
    refuse = "CREATE TRIGGER full BEFORE INSERT ON candidates BEGIN SELECT RAISE(ABORT, 'no'); END"
    if engine.dialect.name != "sqlite":
        pytest.skip("the trigger is written in SQLite's words")
    with engine.begin() as connection:
        connection.execute(text(refuse))
    assert room.do("generate").status_code == 202
    found = settled(room)
    assert found["state"] == "collecting" and found["problem"]["type"].endswith(":internal")
    assert services.calls == 1


def test_no_statement_is_left_in_the_record_of_requests(room, config):
    assert room.do("generate").status_code == 202
    assert settled(room)["state"] == "rating"
    with open_store(config.database).connect() as connection:
        assert {row.type for row in connection.execute(select(request_events.c.type))} == {"queued", "done"}


def test_a_full_judge_is_waited_for_and_the_policy_is_not_asked_twice(services, config):
    services.judge_failures = [Overloaded(1)]
    with TestClient(make_app(services, ServeConfig(database=config.database))) as client:
        room = Room(client)
        assert room.do("generate").status_code == 202
        assert settled(room)["state"] == "rating" and services.calls == 1
