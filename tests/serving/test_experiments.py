"""What is fixed of an experiment, who gets which arm, in which order members see statements."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from scipy import stats
from trial_stream import BETWEEN, PAIRED, A, B, C, drawn

from deliberation.types import InputError
from evaluation.sequences import first_crossing, log_e_values, to_unit
from serving.experiments import BUCKETS, MAX_ARMS, Arm, Spec, assign, member_order, propensities
from serving.trial_analysis import matched

SPECS = [
    PAIRED,
    BETWEEN,
    Spec(
        (A, replace(B, welfare=0.5, weight=3.0), C), "between", "win_rate", 0.01, 1, 1, {"policy:default": "sha256:1"}
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_the_database(spec):
    assert Spec.from_json(spec.to_json()) == spec
    json.loads(spec.to_json(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_a_spec_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        PAIRED.alpha = 0.1
    with pytest.raises(FrozenInstanceError):
        PAIRED.arms[0].n = 3


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("arms", {"arms": (A,)}),
        ("arms", {"arms": (A, B, C)}),
        ("arms", {"arms": tuple(Arm(str(k), "p", 1, "nash") for k in range(MAX_ARMS + 1)), "mode": "between"}),
        ("arms[0].name", {"arms": (replace(A, name=" "), B)}),
        ("arms[0].name", {"arms": (replace(A, name="a\nb"), B)}),
        ("arms[1].name", {"arms": (A, replace(B, name="x" * 101))}),
        ("arms[1].name", {"arms": (A, replace(B, name=A.name))}),
        ("arms[1].policy", {"arms": (A, replace(B, policy=""))}),
        ("arms[0].n", {"arms": (replace(A, n=0), B)}),
        ("arms[0].welfare", {"arms": (replace(A, welfare="kind"), B)}),
        ("arms[0].welfare", {"arms": (replace(A, welfare=math.inf), B)}),
        ("arms[0].weight", {"arms": (replace(A, weight=2.0), B)}),
        ("arms[0].weight", {"arms": (replace(A, weight=0.0), B), "mode": "between"}),
        ("arms[0].weight", {"arms": (replace(A, weight=math.nan), B), "mode": "between"}),
        ("arms[1].weight", {"arms": (A, replace(B, weight=1e-5)), "mode": "between"}),
        ("mode", {"mode": "sequential"}),
        ("metric", {"metric": "likes"}),
        ("alpha", {"alpha": 0.0}),
        ("alpha", {"alpha": math.nan}),
        ("alpha", {"alpha": True}),
        ("minimum", {"minimum": 0}),
        ("minimum", {"minimum": 5.5}),
        ("maximum", {"minimum": 10, "maximum": 9}),
        ("maximum", {"maximum": 10**9}),
    ],
)  # fmt: skip
def test_a_bad_spec_is_refused_by_field(field, change):
    with pytest.raises(InputError) as caught:
        replace(PAIRED, **change)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "text"),
    [("spec", "[]"), ("spec.arms", "{}"), ("spec.color", '{"arms": [], "color": 1}'), ("arms[0]", '{"arms": [1]}'),
     ("arms[0].policy", '{"arms": [{"name": "a", "n": 1, "welfare": "nash"}]}')],
)  # fmt: skip
def test_bad_json_is_refused_by_field(field, text):
    with pytest.raises(InputError) as caught:
        Spec.from_json(text)
    assert caught.value.field == field


# --- assignment -----------------------------------------------------------------------------------------------------

IDS = [f"del_{k:016x}" for k in range(20_000)]


def test_a_paired_deliberation_has_all_arms():
    assert {assign(PAIRED, "salt", "exp_1", name) for name in IDS[:100]} == {(None, 1.0)}
    assert propensities(PAIRED) == {"ppo": 1.0, "rerank": 1.0}


def test_assignment_is_sticky_and_has_the_planned_shares():
    spec = Spec((A, replace(B, weight=2.0), replace(C, weight=0.5)), mode="between")
    given = [assign(spec, "salt", "exp_1", name) for name in IDS]
    assert given == [assign(spec, "salt", "exp_1", name) for name in IDS]
    shares = propensities(spec)
    assert math.isclose(sum(shares.values()), 1.0) and all(p == shares[name] for name, p in given)
    assert np.allclose(list(shares.values()), np.array([1, 2, 0.5]) / 3.5, atol=1 / BUCKETS)
    counts = Counter(name for name, _ in given)
    expected = [shares[name] * len(IDS) for name in spec.names]
    assert stats.chisquare([counts[name] for name in spec.names], expected).pvalue > 0.001


def test_assignment_depends_on_salt_and_experiment():
    mine = [assign(BETWEEN, "salt", "exp_1", name)[0] for name in IDS[:2000]]
    for salt, experiment in (("other", "exp_1"), ("salt", "exp_2")):
        others = [assign(BETWEEN, salt, experiment, name)[0] for name in IDS[:2000]]
        assert 0.45 < np.mean([a == b for a, b in zip(mine, others)]) < 0.55


# --- order ----------------------------------------------------------------------------------------------------------


def test_every_member_has_an_order_of_their_own_and_keeps_it():
    names = ["can_1", "can_2", "can_3"]
    orders = [tuple(member_order("salt", f"mbr_{k}", names)) for k in range(6000)]
    assert orders == [tuple(member_order("salt", f"mbr_{k}", names[::-1])) for k in range(6000)]
    counts = Counter(orders)
    assert len(counts) == 6 and stats.chisquare(list(counts.values())).pvalue > 0.001
    assert orders != [tuple(member_order("other", f"mbr_{k}", names)) for k in range(6000)]


# --- between: matching keeps the level ------------------------------------------------------------------------------


def between_stops(runs, arrivals, weight, shift, rng):
    """Share of experiments that declare a difference at any look, with arms drawn by ``assign``."""
    spec = Spec((A, replace(B, weight=weight)), mode="between")
    crossings = []
    for run in range(runs):
        arms = {A.name: [], B.name: []}
        for k in range(arrivals):
            name, _ = assign(spec, f"salt {run}", "exp_1", f"del_{k}")
            marks = drawn(shift if name == A.name else 0.0, rng)[0][:, None]
            arms[name].append((marks, marks))
        differences = matched(arms[A.name], arms[B.name]).mean_difference
        crossings.append(first_crossing(log_e_values(to_unit(differences))))
    return float(np.isfinite(crossings).mean())


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_between_no_difference_is_declared_seldom_however_often_one_looks(weight):
    rng, runs = np.random.default_rng(3), 400
    assert between_stops(runs, 120, weight, 0.0, rng) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_between_a_true_difference_is_found():
    assert between_stops(40, 200, 1.0, 1.5, np.random.default_rng(4)) > 0.8
