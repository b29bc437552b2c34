"""The HTTP interface: routes, checks, problem+json. No Ray and no torch in it.

``make_app(services)`` serves models wherever they are; ``serving.local.LocalServices`` has them in this process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deliberation.types import InputError
from serving.best_of_n import NoStatement, Plan, make_plan
from serving.config import ServeConfig
from serving.result import Consensus
from serving.schemas import ConsensusRequest, ConsensusResponse, FieldError, Health, Problem

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 2**20
"""Largest request body: 64 opinions of 2 000 characters fit even with every character escaped as \\uXXXX."""

URN = "urn:consensus-machine:problem:"
DESCRIPTION = "Statements a group would endorse, and who would not: sampled, scored for every member, chosen."


class Overloaded(RuntimeError):
    """The models' queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: int = 2):
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class Services(Protocol):
    """The models behind the interface."""

    policies: tuple[str, ...]

    async def consensus(self, plan: Plan) -> Consensus:
        """Answer a planned request (InputError, NoStatement, Overloaded)."""

    async def versions(self) -> dict[str, str]:
        """Prints of the weights: ``preference_model`` and ``policy:NAME``; fails if a model does not answer."""


def make_app(services: Services, config: ServeConfig | None = None, *, echo_request_id: bool = True) -> FastAPI:
    """The application.

    Args:
        services: the models.
        config: defaults for what requests leave out, and the time limit.
        echo_request_id: False behind Ray Serve's proxy, which echoes ``X-Request-Id`` itself.
    """
    defaults = config or ServeConfig()
    app = FastAPI(title="consensus-machine", version="1", description=DESCRIPTION)
    app.add_middleware(_Guard, echo_request_id=echo_request_id)
    _add_problem_handlers(app)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in (
            (413, "Body too large"),
            (422, "Bad input"),
            (500, "Fault of the service"),
            (503, "Overloaded; see Retry-After"),
            (504, "Out of time"),
        )
    }

    @app.post("/v1/consensus", responses=problems, summary="The statement a group would endorse")
    async def consensus(body: ConsensusRequest) -> ConsensusResponse:
        """Samples ``n`` statements from the policy, predicts every member's agreement with each, and returns the
        one with the highest welfare, with all candidates, likely dissenters and what other welfare functions
        would have chosen."""
        if body.policy not in services.policies:
            raise InputError("policy", body.policy, f"must be one of {', '.join(services.policies)}")
        plan = make_plan(
            body.question,
            body.opinions,
            policy=body.policy,
            n=defaults.num_candidates if body.n is None else body.n,
            welfare=defaults.welfare if body.welfare is None else body.welfare,
            uncertainty_penalty=defaults.uncertainty_penalty,
            seed=defaults.seed if body.seed is None else body.seed,
        )
        result = await asyncio.wait_for(services.consensus(plan), defaults.request_timeout_s)
        return ConsensusResponse.of(result)

    @app.get("/healthz", responses={503: problems[503], 504: problems[504]}, summary="Is the service ready?")
    async def healthz() -> Health:
        """Asks every model for its version; answers when all have."""
        versions = await asyncio.wait_for(services.versions(), defaults.request_timeout_s)
        return Health(status="ok", policies=list(services.policies), versions=versions)

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with errors under the media type they really have."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        response["content"] = {"application/problem+json": response["content"]["application/json"]}
        app.openapi_schema = schema
    return app.openapi_schema


# --- problems -------------------------------------------------------------------------------------------------


def problem(
    status: int,
    title: str,
    detail: str,
    *,
    kind: str = "about:blank",
    errors: list[FieldError] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An ``application/problem+json`` response."""
    body = Problem(type=kind, title=title, status=status, detail=detail, errors=errors or [])
    return JSONResponse(body.model_dump(), status, headers, media_type="application/problem+json")


def bad_input(errors: list[FieldError]) -> JSONResponse:
    """422 with one entry a field."""
    detail = "; ".join(f"{error.field}: {error.mend}" for error in errors)
    return problem(422, "Bad input", detail, kind=f"{URN}bad-input", errors=errors)


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


def field_errors(error: RequestValidationError) -> list[FieldError]:
    """FastAPI's findings in our words; checks of our own (InputError) keep theirs."""
    found = []
    for item in error.errors():
        name = _field_name(item["loc"])
        cause = item.get("ctx", {}).get("error")
        value, mend = item.get("input"), item["msg"].replace("Input should be", "must be")
        if isinstance(cause, InputError):
            value, mend = cause.value, cause.mend
        elif item["type"] == "missing":
            value, mend = None, "is missing; add it"
        elif item["type"] == "extra_forbidden":
            mend = f"is not a field of this request; the fields are {', '.join(ConsensusRequest.model_fields)}"
        elif item["type"] == "json_invalid":
            name, value, mend = "body", None, "is not valid JSON; send one JSON object"
        found.append(FieldError(field=name, value=shown(value), mend=mend))
    return found


def _field_name(location: tuple[int | str, ...]) -> str:
    """``("body", "opinions", 2)`` -> ``opinions[2]``."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return str(shown(name)) if name else "body"


def _add_problem_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return bad_input(field_errors(error))

    @app.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> JSONResponse:
        return bad_input([FieldError(field=error.field, value=shown(error.value), mend=error.mend)])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, str(error.detail), f"{where}: see /docs for what there is", headers=headers)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after_s)}
        return problem(
            503, "Overloaded", "the queue is full; try again later", kind=f"{URN}overloaded", headers=headers
        )

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> JSONResponse:
        return problem(
            504, "Out of time", "the models took too long; ask for fewer candidates", kind=f"{URN}out-of-time"
        )

    @app.exception_handler(NoStatement)
    async def silent(request: Request, error: NoStatement) -> JSONResponse:
        return problem(500, "No statement", str(error), kind=f"{URN}no-statement")

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again once this is sent, so the server logs it with its traceback.
        headers = {"X-Request-Id": request.state.request_id} if request.state.echo else None
        detail = f"a fault of the service, not of the request; its log has request {request.state.request_id}"
        log.error("request %s failed", request.state.request_id)
        return problem(500, "Internal error", detail, headers=headers)


# --- middleware -----------------------------------------------------------------------------------------------


class _TooLarge(HTTPException):
    def __init__(self) -> None:
        super().__init__(413, f"Body too large: at most {MAX_BODY_BYTES} bytes")


class _Guard:
    """Gives every request an id, echoes it as ``X-Request-Id``, and stops reading bodies that are too large."""

    def __init__(self, app: ASGIApp, echo_request_id: bool):
        self.app, self.echo = app, echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, echo=self.echo)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _TooLarge
            return message

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and self.echo:
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, limited, named)
