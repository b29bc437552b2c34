"""Steady traffic on a running service, what came of it, and the processes that answer it.

One request again and again: it is sampled anew every time, and a random model that writes nothing for some seeds can be
tested too.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
from ray.serve.context import _get_global_client

from serving.client import Client, ServiceError
from serving.deployments import APPLICATION

QUESTION = "Should tea be free?"
OPINIONS = ["Yes, for all.", "No, taxes are high enough.", "Only in schools."]
TIMEOUT_S = 130.0


@dataclass(frozen=True)
class Outcome:
    """What came of one request.

    Attributes:
        begun: seconds of ``time.monotonic()``.
        seconds: until the answer, or until it failed.
        status: HTTP status, or the name of what went wrong with the connection.
        weights: print of the policy that answered; None without an answer.
    """

    begun: float
    seconds: float
    status: int | str
    weights: str | None = None


Ask = Callable[[], tuple[int | str, str | None]]
"""Sends the request; gives status and print of the policy."""


def raw(url: str, **fields: Any) -> Ask:
    """Requests as they are: what fails, fails."""
    http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=None))

    def ask() -> tuple[int | str, str | None]:
        body = {"question": QUESTION, "opinions": OPINIONS, **fields}
        try:
            response = http.post("/v1/consensus", json=body)
        except httpx.TransportError as error:
            return type(error).__name__, None
        good = response.status_code == 200
        return response.status_code, response.json()["versions"]["policy_weights"] if good else None

    return ask


def shipped_client(url: str, **fields: Any) -> Ask:
    """Requests through the project's own client, which tries again."""
    client = Client(url, timeout_s=TIMEOUT_S)

    def ask() -> tuple[int | str, str | None]:
        try:
            return 200, client.consensus(QUESTION, OPINIONS, **fields).versions.policy_weights
        except ServiceError as error:
            return error.status or "no answer", None

    return ask


class Traffic:
    """Requests at a steady rate, for as long as the context lasts.

    Args:
        ask: sends one.
        rate: requests a second that fall due; they are late if all threads wait for answers.
        threads: requests that may be under way at a time.
    """

    def __init__(self, ask: Ask, rate: float, threads: int):
        self.outcomes: list[Outcome] = []
        self._ask, self._rate = ask, rate
        self._numbers, self._stop = itertools.count(), threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(threads)]

    def __enter__(self) -> Traffic:
        self._start = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Send no more; the end of the context waits for what is under way."""
        self._stop.set()

    def __exit__(self, *error: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while True:
            number = next(self._numbers)
            if self._stop.wait(max(0.0, self._start + number / self._rate - time.monotonic())):
                return
            begun = time.monotonic()
            status, weights = self._ask()
            self.outcomes.append(Outcome(begun, time.monotonic() - begun, status, weights))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Requests, how many failed and how, and the latency of those answered (milliseconds)."""
    statuses = Counter(str(outcome.status) for outcome in outcomes)
    failed = len(outcomes) - statuses["200"]
    latency = np.array([outcome.seconds for outcome in outcomes if outcome.status == 200]) * 1000
    quantiles = {f"p{q}_ms": round(float(np.percentile(latency, q))) for q in (50, 99, 100)} if len(latency) else {}
    return {
        "requests": len(outcomes),
        "failed": failed,
        "failed_percent": round(100 * failed / max(1, len(outcomes)), 2),
        "statuses": dict(statuses),
        **quantiles,
    }


def replicas() -> list[tuple[str, int]]:
    """(deployment, pid) of all replicas that run."""
    deployments = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"]
    return [
        (name, replica["pid"])
        for name, deployment in deployments.items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING" and psutil.pid_exists(replica["pid"])
    ]


def proxy_pid() -> int:
    """HAProxy, of a Ray that this process started: what clients are connected to."""
    return max(one.pid for one in psutil.Process().children(recursive=True) if one.name() == "haproxy")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it ended meanwhile
        return []


def memory_mib() -> dict[str, int]:
    """Proportional memory of all replicas with their model processes (shared pages count once), and of the largest."""
    sizes = [psutil.Process(pid).memory_full_info().pss for _, pid in replicas()]
    sizes += [one.memory_full_info().pss for one in model_processes()]
    return {"all": sum(sizes) // 2**20, "largest": max(sizes) // 2**20}


def model_processes() -> list[psutil.Process]:
    """Those of a Ray that this process started; their common parent, the nursery, is no child of Ray's."""
    (raylet,) = (one.pid for one in psutil.Process().children() if one.name() == "raylet")
    mark = f"nursery-{os.getuid()}-{raylet}{os.sep}"
    found = [one for one in psutil.process_iter() if any(mark in word for word in _words(one))]
    return [one for one in found if one.ppid() in {other.pid for other in found}]


def wait_for_replicas(count: int, timeout_s: float = 600.0) -> None:
    """Until that many run.

    Raises:
        TimeoutError
    """
    deadline = time.monotonic() + timeout_s
    while len(replicas()) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(replicas())} of {count} replicas run after {timeout_s:.0f} s")
        time.sleep(0.5)
