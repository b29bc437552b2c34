"""One thread that runs a model's blocking calls, so that a replica's event loop stays free. No Ray in it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from deliberation.types import InputError

PROBE_EVERY_S = 5.0
"""A model that has done nothing for so long is asked to show that it works."""

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """An ``InputError`` on its way between deployments, as a value: exceptions lose their fields when pickled."""

    field: str
    value: object
    mend: str


@dataclass(frozen=True)
class Busy:
    """``Overloaded`` on its way between deployments, as a value too."""

    retry_after_s: int


class Worker:
    """Runs work in one thread, in the order it came in; what nobody waits for any more is dropped unstarted.

    One thread: torch modules are not made for two callers at once, and a second would only share the core.

    Args:
        limit_s: seconds without progress, while there is work, after which the worker counts as stuck.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._came: dict[Future, float] = {}  # work that waits or runs -> when it came in, seconds of monotonic()
        self._waits: dict[Future, asyncio.Timeout] = {}  # work that somebody waits for -> what ends the wait
        self._progress = self._good = -math.inf  # when work ended, and when it ended well

    async def run(self, work: Callable[..., T], *args: Any) -> T | Refusal:
        """``work(*args)``; an ``InputError`` is returned as a ``Refusal``.

        A caller that is cancelled takes its work with it, unless it runs already.

        Raises:
            TimeoutError: if the work is found stuck by ``check``.
            Exception: what else the work raises.
        """
        future = self._pool.submit(work, *args)
        self._came[future] = time.monotonic()
        future.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(None) as self._waits[future]:
                return await asyncio.wrap_future(future)
        except InputError as error:
            return Refusal(error.field, error.value, error.mend)
        finally:
            self._waits.pop(future, None)

    def waiting(self) -> int:
        """Pieces of work that wait or run."""
        return len(self._came)

    async def check(self, probe: Callable[[], object]) -> None:
        """Show that the model works: by the work it has or had lately, or else with ``probe``.

        Stuck work ends for its caller with a ``TimeoutError``. Lost with the replica it would be tried on others, which
        it would block as long, one after the other.

        Raises:
            RuntimeError: if there is work and none ended for ``limit_s``, or if the model refuses the probe.
            Exception: what the probe raises.
        """
        now, came = time.monotonic(), dict(self._came)
        if came:
            stuck_s = now - max(self._progress, min(came.values()))
            if stuck_s > self._limit_s:
                wait = self._waits.pop(next(iter(came)), None)  # of the work that runs: the first that came in
                if wait is not None:
                    wait.reschedule(0.0)
                raise RuntimeError(f"{len(came)} requests wait and none was answered for {stuck_s:.0f} s")
        elif now - self._good > PROBE_EVERY_S:
            result = await self.run(probe)
            if isinstance(result, Refusal):
                raise RuntimeError(f"the model refuses the simplest request: {result.field} {result.mend}")

    def _ended(self, future: Future) -> None:
        del self._came[future]
        if not future.cancelled():
            self._progress = time.monotonic()
            self._good = self._good if future.exception() else self._progress
