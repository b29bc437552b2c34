"""Measures of a predictor on votes, with 95 % bootstrap intervals over persons. Pure: arrays in, numbers out.

Every measure is computed for a matrix of person weights [draws, persons] at once: a row of ones gives the value, rows
of ``person_weights`` give its resamplings. All measures of a split share one matrix, so differences are paired.
Shares lie in 0..1 and chance is 0.5. What is not defined is NaN here and null in JSON, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.measures import MAX_UNDEFINED_DRAWS, bootstrap_counts

Array = NDArray[np.float64]

BINS = 10
MIN_PER_BIN = 20
"""Fewer votes than this a bin, and there are fewer bins."""

MIN_PERSONS = 10
"""Fewer persons than this, and a value is descriptive only: no interval."""

_BLOCK = 16_000_000
"""Numbers (draws x votes) held at a time; bounds the memory, not the result."""


@dataclass(frozen=True)
class Sampled:
    """A measure and its resamplings.

    Attributes:
        value: on all persons; NaN if undefined.
        draws: [draws], NaN where a resampling leaves it undefined.
        persons: how many persons it rests on.
    """

    value: float
    draws: Array
    persons: int

    def __sub__(self, other: Sampled) -> Sampled:
        """The paired difference: draw k of both is the same resampling of persons."""
        return Sampled(self.value - other.value, self.draws - other.draws, min(self.persons, other.persons))

    def to_dict(self, *, biased_up: bool = False) -> dict[str, Any]:
        """``value``, ``low``, ``high`` (percentiles 2.5 and 97.5), ``persons``, ``undefined_draws``; None: undefined.

        Args:
            biased_up: the measure is a mean of absolute values, which resampling noise only raises; the interval is
                then stretched down to the value.
        """
        undefined = int(np.isnan(self.draws).sum())
        low = high = math.nan
        enough = self.persons >= MIN_PERSONS and undefined <= MAX_UNDEFINED_DRAWS * len(self.draws)
        if enough and not math.isnan(self.value):
            low, high = np.nanpercentile(self.draws, [2.5, 97.5]).tolist()
            low = min(low, self.value) if biased_up else low
        found = {"value": defined(self.value), "low": defined(low), "high": defined(high), "persons": self.persons}
        return {**found, "undefined_draws": undefined} if undefined else found


def defined(value: float) -> float | None:
    """None for NaN, else the value to six decimals."""
    return None if math.isnan(value) else round(float(value), 6)


def person_weights(persons: int, *, draws: int, seed: int) -> Array:
    """float64 [1 + draws, persons]: ones, then how often each person is in each resampling with replacement."""
    counts = bootstrap_counts(persons, draws=draws, seed=seed).astype(np.float64)
    return np.concatenate([np.ones((1, persons)), counts])


def mean_of(values: ArrayLike, person: ArrayLike, weights: Array) -> Sampled:
    """Mean over rows (votes, choices): values [n], whose row it is [n]."""
    x, owner = np.asarray(values, dtype=np.float64), np.asarray(person, dtype=np.int64)
    size = weights.shape[1]
    return _ratio(np.bincount(owner, x, size), np.bincount(owner, minlength=size), weights)


def mean_over_persons(values: ArrayLike, weights: Array) -> Sampled:
    """Mean over persons: values [persons], NaN where a person has none."""
    x = np.asarray(values, dtype=np.float64)
    return _ratio(np.where(np.isnan(x), 0.0, x), ~np.isnan(x), weights)


def auc(scores: ArrayLike, labels: ArrayLike, person: ArrayLike, weights: Array) -> Sampled:
    """Area under the ROC curve over all votes: chance that an agree outscores a disagree, ties one half.

    Args:
        scores, labels, person: one a vote, [n]; labels 0 or 1.
    """
    s, y, owner = np.asarray(scores, dtype=np.float64), np.asarray(labels), np.asarray(person, dtype=np.int64)
    if not len(s):
        return _undefined(weights)
    order = np.argsort(s, kind="stable")
    starts = np.flatnonzero(np.diff(s[order], prepend=-np.inf))  # where a new score begins
    positive, owner = y[order] == 1, owner[order]
    found = np.empty(len(weights))
    step = max(1, _BLOCK // len(s))
    for first in range(0, len(weights), step):
        block = weights[first : first + step, owner]
        agree = np.add.reduceat(np.where(positive, block, 0.0), starts, axis=1)
        disagree = np.add.reduceat(np.where(positive, 0.0, block), starts, axis=1)
        below = np.cumsum(disagree, axis=1) - disagree / 2
        total = agree.sum(1) * disagree.sum(1)
        found[first : first + step] = _divide((agree * below).sum(1), total)
    return Sampled(float(found[0]), found[1:], len(np.unique(owner)))


def pair_shares(scores: ArrayLike, labels: ArrayLike, person: ArrayLike, group: ArrayLike, persons: int) -> Array:
    """Each person's share of (agree, disagree) pairs with the agree scored higher, ties one half: [persons].

    Args:
        group: pairs lie within one group (a profile: one person on one question); a person's groups are pooled.

    Returns:
        NaN for persons without a pair.
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    owner, groups = np.asarray(person, dtype=np.int64), np.asarray(group)
    right, all_pairs = np.zeros(persons), np.zeros(persons)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        agree, disagree = s[rows[y[rows] == 1]], s[rows[y[rows] == 0]]
        if len(agree) and len(disagree):
            right[owner[rows[0]]] += ((np.sign(agree[:, None] - disagree[None, :]) + 1) / 2).sum()
            all_pairs[owner[rows[0]]] += len(agree) * len(disagree)
    return _divide(right, all_pairs)


def bin_numbers(probabilities: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Number of each vote's equal-mass bin, 0 ..; equal probabilities share a bin, so bins can be fewer."""
    p = np.asarray(probabilities, dtype=np.float64)
    number = min(bins, max(1, len(p) // MIN_PER_BIN))
    edges = np.unique(np.quantile(p, np.arange(1, number) / number)) if len(p) and number > 1 else np.empty(0)
    return np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1].astype(np.int64)


def calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, person: ArrayLike, weights: Array, bins: int = BINS
) -> Sampled:
    """Expected calibration error: mean over equal-mass bins of |mean P - share of agrees|, weighted by votes.

    The bins are those of all persons in every resampling.
    """
    p, y, owner = np.asarray(probabilities, dtype=np.float64), np.asarray(labels), np.asarray(person, dtype=np.int64)
    if not len(p):
        return _undefined(weights)
    place = bin_numbers(p, bins)
    surplus = np.zeros((weights.shape[1], place.max() + 1))
    np.add.at(surplus, (owner, place), p - y)
    counts = np.bincount(owner, minlength=weights.shape[1])
    found = _divide(np.abs(weights @ surplus).sum(1), weights @ counts)
    return Sampled(float(found[0]), found[1:], len(np.unique(owner)))


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[dict[str, float]]:
    """``predicted`` (mean P), ``observed`` (share of agrees) and ``votes`` of each equal-mass bin, ascending."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    place = bin_numbers(p, bins)
    rows = [np.flatnonzero(place == k) for k in range(int(place.max()) + 1)] if len(p) else []
    return [
        {"predicted": round(float(p[r].mean()), 6), "observed": round(float(y[r].mean()), 6), "votes": len(r)}
        for r in rows
    ]


def histogram(probabilities: ArrayLike, bins: int = 20) -> list[int]:
    """Votes in each of ``bins`` equal-width bins of 0..1."""
    counts: list[int] = np.histogram(np.asarray(probabilities), bins=bins, range=(0.0, 1.0))[0].tolist()
    return counts


def length_slope(
    scores: ArrayLike, lengths: ArrayLike, labels: ArrayLike, person: ArrayLike, weights: Array
) -> Sampled:
    """Partial correlation (-1..1) of score with statement length given the label: 0 is no length bias beyond votes'."""
    s, x = (np.asarray(v, dtype=np.float64) for v in (scores, lengths))
    y, owner = np.asarray(labels), np.asarray(person, dtype=np.int64)
    if not len(s):
        return _undefined(weights)
    s, x = s - s.mean(), x - x.mean()  # sums of squares then lose no digits
    within = np.zeros((3, len(weights)))
    for label in (0, 1):
        rows = y == label
        columns = [np.ones(rows.sum()), s[rows], x[rows], s[rows] ** 2, x[rows] ** 2, s[rows] * x[rows]]
        n, a, b, aa, bb, ab = (weights @ np.bincount(owner[rows], c, weights.shape[1]) for c in columns)
        n = np.maximum(n, 1.0)  # a label nobody gave adds nothing
        within += np.stack([aa - a * a / n, bb - b * b / n, ab - a * b / n])
    spread = np.sqrt(np.maximum(within[0], 0.0) * np.maximum(within[1], 0.0))
    floor = 1e-12 * len(s) * math.sqrt(float((s**2).mean() * (x**2).mean()))
    found = _divide(within[2], np.where(spread > floor, spread, 0.0))
    return Sampled(float(found[0]), found[1:], len(np.unique(owner)))


def right_choices(preferred: ArrayLike, other: ArrayLike) -> Array:
    """1 where the chosen statement is scored higher than the rejected one, 1/2 at ties, else 0: [choices]."""
    difference = np.asarray(preferred, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return (np.sign(difference) + 1) / 2


def average(samples: list[Sampled]) -> Sampled:
    """The mean of several measures on the same persons, e.g. of the draws of a control."""
    values, draws = [s.value for s in samples], np.stack([s.draws for s in samples])
    return Sampled(float(np.mean(values)), draws.mean(0), min(s.persons for s in samples))


def _ratio(sums: ArrayLike, counts: ArrayLike, weights: Array) -> Sampled:
    found = _divide(weights @ np.asarray(sums), weights @ np.asarray(counts, dtype=np.float64))
    return Sampled(float(found[0]), found[1:], int(np.count_nonzero(counts)))


def _divide(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _undefined(weights: Array) -> Sampled:
    return Sampled(math.nan, np.full(len(weights) - 1, np.nan), 0)
