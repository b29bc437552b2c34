"""Welfare: the utilities of a group's members as one number (numpy alone).

Of members' utilities u with weights w (sum 1):

* *isoelastic*, by inequality aversion a in [0, inf] (Bakker et al. 2022, arXiv 2211.15006, section 2.3):
  W_a(u) = (sum_i w_i u_i^(1-a))^(1/(1-a)), a = 1: exp(sum_i w_i log u_i), a = inf: min_i u_i.
  ``utilitarian`` (0), ``nash`` (1), ``rawlsian`` (inf).
* ``p10``, for large groups: the lower 10 % quantile, the smallest u such that members of a tenth of the weight have
  u or less. In a group of ten or fewer equal members it is the minimum.
* ``trimmed``, of bounded influence: the mean of what is left when a tenth of the weight is cut off at either end
  (Huber 1981, *Robust Statistics*, section 3.3). Members of at most a tenth of the weight cannot move it beyond the
  others, whatever they say.
* ``worst_cluster``: the lowest mean of any cluster of members (max-min over groups, Chakraborty et al. 2024,
  arXiv 2402.08925).

Each has the unit of u and lies between min u and max u. What each keeps (tests/reward/test_welfare_axioms.py):

| axiom | isoelastic | p10 | trimmed | worst_cluster |
|---|---|---|---|---|
| anonymity: who holds a utility does not matter | yes | yes | yes | only inside a cluster |
| neutrality: a statement's welfare is its own | yes | yes | yes | yes |
| monotone: nobody's gain lowers it | yes | yes | yes | yes |
| weak Pareto: everybody's gain raises it | yes | yes | yes | yes |
| strict Pareto: anybody's gain raises it | finite a, u > 0 | no | no | no |
| replication: k copies of each member change nothing | yes | yes | yes | yes |
| scale: W(c u) = c W(u), c > 0 | yes | yes | yes | yes |
| shift: W(u + c) = W(u) + c | a = 0, inf | yes | yes | yes |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberation.types import RATING_SCALE, InputError

ALPHAS = {"utilitarian": 0.0, "nash": 1.0, "rawlsian": math.inf}
"""The named isoelastic functions and their inequality aversion."""
FUNCTIONS = (*ALPHAS, "p10", "trimmed", "worst_cluster")
"""Every welfare function that has a name."""
TAIL = 0.1
"""Share of the members' weight below ``p10``, and cut off at either end by ``trimmed``."""

LOWEST_UTILITY = float(RATING_SCALE[0])
"""The lower end of the scale: what an empty statement is worth to every member, and no lower bound falls below it."""

_NEAR_ONE = 1e-6
"""Closer to 1 than this, alpha gets the geometric mean: the power form would divide rounding errors by ~0."""
_ROUNDING = 1e-9
"""What cumulated shares may miss by."""


def parse_welfare(welfare: str | float, *, clusters: bool = True) -> str | float:
    """A welfare function: inequality aversion of the isoelastic ones, else the name.

    Args:
        welfare: a name of ``FUNCTIONS``, a number from 0, or a numeric string (``"0.5"``, ``"inf"``).
        clusters: whether the caller knows the members' clusters; without them ``worst_cluster`` is refused.

    Raises:
        InputError: field ``welfare``, on an unknown name, a negative number or NaN.
    """
    known = FUNCTIONS if clusters else tuple(name for name in FUNCTIONS if name != "worst_cluster")
    mend = f"must be one of {', '.join(known)}, or a number from 0 to inf"
    if isinstance(welfare, str) and (name := welfare.strip().lower()) in known:
        return ALPHAS.get(name, name)
    if isinstance(welfare, bool):
        raise InputError("welfare", welfare, mend)
    try:
        alpha = float(welfare)
    except (TypeError, ValueError):
        raise InputError("welfare", welfare, mend) from None
    if not alpha >= 0:  # written so that NaN is refused too
        raise InputError("welfare", welfare, mend)
    return alpha


def welfare(
    utilities: ArrayLike,
    function: str | float,
    weights: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> float | NDArray[np.float64]:
    """Welfare of one statement (utilities [members] -> float) or of many ([members, statements] -> [statements]).

    Domain: any finite utility, but for isoelastic functions other than alpha 0 and inf utilities must not be negative.
    A utility of exactly 0 with alpha >= 1 gives the limit, 0, and a warning.

    Args:
        utilities: members along the first axis.
        function: a name, or an inequality aversion; see ``parse_welfare``.
        weights: one number >= 0 a member, any positive sum; a member of weight 0 does not count. None: equal.
        clusters: one label a member, needed by ``worst_cluster`` and not read by the others.

    Raises:
        InputError: field ``utilities`` (empty, not finite, wrong shape, negative), ``weights``, ``clusters`` or
            ``welfare``.
    """
    chosen = parse_welfare(function)
    u = np.asarray(utilities, dtype=np.float64)
    if u.ndim not in (1, 2):
        raise InputError("utilities", u.shape, "must have shape [members] or [members, statements]")
    if u.shape[0] == 0:
        raise InputError("utilities", u.shape, "the group is empty; give at least one member")
    if not np.isfinite(u).all():
        raise InputError("utilities", float(u[~np.isfinite(u)][0]), "must be finite")
    w = _shares(weights, u.shape[0])
    labels = _labels(clusters, u.shape[0]) if chosen == "worst_cluster" else None
    counted = w > 0
    columns, w = (u if u.ndim == 2 else u[:, None])[counted], w[counted]
    with np.errstate(over="ignore"):  # shares that sum to 1 + 1e-16 overflow at the end of float64; the clip mends it
        if labels is not None:
            result = _worst_cluster(columns, w, labels[counted])
        elif chosen == "p10":
            result = _quantile(columns, w, TAIL)
        elif chosen == "trimmed":
            result = _trimmed_mean(columns, w, TAIL)
        else:
            result = _power_mean(columns, w, float(chosen))
    result = np.clip(result, columns.min(axis=0), columns.max(axis=0))  # rounding stays inside
    return result if u.ndim == 2 else float(result[0])


def check_uncertainty_penalty(penalty: float) -> float:
    """Return ``penalty`` if it is a finite number, 0 or more; InputError otherwise."""
    if not 0 <= penalty < float("inf"):
        raise InputError("uncertainty_penalty", penalty, "must be a finite number, 0 or more")
    return penalty


def lower_utilities(
    utilities: NDArray[np.float64], sd: NDArray[np.float64] | None, penalty: float
) -> tuple[NDArray[np.float64], float]:
    """Lower confidence bounds mean - penalty * sd, not below the scale's end, and the share that had to be clamped.

    The bound is a member's own, taken before welfare (Coste et al. 2023, arXiv 2310.02743, subtract the variance).

    Raises:
        InputError: field ``uncertainty_penalty``, if there are no standard deviations.
    """
    if sd is None:
        mend = "needs a preference model with an ensemble; fit one with heads: 4, or set it to 0"
        raise InputError("uncertainty_penalty", penalty, mend)
    bounds = utilities - penalty * sd
    return np.maximum(bounds, LOWEST_UTILITY), float((bounds < LOWEST_UTILITY).mean())


def _labels(clusters: Sequence[Hashable] | None, members: int) -> NDArray[np.int64]:
    """Cluster labels [members] as numbers."""
    if clusters is None or len(clusters) != members:
        given = None if clusters is None else f"{len(clusters)} labels"
        raise InputError("clusters", given, f"worst_cluster needs one label a member ({members})")
    numbers = {label: k for k, label in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[label] for label in clusters], dtype=np.int64)


def _shares(weights: Sequence[float] | None, members: int) -> NDArray[np.float64]:
    """Weights [members] that sum to 1."""
    if weights is None:
        return np.full(members, 1.0 / members)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (members,):
        raise InputError("weights", list(np.ravel(w)), f"give one weight a member ({members})")
    if not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise InputError("weights", list(w), "must be finite numbers >= 0 with a positive sum")
    w = w / w.max()  # before the sum, so that huge weights cannot overflow it
    return w / w.sum()


def _power_mean(u: NDArray[np.float64], w: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """W_a of utilities u [members, statements], positive weights w [members] of sum 1 -> [statements]."""
    if a == 0:
        return w @ u
    if math.isinf(a):
        return u.min(axis=0)
    if (u < 0).any():
        raise InputError("utilities", float(u.min()), f"must not be negative for alpha = {a:g}; map the scores first")
    if a >= 1 and (u == 0).any():
        warnings.warn(f"a utility is 0, so welfare with alpha = {a:g} is 0", stacklevel=3)
    with np.errstate(divide="ignore"):
        logs = np.log(u)
    if abs(1 - a) < _NEAR_ONE:
        return np.exp(w @ logs)
    # log-sum-exp around the member that dominates the sum: the worst-off for a > 1, the best-off for a < 1
    pivot = logs.min(axis=0) if a > 1 else logs.max(axis=0)
    zero = np.isneginf(pivot)  # all utilities 0 (a < 1), or one of them (a > 1): the limit is 0
    with np.errstate(divide="ignore", over="ignore"):  # an overflow is -inf in the exponent: that member adds 0
        total = w @ np.exp((1 - a) * (logs - np.where(zero, 0.0, pivot)))
        power_mean = np.exp(np.where(zero, 0.0, pivot) + np.log(total) / (1 - a))
    return np.where(zero, 0.0, power_mean)


def _cumulated(u: NDArray[np.float64], w: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Utilities [members, statements] in ascending order and the share of the weight up to each."""
    order = np.argsort(u, axis=0, kind="stable")
    return np.take_along_axis(u, order, axis=0), np.cumsum(w[order], axis=0)


def _quantile(u: NDArray[np.float64], w: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """The smallest utility that members of ``share`` of the weight do not exceed -> [statements]."""
    ascending, cumulated = _cumulated(u, w)
    first = (cumulated >= share - _ROUNDING).argmax(axis=0)
    return np.take_along_axis(ascending, first[None], axis=0)[0]


def _trimmed_mean(u: NDArray[np.float64], w: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Mean of the utilities between the ``share`` and ``1 - share`` quantiles, cut members counted in part."""
    ascending, cumulated = _cumulated(u, w)
    edges = np.vstack([np.zeros(u.shape[1]), cumulated])
    for cut in (share, 1 - share):  # a rest of 1e-17 of a member would let an outlier in
        edges[np.abs(edges - cut) < _ROUNDING] = cut
    edges = np.clip(edges, share, 1 - share)
    kept = np.diff(edges, axis=0) / (1 - 2 * share)
    return (kept * ascending).sum(axis=0)


def _worst_cluster(u: NDArray[np.float64], w: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The lowest of the clusters' mean utilities -> [statements]."""
    means = [w[labels == k] / w[labels == k].sum() @ u[labels == k] for k in np.unique(labels)]
    return np.min(means, axis=0)
