"""Measures of a preference model, against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deliberation.types import InputError, Rating, Vote
from reward.examples import rows_of_members
from reward.measures import (
    answer_of,
    auc,
    calibration_error,
    measures,
    pairwise_accuracy,
    partial_correlation,
    reliability,
    swapped_accuracy,
    word_overlap,
)
from reward.preference import Calibration, PreferenceModel
from reward.scoring import score_one_by_one, score_ratings

import tiny

TOKENIZER = tiny.make_tokenizer()
MODEL = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0)))


def rate(deliberation, member, statement, agreement, opinion="Buses help."):
    return Rating(deliberation, member, "Should buses be free?", opinion, statement, agreement, 4)


RATINGS = [
    rate("d0", 0, "Buses help all.", 6),
    rate("d0", 1, "No.", 5),
    rate("d0", 0, "Trams, trams, trams.", 2),
    rate("d0", 0, "Buses.", 6),
    rate("d0", 1, "Never, ever, I say.", 7),
    rate("d1", 0, "Alone.", 3),
]


def test_pairs_are_weighted_by_member_and_ties_count_half():
    ratings = [1, 2, 3, 5, 6, 4, 4]
    groups = [[0, 1, 2], [3, 4], [5, 6]]  # three pairs, one pair, a tie only
    right, pairs = pairwise_accuracy(ratings, ratings, groups)
    assert (right, pairs) == (1.0, 4)
    # first member: 1 of 3 right; second: predictor tied -> one half
    assert pairwise_accuracy([2, 1, 1.5, 0, 0, 9, 1], ratings, groups) == (pytest.approx((1 / 3 + 1 / 2) / 2), 4)
    assert pairwise_accuracy(np.negative(ratings), ratings, groups) == (0.0, 4)


def test_no_pair_is_undefined_not_zero():
    assert pairwise_accuracy([1, 2], [4, 4], [[0, 1]]) == (None, 0)
    alone = measures(MODEL, RATINGS[-1:])
    assert alone["accuracy"] is None and alone["longest"] is None and alone["correlation"] is None


def test_members_of_different_deliberations_are_apart():
    assert list(rows_of_members(RATINGS).values()) == [[0, 2, 3], [1, 4], [5]]


def test_word_overlap():
    assert word_overlap("Buses help.", "BUSES help all") == pytest.approx(2 / 3)
    assert word_overlap("?", "!") == 0.0


def test_measures_of_a_model():
    result = measures(MODEL, RATINGS)
    raw = score_ratings(MODEL, RATINGS)
    member_0 = np.mean([raw[0] > raw[2], raw[3] > raw[2]])
    assert result["accuracy"] == pytest.approx((member_0 + (raw[4] > raw[1])) / 2)
    assert result["longest"] == pytest.approx((0 + 1) / 2)
    assert result["overlap"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["pairs"] == 3 and result["ceiling"] is None
    ours = np.corrcoef(MODEL.calibration.utilities(raw), [r.agreement for r in RATINGS])[0, 1]
    assert result["correlation"] == pytest.approx(ours)
    assert measures(MODEL, RATINGS, scores=raw) == result


def test_ceiling_is_the_accuracy_of_the_second_rating():
    second = [
        rate("d0", 0, "Buses help all.", 6),
        rate("d0", 1, "No.", 6),
        rate("d0", 0, "Trams, trams, trams.", 6),
        rate("d0", 0, "Buses.", 7),
        rate("d0", 1, "Never, ever, I say.", 5),
        rate("d1", 0, "Alone.", 3),
    ]
    assert measures(MODEL, RATINGS, second)["ceiling"] == pytest.approx((3 / 4 + 0) / 2)
    with pytest.raises(InputError) as error:
        measures(MODEL, RATINGS, second[::-1])
    assert error.value.field == "second_ratings"


def test_correlation_with_noise_free_utilities():
    utilities = MODEL.calibration.utilities(score_ratings(MODEL, RATINGS))
    assert measures(MODEL, RATINGS, gold=utilities)["correlation"] == pytest.approx(1)
    assert measures(MODEL, RATINGS, gold=-utilities)["correlation"] == pytest.approx(-1)
    with pytest.raises(InputError) as error:
        measures(MODEL, RATINGS, gold=[1.0])
    assert error.value.field == "gold"


# --- AUC, calibration, controls


def test_auc_is_the_share_of_pairs_ordered_right_and_ties_count_half():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert auc([1, 2], [True, True]) is None and auc([], []) is None


def test_reliability_has_bins_of_equal_mass_in_ascending_order():
    table = reliability([0.9, 0.1, 0.2, 0.8], [1, 0, 1, 1], bins=2)
    np.testing.assert_allclose(table, [[0.15, 0.5, 2], [0.85, 1.0, 2]])


def test_calibration_error_is_small_where_ratings_are_drawn_from_the_model_and_large_where_not():
    rng = np.random.default_rng(0)
    for calibration in (MODEL.calibration, Calibration((0.2,), slope=1.0, values=(1, 7))):
        scores = rng.normal(size=20_000)
        chances = calibration.probabilities(scores).cumsum(axis=1)
        drawn = 1 + (rng.random((20_000, 1)) > chances).sum(axis=1)
        assert calibration_error(calibration, scores, drawn) < 0.012
        shifted = Calibration(tuple(c + 1 for c in calibration.cut_points), calibration.slope, calibration.values)
        assert calibration_error(shifted, scores, drawn) > 0.1


def test_calibration_error_by_hand():
    votes = Calibration((0.0,), values=(1, 7))  # P(agree) = 1/2 at score 0
    assert calibration_error(votes, [0.0] * 4, [7, 7, 7, 1], bins=1) == pytest.approx(0.25)


def test_partial_correlation_takes_out_what_is_given():
    rng = np.random.default_rng(0)
    given, noise = rng.normal(size=5000), rng.normal(size=5000)
    assert partial_correlation(given + noise, given - noise, given) == pytest.approx(-1)
    assert abs(partial_correlation(given + noise, given + rng.normal(size=5000), given)) < 0.05
    assert partial_correlation(given, noise, given) is None  # nothing is left


def test_swapped_reads_another_members_opinion():
    ratings = [rate("d", 0, "Yes.", 7, "own"), rate("d", 0, "No.", 1, "own"), rate("d", 1, "No.", 6, "other")]
    expected = score_one_by_one(MODEL, ratings[0].question, ["other"], ["Yes.", "No."]).raw[0]
    assert swapped_accuracy(MODEL, ratings) == float(expected[0] > expected[1])
    assert swapped_accuracy(MODEL, ratings[:2]) is None  # nobody to swap with


def test_accuracy_is_told_apart_by_topics_trained_on():
    ratings = [
        Rating("a", 0, "Q?", "o", "Yes.", 7, 4, "known"), Rating("a", 0, "Q?", "o", "No.", 1, 4, "known"),
        Rating("b", 0, "Q?", "o", "Yes.", 1, 4, "new"), Rating("b", 0, "Q?", "o", "No.", 7, 4, "new"),
    ]  # fmt: skip
    found = measures(MODEL, ratings, scores=np.array([2, 1, 2, 1], dtype=np.float32), trained_topics={"known"})
    assert (found["accuracy_in_topic"], found["accuracy_out_of_topic"], found["accuracy"]) == (1.0, 0.0, 0.5)
    assert measures(MODEL, ratings)["accuracy_in_topic"] is None


def test_votes_are_measured_as_ratings_at_the_ends():
    votes = [Vote("d", 0, "Q?", "o", "Yes.", 1), Vote("d", 0, "Q?", "o", "No.", -1)]
    assert [answer_of(v) for v in votes] == [7, 1]
    assert measures(MODEL, votes, scores=np.array([1, 0], dtype=np.float32))["auc"] == 1.0
