"""OpenTelemetry spans of requests and their stages: ids, names of models and counts, never what members said.

Spans go where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says, with the extra ``tracing``; without either nothing is done. Every
process has an exporter of its own, made with its first request.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Environment variables, one of which turns tracing on; the SDK reads the rest of OpenTelemetry's by itself."""
SERVICE = "consensus-machine"
FLUSH_S = 5.0
TRACED = "/v1/"
"""Paths below this have spans; probes and ``/metrics`` would only hide them."""

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _provider() -> Any:
    """This process's spans on their way; None without configuration or without the extra."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("%s is set, but the extra `tracing` is not installed: there are no spans", ENDPOINTS[0])
        return None
    said = OTELResourceDetector().detect().attributes  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    # Not the global provider: Ray has its own use for that
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE, **said}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def request_span(scope: Scope) -> AbstractContextManager[Any]:
    """The span of an HTTP request, in the trace of the caller's ``traceparent``; ``end_request`` completes it."""
    provider = _provider()
    if provider is None or not scope["path"].startswith(TRACED):
        return nullcontext()
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    caller = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)), Context())
    return _span(provider, "request", context=caller, kind=SpanKind.SERVER)


def end_request(span: Any, method: str, route: str, status: int, **ids: str | None) -> None:
    """Name the request's span; ids are of the service, e.g. the request's."""
    if span is None:
        return
    span.update_name(f"{method} {route}")
    span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
    note(span, **ids)
    if status >= 500:
        _fail(span)


def stage_span(name: str, **facts: str | int) -> AbstractContextManager[Any]:
    """The span of a stage within the request that goes on in this task."""
    provider = _provider()
    return nullcontext() if provider is None else _span(provider, name, attributes=_named(facts))


def note(span: Any, **facts: str | int | None) -> None:
    """Add ids and counts to a span, where there is one."""
    if span is not None:
        span.set_attributes(_named(facts))


@asynccontextmanager
async def flushed(app: Any) -> AsyncIterator[None]:
    """An ASGI lifespan: what is still here is sent before the process ends."""
    yield
    if (provider := _provider()) is not None:
        try:
            await asyncio.wait_for(asyncio.to_thread(provider.force_flush), FLUSH_S)
        except TimeoutError:
            log.warning("the last spans were not taken within %s s", FLUSH_S)


@contextmanager
def _span(provider: Any, name: str, **options: Any) -> Iterator[Any]:
    # An error's message may quote a member, so the SDK is not to record it; the class says enough
    quiet = {"record_exception": False, "set_status_on_exception": False}
    with provider.get_tracer(__name__).start_as_current_span(name, **quiet, **options) as span:
        try:
            yield span
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            _fail(span)
            raise


def _fail(span: Any) -> None:
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR)


def _named(facts: dict[str, Any]) -> dict[str, str | int]:
    return {f"consensus.{name}": value for name, value in facts.items() if value is not None}
