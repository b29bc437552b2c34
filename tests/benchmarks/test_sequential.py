"""The sequential benchmark: its simulated groups against their exact truth, and its parts in small."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import rating_model, sequential


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_exact_truth_is_what_simulation_gives(shift):
    known = rating_model.truth(shift)
    a, b = rating_model.draw_ratings((100_000,), shift, np.random.default_rng(0))
    difference = a.mean(-1) - b.mean(-1)
    assert difference.mean() == pytest.approx(known.difference, abs=0.012)
    assert difference.std() == pytest.approx(known.difference_sd, abs=0.01)
    outcome = (np.sign(np.round(difference, 9)) + 1) / 2
    assert outcome.mean() == pytest.approx(known.win_rate, abs=0.006)
    assert outcome.std() == pytest.approx(known.win_sd, abs=0.004)
    assert ((np.sign(a - b) + 1) / 2).mean() == pytest.approx(known.member_win_rate, abs=0.004)


def test_the_setting_is_the_one_of_the_reference():
    known = rating_model.truth(0.5)
    assert known.difference == pytest.approx(0.46, abs=0.01) and known.difference_sd == pytest.approx(0.85, abs=0.01)
    assert rating_model.truth(rating_model.shift_for(0.6)).win_rate == pytest.approx(0.6, abs=1e-6)


def test_the_sequence_passes_the_gate_and_the_repeated_z_test_does_not():
    found = sequential.false_stops(200, 80, np.random.default_rng(1))
    assert found["passed"]
    for name in sequential.MEASURES:
        assert found[name]["sequence"] <= found["gate"] < 0.15 < found[name]["z_every_look"]
        assert found[name]["interval_and_e_value_disagree"] == 0


def test_power_needs_more_than_one_look_and_less_than_twenty():
    row = sequential.power("mean_difference", 0.7, 100, 200, np.random.default_rng(2))
    assert row["one_look"] == 29 and row["half"] < row["most"] and 29 < row["most"] < 120
    assert sequential.power("win_rate", 0.6, 20, 5, np.random.default_rng(2))["most"] is None


def test_reached_counts_the_experiments():
    stops = np.array([3.0, 1.0, math.inf, 2.0, 4.0])
    assert (sequential.reached(stops, 0.5), sequential.reached(stops, 0.8), sequential.reached(stops, 1.0)) == (
        3,
        4,
        None,
    )


def test_z_stops_where_a_z_test_does():
    values = np.random.default_rng(3).random((3, 40)) * [[1.0], [0.8], [0.6]]
    for row, found in zip(values, sequential.z_stops(values), strict=True):
        hits = [
            n for n in range(10, 41)
            if abs(row[:n].mean() - 0.5) / (row[:n].std(ddof=1) / math.sqrt(n)) > 1.959964
        ]  # fmt: skip
        assert found == (hits[0] if hits else math.inf)


def test_a_biased_assignment_is_caught():
    rng = np.random.default_rng(4)
    assert sequential.ratio_alerts(0.6, (400,), 500, rng)["400"] > 0.7
    assert sequential.ratio_alerts(0.5, (400,), 500, rng)["400"] < 0.01
