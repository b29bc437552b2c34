"""Scores of a preference model for (profile, statement) pairs: each distinct pair once, in chunks, with progress."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from benchmarks.human_measures import Array
from benchmarks.human_splits import Predictor
from benchmarks.human_votes import IntArray, VoteSet
from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from reward.scoring import Answered, score_ratings

CHUNK = 512
"""Rows a call: the progress moves, and equal prefixes mostly stay in one call."""


def model_predictor(
    model: PreferenceModel, data: VoteSet, pairs: IntArray, *, chunk: int = CHUNK
) -> tuple[Predictor, int]:
    """The model as a ``Predictor`` that knows ``pairs`` [n, 2] of ``data``, and how many opinions were cut for it."""
    opinions, cut = fitting_opinions(model, data, pairs)

    def score(part: IntArray) -> np.ndarray:
        rows = [Answered(data.questions[p], opinions[p], data.statements[s]) for p, s in part.tolist()]
        return score_ratings(model, rows)

    table = score_table(score, data, pairs, chunk=chunk)
    return Predictor(table, lambda raw: agreement(model.calibration, raw)), cut


def fitting_opinions(model: PreferenceModel, data: VoteSet, pairs: IntArray) -> tuple[list[str], int]:
    """The opinions, those too long for the model cut at a word so that each fits beside its longest statement.

    Returns:
        One opinion a profile, and how many were cut.
    """
    suffix = {s: len(model.suffix_ids(data.statements[s])) for s in np.unique(pairs[:, 1]).tolist()}
    longest: dict[int, int] = {}
    for p, s in pairs.tolist():
        longest[p] = max(longest.get(p, 0), suffix[s])
    opinions, cut = list(data.opinions), 0
    for p, beside in longest.items():

        def tokens(opinion: str, question: str = data.questions[p]) -> int:
            return len(model.prefix_ids(question, opinion))

        room = model.room - beside
        if tokens(opinions[p]) > room:
            words = re.findall(r"\s*\S+", opinions[p])  # with the line breaks between the texts of a profile
            kept = bisect.bisect_right(range(1, len(words) + 1), room, key=lambda k: tokens("".join(words[:k])))
            opinions[p], cut = "".join(words[:kept]), cut + 1
    return opinions, cut


def agreement(calibration: Calibration, scores: Array) -> Array:
    """P(agree) in 0..1, of a vote or of a rating above 4: raw scores [n] -> [n]."""
    return calibration.probabilities(scores)[:, 4:].sum(axis=1)


def score_table(
    score: Callable[[IntArray], np.ndarray], data: VoteSet, pairs: IntArray, *, chunk: int = CHUNK, who: str = "scores"
) -> Callable[[IntArray], Array]:
    """Ask ``score`` for every distinct pair once; the result looks scores up: [n, 2] -> float64 [n].

    Raises:
        InputError: if a score is not finite.
    """
    distinct = np.unique(pairs, axis=0)
    keys = distinct[:, 0] * len(data.statements) + distinct[:, 1]
    size = np.array([len(opinion) for opinion in data.opinions])[distinct[:, 0]]
    order = np.lexsort((distinct[:, 1], distinct[:, 0], size))  # similar lengths together: little padding
    values = np.empty(len(distinct))
    with tqdm(total=len(distinct), desc=f"{who} {data.name}", unit="row", mininterval=5) as progress:
        for start in range(0, len(distinct), chunk):
            part = order[start : start + chunk]
            values[part] = score(distinct[part])
            progress.update(len(part))
    if not np.isfinite(values).all():
        raise InputError(who, int((~np.isfinite(values)).sum()), "scores are not finite; fit the model again")

    def look_up(asked: IntArray) -> Array:
        wanted = asked[:, 0] * len(data.statements) + asked[:, 1]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        if (keys[place] != wanted).any():
            raise KeyError("a pair was asked for that was not scored")
        return values[place]

    return look_up
