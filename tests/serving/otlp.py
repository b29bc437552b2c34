"""A receiver of OpenTelemetry's traces: OTLP over HTTP, as a collector takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Receiver:
    """What came in.

    Attributes:
        bodies: of ``POST /v1/traces``, as they were.
        url: for ``OTEL_EXPORTER_OTLP_ENDPOINT``.
    """

    def __init__(self, port: int):
        self.bodies: list[bytes] = []
        self.url = f"http://127.0.0.1:{port}"

    def spans(self) -> list:
        """All spans, as protobuf has them."""
        found = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [s for one in found for r in one.resource_spans for scope in r.scope_spans for s in scope.spans]

    def services(self) -> set[str]:
        """Names of the services that sent something."""
        resources = [
            r.resource for body in self.bodies for r in ExportTraceServiceRequest.FromString(body).resource_spans
        ]
        return {attributes(resource)["service.name"] for resource in resources}


def attributes(span) -> dict:
    """Attributes of a span or resource as Python values."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver that listens on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            good = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            if good:
                receiver.bodies.append(body)
            self.send_response(200 if good else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
