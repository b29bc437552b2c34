"""The whole circle over seeds: simulated members rate, the next policy learns, and is it better than the one before?

    python -m benchmarks.cycle --seeds 0 1 2 --json

Each seed: a service of its own with the policy before and the shipped judge; citizens of training topics as members;
``consensus cycle`` (preference fit, PPO); then one sample of the new policy against one of the policy before on
held-out topics, by the citizens' noise-free mean agreement. Seeds that are finished in ``--output`` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks._local_service import EMBEDDED, ROOT, running
from benchmarks.ppo_learning import interval
from benchmarks.ppo_pools import Pool, draw_pool, wins
from deliberation.citizens import Group
from deliberation.questions import load_questions
from demo import draw_groups, stage_config
from embedded import resolve
from evaluation.gold import held_out_groups
from reward.preference import PreferenceModel
from serving.citizen_members import deliberate, gold_mean

SAMPLES = 4
"""Statements a group and policy; one is compared with one, all pairs count."""


def timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; its wall time goes into ``seconds``."""
    begun = time.monotonic()
    found = work()
    seconds[name] = round(time.monotonic() - begun, 1)
    print(f"  {name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    return found


def configs(folder: Path, updates: int, seed: int) -> dict[str, Path]:
    """The embedded configs with the seed, PPO in one process and for ``updates``."""
    changes = {"preference": {"seed": seed}, "ppo": {"seed": seed, "max_steps": updates, "reward_actors": 0}}
    for stage, keys in changes.items():
        whole = yaml.safe_load((EMBEDDED.parent / f"{stage}.yaml").read_text()) | keys
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(whole))
    return {f"{stage}_config": folder / f"{stage}.yaml" for stage in changes}


def rate(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Members of ``args.deliberations`` groups rate ``args.shown`` statements each, in a service of their own."""
    groups = draw_groups("train", args.deliberations, f"circle {seed}")
    keys = {"database": f"sqlite:///{folder}/service.db", "model_name_or_path": args.policy,
            "num_candidates": args.candidates}  # fmt: skip
    ratings, gold = 0, []
    with running(folder / "service.log", **keys) as url:
        for group, report in zip(groups, deliberate(url, groups, seed=seed, shown=args.shown)):
            ratings += sum(candidate.ratings for candidate in report.candidates)
            gold += [gold_mean(group, candidate.statement) for candidate in report.candidates]
    return {"ratings": ratings, "gold_mean_of_shown": round(float(np.mean(gold)), 3)}


def go_round(args: argparse.Namespace, folder: Path, seed: int) -> None:
    """``consensus cycle``."""
    keys = {"database": f"sqlite:///{folder}/service.db", "output_dir": folder / "cycle", "policy": args.policy}
    keys |= configs(folder, args.updates, seed)
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    with (folder / "cycle.log").open("a") as log:
        command = [sys.executable, "-m", "cli", "cycle", *words]
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)


def pool_of(args: argparse.Namespace, policy: str, groups: list[Group]) -> Pool:
    """Statements of a policy on the held-out groups."""
    config = stage_config("compare", num_candidates=SAMPLES)
    judge = PreferenceModel.load(resolve("embedded/judge"), device="cpu")
    return draw_pool(policy, args.policy, judge, groups, config, 0 if policy == args.policy else 1)


def one_seed(args: argparse.Namespace, seed: int, before: Pool, groups: list[Group]) -> dict[str, Any]:
    """The circle of one seed: its figures, and its outcome on each held-out group."""
    folder = args.output / str(seed)
    path = folder / "figures.json"
    if path.is_file():
        return json.loads(path.read_text())
    folder.mkdir(parents=True)  # a database with ratings of a run that broke off would mix two runs
    seconds: dict[str, float] = {}
    print(f"seed {seed}", file=sys.stderr, flush=True)
    found = timed(seconds, "members", lambda: rate(args, folder, seed))
    timed(seconds, "cycle", lambda: go_round(args, folder, seed))
    after = timed(seconds, "measure", lambda: pool_of(args, str(folder / "cycle" / "ppo"), groups))
    calibration = json.loads((folder / "cycle" / "preference" / "calibration.json").read_text())
    found |= {
        "win_rate": round(float(wins(after, 1, before, 1).mean()), 3),
        "gold_mean": [round(float(pool.gold.mean()), 3) for pool in (before, after)],
        "kl": round(float(after.log_ratios.mean()), 2),
        "accuracy": round(calibration["metadata"]["measures"]["accuracy"], 3),
        "seconds": seconds,
        "outcomes": [round(float(x), 4) for x in wins(after, 1, before, 1)],
    }
    path.write_text(json.dumps(found))
    return found


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/demo/sft", help="folder of the policy before")
    parser.add_argument("--output", type=Path, default=Path("runs/circle"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--deliberations", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8, help="samples a deliberation, of which the best are shown")
    parser.add_argument("--shown", type=int, default=6)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--groups", type=int, default=100, help="held-out groups of the measurement")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.policy, args.output = str(Path(args.policy).resolve()), args.output.resolve()
    groups = held_out_groups(load_questions("test"), args.groups, 0)
    before = pool_of(args, args.policy, groups)
    seeds = [one_seed(args, seed, before, groups) for seed in args.seeds]
    win_rate = interval(np.array([found["outcomes"] for found in seeds]))
    settings = {name: getattr(args, name) for name in ("deliberations", "candidates", "shown", "updates", "groups")}
    each = [{name: value for name, value in found.items() if name != "outcomes"} for found in seeds]
    result = {"win_rate": win_rate, "each": dict(zip(args.seeds, each)), "settings": settings}
    result |= {"date": date.today().isoformat(), "machine": f"{platform.machine()}, shared", "simulated": True}
    print(json.dumps(result, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
