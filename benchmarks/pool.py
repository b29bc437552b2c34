"""A pool of two reward actors under load, one SIGKILLed every five seconds or so: no failed call, the same scores.

First the load runs undisturbed, then for ``--seconds`` with the killer at work; every answer of both is compared with
the group's first. Two callers an actor ask for 5 members x 8 candidates of the shipped preference model at a time,
saved in float32, so that its weights are shared: ``weights_rss_mib`` is what the actors map of the file, all together,
``weights_pss_mib`` what that costs the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from deliberation.citizens import draw_group
from deliberation.questions import load_questions
from deliberation.writer import write_statement
from embedded import resolve
from reward.actor import local_ray
from reward.dispatch import Group
from reward.pool import RewardPool
from reward.preference import PreferenceModel
from reward.scoring import Scores

ACTORS, CALLERS, MEMBERS, CANDIDATES, GROUPS, SEED = 2, 4, 5, 8, 12, 0
KILL_EVERY_S = 5.0
UNDISTURBED_S = 15.0


@dataclass
class Load:
    """What came of some seconds of load."""

    calls: int
    failed: int
    seconds: float
    longest_call_s: float
    answers: list[tuple[int, Scores]]
    """(group, its scores), in no order."""

    @property
    def calls_per_s(self) -> float:
        return round(self.calls / self.seconds, 2)


def draw_groups() -> list[Group]:
    """Simulated deliberations with candidates."""
    rng = random.Random(SEED)
    groups = [draw_group(q, rng, held_out=True, size=MEMBERS) for q in rng.choices(load_questions("test"), k=GROUPS)]
    return [
        (g.question.text, [c.opinion for c in g.citizens], [write_statement(g, rng, "list") for _ in range(CANDIDATES)])
        for g in groups
    ]


def run_load(pool: RewardPool, groups: Sequence[Group], seconds: float) -> Load:
    """Every caller asks for the groups in turn until the time is over; a call that raises counts as failed."""
    start = time.monotonic()

    def caller(number: int) -> Load:
        load, index = Load(0, 0, 0.0, 0.0, []), number
        while (begin := time.monotonic()) < start + seconds:
            index = (index + 1) % len(groups)
            try:
                load.answers.append((index, pool.score_sync(*groups[index])))
            except Exception as error:
                load.failed += 1
                print(f"failed: {error}", flush=True)
            load.calls += 1
            load.longest_call_s = max(load.longest_call_s, time.monotonic() - begin)
        return load

    with ThreadPoolExecutor(CALLERS) as threads:
        loads = list(threads.map(caller, range(CALLERS)))
    return Load(
        calls=sum(load.calls for load in loads),
        failed=sum(load.failed for load in loads),
        seconds=time.monotonic() - start,
        longest_call_s=round(max(load.longest_call_s for load in loads), 2),
        answers=[answer for load in loads for answer in load.answers],
    )


def kill(pool: RewardPool, every: float, stop: threading.Event, killed: list[int]) -> None:
    """SIGKILL a random actor that is up, every ``every`` seconds on average (none where all are still restarting).

    Not to the second: Ray tells of a death once a second, and a killer in step with it would hit each restarted actor
    within the first call it computes, the same call every time.
    """
    rng = random.Random(SEED)
    while not stop.wait(every * rng.uniform(0.5, 1.5)):
        if pids := [pid for pid in pool.pids.values() if pid not in killed]:  # the pool may not know of a death yet
            killed.append(rng.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)


def weights_mib(pids: Sequence[int], kind: str) -> float:
    """MiB of ``model.safetensors`` mapped by the processes, as ``Rss`` or as ``Pss`` (a shared page counts once)."""
    total = 0
    for pid in pids:
        areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)
        for area in areas:
            if "model.safetensors" in area:
                total += int(re.search(rf"^{kind}: +(\d+) kB", area, flags=re.MULTILINE)[1])  # type: ignore[index]
    return round(total / 1024, 2)


def measure(path: str, seconds: float, undisturbed_s: float, kill_every: float = KILL_EVERY_S) -> dict[str, Any]:
    """Both loads on a pool of the connected Ray; how the second differs from the first."""
    groups, stop, killed = draw_groups(), threading.Event(), list[int]()
    with RewardPool(path, actors=ACTORS, num_cpus=0.5) as pool:
        reference = [pool.score_sync(*group) for group in groups]
        calm = run_load(pool, groups, undisturbed_s)
        memory = {f"weights_{kind.lower()}_mib": weights_mib(list(pool.pids.values()), kind) for kind in ("Rss", "Pss")}
        killer = threading.Thread(target=kill, args=(pool, kill_every, stop, killed))
        killer.start()
        try:
            disturbed = run_load(pool, groups, seconds)
        finally:
            stop.set()
            killer.join()
    answers = calm.answers + disturbed.answers
    differences = [float(np.abs(scores.raw - reference[i].raw).max()) for i, scores in answers]
    return {
        "calls": disturbed.calls,
        "failed": calm.failed + disturbed.failed,
        "kills": len(killed),
        "max_difference": max(differences),
        "calls_per_s_undisturbed": calm.calls_per_s,
        "calls_per_s_under_kills": disturbed.calls_per_s,
        "longest_call_s": disturbed.longest_call_s,
        **memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load under kills")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, local_ray():
        PreferenceModel.load(resolve("embedded/judge")).save(Path(folder) / "judge")
        figures = measure(str(Path(folder) / "judge"), args.seconds, UNDISTURBED_S)
    if not args.json:
        print(f"{figures['kills']} kills, {figures['failed']} of {figures['calls']} calls failed")
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} core(s), torch {torch.__version__}, ray {ray.__version__}"
    print(json.dumps({"figures": figures, "machine": machine, "seed": SEED}))


if __name__ == "__main__":
    main()
