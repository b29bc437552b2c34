"""Bodies of the smaller routes: scores, aggregates, models, health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field

from serving.checks import MAX_CANDIDATES, MAX_WAITING_MEMBERS, check_welfare
from serving.config import DEFAULT_PREFERENCE_MODEL
from serving.fields import Few, Schema, Sent, Text, rectangle, small_group, statements
from serving.schemas import WelfareOut

Utilities = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], FailFast(), Few]
"""A member's row: at most as many as a group has members, and its first fault is the one that is named."""


class ScoreRequest(Sent):
    """Statements to be judged for every member of a group. Unknown fields are refused."""

    question: Text
    """The question the group discusses."""

    opinions: Annotated[
        list[Text],
        Few,
        AfterValidator(small_group),
        Field(json_schema_extra={"minItems": 1, "maxItems": MAX_WAITING_MEMBERS}),
    ]
    """One text a member."""

    statements: Annotated[
        list[Text],
        Few,
        AfterValidator(statements),
        Field(json_schema_extra={"minItems": 1, "maxItems": MAX_CANDIDATES}),
    ]
    """What they are asked to agree with."""

    preference_model: str = DEFAULT_PREFERENCE_MODEL
    """Name of the preference model that scores; ``GET /v1/models`` lists the names."""


class ScoreResponse(Schema):
    """What every member is predicted to think of every statement: rows are members, columns statements."""

    utilities: list[list[float]]
    """Expected ratings, 1 to 7."""

    agree: list[list[float]]
    """Probabilities of a rating above 4."""

    scores: list[list[float]]
    """Raw preference-model scores."""

    sd: list[list[float]] | None
    """How sure the model is: standard deviations of the utilities; null without an ensemble."""

    preference_model_weights: str
    """Short SHA-256 of the preference model's weights."""


class AggregateRequest(Sent):
    """Utilities to be made one number a statement. Unknown fields are refused."""

    utilities: Annotated[list[Utilities], Few, AfterValidator(rectangle)]
    """One row a member, one column a statement; positive, on any one scale."""

    welfare: Annotated[str | float, BeforeValidator(check_welfare)] = "nash"
    """As in a consensus request."""

    weights: Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Few] | None = None
    """One number >= 0 a member; default: equal."""


class AggregateResponse(Schema):
    """Statements by welfare."""

    welfare: list[float]
    """Of each statement, on the scale of the utilities."""

    ranking: list[int]
    """Indices of the statements, the best first; equals in their order."""

    welfare_used: WelfareOut
    """Name and alpha of the welfare function."""


class Models(Schema):
    """The models that answer."""

    default_policy: str
    """Which policy answers a request that names none."""

    policies: dict[str, str]
    """Name -> short SHA-256 of its weights."""

    default_preference_model: str
    """Which preference model scores for a request that names none."""

    preference_models: dict[str, str]
    """Name -> short SHA-256 of its weights."""


class Health(Schema):
    """The process is up (``/healthz``), or its models answer too (``/readyz``)."""

    status: Literal["ok"]
    """Always ``ok``; what is not ok is an error."""
