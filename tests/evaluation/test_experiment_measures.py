"""Numbers of an experiment against hand-worked ratings, and what they must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.types import InputError
from evaluation import experiment_measures as m

nan = math.nan
MEASURES = ("mean_difference", "win", "worst_off_difference", "unanimity_difference", "quality_difference")


@st.composite
def rated(draw, low=1, high=7):
    """One deliberation; about one rating in eight is missing."""
    members, statements = draw(st.integers(1, 6)), draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    value = st.one_of(*[st.integers(low, high).map(float)] * 7, st.just(nan))
    arms = [
        np.array(draw(st.lists(value, min_size=members * n, max_size=members * n))).reshape(members, n)
        for n in (*statements, *statements)
    ]
    return m.Rated(*arms)


def test_by_hand_with_a_missing_member():
    a, b = np.array([6.0, 5.0, 7.0, nan]), np.array([4.0, 6.0, 5.0, 1.0])
    found = m.numbers([m.Rated(a, b, quality_a=np.array([3.0, 3, 3, 3]), quality_b=np.array([5.0, 4, 3, 2]))])
    assert found.mean_difference[0] == 1.0  # 6 - 5; the fourth member is in neither mean
    assert (found.win[0], found.worst_off_difference[0]) == (1.0, 1.0)
    assert (found.unanimity_a[0], found.unanimity_b[0], found.unanimity_difference[0]) == (1.0, 0.0, 1.0)
    assert found.quality_difference[0] == -0.5  # on its own scale all four count
    assert (found.members[0], found.dropped[0]) == (3, 1)


def test_several_statements_are_averaged_as_the_reference_says():
    a, b = np.array([[6.0, 2.0], [4.0, 6.0]]), np.array([4.0, 5.0])
    found = m.numbers([m.Rated(a, b)])
    assert found.mean_difference[0] == 0.0 and found.win[0] == 0.5  # 4.5 and 4.5
    assert found.worst_off_difference[0] == -1.0  # mean of 4 and 2, minus 4
    assert found.unanimity_a[0] == 0.0


def test_a_tie_of_different_numbers_of_statements_is_a_tie():
    a = np.array([[1.0, 1.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 1.0]])  # 15 / 9
    b = np.array([1.0, 2.0, 2.0])  # 5 / 3
    assert m.win(a, b[:, None]) == 0.5


def test_fewer_than_two_members_are_undefined_and_counted():
    lone = m.Rated(np.array([5.0, nan]), np.array([4.0, 3.0]))
    whole = m.Rated(np.array([5.0, 4.0]), np.array([4.0, 3.0]))
    found = m.numbers([lone, whole])
    for name in ("mean_difference", "win", "worst_off_difference", "unanimity_a"):
        assert math.isnan(getattr(found, name)[0]) and not math.isnan(getattr(found, name)[1])
    assert found.undefined()["win"] == 1 and found.undefined()["quality_difference"] == 2
    np.testing.assert_array_equal(m.defined(found.mean_difference), [1.0])
    assert len(m.numbers([]).win) == 0


@given(st.lists(rated(), min_size=1, max_size=4))
def test_swapping_the_arms_turns_every_sign(deliberations):
    forth = m.numbers(deliberations)
    back = m.numbers([m.Rated(d.agreement_b, d.agreement_a, d.quality_b, d.quality_a) for d in deliberations])
    for name in MEASURES:
        ours, theirs = getattr(forth, name), getattr(back, name)
        np.testing.assert_allclose(theirs, 1 - ours if name == "win" else -ours, atol=1e-9)


@given(st.lists(rated(low=1, high=4), min_size=1, max_size=4), st.integers(0, 3))
def test_a_constant_on_all_ratings_changes_no_difference(deliberations, constant):
    before = m.numbers(deliberations)
    after = m.numbers([m.Rated(d.agreement_a + constant, d.agreement_b + constant) for d in deliberations])
    for name in ("mean_difference", "win", "worst_off_difference"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), atol=1e-8)


@given(rated())
def test_a_plain_loop_gives_the_same(one):
    kept = [
        (list(x), list(y)) for x, y in zip(one.agreement_a, one.agreement_b, strict=True)
        if not any(math.isnan(r) for r in [*x, *y])
    ]  # fmt: skip
    found = m.numbers([one])
    assert found.members[0] == len(kept)
    if len(kept) < 2:
        assert math.isnan(found.mean_difference[0])
        return
    means, worst = [], []
    for arm in (0, 1):
        columns = list(zip(*[member[arm] for member in kept], strict=True))
        means.append(sum(sum(c) / len(c) for c in columns) / len(columns))
        worst.append(sum(min(c) for c in columns) / len(columns))
    assert found.mean_difference[0] == pytest.approx(means[0] - means[1], abs=1e-8)
    assert found.worst_off_difference[0] == pytest.approx(worst[0] - worst[1], abs=1e-8)
    assert -6 <= found.mean_difference[0] <= 6


@pytest.mark.parametrize("rated_so, field", [
    (m.Rated(np.array([5.0, 8.0]), np.array([4.0, 4.0])), "deliberations[0].agreement_a"),
    (m.Rated(np.array([5.0, 5.0]), np.array([4.0, 0.0])), "deliberations[0].agreement_b"),
    (m.Rated(np.array([5.0, 5.0]), np.array([4.0])), "deliberations[0].agreement"),
    (m.Rated(np.empty((2, 0)), np.array([4.0, 4.0])), "deliberations[0].agreement_a"),
    (m.Rated(np.array([5.0]), np.array([4.0]), quality_a=np.array([4.0])), "deliberations[0].quality"),
])  # fmt: skip
def test_bad_input_is_named(rated_so, field):
    with pytest.raises(InputError) as found:
        m.numbers([rated_so])
    assert found.value.field == field
