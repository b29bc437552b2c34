"""What every request passes through: an id, a limit on its size, a line in the log, a count."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.problems import make_problem, respond
from serving.tracing import end_request, request_span

access = logging.getLogger("serving.access")

MAX_BODY_BYTES = 4 * 2**20
"""Largest request body: 300 opinions of 2 000 characters fit even with every character escaped as \\uXXXX."""
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        metrics: where requests are counted.
        echo_request_id: whether responses carry ``X-Request-Id``.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, echo_request_id: bool):
        self.app, self.metrics, self.echo = app, metrics, echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, echo=self.echo)
        started, status = time.perf_counter(), 500

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                headers.update(scope["state"].get("limits", {}))
                if self.echo:
                    headers["X-Request-Id"] = request_id
            await send(message)

        with request_span(scope) as span:
            try:
                body = await _read(receive)
                if body is None:
                    problem = make_problem("too-large", f"at most {MAX_BODY_BYTES} bytes are read")
                    await respond(problem)(scope, receive, named)
                else:
                    await self.app(scope, _replay(body, receive), named)
            finally:
                self._note(scope, request_id, status, time.perf_counter() - started, span)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, span: Any) -> None:
        """Count, and log and trace ids alone: never what members said."""
        route = getattr(scope.get("route"), "path", "none")  # a path as sent may hold anything
        method = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "PATCH", "DELETE") else "other"
        self.metrics.request(route, method, status, seconds)
        line = {"event": "request", "request_id": request_id, "method": method, "route": route, "status": status}
        caller = scope["state"].get("caller")
        access.info(json.dumps(line | {"ms": round(1000 * seconds, 1), "caller": caller}))
        end_request(span, method, route, status, request_id=request_id, caller=caller)


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None as soon as it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            return None
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes (a disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
