"""What the service costs without its models, and what it does with them, beside a plain FastAPI + transformers script.

    python -m benchmarks.service --json

*Overhead*: the whole way (proxy, checks, two calls of deployments, the answer) with models that take no time, at 10
requests a second. *Work*: the shipped models, 16 candidates for 5 members, at 1, 4 and 16 clients; ours and the plain
script (``_service_plain``) in turn, medians of the runs. Bounded in count and time; loopback only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from benchmarks._ports import held_port
from reward.actor import local_ray
from serving.config import ServeConfig
from serving.deployments import running_service
from serving.exchange import Draft, Judgement
from serving.ingress import Api
from serving.own_ray import serving_settings
from serving.replicas import OPTIONS

QUESTION = "Should school meals be free for all children?"
OPINIONS = [
    "Yes. No child learns well on an empty stomach, and a shared meal leaves nobody out.",
    "I would rather spend the money on the children who really need it.",
    "Free meals are fine if the food is healthy and the costs are made public.",
    "No. Parents should feed their children themselves, and the state should help those who cannot.",
    "I want small schools to get the same kitchens as large ones before anything else.",
]
CANDIDATES, NEW_TOKENS, TEMPERATURE = 16, 80, 0.7
CLIENTS = (1, 4, 16)


@serve.deployment(name="Policy-default", max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1}, **OPTIONS)
class NoPolicy:
    """A policy that has its statements ready."""

    async def sample(self, question: str, opinions: list[str], orders: list[Any]) -> list[Draft]:
        return [
            Draft(tuple(f"Statement {k}." for k in range(o.count)), (True,) * o.count, o.members, "none")
            for o in orders
        ]

    async def version(self) -> str:
        return "none"


@serve.deployment(name="Reward-default", max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1}, **OPTIONS)
class NoReward:
    """A preference model to whom every statement is the same."""

    async def judge(self, question: str, opinions: list[str], statements: list[str]) -> Judgement:
        shape = (len(opinions), len(statements))
        return Judgement(np.zeros(shape, np.float32), np.full(shape, 4.0), np.full((*shape, 7), 1 / 7), "none")

    async def version(self) -> str:
        return "none"


def body(number: int) -> dict[str, Any]:
    """Request ``number``; every one has a seed of its own, so that nothing is answered from memory."""
    return {"question": QUESTION, "opinions": OPINIONS, "n": CANDIDATES, "seed": number}


def overhead(database: str, requests: int, rate: float) -> dict[str, Any]:
    """Latency at a steady rate, models that take no time, milliseconds."""
    with held_port() as port, serving_settings(port), local_ray():  # as running_service starts it
        config = ServeConfig(database=database, port=port)
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
        application = Api.bind({"default": NoPolicy.bind()}, {"default": NoReward.bind()}, config)  # type: ignore[attr-defined]
        serve.run(application, name="overhead", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{config.port}", trust_env=False, timeout=60) as http:
            for k in range(20):
                http.post("/v1/consensus", json=body(k)).raise_for_status()
            found, begin = [], time.perf_counter()
            for k in range(requests):
                time.sleep(max(0.0, begin + k / rate - time.perf_counter()))
                started = time.perf_counter()
                http.post("/v1/consensus", json=body(k)).raise_for_status()
                found.append(1000 * (time.perf_counter() - started))
        serve.shutdown()
    return {
        "requests": requests,
        "rate": rate,
        **{f"p{p}_ms": round(float(np.percentile(found, p)), 1) for p in (50, 95, 99)},
        "load_average": round(os.getloadavg()[0], 1),
    }


def work(url: str, clients: int, requests: int) -> dict[str, float]:
    """Requests a second and median latency (s) of ``clients`` that each wait for an answer before they ask again."""
    numbers, found, lock = iter(range(requests)), [], threading.Lock()

    def ask() -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=600) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                started = time.perf_counter()
                while (response := http.post("/v1/consensus", json=body(number))).status_code == 429:
                    time.sleep(0.2)  # refused for want of room: the wait counts
                response.raise_for_status()
                found.append(time.perf_counter() - started)

    started = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != requests:
        raise RuntimeError(f"{requests - len(found)} of {requests} requests failed")
    return {"requests_per_s": requests / (time.perf_counter() - started), "latency_s": statistics.median(found)}


@contextmanager
def plain_server() -> Iterator[str]:
    """The plain script, in a process of its own."""
    with held_port() as port:
        settings = ["--port", str(port), "--new_tokens", str(NEW_TOKENS), "--temperature", str(TEMPERATURE)]
        words = [sys.executable, "-m", "benchmarks._service_plain", *settings]
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    httpx.get(f"{url}/openapi.json", trust_env=False)
                    break
                except httpx.TransportError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def side_by_side(config: ServeConfig, runs: int, requests: int) -> list[dict[str, Any]]:
    """Both servers up, one asked after the other; a row for each number of clients."""
    rows = []
    with running_service(config) as ours, plain_server() as plain:
        for url in (ours, plain):
            work(url, 1, 2)  # warm
        for clients in CLIENTS:
            found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
            for _ in range(runs):
                for name, url in (("ours", ours), ("plain", plain)):
                    found[name].append(work(url, clients, max(requests, clients)))
            medians = {
                name: {key: round(statistics.median(one[key] for one in many), 3) for key in many[0]}
                for name, many in found.items()
            }
            ratio = medians["ours"]["requests_per_s"] / medians["plain"]["requests_per_s"]
            rows.append({"clients": clients, **medians, "ratio": round(ratio, 2)})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="alternated runs of each side")
    parser.add_argument("--requests", type=int, default=8, help="of each run; at least one a client")
    parser.add_argument("--overhead_requests", type=int, default=300)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--only", choices=("overhead", "work"))
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "service", "date": date.today().isoformat()}
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        database = f"sqlite:///{Path(folder)}/service.db"
        if args.only != "work":
            result["overhead"] = overhead(database, args.overhead_requests, args.rate)
        if args.only != "overhead":
            shuffled = ServeConfig(
                database=database, port=0, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, top_p=1.0
            )
            result["work"] = side_by_side(shuffled, args.runs, args.requests)
            result["work_one_order"] = side_by_side(replace(shuffled, reshuffle=False), args.runs, args.requests)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, ray {ray.__version__}"
    if not args.json:
        print(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
