"""Made-up groups that rate two statements: what the sequential benchmark draws, and its exact truth.

The model of ``reference/serving.md`` 6.2: a rating is 4.2 + a group's effect (sd 0.8, common to both statements) + a
person's noise (sd 1.4, anew for each rating), rounded and cut to 1..7; statement A is ``shift`` better before rounding.
Simulated, never people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL, GROUP_SD, NOISE_SD = 4.2, 0.8, 1.4
MEMBERS = 5
NODES = 60
"""Of the quadrature over the group's effect."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What a shift means for one deliberation and for one member.

    Attributes:
        difference, difference_sd: of the group's mean paired difference, in rating points.
        win_rate, win_sd: of the outcome A wins 1, tie 1/2, B wins 0, by the group's mean.
        member_win_rate: the same for a single member's two ratings.
    """

    difference: float
    difference_sd: float
    win_rate: float
    win_sd: float
    member_win_rate: float


def truth(shift: float) -> Truth:
    """Exact up to the quadrature: the distribution of five members' summed differences, mixed over group effects."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    one, group = np.zeros(13), np.zeros(12 * MEMBERS + 1)
    for node, weight in zip(nodes, weights, strict=True):
        difference = np.convolve(_shares(LEVEL + shift + GROUP_SD * node), _shares(LEVEL + GROUP_SD * node)[::-1])
        one += weight * difference
        summed = difference
        for _ in range(MEMBERS - 1):
            summed = np.convolve(summed, difference)
        group += weight * summed
    values = np.arange(-6 * MEMBERS, 6 * MEMBERS + 1) / MEMBERS
    win, mean = _wins(group), float(group @ values)
    return Truth(
        difference=mean,
        difference_sd=math.sqrt(float(group @ (values - mean) ** 2)),
        win_rate=win,
        win_sd=math.sqrt(float(group @ ((np.sign(values) + 1) / 2 - win) ** 2)),
        member_win_rate=_wins(one),
    )


def shift_for(win_rate: float) -> float:
    """The shift at which A wins this share of the deliberations, ties one half; for shares from 0.5 to 0.99."""
    return float(optimize.brentq(lambda shift: truth(shift).win_rate - win_rate, 0.0, 4.0, xtol=1e-9))


def draw_ratings(shape: tuple[int, ...], shift: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Ratings of A and of B, [*shape, members], 1 to 7."""
    group = rng.normal(LEVEL, GROUP_SD, (*shape, 1))
    a = group + shift + rng.normal(0.0, NOISE_SD, (*shape, MEMBERS))
    b = group + rng.normal(0.0, NOISE_SD, (*shape, MEMBERS))
    return np.clip(np.rint(a), 1, 7), np.clip(np.rint(b), 1, 7)


def _shares(centre: float) -> Array:
    """Share of each rating 1 to 7 around ``centre``."""
    below = stats.norm.cdf((np.arange(1.5, 7) - centre) / NOISE_SD)
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def _wins(shares: Array) -> float:
    """Mass above the middle and half of the middle."""
    middle = len(shares) // 2
    return float(shares[middle + 1 :].sum() + shares[middle] / 2)
