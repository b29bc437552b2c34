"""Is an experiment sound? Checks to run before its result is believed, and a second opinion at a fixed horizon.

The unit is the deliberation everywhere: ratings inside one depend on each other. Sources:
``reference/datasets-and-measures.md`` 8.1, 8.3 and 8.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from deliberation.types import InputError
from evaluation.measures import BOOTSTRAP_DRAWS, Estimate, bootstrap_counts, mean_estimates, wilson_interval

Array = np.ndarray

RATIO_ALERT = 0.001
"""Assignment is suspect below this p-value: hide the results. Low, because the check runs often."""

BIAS_ALERT = 0.01
"""Order and missing ratings are worth a warning below this p-value (ours; the reference names no level)."""

FEWEST_EXPECTED = 5
"""Expected count below which the chi-square approximation gives way to an exact test."""

DESCRIPTIVE_BELOW, T_BELOW = 10, 40
"""Deliberations: below the first no interval, below the second t with n - 1 degrees of freedom."""


@dataclass(frozen=True)
class RatioCheck:
    """Do the arms have the deliberations they should?

    Attributes:
        counts: exposed deliberations, one number an arm.
        expected: what the planned shares give.
        p_value: chance of counts at least so far off.
        exact: an exact test, because an expected count is below ``FEWEST_EXPECTED``.
        alert: ``p_value`` is below ``RATIO_ALERT``.
    """

    counts: tuple[int, ...]
    expected: tuple[float, ...]
    p_value: float
    exact: bool
    alert: bool


def sample_ratio(counts: Sequence[int], shares: Sequence[float] | None = None) -> RatioCheck:
    """Sample-ratio mismatch. In a paired experiment: of which arm was shown first.

    chi-square = sum (n_k - N p_k)^2 / (N p_k) with arms - 1 degrees of freedom. Exact: the binomial test of each arm
    against the others, its smallest p-value times the number of tests (one for two arms).

    Args:
        counts: exposed deliberations, one number an arm.
        shares: planned shares, summing to 1; None: equal ones.

    Raises:
        InputError: fewer than two arms, a negative or broken count, shares that do not fit.
    """
    if len(counts) < 2 or any(n != int(n) or n < 0 for n in counts):
        raise InputError("counts", list(counts), "must be two or more whole numbers from 0")
    shares = [1 / len(counts)] * len(counts) if shares is None else list(shares)
    if len(shares) != len(counts) or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        raise InputError("shares", shares, f"must be {len(counts)} positive numbers that sum to 1")
    total = sum(counts)
    expected = tuple(total * share for share in shares)
    exact = min(expected) < FEWEST_EXPECTED
    p = _exact_ratio(counts, shares) if exact else float(stats.chisquare(counts, expected, sum_check=False).pvalue)
    return RatioCheck(tuple(int(n) for n in counts), expected, p, exact, p < RATIO_ALERT)


def _exact_ratio(counts: Sequence[int], shares: Sequence[float]) -> float:
    total = int(sum(counts))
    if total == 0:
        return 1.0
    tests = 1 if len(counts) == 2 else len(counts)
    found = [stats.binomtest(int(n), total, share).pvalue for n, share in zip(counts, shares)]
    return min(1.0, float(min(found[:tests])) * tests)


@dataclass(frozen=True)
class SignCheck:
    """A sign test over deliberations.

    Attributes:
        positive, negative, ties: deliberations of each sign; undefined ones are in none of them.
        share: positive as a share of positive and negative; NaN if there are none.
        p_value: exact, two-sided; 1 if all are ties.
        alert: ``p_value`` is below ``BIAS_ALERT``.
    """

    positive: int
    negative: int
    ties: int
    share: float
    p_value: float
    alert: bool


def sign_check(values: Array) -> SignCheck:
    """Are positive values as frequent as negative ones? Exact binomial test; ties left out.

    Args:
        values: [deliberations], NaN where undefined.
    """
    signs = np.sign(np.round(np.asarray(values, dtype=np.float64), 9))
    up, down, ties = (int((signs == s).sum()) for s in (1, -1, 0))
    p = float(stats.binomtest(up, up + down, 0.5).pvalue) if up + down else 1.0
    return SignCheck(up, down, ties, up / (up + down) if up + down else math.nan, p, p < BIAS_ALERT)


def order_bias(first: Sequence[Array], second: Sequence[Array]) -> SignCheck:
    """Does the statement shown first win more often? Positive: deliberations where it did, for most of their members.

    With an order drawn at random for each member, the arms themselves favour neither place.

    Args:
        first, second: one array [members] a deliberation: each member's rating of the statement that this member saw
            first, and second; NaN where missing.
    """
    return sign_check(_by_deliberation(first, second, _wins_minus_losses))


def missing_ratings(one: Sequence[Array], other: Sequence[Array]) -> SignCheck:
    """Are more ratings missing on one side? Positive: deliberations with more missing in ``one``.

    Args:
        one, other: one array [members] or [members, statements] a deliberation, NaN where missing: arm A and arm B,
            or first and second shown.
    """
    return sign_check(_by_deliberation(one, other, _missing_difference))


def _by_deliberation(one: Sequence[Array], other: Sequence[Array], measure: Callable[[Array, Array], float]) -> Array:
    """``measure`` of each deliberation's two arrays, [deliberations]."""
    if len(one) != len(other):
        raise InputError("deliberations", (len(one), len(other)), "must be the same on both sides")
    pairs = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in zip(one, other)]
    for k, (x, y) in enumerate(pairs):
        if len(x) != len(y):
            raise InputError(f"deliberations[{k}]", (len(x), len(y)), "must have the same members on both sides")
    return np.array([measure(x, y) for x, y in pairs], dtype=np.float64)


def _wins_minus_losses(first: Array, second: Array) -> float:
    signs = np.sign(first - second)
    return float(np.nansum(signs)) if not np.isnan(signs).all() else math.nan


def _missing_difference(one: Array, other: Array) -> float:
    return float(np.isnan(one).mean() - np.isnan(other).mean()) if one.size and other.size else math.nan


@dataclass(frozen=True)
class FixedHorizon:
    """A mean with its 95 % interval for a single look, to set beside the sequence. Not valid under peeking.

    Attributes:
        estimate: the mean; its interval is NaN where none can be given.
        method: ``descriptive`` (fewer than 10 deliberations: no interval), ``t`` (fewer than 40: n - 1 degrees of
            freedom, because the bootstrap is too short there), ``bootstrap`` over deliberations, ``wilson`` (win rates
            that are all equal), ``constant`` (differences that are all equal: no interval).
    """

    estimate: Estimate
    method: str


def fixed_horizon(
    values: Array, *, win_rate: bool = False, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> FixedHorizon:
    """The interval that a plan with one look at the end would give.

    Args:
        values: [deliberations], NaN where undefined (left out).
        win_rate: the values are outcomes from 0 to 1; Wilson's interval then serves where all are equal, and the t
            interval is cut to 0 and 1.
        draws, seed: of the bootstrap.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    n, mean = len(values), float(values.mean()) if len(values) else math.nan
    if n < DESCRIPTIVE_BELOW:
        return FixedHorizon(Estimate(mean, math.nan, math.nan, n), "descriptive")
    if np.all(values == values[0]):
        low, high = wilson_interval(mean, n) if win_rate else (math.nan, math.nan)
        return FixedHorizon(Estimate(mean, low, high, n), "wilson" if win_rate else "constant")
    if n < T_BELOW:
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
        low, high = (max(0.0, mean - half), min(1.0, mean + half)) if win_rate else (mean - half, mean + half)
        return FixedHorizon(Estimate(mean, low, high, n), "t")
    return FixedHorizon(mean_estimates(values[:, None], bootstrap_counts(n, draws=draws, seed=seed))[0], "bootstrap")


def holm(p_values: Array) -> Array:
    """Holm's correction for several measures: adjusted p-values, to hold against alpha; NaN stays NaN.

    Sorted upwards, the k-th of n (from 0) is multiplied by n - k, then never lower than the one before, at most 1.

    Args:
        p_values: [measures]; under peeking, from ``sequences.anytime_p``.

    Raises:
        InputError: one outside 0 to 1.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    bad = p_values[(p_values < 0) | (p_values > 1)]
    if len(bad):
        raise InputError("p_values", float(bad[0]), "must be from 0 to 1")
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    raised = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted
