"""The mathematics of PPO for a reward given once per completion. Torch alone: no models, no Ray, no state.

Shapes: ``B`` completions (rows), ``T`` the longest completion in action tokens. Every ``mask`` is bool ``[B, T]``,
True where an action token was sampled; it comes from recorded lengths, never from token ids. Values at masked
positions are never read, so they may hold anything, NaN included.

Losses are sums divided by ``num_tokens``, the action tokens of the WHOLE optimiser step (all micro-batches, all
ranks), so that they do not depend on how the step is cut. They return ``(loss, metrics)``; the metrics are detached
sums over the same ``num_tokens``, so that the metrics of micro-batches add up to those of the step.

Sources: PPO, https://arxiv.org/abs/1707.06347; GAE, https://arxiv.org/abs/1506.02438; the KL in the reward,
https://arxiv.org/abs/1909.08593; which details matter, "The N implementation details of RLHF with PPO" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with zeros where ``mask`` is False: unlike ``x * mask``, it stops NaN, and NaN gradients too."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def length_mask(lengths: Tensor, width: int | None = None) -> Tensor:
    """Bool ``[B, width]``, True at the first ``lengths[b]`` positions of row b; ``width`` defaults to the longest."""
    width = int(lengths.max()) if width is None else width
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def last_token_index(mask: Tensor) -> Tensor:
    """Index ``[B]`` of the last True of each row.

    Raises:
        ValueError: if a row has no action token (a completion has at least its end-of-sequence token).
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a completion has no action token; its score would have nowhere to go")
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)


def kl_estimators(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates, in nats, of KL(policy || reference) on tokens sampled from the policy.

    k1 = d is unbiased and may be negative: it goes into the reward. k2 = d^2 / 2 has the gradient of the KL. k3 =
    exp(-d) - 1 + d is never negative and has little variance: it is for monitoring. d = log pi - log pi_ref;
    http://joschu.net/blog/kl-approx.html.
    """
    d = logprobs - ref_logprobs
    return d, d.square() / 2, torch.expm1(-d) + d


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    *,
    missing_eos_penalty: float,
    clip: float | None,
    length_penalty: float = 0.0,
) -> Tensor:
    """Clip raw scores ``[B]`` to ``[-clip, clip]``, then take the penalties off.

    The one rule for truncation: a completion cut at the length limit is a terminal state and pays
    ``missing_eos_penalty``. ``finished`` is the sampler's flag (any stop token), never a comparison of token ids.
    ``length_penalty`` is paid for each of the ``lengths`` ``[B]`` action tokens.
    """
    clipped = scores if clip is None else scores.clamp(-clip, clip)
    return clipped - missing_eos_penalty * (~finished).to(scores.dtype) - length_penalty * lengths.to(scores.dtype)


def leave_one_out(scores: Tensor, scored: Tensor, num_generations: int) -> Tensor:
    """Each score ``[B]`` less the mean score of the other completions of its prompt.

    Rows are grouped by prompt, ``num_generations`` in a row; ``scored`` is bool ``[B]``. A row that is not scored, or
    has no other scored one beside it, gets 0: nothing is known about it. The baseline does not depend on the row's own
    completion, so the policy gradient stays unbiased (Kool et al. 2019; RLOO, https://arxiv.org/abs/2402.14740).
    """
    known = _kept(scores, scored).view(-1, num_generations)
    counted = scored.view(-1, num_generations)
    others = counted.sum(1, keepdim=True) - 1
    mean = (known.sum(1, keepdim=True) - known) / others.clamp(min=1)
    return torch.where(counted & (others > 0), known - mean, 0.0).view(-1)


def best_of_n(scores: Tensor, scored: Tensor, num_generations: int, n: int) -> Tensor:
    """What each completion ``[B]`` adds to the best of ``n`` samples of its prompt: ``n E[(score - M)^+]``.

    M is the best of n - 1 of the prompt's other scored completions; with these as scores, the policy gradient is that
    of E[best of n] in place of the mean (the part of M that cannot be beaten is a baseline: it does not depend on the
    completion). Drawn without replacement where there are n - 1 others: then unbiased (Walder and Karkhanis 2025,
    https://arxiv.org/abs/2505.15201; inference-aware fine-tuning: Chow et al. 2024, https://arxiv.org/abs/2412.15287).
    With replacement where there are fewer, which bends M towards them. n = 1: the scores as they are.

    Rows are grouped by prompt, ``num_generations`` in a row; ``scored`` is bool ``[B]``. A row that is not scored, or
    has no other scored one beside it, gets 0.
    """
    if n == 1:
        return scores
    out = torch.zeros_like(scores)
    for group in torch.arange(len(scores), device=scores.device).view(-1, num_generations):
        known = group[scored[group]]
        if len(known) < 2:
            continue
        chances = best_of_chances(n - 1, len(known) - 1).to(scores)
        for k, row in enumerate(known):
            others = scores[torch.cat([known[:k], known[k + 1 :]])].sort().values
            out[row] = n * (chances * (scores[row] - others).clamp(min=0)).sum()
    return out


def best_of_chances(k: int, count: int) -> Tensor:
    """float64 ``[count]``: the chance that the best of k draws is the i-th of ``count`` in ascending order."""
    if k <= count:  # without replacement: k - 1 of the i lower ones beside it
        return torch.tensor([math.comb(i, k - 1) / math.comb(count, k) for i in range(count)], dtype=torch.float64)
    return ((torch.arange(count + 1, dtype=torch.float64) / count) ** k).diff()


def adapted_beta(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next coefficient of the KL penalty (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2).

    Args:
        kl: mean KL to the reference of the update's completions, nats a completion.
        target: where it should settle.
        episodes: completions of the update.
        horizon: completions in which the coefficient may grow or shrink by about a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float, entropy_coef: float = 0.0
) -> Tensor:
    """Rewards ``[B, T]``: ``-beta * k1`` at every action token, plus ``scores`` at the last action token of a row.

    With ``entropy_coef`` a token also earns ``-entropy_coef * logprob``, of which the mean is the policy's entropy
    (maximum-entropy reinforcement learning: Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290).
    """
    k1 = kl_estimators(_kept(logprobs, mask), _kept(ref_logprobs, mask))[0]
    rewards = -beta * k1 - entropy_coef * _kept(logprobs, mask)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_token_index(mask)] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: ``(advantages, returns)``, both ``[B, T]`` and zero where masked.

    The end of a row is terminal (value 0 beyond it). At a masked position the recursion carries its state over:
    a gap in the middle of a row is as if it were not there.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        keep = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(keep, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, next_advantage, advantages[:, t])
    return advantages, _kept(advantages + values, mask)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Scale the unmasked entries of ``x`` to variance 1 (biased estimate), and to mean 0 unless told otherwise.

    Args:
        reduce: sums a tensor over ranks (all-reduce); every rank must call, an empty shard too. None: one process.
        eps: added to the variance, so that equal entries become 0 (or stay finite), never NaN. No entries: zeros.
    """
    reduce = reduce or (lambda t: t)
    kept = _kept(x, mask)
    count, total = reduce(torch.stack([mask.sum().to(x.dtype), kept.sum()])).unbind()
    count = count.clamp(min=1)
    mean = total / count
    centred = _kept(kept - mean, mask)
    variance = reduce(centred.square().sum()) / count
    scaled = centred * torch.rsqrt(variance + eps)
    return scaled if shift_mean else _kept(scaled + mean, mask)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, num_tokens: Tensor | float
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate: sum of ``max(-A r, -A clamp(r, 1 - clip, 1 + clip))`` over ``num_tokens``.

    Metrics: ``approxkl`` (k3 between the old and the new policy), ``clipfrac_low`` / ``clipfrac_high`` (tokens whose
    gradient the clip removed below / above 1), ``ratio``, ``ratio_sq``.
    """
    log_ratio = _kept(logprobs, mask) - _kept(old_logprobs, mask)
    advantages = _kept(advantages, mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = _kept(torch.maximum(plain, clipped), mask).sum() / num_tokens
    with torch.no_grad():
        per_token = {
            "approxkl": torch.expm1(log_ratio) - log_ratio,
            "clipfrac_low": ((ratio < 1 - clip) & (advantages < 0)).to(ratio.dtype),
            "clipfrac_high": ((ratio > 1 + clip) & (advantages > 0)).to(ratio.dtype),
            "ratio": ratio,
            "ratio_sq": ratio.square(),
        }
        metrics = {name: _kept(x, mask).sum() / num_tokens for name, x in per_token.items()}
    return loss, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, num_tokens: Tensor | float
) -> tuple[Tensor, Metrics]:
    """Clipped squared error: ``0.5 * max((v - R)^2, (v_clipped - R)^2)``, v_clipped within ``clip`` of the old value.

    Metrics: ``clipfrac``, the tokens where the clipped error is the larger one.
    """
    values, old_values, returns = _kept(values, mask), _kept(old_values, mask), _kept(returns, mask)
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * _kept(torch.maximum(plain, clipped), mask).sum() / num_tokens
    with torch.no_grad():
        clipfrac = _kept((clipped > plain).to(values.dtype), mask).sum() / num_tokens
    return loss, {"clipfrac": clipfrac}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over action tokens: 1 perfect, 0 no better than a constant.

    Scalar; 0 if the returns do not vary (or there are fewer than two), where the quotient is undefined.
    """
    kept_returns, errors = returns[mask], (returns - values)[mask]
    if kept_returns.numel() < 2:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    variance = kept_returns.var(unbiased=False)
    if float(variance) <= 1e-12:
        return torch.zeros_like(variance)
    return 1 - errors.var(unbiased=False) / variance
