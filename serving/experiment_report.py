"""What an experiment has found so far: the same classes in the library, in the database and in JSON.

Undefined numbers are None, never NaN: JSON has none.
"""

from __future__ import annotations

from typing import Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from serving.check_report import DESCRIBED, ArmReport, RatioReport, SignReport

UNDECIDED = "undecided"


@dataclass(frozen=True, config=DESCRIBED)
class MeasureReport:
    """One measure with bounds that hold at every look."""

    name: Literal["agreement", "win_rate", "worst_off", "unanimity", "quality"]
    """``agreement``: difference of the groups' means; ``win_rate`` with ties one half; ``worst_off``: difference of the
    lowest ratings; ``unanimity``: of the shares that everybody rates 5 or more; ``quality``: as agreement."""

    deliberations: int
    """Looks it rests on."""

    undefined: int
    """Closed deliberations (between: of both arms) left out, because fewer than two members rated."""

    mean: float | None
    """So far."""

    low: float | None
    """Lower bound."""

    high: float | None
    """Upper bound."""

    null: float
    """The value of "no difference": 0, or 1/2 for the win rate."""

    e_value: float | None
    """Evidence against "no difference" at this look; at most 1e300."""

    p_value: float | None
    """1 over the largest e-value so far: valid at every look. Corrected after Holm among the secondary measures."""


@dataclass(frozen=True, config=DESCRIBED)
class PathReport:
    """The primary measure after each look; one entry a look."""

    mean: tuple[float, ...]
    """Of the numbers so far."""

    low: tuple[float | None, ...]
    """Lower bounds; null once no mean fits."""

    high: tuple[float | None, ...]
    """Upper bounds."""

    log_e: tuple[float, ...]
    """Natural logarithms of the e-values."""


@dataclass(frozen=True, config=DESCRIBED)
class FixedReport:
    """The primary measure's 95 % interval in a plan with one look at the end: a cross-check, not for peeking."""

    method: Literal["descriptive", "t", "bootstrap", "wilson", "constant"]
    """How: no interval below 10 deliberations, ``t`` below 40, then the bootstrap over deliberations."""

    mean: float | None
    """The same mean."""

    low: float | None
    """Lower end."""

    high: float | None
    """Upper end."""


@dataclass(frozen=True, config=DESCRIBED)
class Contrast:
    """Two arms side by side: numbers above ``null`` favour ``a``."""

    a: str
    """Name of an arm."""

    b: str
    """Name of the other."""

    alpha: float
    """Level of its bounds: the experiment's over the number of pairs of arms."""

    decision: str
    """``NAME better``, or ``undecided``."""

    decided_after: int | None
    """The look that decided."""

    finished: bool
    """Whether the stop rule has been met: decided, or at the maximum."""

    beyond: int
    """Looks behind the maximum; they do not count."""

    waiting: int
    """Between: closed deliberations of one arm that wait for one of the other."""

    same_text: int
    """Paired: deliberations in which both arms wrote the same statement; their difference is 0."""

    broken: bool
    """No mean fits all deliberations: they are not alike, or not independent. Nothing is decided then."""

    primary: MeasureReport
    """The measure that decides."""

    secondary: tuple[MeasureReport, ...]
    """The others, at the same level each."""

    path: PathReport
    """The primary measure after each look."""

    fixed: FixedReport
    """A second opinion."""


@dataclass(frozen=True, config=DESCRIBED)
class ExperimentReport:
    """What an experiment has found so far, or what it had found when it was stopped."""

    experiment: str
    """Its id."""

    name: str
    """Its name."""

    mode: Literal["paired", "between"]
    """``paired``: every deliberation rates both arms; ``between``: each has one arm."""

    metric: Literal["agreement", "win_rate"]
    """What decides."""

    alpha: float
    """Chance, at most, of declaring a difference where there is none."""

    minimum: int
    """Looks before it may decide."""

    maximum: int
    """Looks after which it ends."""

    stopped: float | None
    """When it was stopped, seconds since 1970."""

    closed: int
    """Deliberations that count."""

    pending: int
    """Deliberations enrolled and not closed."""

    decision: str
    """``NAME better`` (than every other arm), or ``undecided``."""

    finished: bool
    """Whether the stop rule has been met."""

    hidden: str | None
    """Why there are no results, if there are none."""

    ratio: RatioReport
    """Did the arms get what they should?"""

    arms: tuple[ArmReport, ...]
    """One entry an arm."""

    contrasts: tuple[Contrast, ...]
    """One entry a pair of arms; empty if hidden."""

    order: SignReport | None
    """Paired: does the statement shown first win more often? Null if between or hidden."""

    missing: SignReport | None
    """Paired: do members leave out more ratings of the first arm? Null if between or hidden."""

    warnings: tuple[str, ...]
    """Read these before believing a result."""

    def to_json(self) -> str:
        """For the database; ``from_json`` reads it."""
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str | bytes) -> ExperimentReport:
        """What ``to_json`` wrote, or the service answered."""
        return _ADAPTER.validate_json(text)


_ADAPTER: TypeAdapter[ExperimentReport] = TypeAdapter(ExperimentReport)
