"""How good a preference model is on ratings it has not seen (reference: datasets-and-measures, section 6)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberation.types import InputError, Rating
from reward.preference import PreferenceModel
from reward.scoring import score_ratings


def measures(
    preference_model: PreferenceModel,
    ratings: Sequence[Rating],
    second_ratings: Sequence[Rating] | None = None,
    gold: ArrayLike | None = None,
    scores: NDArray[np.float32] | None = None,
) -> dict[str, float | None]:
    """Pairwise accuracies (0..1, chance 0.5) on all non-tied pairs, and a correlation (-1..1). None: not defined.

    Args:
        ratings: held-out ratings.
        second_ratings: the same members' second rating of the same statements, row by row.
        gold: noise-free utilities, row by row, where the raters are simulated.
        scores: the model's raw scores, if they are known already.

    Returns:
        ``accuracy`` of the model; ``ceiling``: of the second rating; ``longest``: of the longer statement;
        ``overlap``: of the statement that shares more words with the opinion; ``correlation`` (Pearson) of utility
        with ``gold``, or with the ratings where there is none; ``pairs``: number of pairs.

    Raises:
        InputError: if ``second_ratings`` or ``gold`` do not match ``ratings`` row by row.
    """
    seen = _agreement(ratings)
    raw = score_ratings(preference_model, ratings) if scores is None else scores
    target = seen if gold is None else np.asarray(gold, dtype=np.float64)
    if target.shape != seen.shape:
        raise InputError("gold", target.shape, f"give one utility a rating ({len(ratings)})")
    correlation = _correlation(preference_model.calibration.utilities(raw), target)
    return {**accuracies(raw, ratings, second_ratings), "correlation": correlation}


def accuracies(
    scores: ArrayLike, ratings: Sequence[Rating], second_ratings: Sequence[Rating] | None = None
) -> dict[str, float | None]:
    """The pairwise part of ``measures`` for scores (or utilities: the order matters alone), one a rating."""
    seen, groups = _agreement(ratings), list(rows_of_members(ratings).values())
    accuracy, pairs = pairwise_accuracy(scores, seen, groups)
    ceiling = None if second_ratings is None else pairwise_accuracy(_second(ratings, second_ratings), seen, groups)[0]
    longest, _ = pairwise_accuracy(np.array([len(r.statement) for r in ratings]), seen, groups)
    overlap, _ = pairwise_accuracy(np.array([word_overlap(r.opinion, r.statement) for r in ratings]), seen, groups)
    return {"accuracy": accuracy, "ceiling": ceiling, "longest": longest, "overlap": overlap, "pairs": pairs}


def _agreement(ratings: Sequence[Rating]) -> NDArray[np.float64]:
    return np.array([r.agreement for r in ratings], dtype=np.float64)


def rows_of_members(ratings: Sequence[Rating]) -> dict[tuple[str, int], list[int]]:
    """Row numbers of each (deliberation, member), in order of first appearance."""
    rows: dict[tuple[str, int], list[int]] = {}
    for row, rating in enumerate(ratings):
        rows.setdefault((rating.deliberation_id, rating.member), []).append(row)
    return rows


def pairwise_accuracy(
    predictor: ArrayLike, ratings: ArrayLike, groups: Sequence[Sequence[int]]
) -> tuple[float | None, int]:
    """Share of pairs inside a group that the predictor orders as the ratings do, and the number of pairs.

    Pairs tied in the ratings are left out; pairs tied in the predictor count one half. Every group with a pair has
    equal weight, since 15 pairs of one member's 6 ratings are not independent. No pair at all: (None, 0).
    """
    p, r = np.asarray(predictor, dtype=np.float64), np.asarray(ratings, dtype=np.float64)
    shares, pairs = [], 0
    for rows in groups:
        i, j = np.triu_indices(len(rows), k=1)
        own_r, own_p = r[list(rows)], p[list(rows)]
        truth, guess = np.sign(own_r[i] - own_r[j]), np.sign(own_p[i] - own_p[j])
        told = truth != 0
        if told.any():
            shares.append(float(np.mean((truth[told] * guess[told] + 1) / 2)))
            pairs += int(told.sum())
    return (float(np.mean(shares)), pairs) if shares else (None, 0)


def word_overlap(a: str, b: str) -> float:
    """Jaccard similarity of the sets of lower-cased words, 0..1; two texts without words: 0."""
    words_a, words_b = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    union = words_a | words_b
    return len(words_a & words_b) / len(union) if union else 0.0


def _second(ratings: Sequence[Rating], second: Sequence[Rating]) -> NDArray[np.float64]:
    def keys(rows: Sequence[Rating]) -> list[tuple[str, int, str]]:
        return [(r.deliberation_id, r.member, r.statement) for r in rows]

    if keys(ratings) != keys(second):
        raise InputError("second_ratings", len(second), "must rate the same statements in the same order as `ratings`")
    return np.array([r.agreement for r in second], dtype=np.float64)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None
