"""The maths of best of N, with a hand-made sampler and judge (the models have their own tests)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.types import MAX_MEMBERS, InputError
from serving.best_of_n import NoStatement, best_of_n, make_plan
from serving.checks import MAX_CANDIDATES, MAX_SEED
from serving.exchange import Draft, Judgement
from serving.orders import PARTS, TURN, draw_orders
from serving.views import member_view, rating_quantile

in_order = partial(best_of_n, reshuffle=False)  # the samplers below write the candidates in order

OPINIONS = ("Yes.", "No.", "Maybe.")


class ListSampler:
    """Writes the given texts, in order."""

    def __init__(self, texts, finished=True, shown=None):
        self.texts, self.finished, self.shown, self.orders = texts, finished, shown, None

    def sample(self, question, opinions, orders):
        self.orders = orders
        texts, drafts = iter(self.texts), []
        for order in orders:
            shown = order.members if self.shown is None else self.shown
            drawn = tuple(next(texts) for _ in range(order.count))
            drafts.append(Draft(drawn, (self.finished,) * order.count, shown, "sha256:policy"))
        return drafts


class TableJudge:
    """Every member's rating is certain and looked up: statement -> ratings of the members (integers)."""

    def __init__(self, table):
        self.table, self.seen = table, None

    def judge(self, question, opinions, statements):
        self.seen = list(statements)
        utilities = np.array([self.table[s] for s in statements], dtype=float).T
        probabilities = np.zeros((*utilities.shape, 7))
        np.put_along_axis(probabilities, utilities[..., None].astype(int) - 1, 1.0, axis=-1)
        return Judgement((utilities - 4).astype(np.float32), utilities, probabilities, "sha256:judge")


TABLE = {"Extreme.": [7, 7, 1], "Fair.": [4, 4, 4], "Middle.": [6, 5, 3]}
"""Means 5, 4, 4.67; geometric means 3.66, 4, 4.48; minima 1, 4, 3: each welfare function chooses another one."""


def ask(welfare="nash", texts=tuple(TABLE), **kwargs):
    return in_order(ListSampler(texts), TableJudge(TABLE), "Why?", OPINIONS, n=len(texts), welfare=welfare, **kwargs)


@pytest.mark.parametrize(
    ("welfare", "statement", "value"),
    [
        ("utilitarian", "Extreme.", 5.0),
        ("nash", "Middle.", 90 ** (1 / 3)),
        ("rawlsian", "Fair.", 4.0),
        (0, "Extreme.", 5.0),
        ("inf", "Fair.", 4.0),
        (math.inf, "Fair.", 4.0),
    ],
)
def test_each_welfare_function_chooses_its_own(welfare, statement, value):
    result = ask(welfare)
    assert result.statement == statement == result.candidates[result.index].statement
    assert result.welfare == pytest.approx(value)
    assert [result.winners[name].statement for name in ("utilitarian", "nash", "rawlsian")] == [
        "Extreme.",
        "Middle.",
        "Fair.",
    ]
    assert result.choice_mattered


def test_names_and_numbers_of_a_welfare_function_are_the_same_function():
    assert ask("nash").welfare_used == ask(1).welfare_used
    assert ask(1).welfare_used.name == "nash"
    assert ask(0.5).welfare_used.name is None


def test_candidates_keep_sampling_order_and_carry_scores_and_rank():
    result = ask("nash")
    assert [c.statement for c in result.candidates] == list(TABLE)
    assert [c.rank for c in result.candidates] == [3, 2, 1]
    assert result.candidates[0].utilities == (7.0, 7.0, 1.0)
    assert result.candidates[0].scores == (3.0, 3.0, -3.0)


def test_the_dissenter_is_named():
    result = ask("utilitarian")
    assert result.dissenters == (2,)
    dissenter = result.members[2]
    assert (dissenter.agreement, dissenter.sd, dissenter.low, dissenter.high) == (1.0, 0.0, 1, 1)
    assert dissenter.disagree == 1.0 and dissenter.dissents and not result.members[0].dissents


def test_a_neutral_member_does_not_dissent():
    assert ask("rawlsian").dissenters == ()  # all rate 4


def test_choice_did_not_matter_when_one_statement_is_best_for_all():
    table = {"Good.": [6, 6, 6], "Bad.": [2, 2, 2]}
    result = in_order(ListSampler(["Bad.", "Good."]), TableJudge(table), "Why?", OPINIONS, n=2)
    assert result.statement == "Good." and not result.choice_mattered


class UnsureJudge(TableJudge):
    """As sure of every utility as the table says."""

    def __init__(self, table, sd):
        super().__init__(table)
        self.sd = sd

    def judge(self, question, opinions, statements):
        sure = super().judge(question, opinions, statements)
        return replace(sure, sd=np.array([self.sd[s] for s in statements], dtype=float).T)


def test_an_uncertain_winner_gives_way_where_uncertainty_is_penalised():
    table, sd = {"Bold.": [6, 6, 6], "Safe.": [5, 5, 5]}, {"Bold.": [2, 2, 2], "Safe.": [0.1, 0.1, 0.1]}
    for penalty, winner in ((0.0, "Bold."), (0.4, "Bold."), (1.0, "Safe.")):
        sampler, judge = ListSampler(["Bold.", "", "Safe."]), UnsureJudge(table, sd)
        result = in_order(sampler, judge, "Why?", OPINIONS, n=3, uncertainty_penalty=penalty)
        assert result.statement == winner and result.winners["nash"].statement == winner
        assert result.candidates[0].utilities == (6.0, 6.0, 6.0)  # what is predicted stays what is shown
    assert result.welfare == pytest.approx(4.9)
    assert any("lowered by 1 standard deviations" in warning for warning in result.warnings)
    with pytest.raises(InputError, match="ensemble"):
        in_order(ListSampler(["Bold."]), TableJudge(table), "Why?", OPINIONS, n=1, uncertainty_penalty=1.0)


def test_ties_go_to_the_earlier_candidate():
    table = {"A.": [5, 5, 5], "B.": [5, 5, 5]}
    for texts in (["A.", "B."], ["B.", "A."]):
        result = in_order(ListSampler(texts), TableJudge(table), "Why?", OPINIONS, n=2)
        assert result.statement == texts[0]
        assert [c.rank for c in result.candidates] == [1, 2]


def test_completions_are_cleaned_before_they_are_scored():
    judge = TableJudge({"Fair.": [4, 4, 4]})
    in_order(ListSampler([' "Fair."\nOpinion: not part of it']), judge, "Why?", OPINIONS, n=1)
    assert judge.seen == ["Fair."]


def test_empty_statements_are_not_scored_never_chosen_and_warned_of():
    table = {"Bad.": [1, 1, 1]}
    judge = TableJudge(table)
    result = in_order(ListSampler([" \n", "Bad."]), judge, "Why?", OPINIONS, n=2)
    assert judge.seen == ["Bad."]
    assert result.statement == "Bad." and result.index == 1  # although the empty one has the same welfare, 1
    assert result.candidates[0].scores is None and result.candidates[0].rank == 2
    assert result.candidates[0].utilities == (1.0, 1.0, 1.0)
    assert any("1 of 2 candidates are empty" in warning for warning in result.warnings)


def test_nothing_but_empty_statements_is_an_error():
    with pytest.raises(NoStatement, match="all 2 candidates"):
        in_order(ListSampler(["", "\n"]), TableJudge({}), "Why?", OPINIONS, n=2)


def test_warnings():
    table = {"A.": [1, 2, 6]}
    sampler = ListSampler(["A.", "A."], finished=False, shown=(2, 0))
    result = in_order(sampler, TableJudge(table), "Why?", OPINIONS, n=2)
    text = " ".join(result.warnings)
    for words in ("cut off", "Only 1 of 2", "1 opinions did not fit", "2 of 3 members likely disagree"):
        assert words in text
    assert result.not_shown == (1,)
    assert [m.shown for m in result.members] == [True, False, True]
    assert ask("rawlsian").warnings == ()


def test_versions_seed_and_policy_are_in_the_result():
    result = ask(seed=5, policy="ppo")
    assert (result.seed, result.versions.policy) == (5, "ppo")
    assert (result.versions.policy_weights, result.versions.preference_model_weights) == (
        "sha256:policy",
        "sha256:judge",
    )


def test_one_order_a_request_drawn_from_the_seed():
    options = {"n": 16, "welfare": 1, "reshuffle": False}
    orders = [make_plan("Why?", ["a"] * 8, seed=seed, **options).orders for seed in range(8)]
    assert all(len(o) == 1 and o[0].count == 16 for o in orders)
    assert all(sorted(o[0].members) == list(range(8)) for o in orders)
    assert len({o[0].members for o in orders}) > 1
    assert orders[3] == make_plan("Why?", ["a"] * 8, seed=3, **options).orders


def test_four_samples_share_an_order_by_default_and_the_parts_they_go_without_come_last():
    plan = make_plan("Why?", ["a"] * 8, n=16, welfare=1, seed=0)
    read = {i: order.members for order, at in zip(plan.orders, plan.places, strict=True) for i in at}
    for first in range(0, 16, TURN):
        whole = read[first]
        without = [set(whole) - set(read[first + i]) for i in (1, 3)]
        assert read[first + 2] == whole and without[0].isdisjoint(without[1])
        assert set(whole[6:]) == without[0] | without[1]  # so all four prompts begin with the same six
        assert all(read[first + i] == tuple(m for m in whole if m in read[first + i]) for i in range(TURN))
    assert len({read[first] for first in range(0, 16, TURN)}) == 4 and len(plan.orders) == 12


def test_either_of_the_two_parts_that_come_last_is_the_very_last_half_of_the_time():
    last = 0
    for seed in range(200):
        orders, places = draw_orders(5, 2, seed, reshuffle=True)
        read = {i: order.members for order, at in zip(orders, places, strict=True) for i in at}
        last += read[0][-1] not in read[1]
    assert 70 < last < 130


@given(members=st.integers(1, 6), n=st.integers(1, 64), seed=st.integers(0, MAX_SEED))
def test_reshuffled_orders_are_distinct_and_fill_every_place_once(members, n, seed):
    orders, places = draw_orders(members, n, seed, reshuffle=True)
    assert len({o.members for o in orders}) == len(orders) == len({o.seed for o in orders})
    assert all(o.count == len(p) for o, p in zip(orders, places, strict=True))
    assert sorted(i for p in places for i in p) == list(range(n))
    assert all(0 <= o.seed <= MAX_SEED for o in orders)


@given(members=st.integers(1, 70), n=st.integers(1, 64), seed=st.integers(0, MAX_SEED))
def test_every_second_sample_goes_without_a_part_of_the_group_and_each_part_has_its_turn(members, n, seed):
    orders, places = draw_orders(members, n, seed, reshuffle=True)
    read = {i: set(order.members) for order, at in zip(orders, places, strict=True) for i in at}
    everyone = set(range(members))
    for i in range(n):
        assert (read[i] == everyone) == (members <= 2 or i % 2 == 0)
        assert len(everyone - read[i]) <= max(1, -(-members // PARTS)) and len(read[i]) >= members / 2
    if members > 2 and n >= 2 * PARTS:  # whatever a member writes, some samples are the others' alone
        assert all(any(m not in read[i] for i in range(n)) for m in everyone)
    fewer, few_places = draw_orders(members, max(1, n - 3), seed, reshuffle=True)
    assert [o.members for o in fewer] == [o.members for o in orders][: len(fewer)]  # more samples begin with the same
    assert [o.seed for o in fewer] == [o.seed for o in orders][: len(fewer)]
    assert all(a == b[: len(a)] for a, b in zip(few_places, places, strict=False))


def test_reshuffled_samples_land_in_their_places():
    orders, places = draw_orders(2, 6, 1, reshuffle=True)
    assert len(orders) == 2  # else this test shows nothing
    texts = [f"T{place}." for at in places for place in at]
    table = {text: [4, 4] for text in texts}
    result = best_of_n(ListSampler(texts), TableJudge(table), "Why?", OPINIONS[:2], n=6, seed=1, reshuffle=True)
    assert [c.statement for c in result.candidates] == [f"T{i}." for i in range(6)]


def test_member_view_of_a_known_distribution():
    view = member_view(3, np.array([0.04, 0.06, 0.2, 0.3, 0.2, 0.16, 0.04]), shown=True)
    assert view.agreement == pytest.approx(4.2)
    assert view.sd == pytest.approx(
        math.sqrt(0.04 * 10.24 + 0.06 * 4.84 + 0.2 * 1.44 + 0.3 * 0.04 + 0.2 * 0.64 + 0.16 * 3.24 + 0.04 * 7.84)
    )
    assert (view.low, view.high) == (2, 6)
    assert view.disagree == pytest.approx(0.3) and not view.dissents


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7).filter(lambda p: sum(p) > 0.1), st.floats(0.01, 0.99))
def test_quantile_is_the_first_rating_that_reaches_the_level(weights, level):
    p = np.array(weights) / sum(weights)
    k = rating_quantile(p, level)
    assert p[:k].sum() >= level - 1e-8
    assert k == 1 or p[: k - 1].sum() < level


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("opinions", {"opinions": []}),
        ("opinions", {"opinions": "Yes."}),
        ("opinions", {"opinions": ["a"] * (MAX_MEMBERS + 1)}),
        ("opinions[1]", {"opinions": ["a", " "]}),
        ("opinions[0]", {"opinions": ["a" * 2001]}),
        ("opinions[0]", {"opinions": ["\u200b\x07"]}),
        ("opinions[0]", {"opinions": [3]}),
        ("question", {"question": ""}),
        ("question", {"question": "\x00"}),
        ("n", {"n": 0}),
        ("n", {"n": MAX_CANDIDATES + 1}),
        ("n", {"n": True}),
        ("n", {"n": 2.0}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": MAX_SEED + 1}),
        ("welfare", {"welfare": "fair"}),
        ("welfare", {"welfare": -0.5}),
        ("welfare", {"welfare": math.nan}),
        ("welfare", {"welfare": True}),
        ("welfare", {"welfare": 10**400}),
        ("welfare", {"welfare": None}),
    ],
)
def test_bad_requests_name_the_field_and_reach_no_model(field, change):
    request = {"question": "Why?", "opinions": ["a", "b"], "n": 2, "welfare": "nash", "seed": 0, **change}
    with pytest.raises(InputError) as caught:
        best_of_n(None, None, **request)  # None: a model call would fail with another error
    assert caught.value.field == field
