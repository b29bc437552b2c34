"""The measures on votes against values worked out by hand, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import human_measures as measure


def ones(persons, draws=200):
    return measure.person_weights(persons, draws=draws, seed=0)


def test_auc_by_hand_with_a_tie():
    # agree .9 .5, disagree .5 .1: of 4 pairs 3 right and one tied
    found = measure.auc([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], [0, 1, 0, 1], ones(2))
    assert found.value == pytest.approx(3.5 / 4)
    assert found.to_dict()["low"] is None  # two persons allow no interval


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=30))
def test_a_resampled_auc_is_the_auc_of_the_repeated_rows(rows):
    scores, labels, person = (np.array(column) for column in zip(*rows, strict=True))
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 0, 1]], dtype=float)
    found = measure.auc(scores, labels, person, weights)
    for row, value in zip(weights, [found.value, *found.draws], strict=True):
        chosen = np.repeat(np.arange(len(rows)), row[person].astype(int))
        agree, disagree = scores[chosen][labels[chosen] == 1], scores[chosen][labels[chosen] == 0]
        if len(agree) and len(disagree):
            expected = ((np.sign(agree[:, None] - disagree) + 1) / 2).mean()
            assert value == pytest.approx(expected)
        else:
            assert np.isnan(value)


def test_one_label_only_is_undefined_and_not_zero():
    found = measure.auc([0.1, 0.2], [1, 1], [0, 1], ones(2)).to_dict()
    assert found["value"] is None
    assert found["low"] is None
    assert found["undefined_draws"] == 200


def test_pairs_stay_within_one_profile_and_are_pooled_within_a_person():
    # person 0: profile 0 has 1 of 2 pairs right, profile 1 its only pair tied; person 1 has one label; person 2 no vote
    scores = [3, 1, 2, 5, 5, 1, 2]
    labels = [0, 0, 1, 1, 0, 1, 1]
    person = [0, 0, 0, 0, 0, 1, 1]
    profile = [0, 0, 0, 1, 1, 2, 2]
    shares = measure.pair_shares(scores, labels, person, profile, 3)
    assert shares[0] == pytest.approx(1.5 / 3)
    assert np.isnan(shares[1:]).all()
    found = measure.mean_over_persons(shares, ones(3))
    assert (found.value, found.persons) == (0.5, 1)


def test_calibration_error_by_hand():
    # 40 votes, two bins of 20: P .25 with 10 of 20 agrees, P .75 with 15 of 20
    p = np.repeat([0.25, 0.75], 20)
    y = np.concatenate([np.repeat([0, 1], 10), np.repeat([0, 1], [5, 15])])
    found = measure.calibration_error(p, y, np.arange(40), ones(40))
    assert found.value == pytest.approx((0.25 + 0.0) / 2)
    expected = [
        {"predicted": 0.25, "observed": 0.5, "votes": 20},
        {"predicted": 0.75, "observed": 0.75, "votes": 20},
    ]
    assert measure.reliability(p, y) == expected
    assert measure.histogram(p, bins=4) == [0, 20, 0, 20]


def test_ten_bins_of_equal_mass_and_equal_probabilities_together():
    assert np.bincount(measure.bin_numbers(np.random.default_rng(0).random(1000))).tolist() == [100] * 10
    assert set(measure.bin_numbers(np.full(500, 0.7)).tolist()) == {0}
    assert len(set(measure.bin_numbers(np.linspace(0, 1, 45)).tolist())) == 2  # 20 votes a bin at least


def test_the_interval_of_a_calibration_error_reaches_down_to_it():
    rng = np.random.default_rng(0)
    p = rng.random(600)
    y = (rng.random(600) < p).astype(int)  # perfectly calibrated: resampling noise only adds to the error
    found = measure.calibration_error(p, y, np.arange(600) // 6, ones(100, draws=500)).to_dict(biased_up=True)
    assert found["low"] <= found["value"] <= found["high"]


def test_brier_and_choices_by_hand():
    assert measure.mean_of([(0.8 - 1) ** 2, (0.4 - 0) ** 2], [0, 1], ones(2)).value == pytest.approx(0.1)
    np.testing.assert_array_equal(measure.right_choices([2, 1, 1], [1, 1, 2]), [1, 0.5, 0])


def test_length_slope_is_the_partial_correlation():
    rng = np.random.default_rng(1)
    labels, lengths = rng.integers(0, 2, 300), rng.normal(size=300)
    scores = 2.0 * labels + 0.5 * lengths + rng.normal(size=300)
    residuals = [v - np.where(labels == 1, v[labels == 1].mean(), v[labels == 0].mean()) for v in (scores, lengths)]
    found = measure.length_slope(scores, 100 + lengths, labels, np.arange(300) // 10, ones(30))
    assert found.value == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert (
        measure.length_slope(scores, np.full(300, 7), labels, np.arange(300) // 10, ones(30)).to_dict()["value"] is None
    )


def test_a_resampled_length_slope_is_that_of_the_repeated_rows():
    rng = np.random.default_rng(2)
    scores, lengths, labels, person = (
        rng.normal(size=40),
        rng.normal(size=40),
        rng.integers(0, 2, 40),
        np.arange(40) % 4,
    )
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 1]], dtype=float)
    chosen = np.repeat(np.arange(40), weights[1][person].astype(int))
    repeated = measure.length_slope(scores[chosen], lengths[chosen], labels[chosen], person[chosen], weights[:1])
    assert measure.length_slope(scores, lengths, labels, person, weights).draws[0] == pytest.approx(repeated.value)


def test_intervals_contain_the_value_and_differences_are_paired():
    rng = np.random.default_rng(3)
    person, labels = np.arange(400) // 8, rng.integers(0, 2, 400)
    weights = ones(50, draws=1000)
    a = measure.auc(labels + rng.normal(size=400), labels, person, weights)
    b = measure.auc(labels + rng.normal(size=400), labels, person, weights)
    for sample in (a, b, a - b):
        found = sample.to_dict()
        assert found["low"] < found["value"] < found["high"]
    assert (a - a).to_dict() == {"value": 0.0, "low": 0.0, "high": 0.0, "persons": 50}


def test_no_votes_at_all_is_undefined():
    nothing = np.empty(0)
    weights = ones(12)
    samples = [
        measure.auc(nothing, nothing, nothing, weights),
        measure.calibration_error(nothing, nothing, nothing, weights),
        measure.length_slope(nothing, nothing, nothing, nothing, weights),
        measure.mean_over_persons(measure.pair_shares(nothing, nothing, nothing, nothing, 12), weights),
        measure.mean_of(nothing, nothing, weights),
    ]
    assert [sample.to_dict()["value"] for sample in samples] == [None] * 5
    assert measure.reliability(nothing, nothing) == []
