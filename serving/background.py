"""Carries out recorded requests in this process: under a lease, in the background where nobody waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.sse import ServerSentEvent
from sqlalchemy.exc import OperationalError

from serving.answering import Events, Report
from serving.ledger import DONE, FAILED, LEASE_S, RUNNING, Entry, Ledger
from serving.problems import ApiError, problem_of
from serving.schemas import Problem

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a stream looks for new events, seconds."""
ENDS = ("done", "error")
"""Events that nothing follows."""
AT_ONCE = 32
"""Requests a process carries out at once; the others wait their turn, or for another process."""
WRITE_PAUSES_S = (0.5, 2.0)
"""Before a write that failed is tried again."""


class LostLease(RuntimeError):
    """The request was erased, or is another runner's by now."""


async def under_lease(ledger: Ledger, entry: Entry, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` while renewing the lease of its entry.

    Raises:
        LostLease: if the entry is no longer this runner's; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=LEASE_S / 3))[0]:
            try:
                kept = await asyncio.to_thread(ledger.renew, entry)
            except OperationalError:  # the database is locked or away; a lease that nobody took is still ours then
                log.warning("request %s: the lease was not renewed", entry.id, exc_info=True)
                continue
            if not kept:
                raise LostLease(entry.id)
        return task.result()
    finally:
        task.cancel()


async def written(write: Callable[..., T], *args: Any) -> T:
    """``write(*args)`` in a thread, again after a moment where the database is locked or away.

    Raises:
        OperationalError: the last one, where all tries fail.
    """
    for pause in WRITE_PAUSES_S:
        try:
            return await asyncio.to_thread(write, *args)
        except OperationalError:
            log.warning("the database did not take a write; trying again in %s s", pause, exc_info=True)
            await asyncio.sleep(pause)
    return await asyncio.to_thread(write, *args)


class Background:
    """Runs recorded requests as tasks of the event loop, ``AT_ONCE`` at a time.

    Args:
        ledger: the record.
        answer: request JSON and a report of its steps -> JSON-able response.
        timeout_s: of one request, from when its turn has come; None: ``answer`` sees to it.
        failed: told of an entry that failed, and why, before it is recorded; it may be told twice.
    """

    def __init__(
        self,
        ledger: Ledger,
        answer: Callable[[str, Report], Awaitable[Any]],
        timeout_s: float | None,
        failed: Callable[[Entry, Problem], None] | None = None,
    ):
        self._ledger, self._answer, self._timeout_s, self._failed = ledger, answer, timeout_s, failed
        self._tasks: set[asyncio.Task] = set()
        self._room = asyncio.Semaphore(AT_ONCE)

    def start(self, entry: Entry) -> None:
        """Begin to carry out an entry that is this process's."""
        task = asyncio.get_running_loop().create_task(self._run(entry))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def _run(self, entry: Entry) -> None:
        try:
            await written(self._ledger.add_events, entry, [("queued", {"id": entry.id})])
            state, answer = DONE, await under_lease(self._ledger, entry, self._in_turn(entry))
        except LostLease:
            return
        except Exception as error:
            problem, _ = problem_of(error)
            if problem.status == 500:
                log.exception("request %s failed", entry.id)
            if self._failed is not None:
                await written(self._failed, entry, problem)
            state, answer = FAILED, problem.model_dump()
        await written(self._ledger.finish, entry, state, answer)

    async def _in_turn(self, entry: Entry) -> Any:
        async def report(events: Events) -> None:
            await written(self._ledger.add_events, entry, events)

        async with self._room:
            return await asyncio.wait_for(self._answer(entry.body, report), self._timeout_s)

    async def look(self, entry_id: str, owner: str) -> Entry:
        """The entry as it stands; one whose runner has died is carried out here.

        Raises:
            ApiError: ``not-found``.
        """
        entry = await asyncio.to_thread(self._ledger.find, entry_id, owner)
        if self._ledger.is_dead(entry.state, entry.lease):
            await self._take_over(entry_id)
        return entry

    async def _take_over(self, entry_id: str) -> None:
        taken = await asyncio.to_thread(self._ledger.take_over, entry_id)
        if taken is not None:
            self.start(taken)

    async def events(self, entry_id: str, owner: str, first: int) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events of an entry from number ``first`` on, until it is done, failed or erased.

        The last one is the end, whatever ``first``: a runner that took over may have told fewer than the one before it.

        Raises:
            ApiError: ``not-found``, before the first event.
        """
        number, state, ended = first, RUNNING, False
        while state == RUNNING:
            state, lease = await asyncio.to_thread(self._ledger.standing, entry_id, owner)
            if self._ledger.is_dead(state, lease):
                await self._take_over(entry_id)
            # After the state, or the last could be missed
            events = await asyncio.to_thread(self._ledger.events, entry_id, number)
            if state != RUNNING and not events and not ended:
                events = (await asyncio.to_thread(self._ledger.events, entry_id, 0))[-1:]
            for event in events:
                yield ServerSentEvent(raw_data=event.data, event=event.type, id=str(event.number))
                number, ended = event.number + 1, event.type in ENDS
            if state == RUNNING and not events:
                await asyncio.sleep(POLL_S)


async def stream_until_gone(events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    """The events; if the request is erased meanwhile, an ``error`` event with the problem ends them."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield ServerSentEvent(raw_data=problem_of(error)[0].model_dump_json(), event="error")
