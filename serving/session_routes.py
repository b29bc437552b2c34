"""Routes of deliberations that people take part in: the organiser's with a key, the members' with their token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine

from deliberation.prompts import one_line
from deliberation.types import InputError
from serving.answering import Services, check_models
from serving.background import Background
from serving.ballots import Ballots
from serving.config import ServeConfig
from serving.export import export_rows
from serving.generation import Generation
from serving.keys import ADMIN, CONSENSUS, Caller, Doorkeeper
from serving.ledger import Ledger
from serving.metrics import Metrics
from serving.problems import ApiError
from serving.session_report import outline, report, table
from serving.session_schemas import (
    CandidateShown,
    ChangeMe,
    Compare,
    Created,
    Criticise,
    DeliberationOut,
    DeliberationReport,
    Deliberations,
    Join,
    Joined,
    Kept,
    Me,
    NewDeliberation,
    OpinionOut,
    Rate,
    RatingOut,
    WriteOpinion,
)
from serving.sessions import (
    CLOSED,
    GENERATING,
    INVITE_PREFIX,
    MEMBER_PREFIX,
    Member,
    Sessions,
    check_token,
    new_token,
)

PATH = "/v1/deliberations"
PAGE, MAX_PAGE = 100, 1000
"""Deliberations that a page has by default, and at most: databases limit the parameters of a query."""
MEMBER_RATE = 240
"""Requests a minute of one member."""


class Hall:
    """Deliberations with the models that write for them."""

    def __init__(self, services: Services, defaults: ServeConfig, engine: Engine, ledger: Ledger, metrics: Metrics):
        self.services, self.defaults, self.engine, self.ledger = services, defaults, engine, ledger
        self.sessions, self.ballots = Sessions(engine), Ballots(engine)
        work = Generation(services, defaults, self.sessions, metrics)
        self.background = Background(self.ledger, work.run, None, work.failed)

    def create(self, body: NewDeliberation, owner: str) -> Created:
        """Begin a deliberation.

        Raises:
            InputError: naming the field. ApiError: as ``Sessions.create``.
        """
        check_models(self.services, body.policy, body.preference_model)
        given = body.invite is not None
        invite = check_token("invite", str(body.invite), INVITE_PREFIX) if given else new_token(INVITE_PREFIX)
        settings = {
            "policy": body.policy,
            "preference_model": body.preference_model,
            "n": self.defaults.num_candidates if body.n is None else body.n,
            "welfare": self.defaults.welfare if body.welfare is None else body.welfare,
            "seed": self.defaults.seed if body.seed is None else body.seed,
            "shown": body.shown,
        }
        return Created(id=self.sessions.create(owner, body.question, settings, invite, body.experiment), invite=invite)

    def one(self, deliberation_id: str, owner: str) -> DeliberationOut:
        """The deliberation as its organiser sees it."""
        return outline(self.engine, [self.sessions.get(deliberation_id, owner)])[0]

    async def generate(self, deliberation_id: str, owner: str, revise: bool) -> DeliberationOut:
        """Freeze the opinions and have candidates written, in the background."""
        await asyncio.to_thread(self.sessions.freeze, deliberation_id, owner, revise)
        await self.look(deliberation_id)
        return await asyncio.to_thread(self.one, deliberation_id, owner)

    async def look(self, deliberation_id: str) -> None:
        """See that somebody writes the candidates: the request is there once, and outlives the process that took it."""
        row = await asyncio.to_thread(self.sessions.get, deliberation_id)
        if row.state == GENERATING:
            body = json.dumps({"deliberation": deliberation_id, "generation": row.generation})
            entry, mine = await asyncio.to_thread(self.ledger.open, deliberation_id, row.generation, body)
            if mine:
                self.background.start(entry)

    def me(self, member: Member) -> Me:
        """The deliberation as a member sees it."""
        row, version, text = self.sessions.about(member)
        deliberation = self.sessions.get(member.deliberation)
        shown, ratings = self.ballots.shown(member), self.ballots.mine(member)
        # Whoever knows the machine's choice would rate it as such
        done = deliberation.state == CLOSED or {c.id for c in shown} <= {rating.candidate for rating in ratings}
        told = done and deliberation.experiment is None
        return Me(
            member=member.id,
            alias=row.alias,
            consent=row.consent,
            question=deliberation.question,
            state=deliberation.state,
            round=deliberation.round,
            opinion=text,
            version=version,
            candidates=[CandidateShown(id=c.id, statement=c.statement, winner=told and c.winner) for c in shown],
            ratings=[RatingOut(**vars(rating)) for rating in ratings],
        )


def add_sessions(
    app: FastAPI, hall: Hall, admit: Callable[[str], Any], door: Doorkeeper, problems: Callable[..., Any]
) -> None:
    """Add the routes.

    Args:
        admit: scope -> dependency that gives the ``Caller``.
        door: counts members' requests.
        problems: statuses -> what is documented of them.
    """
    _add_organiser(app, hall, admit, problems)
    _add_member(app, hall, _member(hall.sessions, door), problems)


def _member(sessions: Sessions, door: Doorkeeper) -> Any:
    bearer = HTTPBearer(auto_error=False, scheme_name="MemberToken", description="A member's token, of joining")
    credentials = Depends(bearer)

    async def member(request: Request, sent: HTTPAuthorizationCredentials | None = credentials) -> Member:
        found = None if sent is None else await asyncio.to_thread(sessions.member, sent.credentials)
        if found is None:
            detail = "send Authorization: Bearer and the member's token; POST .../members gives one"
            raise ApiError("unauthorized", detail, {"WWW-Authenticate": "Bearer"})
        request.state.caller = found.id
        caller = Caller(found.id, frozenset(), MEMBER_RATE)
        door.count(caller)
        request.state.limits = door.limits(caller)
        return found

    return Depends(member)


def _add_organiser(app: FastAPI, hall: Hall, admit: Callable[[str], Any], problems: Callable[..., Any]) -> None:
    owner, admin = Depends(admit(CONSENSUS)), Depends(admit(ADMIN))
    reads, writes = problems(401, 403, 404, 429, 500), problems(400, 401, 403, 404, 413, 422, 429, 500)

    @app.post(PATH, status_code=201, responses=writes)
    async def create(body: NewDeliberation, caller: Caller = owner) -> Created:
        """Begin a deliberation whose members write and rate for themselves."""
        return await asyncio.to_thread(hall.create, body, caller.id)

    @app.get(PATH, responses=problems(401, 403, 422, 429, 500))
    async def listed(
        caller: Caller = owner,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Entries of a page, at most")] = PAGE,
        after: Annotated[str | None, Query(description="`next` of the page before")] = None,
    ) -> Deliberations:
        """The organiser's deliberations, the newest first, a page at a time."""
        rows, following = await asyncio.to_thread(hall.sessions.owned, caller.id, limit, after)
        entries = await asyncio.to_thread(outline, hall.engine, rows)
        return Deliberations(deliberations=entries, next=following)

    @app.get(PATH + "/{deliberation_id}", responses=reads)
    async def one(deliberation_id: str, caller: Caller = owner) -> DeliberationOut:
        """How a deliberation stands."""
        found = await asyncio.to_thread(hall.one, deliberation_id, caller.id)
        await hall.look(deliberation_id)
        return found

    @app.delete(PATH + "/{deliberation_id}", status_code=204, responses=reads)
    async def erase(deliberation_id: str, caller: Caller = owner) -> None:
        """Remove a deliberation with its members, opinions, candidates and ratings."""
        await asyncio.to_thread(hall.sessions.erase, deliberation_id, caller.id)

    @app.post(PATH + "/{deliberation_id}/generate", status_code=202, responses=reads | problems(422))
    async def generate(deliberation_id: str, caller: Caller = owner) -> DeliberationOut:
        """Freeze the opinions, and have candidates written; then members rate them."""
        return await hall.generate(deliberation_id, caller.id, revise=False)

    @app.post(PATH + "/{deliberation_id}/revise", status_code=202, responses=reads | problems(422))
    async def revise(deliberation_id: str, caller: Caller = owner) -> DeliberationOut:
        """Have the winner revised by the members' critiques: a second round of candidates to rate."""
        return await hall.generate(deliberation_id, caller.id, revise=True)

    @app.post(PATH + "/{deliberation_id}/close", responses=reads | problems(422))
    async def close(deliberation_id: str, caller: Caller = owner) -> DeliberationOut:
        """End the rating, for good."""
        await asyncio.to_thread(hall.sessions.close, deliberation_id, caller.id)
        return await asyncio.to_thread(hall.one, deliberation_id, caller.id)

    @app.get(PATH + "/{deliberation_id}/report", responses=reads)
    async def reported(deliberation_id: str, caller: Caller = owner) -> DeliberationReport:
        """What the group thinks of every candidate."""
        row = await asyncio.to_thread(hall.sessions.get, deliberation_id, caller.id)
        return await asyncio.to_thread(report, hall.engine, row)

    @app.get(PATH + "/{deliberation_id}/report.csv", response_class=PlainTextResponse, responses=reads)
    async def as_csv(deliberation_id: str, caller: Caller = owner) -> Response:
        """The same as CSV, a line a member and candidate."""
        row = await asyncio.to_thread(hall.sessions.get, deliberation_id, caller.id)
        return Response(await asyncio.to_thread(table, hall.engine, row), media_type="text/csv; charset=utf-8")

    lines = {200: {"content": {"application/x-ndjson": {}}, "description": "One JSON object a line"}}

    @app.get("/v1/ratings/export", responses=lines | problems(401, 403, 422, 429, 500))
    async def export(
        caller: Caller = admin,
        after: Annotated[int, Query(ge=0, le=2**53, description="`number` of the last rating you have")] = 0,
    ) -> Response:
        """Ratings of members who consented, for training: JSON lines, from behind `after`. Those of running experiments
        are left out."""

        def text() -> Iterator[str]:
            for row in export_rows(hall.engine, after):
                yield json.dumps(row) + "\n"

        return StreamingResponse(text(), media_type="application/x-ndjson")


def _add_member(app: FastAPI, hall: Hall, member: Any, problems: Callable[..., Any]) -> None:
    reads, writes = problems(401, 429, 500), problems(400, 401, 413, 422, 429, 500)
    me_path = PATH + "/{deliberation_id}/me"

    def mine(deliberation_id: str, who: Member) -> Member:
        if who.deliberation != deliberation_id:
            raise ApiError("not-found", "the token is of another deliberation")
        return who

    @app.post(PATH + "/{deliberation_id}/members", status_code=201, responses=writes)
    async def join(deliberation_id: str, body: Join) -> Joined:
        """Come in with the invite token."""
        given = body.token is not None
        token = check_token("token", str(body.token), MEMBER_PREFIX) if given else new_token(MEMBER_PREFIX)
        alias = one_line(body.alias)
        if not alias:
            raise InputError("alias", body.alias, "has no readable characters; write at least one letter")
        found = await asyncio.to_thread(hall.sessions.join, deliberation_id, body.invite, alias, body.consent, token)
        return Joined(member=found.id, token=token)

    @app.get(me_path, responses=reads | problems(404))
    async def me(deliberation_id: str, who: Member = member) -> Me:
        """The deliberation as this member sees it: own opinion, candidates, own ratings."""
        await hall.look(mine(deliberation_id, who).deliberation)
        return await asyncio.to_thread(hall.me, who)

    @app.patch(me_path, responses=writes | problems(404))
    async def change_me(deliberation_id: str, body: ChangeMe, who: Member = member) -> Me:
        """Give consent to training, or take it back: for what this member said before, too."""
        await asyncio.to_thread(hall.sessions.set_consent, mine(deliberation_id, who), body.consent)
        return await asyncio.to_thread(hall.me, who)

    @app.delete(me_path, status_code=204, responses=reads | problems(404))
    async def leave(deliberation_id: str, who: Member = member) -> None:
        """Erase this member: opinion, ratings, comparisons, critiques."""
        await asyncio.to_thread(hall.sessions.erase_member, mine(deliberation_id, who))

    @app.put(PATH + "/{deliberation_id}/opinion", responses=writes | problems(404, 412))
    async def write(
        deliberation_id: str,
        body: WriteOpinion,
        response: Response,
        who: Member = member,
        if_match: Annotated[str | None, Header(description="ETag of the opinion that this one replaces")] = None,
    ) -> OpinionOut:
        """Write an opinion, or change it, until opinions are frozen."""
        expected = None if if_match is None else _version(if_match)
        version = await asyncio.to_thread(hall.sessions.write_opinion, mine(deliberation_id, who), body.text, expected)
        response.headers["ETag"] = f'"{version}"'
        return OpinionOut(version=version)

    @app.post("/v1/ratings", responses=writes | problems(404))
    async def rate(
        body: Rate,
        who: Member = member,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> RatingOut:
        """Rate a candidate. Once this answers, the rating is on disk; rating again changes it."""
        kept = await asyncio.to_thread(
            hall.ballots.rate, who, body.candidate, body.agreement, body.quality, idempotency_key
        )
        return RatingOut(**vars(kept))

    @app.post("/v1/comparisons", responses=writes | problems(404))
    async def compare(body: Compare, who: Member = member) -> Kept:
        """Say which of two candidates is better."""
        if body.better == body.worse:
            raise InputError("worse", body.worse, "is the same candidate; name another")
        await asyncio.to_thread(hall.ballots.compare, who, body.better, body.worse, body.tie)
        return Kept(candidate=body.better)

    @app.post("/v1/critiques", responses=writes)
    async def criticise(body: Criticise, who: Member = member) -> Kept:
        """Say what is wrong with the winner, for a second round."""
        return Kept(candidate=await asyncio.to_thread(hall.ballots.criticise, who, body.text))


def _version(tag: str) -> int:
    number = tag.strip().removeprefix("W/").strip('"')
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise InputError("If-Match", tag, 'send the ETag of the opinion, e.g. "1"')
    return int(number)
