"""One split, measured: the model, the anchor, both with swapped opinions, and the controls that read no person.

A predictor is two functions (``Predictor``), so a second model is measured by passing another one; nothing here reads
files or loads models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import human_measures as measure
from benchmarks.human_measures import Array, Sampled
from benchmarks.human_votes import IntArray, Split, VoteSet, swapped_profiles
from reward.measures import word_overlap

DRAWS_OF_PERSONS = 2000
"""Resamplings behind every interval."""


@dataclass(frozen=True)
class Predictor:
    """What is measured.

    Attributes:
        score: (profile, statement) pairs [n, 2] -> [n], higher for more agreement.
        probability: those scores -> P(agree) [n] in 0..1; None for a control that gives an order only.
    """

    score: Callable[[IntArray], Array]
    probability: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Plan:
    """What one split is measured on; fixed before any model is asked, so that every predictor answers the same.

    Attributes:
        data, split: the votes.
        swapped: the votes' pairs with another person's profile, one [votes, 2] a draw; profile -1: no stand-in.
        weights: resamplings of the persons, [1 + draws, persons].
    """

    data: VoteSet
    split: Split
    swapped: list[IntArray]
    weights: Array

    @property
    def with_stand_in(self) -> np.ndarray:
        """Votes whose person has a stand-in, bool [votes]; the same in every draw."""
        return self.swapped[0][:, 0] >= 0

    def needed(self) -> IntArray:
        """Every distinct (profile, statement) a full measurement asks for, [n, 2], sorted."""
        parts = [self.split.pairs, self.split.preferred, self.split.other]
        parts += [pairs[self.with_stand_in] for pairs in self.swapped]
        return np.unique(np.concatenate(parts), axis=0)


def make_plan(data: VoteSet, split: Split, *, draws: int, seed: int, resamplings: int = DRAWS_OF_PERSONS) -> Plan:
    """Draw the swaps (``draws`` >= 1 of them) and the resamplings of the persons."""
    swapped = []
    for k in range(draws):
        stand_ins = swapped_profiles(data, split.pairs[:, 0], np.random.default_rng([seed, k]))
        swapped.append(np.stack([stand_ins, split.pairs[:, 1]], axis=1))
    return Plan(data, split, swapped, measure.person_weights(split.persons, draws=resamplings, seed=seed))


def measure_split(
    plan: Plan, model: Predictor, anchor: Predictor | None = None, majority: float | None = None
) -> dict[str, Any]:
    """Everything the benchmark reports of one split, JSON-able.

    Args:
        majority: what the control that always says the same says, P(agree); None takes the split's own share.
    """
    split, weights = plan.split, plan.weights
    own = measure_order(plan, model)
    pairs_of = measure.pair_shares(split.labels, split.labels, split.person, split.pairs[:, 0], split.persons)
    share = float(split.labels.mean()) if majority is None else majority
    report: dict[str, Any] = {
        "votes": len(split.labels),
        "persons": split.persons,
        "persons_with_pairs": int((~np.isnan(pairs_of)).sum()),
        "choices": len(split.chooser),
        "positive_share": measure.mean_of(split.labels, split.person, weights).to_dict(),
        "model": measure_fully(plan, model, own),
        "controls": {
            name: {key: sample.to_dict() for key, sample in measure_order(plan, control).items()}
            for name, control in _controls(plan.data).items()
        },
    }
    constant = Predictor(lambda pairs: np.full(len(pairs), share), lambda scores: scores)
    report["controls"]["majority"] = {"constant": round(share, 6), **_calibration(plan, constant)}
    report["controls"]["majority"] |= {key: s.to_dict() for key, s in measure_order(plan, constant).items()}
    if anchor is not None:
        theirs = measure_order(plan, anchor)
        report["anchor"] = measure_fully(plan, anchor, theirs)
        report["model_minus_anchor"] = {key: (own[key] - theirs[key]).to_dict() for key in own}
    return report


def measure_order(plan: Plan, predictor: Predictor, kept: np.ndarray | None = None) -> dict[str, Sampled]:
    """``auc`` over all votes, ``pairs`` within persons and, where there are any, ``choices`` ranked right.

    Args:
        kept: measure these votes only (bool [votes]), and no choices.
    """
    split, weights = plan.split, plan.weights
    if kept is not None:
        split = replace(split, pairs=split.pairs[kept], labels=split.labels[kept], person=split.person[kept])
    found = _ordered(split, predictor.score(split.pairs), weights)
    if len(split.chooser) and kept is None:
        right = measure.right_choices(predictor.score(split.preferred), predictor.score(split.other))
        found["choices"] = measure.mean_of(right, split.chooser, weights)
    return found


def measure_fully(plan: Plan, predictor: Predictor, own: dict[str, Sampled]) -> dict[str, Any]:
    """``own`` (what ``measure_order`` found), calibration, length slope, and order with another person's opinion.

    ``gain`` is own minus swapped, paired by person, on the votes that have a stand-in.
    """
    split, weights, kept = plan.split, plan.weights, plan.with_stand_in
    lengths = np.array([len(text) for text in plan.data.statements])[split.pairs[:, 1]]
    slope = measure.length_slope(predictor.score(split.pairs), lengths, split.labels, split.person, weights)
    without = int((~kept).sum())
    same_votes = measure_order(plan, predictor, kept) if without else own
    rest = replace(split, pairs=split.pairs[kept], labels=split.labels[kept], person=split.person[kept])
    draws = [_ordered(rest, predictor.score(pairs[kept]), weights) for pairs in plan.swapped]
    swapped = {key: measure.average([draw[key] for draw in draws]) for key in ("auc", "pairs")}
    return {
        **{key: sample.to_dict() for key, sample in own.items()},
        **_calibration(plan, predictor),
        "length_slope": slope.to_dict(),
        "swapped": {key: sample.to_dict() for key, sample in swapped.items()},
        "gain": {key: (same_votes[key] - sample).to_dict() for key, sample in swapped.items()},
        "swap_draws": len(plan.swapped),
        "votes_without_stand_in": without,
    }


def _ordered(split: Split, scores: Array, weights: Array) -> dict[str, Sampled]:
    shares = measure.pair_shares(scores, split.labels, split.person, split.pairs[:, 0], split.persons)
    return {
        "auc": measure.auc(scores, split.labels, split.person, weights),
        "pairs": measure.mean_over_persons(shares, weights),
    }


def _calibration(plan: Plan, predictor: Predictor) -> dict[str, Any]:
    """``accuracy`` at P >= 1/2, ``brier``, ``ece``, and what the reliability plot shows."""
    if predictor.probability is None:
        return {}
    split, weights = plan.split, plan.weights
    p = predictor.probability(predictor.score(split.pairs))
    return {
        "accuracy": measure.mean_of((p >= 0.5) == (split.labels == 1), split.person, weights).to_dict(),
        "brier": measure.mean_of((p - split.labels) ** 2, split.person, weights).to_dict(),
        "ece": measure.calibration_error(p, split.labels, split.person, weights).to_dict(biased_up=True),
        "reliability": measure.reliability(p, split.labels),
        "histogram": measure.histogram(p),
    }


def _controls(data: VoteSet) -> dict[str, Predictor]:
    lengths = np.array([len(text) for text in data.statements], dtype=np.float64)

    def overlap(pairs: IntArray) -> Array:
        return np.array([word_overlap(data.opinions[p], data.statements[s]) for p, s in pairs.tolist()])

    return {"longest": Predictor(lambda pairs: lengths[pairs[:, 1]]), "overlap": Predictor(overlap)}
