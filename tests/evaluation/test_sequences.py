"""Confidence sequences against a plain loop, their guarantee on simulated data, and their invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberation.types import InputError
from evaluation import sequences as s

unit = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)
few_points = 101


def slow_log_e(values, m, start_variance=s.START_VARIANCE, c=0.75):
    """The formulas of the reference, one number at a time."""
    total, squares, log_k, found = 0.0, 0.0, 0.0, []
    mean, variance = 0.5, start_variance
    for t, x in enumerate(values, start=1):
        bet = (mean - m) / (variance + (mean - m) ** 2)
        bet = max(bet, -c / (1 - m)) if m < 1 else bet
        bet = min(bet, c / m) if m > 0 else bet
        log_k += math.log(1 + bet * (x - m))
        found.append(log_k)
        total += x
        mean = (0.5 + total) / (t + 1)
        squares += (x - mean) ** 2
        variance = (start_variance + squares) / (t + 1)
    return found


def slow_bounds(values, alpha, grid, start_variance=s.START_VARIANCE):
    """Low and high after each value: rejected neighbours of the outermost points never rejected."""
    points = [i / (grid - 1) for i in range(grid)]
    capitals = [slow_log_e(values, m, start_variance) for m in points]
    bounds = []
    for t in range(len(values)):
        left = [i for i in range(grid) if max(capitals[i][: t + 1]) < math.log(1 / alpha)]
        bounds.append((points[max(left[0] - 1, 0)], points[min(left[-1] + 1, grid - 1)]) if left else (math.nan,) * 2)
    return np.array(bounds)


@settings(max_examples=40)
@given(unit, st.sampled_from([0.01, 0.05, 0.3]), st.sampled_from([0.01, 0.25]))
def test_the_vectorised_sequence_equals_a_plain_loop(values, alpha, start):
    found = s.confidence_sequence(values, alpha, start_variance=start, grid=21)
    expected = slow_bounds(values.tolist(), alpha, 21, start)
    np.testing.assert_allclose(found.low, expected[:, 0], atol=1e-9)
    np.testing.assert_allclose(found.high, expected[:, 1], atol=1e-9)
    np.testing.assert_allclose(found.log_e, slow_log_e(values.tolist(), 0.5, start), atol=1e-9)
    np.testing.assert_allclose(found.mean, [values[:n].mean() for n in range(1, len(values) + 1)], atol=1e-12)
    np.testing.assert_array_equal(found.broken, np.isnan(expected[:, 0]))


def test_many_sequences_equal_each_alone():
    values = np.random.default_rng(0).beta(3, 2, (5, 60))
    together = s.confidence_sequence(values, grid=few_points)
    for k, row in enumerate(values):
        alone = s.confidence_sequence(row, grid=few_points)
        for name in ("mean", "low", "high", "log_e", "broken"):
            np.testing.assert_allclose(getattr(together, name)[k], getattr(alone, name), atol=1e-12)


@pytest.mark.parametrize("null", [0.0, 0.2, 1.0])
def test_log_e_values_of_any_null_equal_the_loop(null):
    values = np.random.default_rng(1).random(30)
    np.testing.assert_allclose(s.log_e_values(values, null), slow_log_e(values.tolist(), null), atol=1e-9)


def test_golden_values():
    # worked out by hand: bets 0, then (.75 - .5) / (.03625 + .0625) = 2.53.. cut to 1.5, then 1.5 again
    log_e = s.log_e_values(np.array([1.0, 1.0, 0.5]))
    np.testing.assert_allclose(log_e, [0, math.log(1.75), math.log(1.75)], atol=1e-12)
    # all wins: factors 1, 1.75, 1.75, ...: 1.75^6 = 28.7 is the first power above 20
    found = s.confidence_sequence(np.ones(10))
    assert found.decision() == s.Decision(7, "a")
    np.testing.assert_allclose(found.log_e[-1], 9 * math.log(1.75), atol=1e-12)
    # win rates start from a variance of 1/4: second bet .25 / (.15625 + .0625) = 8/7, uncut
    np.testing.assert_allclose(s.win_rate_sequence(np.ones(2)).log_e, [0, math.log(11 / 7)], atol=1e-12)


def test_no_bet_sees_what_it_bets_on():
    values = np.random.default_rng(2).random(20)
    changed = values.copy()
    changed[-1] = 1 - values[-1]
    before, after = s.log_e_values(values), s.log_e_values(changed)
    np.testing.assert_array_equal(before[:-1], after[:-1])
    # the last factors are 1 + b (x - 1/2) with the same b and opposite x - 1/2: they sum to 2
    assert np.exp(before[-1] - before[-2]) + np.exp(after[-1] - after[-2]) == pytest.approx(2)


@given(unit)
def test_swapping_the_arms_mirrors_everything(values):
    forth, back = s.confidence_sequence(values, grid=few_points), s.confidence_sequence(1 - values, grid=few_points)
    np.testing.assert_allclose(back.mean, 1 - forth.mean, atol=1e-9)
    np.testing.assert_allclose(back.low, 1 - forth.high, atol=1e-9)
    np.testing.assert_allclose(back.high, 1 - forth.low, atol=1e-9)
    np.testing.assert_allclose(back.log_e, forth.log_e, atol=1e-9)


@given(unit)
def test_the_interval_only_ever_narrows(values):
    found = s.confidence_sequence(values, grid=few_points)
    whole = ~found.broken
    assert np.all(np.diff(found.low[whole]) >= 0) and np.all(np.diff(found.high[whole]) <= 0)
    assert np.all(found.low[whole] < found.high[whole])
    assert np.all(np.diff(found.broken.astype(int)) >= 0)  # once broken, always


@pytest.mark.parametrize("draw, truth, start", [
    (lambda rng, size: rng.binomial(1, 0.5, size).astype(float), 0.5, s.WIN_START_VARIANCE),
    (lambda rng, size: rng.binomial(1, 0.1, size).astype(float), 0.1, s.START_VARIANCE),
    (lambda rng, size: rng.beta(30, 20, size), 0.6, s.START_VARIANCE),
    (lambda rng, size: rng.choice([0.0, 0.5, 1.0], size, p=[0.2, 0.2, 0.6]), 0.7, s.WIN_START_VARIANCE),
])  # fmt: skip
def test_the_truth_is_ever_rejected_at_most_as_often_as_alpha_says(draw, truth, start):
    """2,000 sequences of 200 looks; the grid is not needed for one mean. 5 % and two standard errors."""
    values = draw(np.random.default_rng(3), (2000, 200))
    crossed = np.isfinite(s.first_crossing(s.log_e_values(values, truth, start_variance=start)))
    assert 0 < crossed.mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_the_interval_covers_the_truth_at_every_look():
    values = np.random.default_rng(4).beta(30, 20, (200, 100))
    found = s.confidence_sequence(values, grid=few_points)
    covered = ((found.low <= 0.6) & (found.high >= 0.6)).all(1)
    assert covered.mean() >= 0.95
    assert (found.high - found.low)[:, -1].mean() < 0.12  # and it says something


def test_interval_and_e_value_decide_together():
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.04, -0.1):
        values = np.clip(rng.normal(0.5 + shift, 0.15, (100, 150)), 0, 1)
        found = s.confidence_sequence(values)
        decided = s.decided_at(found)
        np.testing.assert_array_equal(decided, s.first_crossing(found.log_e))
        assert np.isfinite(decided).mean() == pytest.approx(0 if shift == 0 else 1, abs=0.05 if not shift else 0.6)


def test_changing_times_are_reported_as_broken():
    found = s.difference_sequence(np.repeat([3.0, -3.0], 300))
    assert not found.broken[:300].any() and found.broken[-1]
    assert np.isnan(found.low[-1]) and np.isnan(found.high[-1])


def test_decision_says_which_arm_and_waits_for_the_minimum():
    better = s.difference_sequence(np.full(60, 1.0))
    worse = s.difference_sequence(np.full(60, -1.0))
    first = better.decision()
    assert first.better == "a" and worse.decision() == s.Decision(first.deliberations, "b")
    assert first.deliberations < 50 and better.decision(50) == s.Decision(50, "a")
    assert better.decision(61) is None
    assert s.difference_sequence(np.zeros(60)).decision() is None
    assert s.difference_sequence(np.array([])).decision() is None


def test_scales_go_there_and_back():
    d = np.array([-6.0, 0.0, 1.2, 6.0])
    np.testing.assert_allclose(s.to_unit(d), [0, 0.5, 0.6, 1])
    np.testing.assert_allclose(s.from_unit(s.to_unit(d)), d)
    plain, points = s.confidence_sequence(s.to_unit(d)), s.difference_sequence(d)
    np.testing.assert_allclose(points.low, 12 * plain.low - 6)
    np.testing.assert_allclose(points.mean, [-6, -3, -1.6, 0.3])
    assert points.null == 0 and s.difference_sequence([1, -1, 0], limit=1).mean[-1] == 0


def test_anytime_p_never_rises():
    p = s.anytime_p(np.log([0.5, 4.0, 2.0, 25.0]))
    np.testing.assert_allclose(p, [1, 0.25, 0.25, 0.04])


@pytest.mark.parametrize("call, field", [
    (lambda: s.confidence_sequence([0.5, 1.5]), "values[1]"),
    (lambda: s.confidence_sequence([[0.5, math.nan]]), "values[0, 1]"),
    (lambda: s.confidence_sequence([0.5], alpha=1.0), "alpha"),
    (lambda: s.confidence_sequence([0.5], grid=100), "grid"),
    (lambda: s.confidence_sequence([0.5], start_variance=0), "start_variance"),
    (lambda: s.confidence_sequence(0.5), "values"),
    (lambda: s.log_e_values([0.5], null=-0.1), "null"),
    (lambda: s.difference_sequence([7.0]), "differences[0]"),
    (lambda: s.difference_sequence([0.0]).decision(0), "minimum"),
    (lambda: s.confidence_sequence([[0.5], [0.5]]).decision(), "sequence"),
])  # fmt: skip
def test_bad_input_is_named(call, field):
    with pytest.raises(InputError) as found:
        call()
    assert found.value.field == field
