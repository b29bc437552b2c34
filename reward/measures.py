"""How good a preference model is on ratings it has not seen (reference: datasets-and-measures, section 6)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberation.types import InputError, Rating, Vote
from reward.calibration import VOTES, Calibration
from reward.examples import rows_of_members
from reward.preference import PreferenceModel
from reward.scoring import Answered, score_ratings

BINS = 10
"""Equal-mass bins of the expected calibration error."""

Measures = dict[str, float | None]


def measures(
    preference_model: PreferenceModel,
    ratings: Sequence[Rating | Vote],
    second_ratings: Sequence[Rating] | None = None,
    gold: ArrayLike | None = None,
    scores: NDArray[np.float32] | None = None,
    trained_topics: Collection[str] = (),
) -> Measures:
    """What there is to know of a model on held-out ratings or votes. None: not defined.

    Args:
        ratings: held-out ratings, or votes other than passes.
        second_ratings: the same members' second rating of the same statements, row by row.
        gold: noise-free utilities, row by row, where the raters are simulated.
        scores: the model's raw scores, if they are known already.
        trained_topics: topics the model was trained on; the others are new to it.

    Returns:
        * of pairs of one member's statements, in 0..1, chance 0.5: ``accuracy`` of the model (``accuracy_in_topic`` and
          ``accuracy_out_of_topic``: on a part of them), ``ceiling``: of the second rating, and of the controls
          ``swapped`` (the model, reading another member's opinion), ``longest`` (the longer statement), ``overlap`` (of
          words with the opinion); ``pairs``: their number;
        * ``auc``: area under the ROC curve of agreement (above 4) against disagreement (below 4), all members together;
        * ``calibration_error``: expected calibration error of P(rating), see ``calibration_error``;
        * ``correlation`` (Pearson) of utility with ``gold``, or with the ratings where there is none;
        * ``length_slope``: partial correlation of the score with the statement's length in words, given the rating.

    Raises:
        InputError: if ``second_ratings`` or ``gold`` do not match ``ratings`` row by row.
    """
    answers = np.array([answer_of(r) for r in ratings], dtype=np.float64)
    raw = score_ratings(preference_model, ratings) if scores is None else scores
    target = answers if gold is None else np.asarray(gold, dtype=np.float64)
    if target.shape != answers.shape:
        raise InputError("gold", target.shape, f"give one utility a rating ({len(ratings)})")
    lengths = np.array([len(r.statement.split()) for r in ratings], dtype=np.float64)
    return {
        **accuracies(raw, ratings, second_ratings),
        **_by_topic(raw, ratings, trained_topics),
        "swapped": swapped_accuracy(preference_model, ratings),
        "auc": auc(raw[answers != 4], answers[answers != 4] > 4),
        "calibration_error": calibration_error(preference_model.calibration, raw, answers),
        "correlation": _correlation(preference_model.calibration.utilities(raw), target),
        "length_slope": partial_correlation(raw, lengths, answers),
    }


def answer_of(response: Rating | Vote) -> int:
    """A rating's agreement, or a vote on the same scale (``VOTES``)."""
    return response.agreement if isinstance(response, Rating) else VOTES[response.vote > 0]


def accuracies(
    scores: ArrayLike, ratings: Sequence[Rating | Vote], second_ratings: Sequence[Rating] | None = None
) -> Measures:
    """The pairwise part of ``measures`` for scores (or utilities: the order matters alone), one a rating."""
    answers, groups = [answer_of(r) for r in ratings], list(rows_of_members(ratings).values())
    accuracy, pairs = pairwise_accuracy(scores, answers, groups)
    ceiling = (
        None if second_ratings is None else pairwise_accuracy(_second(ratings, second_ratings), answers, groups)[0]
    )
    longest, _ = pairwise_accuracy(np.array([len(r.statement) for r in ratings]), answers, groups)
    overlap, _ = pairwise_accuracy(np.array([word_overlap(r.opinion, r.statement) for r in ratings]), answers, groups)
    return {"accuracy": accuracy, "ceiling": ceiling, "longest": longest, "overlap": overlap, "pairs": pairs}


def _by_topic(scores: ArrayLike, ratings: Sequence[Rating | Vote], trained: Collection[str]) -> Measures:
    """The model's pairwise accuracy on topics it was trained on, and on others."""
    answers, found = [answer_of(r) for r in ratings], {}  # type: list[int], Measures
    groups = list(rows_of_members(ratings).values())
    for name, known in (("accuracy_in_topic", True), ("accuracy_out_of_topic", False)):
        told = [rows for rows in groups if ratings[rows[0]].topic]
        chosen = [rows for rows in told if (ratings[rows[0]].topic in trained) is known]
        found[name] = pairwise_accuracy(scores, answers, chosen)[0]
    return found


def swapped_accuracy(preference_model: PreferenceModel, ratings: Sequence[Rating | Vote]) -> float | None:
    """Pairwise accuracy where the model reads, for each member, the opinion of the next one of the deliberation.

    What it keeps of the accuracy comes from the statements alone. Members alone in a deliberation, or all of one
    opinion, are left out.
    """
    opinions: dict[str, list[str]] = {}
    for r in ratings:
        texts = opinions.setdefault(r.deliberation_id, [])
        if r.opinion not in texts:
            texts.append(r.opinion)
    swapped = [r for r in ratings if len(opinions[r.deliberation_id]) > 1]
    if not swapped:
        return None
    rows = []
    for r in swapped:
        texts = opinions[r.deliberation_id]
        rows.append(Answered(r.question, texts[(texts.index(r.opinion) + 1) % len(texts)], r.statement))
    groups = list(rows_of_members(swapped).values())
    return pairwise_accuracy(score_ratings(preference_model, rows), [answer_of(r) for r in swapped], groups)[0]


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


def auc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Area under the ROC curve, 0..1, chance 0.5: P(a positive's score is above a negative's), ties one half.

    None where there is no positive or no negative.
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    above, count = int(y.sum()), len(y)
    if above in (0, count):
        return None
    _, inverse, counts = np.unique(s, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal scores
    return float((ranks[y].sum() - above * (above + 1) / 2) / (above * (count - above)))


def reliability(predicted: ArrayLike, seen: ArrayLike, bins: int = BINS) -> NDArray[np.float64]:
    """Mean prediction, mean outcome and count of ``bins`` bins of equal mass, [bins, 3], ascending in prediction."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(seen, dtype=np.float64)
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    return np.array([(p[part].mean(), y[part].mean(), len(part)) for part in parts])


def calibration_error(calibration: Calibration, scores: ArrayLike, answers: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of P(rating), 0..1: the mean over the scale's cut-points of that of P(r <= v_k).

    Each is the mean over equal-mass bins of |mean prediction - share seen| (Naeini et al. 2015), so for votes it is
    the error of P(agree). It is biased up: with n ratings a perfect model shows about 0.8 sqrt(bins p (1 - p) / n).
    """
    at_most = np.cumsum(calibration.probabilities(scores), axis=-1)
    errors = []
    for value in calibration.values[:-1]:
        table = reliability(at_most[:, value - 1], np.asarray(answers) <= value, bins)
        errors.append(np.average(np.abs(table[:, 0] - table[:, 1]), weights=table[:, 2]))
    return float(np.mean(errors))


def partial_correlation(a: ArrayLike, b: ArrayLike, given: ArrayLike) -> float | None:
    """Correlation, -1..1, of what is left of a and b after a linear fit on ``given``."""
    x = np.stack([np.ones(len(np.asarray(given))), np.asarray(given, dtype=np.float64)], axis=1)

    def rest(v: ArrayLike) -> NDArray[np.float64]:
        y = np.asarray(v, dtype=np.float64)
        return y - x @ np.linalg.lstsq(x, y, rcond=None)[0]

    return _correlation(rest(a), rest(b))


def _second(ratings: Sequence[Rating | Vote], second: Sequence[Rating]) -> NDArray[np.float64]:
    def keys(rows: Sequence[Rating | Vote]) -> list[tuple[str, int, str]]:
        return [(r.deliberation_id, r.member, r.statement) for r in rows]

    if keys(ratings) != keys(second):
        raise InputError("second_ratings", len(second), "must rate the same statements in the same order as `ratings`")
    return np.array([r.agreement for r in second], dtype=np.float64)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 1e-12 and b.std() > 1e-12 else None
