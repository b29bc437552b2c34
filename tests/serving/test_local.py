"""Sampler and judge on tiny random models."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from deliberation.prompts import statement_prompt
from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel, fingerprint
from rl.policy import sample
from serving.best_of_n import best_of_n
from serving.config import Sampling
from serving.local import LocalJudge, LocalSampler, LocalServices
from serving.orders import draw_orders

from tiny import make_judge, make_policy, make_tokenizer

OPINIONS = ["Yes, for all.", "No.", "Only green tea."]


@pytest.fixture(scope="module")
def sampler():
    tokenizer = make_tokenizer()
    return LocalSampler(make_policy(tokenizer), tokenizer, Sampling(max_new_tokens=10))


@pytest.fixture(scope="module")
def judge():
    tokenizer = make_tokenizer()
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    return LocalJudge(PreferenceModel(make_judge(tokenizer), tokenizer, calibration, {}))


def test_a_fingerprint_sees_one_changed_weight_and_nothing_else():
    tokenizer = make_tokenizer()
    model, twin = make_policy(tokenizer), make_policy(tokenizer)
    assert fingerprint(model) == fingerprint(twin.train())
    with torch.no_grad():
        twin.model.norm.weight[0] += 1e-6
    assert fingerprint(model) != fingerprint(twin)


def test_orders_sampled_together_are_as_sampled_alone(sampler):
    orders, _ = draw_orders(3, 9, 5, reshuffle=True)
    assert len({o.count for o in orders}) > 1 and max(o.count for o in orders) > 1  # several batches
    together = sampler.sample("Should tea be free?", OPINIONS, orders)
    alone = [sampler.sample("Should tea be free?", OPINIONS, [order])[0] for order in orders]
    assert together == alone
    assert [draft.shown for draft in together] == [order.members for order in orders]


def test_drafts_say_how_many_tokens_were_read_and_written(sampler):
    orders, _ = draw_orders(3, 4, 5, reshuffle=True)
    drafts = sampler.sample("Should tea be free?", OPINIONS, orders)
    for order, draft in zip(orders, drafts, strict=True):
        prompt = statement_prompt("Should tea be free?", [OPINIONS[m] for m in draft.shown])
        (samples,) = sample(
            sampler.model, sampler.tokenizer, [prompt], n=order.count, seeds=[order.seed], max_new_tokens=10, top_p=0.8
        )
        assert draft.texts == tuple(s.text for s in samples)
        assert draft.prompt_tokens == len(sampler.tokenizer(prompt).input_ids)
        assert draft.completion_tokens == sum(len(s.ids) for s in samples) > 0


def test_reshuffling_ends_in_a_consensus_too(sampler, judge):
    result = best_of_n(sampler, judge, "Should tea be free?", OPINIONS, n=6, seed=5, reshuffle=True)
    assert len(result.candidates) == 6 and result.not_shown == ()
    assert result == best_of_n(sampler, judge, "Should tea be free?", OPINIONS, n=6, seed=5, reshuffle=True)


def test_as_many_opinions_are_shown_as_fit(sampler):
    opinions = ["word " * 60] * 12
    (order,), _ = draw_orders(12, 1, 0, reshuffle=False)
    (draft,) = sampler.sample("Why?", opinions, [order])
    assert 3 < len(draft.shown) < 12 and draft.shown == order.members[: len(draft.shown)]
    exact = LocalSampler(sampler.model, sampler.tokenizer, sampler.sampling)
    exact.room = len(sampler.tokenizer(statement_prompt("Why?", opinions[:3])).input_ids)
    assert len(exact.sample("Why?", opinions, [order])[0].shown) == 3
    exact.room -= 1
    assert len(exact.sample("Why?", opinions, [order])[0].shown) == 2


def test_the_judges_arrays_agree_with_each_other(judge):
    judgement = judge.judge("Why?", OPINIONS, ["Tea for all.", "Tea for none."])
    assert judgement.raw.shape == judgement.utilities.shape == (3, 2)
    assert judgement.probabilities.shape == (3, 2, 7)
    np.testing.assert_allclose(judgement.probabilities @ np.arange(1, 8), judgement.utilities, atol=1e-5)


def test_the_judge_refuses_what_it_cannot_read(judge):
    with pytest.raises(InputError, match="tokens") as caught:
        judge.judge("Why?", ["Yes.", "x" * 2000], ["Tea for all of us."])
    assert caught.value.field == "opinions[1]"


class Gated:
    """A policy and a preference model in one, whose calls last until they are let go; the calls in turn."""

    version = "sha256:gated"

    def __init__(self):
        self.opened, self.begun = threading.Event(), []

    def sample(self, question, opinions, orders):
        self.begun.append(question)
        assert self.opened.wait(20)
        self.begun.append(question)
        return []

    judge = sample


async def test_calls_wait_in_turn_and_keep_nobody_else_waiting():
    model = Gated()
    services = LocalServices({"default": model}, {"default": model})
    calls = []
    for k in range(20):  # twice a name: more than the loop's own threads on many machines
        calls.append(asyncio.ensure_future(services.sampler("default").sample(f"s{k}", ["Yes."], [])))
        calls.append(asyncio.ensure_future(services.judge("default").judge(f"j{k}", ["Yes."], [])))
    try:
        while not model.begun:
            await asyncio.sleep(0.001)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
        assert model.begun == ["s0"]
        last = calls.pop()  # nobody waits for that one
        last.cancel()
        await asyncio.wait({last})
    finally:
        model.opened.set()
    await asyncio.gather(*calls)
    expected = [f"{kind}{k}" for k in range(20) for kind in "sj"][:-1]
    assert model.begun == [name for name in expected for _ in range(2)]  # one at a time, first come, first served
