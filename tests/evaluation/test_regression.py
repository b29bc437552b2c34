"""The regression of statsmodels and our own interval at a fixed horizon: two ways to the same numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from deliberation.types import InputError
from evaluation.experiment_checks import fixed_horizon
from evaluation.regression import arm_effect


def groups(number, rng, shift=0.5, sizes=(3, 9)):
    """Ratings of A and of B [members] for each deliberation; a group's level is common to both."""
    for _ in range(number):
        size, level = rng.integers(*sizes), rng.normal(4.2, 0.8)
        tilt = rng.normal(0, 0.5)  # groups like one arm better than other groups do
        one, other = (level + d + rng.normal(0, 1.4, size) for d in (shift + tilt, 0.0))
        yield tuple(np.clip(np.rint(x), 1, 7) for x in (one, other))


def table(columns):
    """(ratings, is it A's?, deliberation) -> the three arrays of ``arm_effect``."""
    agreement, in_a, names = zip(*columns)
    sizes = [len(x) for x in agreement]
    return np.concatenate(agreement), np.repeat(in_a, sizes), np.repeat(names, sizes)


def paired(held):
    return table([(x, arm, f"del_{k}") for k, pair in enumerate(held) for arm, x in zip((True, False), pair)])


def check_agreement(found, fixed, tolerance):
    """Both ends within ``tolerance`` of the half-width."""
    ours, half = fixed.estimate, (fixed.estimate.high - fixed.estimate.low) / 2
    assert abs(found.low - ours.low) < tolerance * half and abs(found.high - ours.high) < tolerance * half


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number, method, tolerance", [(12, "t", 0.01), (39, "t", 0.01), (200, "bootstrap", 0.05)])
def test_paired_it_agrees_with_the_interval_of_the_report(number, method, tolerance, seed):
    held = list(groups(number, np.random.default_rng(seed)))
    fixed = fixed_horizon(np.array([a.mean() - b.mean() for a, b in held]))
    found = arm_effect(*paired(held))
    assert fixed.method == method and found.n == number
    assert found.value == pytest.approx(fixed.estimate.value, abs=1e-9)
    check_agreement(found, fixed, tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_between_it_agrees_with_the_kth_beside_the_kth(seed):
    """The report pairs deliberations by chance; the regression does not, so their widths differ by chance."""
    rng = np.random.default_rng(seed)
    ours, theirs = [a for a, _ in groups(200, rng)], [b for _, b in groups(200, rng)]
    fixed = fixed_horizon(np.array([a.mean() - b.mean() for a, b in zip(ours, theirs)]))
    rows = [(a, True, f"a{k}") for k, a in enumerate(ours)] + [(b, False, f"b{k}") for k, b in enumerate(theirs)]
    found = arm_effect(*table(rows))
    assert found.value == pytest.approx(fixed.estimate.value, abs=1e-9) and found.n == 400
    check_agreement(found, fixed, 0.2)


def test_ratings_of_a_group_are_not_taken_for_independent():
    """Members who all say the same are worth one: copying them changes nothing."""
    held = list(groups(60, np.random.default_rng(4)))
    once, often = (arm_effect(*paired([(np.tile(a, k), np.tile(b, k)) for a, b in held])) for k in (1, 10))
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high), abs=2e-3)


def test_few_deliberations_have_no_interval():
    found = arm_effect(*paired(list(groups(9, np.random.default_rng(5)))))
    assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("agreement", "in_a", "deliberation", "field"),
    [([4, 5], [True], ["d", "d"], "agreement"), ([4, np.nan], [True, False], ["d", "d"], "agreement"),
     ([4, 8], [True, False], ["d", "d"], "agreement"), ([4, 5], [True, True], ["d", "e"], "in_a"),
     ([], [], [], "in_a"), ([[4, 5]], [[True, False]], [["d", "d"]], "agreement")],
)  # fmt: skip
def test_bad_ratings_are_refused(agreement, in_a, deliberation, field):
    with pytest.raises(InputError) as caught:
        arm_effect(agreement, in_a, deliberation)
    assert caught.value.field == field


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['statsmodels'] = None\n"
        "from evaluation.regression import arm_effect\n"
        "arm_effect([4, 5], [True, False], ['d', 'd'])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode and "consensus-machine[stats]" in told.stderr.splitlines()[-1]
