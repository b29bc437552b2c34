"""The dispatcher shares calls out, repeats what is lost and never hangs: with actors that need no Ray."""

from __future__ import annotations

import asyncio
import functools
import selectors

import numpy as np
import pytest

from deliberation.types import InputError
from reward.dispatch import ATTEMPTS, ActorLost, Dispatcher, Failure, PoolError, _Call
from reward.scoring import Scores


class NoWait(selectors.DefaultSelector):
    """Says that the time has passed that it should have waited for."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        found = super().select(timeout if timeout is None else 0)
        self.now += 0.0 if found else timeout or 0.0
        return found


def in_no_time(test):
    """Run the test in a loop whose clock jumps to the next timer: no machine is too slow, or stands still."""

    @functools.wraps(test)
    def run(**arguments):
        selector = NoWait()
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(test(**arguments))

    return run


class FakeActor:
    """Answers a group with its number of members and statements, once the gate is open."""

    def __init__(self, name: str):
        self.name, self.batches, self.restarts = name, [], 0
        self.gate, self.alive = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.alive.set()
        self.dead = False

    async def score(self, groups):
        self.batches.append([question for question, *_ in groups])
        await self.gate.wait()
        return [self.answer(group) for group in groups]

    def answer(self, group):
        question, opinions, statements = group
        if "poison" in question:
            raise ActorLost("killed")
        if question == "bad":
            return InputError("question", question, "mend it")
        if question in ("breaks", f"breaks {self.name}"):
            return Failure("RuntimeError: out of memory")
        found = np.full((len(opinions), len(statements)), 3.0, dtype=np.float32)
        return Scores(found, found)

    async def ready(self):
        await self.alive.wait()
        if self.dead:
            raise ActorLost("cannot load")

    def restart(self):
        self.restarts += 1
        self.gate.set()


class FakeMetrics:
    def __init__(self):
        self.queue, self.batches, self.scores, self.losses = [], [], 0, 0

    def queue_length(self, calls):
        self.queue.append(calls)

    def batch(self, calls):
        self.batches.append(calls)

    def answered(self, scores, seconds):
        self.scores += scores

    def actor_lost(self):
        self.losses += 1


def make(*actors, **keys):
    settings = {"max_batch": 4, "max_outstanding": 100, "timeout": 20.0, "metrics": FakeMetrics(), **keys}
    return Dispatcher(actors, **settings)


def group(question="q", members=1, statements=1):
    return question, ["o"] * members, ["s"] * statements


def submit(dispatcher, *groups):
    return [asyncio.ensure_future(dispatcher.score(one)) for one in groups]


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_least_outstanding_work_first():
    a, b = FakeActor("a"), FakeActor("b")
    a.gate.clear()
    b.gate.clear()
    calls = submit(make(a, b), group("heavy", 10, 10), group("light 1"), group("light 2"), group("light 3"))
    await settle()
    assert a.batches[0] == ["heavy"] and b.batches == [["light 1"], ["light 2"]]
    assert a.batches[1:] == [["light 3"]]  # b is full
    a.gate.set()
    b.gate.set()
    assert [scores.raw.shape for scores in await asyncio.gather(*calls)] == [(10, 10), (1, 1), (1, 1), (1, 1)]


async def test_waiting_calls_of_all_callers_go_in_batches():
    a, metrics = FakeActor("a"), FakeMetrics()
    a.gate.clear()
    calls = submit(make(a, metrics=metrics), *(group(str(i)) for i in range(10)))
    await settle()
    assert a.batches == [["0"], ["1"]] and metrics.queue[-1] == 8
    a.gate.set()
    await asyncio.gather(*calls)
    assert a.batches[2:] == [["2", "3", "4", "5"], ["6", "7", "8", "9"]]
    assert metrics.batches == [1, 1, 4, 4] and metrics.queue[-1] == 0 and metrics.scores == 10


async def test_an_actor_takes_only_its_share_of_what_waits():
    a, b = FakeActor("a"), FakeActor("b")
    a.gate.clear()
    b.gate.clear()
    calls = submit(make(a, b), *(group(str(i)) for i in range(8)))
    await settle()
    a.gate.set()
    await asyncio.gather(*calls[4:])
    assert a.batches[2] == ["4", "5"]  # though four would fit: b will be free soon as well
    b.gate.set()
    await asyncio.gather(*calls)


async def test_bad_input_comes_back_at_once_and_alone():
    a = FakeActor("a")
    a.gate.clear()
    calls = submit(make(a), group("1"), group("2"), group("bad"), group("4"))
    await settle()
    a.gate.set()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[2], InputError) and found[2].field == "question"
    assert all(isinstance(scores, Scores) for scores in (found[0], found[1], found[3]))
    assert sum(batch.count("bad") for batch in a.batches) == 1


async def test_a_call_that_breaks_on_one_actor_is_answered_by_another():
    a, b = FakeActor("a"), FakeActor("b")
    assert (await make(a, b).score(group("breaks a"))).raw.shape == (1, 1)
    assert (a.batches, b.batches) == ([["breaks a"]], [["breaks a"]])


async def test_a_call_that_breaks_everywhere_says_what_each_actor_said():
    a, b = FakeActor("a"), FakeActor("b")
    with pytest.raises(
        PoolError, match=f"'breaks' .* {ATTEMPTS} attempts; a: RuntimeError: out of memory; b: RuntimeError"
    ):
        await make(a, b).score(group("breaks"))
    assert len(a.batches) + len(b.batches) == ATTEMPTS and b.batches


async def test_a_call_that_kills_every_actor_fails_alone():
    """Its neighbours in the batch are answered; the error names its question, shortened."""
    a, b, metrics = FakeActor("a"), FakeActor("b"), FakeMetrics()
    for actor in (a, b):
        actor.gate.clear()
    names = ["1", "2", "3", "4", "5", "poison " + "long " * 100, "7", "8"]
    calls = submit(make(a, b, metrics=metrics), *map(group, names))
    await settle()
    for actor in (a, b):
        actor.gate.set()
    found = await asyncio.gather(*calls, return_exceptions=True)
    error = found.pop(5)
    assert all(isinstance(scores, Scores) for scores in found)
    assert isinstance(error, PoolError) and "'poison long" in str(error) and "a: killed" in str(error)
    assert len(str(error)) < 250 and metrics.losses == ATTEMPTS


async def test_what_lay_behind_a_deadly_call_is_not_blamed(monkeypatch):
    monkeypatch.setattr("reward.dispatch.ATTEMPTS", 1)
    a = FakeActor("a")
    a.gate.clear()
    calls = submit(make(a), group("poison"), group("behind"))
    await settle()
    assert a.batches == [["poison"], ["behind"]]
    a.gate.set()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[0], PoolError) and isinstance(found[1], Scores)


async def test_an_actor_that_restarts_gets_no_calls():
    a, b = FakeActor("a"), FakeActor("b")
    a.alive.clear()
    dispatcher = make(a, b)
    with pytest.raises(PoolError):
        await dispatcher.score(group("poison"))
    assert a.batches == [["poison"]]  # it is still away
    await asyncio.gather(*submit(dispatcher, *(group(str(i)) for i in range(6))))
    assert a.batches == [["poison"]]
    a.alive.set()
    await settle()
    assert (await dispatcher.score(group("back"))).raw.shape == (1, 1) and a.batches[-1] == ["back"]


@in_no_time
async def test_an_actor_that_hangs_is_restarted_and_its_call_repeated():
    a, b = FakeActor("a"), FakeActor("b")
    a.gate.clear()
    assert (await make(a, b, timeout=0.6).score(group())).raw.shape == (1, 1)
    assert a.restarts == 1 and b.batches == [["q"]]


class SlowActor(FakeActor):
    """Takes its time for every call, one batch after the other."""

    def __init__(self, name, seconds):
        super().__init__(name)
        self.seconds, self.turn = seconds, asyncio.Lock()

    async def score(self, groups):
        async with self.turn:
            await asyncio.sleep(self.seconds * len(groups))
        return await super().score(groups)


@pytest.mark.parametrize("max_batch", [1, 4])
@in_no_time
async def test_neither_the_batch_ahead_nor_the_calls_beside_count_as_hanging(max_batch):
    a = SlowActor("a", 0.3)
    calls = submit(make(a, timeout=3.0, max_batch=max_batch), *(group(str(k)) for k in range(6)))
    assert all(isinstance(scores, Scores) for scores in await asyncio.gather(*calls))
    assert a.restarts == 0


@in_no_time
async def test_an_actor_that_hangs_on_a_later_or_a_large_batch_is_restarted_before_its_calls_are_given_up():
    a = FakeActor("a")
    dispatcher = make(a, timeout=0.6, max_batch=8)
    calls = submit(dispatcher, *(group(str(k)) for k in range(10)))
    a.gate.clear()
    await asyncio.sleep(0)
    assert all(isinstance(scores, Scores) for scores in await asyncio.gather(*calls))
    assert a.restarts == 1
    await settle()
    assert not dispatcher._tasks  # nothing waits for the batch that lay behind
    slow = SlowActor("slow", 0.02)
    calls = submit(make(slow, timeout=1.2), *(group(str(k)) for k in range(2)))
    await asyncio.sleep(0.03)
    slow.gate.clear()  # the second batch, whose clock starts when the first is answered
    assert all(isinstance(scores, Scores) for scores in await asyncio.gather(*calls))
    assert slow.restarts == 1


async def test_a_call_that_failed_before_goes_alone_also_behind_others():
    loop, other = asyncio.get_running_loop(), make(FakeActor("a"))
    failed = _Call(group("poison"), loop.create_future(), [("b", "killed")])
    other._waiting.extend([_Call(group("ok"), loop.create_future()), failed])
    assert [call.group[0] for call in other._next_batch()[1].calls] == ["ok"]
    assert [call.group[0] for call in other._next_batch()[1].calls] == ["poison"]


class Mortal(FakeActor):
    """Dies under its first two batches; whoever holds one is told in the order given."""

    def __init__(self, name, order):
        super().__init__(name)
        self.order, self.told = order, [asyncio.Event(), asyncio.Event()]

    async def score(self, groups):
        number = len(self.batches)
        if number >= 2:
            return await super().score(groups)
        self.batches.append([question for question, *_ in groups])
        await self.told[number].wait()
        raise ActorLost("killed")

    def die(self):
        for number in self.order:
            self.told[number].set()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@in_no_time
async def test_whichever_batch_learns_first_that_its_actor_died_both_are_repeated(order):
    actor = Mortal("a", order)
    calls = submit(make(actor), group("first"), group("second"))
    await settle()
    assert actor.batches == [["first"], ["second"]]
    actor.die()
    async with asyncio.timeout(2):
        answers = await asyncio.gather(*calls)
    assert [scores.raw.shape for scores in answers] == [(1, 1)] * 2


@in_no_time
async def test_a_call_ends_although_no_actor_comes_back():
    a = FakeActor("a")
    a.alive.clear()
    with pytest.raises(PoolError, match=r"'poison' not scored within 0.1 s; a: killed"):
        await make(a, timeout=0.1).score(group("poison"))


async def test_without_any_actor_left_all_calls_fail_at_once():
    a = FakeActor("a")
    a.dead = True
    dispatcher = make(a)
    calls = submit(dispatcher, group("poison"), group("1"), group("2"), group("3"), group("4"))
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found[0], PoolError) and "'poison' not scored: no actor is left; a is gone: cannot load" in str(
        found[0]
    )
    assert {type(one) for one in found[2:]} == {PoolError}
    with pytest.raises(PoolError, match="'later' .* cannot load"):
        await dispatcher.score(group("later"))


async def test_no_more_than_the_bound_is_admitted():
    a, metrics = FakeActor("a"), FakeMetrics()
    a.gate.clear()
    dispatcher = make(a, max_outstanding=3, metrics=metrics)
    calls = submit(dispatcher, *(group(str(i)) for i in range(9)))
    await settle()
    assert len(dispatcher._admitted) == 3 and a.batches == [["0"], ["1"]]
    calls[1].cancel()  # a caller that gives up, whether its call waits or runs, makes room
    calls[2].cancel()
    await settle()
    assert len(dispatcher._admitted) == 3
    a.gate.set()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(scores, Scores) for scores in found) == 7
    assert max(metrics.queue) <= 3 and ["2"] not in a.batches


async def test_what_cannot_be_sent_fails_with_its_cause():
    a = FakeActor("a")

    async def refuse(groups):
        raise TypeError("cannot pickle")

    a.score = refuse
    with pytest.raises(PoolError, match="TypeError: cannot pickle"):
        await make(a).score(group())


async def test_closing_fails_every_call():
    a = FakeActor("a")
    a.gate.clear()
    dispatcher = make(a, max_outstanding=2)
    calls = submit(dispatcher, *(group(str(i)) for i in range(5)))
    await settle()
    await dispatcher.close()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, PoolError) and "closed" in str(one) for one in found)
