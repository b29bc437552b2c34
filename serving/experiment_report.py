"""What an experiment has found so far: the same classes in the library, in the database and in JSON.

Undefined numbers are None, never NaN: JSON has none.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

_DESCRIBED = ConfigDict(use_attribute_docstrings=True)

UNDECIDED = "undecided"


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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


@dataclass(frozen=True, config=_DESCRIBED)
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

_UNITS = {
    "agreement": "mean agreement difference, rating points",
    "win_rate": "win rate, ties one half",
    "worst_off": "worst-off member's difference, rating points",
    "unanimity": "difference in unanimity, shares",
    "quality": "mean quality difference, rating points",
}


def measure_title(name: str) -> str:
    """The measure with its unit, for people."""
    return _UNITS[name]


def render(report: ExperimentReport) -> str:
    """The report for people to read: lines of text."""
    state = "running" if report.stopped is None else "stopped"
    lines = [
        f"{report.name} ({report.experiment}), {report.mode}, {state}",
        f"{report.closed} deliberations closed, {report.pending} pending; "
        f"may decide from {report.minimum} looks on, ends at {report.maximum}",
        "",
    ]
    if report.hidden is None:
        met = "the stop rule has been met" if report.finished else "go on"
        lines += [f"Decision: {report.decision} ({met})"]
        for contrast in report.contrasts:
            lines += ["", *_contrast_lines(contrast)]
    else:
        lines += [f"Results are hidden: {report.hidden}"]
    lines += ["", *_ratio_lines(report.ratio), *_sign_lines(report), "", *map(_arm_line, report.arms)]
    lines += [f"Note: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def _contrast_lines(contrast: Contrast) -> list[str]:
    level = f"{100 * (1 - contrast.alpha):.3g} %"
    lines = [f"{contrast.a} against {contrast.b}: {contrast.decision}"]
    if contrast.decided_after is not None:
        lines[0] += f", after {contrast.decided_after} looks"
    lines.append(f"  {_measure_line(contrast.primary)}  (decides; bounds hold at every look, {level})")
    lines += [f"  {_measure_line(measure)} (Holm)" for measure in contrast.secondary]
    once = _bounds(contrast.fixed.mean, contrast.fixed.low, contrast.fixed.high)
    lines.append(f"  one look at the end would say: {once} ({contrast.fixed.method}, 95 %)")
    for count, what in (
        (contrast.same_text, "with the same statement from both arms"),
        (contrast.primary.undefined, "left out: fewer than two members rated"),
        (contrast.waiting, "waiting for one of the other arm"),
        (contrast.beyond, "behind the maximum, not counted"),
    ):
        if count:
            lines.append(f"  {count} {what}")
    return lines


def _measure_line(measure: MeasureReport) -> str:
    bounds = _bounds(measure.mean, measure.low, measure.high)
    evidence = "" if measure.e_value is None else f", e = {measure.e_value:.3g}, p = {measure.p_value:.2g}"
    return f"{measure_title(measure.name)}: {bounds}{evidence}, {measure.deliberations} looks"


def _bounds(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "nothing yet"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _ratio_lines(ratio: RatioReport) -> list[str]:
    counts = ", ".join(f"{name} {n} of {ratio.expected[name]:.1f} expected" for name, n in ratio.counts.items())
    return [f"Assignment, {ratio.what}: {counts}; p = {ratio.p_value:.3g}{' ALERT' * ratio.alert}"]


def _sign_lines(report: ExperimentReport) -> list[str]:
    lines = []
    if report.order is not None:
        lines.append(f"Order: {_sign(report.order, 'shown first preferred', 'shown second')}")
    if report.missing is not None:
        names = report.arms[0].name, report.arms[1].name
        lines.append(f"Missing ratings: {_sign(report.missing, f'more of {names[0]}', f'of {names[1]}')}")
    return lines


def _sign(found: SignReport, positive: str, negative: str) -> str:
    counts = f"{positive} in {found.positive} deliberations, {negative} in {found.negative}, neither in {found.ties}"
    return f"{counts}; p = {found.p_value:.3g}{' ALERT' * found.alert}"


def _arm_line(arm: ArmReport) -> str:
    failures = sum(arm.failures.values())
    models = f"policy {arm.policy}, preference model {arm.preference_model}"
    parts = [f"Arm {arm.name}: {models}, n {arm.n}, welfare {arm.welfare}; exposed {arm.exposed}"]
    if arm.seconds_p50 is not None and arm.seconds_p95 is not None:
        parts.append(f"{arm.seconds_p50:.2f} s median, {arm.seconds_p95:.2f} s p95")
    parts.append(f"{failures} failures")
    if arm.missing is not None:
        parts.append(f"{100 * arm.missing:.1f} % of ratings missing")
    return ", ".join(parts)
