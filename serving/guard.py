"""What every request passes through: an id, a look at its Host and its size, a line in the log, a count."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.problems import make_problem, respond, shown_path
from serving.schemas import Problem
from serving.tracing import end_request, request_span

access = logging.getLogger("serving.access")

MAX_BODY_BYTES = 4 * 2**20
"""Largest body that brings a group: 300 opinions of 2 000 characters fit even with every character escaped as
\\uXXXX."""
GROUP_PATHS = frozenset({"/v1/consensus", "/v1/score", "/v1/aggregate"})
MAX_SMALL_BODY_BYTES = 64 * 2**10
"""Largest body of any other route: one text, or an experiment. A few of them need no key."""
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""What this machine calls itself. A browser that a page's own name has led here (DNS rebinding) sends that name."""
CLIENT_GONE = 499
"""Status, in log and counts alone, of a request whose client went away before there was an answer."""
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:]+)(:[0-9]*)?")


def write_access_log() -> None:
    """Write a line a request to standard error: for a process where nobody else sets logging up, as Ray's are."""
    if not access.handlers:
        access.addHandler(logging.StreamHandler())
    access.setLevel(logging.INFO)
    access.propagate = False  # or a root with handlers would write it twice


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        metrics: where requests are counted.
        echo_request_id: whether responses carry ``X-Request-Id``.
        hosts: names, in small letters, that requests may call the service by (``LOCAL_HOSTS``), at any port; None for
            any name.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, echo_request_id: bool, hosts: Collection[str] | None = None):
        self.app, self.metrics, self.echo, self.hosts = app, metrics, echo_request_id, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, echo=self.echo)
        started, status = time.perf_counter(), 0

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
                await self._let_in(scope, receive, named)
            except asyncio.CancelledError:
                status = status or CLIENT_GONE
                raise
            finally:
                self._note(scope, request_id, status or 500, time.perf_counter() - started, span)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the request answered, or refuse it."""
        problem = self._wrong_host(scope)
        if problem is None:
            limit = body_limit(scope)
            body = await _read(receive, limit)
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
                return
            problem = make_problem("too-large", f"at most {limit} bytes are read here")
        await respond(problem)(scope, receive, send)

    def _wrong_host(self, scope: Scope) -> Problem | None:
        """What is wrong with the name that the request calls the service by; None if nothing is."""
        host = Headers(scope=scope).get("host", "")
        found = _HOST.fullmatch(host.lower())
        if self.hosts is None or (found is not None and found[1] in self.hosts):
            return None
        mend = f"call it {' or '.join(sorted(self.hosts))}, or set require_keys: true"
        return make_problem("wrong-host", f"this service does not go by {shown_path(host) or 'no name'}; {mend}")

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, span: Any) -> None:
        """Count, and log and trace ids alone: never what members said."""
        route = getattr(scope.get("route"), "path", "none")  # a path as sent may hold anything
        method = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "PATCH", "DELETE") else "other"
        self.metrics.request(route, method, status, seconds)
        line = {"event": "request", "request_id": request_id, "method": method, "route": route, "status": status}
        caller = scope["state"].get("caller")
        access.info(json.dumps(line | {"ms": round(1000 * seconds, 1), "caller": caller}))
        end_request(span, method, route, status, request_id=request_id, caller=caller)


def body_limit(scope: Scope) -> int:
    """How many bytes the body of a request to this path may have."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return MAX_BODY_BYTES if path in GROUP_PATHS else MAX_SMALL_BODY_BYTES


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None as soon as it has more than ``limit`` bytes."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limit:
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
