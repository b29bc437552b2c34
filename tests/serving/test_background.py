"""Requests that are recorded: idempotency keys, answers in the background, events, runners that die."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from stub import REQUEST, StubServices
from test_sessions import Room

from serving import api, background
from serving.api import make_app
from serving.best_of_n import NoStatement
from serving.config import ServeConfig
from serving.keys import create_key
from serving.ledger import LEASE_S, RUNNING, Ledger
from serving.problems import ApiError, Overloaded
from serving.schemas import ConsensusRequest
from serving.store import BUSY_TIMEOUT_S, open_store
from serving.tables import requests

ASYNC = {"Prefer": "respond-async"}


class Clock:
    """The time at its making, put forward at will."""

    def __init__(self):
        self.made, self.ahead = time.time(), 0.0

    def __call__(self):
        return self.made + self.ahead


@pytest.fixture
def config(store_url):
    return ServeConfig(database=store_url, request_timeout_s=20, background_timeout_s=20)


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def client(services, config):
    with TestClient(make_app(services, config), raise_server_exceptions=False) as client:
        yield client


def post(client, headers, **change):
    return client.post("/v1/consensus", json={**REQUEST, **change}, headers=headers)


def recorded(**change):
    """The request as the ledger keeps it."""
    return api.recorded(ConsensusRequest.model_validate({**REQUEST, **change}))


def finished(client, location, within_s=60.0):
    """The state of a background request once it is no longer running."""
    deadline = time.monotonic() + within_s
    while (state := client.get(location).json())["status"] == "running":
        assert time.monotonic() < deadline, "it goes on and on"
        time.sleep(0.02)
    return state


def until(condition, within_s=60.0):
    """Wait for something that happens elsewhere."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def events_of(text):
    """(number, type, data) of a stream that has ended."""
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(int(b["id"]), b["event"], json.loads(b["data"])) for b in blocks]


# --- idempotency keys -----------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_first_answer_and_costs_nothing(client, services):
    first, again = (post(client, {"Idempotency-Key": "a"}) for _ in range(2))
    assert first.status_code == again.status_code == 200 and first.content == again.content
    assert services.calls == 1
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert first.json() == post(client, {}).json() and services.calls == 2  # the same as without a key


def test_a_key_with_another_body_is_refused_for_good(client):
    post(client, {"Idempotency-Key": "a"})
    refused = post(client, {"Idempotency-Key": "a"}, seed=5)
    assert (refused.status_code, refused.json()["retryable"]) == (422, False)
    assert refused.json()["type"].endswith(":idempotency-mismatch")


@pytest.mark.parametrize("key", ["", " ", "a b", "a" * 256])
def test_a_key_that_is_none_is_bad_input(client, key):
    refused = post(client, {"Idempotency-Key": key})
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "Idempotency-Key"


@pytest.mark.parametrize("error", [RuntimeError("broken"), Overloaded(3), NoStatement("empty")])
def test_a_failure_frees_the_key(client, services, error):
    services.failures = [error]
    assert post(client, {"Idempotency-Key": "a"}).status_code in (422, 429, 500)
    assert post(client, {"Idempotency-Key": "a"}).status_code == 200


def test_of_concurrent_requests_one_is_answered_and_the_others_told_to_wait(client, services):
    services.gate = asyncio.Event()  # the one is at work until the others have been answered
    found = []
    threads = [threading.Thread(target=lambda: found.append(post(client, {"Idempotency-Key": "a"}))) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 3)
    client.portal.call(services.gate.set)
    for thread in threads:
        thread.join()
    statuses = sorted(response.status_code for response in found)
    assert statuses == [200, 409, 409, 409] and services.calls == 1
    told = next(response for response in found if response.status_code == 409)
    assert told.json()["retryable"] and told.headers["retry-after"] == "1"
    assert post(client, {"Idempotency-Key": "a"}).headers["idempotent-replayed"] == "true"


def test_a_key_whose_runner_was_killed_is_free_once_its_lease_is_over(client, config):
    crashed = Ledger(open_store(config.database))
    entry, mine = crashed.open("anybody", "a", recorded())  # and then the process died
    assert mine and post(client, {"Idempotency-Key": "a"}).status_code == 409
    with open_store(config.database).begin() as connection:
        connection.execute(requests.update().values(lease=time.time() - 1))
    assert post(client, {"Idempotency-Key": "a"}).status_code == 200
    assert not crashed.finish(entry, "done", {"late": True})  # should it live after all, it is too late
    assert post(client, {"Idempotency-Key": "a"}).headers["idempotent-replayed"] == "true"


class Idempotency(RuleBasedStateMachine):
    """Any order of requests, failures and crashes: a key has one body and, once answered, one answer."""

    keys, seeds = st.sampled_from("abc"), st.integers(0, 3)

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.services = StubServices()
        url = f"sqlite:///{self.folder.name}/service.db"
        self.engine = open_store(url)
        self.client = TestClient(
            make_app(self.services, ServeConfig(database=url), engine=self.engine), raise_server_exceptions=False
        )
        self.client.__enter__()
        self.bodies: dict[str, int] = {}
        self.answers: dict[str, bytes] = {}

    @rule(key=keys, seed=seeds)
    def ask(self, key, seed):
        calls = self.services.calls
        response = post(self.client, {"Idempotency-Key": key}, seed=seed)
        if self.bodies.get(key, seed) != seed:
            assert response.status_code == 422 and self.services.calls == calls
            return
        assert response.status_code == 200
        assert self.answers.setdefault(key, response.content) == response.content
        assert (self.services.calls == calls) == (key in self.bodies)
        self.bodies[key] = seed

    @rule(key=keys, seed=seeds)
    def fail(self, key, seed):
        if key not in self.bodies:
            self.services.failures = [RuntimeError("broken")]
            assert post(self.client, {"Idempotency-Key": key}, seed=seed).status_code == 500

    @rule(key=keys, seed=seeds, other=seeds)
    def crash(self, key, seed, other):
        """A process takes the key and is killed; the next request waits for its lease, then takes over."""
        if key in self.bodies:
            return
        Ledger(self.engine).open("anybody", key, recorded(seed=seed))
        same = post(self.client, {"Idempotency-Key": key}, seed=seed)
        assert same.status_code == 409
        if other != seed:
            assert post(self.client, {"Idempotency-Key": key}, seed=other).status_code == 422
        with self.engine.begin() as connection:
            over = requests.update().where(requests.c.state == RUNNING).values(lease=0.0)
            connection.execute(over)
        response = post(self.client, {"Idempotency-Key": key}, seed=seed)
        assert response.status_code == 200
        self.bodies[key], self.answers[key] = seed, response.content

    def teardown(self):
        if hasattr(self, "client"):
            self.client.__exit__(None, None, None)
            self.folder.cleanup()


TestIdempotency = Idempotency.TestCase
TestIdempotency.settings = settings(max_examples=25, stateful_step_count=12)


# --- in the background ----------------------------------------------------------------------------------------


def test_in_the_background_the_answer_is_the_same(client):
    accepted = post(client, ASYNC)
    assert accepted.status_code == 202 and accepted.headers["preference-applied"] == "respond-async"
    location = accepted.headers["location"]
    assert location == f"/v1/consensus/{accepted.json()['id']}"
    state = finished(client, location)
    assert state["status"] == "done" and state["result"] == post(client, {}).json() and state["problem"] is None


def test_a_large_group_is_answered_in_the_background_part_by_part(client):
    accepted = post(client, {}, opinions=[f"Opinion number {i}." for i in range(150)])
    assert accepted.status_code == 202
    state = finished(client, accepted.headers["location"])
    assert len(state["result"]["members"]) == 150
    events = events_of(client.get(accepted.headers["location"] + "/events").text)
    parts = [data for _, kind, data in events if kind == "scored"]
    assert parts == [{"members": m, "of": 150} for m in (64, 128, 150)]


def test_the_same_key_in_the_background_is_the_same_request(client, services):
    first, again = (post(client, {**ASYNC, "Idempotency-Key": "a"}) for _ in range(2))
    assert first.headers["location"] == again.headers["location"]
    finished(client, first.headers["location"])
    assert services.calls == 1


def test_a_request_that_fails_says_why(client, services):
    services.failures = [RuntimeError("secret path")]
    state = finished(client, post(client, ASYNC).headers["location"])
    assert state["status"] == "failed" and state["result"] is None
    assert state["problem"]["status"] == 500 and "secret" not in json.dumps(state)


def test_a_full_queue_is_waited_for_where_nobody_waits(client, services):
    services.failures = [Overloaded(1)]
    assert finished(client, post(client, ASYNC).headers["location"])["status"] == "done"
    assert services.calls == 2


def test_what_was_told_before_the_queue_was_full_is_not_told_again(client, services):
    services.judge_failures = [Overloaded(1)]
    events = events_of(post(client, {}, stream=True).text)
    assert [kind for _, kind, _ in events] == ["queued", *["candidate"] * 4, "scored", "done"]
    assert services.calls == 1  # nor is what was sampled sampled again


def test_a_failure_in_the_background_frees_the_key_too(client, services):
    services.failures = [RuntimeError("broken")]
    location = post(client, {**ASYNC, "Idempotency-Key": "a"}).headers["location"]
    assert finished(client, location)["status"] == "failed"
    assert post(client, {"Idempotency-Key": "a"}).status_code == 200
    again = post(client, {**ASYNC, "Idempotency-Key": "a"})
    assert again.headers["location"] != location and finished(client, again.headers["location"])["status"] == "done"
    assert client.get(location).json()["status"] == "failed"  # and can still be looked at


def test_an_erased_request_is_gone_and_its_work_ends(client, services, config):
    services.gate = asyncio.Event()
    location = post(client, ASYNC).headers["location"]
    until(lambda: services.calls == 1)
    assert services.ended == 0
    assert client.delete(location).status_code == 204
    for response in (client.get(location), client.get(location + "/events"), client.delete(location)):
        assert response.status_code == 404 and response.json()["type"].endswith(":not-found")
    until(lambda: services.ended == 1)  # at the next renewal
    if config.database.startswith("sqlite"):
        files = list(Path(config.database.removeprefix("sqlite:///")).parent.iterdir())
        assert len(files) >= 1 and all(b"green tea" not in path.read_bytes() for path in files)


def in_a_thread(client, services):
    """A request whose caller waits, its models at work; the thread, and where the response will be."""
    services.gate = asyncio.Event()
    found = []
    waiting = threading.Thread(target=lambda: found.append(post(client, {"Idempotency-Key": "a"})))
    waiting.start()
    until(lambda: services.calls == 1)
    return waiting, found


def test_who_waits_for_an_erased_request_is_told_that_it_is_gone(client, services, config):
    waiting, found = in_a_thread(client, services)
    with open_store(config.database).connect() as connection:
        name = connection.execute(select(requests.c.id)).scalar_one()
    assert client.delete(f"/v1/consensus/{name}").status_code == 204
    waiting.join()
    assert found[0].status_code == 404 and found[0].json()["type"].endswith(":not-found")


def test_a_request_that_another_process_took_over_is_in_progress(client, services, config):
    waiting, found = in_a_thread(client, services)
    with open_store(config.database).begin() as connection:
        connection.execute(requests.update().values(runner="another"))
    waiting.join()
    assert found[0].status_code == 409 and found[0].headers["location"].startswith("/v1/consensus/con_")


def test_no_more_than_so_many_are_carried_out_at_once(services, config, monkeypatch):
    monkeypatch.setattr(background, "AT_ONCE", 2)
    services.gate, services.pause_s = asyncio.Event(), 0.1
    with TestClient(make_app(services, config)) as client:
        places = [post(client, ASYNC, seed=seed).headers["location"] for seed in range(6)]
        until(lambda: services.calls >= 2)
        time.sleep(0.2)  # in which a third one could begin
        most = services.calls
        client.portal.call(services.gate.set)
        while not all(client.get(place).json()["status"] == "done" for place in places):
            most = max(most, services.calls - services.ended)
            time.sleep(0.01)
    assert most == 2 and services.calls == 6


def test_looking_at_a_request_at_work_writes_nothing(client, services, config):
    services.gate = asyncio.Event()
    location = post(client, {**ASYNC, "Idempotency-Key": "a"}).headers["location"]
    with open_store(config.database).begin() as connection:
        connection.execute(requests.update().values(lease=requests.c.lease))  # and holds the writer's lock
        started = time.monotonic()
        assert client.get(location).json()["status"] == "running"
        assert post(client, {"Idempotency-Key": "a"}).status_code == 409
        assert time.monotonic() - started < 0.8 * BUSY_TIMEOUT_S  # as long as a write would wait
    services.gate = None


def test_a_database_that_is_away_for_a_moment_ends_no_request(client, services, monkeypatch):
    monkeypatch.setattr(background, "WRITE_PAUSES_S", (0.01, 0.01))
    services.pause_s = LEASE_S / 3 + 0.5
    failures = {"add_events": 1, "renew": 1, "finish": 2}
    for name in failures:
        monkeypatch.setattr(Ledger, name, unreliable(getattr(Ledger, name), name, failures))
    assert finished(client, post(client, ASYNC).headers["location"])["status"] == "done"
    assert set(failures.values()) == {0} and services.calls == 1


def unreliable(write, name, failures):
    """``write``, which fails as often as ``failures`` says under that name."""

    def tried(*args, **settings):
        if failures[name]:
            failures[name] -= 1
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        return write(*args, **settings)

    return tried


def test_a_request_is_its_owners_alone(config):
    engine = open_store(config.database)
    anna, ben = (create_key(engine, name)[1] for name in ("anna", "ben"))
    config.require_keys = True
    with TestClient(make_app(StubServices(), config)) as client:
        as_anna, as_ben = ({"Authorization": f"Bearer {secret}"} for secret in (anna, ben))
        location = post(client, {**ASYNC, **as_anna}).headers["location"]
        assert client.get(location, headers=as_anna).status_code == 200
        for method, path in (("GET", location), ("GET", location + "/events"), ("DELETE", location)):
            assert client.request(method, path, headers=as_ben).status_code == 404
        # and so is an idempotency key: the same one is another request of another owner
        assert post(client, {"Idempotency-Key": "a", **as_anna}, seed=1).status_code == 200
        assert post(client, {"Idempotency-Key": "a", **as_ben}, seed=2).status_code == 200


# --- events ---------------------------------------------------------------------------------------------------


def test_a_stream_tells_every_step_and_ends_with_the_answer(client):
    response = post(client, {}, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [n for n, _, _ in events] == list(range(len(events)))
    assert [kind for _, kind, _ in events] == ["queued", *["candidate"] * 4, "scored", "done"]
    answer = post(client, {}).json()
    assert events[-1][2] == answer
    assert [data["statement"] for _, kind, data in events if kind == "candidate"] == [
        c["statement"] for c in answer["candidates"]
    ]


def test_a_broken_stream_is_taken_up_where_it_broke(client):
    response = post(client, {}, stream=True)
    location, whole = response.headers["location"], events_of(response.text)
    rest = events_of(client.get(location + "/events", headers={"Last-Event-ID": "3"}).text)
    assert rest == whole[4:]
    end = client.get(location + "/events", headers={"Last-Event-ID": str(whole[-1][0])})
    assert events_of(end.text) == whole[-1:]  # who asks again is told the end again
    assert client.get(location + "/events", headers={"Last-Event-ID": "x"}).status_code == 422
    assert client.get("/v1/consensus/con_none/events").status_code == 404


def test_a_stream_of_a_failure_ends_with_the_problem(client, services):
    services.failures = [NoStatement("all are empty")]
    last = events_of(post(client, {}, stream=True).text)[-1]
    assert last[1] == "error" and last[2]["type"].endswith(":no-statement")


# --- runners that die -----------------------------------------------------------------------------------------


def test_another_process_takes_over_from_one_that_died(client, services, config):
    clock = Clock()
    clock.ahead = -2 * LEASE_S  # it was killed a while ago
    dead = Ledger(open_store(config.database), clock)
    entry, _ = dead.open("anybody", None, recorded())
    dead.add_events(entry, [("queued", {"id": entry.id}), ("candidate", {"index": 0, "statement": "half a"})])
    with open_store(config.database).begin() as connection:
        connection.execute(requests.update().values(lease=time.time() - 1))
    events = events_of(client.get(f"/v1/consensus/{entry.id}/events").text)
    assert [kind for _, kind, _ in events] == ["queued", *["candidate"] * 4, "scored", "done"]
    assert services.calls == 1
    dead.add_events(entry, [("candidate", {"index": 9})])  # the dead write nothing
    assert len(events_of(client.get(f"/v1/consensus/{entry.id}/events").text)) == 7


def test_who_follows_over_a_take_over_that_fails_is_told_the_end(client, services, config):
    services.failures = [NoStatement("all are empty")]
    ledger = Ledger(open_store(config.database))
    entry, _ = ledger.open("anybody", None, recorded())
    ledger.add_events(entry, [("queued", {"id": entry.id}), *[("candidate", {"index": k}) for k in range(4)]])
    with open_store(config.database).begin() as connection:
        connection.execute(requests.update().values(lease=time.time() - 1))
    stream = client.get(f"/v1/consensus/{entry.id}/events", headers={"Last-Event-ID": "3"})
    assert [kind for _, kind, _ in events_of(stream.text)] == ["error"]


def test_an_id_that_no_database_keeps_names_nothing(client):
    for method, path in (("GET", "a%00b"), ("GET", "a%00b/events"), ("DELETE", "a%00b")):
        assert client.request(method, f"/v1/consensus/{path}").status_code == 404


def test_a_default_that_is_new_makes_no_other_request():
    assert json.loads(api.recorded(ConsensusRequest.model_validate(REQUEST))) == REQUEST


def test_a_runner_at_work_is_left_in_peace(config):
    ledger = Ledger(open_store(config.database))
    entry, _ = ledger.open("anybody", None, "{}")
    assert ledger.take_over(entry.id) is None and ledger.renew(entry)


def test_old_requests_are_erased_and_running_ones_are_not(config):
    clock = Clock()
    ledger = Ledger(open_store(config.database), clock, retention_s=3600.0)
    (entry, _), (running, _) = (ledger.open("anybody", None, "{}") for _ in range(2))
    ledger.add_events(entry, [("queued", {})])
    ledger.finish(entry, "done", {})
    clock.ahead = 3500
    ledger.open("anybody", None, "{}")
    assert len(ledger.events(entry.id, 0)) == 2
    clock.ahead = 3605
    assert ledger.renew(running)
    ledger.open("anybody", None, "{}")
    with pytest.raises(ApiError, match="not-found"):
        ledger.find(entry.id, "anybody")
    assert ledger.events(entry.id, 0) == [] and ledger.renew(running)
    clock.ahead = 3605 + 3600  # its runner has died meanwhile
    ledger.open("anybody", None, "{}")
    assert not ledger.renew(running)


def test_old_requests_are_looked_for_once_a_minute(config):
    clock, engine = Clock(), open_store(config.database)
    deletions = []
    event.listen(engine, "before_cursor_execute", lambda *args: deletions.extend(["DELETE"] * ("DELETE" in args[2])))
    ledger = Ledger(engine, clock, retention_s=3600.0)
    for ahead, count in ((0, 1), (30, 1), (59, 1), (61, 2), (100, 2), (1000, 3)):
        clock.ahead = ahead
        ledger.open("anybody", None, "{}")
        assert len(deletions) == count, ahead
    Ledger(engine, clock).open("anybody", None, "{}")  # one that is not told how long erases nothing
    assert len(deletions) == 3


@pytest.mark.parametrize(("hours", "kept"), [(1.0, False), (72.0, True)])
@pytest.mark.parametrize("through", ["consensus", "deliberations"])
def test_the_service_keeps_requests_as_long_as_its_config_says(services, config, hours, kept, through):
    clock = Clock()
    clock.ahead = -48 * 3600
    before = Ledger(open_store(config.database), clock)
    entry, _ = before.open("anybody", "key", recorded())
    before.finish(entry, "done", {})
    with TestClient(make_app(services, replace(config, retention_hours=hours))) as client:
        if through == "consensus":
            assert post(client, {"Prefer": "respond-async"}).status_code == 202
        else:
            Room(client).generate()
    with open_store(config.database).connect() as connection:
        ids = connection.execute(select(requests.c.id)).scalars().all()
    assert (entry.id in ids) == kept and len(ids) == 1 + kept


def test_half_a_character_is_refused_and_not_recorded(client):
    body = json.dumps({**REQUEST, "question": "Tea \ud800?"})
    headers = {"Idempotency-Key": "half", "Content-Type": "application/json"}
    answer = client.post("/v1/consensus", content=body, headers=headers)
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "question"
    assert post(client, {"Idempotency-Key": "half"}).status_code == 200
