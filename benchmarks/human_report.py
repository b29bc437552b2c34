"""The report of the benchmark on people's votes: a table to read and a reliability plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLUMNS = ("auc", "pairs", "choices", "accuracy", "ece", "brier", "length_slope")
_WIDTH = 24


def table(report: Mapping[str, Any]) -> str:
    """All results as text, one block a set and split; ``-``: does not apply, ``undefined``: no value."""
    lines = [f"{report['model']['path']} on {report['data']}, seed {report['seed']}, {report['seconds']['total']} s"]
    for name, splits in report["results"].items():
        for split, found in splits.items():
            lines += ["", *_block(f"{name} / {split}", found)]
    return "\n".join(lines)


def _block(title: str, found: Mapping[str, Any]) -> list[str]:
    counts = f"{found['votes']} votes, {found['persons']} persons ({found['persons_with_pairs']} with pairs)"
    lines = [
        f"{title} - {counts}, {found['choices']} choices, positive share {estimate(found['positive_share'])}",
        f"{'':22}" + "".join(f"{column:>{_WIDTH}}" for column in _COLUMNS),
    ]
    rows = {"model": found["model"], "model, swapped opinion": found["model"]["swapped"]}
    rows["  gain of the own"] = found["model"]["gain"]
    if "anchor" in found:
        rows |= {"anchor": found["anchor"], "anchor, swapped": found["anchor"]["swapped"]}
        rows["  gain of the own "] = found["anchor"]["gain"]
        rows["model minus anchor"] = found["model_minus_anchor"]
    rows |= found["controls"]
    for label, values in rows.items():
        cells = "".join(f"{estimate(values.get(column)):>{_WIDTH}}" for column in _COLUMNS)
        lines.append(f"{label:22}{cells}")
    return lines


def estimate(found: Mapping[str, Any] | None) -> str:
    """``0.712 [0.690, 0.731]``."""
    if found is None:
        return "-"
    if found["value"] is None:
        return "undefined"
    if found["low"] is None:
        return f"{found['value']:.3f} [no interval]"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Reliability of P(agree), one panel a set and split: predicted against observed, how often below. PNG."""
    panels = [(f"{name} / {split}", found) for name, s in report["results"].items() for split, found in s.items()]
    figure = Figure(figsize=(3.6 * max(1, len(panels)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(panels)), squeeze=False, height_ratios=[3, 1], sharex=True)
    for column, (title, found) in enumerate(panels):
        _panel(axes[0][column], axes[1][column], title, found)
    axes[0][0].set_ylabel("observed share of agrees\n(10 bins of equal mass)")
    axes[1][0].set_ylabel("votes")
    figure.savefig(path, dpi=120)


def _panel(above: Axes, below: Axes, title: str, found: Mapping[str, Any]) -> None:
    above.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    for who, colour, marker in (("model", "#1f5fa8", "o"), ("anchor", "#c9711b", "s")):
        if who not in found:
            continue
        bins = found[who]["reliability"]
        x, ece = [b["predicted"] for b in bins], found[who]["ece"]["value"]
        shown = "undefined" if ece is None else f"{ece:.3f}"
        above.plot(x, [b["observed"] for b in bins], color=colour, marker=marker, ms=4, label=f"{who}, ECE {shown}")
        counts = found[who]["histogram"]
        below.stairs(counts, [k / len(counts) for k in range(len(counts) + 1)], color=colour)
    above.set(title=title, xlim=(0, 1), ylim=(0, 1))
    above.legend(fontsize=8, loc="upper left", frameon=False)
    below.set(xlabel="predicted P(agree)")
    below.set_ylim(bottom=0)
