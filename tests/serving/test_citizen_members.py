"""Simulated citizens rate what they are shown as they would say it to anybody, whatever order they see it in."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest

from deliberation.citizens import draw_group, rate_text
from deliberation.questions import load_questions
from evaluation.gold import CitizenGold
from serving.citizen_members import gold_mean, rating

QUESTION = load_questions("train")[0]
GROUP = draw_group(QUESTION, Random(0))
TEXTS = ("We all want it.", "No.", f"Most of us think that {QUESTION.affirming}", "")


def test_ratings_are_integers_of_the_scale_and_the_same_each_time():
    for text in TEXTS:
        given = rating(GROUP.citizens[0], GROUP, text, "0 0")
        assert all(isinstance(value, int) and 1 <= value <= 7 for value in given)
        assert given == rating(GROUP.citizens[0], GROUP, text, "0 0")


def test_the_noise_is_the_citizens_own_and_around_their_mind():
    text = TEXTS[2]
    citizen = min(GROUP.citizens, key=lambda c: abs(rate_text(c, QUESTION, text).agreement - 4))  # far from the ends
    many = [rating(citizen, GROUP, text, str(seed)) for seed in range(400)]
    assert len(set(many)) > 3
    gold = rate_text(citizen, QUESTION, text)
    assert fmean(a for a, _ in many) == pytest.approx(gold.agreement, abs=0.2)
    assert fmean(q for _, q in many) == pytest.approx(gold.quality, abs=0.2)


def test_the_gold_mean_is_that_of_the_comparison():
    table = CitizenGold([GROUP]).rate(0, TEXTS).agreement.mean(axis=0)
    assert [gold_mean(GROUP, text) for text in TEXTS] == pytest.approx(list(table))
