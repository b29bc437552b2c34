"""The numbers a PPO update logs. Names: TRL's GRPO where the quantity is the same, TRL's old PPO for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deliberation.types import InputError
from rl import ppo
from rl.rollout import Rollout


def _spread(x: Tensor) -> float:
    return float(x.std()) if len(x) > 1 else 0.0


def reward_metrics(rollout: Rollout, names: list[str], num_generations: int, clip: float | None) -> dict[str, float]:
    """What the reward functions gave: ``reward`` and ``rewards/{function}``; before clip and penalty."""
    out: dict[str, float] = {}
    for i, name in enumerate(names):
        given = rollout.rewards_per_func[:, i]
        given = given[~given.isnan()]
        if len(given):
            out[f"rewards/{name}/mean"], out[f"rewards/{name}/std"] = float(given.mean()), _spread(given)
    raw = rollout.raw_scores[rollout.scored]
    if len(raw):
        out["reward"], out["reward_std"] = float(raw.mean()), _spread(raw)
    groups = rollout.raw_scores.view(-1, num_generations)
    out["frac_reward_zero_std"] = float((groups.max(1).values - groups.min(1).values < 1e-8).float().mean())
    if clip is not None:
        out["reward/clipped_ratio"] = float((rollout.raw_scores.abs() > clip).float().mean())
    return out


def best_of_metrics(rollout: Rollout, num_generations: int, n: int) -> dict[str, float]:
    """``reward/best_of_n``: what the best of n samples of a prompt would score, from the scores that are optimised.

    Over the prompts with a reward for every completion; absent if there is none, or if n is 1.
    """
    whole = rollout.scored.view(-1, num_generations).all(dim=1)
    if n == 1 or not bool(whole.any()):
        return {}
    ascending = rollout.scores.view(-1, num_generations)[whole].sort(dim=1).values
    return {
        "reward/best_of_n": float((ascending * ppo.best_of_chances(n, num_generations).to(ascending)).sum(1).mean())
    }


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """``completions/*``: lengths in action tokens; ``clipped_ratio`` is the share that never stopped."""
    lengths = rollout.lengths.float()
    out = {f"completions/{k}_length": float(v) for k, v in _summary(lengths).items()}
    if bool(rollout.finished.any()):
        ended = _summary(lengths[rollout.finished])
        out.update({f"completions/{k}_terminated_length": float(v) for k, v in ended.items()})
    out["completions/clipped_ratio"] = float((~rollout.finished).float().mean())
    out["val/num_eos_tokens"] = float(rollout.finished.sum())
    return out


def _summary(x: Tensor) -> dict[str, Tensor]:
    return {"mean": x.mean(), "min": x.min(), "max": x.max()}


def sampling_metrics(rollout: Rollout) -> dict[str, float]:
    """``sampling/sampling_logp_difference``: how far sampler and trainer differ on the sampled tokens, in nats."""
    drawn = torch.tensor([x for row in rollout.drawn_logprobs for x in row], device=rollout.mask.device)
    difference = (drawn - rollout.old_logprobs[rollout.mask]).abs()
    return {f"sampling/sampling_logp_difference/{k}": float(_summary(difference)[k]) for k in ("mean", "max")}


def objective_metrics(rollout: Rollout, beta: float) -> dict[str, float]:
    """What is optimised. ``kl`` in nats a completion (mean k1), ``entropy`` in nats a token."""
    k1, k3 = rollout.kl()
    kl = float(k1.mean())
    scores = float(rollout.scores[rollout.scored].mean()) if bool(rollout.scored.any()) else 0.0
    entropy = float(rollout.entropy[rollout.mask].mean())
    return {
        "kl": kl,
        "kl/k3": float(k3.mean()),
        "entropy": entropy,
        "objective/kl": kl,
        "objective/beta": beta,
        "objective/entropy": float((rollout.entropy * rollout.mask).sum(1).mean()),
        "objective/non_score_reward": -beta * kl,
        "objective/scores": scores,
        "objective/rlhf_reward": scores - beta * kl,
        "policy/entropy_avg": entropy,
        "val/explained_var": float(ppo.explained_variance(rollout.values, rollout.returns, rollout.train_mask)),
    }


def update_metrics(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over the optimiser steps of an update, from the metrics of the losses."""
    if not steps:
        return {}
    mean = {name: float(torch.stack([s[name] for s in steps]).mean()) for name in steps[0]}
    return {
        "loss/policy_avg": mean["policy_loss"],
        "loss/value_avg": mean["value_loss"],
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac_low"] + mean["clipfrac_high"],
        "clip_ratio/low_mean": mean["clipfrac_low"],
        "clip_ratio/high_mean": mean["clipfrac_high"],
        "clip_ratio/region_mean": mean["clipfrac_low"] + mean["clipfrac_high"],
        "val/clipfrac_avg": mean["value_clipfrac"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
    }


def eval_sums(rollout: Rollout) -> Tensor:
    """float64 [7], over the completions: scored, raw score, its square, shaped score, KL, length, finished."""
    raw, shaped = rollout.raw_scores[rollout.scored].double(), rollout.scores[rollout.scored]
    parts = (rollout.scored, raw, raw.square(), shaped, rollout.kl()[0], rollout.lengths, rollout.finished)
    return torch.stack([x.double().sum() for x in parts])


def eval_metrics(sums: list[float], rows: int, beta: float) -> dict[str, float]:
    """Means of a held-out evaluation.

    Args:
        sums: of :func:`eval_sums`, added up.
        rows: completions.

    Raises:
        InputError: if no completion got a reward.
    """
    scored, raw, raw_sq, shaped, kl, length, finished = sums
    if scored == 0:
        raise InputError("eval_dataset", f"{rows} completions", "no reward function gave a reward to any of them")
    reward = raw / scored
    return {
        "reward": reward,
        "reward_std": math.sqrt(max(0.0, raw_sq / scored - reward**2)),
        "kl": kl / rows,
        "objective": shaped / scored - beta * kl / rows,
        "completions/mean_length": length / rows,
        "completions/clipped_ratio": 1 - finished / rows,
    }


def completions_table(rollout: Rollout, names: list[str], extra: dict[str, list], step: int) -> list[dict[str, Any]]:
    """One dict a completion: prompt, text, every reward, the score that is optimised, KL, length, and extra columns."""
    kl, lengths = rollout.kl()[0].tolist(), rollout.lengths.tolist()
    raw, scored, scores = (x.tolist() for x in (rollout.raw_scores, rollout.scored, rollout.scores))
    table = []
    for i, text in enumerate(rollout.texts):
        rewards = zip(names, rollout.rewards_per_func[i].tolist(), strict=True)
        table.append(
            {
                "step": step,
                "prompt": rollout.prompts[i],
                "completion": text,
                **{f"rewards/{name}": None if math.isnan(r) else r for name, r in rewards},
                "reward": raw[i] if scored[i] else None,
                "score": scores[i],
                "kl": kl[i],
                "length": lengths[i],
                "finished": bool(rollout.finished[i]),
                **{name: values[i] for name, values in extra.items()},
            }
        )
    return table
