"""Measures against hand-worked numbers, brute force and their invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import measures as m

ratings = st.lists(st.integers(1, 7), min_size=1, max_size=30).map(lambda x: np.array(x, dtype=float))


def test_wins_hand_worked():
    outcome = m.wins(np.array([3.0, 2.0, 5.0, np.nan, 1.0]), np.array([2.0, 2.0, 6.0, 1.0, np.nan]))
    np.testing.assert_array_equal(outcome, [1, 0.5, 0, np.nan, np.nan])


@given(ratings, st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_win_rates_are_antisymmetric_and_ignore_a_common_shift(a, seed, shift):
    b = np.random.default_rng(seed).permutation(a)
    forth, back = m.wins(a, b), m.wins(b, a)
    np.testing.assert_array_equal(forth + back, np.ones(len(a)))
    np.testing.assert_array_equal(m.wins(np.round(a + shift, 9), np.round(b + shift, 9)), forth)


def test_bootstrap_interval_matches_the_normal_one():
    values = np.random.default_rng(1).normal(4, 1, size=400)
    (estimate,) = m.mean_estimates(values[:, None], m.bootstrap_counts(400, draws=4000))
    half = 1.96 * values.std(ddof=0) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.01)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        outcomes = (rng.random((100, 1)) < 0.7).astype(float)
        (e,) = m.win_rates(outcomes, m.bootstrap_counts(100, draws=400, seed=seed))
        hits += e.low <= 0.7 <= e.high
    assert 0.89 <= hits / 200 <= 0.99


def test_bootstrap_equals_a_plain_loop_over_resamplings():
    values = np.array([[1.0, 0.0], [4.0, np.nan], [2.0, 1.0]])
    counts = m.bootstrap_counts(3, draws=50, seed=3)
    means = []
    for row in counts:
        drawn = np.repeat(values[:, 0], row.astype(int))
        assert len(drawn) == 3
        means.append(drawn.mean())
    (first, _) = m.mean_estimates(values, counts, block=7)
    assert (first.low, first.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_bootstrap_seed_decides():
    assert np.array_equal(m.bootstrap_counts(9, draws=5, seed=1), m.bootstrap_counts(9, draws=5, seed=1))
    assert not np.array_equal(m.bootstrap_counts(9, draws=5, seed=1), m.bootstrap_counts(9, draws=5, seed=2))


def test_undefined_values_are_left_out_and_counted():
    values = np.array([[1.0], [np.nan], [3.0]] * 20)
    (e,) = m.mean_estimates(values, m.bootstrap_counts(60, draws=500))
    assert e.value == 2.0 and e.n == 40 and e.low < 2 < e.high


def test_no_interval_where_too_many_draws_are_undefined():
    values = np.full((20, 2), np.nan)
    values[0] = 5.0
    values[:, 1] = np.nan
    one, none = m.mean_estimates(values, m.bootstrap_counts(20, draws=500))
    assert one.value == 5.0 and one.n == 1 and math.isnan(one.low) and math.isnan(one.high)
    assert none.n == 0 and math.isnan(none.value)


def test_counts_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        m.mean_estimates(np.zeros((3, 1)), m.bootstrap_counts(4, draws=5))
    with pytest.raises(ValueError, match="at least one"):
        m.bootstrap_counts(0)


@pytest.mark.parametrize("same", [0.0, 0.5, 1.0])
def test_equal_outcomes_get_a_wilson_interval_with_width(same):
    (e,) = m.win_rates(np.full((50, 1), same), m.bootstrap_counts(50, draws=200))
    assert e.value == same and e.low <= same <= e.high and e.high - e.low > 0.05


def test_wilson_hand_worked():
    # 8 of 10: Wilson 1927, (0.4902, 0.9433)
    assert m.wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert all(math.isnan(x) for x in m.wilson_interval(0.5, 0))


def test_unanimity_needs_every_member_at_five():
    agreement = np.array([[5.0, 4.99, 7.0], [6.0, 7.0, 5.0]])
    np.testing.assert_array_equal(m.unanimous(agreement), [1, 0, 1])


def test_words_and_distinct_pairs():
    assert m.words("  We should   plan it. ") == 4 and m.words("") == 0
    assert m.distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert math.isnan(m.distinct_2(["one", ""]))


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835), (64, 3.175)])
def test_kl_of_best_of_n(n, kl):
    assert m.kl_best_of_n(n) == pytest.approx(kl, abs=1e-3)


def test_kl_of_best_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        m.kl_best_of_n(0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.data())
def test_best_of_n_weights_equal_brute_force_over_subsets(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    wins = np.zeros(len(scores))
    subsets = list(itertools.combinations(range(len(scores)), n))
    for subset in subsets:
        best = max(scores[i] for i in subset)
        # A tie goes evenly to every candidate of the pool with that score, drawn or not: by symmetry the same.
        tied = [i for i in subset if scores[i] == best]
        wins[tied] += 1 / len(tied)
    np.testing.assert_allclose(m.best_of_n_weights(np.array(scores), n), wins / len(subsets), atol=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_than_the_pool_is_refused(n):
    with pytest.raises(ValueError, match="from 1 to the 3"):
        m.best_of_n_weights(np.arange(3), n)


def test_expected_win_counts_ties_half():
    even = np.array([0.5, 0.5])
    # pairs: 1v1 tie, 1v2 loss, 3v1 win, 3v2 win
    found = m.expected_win(np.array([1.0, 3.0]), even, np.array([1.0, 2.0]), even)
    assert found == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_correlation():
    assert m.correlation(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(1)
    assert m.correlation(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert math.isnan(m.correlation(np.ones(3), np.arange(3)))


def test_share_of_ceiling():
    assert m.share_of_ceiling(0.8, 0.85) == pytest.approx(0.3 / 0.35)
    assert math.isnan(m.share_of_ceiling(0.8, 0.5))
