"""Welfare: the utilities of a group's members as one number (numpy alone).

The isoelastic power mean of Bakker et al. 2022 (arXiv 2211.15006, section 2.3), with member weights w, sum w = 1:

    W_a(u) = (sum_i w_i u_i^(1-a))^(1/(1-a)),   a = 1: exp(sum_i w_i log u_i),   a = inf: min_i u_i

``a`` (alpha) is the inequality aversion, in [0, inf]. W has the unit of u and lies between min u and max u.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberation.types import InputError

ALPHAS = {"utilitarian": 0.0, "nash": 1.0, "rawlsian": math.inf}
"""The named welfare functions and their inequality aversion."""

_NEAR_ONE = 1e-6
"""Closer to 1 than this, alpha gets the geometric mean: the power form would divide rounding errors by ~0."""


def parse_alpha(welfare: str | float) -> float:
    """Inequality aversion from a name (``nash``), a number or a numeric string (``"0.5"``, ``"inf"``).

    Raises:
        InputError: field ``welfare``, on an unknown name, a negative number or NaN.
    """
    mend = f"must be one of {', '.join(ALPHAS)}, or a number from 0 to inf"
    if isinstance(welfare, str) and welfare.strip().lower() in ALPHAS:
        return ALPHAS[welfare.strip().lower()]
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
    utilities: ArrayLike, alpha: str | float, weights: Sequence[float] | None = None
) -> float | NDArray[np.float64]:
    """Welfare of one statement (utilities [members] -> float) or of many ([members, statements] -> [statements]).

    Domain: any finite utility for alpha 0 and inf; for every other alpha utilities must not be negative. A utility
    of exactly 0 with alpha >= 1 gives the limit, 0, and a warning.

    Args:
        utilities: members along the first axis.
        alpha: inequality aversion, or a name; see ``parse_alpha``.
        weights: one number >= 0 a member, any positive sum; a member of weight 0 does not count. None: equal.

    Raises:
        InputError: field ``utilities`` (empty, not finite, wrong shape, negative), ``weights`` or ``welfare``.
    """
    a = parse_alpha(alpha)
    u = np.asarray(utilities, dtype=np.float64)
    if u.ndim not in (1, 2):
        raise InputError("utilities", u.shape, "must have shape [members] or [members, statements]")
    if u.shape[0] == 0:
        raise InputError("utilities", u.shape, "the group is empty; give at least one member")
    if not np.isfinite(u).all():
        raise InputError("utilities", float(u[~np.isfinite(u)][0]), "must be finite")
    w = _shares(weights, u.shape[0])
    u, w = u[w > 0], w[w > 0]
    columns = u if u.ndim == 2 else u[:, None]
    result = np.clip(_power_mean(columns, w, a), columns.min(axis=0), columns.max(axis=0))  # rounding stays inside
    return result if u.ndim == 2 else float(result[0])


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
