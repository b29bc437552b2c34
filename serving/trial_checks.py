"""Is an experiment sound, and what do its arms cost to run? Counted whatever the contrasts say. Pure: no database."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluation.experiment_checks import RatioCheck, SignCheck, missing_ratings, order_bias, sample_ratio
from serving.check_report import ArmReport, RatioReport, SignReport, finite
from serving.experiment_report import Contrast
from serving.experiments import Arm, propensities
from serving.trial_data import Held, Trial


def ratio_of(trial: Trial) -> RatioReport:
    """Between: exposed deliberations by arm. Paired: which arm was first for the members who rated."""
    names = trial.spec.names
    if trial.spec.mode == "between":
        shares = list(propensities(trial.spec).values())
        counts = [sum(held.seen and name in held.written for held in trial.held) for name in names]
        return _ratio("deliberations exposed, by arm", names, sample_ratio(counts, shares))
    firsts = [first for held in trial.held for first, rated in zip(*_first_and_rated(names, held)) if rated]
    counts = [firsts.count(True), firsts.count(False)]
    return _ratio("members who saw the arm first", names, sample_ratio(counts))


def _ratio(what: Any, names: Sequence[str], found: RatioCheck) -> RatioReport:
    counts, expected = dict(zip(names, found.counts)), dict(zip(names, found.expected))
    return RatioReport(what, counts, expected, found.p_value, found.alert)


def _two_texts(names: Sequence[str], held: Held) -> bool:
    return len({held.written.get(name) for name in names} - {None}) == 2


def _first_and_rated(names: Sequence[str], held: Held) -> tuple[list[bool], list[bool]]:
    """For each member: was the first arm's statement above the other's, and did they rate either of them?"""
    if not _two_texts(names, held):
        return [], []
    a, b = (held.written[name] for name in names)
    rated = ~(np.isnan(held.agreement[a]) & np.isnan(held.agreement[b]))
    return [order.index(a) < order.index(b) for order in held.orders], rated.tolist()


def order_of(trial: Trial, closed: Sequence[Held]) -> SignReport:
    """Paired: does the statement shown first win more often?"""
    first, second = [], []
    for held in (held for held in closed if _two_texts(trial.spec.names, held)):
        a, b = (held.agreement[held.written[name]] for name in trial.spec.names)
        above = np.array(_first_and_rated(trial.spec.names, held)[0], dtype=bool)
        first.append(np.where(above, a, b))
        second.append(np.where(above, b, a))
    return _sign(order_bias(first, second))


def missing_of(trial: Trial, closed: Sequence[Held]) -> SignReport:
    """Paired: do members leave out more ratings of the first arm?"""
    one, other = ([held.agreement[held.written[name]] for held in closed] for name in trial.spec.names)
    return _sign(missing_ratings(one, other))


def _sign(found: SignCheck) -> SignReport:
    return SignReport(found.positive, found.negative, found.ties, found.p_value, found.alert)


def arm_of(trial: Trial, arm: Arm) -> ArmReport:
    """The arm with its guardrails."""
    written = [held for held in trial.held if arm.name in held.written]
    seconds = [held.seconds[arm.name] for held in written]
    p50, p95 = np.percentile(seconds, [50, 95]) if seconds else (math.nan, math.nan)
    marks = [held.agreement[held.written[arm.name]] for held in written if held.closed is not None]
    gone = np.isnan(np.concatenate(marks)) if marks else np.array([])
    return ArmReport(
        name=arm.name,
        policy=arm.policy,
        preference_model=arm.preference_model,
        n=arm.n,
        welfare=arm.welfare,
        share=propensities(trial.spec)[arm.name],
        exposed=sum(held.seen for held in written),
        seconds_p50=finite(p50),
        seconds_p95=finite(p95),
        failures=dict(trial.failures.get(arm.name, {})),
        missing=float(gone.mean()) if len(gone) else None,
    )


def warnings_of(
    trial: Trial, contrasts: Sequence[Contrast], order: SignReport | None, missing: SignReport | None
) -> Iterable[str]:
    """What to read before believing a result."""
    for contrast in contrasts:
        if contrast.broken:
            yield f"{contrast.a} against {contrast.b}: no mean fits all deliberations; they do not share one"
    if order is not None and order.alert:
        yield "the place in the list matters: one place wins more often, whatever stands there"
    if missing is not None and missing.alert:
        yield "members leave out more ratings of one arm than of the other"
    for name, prints in trial.versions.items():
        if len(prints) > 1:
            yield f"{len(prints)} versions of the models wrote for {name}: the arm changed on the way"
