"""The gold rater: it must rate sense above nonsense, and not be gameable."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberation.citizens import (
    Citizen,
    Wish,
    draw_group,
    is_copy,
    likert,
    match,
    noisy_rating,
    rate_text,
)
from deliberation.questions import load_questions
from deliberation.recogniser import Item, read
from deliberation.types import Question
from deliberation.writer import WRITERS, connect, corrupt, item_sentences, stance_sentence, write_statement

QUESTION = Question(
    "q", "Should school meals be free?", "School meals should be free.", "School meals should not be free.", "schools"
)
COST = Wish("concern", "cost", ("young", "parents"), "the cost for young parents")
GRANT = Wish("measure", "grants", ("coastal", "teachers"), "grants for coastal teachers")
CITIZEN = Citizen(1, (COST,), (), (), None, False, "I think that school meals should be free.")
GOOD = "We think that school meals should be free. Care must be taken over the cost for young parents."


def agreement(text: str, citizen: Citizen = CITIZEN) -> float:
    return rate_text(citizen, QUESTION, text).agreement


def groups(count: int = 60, seed: int = 0):
    rng = Random(seed)
    return [draw_group(rng.choice(load_questions("train")), rng) for _ in range(count)]


def group_mean(group, text: str) -> float:
    return statistics.mean(rate_text(c, group.question, text).agreement for c in group.citizens)


def mean_over_groups(write) -> float:
    rng = Random(1)
    return statistics.mean(group_mean(g, write(g, rng)) for g in groups())


BALANCED = mean_over_groups(WRITERS["balanced"])


def test_agreement_of_a_worked_example():
    # stance 1 - 0/2, met 1.3 (own concern, same people), nothing wrong: z = -0.9 + 1 + 1.3
    assert agreement(GOOD) == pytest.approx(likert(1.4))


def test_the_other_side_is_liked_less():
    assert agreement(GOOD.replace("should be free", "should not be free")) == pytest.approx(likert(0.4))


def test_taking_up_ones_concern_raises_agreement_and_setting_it_aside_lowers_it():
    without = agreement("We think that school meals should be free. We propose grants for rural nurses.")
    aside = agreement("We think that school meals should be free. We would set the cost for young parents aside.")
    assert aside < without < agreement(GOOD)


def test_another_paraphrase_of_the_same_concern_counts_alike():
    assert agreement(GOOD.replace("the cost for young parents", "the price charged to young parents")) == agreement(
        GOOD
    )


def test_other_people_count_less_than_ones_own():
    assert agreement(GOOD.replace("young parents", "rural nurses")) < agreement(GOOD)


def test_a_red_line_ruins_agreement_and_ruling_it_out_helps():
    citizen = replace(CITIZEN, red_lines=(GRANT,))
    proposed = agreement(f"{GOOD} We propose grants for coastal teachers.", citizen)
    ruled_out = agreement(f"{GOOD} We rule out grants for coastal teachers.", citizen)
    assert proposed < 2.8 < agreement(GOOD, citizen) < ruled_out


def test_a_met_condition_brings_the_other_side_nearer():
    citizen = replace(CITIZEN, stance=-2, condition=GRANT)
    yes = "We think that school meals should be free."
    met = rate_text(citizen, QUESTION, f"{yes} We propose grants for coastal teachers.").parts["stance"]
    assert met > rate_text(citizen, QUESTION, f"{yes} We propose grants for rural nurses.").parts["stance"]


def test_an_uncompromising_citizen_minds_the_other_side_more():
    no = "We strongly believe that school meals should not be free."
    assert agreement(no, replace(CITIZEN, uncompromising=True)) < agreement(no)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "asdf qwer zxcv uiop",
        "free meals should school be",
        "Blah blah blah blah blah blah.",
        "1 2 3 4 5 6",
        "\U0001f600" * 30,
        GOOD * 12,
        "the " * 400,
    ],
)
def test_nonsense_scores_below_two_and_a_half(text):
    gold = rate_text(CITIZEN, QUESTION, text)
    assert gold.agreement < 2.5 and gold.quality < 2.5


def test_empty_points_raise_neither_agreement_nor_quality():
    plain = rate_text(CITIZEN, QUESTION, GOOD)
    for nonsense in (
        "We recognise that x.",
        "We recognise that x. It matters that y. We doubt that z.",
        "We propose grants for zzz.",
        "Care must be taken over the cost for blorks and flumps.",
    ):
        gold = rate_text(CITIZEN, QUESTION, f"{GOOD} {nonsense}")
        assert gold.quality < plain.quality and gold.agreement < plain.agreement


def test_saying_it_twice_does_not_help():
    assert agreement(f"{GOOD} {GOOD}") < agreement(GOOD) - 1


def test_corrupted_statements_score_lower():
    pairs = []
    rng = Random(3)
    for group in groups(80):
        text = write_statement(group, rng, "balanced")
        pairs.append((group_mean(group, text), group_mean(group, corrupt(text, rng))))
    assert statistics.mean(a - b for a, b in pairs) > 1.5


def test_listing_everything_does_not_beat_a_balanced_statement():
    def everything(group, rng):
        wishes = [w for c in group.citizens for w in c.wants]
        return connect([stance_sentence(group, 1, rng), *item_sentences(wishes * 1, rng)], rng) + " ".join(
            f" {write_statement(group, rng, 'list')}" for _ in range(2)
        )

    assert mean_over_groups(everything) < BALANCED - 1
    assert mean_over_groups(WRITERS["list"]) < BALANCED - 1


def test_copying_an_opinion_scores_low():
    assert mean_over_groups(WRITERS["parrot"]) < BALANCED - 1.5


def test_a_citizen_marks_down_a_copy_of_their_own_opinion():
    group = groups(1)[0]
    citizen = group.citizens[0]
    gold = rate_text(citizen, group.question, citizen.opinion)
    assert gold.agreement < gold.agreement_without_voice and gold.quality < gold.quality_without_voice
    assert is_copy(read(citizen.opinion, group.question).words, citizen.opinion)


def test_over_long_text_scores_low():
    rng = Random(4)
    group = groups(1)[0]
    sentences = [s for k in range(12) for s in item_sentences(list(groups(20, seed=9)[k].citizens[0].wants), rng)]
    assert group_mean(group, " ".join(sentences)) < 2.2


def test_vague_and_wrong_side_statements_score_below_balanced_ones():
    assert mean_over_groups(WRITERS["vague"]) < BALANCED - 1.5
    assert mean_over_groups(WRITERS["wrong_side"]) < BALANCED - 0.7


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_whatever_the_writer_writes_is_recognised(kind):
    rng = Random(5)
    for group in groups(30):
        text = write_statement(group, rng, kind)
        reading = read(text, group.question)
        assert all(reading.ok), text
        assert reading.full_stop


def test_every_opinion_is_recognised_with_its_stance_and_wants():
    for group in groups(100):
        for citizen in group.citizens:
            reading = read(citizen.opinion, group.question)
            assert all(reading.ok), citizen.opinion
            assert reading.stance == citizen.stance
            found = {(i.slot, i.kind, i.words) for i in reading.items}
            assert {(w.slot, w.kind, w.words) for w in citizen.wants} <= found


def test_nearly_every_opinion_is_in_one_persons_voice():
    spoken = [read(c.opinion, g.question).personal for g in groups(200) for c in g.citizens]
    assert 0.97 < sum(spoken) / len(spoken) <= 1  # a bare claim with a bare reason names no person


def test_held_out_words_appear_in_held_out_worlds_only():
    from deliberation.lexicon import HELD_OUT_EVERY, load_lexicon

    heads = load_lexicon().heads
    held_out = set(heads[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])

    def share(flag: bool) -> float:
        rng = Random(6)
        lexicon = load_lexicon()
        drawn = [lexicon.draw("heads", rng, flag) for _ in range(500)]
        return sum(d in held_out for d in drawn) / len(drawn)

    assert share(False) == 0
    assert 0.5 < share(True) < 0.7


def test_two_processes_with_the_same_seed_make_the_same_groups():
    code = (
        "from random import Random; from deliberation.citizens import draw_group;"
        "from deliberation.questions import load_questions; from deliberation.writer import write_statement;"
        "r = Random(7); q = load_questions('test');"
        "print([(g := draw_group(r.choice(q), r, True)).citizens and write_statement(g, r) for _ in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 100


@given(st.text(max_size=300))
@settings(max_examples=200)
def test_any_text_gets_a_rating_on_the_scale(text):
    gold = rate_text(CITIZEN, QUESTION, text)
    assert 1 <= gold.agreement <= 7 and 1 <= gold.quality <= 7
    assert gold.agreement <= gold.agreement_without_voice and gold.quality <= gold.quality_without_voice


@given(st.integers(0, 10_000))
@settings(max_examples=50)
def test_noise_free_ratings_are_what_noisy_ones_scatter_around(seed):
    rng = Random(seed)
    ratings = [noisy_rating(4.0, rng) for _ in range(200)]
    assert abs(statistics.mean(ratings) - 4.0) < 0.3
    assert 0.5 < statistics.stdev(ratings) < 1.0


@pytest.mark.parametrize(
    "item, expected",
    [
        (Item("concern", "cost", ("young", "parents"), 1), 1.0),
        (Item("concern", "cost", ("rural", "nurses"), 1), 0.4),
        (Item("concern", "safety", ("young", "parents"), 1), 0.25),
        (Item("concern", "safety", ("rural", "nurses"), 1), 0.0),
        (Item("reason", "reason", ("young", "parents"), 1), 0.0),
    ],
)
def test_match(item, expected):
    assert match(item, COST) == pytest.approx(expected)
