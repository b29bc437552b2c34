"""The thread that calls a model, and the health checks built on it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from deliberation.types import InputError
from serving import worker as module
from serving.worker import Refusal, Worker


class Clock:
    """The worker's time, which passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


class Gate:
    """Work that lasts until it is let go, and a record of the work that ran."""

    def __init__(self):
        self.opened, self.ran = threading.Event(), []

    def work(self, name):
        self.ran.append(name)
        assert self.opened.wait(60)
        return name


async def busy(worker, gate, *names):
    """Tasks of work that has come in, the first of them begun."""
    tasks = [asyncio.ensure_future(worker.run(gate.work, name)) for name in names]
    while not gate.ran:
        await asyncio.sleep(0.001)
    return tasks


async def test_work_runs_in_turn_and_the_loop_stays_free():
    worker, gate = Worker(10.0), Gate()
    tasks = await busy(worker, gate, "a", "b")
    await asyncio.sleep(0.05)
    assert gate.ran == ["a"] and not any(task.done() for task in tasks)
    gate.opened.set()
    assert await asyncio.gather(*tasks) == ["a", "b"]


async def test_work_whose_caller_is_gone_is_dropped_before_it_starts():
    worker, gate = Worker(10.0), Gate()
    first, second, third = await busy(worker, gate, "first", "second", "third")
    second.cancel()
    first.cancel()  # it runs already: nobody gets its result, and the next one waits for its end
    await asyncio.sleep(0.05)
    gate.opened.set()
    assert await third == "third" and gate.ran == ["first", "third"]
    assert second.cancelled() and first.cancelled()


async def test_refusals_are_values_and_other_errors_are_raised():
    worker = Worker(10.0)

    def refuse():
        raise InputError("opinions[1]", "long", "shorten it")

    assert await worker.run(refuse) == Refusal("opinions[1]", "long", "shorten it")
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 / 0)


async def test_a_worker_that_makes_no_progress_fails_its_check(clock):
    worker, gate = Worker(0.2), Gate()
    tasks = await busy(worker, gate, "a", "b")
    await worker.check(lambda: pytest.fail("a busy model needs no probe"))
    clock.now += 0.3
    with pytest.raises(RuntimeError, match="2 requests wait"):
        await worker.check(lambda: None)
    gate.opened.set()
    await asyncio.wait(tasks)
    await worker.check(lambda: None)


async def test_who_waits_for_stuck_work_is_told_so_and_who_waits_behind_it_is_not(clock):
    worker, gate = Worker(0.2), Gate()
    first, second = await busy(worker, gate, "first", "second")
    clock.now += 0.3
    for _ in range(3):
        with pytest.raises(RuntimeError, match="2 requests wait"):
            await worker.check(lambda: None)
        await asyncio.sleep(0.01)
    assert first.done() and isinstance(first.exception(), TimeoutError)
    assert not second.done()  # its replica will be lost, and another asked
    gate.opened.set()
    assert await second == "second"


async def test_stuck_work_that_nobody_waits_for_fails_the_check_alike(clock):
    worker, gate = Worker(0.2), Gate()
    first, second = await busy(worker, gate, "first", "second")
    first.cancel()
    await asyncio.wait({first})
    clock.now += 0.3
    for _ in range(3):
        with pytest.raises(RuntimeError, match="2 requests wait"):
            await worker.check(lambda: None)
    assert first.cancelled() and not second.done()
    gate.opened.set()
    assert await second == "second"


async def test_an_idle_model_is_probed_and_one_that_worked_lately_is_not(clock):
    worker, probes = Worker(10.0), []
    for pause, expected in ((0, 1), (module.PROBE_EVERY_S, 1), (0.1, 2)):
        clock.now += pause
        await worker.check(lambda: probes.append(1))
        assert len(probes) == expected
    clock.now += module.PROBE_EVERY_S + 0.1
    await worker.run(clock.monotonic)
    await worker.check(lambda: pytest.fail("it has just worked"))


async def test_a_failing_probe_fails_every_check():
    worker = Worker(10.0)

    def refuse():
        raise InputError("opinions", "", "too long for this model")

    for _ in range(3):  # Ray replaces the replica after three
        with pytest.raises(ZeroDivisionError):
            await worker.check(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="too long for this model"):
            await worker.check(refuse)
