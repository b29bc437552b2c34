"""What is done with responses a preference model was not fitted to: set aside, calibrate, measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deliberation.types import Choice, InputError, Rank, Rating, Response, Vote
from reward.calibration import Calibration
from reward.examples import rows_of_members
from reward.measures import Measures, accuracies, answer_of, measures, word_overlap
from reward.preference import PreferenceModel
from reward.raters import consistent_raters
from reward.scoring import Answered, score_ratings, score_responses
from reward.uncertainty import Uncertainty

_MIN_DOUBLED = 100
"""Statements rated twice from which the size of a utility's error can be told; below, the ensemble's spread is it."""


def hold_out(ratings: Sequence[Response], share: float, seed: int) -> tuple[list[Response], list[Response]]:
    """Split whole topics (deliberations, where there is only one topic) into (kept, about ``share`` held out).

    Raises:
        InputError: field ``ratings``, if there are fewer than two deliberations.
    """
    by_topic = len({r.topic for r in ratings}) > 1
    units = [r.topic if by_topic else r.deliberation_id for r in ratings]
    names = sorted(set(units))
    if len(names) < 2:
        raise InputError("ratings", f"{len(names)} deliberations", "give at least two, so that one can be held out")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    kept = [r for r, unit in zip(ratings, units, strict=True) if unit not in chosen]
    return kept, [r for r, unit in zip(ratings, units, strict=True) if unit in chosen]


def calibrated(
    model: PreferenceModel,
    held_out: Sequence[Response],
    second: Sequence[Rating],
    values: tuple[int, ...],
    leveled: bool,
    trained_topics: set[str],
    min_kappa: float,
) -> PreferenceModel:
    """The model with its calibration fitted to responses it has not seen, and with its measures on them.

    Args:
        model: changed in place.
        held_out: one showing of every statement; ratings and votes tell the level, ranks and choices do not.
        second: second ratings of some of them.
        values: the scale of the responses, see ``Calibration``.
        leveled: whether the fit had ratings, votes or soft votes, so that its own scale tells a level.
        trained_topics, min_kappa: for the measures.

    Raises:
        InputError: field ``learning_rate``, if the scores are no numbers.
    """
    rated = [r for r in held_out if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    compared = [r for r in held_out if isinstance(r, Choice | Rank)]
    on_pairs = compared_accuracies(model, compared)
    model.uncertainty = None if model.ensemble is None else Uncertainty()
    if not rated:
        if not leveled:  # ranks and choices say nothing of the level: a statement of mean score is a toss-up
            slope, scores = model.calibration.slope, score_ratings(model, texts_of(held_out))
            model.calibration = Calibration((slope * float(scores.mean(dtype=np.float64)),), slope, values)
        model.metadata = {**model.metadata, "eval_ratings": len(held_out), "measures": on_pairs}
        return model
    found = score_responses(model, rated)
    _finite(found.raw)
    answers = np.array([answer_of(r) for r in rated])
    model.calibration = Calibration.fit(found.raw, answers, values)
    place = {(r.deliberation_id, r.member, r.statement): k for k, r in enumerate(rated)}
    at = [place[r.deliberation_id, r.member, r.statement] for r in second]
    if found.ensemble is not None and len(second) >= _MIN_DOUBLED:
        twice = answers[at], np.array([r.agreement for r in second])
        model.uncertainty = Uncertainty.fit(model.calibration, found.raw[at], found.ensemble[at], *twice)
    again = [second[k] for k in np.argsort(at)] if len(at) == len(rated) else None  # a ceiling needs all rated twice
    measured = measures(model, rated, again, scores=found.raw, trained_topics=trained_topics)
    measured["accuracy_consistent_raters"] = _accuracy_of_consistent(found.raw, rated, second, min_kappa)
    measured |= {f"compared_{name}": value for name, value in on_pairs.items()} if compared else {}
    model.metadata = {**model.metadata, "eval_ratings": len(rated), "measures": measured}
    return model


def compared_accuracies(model: PreferenceModel, responses: Sequence[Choice | Rank]) -> Measures:
    """Pairwise accuracy and its controls (see ``measures``) on choices and rankings, each member of equal weight.

    ``swapped`` reads the opinion of another member of the deliberation, where there is one with another opinion.
    """
    opinions: dict[str, list[str]] = {}
    for r in responses:
        opinions.setdefault(r.deliberation_id, []).append(r.opinion)
    pairs = [  # (member, preferred, other)
        (responses[rows[0]], better, worse)
        for rows in rows_of_members(responses).values()
        for better, worse in _told_apart([responses[row] for row in rows])
    ]
    found: Measures = {"pairs": len(pairs)}
    others = [next((o for o in opinions[r.deliberation_id] if o != r.opinion), None) for r, _, _ in pairs]
    for name in ("accuracy", "swapped", "longest", "overlap"):
        asked = [
            (k, Answered(r.question, other if name == "swapped" and other else r.opinion, text))
            for k, ((r, *texts), other) in enumerate(zip(pairs, others, strict=True))
            if name != "swapped" or other
            for text in texts
        ]
        if not asked:
            found[name] = None
            continue
        values = _values_of(name, model, [answered for _, answered in asked])
        right = (np.sign(values[::2] - values[1::2]) + 1) / 2
        by_member: dict[tuple[str, int], list[float]] = {}
        for (k, _), share in zip(asked[::2], right, strict=True):
            by_member.setdefault((pairs[k][0].deliberation_id, pairs[k][0].member), []).append(float(share))
        found[name] = float(np.mean([np.mean(shares) for shares in by_member.values()]))
    return found


def _values_of(name: str, model: PreferenceModel, rows: Sequence[Answered]) -> NDArray[np.float64]:
    if name == "longest":
        return np.array([len(row.statement) for row in rows], dtype=np.float64)
    if name == "overlap":
        return np.array([word_overlap(row.opinion, row.statement) for row in rows])
    return _finite(score_ratings(model, rows)).astype(np.float64)


def _finite(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores, if they are numbers.

    Raises:
        InputError: field ``learning_rate``.
    """
    if not np.isfinite(scores).all():
        raise InputError("learning_rate", "scores that are no numbers", "training diverged; lower it")
    return scores


def _told_apart(responses: Sequence[Choice | Rank]) -> list[tuple[str, str]]:
    """(Preferred, other) texts of one member's choices and ranks."""
    ranks = [r for r in responses if isinstance(r, Rank)]
    chosen = [(r.chosen, r.rejected) for r in responses if isinstance(r, Choice)]
    return chosen + [(a.statement, b.statement) for a in ranks for b in ranks if a.rank < b.rank]


def _accuracy_of_consistent(
    scores: NDArray[np.float32], rated: Sequence[Rating | Vote], second: Sequence[Rating], min_kappa: float
) -> float | None:
    """Pairwise accuracy on the held-out members who agree with themselves; None where nobody rated twice."""
    if not second:
        return None
    kept = {id(r) for r in consistent_raters(rated, second, min_kappa)[0]}
    rows = [k for k, r in enumerate(rated) if id(r) in kept]
    return accuracies(scores[rows], [rated[k] for k in rows])["accuracy"] if rows else None


def texts_of(responses: Sequence[Response]) -> list[Answered]:
    """Every (member, statement) that a response speaks of."""
    return [
        Answered(r.question, r.opinion, text)
        for r in responses
        for text in ((r.chosen, r.rejected) if isinstance(r, Choice) else (r.statement,))
    ]
