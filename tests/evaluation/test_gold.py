"""Citizens as gold raters of a comparison."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from deliberation.citizens import RATING_NOISE, rate_text
from deliberation.questions import invented_question
from deliberation.types import InputError
from evaluation.gold import CitizenGold, held_out_groups, make_gold_observer, noisy_ratings

QUESTIONS = [invented_question(Random(i), held_out=True) for i in range(5)]


def test_rate_is_each_citizens_own_rating_of_each_text():
    groups = held_out_groups(QUESTIONS, 2, seed=0)
    texts = ["We should plan it with care.", "", "I want what I said.", groups[1].citizens[0].opinion]
    found = CitizenGold(groups).rate(1, texts)
    for m, citizen in enumerate(groups[1].citizens):
        for s, text in enumerate(texts):
            gold = rate_text(citizen, groups[1].question, text)
            assert found.agreement[m, s] == gold.agreement
            assert found.quality[m, s] == gold.quality
            assert found.agreement_without_voice[m, s] == gold.agreement_without_voice
            assert found.quality_without_voice[m, s] == gold.quality_without_voice
    assert found.agreement.shape == (len(groups[1].citizens), 4)
    assert (found.agreement >= 1).all() and (found.agreement <= 7).all()


def test_groups_are_the_same_again_and_differ_by_seed():
    first, again, other = (held_out_groups(QUESTIONS, 7, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert {g.question.text for g in first[:5]} == {q.text for q in QUESTIONS}  # all come before any comes twice
    assert first[:3] == held_out_groups(QUESTIONS, 3, seed=0)


def test_groups_need_questions_and_a_count():
    with pytest.raises(InputError, match="questions"):
        held_out_groups([], 3, seed=0)
    with pytest.raises(InputError, match="num_deliberations"):
        held_out_groups(QUESTIONS, 0, seed=0)


def test_noisy_ratings_scatter_around_the_noise_free_ones():
    groups = held_out_groups(QUESTIONS, 1, seed=0)
    text = groups[0].citizens[0].opinion
    gold = CitizenGold(groups).rate(0, [text]).agreement[:, 0]
    shown = [[r.agreement for r in noisy_ratings(groups[0], "d", [text], f"s{k}")] for k in range(300)]
    inside = (gold > 2) & (gold < 6)
    assert inside.any()
    np.testing.assert_allclose(np.mean(shown, axis=0)[inside], gold[inside], atol=0.2)
    assert np.std(shown, axis=0)[inside].mean() == pytest.approx(np.hypot(RATING_NOISE, 1 / np.sqrt(12)), abs=0.1)


def test_two_showings_differ_and_each_repeats():
    (group,) = held_out_groups(QUESTIONS, 1, seed=0)
    texts = [c.opinion for c in group.citizens] * 3
    first, second = (noisy_ratings(group, "d", texts, seed) for seed in ("a", "b"))
    assert first == noisy_ratings(group, "d", texts, "a")
    assert [r.agreement for r in first] != [r.agreement for r in second]
    assert [(r.member, r.statement) for r in first] == [(r.member, r.statement) for r in second]


def test_blank_statements_are_not_shown_to_anyone():
    (group,) = held_out_groups(QUESTIONS, 1, seed=0)
    assert noisy_ratings(group, "d", ["", "  "], "a") == []


def test_observer_logs_gold_of_known_groups_and_rewards_nothing():
    groups = held_out_groups(QUESTIONS, 2, seed=0)
    logged = []
    observer = make_gold_observer(groups, "rawlsian")
    rows = [groups[1].deliberation("d"), groups[0].deliberation("d")]
    texts = [" We should plan it with care.\nMore", [{"role": "assistant", "content": "No."}], "unknown group"]
    out = observer(
        prompts=["p"] * 3, completions=texts, question=[d.question for d in rows] + ["Other?"],
        opinions=[list(d.opinions) for d in rows] + [["x"]], extra=[1] * 3,
        log_metric=lambda *pair: logged.append(pair),
    )  # fmt: skip
    assert out == [None, None, None]
    gold = CitizenGold(groups)
    worst = [gold.rate(1, ["We should plan it with care."]).agreement.min(), gold.rate(0, ["No."]).agreement.min()]
    assert logged == [("gold_welfare", pytest.approx(np.mean(worst)))]


def test_observer_of_strangers_logs_nothing():
    logged = []
    observer = make_gold_observer(held_out_groups(QUESTIONS, 1, seed=0), "nash")
    columns = {"question": ["Other?"], "opinions": [["x"]], "log_metric": lambda *pair: logged.append(pair)}
    assert observer(prompts=["p"], completions=["A text."], **columns) == [None] and logged == []
