"""Spans, as a receiver of OpenTelemetry's protocol gets them: who belongs to whom, and no word that anybody said."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from otlp import attributes, receiving
from stub import REQUEST, StubServices

from deliberation.types import InputError
from serving import tracing
from serving.api import make_app
from serving.config import ServeConfig

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "my-id"}


@pytest.fixture
def anew(monkeypatch):
    """This process's exporter is made in the test, and gone behind it."""
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing._provider.cache_clear()
    yield monkeypatch
    if (provider := tracing._provider()) is not None:
        provider.shutdown()
    tracing._provider.cache_clear()


@pytest.fixture
def receiver(anew):
    with receiving() as found:
        anew.setenv(tracing.ENDPOINTS[0], found.url)
        yield found


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def client(services, tmp_path):
    return TestClient(make_app(services, ServeConfig(database=f"sqlite:///{tmp_path}/service.db")),
                      raise_server_exceptions=False)  # fmt: skip


def by_name(receiver):
    spans = receiver.spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def assert_silent(receiver, *answers):
    """Nothing of the request, and no statement of the answers, stands in what was sent."""
    statements = [c["statement"] for answer in answers for c in answer["candidates"]]
    sent = b"".join(receiver.bodies)
    assert sent and all(answer["candidates"] for answer in answers)
    for text in [REQUEST["question"], *REQUEST["opinions"], *statements, "tea", "Tea"]:
        assert text.encode() not in sent, text


def test_a_request_and_its_stages_are_one_trace_in_the_callers(client, receiver):
    with client:
        answer = client.post("/v1/consensus", json=REQUEST, headers=CALLER).json()
    spans = by_name(receiver)
    assert set(spans) == {"POST /v1/consensus", "sample", "judge", "choose"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    request = spans.pop("POST /v1/consensus")
    assert request.parent_span_id.hex() == PARENT and request.kind == Span.SPAN_KIND_SERVER
    for span in spans.values():
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    assert attributes(request) == {
        "http.request.method": "POST", "http.route": "/v1/consensus", "http.response.status_code": 200,
        "consensus.request_id": "my-id", "consensus.caller": "anybody"}  # fmt: skip
    assert attributes(spans["sample"]) == {
        "consensus.policy": "default", "consensus.prompts": 3, "consensus.candidates": 4,
        "consensus.prompt_tokens": 30, "consensus.completion_tokens": 12}  # fmt: skip
    assert attributes(spans["judge"]) == {
        "consensus.preference_model": "default", "consensus.members": 3, "consensus.statements": 4}  # fmt: skip
    assert attributes(spans["choose"]) == {"consensus.members": 3, "consensus.candidates": 4}
    assert receiver.services() == {"consensus-machine"}
    assert_silent(receiver, answer)


def test_a_request_in_the_background_is_in_the_trace_too(client, receiver):
    with client:
        place = client.post("/v1/consensus", json=REQUEST, headers=CALLER | {"Prefer": "respond-async"})
        while (state := client.get(place.headers["Location"]).json())["status"] == "running":
            time.sleep(0.05)
    mine = [span for span in receiver.spans() if span.trace_id.hex() == TRACE]
    assert {span.name for span in mine} == {"POST /v1/consensus", "sample", "judge", "choose"}
    others = {span.name for span in receiver.spans() if span.trace_id.hex() != TRACE}
    assert others == {"GET /v1/consensus/{request_id}"}  # the path itself is nowhere: it may hold anything
    assert_silent(receiver, state["result"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(InputError("opinions[0]", REQUEST["opinions"][0], "is too long"), 422), (RuntimeError(REQUEST["question"]), 500)],
)
def test_a_failure_is_told_by_its_class_and_not_by_its_message(client, services, receiver, error, status):
    services.failures = [error]
    with client:
        assert client.post("/v1/consensus", json=REQUEST).status_code == status
    spans = by_name(receiver)
    assert set(spans) == {"POST /v1/consensus", "sample"}
    assert spans["sample"].status.code == Status.STATUS_CODE_ERROR and not spans["sample"].events
    assert attributes(spans["sample"])["error.type"] == type(error).__name__
    request = spans["POST /v1/consensus"]
    assert attributes(request)["http.response.status_code"] == status
    assert request.status.code == (Status.STATUS_CODE_ERROR if status == 500 else Status.STATUS_CODE_UNSET)
    assert_silent(receiver)


@pytest.mark.parametrize("sent", ["", "tea for all", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{PARENT}"])
def test_a_traceparent_that_is_none_begins_a_trace(client, receiver, sent):
    with client:
        assert client.post("/v1/consensus", json=REQUEST, headers={"traceparent": sent}).status_code == 200
        assert client.get("/healthz").status_code == 200  # probes leave no span
    spans = by_name(receiver)
    assert len({span.trace_id for span in spans.values()}) == 1 and len(spans) == 4
    request = spans["POST /v1/consensus"]
    assert request.trace_id.hex() != TRACE and request.parent_span_id == b""
    assert_silent(receiver)


async def test_requests_at_one_time_keep_their_stages(services, receiver, tmp_path):
    from httpx import ASGITransport, AsyncClient

    services.pause_s = 0.05
    app = make_app(services, ServeConfig(database=f"sqlite:///{tmp_path}/service.db"))
    traces = [f"{k:032x}" for k in range(1, 9)]
    async with AsyncClient(transport=ASGITransport(app), base_url="http://here") as client:
        headers = [{"traceparent": f"00-{trace}-{PARENT}-01"} for trace in traces]
        await asyncio.gather(*(client.post("/v1/consensus", json=REQUEST, headers=one) for one in headers))
    tracing._provider().force_flush()
    for trace in traces:
        spans = {span.name: span for span in receiver.spans() if span.trace_id.hex() == trace}
        request = spans.pop("POST /v1/consensus")
        assert {span.parent_span_id for span in spans.values()} == {request.span_id} and len(spans) == 3


def test_without_configuration_there_is_nothing(client, anew):
    assert isinstance(tracing.stage_span("sample", members=3), type(tracing.request_span({"path": "/v1/consensus"})))
    with client:
        assert client.post("/v1/consensus", json=REQUEST, headers=CALLER).status_code == 200
    assert tracing._provider() is None


def test_without_the_extra_there_is_a_line_in_the_log(client, receiver, anew, caplog):
    anew.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with caplog.at_level(logging.WARNING), client:
        for _ in range(2):
            assert client.post("/v1/consensus", json=REQUEST, headers=CALLER).status_code == 200
    assert [r.getMessage() for r in caplog.records if r.name == "serving.tracing"] == [
        "OTEL_EXPORTER_OTLP_ENDPOINT is set, but the extra `tracing` is not installed: there are no spans"
    ]
    assert receiver.bodies == []


def test_a_receiver_that_is_not_there_is_not_waited_for(client, anew):
    anew.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:1")
    anew.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    seconds = []
    with client:
        for _ in range(4):  # the machine may stand still for a moment, but not each time
            begun = time.monotonic()
            assert client.post("/v1/consensus", json=REQUEST).status_code == 200
            seconds.append(time.monotonic() - begun)
    assert min(seconds) < 1
