"""What is done with responses a preference model was not fitted to: set aside, calibrate, measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deliberation.types import Choice, InputError, Rating, Response, Vote
from reward.calibration import Calibration
from reward.measures import accuracies, answer_of, measures
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
    trained_topics: set[str],
    min_kappa: float,
) -> PreferenceModel:
    """The model with its calibration fitted to responses it has not seen, and with its measures on them.

    Args:
        model: changed in place.
        held_out: one showing of every statement; ratings and votes tell the level, ranks and choices do not.
        second: second ratings of some of them.
        values: the scale of the responses, see ``Calibration``.
        trained_topics, min_kappa: for the measures.
    """
    rated = [r for r in held_out if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    if not rated:  # ranks and choices say nothing of the level: a statement of mean score is a toss-up
        scores = score_ratings(model, texts_of(held_out)).astype(np.float64)
        model.calibration = Calibration(
            (float(model.calibration.slope * scores.mean()),), model.calibration.slope, values
        )
        model.metadata["eval_ratings"] = len(held_out)
        return model
    found = score_responses(model, rated)
    answers = np.array([answer_of(r) for r in rated])
    model.calibration = Calibration.fit(found.raw, answers, values)
    place = {(r.deliberation_id, r.member, r.statement): k for k, r in enumerate(rated)}
    at = [place[r.deliberation_id, r.member, r.statement] for r in second]
    if found.ensemble is not None:
        model.uncertainty = Uncertainty()
        if len(second) >= _MIN_DOUBLED:
            twice = answers[at], np.array([r.agreement for r in second])
            model.uncertainty = Uncertainty.fit(model.calibration, found.raw[at], found.ensemble[at], *twice)
    again = [second[k] for k in np.argsort(at)] if len(at) == len(rated) else None  # a ceiling needs all rated twice
    measured = measures(model, rated, again, scores=found.raw, trained_topics=trained_topics)
    measured["accuracy_consistent_raters"] = _accuracy_of_consistent(found.raw, rated, second, min_kappa)
    model.metadata = {**model.metadata, "eval_ratings": len(rated), "measures": measured}
    return model


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
