"""What every request leaves behind: counts, and a line in the log that says nothing of what members said."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from stub import REQUEST, StubServices

from serving.api import make_app
from serving.config import ServeConfig
from serving.fields import MAX_FIELDS
from serving.guard import GROUP_PATHS, LOCAL_HOSTS, MAX_BODY_BYTES, MAX_SMALL_BODY_BYTES, Guard
from serving.metrics import HELP, ProcessMetrics
from serving.problems import MAX_ERRORS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(tmp_path):
    config = ServeConfig(database=f"sqlite:///{tmp_path}/service.db")
    with TestClient(make_app(StubServices(), config), raise_server_exceptions=False) as client:
        yield client


def test_counts_are_by_route_not_by_path(client):
    client.post("/v1/consensus", json=REQUEST)
    client.post("/v1/consensus", json={**REQUEST, "n": 0})
    client.get("/v1/consensus/con_1")
    client.get("/v1/consensus/con_2")
    client.request("BREW", "/tea/12345")
    text = client.get("/metrics").text
    found = dict(re.findall(r"^consensus_requests_total{(.*)} ([\d.]+)$", text, re.MULTILINE))
    assert found == {
        'method="POST",route="/v1/consensus",status="200"': "1.0",
        'method="POST",route="/v1/consensus",status="422"': "1.0",
        'method="GET",route="/v1/consensus/{request_id}",status="404"': "2.0",
        'method="other",route="none",status="404"': "1.0",
    }
    assert "consensus_candidates_total 4.0" in text
    assert "consensus_prompt_tokens_total 30.0" in text  # of three orders
    assert "consensus_completion_tokens_total 12.0" in text
    for stage in ("sample", "judge"):
        assert f'consensus_stage_seconds_count{{stage="{stage}"}} 1.0' in text
    described = re.findall(r"^# HELP (\w+) ", text, re.MULTILINE)
    assert {name for name in described if not name.endswith("_created")} == set(HELP)


def test_the_log_has_ids_and_no_opinions(client, caplog):
    with caplog.at_level(logging.INFO):
        client.post("/v1/consensus", json={**REQUEST, "n": 0}, headers={"X-Request-Id": "my-id"})
        client.post("/v1/consensus", json=REQUEST, headers={"Prefer": "respond-async"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "serving.access"]
    assert [(line["status"], line["route"], line["caller"]) for line in lines] == [
        (422, "/v1/consensus", "anybody"),
        (202, "/v1/consensus", "anybody"),
    ]
    assert lines[0]["request_id"] == "my-id" and set(lines[0]) == {
        "event", "request_id", "method", "route", "status", "ms", "caller"}  # fmt: skip
    said = [REQUEST["question"], *REQUEST["opinions"]]
    assert not any(text in caplog.text for text in said)


def test_the_dashboard_asks_for_what_is_counted(client):
    board = (ROOT / "docs" / "grafana.json").read_text()
    asked = set(re.findall(r"ray_(consensus_\w+?)(?:_bucket)?[{\[\" ]", board))
    assert asked == set(HELP)
    for name in HELP:
        assert f"`{name}`" in (ROOT / "docs" / "operations.md").read_text()


# --- the log, where nobody else sets logging up -----------------------------------------------------------------

ALONE = """
import sys
from fastapi.testclient import TestClient
from serving.api import make_app
from serving.config import ServeConfig
from serving.guard import write_access_log
from stub import StubServices

write_access_log()
write_access_log()
client = TestClient(make_app(StubServices(), ServeConfig(database=sys.argv[1])))
client.get("/healthz", headers={"X-Request-Id": "mine"})
"""


def test_in_a_process_without_logging_the_line_is_on_standard_error_once(tmp_path):
    environment = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PATH": ""}
    words = [sys.executable, "-c", ALONE, f"sqlite:///{tmp_path}/service.db"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert (found["route"], found["status"], found["request_id"]) == ("/healthz", 200, "mine")


# --- what is not let in -----------------------------------------------------------------------------------------


def test_of_many_errors_the_first_are_named_and_the_others_counted(client):
    answer = client.post("/v1/deliberations/x/members", json={str(k): 0 for k in range(MAX_FIELDS)})
    problem = answer.json()
    assert answer.status_code == 422 and len(problem["errors"]) == MAX_ERRORS
    assert problem["detail"].endswith(f"; and {MAX_FIELDS + 2 - MAX_ERRORS} more")  # invite and alias are missing too
    assert len(answer.content) < 10_000
    few = client.post("/v1/deliberations/x/members", json={str(k): 0 for k in range(MAX_ERRORS - 2)}).json()
    assert len(few["errors"]) == MAX_ERRORS and "more" not in few["detail"]


@pytest.mark.parametrize(
    ("path", "limit"),
    [(path, MAX_BODY_BYTES) for path in sorted(GROUP_PATHS)]
    + [(path, MAX_SMALL_BODY_BYTES) for path in ("/v1/deliberations", "/v1/deliberations/x/members", "/v1/experiments",
                                                 "/v1/consensus/con_1", "/nowhere")],
)  # fmt: skip
def test_only_what_brings_a_group_may_be_large(client, path, limit):
    headers = {"Content-Type": "application/json"}
    for size, refused in ((limit, False), (limit + 1, True)):
        answer = client.post(path, content=b'"' + b"a" * (size - 2) + b'"', headers=headers)
        assert (answer.status_code == 413) == refused, answer.text
    assert answer.json()["detail"] == f"at most {limit} bytes are read here"


def test_the_largest_small_bodies_fit_however_they_are_escaped():
    arm = {"name": "\U0001f375" * 100, "policy": "p" * 40, "preference_model": "p" * 40, "welfare": "utilitarian"}
    for body in ({"text": "\U0001f375" * 2000}, {"name": "\U0001f375" * 200, "arms": [arm] * 5}):
        assert len(json.dumps(body)) < MAX_SMALL_BODY_BYTES


def guarded(hosts):
    return TestClient(Guard(PlainTextResponse("let in"), ProcessMetrics(), True, hosts=hosts), base_url="http://here")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]", "[::1]:8000", "localhost:"]
)
def test_this_machines_own_names_are_let_in(host):
    assert guarded(LOCAL_HOSTS).get("/", headers={"Host": host}).text == "let in"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost", "[::2]",
     "0.0.0.0:8000", "localhost:80:80", "::1", ""],
)  # fmt: skip
def test_a_page_whose_name_leads_here_is_not_let_in(host):
    answer = guarded(LOCAL_HOSTS).get("/", headers={"Host": host, "X-Request-Id": "mine"})
    problem = answer.json()
    assert answer.status_code == problem["status"] == 421 and problem["type"].endswith(":wrong-host")
    assert not problem["retryable"] and "require_keys" in problem["detail"] and len(problem["detail"]) < 300
    assert answer.headers["content-type"] == "application/problem+json" and answer.headers["x-request-id"] == "mine"


def test_with_keys_a_service_may_go_by_any_name():
    assert guarded(None).get("/", headers={"Host": "consensus.example"}).text == "let in"


# --- who went away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("begun", "status"), [(False, 499), (True, 200)])
async def test_a_client_that_goes_away_is_no_fault_of_the_service(begun, status, caplog):
    async def slow(scope, receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        pass

    metrics = ProcessMetrics()
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    with caplog.at_level(logging.INFO, "serving.access"):
        task = asyncio.create_task(Guard(slow, metrics, True)(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert json.loads(caplog.records[-1].getMessage())["status"] == status
    assert f'status="{status}"}} 1.0' in await metrics.text()
