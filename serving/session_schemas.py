"""Bodies of deliberations that people take part in, and of their judgements."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from serving.checks import MAX_CANDIDATES, MAX_SEED, check_count, check_seed, check_welfare
from serving.config import DEFAULT_POLICY, DEFAULT_PREFERENCE_MODEL
from serving.fields import Schema, Sent, StoredText
from serving.generation import SHOWN
from serving.schemas import Problem

State = Literal["collecting", "generating", "rating", "closed"]
Score = Annotated[int, Field(ge=1, le=7)]
Id = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z]{3}_[0-9a-f]{16,36}$")]


class NewDeliberation(Sent):
    """A question to a group whose members will write and rate for themselves."""

    question: StoredText
    """The question the group discusses, best as a yes/no question."""

    policy: str = DEFAULT_POLICY
    """Name of the policy that writes the candidates; an experiment's arms have their own."""

    preference_model: str = DEFAULT_PREFERENCE_MODEL
    """Name of the preference model that scores them; an experiment's arms have their own."""

    n: Annotated[int, AfterValidator(check_count)] | None = Field(
        default=None, json_schema_extra={"minimum": 1, "maximum": MAX_CANDIDATES}
    )
    """Candidates to sample. Default: the service's ``num_candidates``."""

    welfare: Annotated[str | float, BeforeValidator(check_welfare)] | None = None
    """As in a consensus request. Default: the service's."""

    seed: Annotated[int, AfterValidator(check_seed)] | None = Field(
        default=None, json_schema_extra={"minimum": 0, "maximum": MAX_SEED}
    )
    """Default: the service's."""

    shown: int = Field(default=SHOWN, ge=1, le=16)
    """How many of the best candidates the members rate; in an experiment each arm shows its best one."""

    experiment: Id | None = None
    """Id of a running experiment that this deliberation is to be part of."""

    invite: str | None = None
    """An invite token of your own, ``inv_`` and 32 or more random characters: then a repeated request makes nothing
    twice."""


class Created(Schema):
    """A new deliberation."""

    id: str
    """Its id."""

    invite: str
    """Whoever has this token may join. It is not shown again."""


class DeliberationOut(Schema):
    """A deliberation, as its organiser sees it."""

    id: str
    """Its id."""

    question: str
    """What the group discusses."""

    state: State
    """``collecting`` opinions, ``generating`` candidates, ``rating`` them, ``closed``."""

    round: int
    """1, and 2 after a critique round."""

    experiment: str | None
    """The experiment it is part of."""

    members: int
    """How many have joined."""

    opinions: int
    """How many of them have written an opinion."""

    problem: Problem | None
    """Why the last generation came to nothing."""

    created: float
    """Seconds since 1970."""


class Deliberations(Schema):
    """A page of the organiser's deliberations, the newest first."""

    deliberations: list[DeliberationOut]
    """One entry each."""

    next: str | None
    """``after`` of the next page; null where this is the last."""


class Join(Sent):
    """A member who comes in."""

    invite: str = Field(max_length=200)
    """The invite token."""

    alias: Annotated[str, Field(min_length=1, max_length=80)]
    """What to call the member; it need not be their name."""

    consent: bool = False
    """Whether opinion and ratings may be exported to train models. Without it they serve this deliberation alone."""

    token: str | None = None
    """A member's token of the client's own, ``mem_`` and 32 or more random characters: then joining is safe to
    repeat."""


class Joined(Schema):
    """A new member."""

    member: str
    """The member's id."""

    token: str
    """Send it as ``Authorization: Bearer``. It is not shown again."""


class ChangeMe(Sent):
    """What a member changes of themselves."""

    consent: bool
    """Whether opinion and ratings, those given before too, may be exported to train models."""


class WriteOpinion(Sent):
    """A member's opinion."""

    text: StoredText
    """In the member's own words."""


class OpinionOut(Schema):
    """The opinion as it is kept."""

    version: int
    """From 1; also the ETag."""


class CandidateShown(Schema):
    """A statement to be rated. Who wrote it, and how, is not said before the end."""

    id: str
    """Its id."""

    statement: str
    """Its text, written by a language model."""

    winner: bool
    """Whether it is the one with the highest predicted welfare: told once the member has rated all of them, or the
    deliberation is closed; in an experiment never."""


class RatingOut(Schema):
    """A member's current rating of a candidate."""

    candidate: str
    """The candidate's id."""

    agreement: Score
    """1 (strongly disagree) to 7 (strongly agree)."""

    quality: Score
    """1 (very poor) to 7 (excellent)."""

    version: int
    """From 1; one more for each changed mind."""


class Me(Schema):
    """The deliberation, as one member sees it."""

    member: str
    """The member's id."""

    alias: str
    """What the member is called."""

    consent: bool
    """Whether opinion and ratings may be exported."""

    question: str
    """What the group discusses."""

    state: State
    """Where the deliberation stands."""

    round: int
    """1, and 2 after a critique round."""

    opinion: str | None
    """The member's own."""

    version: int
    """Of the opinion; 0 before there is one."""

    candidates: list[CandidateShown]
    """In an order of the member's own."""

    ratings: list[RatingOut]
    """The member's current ones."""


class Rate(Sent):
    """A member's rating of a candidate."""

    candidate: Id
    """The candidate's id."""

    agreement: Score
    """How far the member agrees: 1 (strongly disagree) to 7 (strongly agree)."""

    quality: Score
    """How well it is written: 1 (very poor) to 7 (excellent)."""


class Compare(Sent):
    """Which of two candidates a member prefers."""

    better: Id
    """The candidate preferred."""

    worse: Id
    """The other one."""

    tie: bool = False
    """True if neither is."""


class Criticise(Sent):
    """What a member has against the winner."""

    text: StoredText
    """In the member's own words; the policy reads it when it revises."""


class Kept(Schema):
    """It is kept."""

    candidate: str
    """The candidate it is about."""


class CandidateReport(Schema):
    """What the group thought of a candidate; null where nobody rated it."""

    id: str
    """Its id."""

    round: int
    """The round it was shown in."""

    statement: str
    """Its text."""

    winner: bool
    """Whether its round's best by predicted welfare (each arm's, in an experiment)."""

    arms: list[str]
    """The experiment's arms that wrote it; empty until the experiment ends."""

    predicted_welfare: float
    """1 to 7."""

    ratings: int
    """How many members rated it."""

    agreement: float | None
    """Mean, 1 to 7."""

    median_agreement: float | None
    """Median."""

    lowest_agreement: int | None
    """Of the worst-off member."""

    quality: float | None
    """Mean, 1 to 7."""

    agree: int
    """Members above 4."""

    neutral: int
    """Members at 4."""

    disagree: int
    """Members below 4."""

    unanimous: bool | None
    """Whether all members with an opinion rated it 5 or more; null if one of them has not rated it."""

    prediction_error: float | None
    """Mean absolute difference of predicted and given agreement."""


class DeliberationReport(Schema):
    """What came of a deliberation."""

    deliberation: DeliberationOut
    """Where it stands."""

    candidates: list[CandidateReport]
    """By mean agreement, the best first."""
