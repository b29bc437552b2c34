"""How consistent raters are: a statement shown twice to the same member (Bakker et al. 2022, section 2.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deliberation.types import RATING_SCALE, InputError, Rating, Response
from reward.examples import rows_of_members

logger = logging.getLogger(__name__)

MIN_ITEMS = 6
"""Doubled ratings from which a member's kappa says something; members with fewer are kept."""


def showings(responses: Sequence[Response]) -> tuple[list[Response], list[Rating]]:
    """Everything but the second ratings of a statement by the same member, and those second ratings.

    Raises:
        InputError: field ``ratings``, on a third.
    """
    first: list[Response] = []
    second: list[Rating] = []
    seen: dict[tuple[str, int, str], int] = {}
    for r in responses:
        if not isinstance(r, Rating):
            first.append(r)
            continue
        key = (r.deliberation_id, r.member, r.statement)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 2:
            mend = f"member {r.member} rated a statement three times; give two showings at most"
            raise InputError("ratings", r.deliberation_id, mend)
        (first if seen[key] == 1 else second).append(r)
    return first, second


def consistent_raters(
    first: Sequence[Response], second: Sequence[Rating], min_kappa: float
) -> tuple[list[Response], dict[str, Any]]:
    """The responses of members whose two ratings agree by a kappa of ``min_kappa`` or more, and what was left out.

    Members with fewer than ``MIN_ITEMS`` doubled ratings are kept, which is logged; one whose kappa is undefined (the
    same rating every time) tells nothing and is not. Where nobody rated twice, everybody is kept.

    Returns:
        Kept responses, and ``raters_doubled``, ``raters_dropped`` (numbers of members).
    """
    again = {(r.deliberation_id, r.member, r.statement): r.agreement for r in second}
    dropped, doubled, unknown = set(), 0, 0
    for member, rows in rows_of_members(first).items():
        pairs = [
            (r.agreement, again[(*member, r.statement)])
            for r in (first[row] for row in rows)
            if isinstance(r, Rating) and (*member, r.statement) in again
        ]
        if len(pairs) < MIN_ITEMS:
            unknown += bool(pairs)
            continue
        doubled += 1
        kappa = weighted_kappa(*zip(*pairs, strict=True))
        if min_kappa > -1 and (kappa is None or kappa < min_kappa):
            dropped.add(member)
    if unknown and min_kappa > -1:
        few = "%d members rated fewer than %d statements twice: kept, as that tells too little of them for min_kappa"
        logger.warning(few, unknown, MIN_ITEMS)
    kept = [r for r in first if (r.deliberation_id, r.member) not in dropped]
    return kept, {"raters_doubled": doubled, "raters_dropped": len(dropped)} if doubled else {}


def weighted_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    """Linearly weighted kappa (Cohen 1968) of two ratings of each item: at most 1, 0 for chance.

    None where both are one constant rating.
    """
    a, b = (np.asarray(x, dtype=np.int64) for x in (first, second))
    seen = np.abs(a - b).mean()
    p, q = (np.bincount(x, minlength=len(RATING_SCALE) + 1) / len(x) for x in (a, b))
    scale = np.arange(len(p))
    chance = p @ np.abs(scale[:, None] - scale[None, :]) @ q
    return None if chance == 0 else float(1 - seen / chance)
