"""A confidence sequence as people look at it: what is known after every deliberation, and where it decided."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deliberation.types import InputError
from evaluation.plots import COLOURS, INK, MUTED, STYLE, draw
from evaluation.sequences import ConfidenceSequence

Array = np.ndarray

SUFFIXES = (".png", ".svg")

BAND, DECIDED = COLOURS["sft_best_of"], COLOURS["ppo_best_of"]

SHOWN_FROM = 0.05
"""The height fits the band from this share of the deliberations on: before that it is nearly the whole scale."""


def sequence_figure(
    sequence: ConfidenceSequence,
    measure: str = "mean agreement difference, rating points",
    *,
    arms: tuple[str, str] = ("A", "B"),
    minimum: int = 1,
) -> Figure:
    """Band, running mean, the line of no difference, and the look that decided.

    Args:
        sequence: one sequence, on the scale to show (``difference_sequence``, ``win_rate_sequence``).
        measure: its name and unit.
        arms: names of A and B; values above the line favour A.
        minimum: deliberations before the experiment may decide.

    Raises:
        InputError: field ``sequence``, for many sequences or one without a deliberation.
    """
    if sequence.mean.ndim != 1 or not len(sequence.mean):
        raise InputError("sequence", sequence.mean.shape, "must be one sequence of at least one deliberation")
    return draw(_figure, sequence, measure, arms, minimum)


def save_sequence(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the name's suffix; the same data gives the same bytes.

    Raises:
        InputError: field ``path``, for another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError("path", str(path), f"must end in {' or '.join(SUFFIXES)}")
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figure(sequence: ConfidenceSequence, measure: str, arms: tuple[str, str], minimum: int) -> Figure:
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    looks = np.arange(1, len(sequence.mean) + 1)
    axes.fill_between(looks, sequence.low, sequence.high, color=BAND, alpha=0.16, linewidth=0)
    for bound in (sequence.low, sequence.high):
        axes.plot(looks, bound, color=BAND, linewidth=1, alpha=0.6)
    axes.plot(looks, sequence.mean, color=BAND, linewidth=2.2)
    if len(looks) == 1:  # a line of one point is not seen
        axes.plot([1, 1], [sequence.low[0], sequence.high[0]], color=BAND, linewidth=3, alpha=0.3)
        axes.plot(1, sequence.mean[0], "o", color=BAND)
    axes.axhline(sequence.null, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    _limits(axes, sequence)
    _sides(axes, sequence.null, arms)
    _decision(axes, sequence, arms, minimum)
    axes.set_xlabel("deliberations")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{measure}\n{summary(sequence)}", loc="left", fontsize=12, color=MUTED, linespacing=1.5)
    return figure


def summary(sequence: ConfidenceSequence) -> str:
    """``0.31 [0.12, 0.50] after 120 deliberations, 95 % at every look``."""
    n, level = len(sequence.mean), f"{100 * (1 - sequence.alpha):g} % at every look"
    if sequence.broken[-1]:
        return f"no mean fits all {n} deliberations: they do not share one"
    values = f"{sequence.mean[-1]:.2f} [{sequence.low[-1]:.2f}, {sequence.high[-1]:.2f}]"
    return f"{values} after {n} deliberation{'s' * (n != 1)}, {level}"


def _limits(axes: Axes, sequence: ConfidenceSequence) -> None:
    """A height that holds the line of no difference, all of the mean, and the band where it has become narrow."""
    start = int(SHOWN_FROM * len(sequence.mean))
    shown = np.concatenate([sequence.low[start:], sequence.high[start:], sequence.mean[start:], [sequence.null]])
    low, high = np.nanmin(shown), np.nanmax(shown)
    room = 0.08 * (high - low)
    axes.set(xlim=(0, max(len(sequence.mean), 2) * 1.02), ylim=(low - room, high + room))


def _sides(axes: Axes, null: float, arms: tuple[str, str]) -> None:
    """Which arm is better on which side of the line, in the right margin, clear of the band."""
    for arm, place, sign in ((arms[0], "bottom", 1), (arms[1], "top", -1)):
        axes.annotate(
            f"{arm}\nbetter", (1, null), (6, 3 * sign), xycoords=("axes fraction", "data"), fontsize=10.5,
            textcoords="offset points", ha="left", va=place, color=MUTED, linespacing=1.1,
        )  # fmt: skip


def _decision(axes: Axes, sequence: ConfidenceSequence, arms: tuple[str, str], minimum: int) -> None:
    """A mark at the look that decided; none before, and none where the assumptions turned out broken."""
    decision = sequence.decision(minimum)
    if decision is None or sequence.broken[-1]:
        return
    n = decision.deliberations
    axes.axvline(n, color=DECIDED, linewidth=1.2)
    axes.plot(n, sequence.mean[n - 1], "o", color=DECIDED, markersize=8, markeredgecolor="white")
    right = n <= 0.5 * len(sequence.mean)
    name = arms[0] if decision.better == "a" else arms[1]
    axes.annotate(
        f"decided after {n}: {name} is better", (n, 0.97 if decision.better == "a" else 0.03), (6 if right else -6, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", ha="left" if right else "right",
        va="top" if decision.better == "a" else "bottom", color=DECIDED, fontsize=11.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip
