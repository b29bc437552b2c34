"""One PPO update's mathematics against a reference in plain Python: lists of floats, loops, derivatives by hand."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import ppo

VOCABULARY = 5
FULL = torch.float64


@dataclass
class Case:
    """A rollout and what the models say of it afterwards; [rows][tokens] (of the row's own length), logits a token."""

    lengths: list[int]
    targets: list[list[int]]
    old: list[list[list[float]]]
    ref: list[list[list[float]]]
    new: list[list[list[float]]]
    old_values: list[list[float]]
    new_values: list[list[float]]
    scores: list[float]
    finished: list[bool]
    scored: list[bool]
    generations: int
    leave_one_out: bool
    whiten: bool
    temperature: float
    beta: float
    gamma: float
    lam: float
    clip: float
    clip_value: float
    vf_coef: float
    reward_clip: float
    penalty: float
    length_penalty: float
    entropy_coef: float
    whiten_rewards: bool


def draw(seed: int) -> Case:
    """Rows of unequal length; the new policy near the old one, so that every branch of the losses is met."""
    rng = random.Random(seed)
    generations = rng.randint(1, 3)
    rows = generations * rng.randint(1, 3)
    lengths = [rng.randint(1, 6) for _ in range(rows)]
    step = rng.choice((0.0, 0.1, 1.0))

    def normal(scale=1.0):
        return [[rng.gauss(0, scale) for _ in range(n)] for n in lengths]

    def logits():
        return [[[rng.gauss(0, 1) for _ in range(VOCABULARY)] for _ in range(n)] for n in lengths]

    def near(x):
        return [[[v + step * rng.gauss(0, 1) for v in token] for token in row] for row in x]

    old, old_values = logits(), normal()
    scored = [rng.random() < 0.8 for _ in range(rows)]
    scored[rng.randrange(rows)] = True
    return Case(
        lengths,
        [[rng.randrange(VOCABULARY) for _ in range(n)] for n in lengths],
        old,
        near(old),
        near(old),
        old_values,
        [[v + step * rng.gauss(0, 1) for v in row] for row in old_values],
        [rng.gauss(0, 4) for _ in range(rows)],
        [rng.random() < 0.7 for _ in range(rows)],
        scored,
        generations,
        rng.random() < 0.5,
        rng.random() < 0.5,
        rng.choice((0.7, 1.0, 1.5)),
        rng.choice((0.0, 0.05, 1.0)),
        rng.choice((0.9, 1.0)),
        rng.choice((0.0, 0.95, 1.0)),
        rng.uniform(0.05, 0.4),
        rng.uniform(0.05, 0.4),
        rng.uniform(0.0, 1.0),
        rng.uniform(1.0, 8.0),
        rng.uniform(0.0, 2.0),
        rng.choice((0.0, 0.1)),
        rng.choice((0.0, 0.2)),
        rng.random() < 0.3,
    )


def reference(c: Case):
    """(policy loss, value loss, advantages, returns, gradient by the new logits, gradient by the new values)."""
    rows = range(len(c.lengths))

    def probabilities(logits):
        scaled = [v / c.temperature for v in logits]
        top = max(scaled)
        weights = [math.exp(v - top) for v in scaled]
        return [w / sum(weights) for w in weights]

    def logprobs(logits):
        return [
            [math.log(probabilities(token)[target]) for token, target in zip(row, targets, strict=True)]
            for row, targets in zip(logits, c.targets, strict=True)
        ]

    old, ref, new = logprobs(c.old), logprobs(c.ref), logprobs(c.new)
    # scores: clip, penalty, baseline of the prompt's other completions
    shaped = [min(max(s, -c.reward_clip), c.reward_clip) for s in c.scores]
    shaped = [s - (0.0 if done else c.penalty) for s, done in zip(shaped, c.finished, strict=True)]
    shaped = [s - c.length_penalty * n for s, n in zip(shaped, c.lengths, strict=True)]
    centred = list(shaped)
    if c.leave_one_out:
        for i in rows:
            first = i // c.generations * c.generations
            others = [shaped[k] for k in range(first, first + c.generations) if k != i and c.scored[k]]
            centred[i] = shaped[i] - sum(others) / len(others) if c.scored[i] and others else 0.0
    # token rewards and advantages, by the definition: A_t = sum_l (gamma lam)^l delta_(t+l)
    paid = [[-c.beta * (p - q) - c.entropy_coef * p for p, q in zip(old[i], ref[i], strict=True)] for i in rows]
    for i in rows:
        paid[i][-1] += centred[i]
    if c.whiten_rewards:
        kept = [r for i in rows if c.scored[i] for r in paid[i]]
        mean = sum(kept) / len(kept)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in kept) / len(kept) + 1e-8)
        paid = [[(r - mean) / deviation + mean if c.scored[i] else 0.0 for r in paid[i]] for i in rows]
    advantages, returns = [], []
    for i in rows:
        n, rewards = c.lengths[i], paid[i]
        values = [*c.old_values[i], 0.0]
        delta = [rewards[t] + c.gamma * values[t + 1] - values[t] for t in range(n)]
        advantages.append([sum((c.gamma * c.lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
        returns.append([advantages[i][t] + values[t] for t in range(n)])
    if c.whiten:
        kept = [a for i in rows if c.scored[i] for a in advantages[i]]
        mean = sum(kept) / len(kept)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in kept) / len(kept) + 1e-8)
        advantages = [[(a - mean) / deviation if c.scored[i] else 0.0 for a in advantages[i]] for i in rows]
    # losses a token, and their derivatives
    tokens = sum(c.lengths[i] for i in rows if c.scored[i])
    policy = value = 0.0
    by_logits = [[[0.0] * VOCABULARY for _ in range(n)] for n in c.lengths]
    by_values = [[0.0] * n for n in c.lengths]
    for i in rows:
        for t in range(c.lengths[i] if c.scored[i] else 0):
            ratio, a = math.exp(new[i][t] - old[i][t]), advantages[i][t]
            plain, clipped = -a * ratio, -a * min(max(ratio, 1 - c.clip), 1 + c.clip)
            policy += max(plain, clipped) / tokens
            slope = plain / tokens if plain >= clipped else 0.0  # d ratio / d logprob = ratio; a clipped ratio is flat
            chances = probabilities(c.new[i][t])
            for v in range(VOCABULARY):
                by_logits[i][t][v] = slope * ((v == c.targets[i][t]) - chances[v]) / c.temperature
            now, before, goal = c.new_values[i][t], c.old_values[i][t], returns[i][t]
            near = min(max(now, before - c.clip_value), before + c.clip_value)
            value += 0.5 * max((now - goal) ** 2, (near - goal) ** 2) / tokens
            if (now - goal) ** 2 >= (near - goal) ** 2:
                by_values[i][t] = c.vf_coef * (now - goal) / tokens
    return policy, value, advantages, returns, by_logits, by_values


def padded(rows, width, fill=float("nan")):
    """[rows, width, ...]: what is not there is NaN, so that whoever reads it is found out."""
    like = torch.tensor(rows[0], dtype=FULL)
    out = torch.full((len(rows), width, *like.shape[1:]), fill, dtype=FULL)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=FULL)
    return out


def ours(c: Case, rows=slice(None), num_tokens=None, extra: int = 0):
    """The same by ``rl.ppo``, in the trainer's order; ``rows``: the losses of these alone. ``extra``: more padding."""
    mask = ppo.length_mask(torch.tensor(c.lengths), max(c.lengths) + extra)
    width = mask.shape[1]
    targets = padded([[float(t) for t in row] for row in c.targets], width, 0.0).long()[..., None]

    def logprobs(logits):
        return (logits / c.temperature).log_softmax(-1).gather(-1, targets).squeeze(-1)

    old, ref = (logprobs(padded(x, width)) for x in (c.old, c.ref))
    logits = padded(c.new, width).requires_grad_()
    values = padded(c.new_values, width).requires_grad_()
    old_values = padded(c.old_values, width)
    finished, scored = torch.tensor(c.finished), torch.tensor(c.scored)
    scores = torch.tensor(c.scores, dtype=FULL)
    penalties = dict(missing_eos_penalty=c.penalty, length_penalty=c.length_penalty)
    scores = ppo.shape_scores(scores, finished, torch.tensor(c.lengths), clip=c.reward_clip, **penalties)
    if c.leave_one_out:
        scores = ppo.leave_one_out(scores, scored, c.generations)
    rewards = ppo.token_rewards(scores, old, ref, mask, c.beta, c.entropy_coef)
    if c.whiten_rewards:
        rewards = ppo.whiten(rewards, mask & scored[:, None], shift_mean=False)
    advantages, returns = ppo.gae(rewards, old_values, mask, c.gamma, c.lam)
    trained = mask & scored[:, None]
    if c.whiten:
        advantages = ppo.whiten(advantages, trained)
    count = trained.sum() if num_tokens is None else num_tokens
    policy, _ = ppo.policy_loss(
        logprobs(logits)[rows], old[rows], advantages[rows], trained[rows], clip=c.clip, num_tokens=count
    )
    value, _ = ppo.value_loss(
        values[rows], old_values[rows], returns[rows], trained[rows], clip=c.clip_value, num_tokens=count
    )
    grads = torch.autograd.grad(policy + c.vf_coef * value, (logits, values))
    kept = [torch.where(mask[..., None] if g.dim() == 3 else mask, g, 0.0) for g in grads]
    return policy, value, advantages, returns, mask, trained, kept


def close(got, expected) -> None:
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9), (got - expected).abs().max()


@settings(max_examples=1000)
@given(seed=st.integers(0, 10**9))
def test_an_update_equals_the_reference(seed):
    case = draw(seed)
    policy, value, advantages, returns, by_logits, by_values = reference(case)
    got = ours(case)
    mask, width = got[4], got[4].shape[1]
    close(got[0], torch.tensor(policy, dtype=FULL))
    close(got[1], torch.tensor(value, dtype=FULL))
    wanted = mask if not case.whiten else got[5]
    close(got[2][wanted], padded(advantages, width)[wanted])
    close(got[3][mask], padded(returns, width)[mask])
    close(got[6][0], padded(by_logits, width, 0.0))
    close(got[6][1], padded(by_values, width, 0.0))


@settings(max_examples=200)
@given(seed=st.integers(0, 10**9), cut=st.integers(0, 9), extra=st.integers(0, 5))
def test_neither_a_split_into_micro_batches_nor_more_padding_changes_the_gradient(seed, cut, extra):
    case = draw(seed)
    whole = ours(case)
    count = whole[5].sum()
    parts = [ours(case, rows, count, extra) for rows in (slice(0, cut), slice(cut, None))]
    width = whole[4].shape[1]
    for k in (0, 1):
        close(parts[0][k] + parts[1][k], whole[k])
        close((parts[0][6][k] + parts[1][6][k])[:, :width], whole[6][k])


def test_the_cases_meet_every_branch():
    """Clipped and unclipped, both losses, both signs: a reference that never clips would prove nothing."""
    met = set()
    for seed in range(200):
        case = draw(seed)
        _, _, advantages, _, by_logits, by_values = reference(case)
        for i, row in enumerate(by_logits):
            for t, token in enumerate(row):
                if case.scored[i]:
                    met.add(("policy", advantages[i][t] > 0, any(token)))
                    met.add(("value", by_values[i][t] == 0))
    assert met == {("policy", a, b) for a in (False, True) for b in (False, True)} | {("value", False), ("value", True)}


@pytest.mark.parametrize("broken", ["gae", "whiten", "token_rewards", "policy_loss", "value_loss", "leave_one_out"])
def test_the_comparison_notices_a_wrong_function(broken, monkeypatch):
    """Each function a little wrong, and the comparison above fails on some of 60 cases."""
    right = getattr(ppo, broken)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return (out[0] * (1 + 1e-6), *out[1:]) if isinstance(out, tuple) else out * (1 + 1e-6)

    monkeypatch.setattr(ppo, broken, wrong)
    with pytest.raises(AssertionError):
        for seed in range(60):
            test_an_update_equals_the_reference.hypothesis.inner_test(seed)
