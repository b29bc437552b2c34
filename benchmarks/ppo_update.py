"""What a PPO update costs: ours against TRL 1.12's PPOTrainer, the last one TRL shipped, side by side.

    make bench-anchors                                      # once: TRL 1.12 in a virtual environment of its own
    python -m benchmarks.ppo_update --anchor --json

32 completions of 64 new tokens behind prompts of 200, 4 epochs, 1 mini-batch, fp32, one thread, Llama of 5.8 million
parameters, random weights. *ours*: TRL's settings, with 32 distinct prompts and a separate value model. *recommended*:
8 prompts x 4 completions, a value head on the policy's backbone, bfloat16 where it is faster. Each run is a process of
its own; the sides alternate; CPU seconds an update, medians. ``ratio`` is TRL's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deliberation.types import InputError

ANCHOR_PYTHON = Path(".venv-anchors/bin/python")
"""Made by ``make bench-anchors``."""


def run(module: str, side: str, *words: str) -> dict[str, Any]:
    """The JSON line of ``python -m benchmarks.MODULE --side SIDE WORDS``; side ``trl`` in TRL's virtual environment.

    Raises:
        InputError: field ``anchor``, if TRL's virtual environment is missing.
        RuntimeError: with the process's last words, if it failed.
    """
    if side == "trl" and not ANCHOR_PYTHON.is_file():
        raise InputError("anchor", str(ANCHOR_PYTHON), "is missing; run `make bench-anchors` first")
    python = str(ANCHOR_PYTHON) if side == "trl" else sys.executable
    command = [python, "-m", f"benchmarks.{module}", "--side", side, *words]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]], anchor: float | None) -> dict[str, Any]:
    """Median CPU seconds an update over runs (the median of each), largest peak, runs in bf16, ratio to ``anchor``."""
    seconds = statistics.median(statistics.median(one["cpu_s"]) for one in runs)
    found = {"cpu_s": round(seconds, 3), "peak_gib": max(one["peak_gib"] for one in runs), "runs": len(runs)}
    found["in_bf16"] = sum(one["bf16"] for one in runs)
    return found if anchor is None else {**found, "ratio": round(anchor / seconds, 3)}


def main() -> None:
    """Alternate the sides, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor", action="store_true", help="TRL 1.12 too, and the ratios to it")
    parser.add_argument("--runs", type=int, default=5, help="processes a side")
    parser.add_argument("--updates", type=int, default=2, help="updates a process; the first warms up")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    sides = ["trl"] * args.anchor + ["ours", "recommended"]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _, side in tqdm([(k, side) for k in range(args.runs) for side in sides], desc="processes"):
        found[side].append(run("_ppo_side", side, "--updates", str(args.updates)))
    anchor = summary(found["trl"], None)["cpu_s"] if args.anchor else None
    figures = {side: summary(runs, None if side == "trl" else anchor) for side, runs in found.items()}
    if not args.json:
        for side, one in figures.items():
            print(f"{side}: {one}")
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    print(json.dumps({"sides": figures, "machine": machine, "date": date.today().isoformat(), "seed": 0}))


if __name__ == "__main__":
    main()
