"""Shares scoring calls out among actors: least outstanding work first, waiting calls in batches, lost ones again.

No Ray in it: an actor here is whatever has a name and three methods. A ``Dispatcher`` lives in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import textwrap
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deliberation.types import InputError
from reward.scoring import Scores

ATTEMPTS = 12
"""Times a call may fail, on different actors where there are any, before it is given up. More than an innocent call
meets where an actor dies every few seconds, few enough for a call that ends its actors."""

HANGS_AFTER = 1 / 6
"""Share of a call's time limit that an actor may compute one call before it is taken to hang. It has so much for each
call of its first batch, but leaves so much of the limit for another actor to answer in."""

IN_FLIGHT = 2
"""Batches an actor holds at once: it computes one while the next is already there."""

logger = logging.getLogger(__name__)

Group = tuple[str, list[str], list[str]]
"""Question, opinions, statements."""


@dataclass(frozen=True)
class Failure:
    """Why an actor could not score a group, other than bad input."""

    reason: str


class ActorLost(Exception):
    """The actor's process ended or cannot be reached; whether it comes back, ``ready`` tells."""


class PoolError(RuntimeError):
    """No actor could answer: the message names the deliberation, and what each actor said."""


class Actor(Protocol):
    """One place where the preference model runs."""

    name: str

    async def score(self, groups: list[Group]) -> list[Scores | InputError | Failure]:
        """One answer a group. Raises ``ActorLost``."""

    async def ready(self) -> None:
        """Return once the actor takes calls (again). Raises ``ActorLost`` if it never will."""

    def restart(self) -> None:
        """End the actor's process and have it started anew."""


class Metrics(Protocol):
    """What a dispatcher tells of itself."""

    def queue_length(self, calls: int) -> None: ...
    def batch(self, calls: int) -> None: ...
    def answered(self, scores: int, seconds: float) -> None: ...
    def actor_lost(self) -> None: ...


@dataclass(eq=False)
class _Call:
    group: Group
    answer: asyncio.Future[Scores]
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(actor, reason) of each attempt that failed."""

    @property
    def work(self) -> int:
        """Scores to compute: members x statements."""
        return len(self.group[1]) * len(self.group[2])

    def error(self, why: str) -> PoolError:
        said = dict.fromkeys(f"; {actor}: {reason}" for actor, reason in self.failures)  # each once
        return PoolError(f"deliberation {textwrap.shorten(self.group[0], 80)!r} {why}{''.join(said)}")


@dataclass(eq=False)
class _Batch:
    calls: list[_Call]
    clock: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    """Runs once the batch is its actor's first."""
    asked: bool = False
    """Whether its actor has been asked and has not answered yet."""


@dataclass(eq=False)
class _Worker:
    actor: Actor
    batches: list[_Batch] = field(default_factory=list)
    """What it holds; it computes the first."""
    up: bool = True
    dead: str = ""
    """Why the actor will never be up again, if so."""

    @property
    def work(self) -> int:
        return sum(call.work for batch in self.batches for call in batch.calls)


class Dispatcher:
    """Answers calls with the help of actors that may die at any time.

    Args:
        actors: at least one, ready.
        max_batch: calls handed to an actor at once, >= 1.
        max_outstanding: calls admitted at once, waiting or with an actor, >= 1; further callers wait.
        timeout: seconds a call may take from its admission; an actor that computes a call for
            ``HANGS_AFTER`` of it is restarted.
    """

    def __init__(
        self, actors: Sequence[Actor], *, max_batch: int, max_outstanding: int, timeout: float, metrics: Metrics
    ):
        self._workers = [_Worker(actor) for actor in actors]
        self._max_batch, self._timeout, self._metrics = max_batch, timeout, metrics
        self._admission = asyncio.Semaphore(max_outstanding)
        self._admitted: set[_Call] = set()
        self._waiting: deque[_Call] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def score(self, group: Group) -> Scores:
        """Scores of one group.

        Raises:
            InputError: at once, if the input is bad.
            PoolError: if no actor answers: after ``ATTEMPTS`` failures, after ``timeout``, or when all are dead.
        """
        async with self._admission:
            loop = asyncio.get_running_loop()
            call, start = _Call(group, loop.create_future()), loop.time()
            if self._closed:
                raise call.error("not scored: the pool is closed")
            if all(worker.dead for worker in self._workers):
                raise self._no_actor_left(call)
            self._admitted.add(call)
            self._waiting.append(call)
            self._dispatch()
            try:
                async with asyncio.timeout(self._timeout):
                    scores = await call.answer
            except TimeoutError:
                raise call.error(f"not scored within {self._timeout:g} s") from None
            finally:  # also where the caller gave up
                self._admitted.discard(call)
                if call in self._waiting:
                    self._waiting.remove(call)
            self._metrics.answered(call.work, loop.time() - start)
            return scores

    async def close(self) -> None:
        """Fail all calls, those still waiting for admission too, and end what runs."""
        self._closed = True
        self._fail_all(lambda call: call.error("not scored: the pool was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- from the queue to the actors -------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while (found := self._next_batch()) is not None:
            worker, batch = found
            worker.batches.append(batch)
            self._metrics.batch(len(batch.calls))
            self._start(self._run(worker, batch))
        self._metrics.queue_length(len(self._waiting))

    def _next_batch(self) -> tuple[_Worker, _Batch] | None:
        """The next calls and who takes them; None while nothing waits or nobody is free."""
        up = [worker for worker in self._workers if worker.up]
        if not self._waiting or not up:
            return None
        # 1. An actor on which the first call has not failed yet, if one is up
        first = self._waiting[0]
        failed_on = {actor for actor, _ in first.failures}
        fitting = [worker for worker in up if worker.actor.name not in failed_on] or up
        free = [worker for worker in fitting if len(worker.batches) < IN_FLIGHT]
        if not free:
            return None
        # 2. Its share of what waits. What has failed goes alone: it may have ended its actor, and would again
        share = 1 if first.failures else min(self._max_batch, math.ceil(len(self._waiting) / len(up)))
        calls = [self._waiting.popleft()]
        while len(calls) < share and self._waiting and not self._waiting[0].failures:
            calls.append(self._waiting.popleft())
        return min(free, key=lambda worker: worker.work), _Batch(calls)

    async def _run(self, worker: _Worker, batch: _Batch) -> None:
        answers: Sequence[Scores | InputError | Failure]
        try:
            async with batch.clock:
                batch.asked = True
                try:
                    self._start_clock(worker)
                    answers = await worker.actor.score([call.group for call in batch.calls])
                finally:
                    batch.asked = False  # a clock that has ended cannot be set
        except (ActorLost, TimeoutError) as error:
            if batch in worker.batches:  # else the loss is known by the actor's other batch
                if isinstance(error, TimeoutError):
                    worker.actor.restart()
                self._lose(worker, str(error) or f"no answer within {self._limit(batch):g} s, restarted")
            return
        except Exception as error:  # such as arguments that cannot be sent; the callers get it
            answers = [Failure(f"{type(error).__name__}: {error}")] * len(batch.calls)
        if batch in worker.batches:
            worker.batches.remove(batch)
            self._start_clock(worker)
            for call, answer in zip(batch.calls, answers, strict=True):
                self._settle(call, answer, worker.actor.name)
            self._dispatch()

    def _limit(self, batch: _Batch) -> float:
        """Seconds an actor may compute a batch."""
        return self._timeout * min(HANGS_AFTER * len(batch.calls), 1 - HANGS_AFTER)

    def _start_clock(self, worker: _Worker) -> None:
        """Start the clock of the batch that the actor computes, unless it runs; one not asked yet starts its own."""
        clock = worker.batches[0].clock if worker.batches else None
        if clock is not None and worker.batches[0].asked and clock.when() is None:
            clock.reschedule(asyncio.get_running_loop().time() + self._limit(worker.batches[0]))

    def _settle(self, call: _Call, answer: Scores | InputError | Failure, actor: str) -> None:
        if call.answer.done():  # its caller has given up
            return
        if isinstance(answer, InputError):
            call.answer.set_exception(answer)
        elif not isinstance(answer, Failure):
            call.answer.set_result(answer)
        else:
            call.failures.append((actor, answer.reason))
            if len(call.failures) == ATTEMPTS:
                call.answer.set_exception(call.error(f"not scored in {ATTEMPTS} attempts"))
            else:
                self._waiting.appendleft(call)

    # --- actors that die ---------------------------------------------------------------------------------------

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Take an actor out until it is back. What it computed has failed; what lay there has merely to be repeated."""
        logger.warning("%s lost: %s", worker.actor.name, reason)
        self._metrics.actor_lost()
        (computed, *queued), worker.batches, worker.up = worker.batches, [], False
        self._waiting.extendleft(call for batch in queued for call in batch.calls if not call.answer.done())
        for batch in queued:
            if batch.asked:  # nobody waits for its answer any more
                batch.clock.reschedule(0)
        for call in computed.calls:
            self._settle(call, Failure(reason), worker.actor.name)
        self._start(self._revive(worker))
        self._dispatch()

    async def _revive(self, worker: _Worker) -> None:
        try:
            await worker.actor.ready()
        except ActorLost as error:
            worker.dead = str(error)
            logger.error("%s is gone for good: %s", worker.actor.name, worker.dead)
            if all(other.dead for other in self._workers):
                self._fail_all(self._no_actor_left)
        else:
            worker.up = True
            logger.info("%s is back", worker.actor.name)
        self._dispatch()

    def _no_actor_left(self, call: _Call) -> PoolError:
        reasons = "; ".join(f"{worker.actor.name} is gone: {worker.dead}" for worker in self._workers)
        return call.error(f"not scored: no actor is left; {reasons}")

    def _fail_all(self, error: Callable[[_Call], PoolError]) -> None:
        self._waiting.clear()
        for call in self._admitted:
            if not call.answer.done():
                call.answer.set_exception(error(call))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)
