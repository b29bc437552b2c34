"""Confidence sequences for an experiment that people look at after every deliberation.

One number a deliberation in [0, 1]; 1/2 means "no difference". The interval is valid at every look at once, so an
experiment may stop whenever it likes. Method: betting, with the approximate growth-optimal bet (aGRAPA) of
Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting", in the form of
``reference/datasets-and-measures.md`` 8.2. Needs the deliberations to be independent with one common mean.

All functions take one sequence [looks] or many [runs, looks].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from deliberation.types import InputError

Array = np.ndarray

ALPHA = 0.05
"""Chance, at most, that the truth is outside the interval at any look."""

MOST_BET = 0.75
"""Share of the stake that one deliberation can lose, at most (c of the reference)."""

START_VARIANCE = 0.01
"""What the bets take the variance for before the first deliberation: differences of means are narrow in [-6, 6]."""

WIN_START_VARIANCE = 0.25
"""The same for win rates: the variance of a fair coin."""

GRID = 1201
"""Means tried between 0 and 1. Odd, so that 1/2 is one; on differences in [-6, 6] a step is 0.01."""

NO_DIFFERENCE = 0.5

RATING_RANGE = 6.0
"""Largest difference between two ratings from 1 to 7."""


@dataclass(frozen=True)
class Decision:
    """Where an experiment may stop, and what it then says.

    Attributes:
        deliberations: how many it took.
        better: ``a`` or ``b``.
    """

    deliberations: int
    better: str


@dataclass(frozen=True)
class ConfidenceSequence:
    """What is known after each look; arrays [looks] or [runs, looks].

    Attributes:
        mean: of the values so far (no prior mixed in).
        low, high: bounds of the mean, never wider than at the look before; NaN once ``broken``.
        log_e: natural logarithm of the e-value against "no difference", at this look.
        broken: every mean has been rejected, the true one with them: the deliberations do not share one mean or are
            not independent. If they do and are, the chance of it is alpha at most (once in 2,000 simulated
            experiments). A set narrower than a step of the grid looks the same: far beyond 100,000 deliberations.
        alpha: level.
        null: the value of "no difference" on the scale of ``mean``: 1/2, or 0 after ``as_differences``.
    """

    mean: Array
    low: Array
    high: Array
    log_e: Array
    broken: Array
    alpha: float = ALPHA
    null: float = NO_DIFFERENCE

    def decision(self, minimum: int = 1) -> Decision | None:
        """The first look, from ``minimum`` deliberations on, whose interval leaves out "no difference"; else None.

        The bounds are rejected points themselves, so a bound that equals ``null`` leaves it out. ``log_e`` has then
        passed log(1 / alpha) at this look or before.

        Raises:
            InputError: field ``sequence``, for more than one sequence; field ``minimum``, if below 1.
        """
        if self.mean.ndim != 1:
            raise InputError("sequence", self.mean.shape, "must be one sequence; use decided_at for many")
        at = float(decided_at(self, minimum))
        if math.isinf(at):
            return None
        return Decision(int(at), "a" if self.low[int(at) - 1] >= self.null else "b")


def confidence_sequence(
    values: Array, alpha: float = ALPHA, *, start_variance: float = START_VARIANCE, grid: int = GRID
) -> ConfidenceSequence:
    """Bounds of the mean after every value.

    For each mean m of the grid the capital K_t(m) = prod (1 + lambda_s(m) (X_s - m)) is a fair game if m is true; m is
    rejected for good once K reaches 1/alpha (Ville's inequality). The interval runs between the rejected neighbours of
    the outermost means that are left, so that the true set lies inside whatever the grid.

    Args:
        values: [looks] or [runs, looks], each from 0 to 1, in the order of the deliberations.
        alpha: level, in (0, 1).
        start_variance: see ``START_VARIANCE``; any positive number keeps the level.
        grid: number of means tried, odd and at least 3.

    Raises:
        InputError: a value that is NaN or outside [0, 1], or an argument out of its range.
    """
    values = _checked(values, start_variance)
    if not 0 < alpha < 1:
        raise InputError("alpha", alpha, "must be above 0 and below 1")
    if grid < 3 or grid % 2 == 0:
        raise InputError("grid", grid, "must be odd and at least 3, so that 1/2 is on it")
    rows = np.atleast_2d(values)
    means, variances = _before(rows, start_variance)
    points = np.linspace(0.0, 1.0, grid)
    capital, left = np.zeros((len(rows), grid)), np.ones((len(rows), grid), dtype=bool)
    low, high = np.empty(rows.shape), np.empty(rows.shape)
    for t in range(rows.shape[1]):
        capital += _log_factor(rows[:, t, None], points, means[:, t, None], variances[:, t, None])
        left &= capital < -math.log(alpha)
        low[:, t], high[:, t] = _hull(left, points)
    return ConfidenceSequence(
        mean=(rows.cumsum(1) / np.arange(1, rows.shape[1] + 1)).reshape(values.shape),
        low=low.reshape(values.shape),
        high=high.reshape(values.shape),
        log_e=log_e_values(values, start_variance=start_variance),
        broken=np.isnan(low).reshape(values.shape),
        alpha=alpha,
    )


def win_rate_sequence(wins: Array, alpha: float = ALPHA, *, grid: int = GRID) -> ConfidenceSequence:
    """``confidence_sequence`` of outcomes 1, 1/2 (tie) and 0: bounds of the win rate, ties one half."""
    return confidence_sequence(wins, alpha, start_variance=WIN_START_VARIANCE, grid=grid)


def difference_sequence(
    differences: Array, alpha: float = ALPHA, *, limit: float = RATING_RANGE, grid: int = GRID
) -> ConfidenceSequence:
    """``confidence_sequence`` of differences in [-limit, limit], on their own scale.

    Args:
        differences: [looks] or [runs, looks]; 6 is the ``limit`` of rating differences, 1 that of unanimity.
    """
    return as_differences(confidence_sequence(to_unit(differences, limit), alpha, grid=grid), limit)


def log_e_values(values: Array, null: float = NO_DIFFERENCE, *, start_variance: float = START_VARIANCE) -> Array:
    """log K_t(null) after every value: the evidence against the mean ``null``, without a grid.

    Args:
        values: as in ``confidence_sequence``.
        null: from 0 to 1.

    Returns:
        Same shape. At least log(1/alpha) at any look at all has a chance of alpha or less if ``null`` is true.
    """
    values = _checked(values, start_variance)
    if not 0 <= null <= 1:
        raise InputError("null", null, "must be from 0 to 1")
    means, variances = _before(values, start_variance)
    found: Array = _log_factor(values, np.asarray(null), means, variances).cumsum(-1)
    return found


def anytime_p(log_e: Array) -> Array:
    """p-values valid at every look: 1 over the largest e-value so far, at most 1; same shape. For Holm's correction."""
    return np.exp(-np.maximum(np.maximum.accumulate(log_e, axis=-1), 0.0))


def first_crossing(log_e: Array, alpha: float = ALPHA) -> Array:
    """Deliberations until the e-value reached 1/alpha; infinite where it did not. [...] from [..., looks]."""
    return _first(log_e >= -math.log(alpha), 1)


def decided_at(sequence: ConfidenceSequence, minimum: int = 1) -> Array:
    """Deliberations until the interval left out "no difference"; infinite where it did not. [] or [runs]."""
    if minimum < 1:
        raise InputError("minimum", minimum, "must be at least 1")
    return _first((sequence.low >= sequence.null) | (sequence.high <= sequence.null), minimum)


def to_unit(differences: Array, limit: float = RATING_RANGE) -> Array:
    """(D + limit) / (2 limit): differences in [-limit, limit] as values in [0, 1], where 1/2 is no difference.

    Raises:
        InputError: field ``differences``, if one is NaN or outside.
    """
    differences = np.asarray(differences, dtype=np.float64)
    _check_range("differences", differences, -limit, limit)
    return (differences + limit) / (2 * limit)


def from_unit(values: Array, limit: float = RATING_RANGE) -> Array:
    """2 limit x - limit: back from ``to_unit``."""
    return 2 * limit * np.asarray(values, dtype=np.float64) - limit


def as_differences(sequence: ConfidenceSequence, limit: float = RATING_RANGE) -> ConfidenceSequence:
    """The sequence on the scale of the differences, in [-limit, limit]; "no difference" is then 0."""
    mean, low, high = (from_unit(x, limit) for x in (sequence.mean, sequence.low, sequence.high))
    return replace(sequence, mean=mean, low=low, high=high, null=2 * limit * sequence.null - limit)


def _before(values: Array, start_variance: float) -> tuple[Array, Array]:
    """Mean and variance as known before each value, so that no bet sees what it bets on; same shape as ``values``."""
    n = np.arange(2, values.shape[-1] + 2)
    means = (NO_DIFFERENCE + values.cumsum(-1)) / n
    variances = (start_variance + ((values - means) ** 2).cumsum(-1)) / n
    shape = (*values.shape[:-1], 1)
    first = np.full(shape, NO_DIFFERENCE), np.full(shape, start_variance)
    return (
        np.concatenate([first[0], means], axis=-1)[..., :-1],
        np.concatenate([first[1], variances], axis=-1)[..., :-1],
    )


def _log_factor(values: Array, m: Array, means: Array, variances: Array) -> Array:
    """log(1 + lambda(m) (X - m)), with the bet clipped so that no factor is below 1 - ``MOST_BET``."""
    with np.errstate(divide="ignore"):  # no clip is needed at m = 0 and 1: the bound there is infinite
        lowest, highest = -MOST_BET / (1 - m), MOST_BET / m
    gap = means - m
    bets = np.clip(gap / (variances + gap**2), lowest, highest)
    return np.log1p(bets * (values - m))


def _hull(left: Array, points: Array) -> tuple[Array, Array]:
    """Rejected neighbours of the outermost means left (0 and 1 have none); NaN where none is left. [runs] each."""
    last = len(points) - 1
    lowest, highest = left.argmax(1), last - left[:, ::-1].argmax(1)
    some = left.any(1)
    low = np.where(some, points[np.maximum(lowest - 1, 0)], np.nan)
    high = np.where(some, points[np.minimum(highest + 1, last)], np.nan)
    return low, high


def _first(hits: Array, minimum: int) -> Array:
    """Number (from 1) of the first hit from ``minimum`` on along the last axis; infinite where there is none."""
    late = hits[..., minimum - 1 :]
    if late.shape[-1] == 0:
        return np.full(hits.shape[:-1], np.inf)
    return np.where(late.any(-1), late.argmax(-1) + float(minimum), np.inf)


def _checked(values: Array, start_variance: float) -> Array:
    """``values`` as float64; raises as ``confidence_sequence`` says."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise InputError("values", values.shape, "must be [looks] or [runs, looks]")
    _check_range("values", values, 0.0, 1.0)
    if not 0 < start_variance <= 1:
        raise InputError("start_variance", start_variance, "must be above 0 and at most 1")
    return values


def _check_range(field: str, values: Array, low: float, high: float) -> None:
    """Raises: InputError naming the first value that is NaN or outside [low, high]."""
    bad = np.argwhere(~((values >= low) & (values <= high)))
    if len(bad):
        place = tuple(bad[0])
        name = f"{field}[{', '.join(str(i) for i in place)}]" if place else field
        raise InputError(name, float(values[place]), f"must be from {low:g} to {high:g}")
