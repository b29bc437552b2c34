"""The report's figures. Every function takes plain data and returns a matplotlib figure; none keeps global state.

One hue a policy (blue SFT, orange PPO), the dark shade for its best-of-n, the same in every figure and in the page.
Sized so that the text stays readable when the figure is shrunk to a phone's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, RULE = "#1f2430", "#5b6472", "#d9dde3"
COLOURS = {
    "base": "#8a929e",
    "best_opinion": "#3d8b5f",
    "sft": "#5aa2d8",
    "sft_best_of": "#1d5c96",
    "ppo": "#e08a52",
    "ppo_best_of": "#ab4416",
}
GOLD, PREDICTED = "#8a6d00", "#6f4aa0"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.dpi": 150,
    "svg.hashsalt": "consensus-machine",  # the same data gives the same bytes
}

KEY_PAIRS = (
    ("sft", "base"),
    ("ppo", "sft"),
    ("sft_best_of", "sft"),
    ("ppo_best_of", "ppo"),
    ("ppo_best_of", "sft_best_of"),
    ("ppo", "sft_best_of"),
    ("ppo", "best_opinion"),
    ("sft_best_of", "best_opinion"),
    ("ppo_best_of", "best_opinion"),
)
"""The comparisons that answer a question; all others are in the page's matrix."""

HISTORY = {
    "rollout": ("reward",),
    "predicted": ("eval/reward",),
    "gold": ("eval/gold_welfare", "gold_welfare"),
    "kl": ("objective/kl",),
    "eval_kl": ("eval/kl",),
    "length": ("completions/mean_length",),
    "eval_length": ("eval/completions/mean_length",),
}
"""Series of the PPO log (``log.jsonl``) by the keys they may have; the first that occurs is drawn.

Gold welfare is not the trainer's to know: ``gold.make_gold_observer`` logs it, or the caller adds ``gold_welfare``.
"""


def kind(arm: str) -> str:
    """The arm without its number: ``sft_best_of_16`` -> ``sft_best_of``."""
    return arm.rsplit("_", 1)[0] if "_best_of_" in arm else arm


def label(arm: str) -> str:
    """The arm as people read it: ``sft_best_of_16`` -> ``SFT, best of 16``."""
    names = {"base": "Base, zero-shot", "sft": "SFT", "ppo": "PPO", "best_opinion": "Best opinion"}
    policy, _, n = arm.partition("_best_of_")
    return f"{names[policy]}, best of {n}" if n else names[arm]


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one ``HISTORY`` series; empty lists where the log has none of its names."""
    for key in HISTORY[name]:
        rows = [row for row in history if row.get(key) is not None and "step" in row]
        if rows:
            return [row["step"] for row in rows], [row[key] for row in rows]
    return [], []


def win_rates(comparison: Mapping[str, Any]) -> Figure:
    """Forest plot: gold win rate with its interval, one row a key pair; hollow = without the voice penalty."""
    arms = {kind(arm): arm for arm in comparison["arms"]}
    rows = {(r["a"], r["b"]): r for r in comparison["pairs"]}
    bare = {(r["a"], r["b"]): r for r in comparison["without_voice_penalty"]["pairs"]}
    pairs = [(arms[a], arms[b]) for a, b in KEY_PAIRS]
    figure = Figure(figsize=(6.4, 0.66 * len(pairs) + 1.0), layout="constrained")
    axes = figure.subplots()
    for y, pair in enumerate(pairs):
        row, colour = rows[pair], COLOURS[kind(pair[0])]
        axes.text(0, y - 0.34, f"{label(pair[0])}  over  {label(pair[1])}", va="center", fontsize=11.5)
        axes.text(100, y - 0.34, interval_text(row), va="center", ha="right", fontsize=11.5, color=MUTED)
        _whisker(axes, bare[pair], y + 0.2, colour, hollow=True)
        _whisker(axes, row, y, colour, hollow=False)
    axes.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set(xlim=(-1, 101), ylim=(len(pairs) - 0.55, -0.8), yticks=[], xticks=[0, 25, 50, 75, 100])
    axes.set_xlabel("gold win rate, % of deliberations (hollow: without the voice penalty)")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    return figure


def _whisker(axes: Axes, row: Mapping[str, Any], y: float, colour: str, *, hollow: bool) -> None:
    """One interval with its point; nothing where the win rate is undefined."""
    if row["win_rate"] is None:
        return
    if row["low"] is not None:
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=1.2 if hollow else 3,
                  alpha=0.6 if hollow else 1, solid_capstyle="round")  # fmt: skip
    axes.plot(100 * row["win_rate"], y, "o", markersize=5 if hollow else 9, color=colour,
              markerfacecolor="white" if hollow else colour)  # fmt: skip


def interval_text(row: Mapping[str, Any]) -> str:
    """``71 % [65, 77]``; a dash where undefined."""
    if row["win_rate"] is None:
        return "–"
    if row["low"] is None:
        return f"{whole(row['win_rate'])} %"
    return f"{whole(row['win_rate'])} % [{whole(row['low'])}, {whole(row['high'])}]"


def whole(share: float) -> str:
    """A share as a whole percentage; one decimal where rounding would claim all or none."""
    rounded = round(100 * share)
    return f"{100 * share:.1f}" if rounded in (0, 100) and share not in (0.0, 1.0) else f"{rounded}"


def learning(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Gold and predicted welfare against PPO updates. A widening gap is over-optimisation."""
    figure, axes = _figure("PPO update", "welfare (1 to 7)")
    _line(axes, *series(history, "rollout"), PREDICTED, "predicted, training rollouts", light=True)
    _line(axes, *series(history, "predicted"), PREDICTED, "predicted, held out")
    _line(axes, *series(history, "gold"), GOLD, "gold, held out")
    return _finish(figure, axes)


def divergence(history: Sequence[Mapping[str, Any]]) -> Figure:
    """KL to the SFT policy against PPO updates."""
    figure, axes = _figure("PPO update", "KL to SFT (nats per response)")
    _line(axes, *series(history, "kl"), COLOURS["ppo"], "training rollouts", light=True)
    _line(axes, *series(history, "eval_kl"), COLOURS["ppo_best_of"], "held out")
    return _finish(figure, axes)


def length(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean statement length against PPO updates."""
    figure, axes = _figure("PPO update", "length (tokens)")
    _line(axes, *series(history, "length"), COLOURS["ppo"], "training rollouts", light=True)
    _line(axes, *series(history, "eval_length"), COLOURS["ppo_best_of"], "held out")
    return _finish(figure, axes)


def best_of(comparison: Mapping[str, Any]) -> Figure:
    """Gold welfare of best-of-n for both policies, with intervals; the best opinion and the base for scale."""
    figure, axes = _figure("candidates n (chosen by predicted welfare)", "gold welfare (1 to 7)")
    for policy, rows in comparison["best_of"].items():
        sizes, colour = [row["n"] for row in rows], COLOURS[policy]
        defined = [row for row in rows if row["low"] is not None]
        axes.fill_between([r["n"] for r in defined], [r["low"] for r in defined], [r["high"] for r in defined],
                          color=colour, alpha=0.18, linewidth=0)  # fmt: skip
        axes.plot(sizes, [r["welfare"] for r in rows], "o-", color=colour, linewidth=2.4, markersize=6,
                  label=label(policy))  # fmt: skip
    for arm in ("best_opinion", "base"):
        level = comparison["arms"][arm]["welfare"]
        axes.axhline(level, color=COLOURS[arm], linewidth=1.4, linestyle=(0, (4, 3)), label=label(arm))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    return _finish(figure, axes)


def preference(figures: Mapping[str, float | None]) -> Figure:
    """Pairwise accuracy of the preference model beside its baselines and the noise ceiling."""
    rows = [("longest", "Longest statement", "#b5bcc6"), ("overlap", "Word overlap", "#b5bcc6"),
            ("accuracy", "Preference model", PREDICTED)]  # fmt: skip
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for y, (key, name, colour) in enumerate(rows):
        value = figures[key]
        axes.text(50.4, y - 0.36, name, va="center", fontsize=11.5)
        if value is None:
            continue
        axes.barh(y, 100 * value - 50, left=50, height=0.34, color=colour)
        inside = value > 0.62  # a long bar holds its own figure at its foot, clear of the ceiling's line
        axes.text(50.6 if inside else max(100 * value, 50) + 0.6, y, f"{100 * value:.1f} %", va="center",
                  fontsize=11.5, color="white" if inside else INK)  # fmt: skip
    ceiling = figures["ceiling"]
    if ceiling is not None:
        axes.axvline(100 * ceiling, color=GOLD, linewidth=1.6, linestyle=(0, (4, 3)))
        text = f"a second rating by the citizen {100 * ceiling:.1f} %"
        axes.text(100 * ceiling - 0.5, -0.62, text, ha="right", color=GOLD, fontsize=11.5)
    known = [100 * v for v in (figures[k] for k in ("longest", "overlap", "accuracy", "ceiling")) if v is not None]
    axes.set(xlim=(min([50, *known]) - 0.5, max([60, *known]) + 6), ylim=(2.5, -0.95), yticks=[])
    axes.set_xlabel("pairs ordered as the citizen does, % (chance 50)")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    return figure


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x)
    axes.set_title(y, loc="left", fontsize=12, color=MUTED)  # level text instead of a turned axis label
    return figure, axes


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, name: str, *, light: bool = False) -> None:
    """A labelled curve; none where there is nothing to draw."""
    if x:
        axes.plot(x, y, color=colour, label=name, linewidth=1.2 if light else 2.4, alpha=0.55 if light else 1,
                  marker=None if light or len(x) > 40 else "o", markersize=5)  # fmt: skip


def _finish(figure: Figure, axes: Axes) -> Figure:
    """Legend above the data, whole-number updates; an empty log says so instead of showing an empty frame."""
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=11)
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.text(0.5, 0.5, "not logged in this run", ha="center", va="center", transform=axes.transAxes, color=MUTED)
        axes.set(xticks=[], yticks=[])
    return figure


def draw(make: Callable[..., Figure], *data: Any) -> Figure:
    """Call a figure function in the report's style, whatever the caller's matplotlib settings."""
    with matplotlib.rc_context(STYLE):
        return make(*data)
