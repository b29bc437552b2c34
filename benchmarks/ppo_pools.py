"""Pools of statements of one policy on held-out groups of simulated citizens, and how two policies compare on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from deliberation.citizens import Group
from deliberation.prompts import clean_statement, statement_prompt
from evaluation import measures
from evaluation.compare import CompareConfig, pool_utilities
from evaluation.gold import CitizenGold
from evaluation.measures import Array
from reward.preference import PreferenceModel
from reward.welfare import welfare as aggregate
from rl.policy import Sample, load_policy, sample, sequence_logprobs

PART = 25
"""Groups sampled at a time."""
FOR_KL = 4
"""Samples a group that the KL is estimated from."""


@dataclass(frozen=True)
class Pool:
    """The same number of samples of a policy for every group: [groups, samples], of the log-ratios the first few.

    Attributes:
        gold: mean gold agreement of the group, 1 to 7: what a win is decided by.
        welfare: gold welfare, 1 to 7.
        predicted: predicted welfare, 1 to 7: what best-of-n selects by.
        log_ratios: log pi - log pi_reference of the sample, nats; their mean estimates the KL.
    """

    gold: Array
    welfare: Array
    predicted: Array
    log_ratios: Array


@torch.no_grad()
def draw_pool(
    policy: str, reference: str, judge: PreferenceModel, groups: Sequence[Group], config: CompareConfig, seed: int
) -> Pool:
    """Sample ``config.num_candidates`` statements a group, as the policy was trained to sample, and score them.

    Args:
        policy, reference: folders of models; the KL is measured to the reference.
        config: sampling and welfare.
        seed: of the samples.
    """
    (model, tokenizer), (base, _) = (load_policy(path, device="cpu") for path in (policy, reference))
    citizens, rows = CitizenGold(groups), []
    for start in tqdm(range(0, len(groups), PART), desc=f"pool of {policy}", unit=f"{PART} groups"):
        part = groups[start : start + PART]
        prompts = [statement_prompt(g.question.text, [c.opinion for c in g.citizens]) for g in part]
        drawn = sample(
            model,
            tokenizer,
            prompts,
            n=config.num_candidates,
            seeds=[seed * 1_000_003 + start + k for k in range(len(part))],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
        )
        for k, (group, prompt, pool) in enumerate(zip(part, prompts, drawn, strict=True)):
            texts = [clean_statement(s.text) for s in pool]
            agreement = citizens.rate(start + k, texts).agreement
            utilities = pool_utilities(judge, group.deliberation(str(start + k)), texts)
            ratios = _log_ratios(model, base, list(tokenizer(prompt).input_ids), pool[:FOR_KL], config.temperature)
            welfare = [np.asarray(aggregate(x, config.welfare)) for x in (agreement, utilities)]
            rows.append((agreement.mean(axis=0), *welfare, ratios))
    return Pool(*(np.array(column) for column in zip(*rows, strict=True)))


def _log_ratios(
    model: torch.nn.Module, base: torch.nn.Module, prompt: list[int], pool: list[Sample], temperature: float
) -> Array:
    ids = [prompt] * len(pool)
    ours, theirs = (sequence_logprobs(m, ids, [s.ids for s in pool], temperature) for m in (model, base))
    return np.array([float((a - b).sum()) for a, b in zip(ours, theirs, strict=True)])


def wins(a: Pool, n_a: int, b: Pool, n_b: int) -> Array:
    """[groups]: chance that best-of-``n_a`` of ``a`` has the higher gold mean, best-of-``n_b`` of ``b`` the lower."""
    weights = ([measures.best_of_n_weights(scores, n) for scores in pool.predicted] for pool, n in ((a, n_a), (b, n_b)))
    return np.array([measures.expected_win(*row) for row in zip(a.gold, next(weights), b.gold, next(weights))])


def best_of(pool: Pool, n: int) -> dict[str, float]:
    """``gold``, ``welfare`` and ``predicted`` of best-of-``n``, and its ``kl`` to the policy it samples from (nats)."""
    weights = np.array([measures.best_of_n_weights(scores, n) for scores in pool.predicted])
    names = ("gold", "welfare", "predicted")
    means = {name: float((weights * getattr(pool, name)).sum(axis=1).mean()) for name in names}
    return {"n": n, **means, "kl": measures.kl_best_of_n(n)}


def worth(a: Pool, b: Pool) -> float:
    """How many samples of ``b`` one sample of ``a`` is worth: the n whose best-of-n of ``b`` has the same gold mean.

    Between sizes by interpolation in log n; NaN if a sample of ``b`` is better, infinity if the best of all is worse.
    """
    sizes = np.arange(1, b.gold.shape[1] + 1)
    curve = [best_of(b, int(n))["gold"] for n in sizes]
    gold = a.gold.mean()
    if not curve[0] <= gold <= curve[-1]:
        return float("nan") if gold < curve[0] else float("inf")
    return float(np.exp(np.interp(gold, curve, np.log(sizes))))
