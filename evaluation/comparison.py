"""Policies side by side on held-out deliberations: sampled statements and gold ratings in, one JSON object out.

Arms (``N`` candidates a policy, 16 by default, which gives the names their number):

* ``base``: one zero-shot sample of the base model;
* ``sft``, ``ppo``: the first of the policy's N samples;
* ``sft_best_of_N``, ``ppo_best_of_N``: the sample with the highest *predicted* welfare (the first, at a tie);
* ``best_opinion``: the member's own opinion with the highest *gold* group mean. Chosen with the gold rater's help, it
  is the strongest human baseline there is, and stronger than any choice made without knowing the ratings.

The gold rater decides everything reported here; predicted welfare only chooses among candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deliberation.types import InputError
from evaluation import measures
from evaluation.judging import GoldRater, Judged, Sampled, judge
from evaluation.measures import Array, Estimate
from reward.welfare import parse_welfare

PREFERENCE_KEYS = ("accuracy", "ceiling", "correlation", "longest", "overlap")

WIN_MEASURES = ("mean", "min", "welfare")
"""What a win is decided by: gold mean agreement of the group (the headline), its minimum, the run's own welfare."""

DEFINITIONS = {
    "units": "agreement, quality and welfare from 1 to 7; shares and win rates from 0 to 1; kl in nats per response",
    "win_rate": "share of deliberations in which the gold mean agreement of the group with a's statement is higher "
    "than with b's; exact ties count 1/2; `min` and `welfare` decide by the least happy member and by the run's "
    "welfare function instead; `without_ties` leaves ties out, as Bakker et al. 2022 do",
    "interval": "95 %, percentile bootstrap over deliberations; Wilson where all outcomes are equal",
    "unanimity": f"share of deliberations in which every member's gold agreement is at least {measures.AGREES:g}",
    "length": "words",
    "kl": "divergence from the sft policy at the sampling temperature: mean log-ratio of pure samples (top_p 1), plus "
    "log n - (n-1)/n for best-of-n (an upper bound where candidates repeat); null where not measured",
    "best_of": "unbiased estimate over all subsets of size n of the pool, chosen by predicted welfare, judged by gold",
    "best_opinion": "the member's opinion with the highest gold group mean: the strongest human baseline",
    "without_voice_penalty": "the same tables by a gold rater that does not mind one person's voice",
    "citizens": "all ratings come from simulated citizens and are no evidence about people",
}


def compare(
    sampled: Sequence[Sampled],
    gold: GoldRater,
    *,
    welfare: str | float,
    preference: Mapping[str, float | None],
    versions: Mapping[str, str],
    seconds: Mapping[str, float],
    seed: int = 0,
    draws: int = measures.BOOTSTRAP_DRAWS,
) -> dict[str, Any]:
    """Judge every arm by the gold rater and set them against each other.

    Args:
        sampled: one entry a deliberation; all with the same number of candidates.
        gold: rates any text for the members of ``sampled[index]``.
        welfare: the run's welfare function (name or alpha; not ``worst_cluster``). Selects in the best-of arms.
        preference: held-out figures of the preference model, with ``PREFERENCE_KEYS`` at least (None = undefined).
        versions, seconds: short hashes by part, wall time by stage; passed through.
        seed: of the bootstrap.
        draws: resamplings behind each interval.

    Returns:
        A JSON-ready dict, with ``DEFINITIONS`` under ``definitions``. Undefined values are None and counted in
        ``undefined`` of their arm. The same input gives the same dict.

    Raises:
        InputError: on no deliberations, unequal pools, an unknown welfare, or gold ratings off the scale.
    """
    size = _check(sampled, preference)
    function = parse_welfare(welfare, clusters=False)
    # 1. Judge all statements of all deliberations, with and without the one-person's-voice penalty.
    both = [judge(i, one, gold, function) for i, one in enumerate(sampled)]
    judged, unpenalised = [a for a, _ in both], [b for _, b in both]
    counts = measures.bootstrap_counts(len(judged), draws=draws, seed=seed)
    # 2. Arms, pairs and best-of-n curves; 3. the first two again without the penalty.
    sizes = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n < size} | {size})
    result = {
        **_tables(judged, counts),
        "preference": dict(preference),
        "seed": seed,
        "versions": dict(versions),
        "seconds": dict(seconds),
        "welfare": str(welfare),
        "candidates": size,
        "deliberations": len(judged),
        "members": sum(len(one.deliberation.opinions) for one in sampled),
        "best_of": {policy: _best_of(judged, policy, sizes, counts) for policy in ("sft", "ppo")},
        "win_rate_best_of": _win_rate_best_of(judged, sizes, counts),
        "without_voice_penalty": _tables(unpenalised, counts),
        "examples": _examples(sampled, judged),
        "warnings": _warnings(len(judged)),
        "definitions": DEFINITIONS,
    }
    return _plain(result)


def _check(sampled: Sequence[Sampled], preference: Mapping[str, float | None]) -> int:
    """The pool size all deliberations share."""
    if not sampled:
        raise InputError("sampled", "no deliberations", "give at least one held-out deliberation")
    sizes = sorted({len(one.sft) for one in sampled})
    if len(sizes) > 1:
        raise InputError("sampled", f"pools of {sizes} candidates", "sample the same number for every deliberation")
    missing = [key for key in PREFERENCE_KEYS if key not in preference]
    if missing:
        raise InputError("preference", list(preference), f"add {', '.join(missing)} (null where undefined)")
    return sizes[0]


def _column(judged: Sequence[Judged], measure: str, arm: str) -> Array:
    """One gold measure of one arm, [deliberations]."""
    if measure == "kl":
        return np.array([one.kl[arm] for one in judged])
    return np.array([one.values[measure][one.chosen[arm]] for one in judged])


def _tables(judged: Sequence[Judged], counts: Array) -> dict[str, Any]:
    """``arms`` and ``pairs``."""
    return {"arms": _arms(judged, counts), "pairs": _pairs(judged, counts)}


def _arms(judged: Sequence[Judged], counts: Array) -> dict[str, dict[str, Any]]:
    """Each arm's means over deliberations, with intervals under ``intervals``."""
    table: dict[str, dict[str, Any]] = {}
    for arm in judged[0].chosen:
        names = ("mean", "min", "quality", "unanimity", "length", "kl", "welfare")
        columns = np.stack([_column(judged, name, arm) for name in names], axis=1)
        estimates = dict(zip(names, measures.mean_estimates(columns, counts), strict=True))
        row: dict[str, Any] = {name: e.value for name, e in estimates.items()}
        row["predicted"] = _predicted(judged, arm)
        row["distinct_2"] = measures.distinct_2([one.statements[one.chosen[arm]] for one in judged])
        row["n"] = len(judged)
        row["intervals"] = {name: [e.low, e.high] for name, e in estimates.items()}
        row["undefined"] = {name: len(judged) - e.n for name, e in estimates.items() if e.n < len(judged)}
        table[arm] = row
    return table


def _predicted(judged: Sequence[Judged], arm: str) -> float:
    """Mean predicted welfare of a policy's arm; NaN for arms the preference model did not score."""
    policy = arm.split("_best_of_")[0]
    if policy not in judged[0].pools:
        return math.nan
    return float(np.mean([one.predicted[policy][one.chosen[arm] - one.pools[policy].start] for one in judged]))


def _pairs(judged: Sequence[Judged], counts: Array) -> list[dict[str, Any]]:
    """Every ordered pair of arms: ``win_rate`` by the gold mean, then the same by ``min`` and ``welfare``."""
    ordered = [(a, b) for a in judged[0].chosen for b in judged[0].chosen if a != b]
    rows: list[dict[str, Any]] = [{"a": a, "b": b} for a, b in ordered]
    for measure in WIN_MEASURES:
        columns = {arm: _column(judged, measure, arm) for arm in judged[0].chosen}
        outcomes = np.stack([measures.wins(columns[a], columns[b]) for a, b in ordered], axis=1)
        for row, estimate, outcome in zip(rows, measures.win_rates(outcomes, counts), outcomes.T, strict=True):
            decided = outcome[outcome != 0.5]
            figures = {
                **_win_row(estimate),
                "ties": int((outcome == 0.5).sum()),
                "without_ties": float(decided.mean()) if len(decided) else math.nan,
            }
            row.update(figures if measure == "mean" else {measure: figures})
    return rows


def _win_row(e: Estimate) -> dict[str, Any]:
    return {"win_rate": e.value, "low": e.low, "high": e.high, "n": e.n}


def _best_of(judged: Sequence[Judged], policy: str, sizes: Sequence[int], counts: Array) -> list[dict[str, Any]]:
    """Gold welfare, mean and minimum, predicted welfare and KL of best-of-n, one row a size."""
    rows = []
    for n in sizes:
        values = []
        for one in judged:
            weights = measures.best_of_n_weights(one.predicted[policy], n)
            kl = measures.kl_best_of_n(n) + one.policy_kl[policy]
            gold = [float(weights @ one.values[name][one.pools[policy]]) for name in WIN_MEASURES]
            values.append([*gold, float(weights @ one.predicted[policy]), kl])
        names = (*WIN_MEASURES, "predicted", "kl")
        estimates = dict(zip(names, measures.mean_estimates(np.array(values), counts), strict=True))
        row: dict[str, Any] = {"n": n, "low": estimates["welfare"].low, "high": estimates["welfare"].high}
        row |= {name: e.value for name, e in estimates.items()}
        row["intervals"] = {name: [e.low, e.high] for name, e in estimates.items()}
        rows.append(row)
    return rows


def _win_rate_best_of(judged: Sequence[Judged], sizes: Sequence[int], counts: Array) -> list[dict[str, Any]]:
    """PPO best-of-n against SFT best-of-n at equal n, then one PPO sample against SFT best-of-n.

    Each deliberation gives the expected outcome over all pairs of subsets, by the gold mean agreement.
    """
    pairs = [(n, n) for n in sizes] + [(1, n) for n in sizes if n > 1]
    rows: list[dict[str, Any]] = []
    for n_a, n_b in pairs:
        outcome = []
        for one in judged:
            a, b = (one.values["mean"][one.pools[policy]] for policy in ("ppo", "sft"))
            weights = [
                measures.best_of_n_weights(one.predicted["ppo"], n_a),
                measures.best_of_n_weights(one.predicted["sft"], n_b),
            ]
            outcome.append(measures.expected_win(a, weights[0], b, weights[1]))
        estimate = measures.win_rates(np.array(outcome)[:, None], counts)[0]
        rows.append({"a": "ppo", "n_a": n_a, "b": "sft", "n_b": n_b, **_win_row(estimate)})
    return rows


def _examples(sampled: Sequence[Sampled], judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Typical deliberations, not picked ones: the median, lower and upper quartile of PPO's gold mean agreement."""
    order = np.argsort(_column(judged, "mean", "ppo"), kind="stable")
    picks = [int(order[round(q * (len(order) - 1))]) for q in (0.5, 0.25, 0.75)]
    return [
        {
            "id": sampled[i].deliberation.id,
            "question": sampled[i].deliberation.question,
            "opinions": list(sampled[i].deliberation.opinions),
            "arms": {
                arm: {
                    "statement": judged[i].statements[at],
                    "agreement": judged[i].agreement[:, at].tolist(),
                    "mean": float(judged[i].values["mean"][at]),
                }
                for arm, at in judged[i].chosen.items()
            },
        }
        for i in dict.fromkeys(picks)
    ]


def _warnings(n: int) -> list[str]:
    """What a reader must know about the intervals."""
    if n < 10:
        return [f"{n} deliberations: descriptive only"]
    if n < 40:
        return [f"{n} deliberations: bootstrap intervals are too short below 40"]
    return []


def _plain(value: Any) -> Any:
    """The same structure with None for NaN and plain Python numbers, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
