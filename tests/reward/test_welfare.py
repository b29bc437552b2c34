"""Welfare: the axioms as properties, the limits, the domain, and the worked example of the slides."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.types import InputError
from reward.welfare import ALPHAS, parse_welfare, welfare

positive = st.lists(st.floats(0.05, 50), min_size=1, max_size=8)
alphas = st.one_of(
    st.sampled_from([0.0, 1.0, math.inf]), st.floats(0, 60), st.floats(0.99999, 1.00001), st.floats(100, 1e12)
)

SLIDE_A, SLIDE_B = np.array([-10.0, 9.0, 10.0]), np.array([0.0, 3.0, 5.0])


# --- names and numbers


@pytest.mark.parametrize(
    "given_, alpha",
    [
        *[("utilitarian", 0), ("Nash", 1), (" rawlsian ", math.inf), ("inf", math.inf), ("0.5", 0.5), (2, 2), (0, 0)],
        *[("P10", "p10"), ("trimmed", "trimmed"), ("worst_cluster", "worst_cluster")],
    ],
)
def test_parse_welfare_accepts_names_numbers_and_numeric_strings(given_, alpha):
    assert parse_welfare(given_) == alpha


@pytest.mark.parametrize("bad", ["egal", "", -1, "-0.5", float("nan"), "nan", None, [1], True])
def test_parse_welfare_refuses_the_rest_and_names_the_field(bad):
    with pytest.raises(InputError) as error:
        parse_welfare(bad)
    assert error.value.field == "welfare"
    assert "utilitarian" in error.value.mend


def test_worst_cluster_is_no_choice_where_clusters_are_not_known():
    with pytest.raises(InputError) as error:
        parse_welfare("worst_cluster", clusters=False)
    assert error.value.field == "welfare" and "worst_cluster" not in error.value.mend


# --- the worked example of the slides, on raw scores (reference/paper.md section 2)


def test_slide_example_mean_prefers_a_and_minimum_prefers_b():
    assert welfare(SLIDE_A, "utilitarian") == pytest.approx(3.0)
    assert welfare(SLIDE_B, "utilitarian") == pytest.approx(8 / 3)
    assert welfare(SLIDE_A, "rawlsian") == -10
    assert welfare(SLIDE_B, "rawlsian") == 0


def test_slide_example_is_refused_between_on_raw_scores():
    with pytest.raises(InputError, match="must not be negative"):
        welfare(SLIDE_A, 0.5)
    assert welfare(SLIDE_B, 0.5) == pytest.approx(((3**0.5 + 5**0.5) / 3) ** 2)


@pytest.mark.parametrize(
    "shift, alpha, a, b",
    [
        (11, 0, 14.0, 13.667),
        (11, 0.5, 11.23, 13.59),
        (11, 1, 7.49, 13.51),
        (11, 2, 2.73, 13.34),
        (100, 1, 102.570, 102.646),
        (1000, 1, 1002.958, 1002.665),
    ],
)
def test_slide_example_after_a_positive_shift(shift, alpha, a, b):
    assert welfare(SLIDE_A + shift, alpha) == pytest.approx(a, abs=6e-3)
    assert welfare(SLIDE_B + shift, alpha) == pytest.approx(b, abs=6e-3)


# --- axioms


@given(positive, alphas)
def test_lies_between_minimum_and_maximum(u, a):
    assert min(u) <= welfare(u, a) <= max(u)


@given(positive, alphas, st.integers(0, 7), st.floats(0.01, 10))
def test_monotone_in_every_member(u, a, i, more):
    better = list(u)
    better[i % len(u)] += more
    assert welfare(better, a) >= welfare(u, a) * (1 - 1e-9)


@given(positive, st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(0, 7))
def test_strictly_monotone_for_finite_alpha(u, a, i):
    better = list(u)
    better[i % len(u)] *= 2
    assert welfare(better, a) > welfare(u, a)


@given(st.data(), positive, alphas)
def test_symmetric(data, u, a):
    assert welfare(data.draw(st.permutations(u)), a) == pytest.approx(welfare(u, a), rel=1e-9)


@given(positive, alphas, st.floats(0.01, 100))
def test_homogeneous_of_degree_one(u, a, c):
    assert welfare(c * np.array(u), a) == pytest.approx(c * welfare(u, a), rel=1e-7)


@given(positive, alphas, st.integers(2, 4))
def test_replication_invariant(u, a, k):
    assert welfare(u * k, a) == pytest.approx(welfare(u, a), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0.05, 50), st.integers(0, 4)), min_size=1, max_size=6), alphas)
def test_integer_weights_are_copies(pairs, a):
    copies = [u for u, n in pairs for _ in range(n)]
    if copies:
        weighted = welfare([u for u, _ in pairs], a, weights=[n for _, n in pairs])
        assert weighted == pytest.approx(welfare(copies, a), rel=1e-9)


@given(positive, st.floats(0, 30), st.floats(0, 30))
def test_more_aversion_is_never_more_welfare(u, a, b):
    low, high = sorted((a, b))
    assert welfare(u, high) <= welfare(u, low) * (1 + 1e-6)


@given(st.floats(0.05, 50), st.integers(1, 6), alphas)
def test_equal_utilities_are_their_welfare(c, n, a):
    assert welfare([c] * n, a) == pytest.approx(c, rel=1e-12)


@given(positive)
def test_limits_at_one_and_infinity(u):
    assert welfare(u, 1 + 2e-6) == pytest.approx(welfare(u, 1), rel=1e-4)
    assert welfare(u, 1 - 2e-6) == pytest.approx(welfare(u, 1), rel=1e-4)
    assert welfare(u, 1e6) == pytest.approx(min(u), rel=1e-4)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.sampled_from([0.25, 0.5, 2.0, 3.0]))
def test_equals_the_printed_formula(u, a):
    printed = np.mean(np.array(u) ** (1 - a)) ** (1 / (1 - a))
    assert welfare(u, a) == pytest.approx(printed, rel=1e-10)


def test_columns_are_statements():
    u = np.array([[1.0, 4.0, 7.0], [7.0, 4.0, 1.5]])
    for a in ("utilitarian", "nash", "rawlsian", 2.0):
        together = welfare(u, a, weights=[3, 1])
        assert together.shape == (3,)
        np.testing.assert_allclose(together, [welfare(u[:, s], a, weights=[3, 1]) for s in range(3)], rtol=1e-12)


def test_no_statements_give_no_welfare():
    assert welfare(np.ones((3, 0)), 2).shape == (0,)


def test_extreme_aversion_and_scales_do_not_overflow():
    assert welfare([1e-300, 1e300], 1e308) == pytest.approx(1e-300)
    assert welfare([1e-300, 1e300], 0.5) == pytest.approx(2.5e299)


# --- domain


def test_zero_utility_gives_the_limit_with_a_warning():
    for a in (1, 2, 50.0):
        with pytest.warns(UserWarning, match="is 0"):
            assert welfare([0, 3, 5], a) == 0
    assert welfare([0, 4], 0.5) == pytest.approx(1.0)
    assert welfare([0, 0], 0.5) == 0


@pytest.mark.parametrize("alpha", [0.5, 1, 3])
def test_negative_utility_is_refused_between_the_ends(alpha):
    with pytest.raises(InputError) as error:
        welfare([[1.0, 2.0], [3.0, -0.1]], alpha)
    assert error.value.field == "utilities"


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf, 1.0], np.ones((1, 1, 1)), np.ones((0, 4)), 3.0])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_empty_not_finite_or_misshapen_is_refused(bad, alpha):
    with pytest.raises(InputError) as error:
        welfare(bad, alpha)
    assert error.value.field == "utilities"


@pytest.mark.parametrize("bad", [[1], [1, 2, 3], [1, -1], [0, 0], [1, math.nan], [[1, 1]]])
def test_bad_weights_are_refused(bad):
    with pytest.raises(InputError) as error:
        welfare([2.0, 3.0], "nash", weights=bad)
    assert error.value.field == "weights"


def test_a_member_of_weight_zero_does_not_count():
    assert welfare([1.0, 5.0, 6.0], "rawlsian", weights=[0, 1, 1]) == 5.0


def test_imports_without_torch_and_ray():
    code = "import reward.welfare, sys; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
