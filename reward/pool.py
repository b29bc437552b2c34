"""The preference model hosted by a pool of Ray actors, behind the interface of ``LocalScorer``.

The actors may run on one machine or on a cluster's nodes; without Ray, ``reward.group_reward.LocalScorer`` scores in
the process itself by the same interface.

Weights: safetensors are memory-mapped, so a node reads the file once, and where no precision is changed (float32 on
disk, on CPU) its actors share the very pages. Other weights are converted by each actor, and each GPU has its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.metrics import Counter, Gauge, Histogram

from deliberation.types import InputError
from reward.actor import RewardActor
from reward.dispatch import ActorLost, Dispatcher, Failure, Group, PoolError
from reward.scoring import Scores

POLL_S = 0.2
"""Pause between two questions to an actor that restarts (Ray itself answers after about two seconds)."""

logger = logging.getLogger(__name__)


class _HostedModel:
    """A named Ray actor with the preference model. Ray restarts its process as often as it ends.

    Ray's own retries of a call are off: they wait for the very actor that died, while another may be idle.
    """

    def __init__(self, name: str, path: str, threads: int, num_cpus: float, num_gpus: float):
        self.name, self.pid = name, 0
        options: dict[str, Any] = {"name": name, "num_cpus": num_cpus, "num_gpus": num_gpus}
        actor = ray.remote(RewardActor).options(**options, max_restarts=-1, max_task_retries=0)
        self._handle: Any = actor.remote(path, threads, "cuda" if num_gpus else "cpu")

    async def score(self, groups: list[Group]) -> list[Scores | InputError | Failure]:
        try:
            return await self._handle.score_batch.remote(groups)
        except RayTaskError:  # the call itself failed; the actor lives
            raise
        except RayError as error:
            self.pid = 0
            lost = isinstance(error, ActorUnavailableError)  # Ray names the socket, and says that it does not know more
            raise ActorLost("its process ended or cannot be reached" if lost else _last_line(error)) from error

    async def ready(self) -> None:
        while True:
            try:
                self.pid = await self._handle.pid.remote()
                return
            except ActorUnavailableError:
                await asyncio.sleep(POLL_S)
            except RayError as error:
                raise ActorLost(_last_line(error)) from error

    def restart(self) -> None:
        self.pid = 0
        ray.kill(self._handle, no_restart=False)

    def end(self) -> None:
        ray.kill(self._handle)


class _RayMetrics:
    """Metrics of one pool at Ray's Prometheus endpoint, each named ``ray_consensus_reward_...``."""

    def __init__(self, pool: str):
        def made(kind: Any, name: str, description: str, **options: Any) -> Any:
            metric = kind(f"consensus_reward_{name}", description, tag_keys=("pool",), **options)
            return metric.set_default_tags({"pool": pool})

        seconds = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
        self._queue = made(Gauge, "queue_length", "Calls that wait for an actor")
        self._batch = made(Histogram, "batch_size", "Calls handed to an actor at once", boundaries=[1, 2, 4, 8, 16, 32])
        self._scores = made(Counter, "scores", "Scores computed (members x statements); rate() gives scores/s")
        self._latency = made(Histogram, "latency_seconds", "From a call's admission to its answer", boundaries=seconds)
        self._lost = made(Counter, "actors_lost", "Times an actor died or was restarted because it hung")

    def queue_length(self, calls: int) -> None:
        self._queue.set(calls)

    def batch(self, calls: int) -> None:
        self._batch.observe(calls)

    def answered(self, scores: int, seconds: float) -> None:
        self._scores.inc(scores)
        self._latency.observe(seconds)

    def actor_lost(self) -> None:
        self._lost.inc()


class RewardPool:
    """Scores through named actors on the Ray cluster this process is connected to; a context manager.

    May be called from any thread and any event loop. Scoring is pure, so a call whose actor dies is repeated on
    another, with the same result. Not for a forked process.

    Args:
        path: a preference model's folder, readable where the actors run.
        actors: how many, >= 1.
        num_cpus, num_gpus: what Ray reserves for each, fractions included; with a GPU the model is put on it.
        threads: torch threads of each actor.
        name: what the actors' names begin with; the rest differs from pool to pool.
        max_batch: calls handed to an actor in one message, >= 1; it computes them one after the other.
        max_outstanding: calls admitted at once, >= 1; further callers wait.
        timeout: seconds a call may take from its admission, restarts of actors included.
        load_timeout: seconds to wait for a place in the cluster and for the model.

    Raises:
        InputError: on a number out of range.
        PoolError: without Ray, or if an actor cannot load the model, and why, or finds no room.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        actors: int = 2,
        num_cpus: float = 1,
        num_gpus: float = 0,
        threads: int = 1,
        name: str = "reward",
        max_batch: int = 8,
        max_outstanding: int = 256,
        timeout: float = 600,
        load_timeout: float = 600,
    ):
        for field, value in (("actors", actors), ("max_batch", max_batch), ("max_outstanding", max_outstanding)):
            if value < 1:
                raise InputError(field, value, "must be 1 or more")
        if not ray.is_initialized():  # Ray would start a cluster of its own, open to whoever reaches this machine
            raise PoolError("this process is not connected to Ray; call ray.init or use reward.actor.local_ray")
        self.name = f"{name}-{secrets.token_hex(4)}"
        self._lock, self._closed, self._answers = threading.Lock(), False, set[Future[Scores]]()
        hosts = range(actors)
        self._actors = [_HostedModel(f"{self.name}-{i}", os.fspath(path), threads, num_cpus, num_gpus) for i in hosts]
        self._dispatcher = Dispatcher(
            self._actors,
            max_batch=max_batch,
            max_outstanding=max_outstanding,
            timeout=timeout,
            metrics=_RayMetrics(self.name),
        )
        # Callers' event loops come and go; the pool's own lives as long as the pool.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._load(load_timeout), self._loop).result()
        except ActorLost as error:
            self.close()
            raise PoolError(f"an actor cannot load the preference model: {error}") from error
        except TimeoutError:
            self.close()
            asked = f"{actors} actors of {num_cpus:g} CPUs and {num_gpus:g} GPUs"
            raise PoolError(f"{asked} found no room, or did not load, within {load_timeout:g} s") from None

    async def score(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        """Scores of every statement for every member.

        Raises:
            InputError: at once, as ``reward.scoring.score`` does.
            PoolError: if no actor can answer; it names the deliberation and what each actor said.
        """
        return await asyncio.wrap_future(self._submit((question, list(opinions), list(statements))))

    def score_sync(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        """The same for callers without an event loop."""
        return self._submit((question, list(opinions), list(statements))).result()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids, each on its own node, of the actors known to be up, by name."""
        return {actor.name: actor.pid for actor in self._actors if actor.pid}

    def close(self) -> None:
        """End the actors; calls not yet answered raise ``PoolError``. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._dispatcher.close(), self._loop).result()
        wait(list(self._answers))
        for actor in self._actors:
            actor.end()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _load(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            await asyncio.gather(*(actor.ready() for actor in self._actors))

    def _submit(self, group: Group) -> Future[Scores]:
        with self._lock:  # a call either comes before `close`, which then answers it, or is refused
            if self._closed:
                raise PoolError("the pool is closed")
            answer = asyncio.run_coroutine_threadsafe(self._dispatcher.score(group), self._loop)
            self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        return answer


def _last_line(error: RayError) -> str:
    """The line of Ray's message that says what happened; a traceback is above it."""
    return str(error).strip().splitlines()[-1].strip()
