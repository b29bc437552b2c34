"""Calibration of a preference model on simulated citizens, and what its uncertainty is good for in reranking.

    python -m benchmarks.uncertainty --policy runs/demo/sft --preference_model runs/demo/preference --json

Topics that neither the judge nor the policy has seen. (1) Expected calibration error of P(rating) against noisy
ratings, and the share of noise-free gold utilities inside the 90 % intervals; both also where members use held-out
words. (2) Best-of-n of one pool by welfare of mean - lambda * sd, for several lambda: gold welfare at the same n, so at
the same KL, with paired 95 % bootstrap intervals over groups. Simulated, never people.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deliberation.citizens import Group, draw_group
from deliberation.questions import load_questions
from deliberation.types import InputError
from demo import sample_candidates
from embedded import resolve
from evaluation.gold import CitizenGold, held_out_groups, noisy_ratings
from evaluation.measures import best_of_n_weights, bootstrap_counts, kl_best_of_n, mean_estimates
from reward.measures import calibration_error
from reward.preference import PreferenceModel
from reward.scoring import Scores, score
from reward.uncertainty import Uncertainty
from reward.welfare import lower_utilities, welfare

LAMBDAS = (0.0, 0.5, 1.0, 2.0)
SIZES = (1, 4, 16, 64)
Array = NDArray[np.float64]


def predicted(model: PreferenceModel, groups: Sequence[Group], texts: Sequence[list[str]]) -> list[Scores]:
    """Scores of every group's statements for its members."""
    return [
        score(model, g.question.text, [c.opinion for c in g.citizens], found)
        for g, found in zip(groups, texts, strict=True)
    ]


def coverage(uncertainty: Uncertainty, scores: Sequence[Scores], gold: Sequence[Array]) -> float:
    """Share of noise-free gold utilities inside the 90 % interval of the predicted one."""
    inside = []
    for one, truth in zip(scores, gold, strict=True):
        low, high = uncertainty.interval(one.utilities, one.sd)
        inside.append(((truth >= low - 1e-6) & (truth <= high + 1e-6)).ravel())
    return float(np.concatenate(inside).mean())


def calibration(model: PreferenceModel, groups: Sequence[Group], texts: Sequence[list[str]], scores: Sequence[Scores],
                seed: int) -> float:  # fmt: skip
    """Expected calibration error of P(rating) on one noisy rating of every statement by every citizen."""
    raw, ratings = [], []
    for k, (group, found, one) in enumerate(zip(groups, texts, scores, strict=True)):
        column = {text: j for j, text in enumerate(found)}
        for r in noisy_ratings(group, str(k), found, f"uncertainty {seed} {k}"):
            raw.append(one.raw[r.member, column[r.statement]])
            ratings.append(r.agreement)
    return calibration_error(model.calibration, np.array(raw), np.array(ratings))


def best_of(scores: Sequence[Scores], gold: Sequence[Array], function: str, penalty: float) -> tuple[Array, Array]:
    """(Gold, predicted) welfare of best-of-n chosen by penalised utilities, each [groups, sizes]."""
    true, believed = [], []
    for one, truth in zip(scores, gold, strict=True):
        utilities = np.asarray(one.utilities, dtype=np.float64)
        bounds = lower_utilities(utilities, one.sd, penalty)[0] if penalty else utilities
        order = np.asarray(welfare(bounds, function))
        weights = [best_of_n_weights(order, n) for n in SIZES]
        true.append([w @ np.asarray(welfare(truth, function)) for w in weights])
        believed.append([w @ np.asarray(welfare(utilities, function)) for w in weights])
    return np.array(true), np.array(believed)


def estimate(values: Array, counts: Array) -> dict[str, float | None]:
    """Mean and 95 % interval of one number a group."""
    found = mean_estimates(values[:, None], counts)[0]
    return {
        "value": round(float(found.value), 4),
        "low": round(float(found.low), 4),
        "high": round(float(found.high), 4),
    }


def rerank(scores: Sequence[Scores], gold: Sequence[Array], function: str, seed: int) -> list[dict[str, Any]]:
    """A row a (lambda, n): gold welfare, its gain over lambda 0 at the same n, and how far prediction exceeds it."""
    counts = bootstrap_counts(len(scores), draws=4000, seed=seed)
    plain, _ = best_of(scores, gold, function, 0.0)
    rows = []
    for penalty in LAMBDAS:
        true, believed = best_of(scores, gold, function, penalty)
        for k, n in enumerate(SIZES):
            rows.append({
                "lambda": penalty, "n": n, "kl": round(kl_best_of_n(n), 3), "gold": estimate(true[:, k], counts),
                "gold_gain": estimate(true[:, k] - plain[:, k], counts),
                "overestimate": estimate(believed[:, k] - true[:, k], counts),
            })  # fmt: skip
    return rows


def main() -> None:
    """Sample, score, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/demo/sft")
    parser.add_argument("--preference_model", default="runs/demo/preference")
    parser.add_argument("--groups", type=int, default=150)
    parser.add_argument("--welfare", default="nash")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = PreferenceModel.load(resolve(args.preference_model))
    if model.uncertainty is None:
        raise InputError("preference_model", args.preference_model, "has no ensemble; fit one with heads: 4")
    figures: dict[str, Any] = {"uncertainty": asdict(model.uncertainty)}
    for words in ("known_words", "held_out_words"):
        groups = held_out_groups(load_questions("test"), args.groups, args.seed)
        if words == "known_words":
            groups = [draw_group(g.question, Random(f"uncertainty {args.seed} {k}")) for k, g in enumerate(groups)]
        pools = sample_candidates(resolve(args.policy), groups, max(SIZES), args.seed, words)
        texts = [[text or "." for text in pool] for pool in pools]
        gold = [CitizenGold(groups).rate(i, found).agreement for i, found in enumerate(texts)]
        scores = predicted(model, groups, texts)
        figures[words] = {
            "calibration_error": round(calibration(model, groups, texts, scores, args.seed), 4),
            "coverage_90": round(coverage(model.uncertainty, scores, gold), 4),
            "mean_sd": round(float(np.mean([one.sd.mean() for one in scores])), 4),
            "rerank": rerank(scores, gold, args.welfare, args.seed),
        }
    if not args.json:
        for words in ("known_words", "held_out_words"):
            found = figures[words]
            print(f"{words}: ECE {found['calibration_error']}, 90 % intervals cover {found['coverage_90']:.1%} of gold")
            for row in found["rerank"]:
                gain = row["gold_gain"]
                print(f"  lambda {row['lambda']:<4} best of {row['n']:<3} gold {row['gold']['value']:.3f}  "
                      f"gain {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]  "
                      f"overestimated by {row['overestimate']['value']:+.3f}")  # fmt: skip
    facts = {"groups": args.groups, "welfare": args.welfare, "seed": args.seed, "date": date.today().isoformat()}
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"figures": figures, **facts, "machine": machine}))


if __name__ == "__main__":
    main()
