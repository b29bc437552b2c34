"""How wrong a utility may be: standard deviations and 90 % intervals, fitted to statements rated twice."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberation.types import RATING_SCALE, InputError
from reward.calibration import Calibration

Z_90 = 1.6448536
"""Half the 90 % interval of a normal distribution in standard deviations."""


@dataclass(frozen=True)
class Uncertainty:
    """Ensemble's scores -> standard deviation of a utility: sd^2 = tau^2 + (du/ds)^2 (rho^2 + kappa^2 var_k(s_k)).

    One part of the error is the same everywhere (tau), one is an error of the score (rho), and one of the score where
    the ensemble disagrees (kappa). The slope of the calibration carries the latter two over to the utility (delta
    method), so they shrink where the scale ends.

    Attributes:
        tau: >= 0, on the 1 to 7 scale.
        rho: >= 0, in units of the score.
        kappa: >= 0, no unit; 1 takes the ensemble's spread as it is.
        width: >= 0, half the 90 % interval in standard deviations. Most errors are small and a few large (a statement
            misread), so it is less than a normal distribution's 1.645.

    Raises:
        InputError: field ``tau``, ``rho``, ``kappa`` or ``width``.
    """

    tau: float = 0.0
    rho: float = 0.0
    kappa: float = 1.0
    width: float = Z_90

    def __post_init__(self) -> None:
        for name in ("tau", "rho", "kappa", "width"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(name, getattr(self, name), "must be a finite number, 0 or more")

    def sd(self, calibration: Calibration, scores: ArrayLike, ensemble: ArrayLike) -> NDArray[np.float64]:
        """Standard deviations on the 1 to 7 scale: scores [...], the heads' scores [..., heads] -> [...]."""
        parts = np.square([self.tau, self.rho, self.kappa])
        return np.sqrt(_parts_of_variance(calibration, scores, ensemble) @ parts)

    def interval(self, utilities: ArrayLike, sd: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of the 90 % intervals of utilities [...] with standard deviations [...], cut to the scale 1 to 7."""
        u, half = np.asarray(utilities, dtype=np.float64), self.width * np.asarray(sd, dtype=np.float64)
        return np.maximum(u - half, RATING_SCALE[0]), np.minimum(u + half, RATING_SCALE[-1])

    @classmethod
    def fit(
        cls, calibration: Calibration, scores: ArrayLike, ensemble: ArrayLike, first: ArrayLike, second: ArrayLike
    ) -> Uncertainty:
        """From two ratings of each row by the same member, which share the member's mind but not the noise of the hand.

        E[(r1 - u)(r2 - u)] is then the squared error of the utility against the noise-free rating. The three parts are
        fitted to it by least squares, none below 0; ``width`` by ``error_width``. Where there is no error to be seen,
        the ensemble's own spread is taken and a warning says so.

        Raises:
            InputError: field ``second_ratings``, if they do not match.
        """
        s, r1, r2 = (np.asarray(x, dtype=np.float64) for x in (scores, first, second))
        if not s.shape == r1.shape == r2.shape or s.size == 0:
            raise InputError("second_ratings", r2.shape, f"give one a first rating ({r1.shape[0]})")
        u = calibration.utilities(s)
        parts = nonnegative_least_squares(_parts_of_variance(calibration, s, ensemble), (r1 - u) * (r2 - u))
        if not parts.any():
            warnings.warn("two ratings of a statement show no error of the utilities; give more of them", stacklevel=2)
            return cls()
        fitted = cls(*(float(part) for part in np.sqrt(parts)))
        return replace(fitted, width=error_width(r1 - u, r2 - u, fitted.sd(calibration, s, ensemble)))


def _parts_of_variance(calibration: Calibration, scores: ArrayLike, ensemble: ArrayLike) -> NDArray[np.float64]:
    """What tau^2, rho^2 and kappa^2 are multiplied with: scores [...] -> [..., 3]."""
    slope = calibration.utility_slopes(scores) ** 2
    spread = np.asarray(ensemble, dtype=np.float64).var(axis=-1, ddof=1)
    return np.stack([np.ones_like(slope), slope, slope * spread], axis=-1)


def nonnegative_least_squares(design: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """min |design x - target| over x >= 0, for a design [n, k] with few columns: every set of free ones is tried."""
    columns = range(design.shape[1])
    best, error = np.zeros(len(columns)), float(target @ target)
    for free in (list(c) for size in columns for c in combinations(columns, size + 1)):
        x = np.zeros(len(columns))
        x[free] = np.linalg.lstsq(design[:, free], target, rcond=None)[0]
        residual = float(((design @ x - target) ** 2).sum())
        if (x >= 0).all() and residual < error:
            best, error = x, residual
    return best


def error_width(first: ArrayLike, second: ArrayLike, sd: ArrayLike, steps: int = 300) -> float:
    """Half the 90 % interval, in standard deviations, of the error that two noisy differences [n] share.

    The error is a mixture of a narrow and a wide normal distribution, each a multiple of ``sd`` [n]; the noise of a
    rating is normal and independent. Maximum likelihood by expectation-maximisation (Dempster et al. 1977).
    """
    z1, z2, scale = (np.asarray(x, dtype=np.float64) for x in (first, second, sd))
    scale = np.maximum(scale, 1e-6)
    noise = max(float(((z1 - z2) ** 2).mean() / 2), 1e-6)
    shares, factors = np.array([0.7, 0.3]), np.array([0.5, 1.6])
    for _ in range(steps):
        # 1. Which component each row is of: only the sum of both differences tells
        variance = (factors[:, None] * scale) ** 2
        logs = np.log(shares)[:, None] - 0.5 * (
            (z1 + z2) ** 2 / (2 * (2 * variance + noise)) + np.log(2 * variance + noise)
        )
        parts = np.exp(logs - np.logaddexp(*logs))
        # 2. Shares, and each component's size from the error's second moment given both differences
        shares = parts.mean(axis=1)
        moment = (variance * (z1 + z2) / (2 * variance + noise)) ** 2 + variance * noise / (2 * variance + noise)
        factors = np.sqrt((parts * moment / scale**2).sum(axis=1) / parts.sum(axis=1))
    return _quantile_of_mixture(0.9, shares, factors)


def _quantile_of_mixture(level: float, shares: NDArray[np.float64], factors: NDArray[np.float64]) -> float:
    """The m for which a mixture of centred normals lies within -m..m with probability ``level``, by bisection."""
    low, high = 0.0, 10 * float(factors.max())
    for _ in range(80):
        middle = (low + high) / 2
        inside = sum(share * math.erf(middle / (f * math.sqrt(2))) for share, f in zip(shares, factors, strict=True))
        low, high = (middle, high) if inside < level else (low, middle)
    return (low + high) / 2
