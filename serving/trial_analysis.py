"""From what an experiment's deliberations said to its report. Pure: no database.

Nothing is reported while the arms do not have what they should: then something is wrong with who sees what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluation.experiment_checks import (
    FixedHorizon,
    fixed_horizon,
    holm,
)
from evaluation.experiment_measures import (
    Numbers,
    Rated,
    defined,
    mean_difference,
    numbers,
    paired,
    unanimity,
    win,
    worst_off_difference,
)
from evaluation.sequences import (
    NO_DIFFERENCE,
    ConfidenceSequence,
    anytime_p,
    difference_sequence,
    win_rate_sequence,
)
from serving.check_report import finite
from serving.experiment_report import (
    UNDECIDED,
    Contrast,
    ExperimentReport,
    FixedReport,
    MeasureReport,
    PathReport,
)
from serving.trial_checks import arm_of, missing_of, order_of, ratio_of, warnings_of
from serving.trial_data import Held, Trial

Array = np.ndarray

MEASURES = {
    "agreement": ("mean_difference", 6.0),
    "win_rate": ("win", None),
    "worst_off": ("worst_off_difference", 6.0),
    "unanimity": ("unanimity_difference", 1.0),
    "quality": ("quality_difference", 6.0),
}
"""Measure -> its name in ``Numbers``, and the limit of its differences (None: outcomes from 0 to 1)."""

MOST_E = 1e300


def analyse(trial: Trial, stopped: float | None = None) -> ExperimentReport:
    """The report as of now."""
    spec, ratio, hidden = trial.spec, ratio_of(trial), None
    if ratio.alert:
        hidden = "the arms do not have the shares they should (sample-ratio mismatch); find out who sees what, and why"
    contrasts = () if hidden else tuple(_contrasts(trial))
    decision = overall(spec.names, contrasts)
    paired_up = trial.closed if spec.mode == "paired" and not hidden else None
    order = None if paired_up is None else order_of(trial, paired_up)
    missing = None if paired_up is None else missing_of(trial, paired_up)
    return ExperimentReport(
        experiment=trial.id,
        name=trial.name,
        mode=spec.mode,
        metric=spec.metric,
        alpha=spec.alpha,
        minimum=spec.minimum,
        maximum=spec.maximum,
        stopped=stopped,
        closed=len(trial.closed),
        pending=len(trial.held) - len(trial.closed),
        decision=decision,
        finished=bool(contrasts) and (decision != UNDECIDED or all(c.finished for c in contrasts)),
        hidden=hidden,
        ratio=ratio,
        arms=tuple(arm_of(trial, arm) for arm in spec.arms),
        contrasts=contrasts,
        order=order,
        missing=missing,
        warnings=tuple(warnings_of(trial, contrasts, order, missing)),
    )


def sequence_of(contrast: Contrast) -> ConfidenceSequence:
    """The primary measure's confidence sequence, as ``evaluation.sequence_plot`` draws it."""
    low, high = (np.array(bound, dtype=np.float64) for bound in (contrast.path.low, contrast.path.high))
    return ConfidenceSequence(
        np.array(contrast.path.mean), low, high, np.array(contrast.path.log_e), np.isnan(low), contrast.alpha,
        contrast.primary.null,
    )  # fmt: skip


def overall(names: Sequence[str], contrasts: Sequence[Contrast]) -> str:
    """``NAME better`` for the arm that is better than every other one, if there is one."""
    wins = {name: sum(c.decision == f"{name} better" for c in contrasts if name in (c.a, c.b)) for name in names}
    best = [name for name, count in wins.items() if count == len(names) - 1]
    return f"{best[0]} better" if best else UNDECIDED


# --- contrasts ------------------------------------------------------------------------------------------------------


def _contrasts(trial: Trial) -> Iterable[Contrast]:
    pairs = list(itertools.combinations(trial.spec.names, 2))
    alpha = trial.spec.alpha / len(pairs)  # Bonferroni: any pair may declare a difference
    for a, b in pairs:
        if trial.spec.mode == "paired":
            found = numbers([_rated(held, a, b) for held in trial.closed])
            same = sum(held.written.get(a) == held.written.get(b) for held in trial.closed)
            yield _contrast(trial, a, b, alpha, found, undefined=found.undefined(), same_text=same)
        else:
            ours, theirs = (usable(trial.closed, name) for name in (a, b))
            short = sum(held.arm in (a, b) for held in trial.closed) - len(ours) - len(theirs)
            waiting = abs(len(ours) - len(theirs))
            undefined = {name: short for name, _ in MEASURES.values()}
            yield _contrast(trial, a, b, alpha, matched(ours, theirs), undefined=undefined, waiting=waiting)


def _rated(held: Held, a: str, b: str) -> Rated:
    one, other = held.written[a], held.written[b]
    return Rated(held.agreement[one], held.agreement[other], held.quality[one], held.quality[other])


def usable(closed: Sequence[Held], arm: str) -> list[tuple[Array, Array]]:
    """Between: (agreement, quality) of the arm's deliberations where two members rated; each [members, 1]."""
    found = []
    for held in closed:
        if held.arm == arm and arm in held.written:
            agreement, quality = held.agreement[held.written[arm]], held.quality[held.written[arm]]
            kept, also = paired(agreement, quality)
            if not math.isnan(unanimity(kept)):
                found.append((kept, also))
    return found


def matched(ours: Sequence[tuple[Array, Array]], theirs: Sequence[tuple[Array, Array]]) -> Numbers:
    """Between: the k-th deliberation of one arm beside the k-th of the other; what has no partner yet is left out.

    Deliberations are independent and the k-th of an arm is like any other one, so each pair's difference has the
    difference of the arms as its mean, whatever came before: that is all a confidence sequence asks for.
    """
    rows = [
        (
            mean_difference(a, b), win(a, b), worst_off_difference(a, b), unanimity(a), unanimity(b),
            mean_difference(qa, qb), len(a) + len(b), 0,
        )
        for (a, qa), (b, qb) in zip(ours, theirs)
    ]  # fmt: skip
    return Numbers(*np.array(rows, dtype=np.float64).reshape(len(rows), 8).T)


def _contrast(
    trial: Trial,
    a: str,
    b: str,
    alpha: float,
    found: Numbers,
    *,
    undefined: dict[str, int],
    waiting: int = 0,
    same_text: int = 0,
) -> Contrast:
    spec = trial.spec
    values = {name: defined(getattr(found, source)) for name, (source, _) in MEASURES.items()}
    kept = {name: value[: spec.maximum] for name, value in values.items()}  # more was not planned
    sequences = {name: _sequence(name, value, alpha) for name, value in kept.items()}
    lost = {name: undefined.get(source, 0) for name, (source, _) in MEASURES.items()}
    lost["unanimity"] = undefined["unanimity_a"] if "unanimity_a" in undefined else lost["unanimity"]
    primary = sequences[spec.metric]
    broken = primary is not None and bool(primary.broken[-1])
    decision = None if primary is None or broken else primary.decision(spec.minimum)
    others = [name for name in MEASURES if name != spec.metric]
    corrected = holm(np.array([_p(sequences[name]) for name in others]))
    looks = len(kept[spec.metric])
    return Contrast(
        a=a,
        b=b,
        alpha=alpha,
        decision=UNDECIDED if decision is None else f"{a if decision.better == 'a' else b} better",
        decided_after=None if decision is None else decision.deliberations,
        finished=decision is not None or looks >= spec.maximum,
        beyond=len(values[spec.metric]) - looks,
        waiting=waiting,
        same_text=same_text,
        broken=broken,
        primary=_measure(spec.metric, primary, lost[spec.metric], _p(primary)),
        secondary=tuple(
            _measure(name, sequences[name], lost[name], float(p)) for name, p in zip(others, corrected, strict=True)
        ),
        path=_path(primary),
        fixed=_fixed(fixed_horizon(kept[spec.metric], win_rate=spec.metric == "win_rate")),
    )


def _sequence(name: str, values: Array, alpha: float) -> ConfidenceSequence | None:
    if not len(values):
        return None
    limit = MEASURES[name][1]
    return win_rate_sequence(values, alpha) if limit is None else difference_sequence(values, alpha, limit=limit)


def _p(sequence: ConfidenceSequence | None) -> float:
    return math.nan if sequence is None else float(anytime_p(sequence.log_e)[-1])


def _measure(name: Any, sequence: ConfidenceSequence | None, undefined: int, p: float) -> MeasureReport:
    null = NO_DIFFERENCE if MEASURES[name][1] is None else 0.0
    if sequence is None:
        return MeasureReport(name, 0, undefined, None, None, None, null, None, None)
    e_value = math.exp(min(float(sequence.log_e[-1]), math.log(MOST_E)))
    mean, low, high = (finite(bound[-1]) for bound in (sequence.mean, sequence.low, sequence.high))
    return MeasureReport(name, len(sequence.mean), undefined, mean, low, high, null, e_value, finite(p))


def _path(sequence: ConfidenceSequence | None) -> PathReport:
    if sequence is None:
        return PathReport((), (), (), ())
    low, high = (tuple(map(finite, bound)) for bound in (sequence.low, sequence.high))
    return PathReport(tuple(map(float, sequence.mean)), low, high, tuple(map(float, sequence.log_e)))


def _fixed(found: FixedHorizon) -> FixedReport:
    estimate = found.estimate
    method: Any = found.method
    return FixedReport(method, finite(estimate.value), finite(estimate.low), finite(estimate.high))
