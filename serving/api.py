"""The HTTP interface: routes and what stands before them. No Ray and no torch in it.

``make_app(services)`` serves models wherever they are; ``serving.local.LocalServices`` has them in this process.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Collection
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, format_sse_event
from sqlalchemy import Engine, create_engine

from deliberation.types import InputError
from reward.welfare import welfare
from serving.answering import Report, Services, carry_out, check_models, silent
from serving.background import Background, LostLease, stream_until_gone, under_lease
from serving.best_of_n import Plan, make_plan
from serving.checks import MAX_WAITING_MEMBERS, welfare_used
from serving.config import DEFAULT_POLICY, DEFAULT_PREFERENCE_MODEL, ServeConfig
from serving.experiment_routes import add_experiments
from serving.guard import MAX_BODY_BYTES, Guard
from serving.influence import add_influence
from serving.keys import CONSENSUS, Caller, Doorkeeper
from serving.ledger import DONE, FAILED, Entry, Ledger
from serving.metrics import Metrics, ProcessMetrics
from serving.patience import Patient
from serving.problems import MEDIA_TYPE, ApiError, Overloaded, add_problem_handlers
from serving.result import Consensus
from serving.schemas import (
    ConsensusRequest,
    ConsensusResponse,
    Problem,
    RequestState,
    welfare_out,
)
from serving.scoring_schemas import AggregateRequest, AggregateResponse, Health, Models, ScoreRequest, ScoreResponse
from serving.session_routes import Hall, add_sessions
from serving.store import open_store
from serving.tracing import flushed

__all__ = ["MAX_BODY_BYTES", "Overloaded", "Services", "make_app"]

Responses = dict[int | str, dict[str, Any]]
"""Status -> what FastAPI documents of it."""

VERSION = "1"
DESCRIPTION = "Statements a group would endorse, and who would not: sampled, scored for every member, chosen."
PATH = "/v1/consensus"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_TEXTS = {
    400: "Not a request this service can read",
    401: "No valid key",
    403: "The key does not allow this",
    404: "Nothing there",
    409: "A request with this idempotency key is in progress",
    412: "It is not the version that was sent",
    413: "Body too large",
    422: "Bad input",
    429: "Overloaded, or too many requests with this key; see Retry-After",
    500: "Fault of the service",
    504: "Out of time",
}


def make_app(
    services: Services,
    config: ServeConfig | None = None,
    *,
    engine: Engine | None = None,
    metrics: Metrics | None = None,
    echo_request_id: bool = True,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application.

    Args:
        services: the models.
        config: defaults for what requests leave out, time limits, keys.
        engine: the database; None opens ``config.database``.
        metrics: where requests are counted; None counts in this process.
        echo_request_id: False behind Ray Serve's proxy, which echoes ``X-Request-Id`` itself.
        hosts: names that requests may call it by, see ``Guard``; None for any.
    """
    defaults = config or ServeConfig()
    store = open_store(defaults.database) if engine is None else engine
    counts = metrics or ProcessMetrics()
    app = FastAPI(title="consensus-machine", version=VERSION, description=DESCRIPTION, lifespan=flushed)
    app.add_middleware(Guard, metrics=counts, echo_request_id=echo_request_id, hosts=hosts)
    add_problem_handlers(app)
    door = Doorkeeper(store if defaults.require_keys else None)
    admit = _admission(door)
    ledger = Ledger(store, retention_s=3600 * defaults.retention_hours)
    _add_consensus(app, Desk(services, defaults, ledger, counts), admit)
    _add_pure(app, services, defaults, admit)
    add_sessions(app, Hall(services, defaults, store, ledger, counts), admit, door, _problems)
    add_experiments(app, store, services, defaults, admit, _problems)
    _add_health(app, services, defaults, counts)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Desk:
    """Takes consensus requests: answers them at once, from the record, or in the background."""

    def __init__(self, services: Services, defaults: ServeConfig, ledger: Ledger, metrics: Metrics):
        self.services, self.defaults, self.ledger, self.metrics = services, defaults, ledger, metrics
        self.background = Background(ledger, self._recorded, defaults.background_timeout_s)

    def plan(self, body: ConsensusRequest) -> Plan:
        """The request with the service's defaults.

        Raises:
            InputError: naming the field.
        """
        check_models(self.services, body.policy, body.preference_model)
        return make_plan(
            body.question,
            body.opinions,
            policy=body.policy,
            preference_model=body.preference_model,
            n=self.defaults.num_candidates if body.n is None else body.n,
            welfare=self.defaults.welfare if body.welfare is None else body.welfare,
            uncertainty_penalty=self.defaults.uncertainty_penalty,
            seed=self.defaults.seed if body.seed is None else body.seed,
            reshuffle=self.defaults.reshuffle,
            influence=body.influence,
        )

    async def answer(self, plan: Plan, services: Services, report: Report = silent) -> ConsensusResponse:
        """The response, computed now."""
        whole = await carry_out(services, plan, self.metrics, report)

        async def again(part: Plan) -> Consensus:
            return await carry_out(services, part, self.metrics)

        return ConsensusResponse.of(await add_influence(plan, whole, again))

    async def _recorded(self, body: str, report: Report) -> Any:
        # In a thread: a large group's texts take a moment, and the loop serves others
        plan = await asyncio.to_thread(lambda: self.plan(ConsensusRequest.model_validate_json(body)))
        return (await self.answer(plan, Patient(self.services), report)).model_dump(mode="json")

    async def record(self, body: ConsensusRequest, caller: Caller, key: str | None) -> tuple[Entry, bool]:
        """``Ledger.open``: the entry, and whether it is to be carried out here."""
        return await asyncio.to_thread(self.ledger.open, caller.id, key, recorded(body))

    async def once(self, body: ConsensusRequest, plan: Plan, caller: Caller, key: str) -> tuple[Any, bool]:
        """The JSON response under an idempotency key, and whether it is a repetition; ``plan`` is the body's.

        Raises:
            ApiError: ``in-progress``, ``idempotency-mismatch``, ``not-found`` if it was erased meanwhile; and whatever
                answering raises: the key is free again then.
        """
        entry, mine = await self.record(body, caller, key)
        if not mine:
            if entry.state == DONE and entry.answer is not None:
                return json.loads(entry.answer), True
            raise _in_progress(entry)
        try:
            work = asyncio.wait_for(self.answer(plan, self.services), self.defaults.request_timeout_s)
            response = (await under_lease(self.ledger, entry, work)).model_dump(mode="json")
        except LostLease:
            await asyncio.to_thread(self.ledger.standing, entry.id, caller.id)  # not-found, if it was erased
            raise _in_progress(entry) from None  # another process has taken it over
        except BaseException:  # a cancelled request too
            await asyncio.to_thread(self.ledger.release, entry)
            raise
        await asyncio.to_thread(self.ledger.finish, entry, DONE, response)
        return response, False


def recorded(body: ConsensusRequest) -> str:
    """The request as it is recorded and compared: as it was sent, so that new defaults make no other request of it."""
    return body.model_dump_json(exclude={"stream"}, exclude_unset=True)


def _in_progress(entry: Entry) -> ApiError:
    detail = "wait for the first request to end, or ask for its state"
    return ApiError("in-progress", detail, {"Retry-After": "1", "Location": f"{PATH}/{entry.id}"})


def _add_consensus(app: FastAPI, desk: Desk, admit: Callable[[str], Any]) -> None:
    owner = Depends(admit(CONSENSUS))
    streamed = "The answer; with `stream`, events: queued, candidate, scored; done or error"
    now: Responses = {200: {"content": {"text/event-stream": {}}, "description": streamed}}
    later: Responses = {202: {"model": RequestState, "description": "It is being answered; see Location"}}

    @app.post(PATH, responses=now | later | _problems(400, 401, 403, 409, 413, 422, 429, 500, 504))
    async def consensus(
        body: ConsensusRequest,
        caller: Caller = owner,
        idempotency_key: Annotated[str | None, Header(description="At most 255 visible ASCII characters")] = None,
        prefer: Annotated[str | None, Header(description="`respond-async` answers in the background")] = None,
    ) -> ConsensusResponse:
        """The statement a group would endorse.

        Samples ``n`` statements from the policy, predicts every member's agreement with each, and returns the one with
        the highest welfare, with all candidates, likely dissenters and what other welfare functions would have
        chosen. With an ``Idempotency-Key``, a repeated request gets the first answer."""
        if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
            raise InputError("Idempotency-Key", idempotency_key, "give 1 to 255 visible ASCII characters")
        plan = desk.plan(body)  # bad input is refused now, whoever answers
        asked = prefer is not None and "respond-async" in prefer.lower().replace(" ", "").split(",")
        if body.stream or asked or len(body.opinions) > MAX_WAITING_MEMBERS:
            return await _accept(desk, body, caller, idempotency_key)  # type: ignore[return-value]
        if idempotency_key is None:
            response = await asyncio.wait_for(desk.answer(plan, desk.services), desk.defaults.request_timeout_s)
            # Checked when it was made: as a response of FastAPI's it would be checked once more
            return Response(response.model_dump_json(), media_type="application/json")  # type: ignore[return-value]
        answer, repeated = await desk.once(body, plan, caller, idempotency_key)
        headers = {"Idempotent-Replayed": "true"} if repeated else None
        return JSONResponse(answer, headers=headers)  # type: ignore[return-value]

    @app.get(PATH + "/{request_id}", responses=_problems(401, 403, 404, 429, 500))
    async def state(request_id: str, caller: Caller = owner) -> RequestState:
        """How a request in the background stands."""
        return state_of(await desk.background.look(request_id, caller.id))

    @app.delete(PATH + "/{request_id}", status_code=204, responses=_problems(401, 403, 404, 429, 500))
    async def erase(request_id: str, caller: Caller = owner) -> None:
        """End a request, if it is running, and erase what was recorded of it."""
        await asyncio.to_thread(desk.ledger.erase, request_id, caller.id)

    followed = "queued, candidate, scored; done or error"
    events: Responses = {200: {"content": {"text/event-stream": {}}, "description": followed}}

    @app.get(PATH + "/{request_id}/events", responses=events | _problems(401, 403, 404, 422, 429, 500))
    async def follow(
        request_id: str,
        caller: Caller = owner,
        last_event_id: Annotated[int | None, Header(ge=0, le=2**31, description="Go on behind this event")] = None,
    ) -> Response:
        """The request's server-sent events, from the first one or behind ``Last-Event-ID``."""
        await desk.background.look(request_id, caller.id)  # a problem has its status before the stream begins
        first = 0 if last_event_id is None else last_event_id + 1
        return event_response(desk, request_id, caller, first)


async def _accept(desk: Desk, body: ConsensusRequest, caller: Caller, key: str | None) -> Response:
    entry, mine = await desk.record(body, caller, key)
    if mine:
        desk.background.start(entry)
    if body.stream:
        return event_response(desk, entry.id, caller, 0)
    headers = {"Location": f"{PATH}/{entry.id}", "Retry-After": "1", "Preference-Applied": "respond-async"}
    return JSONResponse(state_of(entry).model_dump(mode="json"), 202, headers)


def event_response(desk: Desk, entry_id: str, caller: Caller, first: int) -> Response:
    """The entry's events from number ``first`` on, as a stream."""
    found = stream_until_gone(desk.background.events(entry_id, caller.id, first))

    async def lines() -> AsyncIterator[bytes]:
        async for one in found:
            yield format_sse_event(data_str=one.raw_data, event=one.event, id=one.id)

    headers = {"Location": f"{PATH}/{entry_id}", "X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return EventSourceResponse(lines(), headers=headers)


def state_of(entry: Entry) -> RequestState:
    """What a client is told of an entry."""
    answer = None if entry.answer is None else json.loads(entry.answer)
    result = ConsensusResponse.model_validate(answer) if entry.state == DONE else None
    problem = Problem.model_validate(answer) if entry.state == FAILED else None
    return RequestState(
        id=entry.id,
        status=entry.state,  # type: ignore[arg-type]
        created=entry.created,
        result=result,
        problem=problem,
    )


def _add_pure(app: FastAPI, services: Services, defaults: ServeConfig, admit: Callable[[str], Any]) -> None:
    owner = Depends(admit(CONSENSUS))

    @app.post("/v1/score", responses=_problems(400, 401, 403, 413, 422, 429, 500, 504))
    async def score(body: ScoreRequest, caller: Caller = owner) -> ScoreResponse:
        """What every member is predicted to think of every statement."""
        check_models(services, DEFAULT_POLICY, body.preference_model)
        work = services.judge(body.preference_model).judge(body.question, body.opinions, body.statements)
        found = await asyncio.wait_for(work, defaults.request_timeout_s)
        return ScoreResponse(
            utilities=np.asarray(found.utilities).tolist(),
            agree=np.asarray(found.probabilities)[..., 4:].sum(axis=-1).clip(0, 1).tolist(),
            scores=np.asarray(found.raw).tolist(),
            sd=None if found.sd is None else np.asarray(found.sd).tolist(),
            preference_model_weights=found.version,
        )

    @app.post("/v1/aggregate", responses=_problems(400, 401, 403, 413, 422, 429, 500))
    async def aggregate(body: AggregateRequest, caller: Caller = owner) -> AggregateResponse:
        """One number a statement from utilities that you bring, and the order that follows. No model is asked."""
        used = welfare_used(body.welfare)
        # In a thread: a million utilities take a moment, and the loop serves others
        values = np.asarray(await asyncio.to_thread(welfare, body.utilities, used.function, body.weights))
        ranking = sorted(range(len(values)), key=lambda i: (-values[i], i))
        return AggregateResponse(welfare=values.tolist(), ranking=ranking, welfare_used=welfare_out(used))

    @app.get("/v1/models", responses=_problems(401, 403, 429, 500, 504))
    async def models(caller: Caller = owner) -> Models:
        """The models a request may name, and which weights answer."""
        versions = await asyncio.wait_for(services.versions(), defaults.request_timeout_s)
        return Models(
            default_policy=DEFAULT_POLICY,
            policies={name: versions[f"policy:{name}"] for name in services.policies},
            default_preference_model=DEFAULT_PREFERENCE_MODEL,
            preference_models={name: versions[f"preference_model:{name}"] for name in services.preference_models},
        )


def _add_health(app: FastAPI, services: Services, defaults: ServeConfig, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """Is the process up?"""
        return Health(status="ok")

    @app.get("/readyz", responses=_problems(429, 500, 504))
    async def readyz() -> Health:
        """Do all models answer?"""
        await asyncio.wait_for(services.versions(), defaults.request_timeout_s)
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> str:
        """Counts, in Prometheus' text format."""
        return await metrics.text()


def _admission(door: Doorkeeper) -> Callable[[str], Any]:
    bearer = HTTPBearer(auto_error=False, description="A key of `consensus keys create`, where keys are required")
    credentials = Depends(bearer)

    def admit(scope: str) -> Any:
        async def caller(request: Request, sent: HTTPAuthorizationCredentials | None = credentials) -> Caller:
            secret = None if sent is None else sent.credentials
            # Only a door with keys asks the database
            found = await asyncio.to_thread(door.admit, secret, scope) if door.has_keys else door.admit(secret, scope)
            request.state.caller, request.state.limits = found.id, door.limits(found)
            return found

        return caller

    return admit


def _problems(*statuses: int) -> Responses:
    return {status: {"model": Problem, "description": _TEXTS[status]} for status in statuses}


def document() -> dict[str, Any]:
    """The OpenAPI document of the interface, whatever the models and settings."""

    class NoServices:
        policies = preference_models = ()

    return make_app(NoServices(), engine=create_engine("sqlite://")).openapi()  # type: ignore[arg-type]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with errors under the media type they really have."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        content = {"schema": {"$ref": "#/components/schemas/Problem"}}
                        response["content"] = {MEDIA_TYPE: content}
        app.openapi_schema = schema
    return app.openapi_schema
