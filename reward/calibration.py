"""From a preference model's score to P(rating) and utility (numpy; torch to fit)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from deliberation.types import RATING_SCALE, InputError

RATINGS = RATING_SCALE
"""What people answer with: ratings from 1 to 7 ..."""
VOTES = (1, 7)
"""... or votes, disagree and agree."""

_MIN_SLOPE = 1e-3
"""Smallest slope a fit may give, per standard deviation of the scores: utilities never fall as the score rises."""


@dataclass(frozen=True)
class Calibration:
    """Score -> distribution of the rating: P(r <= v_k) = sigmoid(c_k - slope * score) (cumulative logit).

    McCullagh 1980, "Regression models for ordinal data". Utility is the expected rating, so it lies in [1, 7] and
    means the same for every member.

    Attributes:
        cut_points: c_1 < c_2 < ..., one fewer than ``values``.
        slope: > 0, so that a higher score is never a lower utility.
        values: the ratings people could give, ascending: ``RATINGS`` (1 to 7), or ``VOTES``, where disagreement counts
            as 1 and agreement as 7, so that the utility of a vote is 1 + 6 P(agree).

    Raises:
        InputError: field ``cut_points``, ``slope`` or ``values``.
    """

    cut_points: tuple[float, ...]
    slope: float = 1.0
    values: tuple[int, ...] = RATINGS

    def __post_init__(self) -> None:
        if tuple(self.values) not in (RATINGS, VOTES):
            raise InputError("values", self.values, f"must be {RATINGS} or {VOTES}")
        cuts = np.asarray(self.cut_points, dtype=np.float64)
        if cuts.shape != (len(self.values) - 1,) or not np.isfinite(cuts).all() or (np.diff(cuts) <= 0).any():
            mend = f"must be {len(self.values) - 1} finite, increasing numbers"
            raise InputError("cut_points", self.cut_points, mend)
        if not (np.isfinite(self.slope) and self.slope > 0):
            raise InputError("slope", self.slope, "must be a finite number above 0")
        object.__setattr__(self, "cut_points", tuple(float(c) for c in cuts))
        object.__setattr__(self, "slope", float(self.slope))
        object.__setattr__(self, "values", tuple(self.values))

    def _at_most(self, scores: ArrayLike) -> NDArray[np.float64]:
        """P(r <= v_k) but for the highest value, where it is 1: scores [...] -> [..., values - 1]."""
        distance = np.asarray(self.cut_points) - self.slope * np.asarray(scores, dtype=np.float64)[..., None]
        return np.exp(-np.logaddexp(0.0, -distance))  # the sigmoid, without overflow

    def probabilities(self, scores: ArrayLike) -> NDArray[np.float64]:
        """P(r = k), k = 1..7: scores [...] -> [..., 7], each row of sum 1."""
        at_most = self._at_most(scores)
        found = np.zeros((*at_most.shape[:-1], len(RATING_SCALE)))
        found[..., np.array(self.values) - 1] = np.diff(at_most, axis=-1, prepend=0.0, append=1.0)
        return found

    def utilities(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Expected rating in [1, 7], scores [...] -> [...]."""
        return self.values[-1] - self._at_most(scores) @ np.diff(self.values).astype(np.float64)

    def utility_slopes(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Derivative of the utility by the score, scores [...] -> [...]; >= 0."""
        at_most = self._at_most(scores)
        return self.slope * ((at_most * (1 - at_most)) @ np.diff(self.values).astype(np.float64))

    def to_dict(self) -> dict[str, Any]:
        return {"cut_points": list(self.cut_points), "slope": self.slope, "values": list(self.values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of ``to_dict``.

        Raises:
            InputError: field ``calibration``, on a missing key.
        """
        for key in ("cut_points", "slope"):
            if key not in values:
                raise InputError("calibration", sorted(values), f"has no key {key!r}; fit the preference model again")
        # a model fitted before votes were read has no "values"
        return cls(tuple(values["cut_points"]), values["slope"], tuple(values.get("values", RATINGS)))

    @classmethod
    def of_ratings(cls, ratings: ArrayLike, values: tuple[int, ...] = RATINGS) -> Calibration:
        """Slope 1 and the cut-points at which a score of 0 gives the observed shares of the ratings.

        One more rating, spread evenly over ``values``, is counted, so that one never seen stays possible.
        """
        seen = _categories(ratings, values)
        counts = np.bincount(seen, minlength=len(values) + 1)[1:] + 1 / len(values)
        at_most = np.cumsum(counts)[:-1] / counts.sum()
        return cls(tuple(np.log(at_most / (1 - at_most))), values=values)

    @classmethod
    def fit(cls, scores: ArrayLike, ratings: ArrayLike, values: tuple[int, ...] = RATINGS) -> Calibration:
        """Maximum likelihood on scores [n] and ratings [n] (each one of ``values``), with one observation of prior.

        The prior is one more rating, spread evenly over ``values`` and over the mean score and one standard deviation
        to either side: it keeps the fit finite where a rating is never seen or scores separate ratings perfectly.
        If scores do not rise with ratings, the slope stays at its lower bound and a warning says so.

        Raises:
            InputError: on empty, not finite or unequal inputs.
        """
        y = _categories(ratings, values)
        s = np.asarray(scores, dtype=np.float64)
        if s.shape != y.shape or not np.isfinite(s).all():
            raise InputError("scores", s.shape, f"must be one finite number a rating ({y.shape[0]})")
        mean, spread = float(s.mean()), max(float(s.std()), 1e-6)
        cuts, slope = _maximum_likelihood(
            torch.tensor((s - mean) / spread), torch.tensor(y), cls.of_ratings(ratings, values)
        )
        if slope < 2 * _MIN_SLOPE:
            warnings.warn("scores do not rise with ratings; the preference model tells nothing", stacklevel=2)
        return cls(tuple(cuts + slope * mean / spread), slope / spread, values)


def _categories(ratings: ArrayLike, values: tuple[int, ...]) -> NDArray[np.int64]:
    """Ratings as their places among ``values``, from 1."""
    y = np.asarray(ratings)
    if y.ndim != 1 or y.size == 0 or not np.isin(y, values).all():
        raise InputError("ratings", y.shape, f"must be a non-empty list of {', '.join(map(str, values))}")
    return np.searchsorted(values, y) + 1


def ordinal_log_likelihood(scores: Tensor, ratings: Tensor, cut_points: Tensor, slope: Tensor | float) -> Tensor:
    """log P(r = rating) under the cumulative-logit model: scores [n], ratings [n] as places from 1 -> [n].

    Uses sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), exact where the difference would
    cancel. The outer categories have one bound only.
    """
    upper = cut_points[(ratings - 1).clamp(max=len(cut_points) - 1)] - slope * scores
    lower = cut_points[(ratings - 2).clamp(min=0)] - slope * scores
    top, bottom = ratings == len(cut_points) + 1, ratings == 1
    below = torch.where(top, 0.0, F.logsigmoid(upper))
    above = torch.where(bottom, 0.0, F.logsigmoid(-lower))
    gap = torch.where(top | bottom, 1.0, upper - lower)
    return below + above + torch.where(top | bottom, 0.0, torch.log(-torch.expm1(-gap)))


def _maximum_likelihood(z: Tensor, ratings: Tensor, start: Calibration) -> tuple[NDArray[np.float64], float]:
    """Cut-points and slope for standardised scores z [n] float64, by L-BFGS on an unconstrained form."""
    # 1. Free parameters: first cut-point, logs of the gaps, log of the slope above its bound
    first = torch.tensor(start.cut_points[:1], dtype=torch.float64)
    gaps = torch.tensor(np.diff(start.cut_points), dtype=torch.float64).log()
    free = torch.cat([first, gaps, torch.zeros(1, dtype=torch.float64)]).requires_grad_()

    def bounded() -> tuple[Tensor, Tensor]:
        cuts = torch.cumsum(torch.cat([free[:1], free[1:-1].exp()]), dim=0)
        return cuts, _MIN_SLOPE + free[-1].exp()

    # 2. Likelihood of the data and of the prior observation
    places = len(start.values)
    prior_ratings = torch.arange(1, places + 1).repeat(3)
    prior_z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(places)
    optimiser = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        cuts, slope = bounded()
        data = ordinal_log_likelihood(z, ratings, cuts, slope).sum()
        prior = ordinal_log_likelihood(prior_z, prior_ratings, cuts, slope).mean()
        value = -(data + prior) / (len(z) + 1)
        value.backward()
        return value

    # 3. Fit
    with torch.enable_grad():
        optimiser.step(loss)
    with torch.no_grad():
        cuts, slope = bounded()
        return cuts.numpy(), float(slope)
