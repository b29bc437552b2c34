"""From people's ratings in an experiment to one number a deliberation.

Each deliberation rates both arms' statements, blind. A member who left out any rating of either arm is dropped for
both; with fewer than two members left the deliberation is undefined: NaN, left out of the sequence and counted
(``reference/datasets-and-measures.md`` 3.1). The two scales, agreement and quality, are paired each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from deliberation.types import InputError
from evaluation.measures import unanimous, wins

Array = np.ndarray

FEWEST_MEMBERS = 2
"""Members who rated both arms; with fewer a deliberation is undefined."""


@dataclass(frozen=True)
class Rated:
    """What one deliberation said of both arms.

    Attributes:
        agreement_a, agreement_b: [members, statements of the arm] or [members], 1 to 7, NaN where missing. Row i is
            the same member in both.
        quality_a, quality_b: the same for quality; None where it was not asked.
    """

    agreement_a: Array
    agreement_b: Array
    quality_a: Array | None = None
    quality_b: Array | None = None


@dataclass(frozen=True)
class Numbers:
    """One number a deliberation for every measure, arrays [deliberations], NaN where undefined.

    Attributes:
        mean_difference: mean agreement with A minus that with B; from -6 to 6, the primary measure.
        win: 1 where A's mean agreement is higher, 0 where B's is, 1/2 at ties.
        worst_off_difference: lowest agreement with A minus that with B; from -6 to 6.
        unanimity_a, unanimity_b: share of the arm's statements that every counted member rates 5 or more; 0 to 1.
        quality_difference: mean quality of A minus that of B; from -6 to 6.
        members: how many were counted for agreement.
        dropped: how many left out an agreement rating.
    """

    mean_difference: Array
    win: Array
    worst_off_difference: Array
    unanimity_a: Array
    unanimity_b: Array
    quality_difference: Array
    members: Array
    dropped: Array

    @property
    def unanimity_difference(self) -> Array:
        """From -1 to 1: ``unanimity_a`` minus ``unanimity_b``; a ``limit`` of 1 for the sequence."""
        difference: Array = self.unanimity_a - self.unanimity_b
        return difference

    def undefined(self) -> dict[str, int]:
        """For every measure the number of deliberations where it is undefined."""
        names = [f.name for f in fields(self) if f.name not in ("members", "dropped")]
        return {name: int(np.isnan(getattr(self, name)).sum()) for name in names}


def numbers(deliberations: Sequence[Rated]) -> Numbers:
    """Every measure of every deliberation, in their order.

    Raises:
        InputError: naming the deliberation's field, for ratings outside 1 to 7 or members that do not pair.
    """
    rows = [_row(d, f"deliberations[{k}]") for k, d in enumerate(deliberations)]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 8)
    return Numbers(*table.T)


def _row(rated: Rated, field: str) -> tuple[float, ...]:
    """The numbers of one deliberation, in the order of ``Numbers``."""
    a, b = paired(rated.agreement_a, rated.agreement_b, f"{field}.agreement")
    quality = math.nan
    if (rated.quality_a is None) != (rated.quality_b is None):
        raise InputError(f"{field}.quality", None, "must be given for both arms or for neither")
    if rated.quality_a is not None and rated.quality_b is not None:
        quality = mean_difference(*paired(rated.quality_a, rated.quality_b, f"{field}.quality"))
    return (
        mean_difference(a, b),
        win(a, b),
        worst_off_difference(a, b),
        unanimity(a),
        unanimity(b),
        quality,
        len(a),
        len(rated.agreement_a) - len(a),
    )


def paired(a: Array, b: Array, field: str = "ratings") -> tuple[Array, Array]:
    """The members who rated every statement of both arms.

    Args:
        a, b: [members, statements] or [members]; the arms may differ in the number of statements.
        field: what to call them in an error.

    Returns:
        Two float arrays [members kept, statements].

    Raises:
        InputError: not the same members, no statement, or a rating that is not 1 to 7.
    """
    a, b = _checked(a, f"{field}_a"), _checked(b, f"{field}_b")
    if len(a) != len(b):
        raise InputError(field, (len(a), len(b)), "must have the same members in both arms")
    kept = ~(np.isnan(a).any(axis=1) | np.isnan(b).any(axis=1))
    return a[kept], b[kept]


def mean_difference(a: Array, b: Array) -> float:
    """Mean rating of A minus mean rating of B; of ``paired`` ratings [members, statements], as below."""
    return float(a.mean() - b.mean()) if _defined(a) else math.nan


def win(a: Array, b: Array) -> float:
    """1 where A's mean rating is higher, 0 where lower, 1/2 where equal (exact: sums of whole ratings are)."""
    return float(wins(np.array([mean_difference(a, b)]), np.zeros(1))[0])


def worst_off_difference(a: Array, b: Array) -> float:
    """Rating of the least content member of A minus that of B, each a mean over the arm's statements."""
    return float(a.min(axis=0).mean() - b.min(axis=0).mean()) if _defined(a) else math.nan


def unanimity(ratings: Array) -> float:
    """Share of an arm's statements that every counted member rates at least ``measures.AGREES``."""
    return float(unanimous(ratings).mean()) if _defined(ratings) else math.nan


def defined(values: Array) -> Array:
    """The numbers that a confidence sequence takes: those that are not NaN, in their order."""
    values = np.asarray(values, dtype=np.float64)
    found: Array = values[~np.isnan(values)]
    return found


def _defined(ratings: Array) -> bool:
    return len(ratings) >= FEWEST_MEMBERS


def _checked(ratings: Array, field: str) -> Array:
    ratings = np.asarray(ratings, dtype=np.float64)
    if ratings.ndim == 1:
        ratings = ratings[:, None]
    if ratings.ndim != 2 or ratings.shape[1] == 0:
        raise InputError(field, ratings.shape, "must be [members, statements] with at least one statement")
    bad = ratings[(ratings < 1) | (ratings > 7)]
    if len(bad):
        raise InputError(field, float(bad[0]), "must be a rating from 1 to 7, or NaN where it is missing")
    return ratings
