"""Gold and predicted welfare against the distance from SFT, for PPO and for best-of-n."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COLOURS = {"ppo": "#b5442b", "ppo_32": "#3d7a3a", "ppo_for_4": "#1b6ca8"}
LABELS = {
    "ppo": "PPO, one sample",
    "ppo_32": "PPO, 32 prompts an update, one sample",
    "ppo_for_4": "PPO trained for the best of 4, one sample",
}


def plot(curves: dict[str, list[list[dict[str, float]]]], best_of: list[dict[str, float]], path: Path) -> None:
    """Gold (solid) and predicted (dotted), a line a seed.

    Args:
        curves: arm -> seeds -> evaluations with kl (nats a completion), welfare (gold) and predicted, 1 to 7.
        best_of: the same of best-of-n of the SFT policy, a point an n.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for arm, runs in curves.items():
        for seed, run in enumerate(runs):
            label = LABELS[arm] if seed == 0 else None
            _line(axes, run, COLOURS[arm], label, width=1.0)
    _line(axes, best_of, "#333333", "best of n SFT samples (n = 1, 2, 4, 8, 16)", width=1.8)
    axes.set(xlabel="sqrt of KL to the SFT policy (nats a completion)", ylabel="welfare of held-out groups (1 to 7)")
    axes.set_title("Solid: gold. Dotted: predicted. Simulated citizens, validation topics", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes, points: list[dict[str, float]], colour: str, label: str | None, width: float) -> None:
    distance = np.sqrt([max(point["kl"], 0.0) for point in points])
    axes.plot(distance, [p["welfare"] for p in points], "o-", color=colour, label=label, markersize=3, linewidth=width)
    axes.plot(distance, [p["predicted"] for p in points], ":", color=colour, linewidth=width)
