"""Parts of an experiment's report: its arms with their guardrails, and whether they got what they should.

Undefined numbers are None, never NaN: JSON has none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

DESCRIBED = ConfigDict(use_attribute_docstrings=True)


def finite(value: Any) -> float | None:
    """The number; None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, config=DESCRIBED)
class ArmReport:
    """One arm, and its guardrails: what it costs to run, whatever people think of its statements."""

    name: str
    """What it is called."""

    policy: str
    """Name of the policy."""

    preference_model: str
    """Name of the preference model that scores."""

    n: int
    """Candidates it samples and chooses from."""

    welfare: str | float
    """The welfare function that chooses."""

    share: float
    """Planned share of the deliberations; 1 in a paired experiment."""

    exposed: int
    """Deliberations in which somebody saw its statement."""

    seconds_p50: float | None
    """Median of the seconds it took to write a statement; null before the first."""

    seconds_p95: float | None
    """95 % quantile of the same."""

    failures: dict[str, int]
    """Failures to write one, by type of problem."""

    missing: float | None
    """Share of ratings missing in closed deliberations: members times statements. Null before the first."""


@dataclass(frozen=True, config=DESCRIBED)
class RatioReport:
    """Did the arms get what they should? The chi-square test, exact where counts are small."""

    what: Literal["deliberations exposed, by arm", "members who saw the arm first"]
    """What is counted."""

    counts: dict[str, int]
    """By arm."""

    expected: dict[str, float]
    """By arm: what the planned shares give."""

    p_value: float
    """Chance of counts at least so far off."""

    alert: bool
    """True below 0.001: something is wrong with who sees what, and the results are hidden."""


@dataclass(frozen=True, config=DESCRIBED)
class SignReport:
    """A sign test over closed deliberations."""

    positive: int
    """Deliberations where it was so."""

    negative: int
    """Deliberations where the opposite was so."""

    ties: int
    """Deliberations where neither was."""

    p_value: float
    """Exact, two-sided."""

    alert: bool
    """True below 0.01: worth a warning."""
