"""Errors as RFC 9457 has them (``application/problem+json``): stable types, and whether trying again can help.

Statuses are chosen for clients that repeat 408, 409, 429 and 5xx by themselves: what has one of these may succeed
later, what cannot has another.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deliberation.types import InputError
from serving.best_of_n import NoStatement
from serving.schemas import FieldError, Problem

log = logging.getLogger(__name__)

MAX_ERRORS = 20
"""Fields at fault that one problem names."""
URN = "urn:consensus-machine:problem:"
MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Kind:
    """A type of problem: its HTTP status, its title, and whether the same request may succeed later."""

    status: int
    title: str
    retryable: bool = False


KINDS = {
    "bad-input": Kind(422, "Bad input"),
    "bad-request": Kind(400, "Not a request this service can read"),
    "unauthorized": Kind(401, "No valid key"),
    "forbidden": Kind(403, "The key does not allow this"),
    "not-found": Kind(404, "Nothing there"),
    "method-not-allowed": Kind(405, "Wrong method"),
    "in-progress": Kind(409, "A request with this idempotency key is in progress", retryable=True),
    "precondition-failed": Kind(412, "It is not the version that was sent"),
    "too-large": Kind(413, "Body too large"),
    "wrong-host": Kind(421, "Not a name of this service"),
    "idempotency-mismatch": Kind(422, "Idempotency key of another request"),
    "wrong-state": Kind(422, "Not possible in this state"),
    "no-statement": Kind(422, "The policy wrote no statement"),
    "rate-limited": Kind(429, "Too many requests with this key", retryable=True),
    "overloaded": Kind(429, "Overloaded", retryable=True),
    "internal": Kind(500, "Fault of the service", retryable=True),
    "out-of-time": Kind(504, "Out of time", retryable=True),
}
"""Every type of problem there is, by the last part of its ``type``."""

_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "too-large"}


class ApiError(Exception):
    """A problem to answer with.

    Attributes:
        kind: one of ``KINDS``.
        detail: this very problem, in one line.
        headers: of the response.
    """

    def __init__(self, kind: str, detail: str, headers: dict[str, str] | None = None):
        super().__init__(kind, detail, headers)
        self.kind, self.detail, self.headers = kind, detail, headers


class Overloaded(ApiError):
    """The models' queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: int = 2):
        super().__init__("overloaded", "the queue is full; try again later", {"Retry-After": str(retry_after_s)})


def problem_of(error: Exception) -> tuple[Problem, dict[str, str]]:
    """The problem that answers an error, and headers; what is no fault of the request becomes ``internal``."""
    if isinstance(error, ApiError):
        return make_problem(error.kind, error.detail), error.headers or {}
    if isinstance(error, InputError):
        return bad_input([FieldError(field=error.field, value=shown(error.value), mend=error.mend)]), {}
    if isinstance(error, NoStatement):
        return make_problem("no-statement", f"{error}; another seed may help"), {}
    if isinstance(error, TimeoutError):
        return make_problem("out-of-time", "the models took too long; ask for fewer candidates"), {}
    return make_problem("internal", "a fault of the service, not of the request"), {}


def make_problem(kind: str, detail: str, errors: list[FieldError] | None = None) -> Problem:
    """A problem of one of ``KINDS``."""
    known = KINDS[kind]
    return Problem(
        type=URN + kind,
        title=known.title,
        status=known.status,
        detail=detail,
        retryable=known.retryable,
        errors=errors or [],
    )


def bad_input(errors: list[FieldError], left_out: int = 0) -> Problem:
    """One entry a field; ``left_out`` further errors, where it is above 0, are only counted."""
    lines = [f"{error.field}: {error.mend}" for error in errors]
    return make_problem("bad-input", "; ".join(lines + [f"and {left_out} more"] * (left_out > 0)), errors)


def respond(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """The problem as a response."""
    return JSONResponse(problem.model_dump(), problem.status, headers, media_type=MEDIA_TYPE)


def shown(value: object) -> Any:
    """``value`` as JSON can carry it back: short, with no NaN, no infinity and no lone surrogates."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 80 else f"{text[:77]}..."


def invalid(error: RequestValidationError) -> Problem:
    """FastAPI's findings as a problem, which names the first ``MAX_ERRORS``."""
    found = error.errors()
    return bad_input([_field_error(item) for item in found[:MAX_ERRORS]], len(found) - MAX_ERRORS)


def _field_error(item: dict[str, Any]) -> FieldError:
    """One of FastAPI's findings in our words; checks of our own (InputError) keep theirs."""
    name = _field_name(item["loc"])
    cause = item.get("ctx", {}).get("error")
    value, mend = item.get("input"), item["msg"].replace("Input should be", "must be")
    if isinstance(cause, InputError):
        value, mend = cause.value, cause.mend
    elif item["type"] == "missing":
        value, mend = None, "is missing; add it"
    elif item["type"] == "extra_forbidden":
        mend = "is not a field of this request; see /docs for the fields there are"
    elif item["type"] == "json_invalid":
        name, value, mend = "body", None, "is not valid JSON; send one JSON object"
    return FieldError(field=name, value=shown(value), mend=mend)


def _field_name(location: tuple[int | str, ...]) -> str:
    """``("body", "opinions", 2)`` -> ``opinions[2]``."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return str(shown(name)) if name else "body"


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem."""

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(invalid(error))

    async def known(request: Request, error: Exception) -> JSONResponse:
        return respond(*problem_of(error))

    for kind in (ApiError, InputError, NoStatement, TimeoutError):
        app.add_exception_handler(kind, known)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = _BY_STATUS.get(error.status_code, "bad-request")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return respond(make_problem(kind, shown_path(detail)), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again once this is sent, so the server logs it with its traceback.
        found, _ = problem_of(error)
        found.detail = f"{found.detail}; its log has request {request.state.request_id}"
        log.error("request %s failed", request.state.request_id)
        return respond(found, {"X-Request-Id": request.state.request_id} if request.state.echo else None)


def shown_path(text: str) -> str:
    """A line that quotes what the client sent: short, and with no lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")[:200]
