"""Consistency of raters: kappa by hand, the filter, and two showings of a statement."""

from __future__ import annotations

import pytest

from deliberation.types import Choice, InputError, Rating
from reward.raters import MIN_ITEMS, consistent_raters, showings, weighted_kappa

ONCE = (1, 3, 5, 7, 6, 2)


def ratings(member, agreement):
    return [Rating("d", member, "Q?", "o", f"statement {k}", a, 4) for k, a in enumerate(agreement)]


def test_kappa_by_hand():
    """The reference's worked figures (datasets-and-measures, 6.1)."""
    assert weighted_kappa(ONCE, (2, 3, 5, 6, 6, 2)) == pytest.approx(0.850, abs=5e-4)
    assert weighted_kappa(ONCE, (4,) * 6) == pytest.approx(0, abs=1e-12)
    assert weighted_kappa(ONCE, ONCE) == 1
    assert weighted_kappa((4, 4), (4, 4)) is None
    assert weighted_kappa((1, 7), (7, 1)) < 0


def test_showings_are_told_apart_and_a_third_is_refused():
    choice = Choice("d", 0, "Q?", "o", "a", "b")
    first, second = showings([*ratings(0, (1, 2)), choice, *ratings(0, (3,)), choice, *ratings(1, (5,))])
    assert [r.agreement for r in second] == [3]
    assert len(first) == 5 and first[1].agreement == 2
    with pytest.raises(InputError, match="three times"):
        showings(ratings(0, (1,)) * 3)


def test_inconsistent_members_are_dropped_and_short_ones_are_not(caplog):
    first = [*ratings(0, ONCE), *ratings(1, ONCE), *ratings(2, ONCE[: MIN_ITEMS - 1]), *ratings(3, (4,) * 6)]
    second = [
        *ratings(0, (2, 3, 5, 6, 6, 2)), *ratings(1, (7, 1, 2, 3, 1, 6)), *ratings(2, (7, 7, 7, 1, 1)),
        *ratings(3, (4,) * 6),
    ]  # fmt: skip
    kept, facts = consistent_raters(first, second, 0.6)
    assert {r.member for r in kept} == {0, 2}
    assert facts == {"raters_doubled": 3, "raters_dropped": 2}
    assert "1 members rated fewer than 6 statements twice" in caplog.text
    assert consistent_raters(first, second, -1)[1]["raters_dropped"] == 0
    assert consistent_raters(first, [], 0.6) == (first, {})
