"""Every axiom of the table in ``reward/welfare.py`` on every function: the kept ones as properties, the broken ones
by a counterexample. 12,000 examples, utilities up to the ends of float64, groups of 1 to 10,000."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberation.types import InputError
from reward.welfare import FUNCTIONS, TAIL, welfare

EXAMPLES = 1500
RELATIVE = 1e-9

ISOELASTIC = ["utilitarian", "nash", "rawlsian", 0.0, 1e-9, 0.5, 1.0, 2.0, 1e9, math.inf]
functions = st.sampled_from([*ISOELASTIC, "p10", "trimmed", "worst_cluster"])
shift_invariant = st.sampled_from(["utilitarian", "rawlsian", "p10", "trimmed", "worst_cluster"])
ends = st.sampled_from([5e-324, 2.3e-308, 1e-300, 1e-9, 1.0, 7.0, 1e9, 1e300, 8.9e307])
ratings = st.floats(1, 7)
everyday = st.floats(1e-6, 1e6)
anything = st.one_of(ratings, everyday, ends)


@st.composite
def groups(draw, values=anything):
    """(utilities, weights or None, clusters): mostly small, sometimes of one member, sometimes of 10,000."""
    if draw(st.integers(0, 39)) == 0:
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        u = rng.uniform(1, 7, 10_000) * draw(
            st.sampled_from([1e-300, 1.0, 1e300]) if values is anything else st.just(1.0)
        )
        return u, rng.uniform(0, 2, 10_000) if draw(st.booleans()) else None, rng.integers(0, 5, 10_000)
    u = np.array(draw(st.lists(values, min_size=1, max_size=14)))
    size = len(u)
    weights = draw(st.none() | st.lists(st.floats(0.01, 100), min_size=size, max_size=size).map(np.array))
    return u, weights, np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))


@settings(max_examples=EXAMPLES)
@given(groups(), functions)
def test_finite_and_between_minimum_and_maximum(group, f):
    u, w, c = group
    assert u.min() <= welfare(u, f, w, c) <= u.max()


@settings(max_examples=EXAMPLES)
@given(groups(), functions, st.integers(0, 2**32 - 1))
def test_anonymity(group, f, seed):
    u, w, c = group
    order = np.random.default_rng(seed).permutation(len(u))
    shuffled = welfare(u[order], f, None if w is None else w[order], c[order])
    assert shuffled == pytest.approx(welfare(u, f, w, c), rel=RELATIVE, abs=0)


@settings(max_examples=EXAMPLES)
@given(groups(), groups(), functions)
def test_neutrality(group, other, f):
    """A statement's welfare is its own, whatever the others are and wherever it stands among them."""
    u, w, c = group
    beside = np.resize(other[0], len(u))
    alone = welfare(u, f, w, c)
    for columns, place in (([u, beside], 0), ([beside, u, beside], 1)):
        found = welfare(np.stack(columns, axis=1), f, w, c)
        assert found[place] == pytest.approx(alone, rel=RELATIVE, abs=0)


@settings(max_examples=EXAMPLES)
@given(groups(), functions, st.integers(0, 2**32 - 1), st.floats(1, 2))
def test_monotone(group, f, seed, factor):
    """Gains of some members, none of whom loses, never lower it."""
    u, w, c = group
    gains = np.where(np.random.default_rng(seed).random(len(u)) < 0.5, factor, 1.0)
    assert welfare(u * gains, f, w, c) >= welfare(u, f, w, c) * (1 - RELATIVE)


@settings(max_examples=EXAMPLES)
@given(groups(), functions)
def test_weak_pareto(group, f):
    u, w, c = group
    assert welfare(u * 2, f, w, c) > welfare(u, f, w, c)


@settings(max_examples=EXAMPLES)
@given(groups(), functions, st.integers(2, 4))
def test_replication(group, f, copies):
    u, w, c = group
    many = welfare(np.tile(u, copies), f, None if w is None else np.tile(w, copies), np.tile(c, copies))
    assert many == pytest.approx(welfare(u, f, w, c), rel=RELATIVE, abs=0)


@settings(max_examples=EXAMPLES)
@given(groups(st.one_of(ratings, everyday)), functions, st.sampled_from([1e-300, 1e-3, 0.5, 3.0, 1e4, 1e300]))
def test_scale(group, f, factor):
    u, w, c = group
    assert welfare(u * factor, f, w, c) == pytest.approx(factor * welfare(u, f, w, c), rel=RELATIVE, abs=0)


@settings(max_examples=EXAMPLES)
@given(groups(ratings), shift_invariant, st.floats(-100, 100))
def test_shift_where_the_table_says_so(group, f, step):
    u, w, c = group
    assert welfare(u + step, f, w, c) == pytest.approx(welfare(u, f, w, c) + step, abs=1e-9)


@pytest.mark.parametrize("f", [0.5, "nash", 2.0])
def test_shift_breaks_for_the_other_isoelastic_functions(f):
    assert abs(welfare([2, 5], f) - (welfare([1, 4], f) + 1)) > 0.01


@pytest.mark.parametrize("f", ["rawlsian", "p10", "trimmed", "worst_cluster"])
def test_strict_pareto_breaks_beyond_finite_alpha(f):
    clusters = [0, 1, 1]
    assert welfare([1, 5, 6], f, clusters=clusters) == welfare([1, 5, 7], f, clusters=clusters) or f == "trimmed"
    many = np.arange(1.0, 21)
    more = many.copy()
    more[-1] += 1
    assert welfare(more, f, clusters=many > 1) == welfare(many, f, clusters=many > 1)


@pytest.mark.parametrize("f", ["utilitarian", 0.5, "nash", 2.0])
def test_strict_pareto_holds_for_finite_alpha(f):
    assert welfare([1, 5, 7], f) > welfare([1, 5, 6], f)


def test_who_holds_a_utility_matters_across_clusters_alone():
    clusters = ["a", "a", "b"]
    assert welfare([6, 2, 4], "worst_cluster", clusters=clusters) == 4
    assert welfare([2, 6, 4], "worst_cluster", clusters=clusters) == 4
    assert welfare([6, 4, 2], "worst_cluster", clusters=clusters) == 2


# --- what the functions for large groups are


def test_p10_is_the_utility_a_tenth_of_the_members_do_not_exceed():
    assert welfare(np.arange(1, 101), "p10") == 10
    assert welfare([3, 1, 2], "p10") == 1
    assert welfare([1, 2, 3], "p10", weights=[0.05, 0.05, 0.9]) == 2


def test_trimmed_cuts_a_tenth_at_either_end_members_in_part():
    assert welfare([0, *[4] * 8, 100], "trimmed") == 4
    assert welfare([1, 7], "trimmed") == 4
    # of five members each end loses half a member: (1/2 + 2 + 3 + 4 + 9/2) / 4
    assert welfare([1, 2, 3, 4, 9], "trimmed") == pytest.approx((0.5 * 1 + 2 + 3 + 4 + 0.5 * 9) / 4)


@settings(max_examples=300)
@given(st.lists(ratings, min_size=9, max_size=30), st.floats(-1e300, 1e300))
def test_one_member_of_ten_cannot_move_trimmed_beyond_the_others(others, extreme):
    assert 1 / (len(others) + 1) <= TAIL
    assert min(others) * (1 - 1e-9) <= welfare([*others, extreme], "trimmed") <= max(others) * (1 + 1e-9)


def test_one_member_moves_the_mean_beyond_the_others():
    assert welfare([*[4] * 9, 1e6], "utilitarian") > 4


def test_worst_cluster_is_the_lowest_weighted_mean():
    found = welfare([1, 7, 5, 3], "worst_cluster", weights=[1, 3, 1, 1], clusters=["x", "x", "y", "y"])
    assert found == pytest.approx(4.0)


@pytest.mark.parametrize("clusters", [None, [0], [0, 1, 2]])
def test_worst_cluster_without_a_label_a_member_is_refused(clusters):
    with pytest.raises(InputError) as error:
        welfare([4.0, 5.0], "worst_cluster", clusters=clusters)
    assert error.value.field == "clusters"


def test_a_cluster_of_weight_zero_does_not_count():
    assert welfare([1, 5, 6], "worst_cluster", weights=[0, 1, 1], clusters=[0, 1, 1]) == 5.5


def test_every_named_function_is_tested():
    named = {f for f in [*ISOELASTIC, "p10", "trimmed", "worst_cluster"] if isinstance(f, str)}
    assert named == set(FUNCTIONS)
