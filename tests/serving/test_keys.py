"""API keys: what is kept of them, what they open, how fast, and the command that manages them."""

from __future__ import annotations

import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from stub import REQUEST, StubServices

import cli
from deliberation.types import InputError
from serving.api import make_app
from serving.config import ServeConfig
from serving.keys import (
    ANYBODY,
    CONSENSUS,
    KNOWN_FOR_S,
    Caller,
    Doorkeeper,
    create_key,
    list_keys,
    revoke_key,
    rotate_key,
)
from serving.problems import ApiError
from serving.store import open_store


@pytest.fixture
def url(store_url):
    return store_url


@pytest.fixture
def client(url):
    with TestClient(make_app(StubServices(), ServeConfig(database=url, require_keys=True))) as client:
        yield client


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def refusal(door, secret, scope=CONSENSUS):
    with pytest.raises(ApiError) as caught:
        door.admit(secret, scope)
    return caught.value


def test_the_secret_is_kept_nowhere(sqlite_url, tmp_path):
    key, secret = create_key(open_store(sqlite_url), "anna")
    assert secret not in str(key)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.encode() not in written and key.id.encode() in written


def test_a_key_opens_what_its_scopes_say(client, url):
    _, secret = create_key(open_store(url), "anna")
    _, other = create_key(open_store(url), "reader", scopes=("admin:read",))
    assert client.post("/v1/consensus", json=REQUEST, headers=bearer(secret)).status_code == 200
    for headers, status in (({}, 401), (bearer("cm_guess"), 401), (bearer(other), 403), ({"Authorization": "x"}, 401)):
        for method, path in (("POST", "/v1/consensus"), ("GET", "/v1/models"), ("GET", "/v1/consensus/con_1")):
            response = client.request(method, path, json=REQUEST, headers=headers)
            assert response.status_code == status, (headers, path)
            assert response.headers["content-type"] == "application/problem+json"
            assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200  # probes have no key


def test_a_revoked_key_is_refused_within_seconds(url):
    clock, engine = Clock(), open_store(url)
    door = Doorkeeper(engine, clock)
    key, secret = create_key(engine, "anna")
    assert door.admit(secret, CONSENSUS).id == key.id
    revoke_key(engine, key.id)
    clock.now += KNOWN_FOR_S + 0.1
    assert refusal(door, secret).kind == "unauthorized"
    with pytest.raises(InputError):
        revoke_key(engine, key.id)


def test_a_rotated_key_has_a_new_secret_and_all_that_was_its(client, url):
    engine, body = open_store(url), {"question": "Should tea be free?"}
    key, old = create_key(engine, "anna", (CONSENSUS, "admin:read"), rate_per_minute=50)
    made = client.post("/v1/deliberations", json=body, headers=bearer(old)).json()["id"]
    new = rotate_key(engine, key.id)
    assert refusal(Doorkeeper(engine), old).kind == "unauthorized"
    assert list_keys(engine) == [key]
    assert Doorkeeper(engine).admit(new, "admin:read") == Caller(key.id, frozenset(key.scopes), 50)
    assert client.delete(f"/v1/deliberations/{made}", headers=bearer(new)).status_code == 204


def test_a_rotated_keys_old_secret_is_refused_within_seconds(url):
    clock, engine = Clock(), open_store(url)
    door = Doorkeeper(engine, clock)
    key, secret = create_key(engine, "anna")
    door.admit(secret, CONSENSUS)
    rotate_key(engine, key.id)
    clock.now += KNOWN_FOR_S + 0.1
    assert refusal(door, secret).kind == "unauthorized"


def test_only_a_live_key_is_rotated(url):
    engine = open_store(url)
    key, _ = create_key(engine, "anna")
    revoke_key(engine, key.id)
    for name in (key.id, "key_none"):
        with pytest.raises(InputError) as caught:
            rotate_key(engine, name)
        assert caught.value.field == "id"


def test_threads_do_not_get_more_than_the_rate_together():
    def slow_clock():
        time.sleep(0.0005)  # between looking into the bucket and taking from it
        return 1000.0

    door, caller = Doorkeeper(None, slow_clock), Caller("mbr_1", frozenset(), 100)

    def admitted(turn):
        try:
            door.count(caller)
        except ApiError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(admitted, range(200))) == 100


def test_a_caller_who_has_been_gone_for_a_minute_takes_no_memory():
    clock = Clock()
    door = Doorkeeper(None, clock)
    for k in range(1000):
        clock.now += 1
        door.count(Caller(f"mbr_{k}", frozenset(), 240))
    assert len(door._buckets) <= 121
    assert door.limits(Caller("mbr_999", frozenset(), 240))["RateLimit"] == '"minute";r=239;t=1'


def test_a_key_is_used_as_often_as_its_rate_says(url):
    clock, engine = Clock(), open_store(url)
    door = Doorkeeper(engine, clock)
    secrets = [create_key(engine, name, rate_per_minute=6)[1] for name in ("anna", "ben")]
    for _ in range(6):
        door.admit(secrets[0], CONSENSUS)
    refused = refusal(door, secrets[0])
    assert refused.kind == "rate-limited"
    assert door.admit(secrets[1], CONSENSUS)  # anna's haste is not ben's
    wait = int(refused.headers["Retry-After"])
    clock.now += wait
    assert door.admit(secrets[0], CONSENSUS)  # one token has come back by then
    assert refusal(door, secrets[0]).kind == "rate-limited"
    clock.now += 3600
    for _ in range(6):  # a bucket holds one minute's requests, not an hour's
        door.admit(secrets[0], CONSENSUS)
    assert refusal(door, secrets[0]).kind == "rate-limited"


def test_responses_tell_what_is_left_of_the_rate(client, url):
    _, secret = create_key(open_store(url), "anna", rate_per_minute=3)
    answers = [
        client.post("/v1/consensus", json={**REQUEST, "n": n}, headers=bearer(secret)) for n in (4, 0, 4, 4)
    ]  # the second is bad input, and counts
    assert [answer.status_code for answer in answers] == [200, 422, 200, 429]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"minute";q=3;w=60'}
    told = [re.fullmatch(r'"minute";r=(\d+);t=(\d+)', answer.headers["ratelimit"]).groups() for answer in answers]
    left, windows = zip(*((int(r), int(t)) for r, t in told), strict=True)
    assert left == (2, 1, 0, 0)
    assert 15 <= windows[0] <= 20 < 30 <= windows[1] <= 40 and windows[2] <= 20  # full, full, one request
    assert [answer.headers.get("retry-after") for answer in answers] == [None, None, None, str(windows[3])]
    assert client.get("/healthz").headers.get("ratelimit") is None
    assert client.get("/v1/models", headers=bearer("cm_guess")).headers.get("ratelimit") is None


def test_what_is_left_comes_back_with_time(url):
    clock, engine = Clock(), open_store(url)
    door = Doorkeeper(engine, clock)
    caller = door.admit(create_key(engine, "anna", rate_per_minute=100)[1], CONSENSUS)
    for _ in range(49):
        door.count(caller)
    assert door.limits(caller) == {"RateLimit-Policy": '"minute";q=100;w=60', "RateLimit": '"minute";r=50;t=30'}
    clock.now += 15
    assert door.limits(caller)["RateLimit"] == '"minute";r=75;t=15'
    clock.now += 3600
    assert door.limits(caller)["RateLimit"] == '"minute";r=100;t=1'
    assert Doorkeeper(None).limits(ANYBODY) == {}


@pytest.mark.parametrize(
    ("field", "change"),
    [("name", {"name": " "}), ("scopes", {"scopes": ("root",)}), ("scopes", {"scopes": ()}),
     ("rate_per_minute", {"rate_per_minute": 0})],
)  # fmt: skip
def test_bad_keys_are_refused(url, field, change):
    with pytest.raises(InputError) as caught:
        create_key(open_store(url), **{"name": "anna", **change})
    assert caught.value.field == field


def test_the_command_makes_lists_and_revokes(url, capsys):
    assert cli.main(["keys", "create", "--name", "anna", "--database", url]) == 0
    name, secret, *_ = capsys.readouterr().out.splitlines()
    assert Doorkeeper(open_store(url)).admit(secret, CONSENSUS).id == name
    assert cli.main(["keys", "list", "--database", url]) == 0
    shown = capsys.readouterr().out
    assert name in shown and "live" in shown and secret not in shown
    assert cli.main(["keys", "rotate", "--id", name, "--database", url]) == 0
    old, (same, secret, *_) = secret, capsys.readouterr().out.splitlines()
    assert refusal(Doorkeeper(open_store(url)), old).kind == "unauthorized"
    assert same == name and Doorkeeper(open_store(url)).admit(secret, CONSENSUS).id == name
    assert cli.main(["keys", "revoke", "--id", name, "--database", url]) == 0
    assert refusal(Doorkeeper(open_store(url)), secret).kind == "unauthorized"
    assert [key.revoked is None for key in list_keys(open_store(url))] == [False]
    assert cli.main(["keys", "revoke", "--id", "key_none", "--database", url]) == 2
    assert cli.main(["keys", "burn", "--database", url]) == 2


@pytest.mark.parametrize("url", ["service.db", "sqlite://", "sqlite:///:memory:", "oracle9://x"])
def test_a_database_that_is_none_is_refused(url):
    with pytest.raises(InputError) as caught:
        open_store(url)
    assert caught.value.field == "database"


def test_acknowledged_writes_survive_a_crash_of_the_machine(sqlite_url, tmp_path):
    engine = open_store(sqlite_url)
    with engine.connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2}
    create_key(engine, "anna")
    assert sqlite3.connect(tmp_path / "store/service.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_listing_keys_makes_no_database(tmp_path, capsys):
    place = tmp_path / "none.db"
    for words in (["list"], ["revoke", "--id", "key_1"], ["rotate", "--id", "key_1"]):
        assert cli.main(["keys", *words, "--database", f"sqlite:///{place}"]) == 2
        assert "no such file" in capsys.readouterr().err
    assert not place.exists()
