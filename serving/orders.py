"""Whom each sample of a policy reads, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.exchange import Order

PARTS = 8
"""Parts of a group that take turns in not being read: with 16 samples, one is left without each of them."""

TURN = 4
"""Samples that share an order of the opinions, but for the parts that two of them go without."""


def draw_orders(
    members: int, n: int, seed: int, reshuffle: bool
) -> tuple[tuple[Order, ...], tuple[tuple[int, ...], ...]]:
    """Orders to sample from and the candidate indices each fills; see ``Plan``.

    With ``reshuffle``, no place in a prompt and no single opinion weighs on all samples: every ``TURN`` samples have an
    order of their own, and from three members on every second sample goes without a part of the group, one part after
    the other. All are among the judges all the same. So from three members on, with two samples a part (16 at most),
    there are statements written by the others alone to choose from, whatever a member writes; with fewer samples not
    every part is left out once. What that costs and what it keeps out: ``benchmarks/injection.py``.

    The parts that samples of a turn go without come last in its order: their prompts begin alike, and a policy in this
    process reads what they share once.
    """
    draws = np.random.default_rng(seed)
    if not reshuffle:
        return (Order(_permutation(draws, members), n, seed),), (tuple(range(n)),)
    turns = _permutation(draws, members)
    parts = [turns[k::PARTS] for k in range(min(members, PARTS))] if members > 2 else [()]
    places: dict[tuple[int, ...], list[int]] = {}
    for first in range(0, n, TURN):
        unread = [parts[i // 2 % len(parts)] if i % 2 else () for i in range(first, first + TURN)]
        order = _late(draws, members, [part for part in unread if part])
        for i in range(first, min(n, first + TURN)):
            places.setdefault(tuple(m for m in order if m not in unread[i - first]), []).append(i)
    # Every order has its own seed, or all of them would draw the same random numbers.
    orders = tuple(Order(order, len(at), _sub_seed(seed, at[0])) for order, at in places.items())
    return orders, tuple(tuple(at) for at in places.values())


def _late(draws: np.random.Generator, members: int, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """A random order of all members in which some parts of the group come last, in random order too."""
    last = [parts[k] for k in _permutation(draws, len(parts))]
    place = {member: 1 + k for k, part in enumerate(last) for member in part}
    return tuple(sorted(_permutation(draws, members), key=lambda member: place.get(member, 0)))


def _permutation(draws: np.random.Generator, members: int) -> tuple[int, ...]:
    return tuple(int(i) for i in draws.permutation(members))


def _sub_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 11)
