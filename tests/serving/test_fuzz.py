"""Any request whatever, made from the OpenAPI document: no fault, and every refusal a problem (schemathesis).

``make fuzz`` runs ten times as many cases; ``FUZZ_CASES`` says how many an operation.
"""

from __future__ import annotations

import os
import tempfile

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from stub import StubServices

from serving.api import make_app
from serving.config import ServeConfig

CASES = int(os.environ.get("FUZZ_CASES", "60"))
OPERATIONS = 34
load_all_checks()
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
run = {"cases": 0}


FOLDER = tempfile.TemporaryDirectory()
APP = make_app(StubServices(), ServeConfig(database=f"sqlite:///{FOLDER.name}/service.db"))
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.fixture(scope="module")
def transport():
    with TestClient(APP, raise_server_exceptions=False) as client:
        made = client.post("/v1/deliberations", json={"question": "Should tea be free?"}).json()
        body = {"invite": made["invite"], "alias": "Anna"}
        member = client.post(f"/v1/deliberations/{made['id']}/members", json=body).json()
        client.headers["Authorization"] = f"Bearer {member['token']}"  # organisers need no key here
        yield client


@schema.parametrize()
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_service(case, transport):
    response = case.call(session=transport)
    case.validate_response(response, checks=CHECKS.get_by_names(NAMES))
    run["cases"] += 1
    if response.status_code >= 400:
        assert response.headers["content-type"] == ["application/problem+json"]
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["retryable"] == (response.status_code in (408, 409, 429))


def test_there_were_enough_cases(transport):
    operations = sum(len(path) for path in transport.get("/openapi.json").json()["paths"].values())
    assert operations == OPERATIONS
    assert run["cases"] >= max(1000, 18 * CASES)  # operations without parameters have few cases
