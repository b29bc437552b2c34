"""The client and ``consensus ask``, against a real server on loopback that fails as servers and proxies do."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from stub import REQUEST, StubServices

import cli
from serving.api import make_app
from serving.client import LONGEST_RETRY_AFTER_S, Client, ServiceError, _events
from serving.config import ServeConfig
from serving.keys import create_key
from serving.problems import Overloaded
from serving.store import open_store

QUESTION, OPINIONS = REQUEST["question"], REQUEST["opinions"]


class Faults:
    """ASGI middleware that answers the next requests wrongly: a status with a proxy's words, nothing at all, or nothing
    although the request was carried out (``lose``)."""

    def __init__(self, app):
        self.app, self.next, self.seen = app, [], []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            headers = {k.decode(): v.decode() for k, v in scope["headers"]}
            self.seen.append((scope["method"], scope["path"], headers.get("idempotency-key")))
            if self.next:
                fault = self.next.pop(0)
                if fault == "lose":
                    await self.app(scope, receive, _nowhere)
                    raise RuntimeError("dies")
                if fault == "hang up":  # begins to answer, and dies: the connection is closed in the middle
                    length = [(b"content-length", b"100")]
                    await send({"type": "http.response.start", "status": 200, "headers": length})
                    await send({"type": "http.response.body", "body": b"{", "more_body": True})
                    raise RuntimeError("dies")
                await PlainTextResponse("a proxy speaks", fault)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _nowhere(message):
    """An ASGI ``send`` whose connection is gone."""


class Running:
    """A server in a thread."""

    def __init__(self, app):
        self.door = socket.create_server(("127.0.0.1", 0))  # ours from now on: a port looked up could be another's
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, args=([self.door],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.door.close()


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def config(tmp_path):
    return ServeConfig(database=f"sqlite:///{tmp_path}/service.db")


@pytest.fixture
def served(services, config):
    faults = Faults(make_app(services, config))
    with Running(faults) as running:
        running.faults = faults
        yield running


@pytest.fixture
def client(served):
    with Client(served.url, pause_s=0.01, timeout_s=10) as client:
        yield client


def test_an_answer_is_the_services(client, served):
    answer = client.consensus(QUESTION, OPINIONS, n=4, seed=3)
    raw = httpx.post(f"{served.url}/v1/consensus", json={**REQUEST, "seed": 3}, trust_env=False).json()
    assert answer.model_dump(mode="json") == raw


@pytest.mark.parametrize("faults", [[500], [503, 502], ["hang up"], [404], [408, 409], ["hang up", 500, 404]])
def test_what_passes_is_tried_again_under_one_idempotency_key(client, served, services, faults):
    served.faults.next = list(faults)
    assert client.consensus(QUESTION, OPINIONS, n=4).statement
    assert len(served.faults.seen) == len(faults) + 1
    assert len({key for _, _, key in served.faults.seen}) == 1 and services.calls == 1


def test_the_services_own_overload_is_waited_for(client, services):
    services.failures = [Overloaded(1), Overloaded(1)]
    started = time.monotonic()
    assert client.consensus(QUESTION, OPINIONS, n=4).statement
    assert time.monotonic() - started >= 2  # two times Retry-After


@pytest.mark.parametrize(("fields", "status"), [({"n": 0}, 422), ({"policy": "none"}, 422)])
def test_what_does_not_pass_is_said_at_once(client, served, fields, status):
    with pytest.raises(ServiceError) as caught:
        client.consensus(QUESTION, OPINIONS, **fields)
    assert caught.value.status == status and caught.value.problem.errors and caught.value.request_id
    assert len(served.faults.seen) == 1


def test_a_service_that_stays_away_is_given_up(served):
    served.faults.next = [500] * 10
    with Client(served.url, tries=3, pause_s=0.01) as client, pytest.raises(ServiceError, match="500"):
        client.models()
    assert len(served.faults.seen) == 3
    with Client("http://127.0.0.1:9", tries=2, pause_s=0.01) as client, pytest.raises(ServiceError, match="Connect"):
        client.models()


def test_a_large_group_is_waited_for(client):
    answer = client.consensus(QUESTION, [f"Opinion {k}." for k in range(100)], n=2)
    assert len(answer.members) == 100


def test_background_requests_events_and_erasure(client, served):
    started = client.start(QUESTION, OPINIONS, n=4)
    assert client.wait(started.id, poll_s=0.02).statement
    served.faults.next = ["hang up"]
    events = list(client.events(started.id))
    assert [kind for kind, _ in events] == ["queued", *["candidate"] * 4, "scored", "done"]
    assert list(client.events(started.id, after=4)) == events[5:]
    client.erase(started.id)
    for call in (client.state, client.erase, lambda name: list(client.events(name))):
        with pytest.raises(ServiceError, match="404"):
            call(started.id)


def impatient(served, **change):
    return Client(served.url, **{"pause_s": 0.01, "tries": 3, "timeout_s": 0.5, **change})


def test_an_answer_that_is_still_on_its_way_is_waited_for(served, services):
    services.pause_s = 3  # beyond time limit and tries
    with impatient(served) as client:
        assert client.consensus(QUESTION, OPINIONS, n=4).statement
    assert services.calls == 1
    posts = [key for method, _, key in served.faults.seen if method == "POST"]
    # The second is told where the first one stands, or the third, if the machine stood still meanwhile
    assert len(posts) in (2, 3) and len(set(posts)) == 1


def test_what_was_waited_for_and_came_to_nothing_is_asked_again_under_the_same_key(served, services):
    services.pause_s, services.failures = 1.5, [RuntimeError("dies")]
    with impatient(served) as client:
        assert client.consensus(QUESTION, OPINIONS, n=4).statement
    assert services.calls == 2
    assert len({key for method, _, key in served.faults.seen if method == "POST"}) == 1


def test_what_comes_to_nothing_again_and_again_is_given_up(served, services):
    services.pause_s, services.failures = 1.5, [RuntimeError("dies")] * 10
    with impatient(served) as client, pytest.raises(ServiceError, match="nothing 3 times"):
        client.consensus(QUESTION, OPINIONS, n=4)
    assert services.calls >= 3


def test_erasing_succeeds_where_the_first_answer_was_lost(client, served):
    started = client.start(QUESTION, OPINIONS, n=4)
    client.wait(started.id, poll_s=0.02)
    served.faults.next = ["lose"]
    client.erase(started.id)
    assert served.faults.seen[-2:] == [("DELETE", f"/v1/consensus/{started.id}", None)] * 2
    with pytest.raises(ServiceError, match="404"):
        client.erase(started.id)


def test_what_never_was_is_said_at_once(client, served):
    with pytest.raises(ServiceError, match="404"):
        client.erase("con_1")
    assert len(served.faults.seen) == 1
    with Client(f"{served.url}/elsewhere", pause_s=0.01) as lost, pytest.raises(ServiceError, match="404"):
        lost.consensus(QUESTION, OPINIONS, n=4)
    assert len(served.faults.seen) == 2


@pytest.mark.parametrize(("asked", "k", "pause"), [(None, 0, 0.1), (None, 9, 10.0), ("3", 0, 3.0), ("40", 9, 40.0),
                                                   ("3600", 0, LONGEST_RETRY_AFTER_S), ("soon", 0, 0.1)])  # fmt: skip
def test_the_services_own_pause_is_kept(asked, k, pause):
    with Client("http://127.0.0.1:9", pause_s=0.1) as client:
        assert client._pause(k, asked) == pytest.approx(pause)


def test_comments_are_no_events():
    stream = [": ping", "", "id: 0", "event: queued", "data: {}", "", ": ping", "", "event:", "", "data:", "data: b",
              "retry: 3", "", "id: 2", "event:done", "data:{}", ""]  # fmt: skip
    assert list(_events(iter(stream))) == [(0, "queued", "{}"), (0, "message", "\nb"), (2, "done", "{}")]


def test_scores_aggregates_and_models(client):
    scores = client.score(QUESTION, OPINIONS, ["Tea.", "More tea."])
    assert len(scores.utilities) == 3 and len(scores.utilities[0]) == 2
    ranked = client.aggregate(scores.utilities, welfare="rawlsian", weights=[1, 1, 2])
    assert ranked.welfare == [min(row[k] for row in scores.utilities) for k in (0, 1)]
    assert ranked.ranking[0] == max((0, 1), key=lambda k: ranked.welfare[k])
    assert client.models().policies == {"default": "sha256:policy"}


# --- consensus ask --------------------------------------------------------------------------------------------


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "question.yaml"
    path.write_text(f"question: {QUESTION}\nopinions: {json.dumps(OPINIONS)}\nn: 4\n")
    return str(path)


def test_ask_prints_the_statement_and_what_members_think(served, question, capsys):
    assert cli.main(["ask", question, "--url", served.url]) == 0
    shown = capsys.readouterr().out
    assert QUESTION in shown and "Predicted agreement" in shown
    assert all(opinion in shown for opinion in OPINIONS)
    assert cli.main(["ask", question, "--url", served.url, "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["statement"] in shown


def test_ask_sends_the_key_of_the_environment(config, services, question, monkeypatch, capsys):
    config.require_keys = True
    secret = create_key(open_store(config.database), "anna")[1]
    with Running(make_app(services, config)) as running:
        monkeypatch.delenv("CONSENSUS_API_KEY", raising=False)
        assert cli.main(["ask", question, "--url", running.url]) == 2
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("CONSENSUS_API_KEY", secret)
        assert cli.main(["ask", question, "--url", running.url]) == 0


@pytest.mark.parametrize(
    ("text", "field"),
    [("question: Q?", "opinions"), ("opinions: [a]\nquestion: ''", "question"), ("[1]", "request"), ("a: [", "request"),
     ("question: Q?\nopinions: [a]\nn: 0", "n"), ("question: Q?\nopinions: [a]\nseeds: 1", "seeds")],
)  # fmt: skip
def test_ask_refuses_a_bad_file_by_field(tmp_path, capsys, text, field):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert cli.main(["ask", str(path)]) == 2
    assert f"error: {field} = " in capsys.readouterr().err
    assert cli.main(["ask", str(tmp_path / "absent.yaml")]) == 2
