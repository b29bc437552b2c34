"""What PPO learns on the embedded default, over seeds: against SFT, with more prompts an update, and for the best of 4.

    python -m benchmarks.ppo_learning --policy runs/demo/sft --preference_model runs/demo/preference --seeds 0 1 2 3 4

Each arm and seed trains with ``configs/embedded/ppo.yaml`` and more updates, on groups of its own, and is then measured
on held-out topics and words (our test questions): gold win rates, how many SFT samples one of its samples is worth, KL.
What is done is kept in ``--output`` and not done again: seeds may run in several processes, a run that was broken off
goes on, and the command with all of them then reports. Intervals: bootstrap over groups and seeds. Simulated citizens
throughout.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ppo_learning_plot import plot
from benchmarks.ppo_pools import Pool, best_of, draw_pool, wins, worth
from deliberation.citizens import Group
from deliberation.questions import load_questions
from deliberation.types import InputError
from demo import IN_OTHER_WORDS, deliberation_rows, draw_groups, stage_config
from embedded import resolve
from evaluation.gold import held_out_groups, make_gold_observer
from evaluation.measures import Array
from reward.preference import PreferenceModel
from rl.logs import read_log

ARMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_32": {"num_prompts": 32},
    "ppo_for_4": {"best_of_n": 4, "num_generations": 16, "num_prompts": 8, "leave_one_out_baseline": False},
}
"""What differs from ``configs/embedded/ppo.yaml``."""
WATCHED = 40
"""Held-out groups (validation topics) whose gold welfare is logged; it neither trains nor stops."""
SIZES = (1, 2, 4, 8, 16)
GROUPS_SEED = 11
DRAWS = 10_000


def watched() -> list[Group]:
    """The groups of the learning curves."""
    return draw_groups("validation", WATCHED, "learning held out")


def train(args: argparse.Namespace, arm: str, seed: int, folder: Path) -> None:
    """One PPO run into ``folder``, going on from its last checkpoint where it was broken off."""
    from rl.checkpoints import AUTO, PREEMPTED
    from rl.train import train_ppo

    config = stage_config(
        "ppo",
        model_name_or_path=resolve(args.policy),
        preference_model=resolve(args.preference_model),
        output_dir=folder,
        max_steps=args.updates,
        eval_steps=args.every,
        save_steps=args.every,
        num_generations_eval=4,
        reward_actors=0,
        seed=seed,
        resume_from_checkpoint=AUTO,
        **ARMS[arm],
    )
    groups = draw_groups("train", config.num_prompts * args.updates, f"learning {seed}")
    trainer = train_ppo(
        config,
        deliberation_rows(f"learning {seed}", groups, IN_OTHER_WORDS),
        deliberation_rows("learning held out", watched()),
        observers=[make_gold_observer(watched(), config.welfare)],
    )
    if trainer.preemption.agreed:
        raise SystemExit(PREEMPTED)


def pool_of(args: argparse.Namespace, policy: str, groups: list[Group], path: Path, seed: int) -> Pool:
    """The policy's pool, drawn unless it is in the file ``path``."""
    if not path.is_file():
        judge = PreferenceModel.load(resolve(args.preference_model), device="cpu")
        pool = draw_pool(policy, resolve(args.policy), judge, groups, stage_config("compare"), seed)
        part = path.with_suffix(".part.npz")
        np.savez(part, **asdict(pool))
        part.replace(path)
    with np.load(path) as found:
        return Pool(**found)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings in ``folder``, or refuse what was kept there with others.

    Raises:
        InputError: field ``output``.
    """
    path = folder / "settings.json"
    if not path.is_file():
        path.write_text(json.dumps(settings))
    elif json.loads(path.read_text()) != settings:
        raise InputError("output", str(folder), f"holds runs of {path.read_text()}; name another folder")


def interval(outcomes: Array) -> dict[str, Any]:
    """Mean of [seeds, groups], its 95 % interval by resampling seeds and groups, and the seeds' means."""
    rng, (seeds, groups) = np.random.default_rng(0), outcomes.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    by_group = rng.multinomial(groups, np.full(groups, 1 / groups), size=DRAWS) / groups
    low, high = np.percentile(np.einsum("ds,sg,dg->d", by_seed, outcomes, by_group, optimize=True), [2.5, 97.5])
    figures = {"value": outcomes.mean(), "low": low, "high": high}
    each = {"seeds": [round(float(x), 3) for x in outcomes.mean(axis=1)]}
    return {name: round(float(x), 3) for name, x in figures.items()} | each


def measure(pools: list[Pool], sft: Pool) -> dict[str, Any]:
    """One arm's figures over its seeds' pools."""
    rates = {f"{a} over sft {b}": (a, b) for a, b in [(1, 1), (4, 4), (16, 16), (1, 4), (1, 16)]}
    return {
        "win_rate": {name: interval(np.array([wins(p, a, sft, b) for p in pools])) for name, (a, b) in rates.items()},
        "one_sample_is_worth": [round(worth(p, sft), 2) for p in pools],
        "kl": [round(float(p.log_ratios.mean()), 2) for p in pools],
        "spread": [round(float(p.gold.std(axis=1).mean()), 3) for p in pools],
        "best_of": [[best_of(p, n) for n in SIZES] for p in pools],
    }


def main() -> None:
    """Train and measure what is missing, then report every seed given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/demo/sft")
    parser.add_argument("--preference_model", default="runs/demo/preference")
    parser.add_argument("--output", type=Path, default=Path("runs/ppo_learning"))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="updates between two evaluations")
    parser.add_argument("--groups", type=int, default=135, help="held-out groups of the measurement")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    names = ("policy", "preference_model", "updates", "every", "groups")
    check_settings(args.output, {name: getattr(args, name) for name in names})
    # 1. SFT, on the groups of the measurement and on those of the learning curves
    groups = held_out_groups(load_questions("test"), args.groups, GROUPS_SEED)
    sft = pool_of(args, resolve(args.policy), groups, args.output / "sft.npz", seed=1)
    sft_watched = pool_of(args, resolve(args.policy), watched(), args.output / "sft-watched.npz", seed=2)
    # 2. Every arm and seed
    pools: dict[str, list[Pool]] = {arm: [] for arm in args.arms}
    curves: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in args.arms}
    for seed in args.seeds:
        for arm in args.arms:
            folder, path = args.output / f"{arm}-{seed}", args.output / f"{arm}-{seed}.npz"
            if not path.is_file():
                train(args, arm, seed, folder)
            pools[arm].append(pool_of(args, str(folder), groups, path, seed=100 + seed))
            curves[arm].append(curve(folder))
    # 3. Report
    found: dict[str, Any] = {arm: measure(parts, sft) for arm, parts in pools.items()}
    found["sft"] = {"best_of": [best_of(sft, n) for n in SIZES], "spread": round(float(sft.gold.std(axis=1).mean()), 3)}
    if "ppo" in pools and "ppo_for_4" in pools:
        pairs = list(zip(pools["ppo_for_4"], pools["ppo"], strict=True))
        for n in (1, 16):
            found[f"ppo_for_4 over ppo, best of {n}"] = interval(np.array([wins(a, n, b, n) for a, b in pairs]))
    best = [best_of(sft_watched, n) for n in SIZES]
    if args.plot:
        plot(curves, best, args.plot)
    if not args.json:
        for arm in args.arms:
            print(arm, json.dumps({k: v for k, v in found[arm].items() if k != "best_of"}, indent=1))
    facts = {"updates": args.updates, "groups": args.groups, "seeds": args.seeds, "date": date.today().isoformat()}
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"found": found, "curves": curves, "sft_curve": best, **facts, "machine": machine}))


def curve(folder: Path) -> list[dict[str, float]]:
    """KL, gold and predicted welfare of the watched groups at every evaluation of a run."""
    return [
        {"step": line["step"], "kl": line["eval/kl"], "welfare": line["eval/gold_welfare"],
         "predicted": line["eval/reward"]}
        for line in read_log(folder / "log.jsonl")
        if "eval/gold_welfare" in line
    ]  # fmt: skip


if __name__ == "__main__":
    main()
