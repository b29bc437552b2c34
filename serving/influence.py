"""What each opinion changed, by leaving it out (the exclusion test of Bakker et al. 2022): pure, like ``best_of_n``.

The same request is answered once more without each opinion: every prompt loses that opinion and keeps its order and
its random numbers, so that what differs is the opinion's doing as far as sampling allows. Both statements are judged
by the other members alone; what the left-out member thinks of either does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from reward.welfare import welfare
from serving.best_of_n import NoStatement, Plan, answer
from serving.exchange import Judge, Sampler
from serving.result import Consensus, Influence

CONCURRENT = 2
"""Answers without an opinion under way at a time: one is sampled while another is judged."""


def without(plan: Plan, member: int) -> Plan:
    """The plan of the same request without one member's opinion; the members after it move up by one.

    Args:
        plan: of a group of at least 2.
    """
    opinions = plan.opinions[:member] + plan.opinions[member + 1 :]
    orders = tuple(
        replace(order, members=tuple(m - (m > member) for m in order.members if m != member)) for order in plan.orders
    )
    return replace(plan, opinions=opinions, orders=orders, influence=False)


@contextmanager
def _left_out(member: int) -> Iterator[None]:
    """Have a ``NoStatement`` of the answer without that member's opinion say so: the request itself has a statement."""
    try:
        yield
    except NoStatement as error:
        raise NoStatement(f"without opinions[{member}], {error}") from error


def influence_of(member: int, plan: Plan, whole: Consensus, rest: Consensus) -> Influence:
    """The influence of one opinion.

    Welfare is that of the predicted agreement, also where the choice was made with an ``uncertainty_penalty``.

    Args:
        plan: of ``whole``.
        rest: the answer to ``without(plan, member)``.
    """
    before = np.array(rest.candidates[rest.index].utilities)
    after = np.delete(whole.candidates[whole.index].utilities, member)
    change = float(welfare(after, plan.used.function)) - float(welfare(before, plan.used.function))
    return Influence(member, whole.statement != rest.statement, change, float((after - before).mean()))


def answer_with_influence(sampler: Sampler, judge: Judge, plan: Plan) -> Consensus:
    """``best_of_n.answer``, with the influence of every opinion where the plan asks for it.

    Raises:
        NoStatement: if every candidate is empty, of the answer or of one without an opinion, which is named.
    """
    whole = answer(sampler, judge, plan)
    if not plan.influence:
        return whole

    def of(member: int) -> Influence:
        with _left_out(member):
            return influence_of(member, plan, whole, answer(sampler, judge, without(plan, member)))

    return replace(whole, influence=tuple(of(member) for member in range(len(plan.opinions))))


async def add_influence(plan: Plan, whole: Consensus, answer: Callable[[Plan], Awaitable[Consensus]]) -> Consensus:
    """The answer to a plan, with the influence of every opinion where the plan asks for it.

    Args:
        whole: the answer to ``plan``.
        answer: answers the plans without an opinion; what it raises ends the others too.

    Raises:
        NoStatement: if every candidate without an opinion, which is named, is empty.
        Exception: what else ``answer`` raises.
    """
    if not plan.influence:
        return whole
    free = asyncio.Semaphore(CONCURRENT)

    async def of(member: int) -> Influence:
        async with free:
            with _left_out(member):
                return influence_of(member, plan, whole, await answer(without(plan, member)))

    tasks = [asyncio.ensure_future(of(member)) for member in range(len(plan.opinions))]
    try:
        return replace(whole, influence=tuple(await asyncio.gather(*tasks)))
    finally:
        for task in tasks:
            task.cancel()
