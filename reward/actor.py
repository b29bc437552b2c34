"""The preference model behind Ray actors: the same scores, computed while the trainer does something else."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without types

from reward.preference import PreferenceModel
from reward.scoring import Scores, score

OBJECT_STORE_BYTES = 200_000_000


class RewardActor:
    """Hosts one preference model; ``start_actor`` makes it a Ray actor."""

    def __init__(self, path: str, threads: int = 1, device: str = "cpu", batch_tokens: int | None = None):
        torch.set_num_threads(threads)  # OpenMP threads that share cores with the trainer's spin and slow both down
        self._preference_model = PreferenceModel.load(path, device)
        self._batch_tokens = batch_tokens

    def score(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        return score(self._preference_model, question, opinions, statements, batch_tokens=self._batch_tokens)

    def threads(self) -> int:
        """Torch threads this actor computes with; also tells that the model is loaded."""
        return torch.get_num_threads()


class RemoteScorer:
    """The ``score`` protocol over one or more reward actors, asked in turn."""

    def __init__(self, *handles: Any):
        if not handles:
            raise ValueError("RemoteScorer needs at least one actor handle")
        self._handles = itertools.cycle(handles)

    async def score(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        return await next(self._handles).score.remote(question, list(opinions), list(statements))

    def score_sync(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        """The same for callers without an event loop."""
        return ray.get(next(self._handles).score.remote(question, list(opinions), list(statements)))


def start_actor(
    path: str | os.PathLike[str],
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    name: str | None = None,
    threads: int = 1,
    timeout: float = 300,
) -> Any:
    """Start a reward actor on the running Ray cluster and wait until its model is loaded.

    Args:
        path: a preference model's folder, readable where the actor runs.
        num_cpus, num_gpus: what Ray reserves; with a GPU the model is put on it.
        name: a name other processes find it by (``ray.get_actor``).
        threads: torch threads of the actor.
        timeout: seconds to wait for a place and for the model.

    Raises:
        ray.exceptions.ActorDiedError: if the model does not load; its message carries the cause.
        ray.exceptions.GetTimeoutError: if the cluster has no room for it.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "name": name}
    device = "cuda" if num_gpus else "cpu"
    actor = ray.remote(RewardActor).options(**options).remote(os.fspath(path), threads, device)
    ray.get(actor.threads.remote(), timeout=timeout)
    return actor


@contextmanager
def local_ray() -> Iterator[None]:
    """The Ray this process is connected to, or a local one with its own temporary folder for the time being."""
    if ray.is_initialized():
        yield
        return
    # Even a local Ray listens on every interface, and whoever reaches it runs code: ask for a token, one that lives
    # in this process's environment alone. Left to itself Ray 2.60 would write one to the home folder. It stays set
    # for the life of the process, since Ray reads it once. A mode the user has set is respected.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        Config.initialize("")  # this process read its settings when ray was imported; Ray refreshes them so too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = tempfile.mkdtemp(prefix="consensus-")  # short: Ray's socket names below it may have 107 characters
    try:
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)  # Ray's log writers may still be closing their files
