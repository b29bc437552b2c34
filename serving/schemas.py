"""Bodies of consensus requests: request, response (contract 6), state in the background, problem (RFC 9457)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue

from deliberation.types import MAX_MEMBERS
from serving.checks import (
    MAX_CANDIDATES,
    MAX_SEED,
    check_count,
    check_seed,
    check_welfare,
)
from serving.config import DEFAULT_POLICY, DEFAULT_PREFERENCE_MODEL
from serving.fields import Agreement, Few, Schema, Sent, Text, group
from serving.result import Consensus, WelfareUsed

EXAMPLES: list[JsonValue] = [
    {
        "question": "Should school meals be free for all children?",
        "opinions": [
            "Yes. No child learns well on an empty stomach, and a shared meal leaves nobody out.",
            "I would rather spend the money on the children who really need it.",
            "Free meals are fine if the food is healthy and the costs are made public.",
        ],
        "n": 16,
        "welfare": "nash",
        "seed": 7,
    },
    {
        "question": "Should the speed limit in towns be lowered to 30 km/h?",
        "opinions": ["Yes, for the safety of children.", "No, buses would get slower and emptier."],
        "n": 8,
        "welfare": "rawlsian",
    },
]


class ConsensusRequest(Sent):
    """A group's opinions on a question. Unknown fields are refused."""

    model_config = ConfigDict(json_schema_extra={"examples": EXAMPLES})

    question: Text
    """The question the group discusses, best as a yes/no question."""

    opinions: Annotated[
        list[Text], Few, AfterValidator(group), Field(json_schema_extra={"minItems": 1, "maxItems": MAX_MEMBERS})
    ]
    """One text a member; the answer counts members in this order, from 0. A group of more than 64 is answered in the
    background (202)."""

    n: Annotated[int, AfterValidator(check_count)] | None = Field(
        default=None, json_schema_extra={"minimum": 1, "maximum": MAX_CANDIDATES}
    )
    """Candidates to sample and choose from. Default: the service's ``num_candidates`` (16)."""

    welfare: Annotated[str | float, BeforeValidator(check_welfare)] | None = None
    """How the members' predicted agreement becomes one number: ``utilitarian`` (mean), ``nash`` (geometric mean),
    ``rawlsian`` (worst-off member), the inequality aversion alpha >= 0 (``"inf"`` allowed); or, for large groups,
    ``p10`` (10 % quantile) and ``trimmed`` (mean without the lowest and highest tenth). Default: the service's
    (nash)."""

    policy: str = DEFAULT_POLICY
    """Name of the policy that writes the candidates; ``GET /v1/models`` lists the names."""

    preference_model: str = DEFAULT_PREFERENCE_MODEL
    """Name of the preference model that scores; ``GET /v1/models`` lists the names."""

    seed: Annotated[int, AfterValidator(check_seed)] | None = Field(
        default=None, json_schema_extra={"minimum": 0, "maximum": MAX_SEED}
    )
    """Same seed, models and request: same answer. Default: the service's seed (0)."""

    influence: bool = False
    """Say too what each opinion changed: the request is answered once more without each of them, which takes as many
    times longer as the group has members. For groups of 2 to 64."""

    stream: bool = False
    """Answer with server-sent events: ``queued``, ``candidate``, ``scored``, and at the end ``done`` (its data is the
    response) or ``error`` (a problem). The request goes on if the connection breaks; ``GET .../events`` resumes."""


class WelfareOut(Schema):
    """The welfare function that chose."""

    name: str | None
    """``utilitarian``, ``nash``, ``rawlsian``, ``p10``, ``trimmed``, or null for another alpha."""

    alpha: float | Literal["inf"] | None
    """Inequality aversion: 0 utilitarian, 1 Nash, ``"inf"`` Rawlsian; null for ``p10`` and ``trimmed``."""


class CandidateOut(Schema):
    """One sampled statement."""

    statement: str
    """Its text; empty if the policy wrote nothing."""

    welfare: Agreement
    """The group's predicted welfare under the welfare function asked for, 1 to 7."""

    utilities: list[float]
    """Each member's predicted agreement (expected rating, 1 to 7), in the order of the opinions."""

    scores: list[float] | None
    """Each member's raw preference-model score; null for an empty statement."""

    rank: int = Field(ge=1)
    """1 for the best."""

    finished: bool
    """False if the statement was cut off at the token limit."""


class MemberOut(Schema):
    """What one member is predicted to think of the consensus."""

    member: int
    """Index into the opinions, from 0."""

    agreement: Agreement
    """Expected rating, 1 (strongly disagree) to 7 (strongly agree)."""

    sd: float = Field(ge=0)
    """Standard deviation of the predicted rating."""

    low: int = Field(ge=1, le=7)
    """5 % quantile of the predicted rating."""

    high: int = Field(ge=1, le=7)
    """95 % quantile of the predicted rating."""

    disagree: float = Field(ge=0, le=1.000001)
    """Probability of a rating below 4."""

    dissents: bool
    """True if ``disagree`` is above 1/2."""

    shown: bool
    """False if the policy did not read this member's opinion."""


class WinnerOut(Schema):
    """The candidate one welfare function would choose."""

    index: int
    """Its index in ``candidates``."""

    statement: str
    """Its text."""

    welfare: Agreement
    """Its welfare under that function."""


class InfluenceOut(Schema):
    """What one opinion changed: the consensus beside what would have been chosen without it."""

    member: int
    """Index into the opinions, from 0."""

    changed: bool
    """True if another text would have been chosen without it."""

    welfare_of_others: float
    """What that changes in the predicted welfare of the other members, on the 1 to 7 scale; below 0 it cost them."""

    agreement_of_others: float
    """What it changes in the other members' predicted agreement, on average."""


class VersionsOut(Schema):
    """Which models answered."""

    policy: str
    """Name of the policy."""

    policy_weights: str
    """Short SHA-256 of its weights."""

    preference_model: str
    """Name of the preference model."""

    preference_model_weights: str
    """Short SHA-256 of its weights."""


class ConsensusResponse(Schema):
    """The statement with the highest predicted welfare, and everything it was chosen by.

    All agreement is predicted by a model, not given by the members.
    """

    # Recorded answers outlive an upgrade: a field of this or of a body within that is added later needs a default.

    statement: str
    """The chosen statement."""

    index: int
    """Its index in ``candidates``."""

    welfare: Agreement
    """The group's predicted welfare of it, 1 to 7."""

    welfare_used: WelfareOut
    """Name and alpha of the welfare function that chose."""

    candidates: list[CandidateOut]
    """All candidates, in sampling order."""

    members: list[MemberOut]
    """One entry a member, in the order of the opinions."""

    dissenters: list[int]
    """Members who likely dissent."""

    winners: dict[str, WinnerOut]
    """What ``utilitarian``, ``nash`` and ``rawlsian`` would choose."""

    choice_mattered: bool
    """True if the welfare functions do not all choose the same text."""

    not_shown: list[int]
    """Members whose opinions the policy did not read, for want of room; they were scored all the same."""

    versions: VersionsOut
    """Names of both models, and prints of their weights."""

    seed: int
    """Send it again to get the same answer."""

    warnings: list[str]
    """Read these before using the statement."""

    influence: list[InfluenceOut] | None = None
    """One entry a member, in the order of the opinions; null if the request did not ask for it."""

    @classmethod
    def of(cls, consensus: Consensus) -> ConsensusResponse:
        """The response for a library result."""
        fields = vars(consensus) | {"welfare_used": welfare_out(consensus.welfare_used)}
        return cls.model_validate(fields, from_attributes=True)


def welfare_out(used: WelfareUsed) -> WelfareOut:
    """The welfare function as JSON has it: there is no infinity."""
    return WelfareOut(name=used.name, alpha="inf" if used.alpha == float("inf") else used.alpha)


class FieldError(Schema):
    """What is wrong with one field."""

    field: str
    """Its name in the body, e.g. ``opinions[2]``."""

    value: Any
    """The value sent (shortened)."""

    mend: str
    """What to do about it."""


class Problem(Schema):
    """An error as RFC 9457 has it (``application/problem+json``)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:consensus-machine:problem:bad-input",
                    "title": "Bad input",
                    "status": 422,
                    "detail": "n: must be an integer from 1 to 64",
                    "retryable": False,
                    "errors": [{"field": "n", "value": 0, "mend": "must be an integer from 1 to 64"}],
                }
            ]
        }
    )

    type: str
    """Stable name of the kind of problem; ``about:blank`` where the status says it all."""

    title: str
    """The kind of problem in words."""

    status: int
    """The HTTP status."""

    detail: str
    """This very problem, in one line."""

    retryable: bool
    """Whether the same request may succeed later; wait for ``Retry-After`` seconds, if the response says so."""

    errors: list[FieldError]
    """One entry a field at fault; empty where no field is."""


class RequestState(Schema):
    """A request that is answered in the background."""

    id: str
    """Its id."""

    status: Literal["running", "done", "failed"]
    """``running`` until there is a result or a problem."""

    created: float
    """When it was made, seconds since 1970."""

    result: ConsensusResponse | None = None
    """The answer, once done."""

    problem: Problem | None = None
    """What went wrong, if it failed."""
