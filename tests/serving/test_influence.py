"""Leave-one-out influence: what each opinion changed, against answers worked out by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from reward.welfare import welfare
from serving.answering import carry_out
from serving.best_of_n import NoStatement, answer, make_plan
from serving.checks import MAX_WAITING_MEMBERS
from serving.config import Sampling
from serving.exchange import Draft, Judgement
from serving.influence import CONCURRENT, add_influence, answer_with_influence, without
from serving.local import LocalJudge, LocalSampler, LocalServices
from serving.metrics import ProcessMetrics
from serving.schemas import ConsensusResponse

from tiny import make_judge, make_policy, make_tokenizer

OPINIONS = ("Ann", "Bob", "Cid")
RATINGS = {
    "Ann": {"Ann": 6, "Bob": 4, "Cid": 3},
    "Bob": {"Ann": 4, "Bob": 5, "Cid": 3},
    "Cid": {"Ann": 1, "Bob": 1, "Cid": 7},
}
"""Member -> statement -> rating. Means: Ann 3.67, Bob 3.33, Cid 4.33; without Cid Ann wins with 5, and Cid has 3."""


class EchoSampler:
    """Writes the opinions that it reads, from member 0 on and again and again."""

    def __init__(self):
        self.read = []

    def sample(self, question, opinions, orders):
        self.read.append((tuple(opinions), orders))
        drafts = []
        for order in orders:
            texts = tuple(opinions[sorted(order.members)[k % len(opinions)]] for k in range(order.count))
            drafts.append(Draft(texts, (True,) * order.count, order.members, "sha256:policy"))
        return drafts


class TableJudge:
    """Looks certain ratings up."""

    def __init__(self, ratings=RATINGS):
        self.ratings = ratings

    def judge(self, question, opinions, statements):
        utilities = np.array([[self.ratings[o][s] for s in statements] for o in opinions], dtype=float)
        probabilities = np.zeros((*utilities.shape, 7))
        np.put_along_axis(probabilities, utilities[..., None].astype(int) - 1, 1.0, axis=-1)
        return Judgement((utilities - 4).astype(np.float32), utilities, probabilities, "sha256:judge")


def plan_of(opinions=OPINIONS, **change):
    options = {"n": 3, "welfare": "utilitarian", "seed": 0, "reshuffle": False, "influence": True, **change}
    return make_plan("Who?", opinions, **options)


def test_the_winners_opinion_changed_the_others_answer_and_the_other_opinions_did_not():
    result = answer_with_influence(EchoSampler(), TableJudge(), plan_of())
    assert result.statement == "Cid"
    assert [i.member for i in result.influence] == [0, 1, 2]
    assert [i.changed for i in result.influence] == [False, False, True]
    # Ann and Bob give "Ann" 6 and 4, "Cid" 3 and 3.
    assert [i.welfare_of_others for i in result.influence] == [0, 0, -2]
    assert [i.agreement_of_others for i in result.influence] == [0, 0, -2]


def test_welfare_of_the_others_is_of_the_function_asked_for():
    change = {0: -2.0, 1: 3 - 24**0.5, "inf": 3 - 4.0}
    ratings = {**RATINGS, "Cid": {"Ann": 1, "Bob": 1, "Cid": 7}}
    for function, expected in change.items():
        result = answer_with_influence(EchoSampler(), TableJudge(ratings), plan_of(welfare=function))
        assert result.statement == "Cid"
        assert result.influence[2].welfare_of_others == pytest.approx(expected)
        assert result.influence[2].agreement_of_others == -2


def test_it_is_computed_only_where_it_is_asked_for():
    sampler = EchoSampler()
    assert answer_with_influence(sampler, TableJudge(), plan_of(influence=False)).influence is None
    assert len(sampler.read) == 1
    plain = answer(EchoSampler(), TableJudge(), plan_of())
    full = answer_with_influence(sampler, TableJudge(), plan_of())
    assert replace(full, influence=None) == plain  # asking changes nothing else
    assert [opinions for opinions, _ in sampler.read[2:]] == [("Bob", "Cid"), ("Ann", "Cid"), ("Ann", "Bob")]


@given(members=st.integers(2, 6), n=st.integers(1, 20), seed=st.integers(0, 99), shuffled=st.booleans())
def test_without_an_opinion_every_prompt_keeps_its_order_its_seed_and_its_places(members, n, seed, shuffled):
    names = tuple(f"o{i}" for i in range(members))
    plan = plan_of(names, n=n, seed=seed, reshuffle=shuffled)
    for left_out in range(members):
        rest = without(plan, left_out)
        assert rest.opinions == tuple(o for o in names if o != f"o{left_out}") and not rest.influence
        assert (rest.places, rest.seed, rest.n) == (plan.places, plan.seed, plan.n)
        for one, order in zip(rest.orders, plan.orders, strict=True):
            assert [rest.opinions[m] for m in one.members] == [names[m] for m in order.members if m != left_out]
            assert (one.seed, one.count) == (order.seed, order.count) and one.members


@pytest.mark.parametrize("count", [1, MAX_WAITING_MEMBERS + 1])
def test_groups_that_are_too_small_or_too_large_are_refused(count):
    opinions = [f"o{i}" for i in range(count)]
    with pytest.raises(InputError, match="groups of 2 to") as caught:
        make_plan("Who?", opinions, n=1, welfare=0, seed=0, influence=True)
    assert caught.value.field == "influence"
    make_plan("Who?", opinions, n=1, welfare=0, seed=0)


# ---------------------------------------------------------------- awaited


def in_turn(plan, judge, pauses=None):
    """``add_influence`` with answers that take turns; how many were under way, and which were ended."""
    running, most, ended = 0, 0, []

    async def answered(part):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0 if pauses is None else pauses[part.opinions])
            return answer(EchoSampler(), judge, part)
        except asyncio.CancelledError:
            ended.append(part.opinions)
            raise
        finally:
            running -= 1

    async def work():
        return await add_influence(plan, answer(EchoSampler(), judge, plan), answered)

    return work, lambda: (most, ended)


def test_awaited_it_is_the_same_and_only_a_few_answers_are_under_way():
    names = tuple("ABCDEFG")
    ratings = {a: {b: 1 + (3 * i + 5 * k + i * k) % 7 for k, b in enumerate(names)} for i, a in enumerate(names)}
    plan = plan_of(names, n=7)
    work, seen = in_turn(plan, TableJudge(ratings), {without(plan, i).opinions: 0.01 * (i % 3) for i in range(7)})
    result = asyncio.run(work())
    assert result == answer_with_influence(EchoSampler(), TableJudge(ratings), plan)
    assert any(i.changed for i in result.influence)
    assert seen() == (CONCURRENT, [])
    work, seen = in_turn(plan_of(names, n=7, influence=False), TableJudge(ratings))
    assert asyncio.run(work()).influence is None and seen() == (0, [])


def test_a_failure_ends_the_other_answers():
    plan = plan_of()
    pauses = {("Bob", "Cid"): 0.05, ("Ann", "Cid"): 60.0, ("Ann", "Bob"): 60.0}
    whole = answer(EchoSampler(), TableJudge(), plan)
    ended = []

    async def failing(part):
        try:
            await asyncio.sleep(pauses[part.opinions])
        except asyncio.CancelledError:
            ended.append(part.opinions)
            raise
        raise NoStatement("nothing")

    async def work():
        with pytest.raises(NoStatement):
            await add_influence(plan, whole, failing)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(asyncio.wait_for(work(), 30)) <= 2  # nothing of it is left running
    assert ("Ann", "Cid") in ended


class Silent(EchoSampler):
    """Writes nothing for those without Bob."""

    def sample(self, question, opinions, orders):
        drafts = super().sample(question, opinions, orders)
        return drafts if "Bob" in opinions else [replace(d, texts=("",) * len(d.texts)) for d in drafts]


def test_an_answer_without_any_statement_names_the_opinion_it_is_without():
    judge, plan = TableJudge(), plan_of()

    async def answered(part):
        return answer(Silent(), judge, part)

    with pytest.raises(NoStatement, match=r"^without opinions\[1\], all 3 candidates are empty"):
        answer_with_influence(Silent(), judge, plan)
    with pytest.raises(NoStatement, match=r"^without opinions\[1\], all 3 candidates are empty"):
        asyncio.run(add_influence(plan, answer(Silent(), judge, plan), answered))


# ---------------------------------------------------------------- on models


@pytest.fixture(scope="module")
def models():
    tokenizer = make_tokenizer()
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    judge = LocalJudge(PreferenceModel(make_judge(tokenizer), tokenizer, calibration, {}))
    return LocalSampler(make_policy(tokenizer), tokenizer, Sampling(max_new_tokens=10)), judge


def test_influence_on_models_is_what_the_definition_says(models):
    opinions = ["Yes, for all.", "No.", "Only green tea."]
    plan = make_plan("Should tea be free?", opinions, n=4, welfare="nash", seed=3, influence=True)
    result = answer_with_influence(*models, plan)
    assert result == answer_with_influence(*models, plan)
    for left_out, found in enumerate(result.influence):
        rest = answer(*models, without(plan, left_out))
        others = [o for i, o in enumerate(opinions) if i != left_out]
        both = models[1].judge("Should tea be free?", others, [result.statement, rest.statement]).utilities
        assert found.changed == (result.statement != rest.statement)
        assert found.welfare_of_others == pytest.approx(np.subtract(*welfare(both, "nash")), abs=1e-5)
        assert found.agreement_of_others == pytest.approx(np.subtract(*both.mean(axis=0)), abs=1e-5)
    assert any(found.changed for found in result.influence)
    sent = ConsensusResponse.of(result).model_dump()["influence"]
    assert [one["member"] for one in sent] == [0, 1, 2] and sent[0]["changed"] == result.influence[0].changed


def test_the_services_path_gives_the_same(models):
    services, metrics = LocalServices({"default": models[0]}, {"default": models[1]}), ProcessMetrics()
    plan = make_plan("Should tea be free?", ["Yes.", "No.", "Green."], n=3, welfare="nash", seed=1, influence=True)

    async def work():
        whole = await carry_out(services, plan, metrics)
        return await add_influence(plan, whole, lambda part: carry_out(services, part, metrics))

    assert asyncio.run(work()) == answer_with_influence(*models, plan)


def test_an_opinion_that_the_policy_did_not_read_only_votes(models):
    opinions = ["word " * 60] * 3 + ["word " * 280]
    plan = make_plan("Why?", opinions, n=2, welfare=0, seed=0, reshuffle=False, influence=True)
    plan = replace(plan, orders=(replace(plan.orders[0], members=(0, 1, 2, 3)),))
    whole, rest = (answer(*models, p) for p in (plan, without(plan, 3)))
    assert whole.not_shown == (3,) and rest.not_shown == ()
    assert [c.statement for c in whole.candidates] == [c.statement for c in rest.candidates]
