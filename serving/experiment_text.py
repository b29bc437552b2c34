"""An experiment's report as text for people."""

from __future__ import annotations

from serving.check_report import ArmReport, RatioReport, SignReport
from serving.experiment_report import Contrast, ExperimentReport, MeasureReport

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
        f"{_many(report.closed, 'deliberation')} closed, {report.pending} pending; "
        f"may decide from {_many(report.minimum, 'look')} on, ends at {report.maximum}",
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
        lines[0] += f", after {_many(contrast.decided_after, 'look')}"
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
    return f"{measure_title(measure.name)}: {bounds}{evidence}, {_many(measure.deliberations, 'look')}"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _bounds(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "nothing yet"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _ratio_lines(ratio: RatioReport) -> list[str]:
    if not any(ratio.counts.values()):
        return [f"Assignment, {ratio.what}: nothing to check yet"]
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
    counts = f"{positive} in {_many(found.positive, 'deliberation')}, {negative} in {found.negative}"
    return f"{counts}, neither in {found.ties}; p = {found.p_value:.3g}{' ALERT' * found.alert}"


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
