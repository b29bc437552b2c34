"""Checks of an experiment against textbook values, brute force and their error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.types import InputError
from evaluation import experiment_checks as c

nan = math.nan


def test_ratio_by_hand():
    found = c.sample_ratio([60, 40])
    assert found.p_value == pytest.approx(0.0455003, abs=1e-6)  # chi-square = 4 with 1 degree of freedom
    assert not found.exact and not found.alert and found.expected == (50, 50)
    assert c.sample_ratio([600, 400]).alert
    assert not c.sample_ratio([600, 400], [0.6, 0.4]).alert
    assert c.sample_ratio([30, 30, 60]).p_value == pytest.approx(math.exp(-15 / 2))  # chi-square = 15, 2 degrees


@pytest.mark.parametrize("counts", [[0, 0], [8, 0], [1, 3], [4, 5]])
def test_small_counts_are_tested_exactly(counts):
    n = sum(counts)
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(p for p in chances if p <= chances[counts[0]] * (1 + 1e-9))
    found = c.sample_ratio(counts)
    assert found.exact and found.p_value == pytest.approx(expected)


def test_an_exact_test_of_three_arms_keeps_its_level():
    rng = np.random.default_rng(0)
    p = [c.sample_ratio(list(row)).p_value for row in rng.multinomial(12, [1 / 3] * 3, size=1000)]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)
    assert c.sample_ratio([12, 0, 0]).alert


def test_fair_assignment_seldom_alerts_and_a_biased_one_does():
    rng = np.random.default_rng(1)
    alerts = [np.mean([c.sample_ratio([k, 500 - k]).alert for k in rng.binomial(500, p, 500)]) for p in (0.5, 0.6)]
    assert alerts[0] <= 0.006 and alerts[1] > 0.8


def test_sign_check_by_hand():
    found = c.sign_check(np.array([1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 1.0, 1.0, 0.0, nan, 1e-12]))
    assert (found.positive, found.negative, found.ties, found.share) == (8, 0, 2, 1.0)
    assert found.p_value == pytest.approx(2 / 2**8) and found.alert
    nothing = c.sign_check(np.array([0.0, nan]))
    assert nothing.p_value == 1.0 and math.isnan(nothing.share) and not nothing.alert


@given(st.lists(st.integers(-3, 3), max_size=20))
def test_sign_check_is_symmetric(values):
    forth, back = c.sign_check(np.array(values, float)), c.sign_check(-np.array(values, float))
    assert (forth.positive, forth.p_value) == (back.negative, pytest.approx(back.p_value))


def experiment(rng, deliberations, *, better=0.0, first=0.0):
    """Ratings by the place shown; arm A is ``better``, the order is drawn for each member."""
    shown = []
    for _ in range(deliberations):
        a_first = rng.random(5) < 0.5
        level = rng.normal(4.2, 0.8)
        gap = np.where(a_first, better, -better) + first
        shown.append(np.clip(np.rint(level + np.stack([gap, 0 * gap]) + rng.normal(0, 1.4, (2, 5))), 1, 7))
    return [x[0] for x in shown], [x[1] for x in shown]


def test_order_bias_is_found_and_a_better_arm_is_none():
    rng = np.random.default_rng(2)
    alerts = [c.order_bias(*experiment(rng, 40, better=3.0)).alert for _ in range(200)]
    assert np.mean(alerts) <= 0.01 + 2 * math.sqrt(0.01 * 0.99 / 200)
    biased = c.order_bias(*experiment(rng, 100, first=1.0))
    assert biased.alert and biased.share > 0.5


def test_order_bias_counts_a_deliberation_once():
    # one large group for first, three small ones against
    first = [np.full(50, 5.0), *[np.array([3.0, nan])] * 3, np.array([nan])]
    second = [np.full(50, 4.0), *[np.array([4.0, 4.0])] * 3, np.array([2.0])]
    found = c.order_bias(first, second)
    assert (found.positive, found.negative, found.ties) == (1, 3, 0)
    # two of three members for second, by a point each, count more than one for first by five
    assert c.order_bias([np.array([6.0, 3.0, 3.0])], [np.array([1.0, 4.0, 4.0])]).negative == 1


def test_missing_ratings_are_compared_by_deliberation():
    whole, gaps = np.array([[4.0, 4.0], [5.0, 5.0]]), np.array([[nan, 4.0], [5.0, 5.0]])
    found = c.missing_ratings([gaps] * 8 + [whole], [whole] * 9)
    assert (found.positive, found.negative, found.ties) == (8, 0, 1) and found.alert
    assert not c.missing_ratings([gaps, whole], [whole, gaps]).alert


def test_fixed_horizon_says_how_it_was_made():
    values = np.random.default_rng(3).normal(0.5, 1, 200)
    few, some, many = (c.fixed_horizon(values[:n], draws=2000) for n in (9, 39, 200))
    assert few.method == "descriptive" and math.isnan(few.estimate.low) and few.estimate.n == 9
    assert some.method == "t"
    half = 2.024394 * values[:39].std(ddof=1) / math.sqrt(39)  # t, 38 degrees of freedom
    assert some.estimate.high - some.estimate.value == pytest.approx(half, rel=1e-6)
    assert many.method == "bootstrap"
    assert many.estimate.low == pytest.approx(values.mean() - 1.96 * values.std() / math.sqrt(200), abs=0.02)
    padded = c.fixed_horizon(np.concatenate([values[:39], [nan]]))
    assert padded == some


def test_fixed_horizon_where_all_are_equal():
    wins = c.fixed_horizon(np.ones(20), win_rate=True)
    assert wins.method == "wilson" and wins.estimate.low == pytest.approx(0.8389, abs=1e-4)
    same = c.fixed_horizon(np.zeros(50))
    assert same.method == "constant" and math.isnan(same.estimate.low) and same.estimate.value == 0
    assert c.fixed_horizon(np.array([0.0] + [1.0] * 11), win_rate=True).estimate.high == 1.0
    assert c.fixed_horizon(np.array([])).estimate.n == 0


def test_the_t_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(4)
    found = [c.fixed_horizon(rng.normal(0, 1, 12)).estimate for _ in range(1000)]
    assert 0.93 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.97


def test_holm_by_hand():
    np.testing.assert_allclose(c.holm(np.array([0.03, 0.01, nan, 0.04])), [0.06, 0.03, nan, 0.06])
    np.testing.assert_allclose(c.holm(np.array([0.9, 0.8])), [1.0, 1.0])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_step_down_rule_rejects(p_values):
    alpha, rejected = 0.05, set()
    for k, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > alpha / (len(p_values) - k):
            break
        rejected.add(i)
    adjusted = c.holm(np.array(p_values))
    for i, p in enumerate(p_values):
        if all(abs(p * k - alpha) > 1e-12 for k in range(1, 9)):
            assert (adjusted[i] <= alpha) == (i in rejected)
        assert p <= adjusted[i] <= 1


@pytest.mark.parametrize("call, field", [
    (lambda: c.sample_ratio([5]), "counts"),
    (lambda: c.sample_ratio([5, -1]), "counts"),
    (lambda: c.sample_ratio([5, 5], [0.5, 0.6]), "shares"),
    (lambda: c.sample_ratio([5, 5], [1.0]), "shares"),
    (lambda: c.order_bias([np.ones(2)], []), "deliberations"),
    (lambda: c.missing_ratings([np.ones(2)], [np.ones(3)]), "deliberations[0]"),
    (lambda: c.holm(np.array([1.5])), "p_values"),
])  # fmt: skip
def test_bad_input_is_named(call, field):
    with pytest.raises(InputError) as found:
        call()
    assert found.value.field == field
