"""Does a penalty on uncertain utilities keep PPO from over-optimising? Gold welfare against KL, simulated citizens.

    python -m benchmarks.overoptimization --policy runs/demo/sft --preference_model runs/demo/preference --json

The embedded PPO configuration with next to no KL price: the policy goes where the preference model leads it; the
reward is the welfare of mean - lambda * sd. Held-out groups on topics of the validation split are watched; gold neither
trains nor stops. Gold welfare at equal KL is read off each run's curve by interpolation, never beyond it (Gao et al.
2022, arXiv 2210.10760, section 2).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from demo import draw_groups, stage_config
from embedded import resolve
from evaluation.gold import make_gold_observer
from rl.logs import read_log

LAMBDAS = (0.0, 1.0)
KL_GRID = (1.0, 2.0, 4.0, 8.0, 12.0)
"""Nats a completion at which runs are compared, where all of them came so far."""


def run(args: argparse.Namespace, penalty: float, seed: int, folder: Path) -> list[dict[str, float]]:
    """One PPO run: KL, gold and predicted welfare of the held-out groups at every evaluation."""
    from rl.train import train_ppo

    train = draw_groups("train", 16 * args.updates, f"over {seed}")
    held_out = draw_groups("validation", args.groups, "over held out")
    config = stage_config(
        "ppo",
        model_name_or_path=resolve(args.policy),
        preference_model=resolve(args.preference_model),
        output_dir=folder,
        max_steps=args.updates,
        beta=args.beta,
        max_kl=1000,
        uncertainty_penalty=penalty,
        eval_steps=args.every,
        save_strategy="no",
        load_best_model_at_end=False,
        reward_actors=0,
        disable_tqdm=True,
        seed=seed,
    )
    rows, eval_rows = (
        [{"question": g.question.text, "opinions": [c.opinion for c in g.citizens]} for g in groups]
        for groups in (train, held_out)
    )
    train_ppo(config, rows, eval_rows, observers=[make_gold_observer(held_out, config.welfare)])
    return [
        {"kl": line["eval/kl"], "gold": line["eval/gold_welfare"], "predicted": line["eval/reward"]}
        for line in read_log(folder / "log.jsonl")
        if "eval/gold_welfare" in line
    ]


def at_equal_kl(curve: Sequence[dict[str, float]], grid: Sequence[float]) -> NDArray[np.float64]:
    """Gold welfare at each KL of the grid by linear interpolation in sqrt(KL); NaN beyond the run's largest KL."""
    points = sorted((max(point["kl"], 0.0), point["gold"]) for point in curve)  # a run may also come back
    distance, gold = np.sqrt([kl for kl, _ in points]), [value for _, value in points]
    return np.interp(np.sqrt(grid), distance, gold, right=np.nan)


def plot(curves: dict[tuple[float, int], list[dict[str, float]]], path: Path) -> None:
    """Gold (solid) and predicted (dotted) welfare against sqrt(KL), a colour a lambda."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    colours = dict(zip(LAMBDAS, ("#b5442b", "#1b6ca8"), strict=True))
    for (penalty, seed), curve in curves.items():
        distance = np.sqrt([max(point["kl"], 0.0) for point in curve])
        label = f"lambda {penalty:g}" if seed == 0 else None
        axes.plot(distance, [p["gold"] for p in curve], "o-", color=colours[penalty], label=label, markersize=3)
        axes.plot(distance, [p["predicted"] for p in curve], ":", color=colours[penalty], linewidth=1)
    axes.set(xlabel="sqrt of KL to the SFT policy (nats per completion)", ylabel="welfare of held-out groups (1 to 7)")
    axes.set_title("Solid: gold. Dotted: what the reward predicts. Simulated citizens", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train every lambda with every seed, compare at equal KL, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/demo/sft")
    parser.add_argument("--preference_model", default="runs/demo/preference")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="updates between two evaluations")
    parser.add_argument("--groups", type=int, default=60, help="held-out groups")
    parser.add_argument("--beta", type=float, default=0.002, help="price of KL")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves = {}
    for seed in range(args.seeds):
        for penalty in LAMBDAS:
            with tempfile.TemporaryDirectory(prefix="over-") as folder:
                curves[penalty, seed] = run(args, penalty, seed, Path(folder) / "ppo")
    gold = {key: at_equal_kl(curve, KL_GRID) for key, curve in curves.items()}
    table: list[dict[str, Any]] = []
    for k, kl in enumerate(KL_GRID):
        row: dict[str, Any] = {"kl": kl}
        for penalty in LAMBDAS:
            values = [gold[penalty, seed][k] for seed in range(args.seeds)]
            row[f"gold_lambda_{penalty:g}"] = [None if np.isnan(v) else round(float(v), 3) for v in values]
        table.append(row)
        if not args.json:
            print(row)
    if args.plot:
        plot(curves, args.plot)
    facts = {"updates": args.updates, "beta": args.beta, "groups": args.groups, "date": date.today().isoformat()}
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    named = {f"lambda {penalty:g}, seed {seed}": curve for (penalty, seed), curve in curves.items()}
    print(json.dumps({"at_equal_kl": table, "curves": named, **facts, "machine": machine}))


if __name__ == "__main__":
    main()
