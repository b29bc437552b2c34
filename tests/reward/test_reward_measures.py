"""Measures of a preference model, against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deliberation.types import InputError, Rating
from reward.measures import measures, pairwise_accuracy, rows_of_members, word_overlap
from reward.preference import Calibration, PreferenceModel
from reward.scoring import score_ratings

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
