"""What every request leaves behind: counts, and a line in the log that says nothing of what members said."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from stub import REQUEST, StubServices

from serving.api import make_app
from serving.config import ServeConfig
from serving.metrics import HELP

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
