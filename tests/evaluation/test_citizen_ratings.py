"""The demo's ratings: who rates what, and how often."""

from __future__ import annotations

from collections import Counter
from random import Random

from deliberation.citizens import draw_group
from deliberation.questions import load_questions
from evaluation.citizen_ratings import first_candidates, good_statements, rated, shown_twice

QUESTIONS = load_questions("train")
GROUPS = [draw_group(QUESTIONS[k], Random(k)) for k in range(3)]
TEXTS = [[g.question.affirming, g.question.negating, "A third way."] for g in GROUPS]
RATINGS = rated(GROUPS, TEXTS, "base", seed=0)


def test_every_citizen_rates_every_candidate_of_its_group():
    said = Counter((r.deliberation_id, r.member) for r in RATINGS)
    assert said == {(f"base-{k}", i): 3 for k, group in enumerate(GROUPS) for i in range(len(group.citizens))}
    assert rated(GROUPS, TEXTS, "base", seed=1) != RATINGS == rated(GROUPS, TEXTS, "base", seed=0)


def test_shown_twice_has_two_ratings_of_each_statement_the_first_as_it_was():
    both = shown_twice(GROUPS, [*RATINGS, *RATINGS], seed=0)
    assert both[: len(RATINGS)] == RATINGS
    assert set(Counter((r.deliberation_id, r.member, r.statement) for r in both).values()) == {2}
    assert [r.agreement for r in both[len(RATINGS) :]] != [r.agreement for r in RATINGS]


def test_the_first_candidates_of_the_first_groups_are_kept():
    kept = first_candidates(RATINGS, count=2, groups=2)
    assert {(r.deliberation_id, r.statement) for r in kept} == {
        (f"base-{k}", text) for k in range(2) for text in TEXTS[k][:2]
    }


def test_good_statements_are_those_of_high_mean_quality():
    means = {
        (name, text): sum(q) / len(q)
        for name, text in {(r.deliberation_id, r.statement) for r in RATINGS}
        if (q := [r.quality for r in RATINGS if (r.deliberation_id, r.statement) == (name, text)])
    }
    middle = sorted(means.values())[len(means) // 2]
    rows = good_statements(GROUPS, RATINGS, at_least=middle)
    good = {(int(name[-1]), text) for (name, text), mean in means.items() if mean >= middle}
    numbers = {group.question.text: k for k, group in enumerate(GROUPS)}
    assert {(numbers[r["question"]], r["statement"]) for r in rows} == good and len(rows) == len(good) < len(means)
    for r in rows:
        assert r["opinions"] == [c.opinion for c in GROUPS[numbers[r["question"]]].citizens]
