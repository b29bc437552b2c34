"""The service under fire: replicas SIGKILLed, models swapped, the proxy lost, ten times the load it can bear.

Three replicas of everything, the shipped models (the other policy of the swap is the shipped one with one weight
changed), 8 tokens and, but for the overload, ``n`` = 1, so that a request is short. Side by side and under the same
kills: requests sent ``raw``, where everything but a 200 counts as failed, and through the shipped ``client``, which
tries again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from benchmarks._service_load import (
    Outcome,
    Traffic,
    memory_mib,
    proxy_pid,
    raw,
    replicas,
    shipped_client,
    summary,
    wait_for_replicas,
)
from rl.policy import load_policy
from serving.config import ServeConfig
from serving.deployments import APPLICATION, build, running_service

SEED = 0
REPLICAS = 3
KILL_EVERY_S = 3.0
RATE, THREADS = 2.0, 8
"""Requests a second, and how many may be under way, of each kind of traffic."""
CALM_S, OVERLOAD_S, OVERLOAD_THREADS = 10.0, 15.0, 96
OVERLOAD_N = 16
"""Candidates of a request of the overload: one machine could not send ten times the smaller ones it answers."""
NORMAL = 2.0
"""Latency is back to normal below this many times the calm 99 % quantile."""


def settings(folder: Path, **change: Any) -> ServeConfig:
    """``REPLICAS`` of everything, short requests, and a database of its own."""
    keys = dict(max_new_tokens=8, reshuffle=False, port=0, database=f"sqlite:///{folder}/service.db")
    replicas = dict(api_replicas=REPLICAS, min_replicas=REPLICAS, max_replicas=REPLICAS)
    return ServeConfig(**{**replicas, **keys, **change})


def other_policy(folder: Path) -> str:
    """The shipped writer with one weight changed: it writes the same and has another print."""
    model, tokenizer = load_policy("embedded/writer", device="cpu")
    model.get_output_embeddings().weight.data[0, 0] += 1e-4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def kills(
    url: str, seconds: float, every_s: float = KILL_EVERY_S, kinds: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """A random replica (of the deployments ``kinds``; None: of all) is SIGKILLed every ``every_s`` seconds."""
    rng, killed = random.Random(SEED), Counter[str]()
    count = len(replicas())
    with Traffic(raw(url, n=1), RATE, THREADS) as bare, Traffic(shipped_client(url, n=1), RATE, THREADS) as client:
        end = time.monotonic() + seconds
        while time.monotonic() + every_s < end:
            time.sleep(every_s)
            if running := [one for one in replicas() if kinds is None or one[0] in kinds]:
                name, pid = rng.choice(running)
                os.kill(pid, signal.SIGKILL)
                killed[name] += 1
        time.sleep(every_s)
    wait_for_replicas(count)
    return {"killed": dict(killed), "raw": summary(bare.outcomes), "client": summary(client.outcomes)}


def swaps(url: str, config: ServeConfig, other: str, requests: int) -> dict[str, Any]:
    """The service is deployed again and again, with one policy and the other in turn, until enough were asked."""
    policies, done = [config.model_name_or_path, other], 0
    with Traffic(raw(url, n=1), 2 * RATE, THREADS) as traffic:
        while done < 2 or len(traffic.outcomes) < requests:
            done += 1
            keys = {**vars(config), "model_name_or_path": policies[done % 2]}
            serve.run(build(ServeConfig(**keys)), name=APPLICATION, route_prefix="/")
        time.sleep(1.0)
        swapped = time.monotonic()
        time.sleep(2.0)
    prints = {outcome.weights for outcome in traffic.outcomes if outcome.weights}
    after = {outcome.weights for outcome in traffic.outcomes if outcome.begun > swapped}
    return {"swaps": done, "policies": len(prints), "policies_after": len(after), **summary(traffic.outcomes)}


def proxy_kill(url: str) -> dict[str, Any]:
    """The HTTP proxy is SIGKILLed; ``back_s`` is when the first request was answered that no failure follows."""
    ask, outcomes = raw(url, n=1), list[Outcome]()
    pid, killed = proxy_pid(), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    calm_since = None
    while calm_since is None or time.monotonic() < calm_since + 5.0:
        begun = time.monotonic()
        status, _ = ask()
        outcomes.append(Outcome(begun, time.monotonic() - begun, status))
        calm_since = (calm_since or time.monotonic()) if status == 200 else None
        if calm_since is None and begun > killed + 120:
            raise TimeoutError("the proxy did not come back")
        time.sleep(0.1)
    return {"back_s": round(calm_since - killed, 1), "statuses": summary(outcomes)["statuses"]}


def overload(url: str) -> dict[str, Any]:
    """Ten times the requests it can answer, between two calm times at a third of what it can."""
    ask = raw(url, n=OVERLOAD_N)
    with Traffic(ask, 1e6, THREADS) as full:
        time.sleep(CALM_S)
    capacity = sum(outcome.status == 200 for outcome in full.outcomes) / CALM_S
    with Traffic(ask, capacity / 3, THREADS) as calm:
        time.sleep(CALM_S)
    before = memory_mib()
    with Traffic(ask, 10 * capacity, OVERLOAD_THREADS) as storm:
        time.sleep(OVERLOAD_S)
        during, storm_end = memory_mib(), time.monotonic()
        storm.stop()
        with Traffic(ask, capacity / 3, THREADS) as after:  # what the storm left behind is still in the queues
            time.sleep(CALM_S)
    limit_s = NORMAL * summary(calm.outcomes)["p99_ms"] / 1000
    slow = [o.begun - storm_end for o in after.outcomes if o.status != 200 or o.seconds > limit_s]
    sent = [o for o in storm.outcomes if o.begun < storm_end]
    return {
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(len(sent) / OVERLOAD_S, 1),
        "storm": summary(storm.outcomes),
        "calm": summary(calm.outcomes),
        "after": summary(after.outcomes),
        "normal_ms": round(1000 * limit_s),
        "normal_after_s": round(max(slow, default=0.0), 1),
        "memory_mib": {"before": before, "during": during, "after": memory_mib()},
    }


def measure(seconds: float, requests: int, folder: Path) -> dict[str, Any]:
    """All four, on one service."""
    config = settings(folder)
    with running_service(config) as url:
        httpx.Client(trust_env=False).get(f"{url}/healthz").raise_for_status()
        figures = {"kills": kills(url, seconds), "swaps": swaps(url, config, other_policy(folder / "other"), requests)}
        return {**figures, "proxy": proxy_kill(url), "overload": overload(url)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the kill loop")
    parser.add_argument("--requests", type=int, default=1000, help="during the swaps, at least")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.seconds, args.requests, Path(folder))
    if not args.json:
        for name, values in figures.items():
            print(name, json.dumps(values, indent=2))
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s), ray {ray.__version__}"
    print(json.dumps({"figures": figures, "machine": machine, "load_average": os.getloadavg(), "seed": SEED}))


if __name__ == "__main__":
    main()
