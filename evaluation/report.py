"""A comparison as a page a person reads, and as a table for the terminal."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from evaluation import page, plots
from evaluation.page import headline, number, percent

ALTERNATIVES = {
    "win_rates": "Gold win rates between arms with 95 % intervals",
    "best_of": "Gold welfare of best of n for the SFT and the PPO policy",
    "learning": "Gold and predicted welfare against PPO updates",
    "kl": "KL divergence from the SFT policy against PPO updates",
    "length": "Statement length against PPO updates",
    "preference": "Pairwise accuracy of the preference model, its baselines and its ceiling",
}


def write_report(folder: str | os.PathLike[str], comparison: dict[str, Any], history: list[dict[str, Any]]) -> Path:
    """Write ``report.html`` and one PNG a figure into ``folder``.

    The page is one file: figures are inline SVG, nothing is loaded from elsewhere, no script. It appears whole or not
    at all (written beside, then renamed).

    Args:
        folder: made if it is not there.
        comparison: what ``compare`` returned.
        history: the PPO log, one dict an entry with ``step`` and metrics (``plots.HISTORY`` names those drawn); a
            series that is not in it is shown as not logged.

    Returns:
        The path of ``report.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(comparison, history)
    images = {}
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(_render(figure, "png"))
        encoded = base64.b64encode(_render(figure, "svg")).decode("ascii")
        images[name] = (f"data:image/svg+xml;base64,{encoded}", ALTERNATIVES[name])
    examples = [page.example(one, opened=i == 0) for i, one in enumerate(comparison["examples"])]
    target, beside = folder / "report.html", folder / "report.html.tmp"
    beside.write_text(page.page(comparison, images, examples), encoding="utf-8")
    beside.replace(target)
    return target


def _figures(comparison: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Every figure of the report by name."""
    return {
        "win_rates": plots.draw(plots.win_rates, comparison),
        "best_of": plots.draw(plots.best_of, comparison),
        "learning": plots.draw(plots.learning, history),
        "kl": plots.draw(plots.divergence, history),
        "length": plots.draw(plots.length, history),
        "preference": plots.draw(plots.preference, comparison["preference"]),
    }


def _render(figure: Figure, kind: str) -> bytes:
    """The figure's file content; the same figure gives the same bytes (no date inside)."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(plots.STYLE):
        figure.savefig(buffer, format=kind, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def table(comparison: Mapping[str, Any]) -> str:
    """The arms, their gold measures and their win rate over SFT, as aligned text."""
    over_sft = {r["a"]: plots.interval_text(r) for r in comparison["pairs"] if r["b"] == "sft"}
    head = ("arm", "mean", "min", "quality", "unanimous", "words", "KL", "wins over sft, 95 %")
    rows: list[Sequence[str]] = [head]
    for arm, row in comparison["arms"].items():
        rows.append((
            arm, number(row["mean"]), number(row["min"]), number(row["quality"]), percent(row["unanimity"]),
            number(row["length"], 1), number(row["kl"]), over_sft.get(arm, ""),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    facts = f"{comparison['deliberations']} held-out deliberations, welfare {comparison['welfare']}"
    return "\n".join([*lines, "", headline(comparison), f"Gold ratings of simulated citizens (1 to 7); {facts}."])


def print_table(comparison: Mapping[str, Any]) -> None:
    """Print ``table`` to the terminal."""
    print(table(comparison))
