"""An experiment in the running service, simulated citizens as raters: does its verdict agree with their true minds?

    python -m benchmarks.experiment --json

Two arms, paired and blind: one sample of the PPO policy against the best of 16 of the policy before PPO. Citizens of
held-out topics give noisy ratings; the confidence sequence decides. Beside it the gold win rate, as ``consensus
compare`` defines it (noise-free mean agreement, ties 1/2), on the same deliberations.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._local_service import running
from deliberation.citizens import Group
from deliberation.questions import load_questions
from evaluation import measures
from evaluation.gold import held_out_groups
from serving.citizen_members import deliberate, gold_mean
from serving.client import Client
from serving.experiment_report import ExperimentReport
from serving.experiment_routes import PATH
from serving.session_client import Organiser

ARMS = ({"name": "PPO, one sample", "policy": "ppo", "n": 1}, {"name": "SFT, best of 16", "policy": "default", "n": 16})


def until_decided(client: Client, url: str, name: str, groups: list[Group], seed: int) -> Iterator[str]:
    """Deliberations' ids, one after the other, until the experiment's stop rule is met or groups run out."""
    for k, report in enumerate(deliberate(url, groups, seed=seed, experiment=name), 1):
        yield report.deliberation.id
        found = report_of(client, name)
        contrast = found.contrasts[0] if found.contrasts else None
        if k % 10 == 0 or (contrast and contrast.finished):
            print(f"{k}: {contrast and contrast.primary}", flush=True)
        if contrast is not None and contrast.finished:
            return


def report_of(client: Client, name: str) -> ExperimentReport:
    """How the experiment stands."""
    return ExperimentReport.from_json(client.send("GET", f"{PATH}/{name}/report").content)


def gold_outcomes(organiser: Organiser, names: list[str], groups: list[Group]) -> np.ndarray:
    """Gold mean agreement, 1 to 7, with each arm's statement [deliberations, arms]; arms are told once it has ended."""
    rows = []
    for name, group in zip(names, groups):
        by_arm = {arm: c.statement for c in organiser.report(name).candidates for arm in c.arms}
        rows.append([gold_mean(group, by_arm[str(arm["name"])]) for arm in ARMS])
    return np.array(rows)


def gold_figures(gold: np.ndarray) -> dict[str, Any]:
    """Win rate of the first arm and mean difference, with 95 % intervals over deliberations."""
    counts = measures.bootstrap_counts(len(gold))
    (win,) = measures.win_rates(measures.wins(gold[:, 0], gold[:, 1])[:, None], counts)
    (difference,) = measures.mean_estimates((gold[:, 0] - gold[:, 1])[:, None], counts)
    found = {"win_rate": win, "mean_difference": difference}
    return {name: {k: round(float(getattr(e, k)), 3) for k in ("value", "low", "high")} for name, e in found.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The experiment from its creation to its verdict."""
    groups = held_out_groups(load_questions("test"), args.maximum, args.seed)
    body = {"name": "benchmark", "arms": list(ARMS), "maximum": args.maximum}
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            "database": f"sqlite:///{folder}/service.db", "model_name_or_path": args.run / "sft",
            "policies": [f"ppo={args.run / 'ppo'}"], "preference_model": args.run / "preference",
        }  # fmt: skip
        with running(Path(folder) / "log", **keys) as url, Client(url) as client:
            name = client.send("POST", PATH, json=body).json()["id"]
            begun = time.monotonic()
            names = list(until_decided(client, url, name, groups, args.seed))
            seconds = time.monotonic() - begun
            client.send("POST", f"{PATH}/{name}/stop")
            found = report_of(client, name)
            gold = gold_outcomes(Organiser(client), names, groups)
            args.plot.write_bytes(client.send("GET", f"{PATH}/{name}/plot.png").content)
    contrast = found.contrasts[0]
    measured = {m.name: m for m in (contrast.primary, *contrast.secondary)}
    return {
        "arms": [arm.name for arm in found.arms],
        "decision": contrast.decision,
        "decided_after": contrast.decided_after,
        "deliberations": len(names),
        "measures": {name: [_short(x) for x in (m.mean, m.low, m.high)] for name, m in measured.items()},
        "same_text": contrast.same_text,
        "gold": gold_figures(gold),
        "seconds": round(seconds, 1),
        "seconds_p50": {arm.name: _short(arm.seconds_p50) for arm in found.arms},
        "agree": agrees(contrast.decision, gold),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def agrees(decision: str, gold: np.ndarray) -> bool | None:
    """Whether the arm declared better has the higher gold mean; None if none was declared."""
    better = {f"{arm['name']} better": k for k, arm in enumerate(ARMS)}
    return None if decision not in better else bool(gold.mean(axis=0).argmax() == better[decision])


def compared(run_folder: Path) -> dict[str, Any] | None:
    """The same pair in the run's ``comparison.json``: other groups of the same kind."""
    path = run_folder / "comparison.json"
    rows = json.loads(path.read_text())["win_rate_best_of"] if path.is_file() else []
    return next((row for row in rows if (row["n_a"], row["n_b"]) == (1, 16)), None)


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder with sft, ppo and preference")
    parser.add_argument("--maximum", type=int, default=200, help="deliberations after which it ends")
    parser.add_argument("--seed", type=int, default=1, help="of groups, samples and ratings; `compare` has 0")
    parser.add_argument("--plot", type=Path, default=Path("docs/experiment.png"), help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print the JSON line last")
    args = parser.parse_args()
    args.run = args.run.resolve()
    found = run(args) | {"compare": compared(args.run), "seed": args.seed}
    found |= {"date": date.today().isoformat(), "machine": f"{platform.machine()}, shared", "simulated": True}
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
