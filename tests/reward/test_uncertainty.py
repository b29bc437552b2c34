"""Standard deviations and intervals of utilities, against errors that are known."""

from __future__ import annotations

import numpy as np
import pytest

from deliberation.types import InputError
from reward.calibration import Calibration
from reward.uncertainty import Uncertainty, error_width, nonnegative_least_squares

CALIBRATION = Calibration((-3.0, -1.5, -0.5, 0.5, 1.0, 2.5), slope=1.7)


def test_sd_adds_three_parts():
    ensemble = np.array([[0.0, 1.0, 2.0]])  # variance 1
    slope = CALIBRATION.utility_slopes([0.2])
    for parts, expected in (((0.5, 0, 0), 0.5), ((0, 0.4, 0), 0.4 * slope), ((0, 0, 2), 2 * slope)):
        np.testing.assert_allclose(Uncertainty(*parts).sd(CALIBRATION, [0.2], ensemble), expected)
    together = Uncertainty(0.5, 0.4, 2).sd(CALIBRATION, [0.2], ensemble)
    np.testing.assert_allclose(together**2, 0.25 + slope**2 * (0.16 + 4))


def test_two_ratings_tell_the_error_of_a_utility_from_the_noise_of_a_rating():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=40_000)
    truth = CALIBRATION.utilities(scores) + rng.normal(scale=0.5, size=scores.shape)
    first, second = (truth + rng.normal(scale=0.8, size=scores.shape) for _ in range(2))
    ensemble = scores[:, None] + rng.normal(scale=1e-3, size=(len(scores), 4))
    fitted = Uncertainty.fit(CALIBRATION, scores, ensemble, first, second)
    sd = fitted.sd(CALIBRATION, scores, ensemble)
    assert np.sqrt((sd**2).mean()) == pytest.approx(0.5, abs=0.03)
    low, high = fitted.interval(CALIBRATION.utilities(scores), sd)
    assert (low >= 1).all() and (high <= 7).all()
    inside = np.abs(truth - CALIBRATION.utilities(scores)) < fitted.width * sd
    assert inside.mean() == pytest.approx(0.9, abs=0.02)


def test_disagreement_of_the_ensemble_counts_where_it_tells_the_error():
    rng = np.random.default_rng(1)
    scores, spread = rng.normal(size=40_000), rng.uniform(0.1, 1.0, size=40_000)
    ensemble = scores[:, None] + spread[:, None] * rng.normal(size=(40_000, 64))
    error = 1.5 * spread * CALIBRATION.utility_slopes(scores) * rng.normal(size=scores.shape)
    first, second = (CALIBRATION.utilities(scores) + error + rng.normal(scale=0.5, size=(40_000,)) for _ in range(2))
    fitted = Uncertainty.fit(CALIBRATION, scores, ensemble, first, second)
    assert fitted.kappa == pytest.approx(1.5, abs=0.15)
    assert fitted.tau < 0.3


def test_no_error_at_all_keeps_the_ensembles_spread_and_warns():
    scores, rng = np.linspace(-2, 2, 500), np.random.default_rng(0)
    u = CALIBRATION.utilities(scores)
    with pytest.warns(UserWarning, match="no error"):
        fitted = Uncertainty.fit(CALIBRATION, scores, rng.normal(size=(500, 4)), u + 1, u - 1)
    assert fitted == Uncertainty()


def test_nonnegative_least_squares_against_its_conditions():
    rng = np.random.default_rng(2)
    for _ in range(50):
        design, target = rng.normal(size=(30, 3)), rng.normal(size=30)
        x = nonnegative_least_squares(design, target)
        gradient = design.T @ (design @ x - target)
        assert (x >= 0).all() and (gradient > -1e-9).all() and np.abs(gradient * x).max() < 1e-9  # Karush-Kuhn-Tucker


@pytest.mark.parametrize("name", ["tau", "rho", "kappa", "width"])
def test_bad_parts_are_refused_by_name(name):
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError) as error:
            Uncertainty(**{name: bad})
        assert error.value.field == name


@pytest.mark.parametrize("share, narrow, wide", [(0.8, 0.4, 2.0), (0.5, 0.9, 1.1)])
def test_the_width_of_intervals_sees_through_the_noise_of_rating(share, narrow, wide):
    """Of an error with heavy tails, and of one that is nearly normal."""
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.3, 0.9, 30_000)
    error = sd * np.where(rng.random(30_000) < share, narrow, wide) * rng.normal(size=30_000)
    first, second = (error + rng.normal(scale=0.7, size=30_000) for _ in range(2))
    width = error_width(first, second, sd)
    assert (np.abs(error) < width * sd).mean() == pytest.approx(0.9, abs=0.015)
