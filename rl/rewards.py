"""Calls reward functions by TRL's contract: text in, one number (or None) a completion out; sync and async alike."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from deliberation.types import InputError

RewardFunction = Callable[..., Any]


def name_of(function: RewardFunction) -> str:
    """The metric's name: ``__name__`` (of the wrapped function for a ``functools.partial``), or the class name."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


class _EventLoop:
    """One asyncio loop in a daemon thread, kept for the trainer's life: async scorers may hold loop-bound clients."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="ppo-rewards", daemon=True).start()

    def run(self, awaitables: list) -> list:
        async def together() -> list:
            return await asyncio.gather(*awaitables)

        future: Future = asyncio.run_coroutine_threadsafe(together(), self.loop)
        return future.result()


class RewardFunctions:
    """Several reward functions with weights.

    Args:
        functions: one or more callables ``f(prompts, completions, **columns) -> list[float | None]``; ``async def``,
            partials of one and objects with an async ``__call__`` are awaited together.
        weights: one a function; None: all 1.

    Raises:
        InputError: on something not callable or on a wrong number of weights.
    """

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None):
        self.functions: list[RewardFunction] = [functions] if callable(functions) else list(functions)
        for i, function in enumerate(self.functions):
            if not callable(function):
                raise InputError(f"reward_funcs[{i}]", function, "must be a function of (prompts, completions, ...)")
        if weights is not None and len(weights) != len(self.functions):
            raise InputError("reward_weights", list(weights), f"give {len(self.functions)}, one a reward function")
        if not self.functions:
            raise InputError("reward_funcs", [], "give at least one")
        self.weights = torch.tensor([1.0] * len(self.functions) if weights is None else list(weights))
        self.names = [name_of(f) for f in self.functions]
        self._loop: _EventLoop | None = None

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Tensor:
        """fp32 ``[completions, functions]``, NaN where a function gave None. Errors of a function pass through."""
        outputs = [f(prompts=prompts, completions=completions, **columns) for f in self.functions]
        waiting = [i for i, out in enumerate(outputs) if inspect.isawaitable(out)]
        if waiting:
            self._loop = self._loop or _EventLoop()
            for i, out in zip(waiting, self._loop.run([outputs[i] for i in waiting]), strict=True):
                outputs[i] = out
        checked = [self._checked(i, out, len(completions)) for i, out in enumerate(outputs)]
        return torch.tensor(checked, dtype=torch.float32).T

    def _checked(self, index: int, output: Any, expected: int) -> list[float]:
        field = f"reward function {self.names[index]!r}"
        values = list(output)
        if len(values) != expected:
            raise InputError(field, f"{len(values)} rewards", f"must return {expected}, one a completion")
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(float(value)):
                raise InputError(f"{field}[{row}]", value, "must be finite; return None for 'no reward here'")
        return [math.nan if value is None else float(value) for value in values]

    def combine(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums ``[B]``, and bool ``[B]``: False where every function gave None (the sum is then 0)."""
        return (rewards * self.weights).nansum(dim=1), ~rewards.isnan().all(dim=1)


@dataclass
class Scores:
    """What reward functions said of some completions.

    Attributes:
        rewards: [completions, functions], NaN where a function gave None.
        metrics: name -> numbers they logged.
        extra: column of the completions table -> one value a completion.
    """

    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    extra: dict[str, list] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def log_extra(self, column: str, values: list) -> None:
        self.extra[column] = list(values)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Several batches' scores as one; a metric is the mean over completions, a column nobody gave is None there.

    Raises:
        InputError: field ``log_extra``, on a column of another length than its completions.
    """
    sizes = [len(part.rewards) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        for column, values in part.extra.items():
            if len(values) != size:
                raise InputError(f"log_extra({column!r})", f"{len(values)} values", f"give {size}, one a completion")
    metrics: dict[str, list[float]] = defaultdict(list)
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        known = [
            (fmean(part.metrics[name]), size) for part, size in zip(parts, sizes, strict=True) if name in part.metrics
        ]
        metrics[name] = [sum(mean * size for mean, size in known) / sum(size for _, size in known)]
    extra = {
        column: [
            value for part, size in zip(parts, sizes, strict=True) for value in part.extra.get(column, [None] * size)
        ]
        for column in dict.fromkeys(column for part in parts for column in part.extra)
    }
    return Scores(torch.cat([part.rewards for part in parts]), metrics, extra)


@contextmanager
def background(wanted: bool) -> Iterator[Callable[..., Callable[[], Any]]]:
    """Gives ``start(function, *arguments)``, which returns a function that waits for the result.

    The work is done in one thread beside the caller's, in the order it was started; if not ``wanted``, in the caller's
    own thread, when its result is asked for.
    """
    if not wanted:
        yield functools.partial
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ppo-scores") as thread:
        yield lambda *work: thread.submit(*work).result
