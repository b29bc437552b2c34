"""Deliberations that people take part in: joining, writing, generating, rating, erasing; blind and safe to repeat."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, event, select
from stub import StubServices

from serving.answering import silent
from serving.api import make_app
from serving.ballots import Ballots
from serving.best_of_n import NoStatement
from serving.config import ServeConfig
from serving.cycle_data import group_row
from serving.generation import Generation
from serving.ledger import LEASE_S, Ledger
from serving.metrics import ProcessMetrics
from serving.problems import ApiError
from serving.sessions import INVITE_PREFIX, MEMBER_PREFIX, Sessions, new_token
from serving.store import connect, open_store, reading
from serving.tables import candidates, deliberations, members

PATH = "/v1/deliberations"
OPINIONS = ("Tea for all, at once.", "No free tea while I pay for it.", "Only green tea, and in the morning.")


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def client(services, store_url):
    config = ServeConfig(database=store_url, background_timeout_s=20, num_candidates=6)
    with TestClient(make_app(services, config), raise_server_exceptions=False) as client:
        yield client


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


class Room:
    """A deliberation with its members, over HTTP."""

    def __init__(self, client, consent=True, **fields):
        self.client = client
        made = client.post(PATH, json={"question": "Should tea be free?", **fields})
        assert made.status_code == 201, made.text
        self.id, self.invite = made.json()["id"], made.json()["invite"]
        self.tokens, self.ids = [], []
        for k, text in enumerate(OPINIONS):
            joined = self.join(f"member {k}", consent=consent)
            self.tokens.append(joined["token"])
            self.ids.append(joined["member"])
            assert self.write(k, text).status_code == 200

    def join(self, alias, **fields):
        body = {"invite": self.invite, "alias": alias, **fields}
        joined = self.client.post(f"{PATH}/{self.id}/members", json=body)
        assert joined.status_code == 201, joined.text
        return joined.json()

    def write(self, k, text, **headers):
        url = f"{PATH}/{self.id}/opinion"
        return self.client.put(url, json={"text": text}, headers=bearer(self.tokens[k]) | headers)

    def do(self, verb):
        return self.client.post(f"{PATH}/{self.id}/{verb}")

    def generate(self, verb="generate"):
        assert self.do(verb).status_code == 202
        return self.wait()

    def wait(self):
        while (state := self.client.get(f"{PATH}/{self.id}").json())["state"] == "generating":
            time.sleep(0.02)
        return state

    def me(self, k):
        return self.client.get(f"{PATH}/{self.id}/me", headers=bearer(self.tokens[k])).json()

    def rate(self, k, candidate, agreement, quality=5, key=None):
        body = {"candidate": candidate, "agreement": agreement, "quality": quality}
        headers = bearer(self.tokens[k]) | ({} if key is None else {"Idempotency-Key": key})
        return self.client.post("/v1/ratings", json=body, headers=headers)

    def report(self):
        return self.client.get(f"{PATH}/{self.id}/report").json()


@pytest.fixture
def room(client):
    return Room(client)


def kind(response):
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.json()["type"].rsplit(":", 1)[1]


def test_a_deliberation_from_question_to_report(room):
    assert room.generate()["state"] == "rating"
    seen = [room.me(k)["candidates"] for k in range(3)]
    names = {c["id"] for c in seen[0]}
    assert len(names) == 4 and all({c["id"] for c in one} == names for one in seen)
    assert len({c["statement"] for c in seen[0]}) == 4
    best = seen[0][0]["id"]
    for k, agreement in enumerate((7, 5, 6)):
        assert room.rate(k, best, agreement, 4).json() == {
            "candidate": best, "agreement": agreement, "quality": 4, "version": 1,
        }  # fmt: skip
    assert room.do("close").json()["state"] == "closed"
    first = room.report()["candidates"][0]
    assert (first["id"], first["agreement"], first["median_agreement"], first["lowest_agreement"]) == (best, 6, 6, 5)
    assert (first["agree"], first["neutral"], first["disagree"], first["unanimous"]) == (3, 0, 0, True)
    assert first["quality"] == 4 and 0 < first["prediction_error"] < 6
    others = room.report()["candidates"][1:]
    assert all(c["ratings"] == 0 and c["agreement"] is None and c["unanimous"] is None for c in others)
    assert kind(room.rate(0, best, 1)) == "wrong-state"


def test_members_see_candidates_in_orders_of_their_own_and_always_the_same(client):
    room = Room(client, shown=6)
    room.generate()
    orders = [[c["id"] for c in room.me(k)["candidates"]] for k in range(3)]
    assert len({tuple(order) for order in orders}) > 1  # all the same by chance alone: once in half a million
    assert orders == [[c["id"] for c in room.me(k)["candidates"]] for k in range(3)]


def test_a_member_sees_neither_policy_nor_prediction_before_rating(room):
    def told(member):
        return [c["id"] for c in room.me(member)["candidates"] if c["winner"]]

    room.generate()
    names = [c["id"] for c in room.me(0)["candidates"]]
    assert set(room.me(0)["candidates"][0]) == {"id", "statement", "winner"}
    for name in names[:-1]:
        room.rate(0, name, 4)
    assert told(0) == told(1) == []
    room.rate(0, names[-1], 4)
    assert len(told(0)) == 1 and told(1) == []  # each by their own ratings
    room.do("close")
    assert told(1) == told(0)


def test_opinions_are_changed_until_they_are_frozen(room):
    assert room.write(0, "Changed.").status_code == 412  # which version does it replace?
    stale = room.write(0, "Changed.", **{"If-Match": '"0"'})
    assert kind(stale) == "precondition-failed"
    changed = room.write(0, "Changed.", **{"If-Match": '"1"'})
    assert changed.json() == {"version": 2} and changed.headers["etag"] == '"2"'
    assert room.write(0, "Changed.", **{"If-Match": '"1"'}).json() == {"version": 2}  # the same once more
    assert room.me(0)["opinion"] == "Changed."
    room.generate()
    assert kind(room.write(0, "Late.", **{"If-Match": '"2"'})) == "wrong-state"


def test_requests_that_are_repeated_make_nothing_twice(client):
    invite, token = new_token(INVITE_PREFIX), new_token(MEMBER_PREFIX)
    made = [client.post(PATH, json={"question": "Tea?", "invite": invite}).json() for _ in range(2)]
    assert made[0] == made[1]
    assert kind(client.post(PATH, json={"question": "Coffee?", "invite": invite})) == "idempotency-mismatch"
    body = {"invite": invite, "alias": "Anna", "token": token}
    joined = [client.post(f"{PATH}/{made[0]['id']}/members", json=body).json() for _ in range(2)]
    assert joined[0] == joined[1]
    assert client.get(f"{PATH}/{made[0]['id']}").json()["members"] == 1


def test_a_rating_repeated_is_one_and_a_changed_mind_is_a_new_version(room, store_url):
    room.generate()
    candidate = room.me(0)["candidates"][0]["id"]
    key = secrets.token_hex(8)
    assert [room.rate(0, candidate, 3, key=key).json()["version"] for _ in range(3)] == [1, 1, 1]
    assert kind(room.rate(0, candidate, 4, key=key)) == "idempotency-mismatch"
    assert room.rate(0, candidate, 3).json()["version"] == 1  # says the same without a key
    assert room.rate(0, candidate, 6).json()["version"] == 2
    assert room.rate(0, candidate, 3, key=key).json() == {
        "candidate": candidate, "agreement": 3, "quality": 5, "version": 1,
    }  # fmt: skip
    assert [r["agreement"] for r in room.me(0)["ratings"]] == [6]
    with connect(store_url).connect() as connection:
        rows = connection.exec_driver_sql("SELECT version, current, agreement FROM ratings ORDER BY version").all()
    assert [(v, bool(c), a) for v, c, a in rows] == [(1, False, 3), (2, True, 6)]


@pytest.mark.parametrize(
    "field, value", [("agreement", 0), ("agreement", 8), ("quality", 5.5), ("agreement", "5"), ("candidate", "can_1")]
)
def test_a_bad_rating_names_its_field(room, field, value):
    room.generate()
    body = {"candidate": room.me(0)["candidates"][0]["id"], "agreement": 4, "quality": 4, field: value}
    answer = room.client.post("/v1/ratings", json=body, headers=bearer(room.tokens[0]))
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field


@pytest.mark.parametrize("text", ["Tea\x00 for all.", "Tea \ud800 for all."])
def test_a_text_that_no_database_keeps_is_refused(room, text):
    body = json.dumps({"text": text})
    headers = bearer(room.tokens[0]) | {"Content-Type": "application/json", "If-Match": '"1"'}
    written = room.client.put(f"{PATH}/{room.id}/opinion", content=body, headers=headers)
    asked = room.client.post(PATH, content=json.dumps({"question": text}), headers=headers)
    spec = {"name": text, "arms": [{"name": n, "policy": "default", "n": 1, "welfare": "nash"} for n in "ab"]}
    begun = room.client.post("/v1/experiments", content=json.dumps(spec), headers=headers)
    for answer, field in ((written, "text"), (asked, "question"), (begun, "name")):
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
    assert room.me(0)["opinion"] == OPINIONS[0]


def test_nobody_reaches_anothers_deliberation(client, room):
    other = Room(client)
    room.generate()
    other.generate()
    candidate = room.me(0)["candidates"][0]["id"]
    assert kind(other.rate(0, candidate, 7)) == "not-found"
    url = f"{PATH}/{room.id}"
    assert kind(client.get(f"{url}/me", headers=bearer(other.tokens[0]))) == "not-found"
    for headers in ({}, bearer("mem_guess"), bearer(room.invite)):
        assert kind(client.get(f"{url}/me", headers=headers)) == "unauthorized"
    joined = client.post(f"{url}/members", json={"invite": other.invite, "alias": "Eve"})
    assert kind(joined) == "unauthorized"


def test_there_is_nothing_to_generate_from_nothing(client):
    made = client.post(PATH, json={"question": "Tea?"}).json()
    assert kind(client.post(f"{PATH}/{made['id']}/generate")) == "wrong-state"
    assert kind(client.post(f"{PATH}/{made['id']}/close")) == "wrong-state"


def test_generation_that_fails_goes_back_and_says_why(services, room):
    services.failures = [NoStatement("the policy wrote nothing")]
    state = room.generate()
    assert state["state"] == "collecting" and state["problem"]["type"].endswith("no-statement")
    assert room.write(0, "Changed.", **{"If-Match": '"1"'}).status_code == 200
    state = room.generate()
    assert state["state"] == "rating" and state["problem"] is None


def test_generating_twice_writes_once(services, room):
    services.gate = asyncio.Event()  # else the first may have written before the second asks
    assert room.do("generate").status_code == room.do("generate").status_code == 202
    room.client.portal.call(services.gate.set)
    assert room.wait()["state"] == "rating" and services.calls == 1
    assert kind(room.do("generate")) == "wrong-state"


def generation_of(engine, deliberation):
    """Request body of the writing that is going on, or was the last."""
    name = Sessions(engine).get(deliberation).generation
    return name, json.dumps({"deliberation": deliberation, "generation": name})


def test_another_process_writes_on_where_one_died(services, room, store_url):
    """The first process is one whose request row exists and whose lease has run out."""
    engine = open_store(store_url)
    Sessions(engine).freeze(room.id, "anybody", revise=False)
    Ledger(engine, clock=lambda: time.time() - 2 * LEASE_S).open(room.id, *generation_of(engine, room.id))
    assert room.wait()["state"] == "rating" and services.calls == 1


def test_a_failed_generation_that_somebody_begins_again_does_no_harm(services, room, store_url):
    """Whoever looked while it was going on may begin it again when it has failed: the next one is another."""
    services.failures = [NoStatement("the policy wrote nothing")]
    room.generate()
    name, body = generation_of(open_store(store_url), room.id)
    engine = open_store(store_url)
    Ledger(engine, clock=lambda: time.time() - 2 * LEASE_S).open(room.id, name, body)
    work = Generation(services, ServeConfig(), Sessions(engine), ProcessMetrics())
    assert asyncio.run(work.run(body, silent)) == {"candidates": 0}
    assert room.generate()["state"] == "rating" and services.calls == 2


def test_a_critique_round_reads_opinions_winner_and_critiques(services, room):
    prompts = []
    sampler = services.sampler

    def spy(policy):
        found = sampler(policy)
        sample = found.sample

        async def seen(question, opinions, orders):
            prompts.append((question, list(opinions)))
            return await sample(question, opinions, orders)

        found.sample = seen
        return found

    services.sampler = spy
    room.generate()
    for candidate in room.me(0)["candidates"]:
        room.rate(0, candidate["id"], 4)
    winner = next(c for c in room.me(0)["candidates"] if c["winner"])
    assert kind(room.do("revise")) == "wrong-state"  # nothing to revise by
    for text in ("Too long.", "It forgets coffee."):
        answer = room.client.post("/v1/critiques", json={"text": text}, headers=bearer(room.tokens[1]))
        assert answer.json() == {"candidate": winner["id"]}
    state = room.generate("revise")
    assert (state["state"], state["round"]) == ("rating", 2)
    question, opinions = prompts[1]
    assert winner["statement"] in question and "It forgets coffee." in opinions[1] and OPINIONS[1] in opinions[1]
    assert "Too long." not in opinions[1] and opinions[0] == OPINIONS[0]
    assert {c["round"] for c in room.report()["candidates"]} == {1, 2}
    assert kind(room.rate(0, winner["id"], 5)) == "not-found"  # the first round is over
    assert kind(room.do("revise")) == "wrong-state"


def test_comparisons_keep_the_newest_of_a_pair(room, store_url):
    room.generate()
    a, b, *_ = (c["id"] for c in room.me(0)["candidates"])
    for better, worse in ((a, b), (a, b), (b, a)):
        body = {"better": better, "worse": worse}
        assert room.client.post("/v1/comparisons", json=body, headers=bearer(room.tokens[0])).status_code == 200
    same = room.client.post("/v1/comparisons", json={"better": a, "worse": a}, headers=bearer(room.tokens[0]))
    assert kind(same) == "bad-input"
    with connect(store_url).connect() as connection:
        rows = connection.exec_driver_sql("SELECT better, current FROM comparisons ORDER BY number").all()
    assert [(name, bool(current)) for name, current in rows] == [(a, False), (b, True)]


def texts_of(engine):
    """Everything in every table, as one text."""
    from serving.tables import metadata

    with engine.connect() as connection:
        return "\n".join(str(row) for table in metadata.sorted_tables for row in connection.execute(table.select()))


def test_erasing_a_member_removes_their_text_from_tables_exports_and_logs(room, store_url, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    room.write(1, "My secret garden needs tea.", **{"If-Match": '"1"'})
    room.generate()
    for c in room.me(1)["candidates"]:
        room.rate(1, c["id"], 2)
        room.rate(0, c["id"], 6)
    room.client.post("/v1/critiques", json={"text": "My secret objection."}, headers=bearer(room.tokens[1]))
    room.generate("revise")
    engine = connect(store_url)
    secrets_of = ("My secret garden", "My secret objection", OPINIONS[1], "member 1", room.ids[1])
    assert all(text in texts_of(engine) for text in secrets_of)
    assert room.client.get("/v1/ratings/export").text.count("My secret garden") == 4
    gone = room.client.delete(f"{PATH}/{room.id}/me", headers=bearer(room.tokens[1]))
    assert gone.status_code == 204
    left = texts_of(engine) + room.client.get("/v1/ratings/export").text + json.dumps(room.report())
    left += room.client.get(f"{PATH}/{room.id}/report.csv").text + caplog.text
    assert not any(text in left for text in secrets_of[:4]) and f'"{room.ids[1]}": ' not in left
    assert "member 0" in texts_of(engine)
    if store_url.startswith("sqlite"):
        files = b"".join(path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file())
        assert not any(text.encode() in files for text in secrets_of[:4])
    assert kind(room.client.get(f"{PATH}/{room.id}/me", headers=bearer(room.tokens[1]))) == "unauthorized"


def test_a_deliberation_is_erased_whole(room, store_url, tmp_path):
    room.generate()
    room.rate(0, room.me(0)["candidates"][0]["id"], 5)
    said = (*OPINIONS, *(candidate["statement"] for candidate in room.report()["candidates"]))
    assert all(text in texts_of(connect(store_url)) for text in (*said, room.id))
    assert room.client.delete(f"{PATH}/{room.id}").status_code == 204
    left = texts_of(connect(store_url))
    assert not any(text in left for text in (*said, room.id))  # nor does the record of its generation name it
    if store_url.startswith("sqlite"):
        files = b"".join(path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file())
        assert not any(text.encode() in files for text in said)


def test_a_deliberation_that_everybody_left_is_not_unanimous(room):
    room.generate()
    for token in room.tokens:
        assert room.client.delete(f"{PATH}/{room.id}/me", headers=bearer(token)).status_code == 204
    assert [c["unanimous"] for c in room.report()["candidates"]] == [None] * 4


def generating(engine, size=2):
    """Sessions, and a deliberation whose members have written: its id and they."""
    sessions, invite = Sessions(engine), new_token(INVITE_PREFIX)
    name = sessions.create("anna", "Should tea be free?", {}, invite)
    people = [sessions.join(name, invite, f"member {k}", True, new_token(MEMBER_PREFIX)) for k in range(size)]
    for member in people:
        sessions.write_opinion(member, "Tea for all.", 0)
    sessions.freeze(name, "anna", revise=False)
    return sessions, name, people


def keep(sessions, name, people):
    """Keep one candidate, which all the people are predicted to like; returns its id."""
    row = {
        "id": "can_" + secrets.token_hex(8), "number": 0, "statement": "Tea.", "policy": "p", "versions": "{}",
        "welfare": 1.0, "predicted": json.dumps({member.id: 5.0 for member in people}), "winner": True,
    }  # fmt: skip
    sessions.keep(name, sessions.get(name).generation, [row], [])
    return row["id"]


def predicted_of(engine):
    with engine.connect() as connection:
        return json.loads(connection.execute(select(candidates.c.predicted)).scalar_one())


def test_nothing_is_predicted_of_a_member_who_left_while_candidates_were_written(store_url):
    engine = open_store(store_url)
    sessions, name, people = generating(engine)
    sessions.erase_member(people[0])
    keep(sessions, name, people)
    assert predicted_of(engine) == {people[1].id: 5.0}


def test_of_members_who_leave_at_once_nothing_stays(postgres_url):
    """SQLite's writers take turns anyway."""
    engine, both = open_store(postgres_url), Barrier(2)
    sessions, name, people = generating(engine)
    keep(sessions, name, people)

    @event.listens_for(engine, "before_cursor_execute")
    def meet(connection, cursor, statement, *rest):
        if statement.startswith("UPDATE candidates"):
            with suppress(BrokenBarrierError):
                both.wait(timeout=1)  # until both have read what is predicted, if they can

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(sessions.erase_member, people))
    assert predicted_of(engine) == {}


def test_a_rating_does_not_stop_an_erasure(postgres_url):
    """Both lock the deliberation first, then the member: neither waits for the other for ever."""
    engine = open_store(postgres_url)
    sessions, name, people = generating(engine)
    candidate = keep(sessions, name, people)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

    def rate():
        try:
            return Ballots(engine).rate(people[0], candidate, 5, 5)
        except ApiError as error:
            return error.kind

    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as erasing:
            erasing.execute(select(deliberations).where(deliberations.c.id == name).with_for_update())
            rated = threads.submit(rate)
            with reading(engine) as watching:
                while not watching.exec_driver_sql(waits).scalar():
                    time.sleep(0.02)
            erasing.execute(delete(deliberations).where(deliberations.c.id == name))
        assert rated.result() == "not-found"
    with engine.connect() as connection:
        assert connection.execute(select(members)).all() == []


def test_an_id_that_no_database_keeps_names_nothing(client):
    for path in (PATH, "/v1/experiments"):
        assert kind(client.get(f"{path}/a%00b")) == "not-found"
    for method, path in (("DELETE", ""), ("POST", "/generate"), ("POST", "/close"), ("GET", "/report.csv")):
        assert kind(client.request(method, f"{PATH}/a%00b{path}")) == "not-found"
    joined = client.post(f"{PATH}/a%00b/members", json={"invite": new_token(INVITE_PREFIX), "alias": "Eve"})
    assert kind(joined) == "unauthorized"


def test_the_report_as_csv_has_a_line_a_member_and_candidate(room):
    room.generate()
    candidate = room.me(2)["candidates"][0]["id"]
    room.rate(2, candidate, 3, 6)
    answer = room.client.get(f"{PATH}/{room.id}/report.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    lines = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(lines) == 4 * 3
    rated = [line for line in lines if line["agreement"]]
    assert [(r["candidate"], r["member"], r["agreement"], r["quality"]) for r in rated] == [(candidate, "2", "3", "6")]
    assert not any(text in answer.text for text in (*OPINIONS, "member 0"))


def test_ratings_without_consent_are_not_exported(client):
    for consent in (False, True):
        room = Room(client, consent=consent)
        room.generate()
        room.rate(0, room.me(0)["candidates"][0]["id"], 5, 6)
    rows = [json.loads(line) for line in client.get("/v1/ratings/export").text.splitlines()]
    assert [(row["deliberation_id"], row["opinion"], row["agreement"]) for row in rows] == [(room.id, OPINIONS[0], 5)]
    assert client.get("/v1/ratings/export", params={"after": rows[0]["number"]}).text == ""


def test_a_member_takes_consent_back_and_gives_it_again(room, store_url):
    """In every state, and for everything said so far; nobody else's changes."""
    engine = connect(store_url)

    def change(consent, k=0):
        answer = room.client.patch(f"{PATH}/{room.id}/me", json={"consent": consent}, headers=bearer(room.tokens[k]))
        assert answer.status_code == 200, answer.text
        assert answer.json() == room.me(k) and answer.json()["consent"] is consent

    def exported():
        lines = room.client.get("/v1/ratings/export").text.splitlines()
        return sorted(json.loads(line)["member"] for line in lines), group_row(engine, room.id)["opinions"]

    change(False)
    assert exported() == ([], list(OPINIONS[1:]))
    room.generate()
    candidate = room.me(0)["candidates"][0]["id"]
    for k in range(3):
        room.rate(k, candidate, 5)
    assert exported() == ([1, 2], list(OPINIONS[1:]))
    change(True)
    change(True)  # safe to repeat
    assert exported() == ([0, 1, 2], list(OPINIONS))
    room.do("close")
    change(False, k=2)
    assert exported() == ([0, 1], list(OPINIONS[:2]))
    assert [room.me(k)["consent"] for k in range(3)] == [True, True, False]


@pytest.mark.parametrize("body", [{}, {"consent": None}, {"consent": "yes"}, {"consent": 1}, {"alias": "x"}, []])
def test_consent_is_yes_or_no(room, body):
    answer = room.client.patch(f"{PATH}/{room.id}/me", json=body, headers=bearer(room.tokens[0]))
    assert answer.status_code == 422 and room.me(0)["consent"] is True


def test_consent_is_the_members_own(client, room):
    other, body = Room(client), {"consent": False}
    assert kind(client.patch(f"{PATH}/{room.id}/me", json=body)) == "unauthorized"
    assert kind(client.patch(f"{PATH}/{room.id}/me", json=body, headers=bearer(other.tokens[0]))) == "not-found"
    assert all(each.me(0)["consent"] for each in (room, other))


def pages(client, limit):
    """The questions of each page, from the first to the last."""
    found, query = [], {"limit": limit}
    while True:
        page = client.get(PATH, params=query).json()
        found.append([one["question"] for one in page["deliberations"]])
        if page["next"] is None:
            return found
        query["after"] = page["next"]


def test_deliberations_are_listed_by_the_page(client, store_url):
    for k in range(5):
        assert client.post(PATH, json={"question": f"Number {k}?"}).status_code == 201
    newest_first = [f"Number {k}?" for k in (4, 3, 2, 1, 0)]
    assert pages(client, 2) == [newest_first[:2], newest_first[2:4], newest_first[4:]]
    assert pages(client, 5) == pages(client, 100) == [newest_first]
    assert client.get(PATH).json()["next"] is None
    with open_store(store_url).begin() as connection:  # so that ids alone tell them apart
        connection.execute(deliberations.update().values(created=1764486000.1234567))
    assert sorted(sum(pages(client, 2), [])) == sorted(newest_first)


def test_a_page_s_end_outlives_what_was_there(client):
    made = [client.post(PATH, json={"question": f"Number {k}?"}).json()["id"] for k in range(4)]
    after = client.get(PATH, params={"limit": 2}).json()["next"]
    assert client.delete(f"{PATH}/{made[2]}").status_code == 204  # the last of that page
    rest = client.get(PATH, params={"after": after}).json()["deliberations"]
    assert [one["id"] for one in rest] == [made[1], made[0]]


@pytest.mark.parametrize("mark", ["", "del_0", "1.0", "nan_del_0", "1.0_del\0", "1.0_del_0\n", "9" * 400 + ".0_del_0"])
def test_what_is_no_page_s_end_is_refused(client, mark):
    response = client.get(PATH, params={"after": mark})
    assert response.status_code == 422 and response.json()["errors"][0]["field"] == "after"


@pytest.mark.parametrize("limit", [0, 1001, "x"])
def test_a_page_has_a_size(client, limit):
    response = client.get(PATH, params={"limit": limit})
    assert response.status_code == 422 and response.json()["errors"][0]["field"] == "limit"
