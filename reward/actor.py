"""The preference model behind Ray actors: the same scores, computed while the trainer does something else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from reward.preference import PreferenceModel
from reward.scoring import Scores, score


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
