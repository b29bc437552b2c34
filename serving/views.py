"""What a caller is shown of a winner: each member's view of it, and what should be known before it is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.result import Candidate, MemberView

RATINGS = np.arange(1, 8)


def member_view(member: int, probabilities: NDArray, shown: bool) -> MemberView:
    """One member's predicted rating from P(rating = 1..7), shape [7]."""
    p = np.asarray(probabilities, dtype=np.float64)
    mean = float(p @ RATINGS)
    disagree = float(p[:3].sum())
    return MemberView(
        member=member,
        agreement=mean,
        sd=float(np.sqrt(p @ (RATINGS - mean) ** 2)),
        low=rating_quantile(p, 0.05),
        high=rating_quantile(p, 0.95),
        disagree=disagree,
        dissents=disagree > 0.5,
        shown=shown,
    )


def rating_quantile(probabilities: NDArray, level: float) -> int:
    """Smallest rating k with P(rating <= k) >= level (up to 1e-9 of rounding); P has shape [7], level in (0, 1)."""
    return int(np.argmax(np.cumsum(probabilities) >= level - 1e-9)) + 1


def warnings_of(
    candidates: Sequence[Candidate],
    best: int,
    members: Sequence[MemberView],
    not_shown: Sequence[int],
    uncertainty_penalty: float = 0.0,
) -> tuple[str, ...]:
    """What a caller should know before using the statement, as sentences."""
    warnings = []
    distinct = {c.statement for c in candidates if c.statement}
    empty = sum(not c.statement for c in candidates)
    if not candidates[best].finished:
        warnings.append("The chosen statement was cut off at the token limit.")
    if empty:
        warnings.append(f"{empty} of {len(candidates)} candidates are empty.")
    if len(distinct) < len(candidates) - empty:
        warnings.append(f"Only {len(distinct)} of {len(candidates)} candidates are distinct.")
    if not_shown:
        warnings.append(f"{len(not_shown)} opinions did not fit the policy's context; they were scored, not read.")
    if uncertainty_penalty:
        lowered = f"Welfare counts every utility lowered by {uncertainty_penalty:g} standard deviations."
        warnings.append(lowered)
    dissenters = sum(m.dissents for m in members)
    if 2 * dissenters >= len(members):
        warnings.append(f"{dissenters} of {len(members)} members likely disagree: this is no consensus.")
    return tuple(warnings)
