"""The service with models that take no time, started anew within milliseconds: each line on stdin forks a server.

    python -m benchmarks._rating_server DATABASE_URL PORT

Prints the new server's pid; whoever reads it may kill it. A forked server has read nothing of the database before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import numpy as np
import uvicorn

from serving.api import make_app
from serving.config import ServeConfig
from serving.exchange import Draft, Judgement, Order


class Instant:
    """``Services`` whose statements are numbered, and worth the same to everybody."""

    policies = preference_models = ("default",)

    def judge(self, preference_model: str) -> Judge:
        return Judge()

    def sampler(self, policy: str) -> Sampler:
        return Sampler()

    async def versions(self) -> dict[str, str]:
        return {"preference_model:default": "none", "policy:default": "none"}


class Sampler:
    """Counts."""

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        return [
            Draft(tuple(f"{order.seed} {k}." for k in range(order.count)), (True,) * order.count, order.members, "none")
            for order in orders
        ]


class Judge:
    """Knows nothing."""

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        chances = np.full((len(opinions), len(statements), 7), 1 / 7)
        return Judgement(np.zeros(chances.shape[:2], np.float32), chances @ np.arange(1, 8), chances, "none")


def serve(database: str, port: int) -> None:
    """Serve until killed."""
    app = make_app(Instant(), ServeConfig(database=database, num_candidates=16))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve())


def main() -> None:
    """Fork a server for every line read."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # killed servers are not waited for
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve(sys.argv[1], int(sys.argv[2]))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
