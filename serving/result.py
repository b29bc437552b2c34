"""What a consensus request gives back (contract 6), as plain frozen dataclasses. No models, no web."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One sampled statement.

    Attributes:
        statement: the cleaned text; empty if the policy wrote nothing (such a candidate is never chosen).
        welfare: the group's welfare under the welfare function asked for, on the 1 to 7 scale.
        utilities: each member's predicted agreement (expected rating, 1 to 7), in the members' order.
        scores: each member's raw preference-model score, or None for an empty statement, which is not scored.
        rank: 1 for the best; equal welfare ranks by sampling order, empty statements last.
        finished: False if the policy was cut off by the token limit before it ended the statement.
    """

    statement: str
    welfare: float
    utilities: tuple[float, ...]
    scores: tuple[float, ...] | None
    rank: int
    finished: bool


@dataclass(frozen=True)
class MemberView:
    """What one member is predicted to think of the consensus. All ratings are on the 1 to 7 scale.

    Attributes:
        member: index into the request's opinions.
        agreement: expected rating.
        sd: standard deviation of the predicted rating.
        low, high: 5 % and 95 % quantiles of the predicted rating (integers).
        disagree: probability of a rating below 4 (neutral).
        dissents: True if ``disagree`` is above 1/2.
        shown: True if the policy read this member's opinion in at least one of its prompts.
    """

    member: int
    agreement: float
    sd: float
    low: int
    high: int
    disagree: float
    dissents: bool
    shown: bool


@dataclass(frozen=True)
class Winner:
    """The candidate that one welfare function would choose: its index, text and welfare under that function."""

    index: int
    statement: str
    welfare: float


@dataclass(frozen=True)
class WelfareUsed:
    """The welfare function of a request: its name (None for an alpha without one) and alpha in [0, inf], where it is
    isoelastic (None where it is not)."""

    name: str | None
    alpha: float | None

    @property
    def function(self) -> str | float:
        """What ``reward.welfare.welfare`` takes."""
        return self.alpha if self.alpha is not None else str(self.name)


@dataclass(frozen=True)
class Versions:
    """Which models answered: their names, and short SHA-256 prints of their weights."""

    policy: str
    policy_weights: str
    preference_model: str
    preference_model_weights: str


@dataclass(frozen=True)
class Influence:
    """What one opinion changed: the consensus beside the one chosen without it (see ``serving.influence``).

    Attributes:
        member: index into the request's opinions.
        changed: True if another text was chosen without it.
        welfare_of_others: predicted welfare of the other members, with it minus without, in [-6, 6].
        agreement_of_others: mean over the other members of their predicted agreement, with it minus without.
    """

    member: int
    changed: bool
    welfare_of_others: float
    agreement_of_others: float


@dataclass(frozen=True)
class Consensus:
    """The full result of a consensus request.

    Attributes:
        statement: the chosen statement.
        index: its index in ``candidates``.
        welfare: the group's predicted welfare of it, on the 1 to 7 scale.
        welfare_used: under which welfare function.
        candidates: all ``n`` candidates, in sampling order.
        members: one view a member, in the members' order.
        dissenters: indices of the members who likely dissent.
        winners: ``utilitarian``, ``nash``, ``rawlsian`` -> the candidate it would choose.
        choice_mattered: True if the three winners and the consensus are not all the same text.
        not_shown: indices of the members whose opinion no prompt of the policy held (they did not fit its
            context). They are scored like everyone else.
        versions: which models answered.
        seed: the seed that, with the same models and request, gives the same answer.
        warnings: sentences a caller should read before using the statement.
        influence: one entry a member, in the members' order; None if it was not asked for.
    """

    statement: str
    index: int
    welfare: float
    welfare_used: WelfareUsed
    candidates: tuple[Candidate, ...]
    members: tuple[MemberView, ...]
    dissenters: tuple[int, ...]
    winners: dict[str, Winner]
    choice_mattered: bool
    not_shown: tuple[int, ...]
    versions: Versions
    seed: int
    warnings: tuple[str, ...]
    influence: tuple[Influence, ...] | None = None
