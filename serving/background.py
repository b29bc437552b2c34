"""Carries out recorded requests in this process: under a lease, in the background where nobody waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.sse import ServerSentEvent

from serving.answering import Events, Report
from serving.ledger import DONE, FAILED, LEASE_S, RUNNING, Entry, Ledger
from serving.problems import ApiError, Overloaded, problem_of

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a stream looks for new events, seconds."""
OVERLOADED_PAUSE_S = 1.0


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
            if not await asyncio.to_thread(ledger.renew, entry):
                raise LostLease(entry.id)
        return task.result()
    finally:
        task.cancel()


class Background:
    """Runs recorded requests as tasks of the event loop.

    Args:
        ledger: the record.
        answer: request JSON and a report of its steps -> JSON-able response.
        timeout_s: of one request.
    """

    def __init__(self, ledger: Ledger, answer: Callable[[str, Report], Awaitable[Any]], timeout_s: float):
        self._ledger, self._answer, self._timeout_s = ledger, answer, timeout_s
        self._tasks: set[asyncio.Task] = set()

    def start(self, entry: Entry) -> None:
        """Begin to carry out an entry that is this process's."""
        task = asyncio.get_running_loop().create_task(self._run(entry))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def _run(self, entry: Entry) -> None:
        try:
            await asyncio.to_thread(self._ledger.add_events, entry, [("queued", {"id": entry.id})])
            work = asyncio.wait_for(self._patiently(entry), self._timeout_s)
            state, answer = DONE, await under_lease(self._ledger, entry, work)
        except LostLease:
            return
        except Exception as error:
            problem, _ = problem_of(error)
            if problem.status == 500:
                log.exception("request %s failed", entry.id)
            state, answer = FAILED, problem.model_dump()
        await asyncio.to_thread(self._ledger.finish, entry, state, answer)

    async def _patiently(self, entry: Entry) -> Any:
        """Nobody waits, so a full queue is waited for too; what was reported before it was full comes out the same."""
        told = met = 0

        async def report(events: Events) -> None:
            nonlocal told, met
            new, met = events[max(0, told - met) :], met + len(events)
            if new:
                await asyncio.to_thread(self._ledger.add_events, entry, new)
            told = max(told, met)

        while True:
            met = 0
            try:
                return await self._answer(entry.body, report)
            except Overloaded:
                await asyncio.sleep(OVERLOADED_PAUSE_S)

    async def look(self, entry_id: str, owner: str) -> Entry:
        """The entry as it stands; one whose runner has died is carried out here.

        Raises:
            ApiError: ``not-found``.
        """
        entry = await asyncio.to_thread(self._ledger.find, entry_id, owner)
        if entry.state == RUNNING:
            taken = await asyncio.to_thread(self._ledger.take_over, entry_id)
            if taken is not None:
                self.start(taken)
        return entry

    async def events(self, entry_id: str, owner: str, first: int) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events of an entry from number ``first`` on, until it is done, failed or erased.

        Raises:
            ApiError: ``not-found``, before the first event.
        """
        number, finished = first, False
        while not finished:
            state = (await self.look(entry_id, owner)).state  # before the events, or the last could be missed
            events = await asyncio.to_thread(self._ledger.events, entry_id, number)
            for event in events:
                yield ServerSentEvent(raw_data=event.data, event=event.type, id=str(event.number))
                number = event.number + 1
            finished = state != RUNNING
            if not events and not finished:
                await asyncio.sleep(POLL_S)


async def stream_until_gone(events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
    """The events; if the request is erased meanwhile, an ``error`` event with the problem ends them."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield ServerSentEvent(raw_data=problem_of(error)[0].model_dump_json(), event="error")
