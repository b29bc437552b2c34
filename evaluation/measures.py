"""Every measure the comparison uses, as pure numpy functions.

Conventions (``reference/datasets-and-measures.md``): shares are numbers from 0 to 1, chance is 0.5; a value that is
not defined is NaN, never 0, and is left out of means and counted by the caller. The unit of every interval is the
deliberation, because the ratings inside one are dependent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

AGREES = 5.0
"""A member agrees with a statement from this rating on: "somewhat agree". A neutral 4 breaks unanimity."""

BOOTSTRAP_DRAWS = 10_000
"""Resamplings of the deliberations behind every interval."""

MAX_UNDEFINED_DRAWS = 0.01
"""More undefined resamplings than this share, and no interval is reported."""


@dataclass(frozen=True)
class Estimate:
    """A mean over deliberations with its 95 % interval.

    Attributes:
        value: the mean over the deliberations where it is defined; NaN if there are none.
        low, high: percentiles 2.5 and 97.5; NaN where no interval can be given.
        n: number of deliberations it is defined on.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap_counts(n: int, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> Array:
    """How often each of ``n`` deliberations appears in each resampling with replacement.

    One matrix serves every measure of a comparison, so all intervals rest on the same resamplings.

    Returns:
        float32 [draws, n]; every row sums to ``n``.
    """
    if n < 1:
        raise ValueError(f"n = {n}: a bootstrap needs at least one deliberation")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=draws).astype(np.float32)


def mean_estimates(values: Array, counts: Array, *, block: int = 1000) -> list[Estimate]:
    """Mean and percentile bootstrap interval of each column.

    Args:
        values: [deliberations, measures], NaN where undefined.
        counts: [draws, deliberations] from ``bootstrap_counts``.
        block: draws multiplied at a time, which bounds the memory.

    Returns:
        One ``Estimate`` a column. Draws in which a column is undefined are dropped; if they are more than 1 %, the
        interval is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != counts.shape[1]:
        raise ValueError(f"values {values.shape} do not fit counts {counts.shape}")
    defined = ~np.isnan(values)
    filled, present = np.where(defined, values, 0.0), defined.astype(np.float64)
    means = np.empty((len(counts), values.shape[1]))
    with np.errstate(invalid="ignore"):
        for start in range(0, len(counts), block):
            rows = counts[start : start + block].astype(np.float64)
            means[start : start + block] = (rows @ filled) / (rows @ present)
    return [_estimate(values[defined[:, k], k], means[:, k]) for k in range(values.shape[1])]


def _estimate(values: Array, draws: Array) -> Estimate:
    """One column: its defined ``values`` and its mean in each draw, NaN where the draw holds none of them."""
    undefined = np.isnan(draws)
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    if undefined.mean() > MAX_UNDEFINED_DRAWS:
        return Estimate(float(values.mean()), math.nan, math.nan, len(values))
    low, high = np.percentile(draws[~undefined], [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share out of ``n``; both ends NaN for ``n = 0``.

    Stands in for the bootstrap where all outcomes are equal, which would give an interval of no width.
    """
    if n == 0:
        return math.nan, math.nan
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding leaves no share outside


def wins(a: Array, b: Array) -> Array:
    """1 where ``a`` beats ``b``, 0 where it loses, 1/2 at exact ties, NaN where either is undefined.

    Args:
        a, b: one value a deliberation, e.g. the gold mean agreement of the group.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, (np.sign(a - b) + 1) / 2)


def win_rates(outcomes: Array, counts: Array) -> list[Estimate]:
    """Win rate and interval of each column of outcomes in [0, 1].

    Cluster bootstrap over deliberations; Wilson's interval where all outcomes are equal.
    """
    estimates = mean_estimates(outcomes, counts)
    for k, e in enumerate(estimates):
        column = outcomes[~np.isnan(outcomes[:, k]), k]
        if len(column) and np.all(column == column[0]):
            estimates[k] = Estimate(e.value, *wilson_interval(e.value, e.n), e.n)
    return estimates


def unanimous(agreement: Array) -> Array:
    """1.0 where every member's agreement is at least ``AGREES``, else 0.0.

    Args:
        agreement: gold ratings [members, statements], floats from 1 to 7, without rating noise, not rounded.

    Returns:
        [statements].
    """
    happy: Array = np.all(np.asarray(agreement) >= AGREES, axis=0)
    return happy.astype(np.float64)


def words(text: str) -> int:
    """Length of a text in words (runs of non-space characters)."""
    return len(text.split())


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words as a share of all such pairs; NaN if no text has two words.

    Falls when a policy says the same thing every time.
    """
    pairs = [pair for text in texts for pair in _neighbours(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def _neighbours(tokens: list[str]) -> list[tuple[str, str]]:
    return list(zip(tokens, tokens[1:], strict=False))


def kl_best_of_n(n: int) -> float:
    """KL divergence of best-of-n from the policy it samples: log n - (n - 1)/n, in nats per response.

    Exact for continuous scores, an upper bound where scores can tie (Stiennon et al. 2020).
    """
    if n < 1:
        raise ValueError(f"n = {n}: must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Array, n: int) -> Array:
    """Probability that each of N pooled candidates wins best-of-n in a random subset of size n.

    Args:
        scores: [N], what the selection goes by (predicted welfare).
        n: size of the subset, 1 to N.

    Returns:
        [N], sums to 1. The k-th smallest score (k from 1) wins with C(k-1, n-1)/C(N, n); equal scores share their
        probability evenly. ``weights @ gold`` is the unbiased estimate of the gold value of best-of-n (no
        resampling, so no noise of its own).
    """
    scores = np.asarray(scores, dtype=np.float64)
    size = len(scores)
    if not 1 <= n <= size:
        raise ValueError(f"n = {n}: must be from 1 to the {size} candidates of the pool")
    by_rank = np.array([math.comb(k, n - 1) / math.comb(size, n) for k in range(size)])
    weights = np.empty(size)
    weights[np.argsort(scores, kind="stable")] = by_rank
    _, tied = np.unique(scores, return_inverse=True)
    shared: Array = np.bincount(tied, weights) / np.bincount(tied)
    return shared[tied]


def expected_win(a: Array, a_weights: Array, b: Array, b_weights: Array) -> float:
    """Chance that a draw of ``a`` beats an independent draw of ``b``, ties 1/2.

    Args:
        a, b: gold values of two pools of candidates.
        a_weights, b_weights: chance of each candidate to be the arm's statement.
    """
    return float(a_weights @ wins(a[:, None], b[None, :]) @ b_weights)


def correlation(x: Array, y: Array) -> float:
    """Pearson correlation of two flat arrays; NaN if either is constant or shorter than two."""
    x, y = np.ravel(x).astype(np.float64), np.ravel(y).astype(np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def share_of_ceiling(accuracy: float, ceiling: float) -> float:
    """How far an accuracy is from chance (0.5, gives 0) to its ceiling (gives 1); NaN for a ceiling of chance."""
    return (accuracy - 0.5) / (ceiling - 0.5) if ceiling > 0.5 else math.nan
