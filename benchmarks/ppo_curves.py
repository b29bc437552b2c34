"""Learning curves of our PPOTrainer and of TRL 1.12's, the last one TRL shipped, on one task, over seeds.

    make bench-anchors                                      # once: TRL 1.12 in a virtual environment of its own
    python -m benchmarks.ppo_curves --plot ppo_curves.png --json

The task: the embedded writer, rewarded by the mean agreement of the simulated group it writes for (fresh groups, each
seen once). Both with a separate value model, one completion a prompt and the same settings (``_ppo_citizens_side``).
``difference`` is ours less TRL's, reward of the last quarter of the updates, paired by seed, 95 % (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.ppo_update import run
from deliberation.types import InputError

SIDES = ("ours", "trl")
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile by degrees of freedom."""


def last_quarter(curve: list[float]) -> float:
    """Mean of the last quarter of a curve."""
    return statistics.mean(curve[-max(1, len(curve) // 4) :])


def difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Mean of the paired differences, with its 95 % interval; two to ten pairs."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    half = STUDENT_T[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    mean = statistics.mean(pairs)
    return {"value": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)}


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """A thin line a seed, a thick one for their mean; each smoothed over five updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for side, colour, label in (("ours", "#1b6ca8", "ours"), ("trl", "#b5442b", "TRL 1.12")):
        smooth = [np.convolve(curve, np.ones(5) / 5, mode="valid") for curve in curves[side]]
        updates = np.arange(len(smooth[0])) + 3
        for line in smooth:
            axes.plot(updates, line, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(updates, np.mean(smooth, axis=0), color=colour, linewidth=2, label=label)
    axes.set(xlabel="update (mean of five)", ylabel="mean agreement of the group (1 to 7)")
    axes.set_title("PPO on simulated citizens' own reward", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Alternate the sides over seeds, print the curves and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="2 to 10")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    if not 2 <= args.seeds <= len(STUDENT_T) + 1:
        raise InputError("seeds", args.seeds, "must be from 2 to 10")
    curves: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for seed, side in tqdm([(seed, side) for seed in range(args.seeds) for side in SIDES], desc="runs"):
        words = ["--seed", str(seed), "--updates", str(args.updates)]
        curves[side].append(run("_ppo_citizens_side", side, *words)["reward"])
    ends = {side: [round(last_quarter(curve), 3) for curve in found] for side, found in curves.items()}
    gain = difference(ends["ours"], ends["trl"])
    if args.plot:
        plot(curves, args.plot)
    if not args.json:
        print(f"last quarter, a seed each: {ends}\nours less TRL's: {gain}")
    facts = {"updates": args.updates, "date": date.today().isoformat()}
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"last_quarter": ends, "difference": gain, "curves": curves, **facts, "machine": machine}))


if __name__ == "__main__":
    main()
