"""A picture of a preference model's calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deliberation.types import Rating, Response, Vote
from reward.measures import answer_of, calibration_error, reliability
from reward.preference import PreferenceModel
from reward.raters import showings
from reward.scoring import score_ratings

RELIABILITY_FILE = "reliability.png"


def save_reliability(model: PreferenceModel, held_out: Sequence[Response], folder: Path) -> Path | None:
    """``reliability.png``: predicted against seen, for utilities and for P(agree), ten bins of equal mass each.

    Returns:
        The file, or None where nothing held out is a rating or a vote.
    """
    rated = [r for r in showings(held_out)[0] if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    if not rated:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    raw, answers = score_ratings(model, rated), np.array([answer_of(r) for r in rated])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    agree = model.calibration.probabilities(raw)[:, 4:].sum(axis=1)
    tables = [
        (left, model.calibration.utilities(raw), answers, (1, 7), "utility (expected rating)", "mean rating"),
        (right, agree, answers > 4, (0, 1), "predicted P(agree)", "share who agree"),
    ]
    for axes, predicted, seen, limits, x, y in tables:
        table = reliability(predicted, seen)
        spread = [seen[part].std() / np.sqrt(len(part)) for part in np.array_split(np.argsort(predicted), len(table))]
        axes.plot(limits, limits, color="0.7", linewidth=1)
        axes.errorbar(table[:, 0], table[:, 1], yerr=1.96 * np.array(spread), fmt="o-", color="#1b6ca8", capsize=2)
        axes.set(xlim=limits, ylim=limits, xlabel=x, ylabel=y, aspect="equal")
    error = calibration_error(model.calibration, raw, answers)
    figure.suptitle(f"Reliability on {len(rated)} held-out ratings: expected calibration error {error:.3f}")
    path = folder / RELIABILITY_FILE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
