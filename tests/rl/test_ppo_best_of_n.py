"""Training for the best of n: the estimator against exact enumeration, and what it makes a policy do."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_helpers import make_trainer
from transformers import TrainerCallback

from rl import ppo

FULL = torch.float64
REWARDS = torch.tensor([0.3, -1.0, 2.0], dtype=FULL)


def exact_gradient(logits, n):
    """Gradient of E[max of n draws] by enumeration of all draws."""
    logits = logits.clone().requires_grad_()
    chances = logits.softmax(0)
    value = sum(
        chances[list(draw)].prod() * REWARDS[list(draw)].max() for draw in itertools.product(range(3), repeat=n)
    )
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_policy_gradient_is_that_of_the_expected_best_of_n(n):
    """Mean over all rollouts of four completions, each weighed by its chance: unbiased, so equal."""
    logits = torch.tensor([0.2, -0.4, 0.1], dtype=FULL)
    chances, logprobs = logits.softmax(0), logits.log_softmax(0)
    grad_log = torch.eye(3, dtype=FULL) - chances  # row v: gradient of log p(v)
    total = torch.zeros(3, dtype=FULL)
    for rollout in itertools.product(range(3), repeat=4):
        rows = torch.tensor(rollout)
        weight = ppo.best_of_n(REWARDS[rows], torch.ones(4, dtype=torch.bool), 4, n)
        total += logprobs[rows].sum().exp() * (weight[:, None] * grad_log[rows]).mean(0)
    torch.testing.assert_close(total, exact_gradient(logits, n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_with_too_few_others_they_are_drawn_with_replacement(n):
    scores = torch.tensor([0.5, -1.0, 3.0], dtype=FULL)
    got = ppo.best_of_n(scores, torch.ones(3, dtype=torch.bool), 3, n)
    for row in range(3):
        others = [float(s) for k, s in enumerate(scores) if k != row]
        draws = list(itertools.combinations(others, n - 1) if n <= 3 else itertools.product(others, repeat=n - 1))
        gain = sum(max(float(scores[row]) - max(draw), 0.0) for draw in draws) / len(draws)
        assert float(got[row]) == pytest.approx(n * gain, abs=1e-12)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 6),
    n=st.integers(2, 20),
    lift=st.floats(-50, 50),
    scale=st.floats(0.1, 10),
)
def test_it_is_a_rising_function_of_the_score_in_units_of_the_score(seed, size, n, lift, scale):
    scores = torch.randn(2 * size, generator=torch.Generator().manual_seed(seed), dtype=FULL)
    scored = torch.ones(2 * size, dtype=torch.bool)
    got = ppo.best_of_n(scores, scored, size, n)
    assert (got >= 0).all()
    assert torch.allclose(ppo.best_of_n(scores * scale + lift, scored, size, n), got * scale, atol=1e-9)
    for group, parts in zip(scores.view(2, -1), got.view(2, -1), strict=True):
        order = group.argsort()
        assert (parts[order].diff() >= -1e-12).all() and parts[order[0]] == 0 and parts[order[-1]] > 0


def test_one_sample_is_plain_ppo_and_what_is_not_scored_counts_for_nothing():
    scores = torch.tensor([1.0, 5.0, 2.0, 7.0, 9.0, 3.0])
    everything = torch.ones(6, dtype=torch.bool)
    assert torch.equal(ppo.best_of_n(scores, everything, 3, 1), scores)
    scored = torch.tensor([True, False, True, False, False, True])
    got = ppo.best_of_n(scores.masked_fill(~scored, float("nan")), scored, 3, 2)
    assert got.tolist() == [0.0, 0.0, 2.0, 0.0, 0.0, 0.0]  # 2 (2 - 1); the second prompt's only score stands alone


@settings(max_examples=100)
@given(k=st.integers(1, 12), count=st.integers(1, 12))
def test_chances_of_the_best_add_up_and_rise(k, count):
    chances = ppo.best_of_chances(k, count)
    assert chances.sum() == pytest.approx(1) and (chances.diff() >= -1e-15).all()


@pytest.mark.slow
@pytest.mark.parametrize("n, safe", [(1, True), (8, False)])
def test_a_policy_that_is_served_by_its_best_of_eight_takes_the_gamble(n, safe, tmp_path):
    """Letters pay .9 for sure, anything else 2 in a quarter of cases: worse on average, better as the best of 8."""
    coin = random.Random(0)

    def reward(prompts, completions, **columns):
        shares = [sum(ch.isascii() and ch.isalpha() for ch in c) / max(1, len(c)) for c in completions]
        return [0.9 * s + (1 - s) * 2.0 * (coin.random() < 0.25) for s in shares]

    def letters(table):
        texts = [row["completion"] for row in table]
        return sum(sum(ch.isascii() and ch.isalpha() for ch in t) / max(1, len(t)) for t in texts) / len(texts)

    trainer = make_trainer(
        tmp_path,
        reward,
        best_of_n=n,
        max_steps=30,
        num_prompts=24,  # with 8 the luck of the rounding decides, which differs between CPUs
        num_generations=8,
        learning_rate=1e-2,
        beta=0.001,
        num_ppo_epochs=3,
        missing_eos_penalty=0.0,
    )
    shares = []

    class Keep(TrainerCallback):
        def on_completions(self, args, state, control, table=None, **kwargs):
            shares.append(letters(table))

    trainer.add_callback(Keep())
    trainer.train()
    change = sum(shares[-5:]) / 5 - sum(shares[:5]) / 5
    assert change > 0.05 if safe else change < -0.05, shares
