"""The experiment's benchmark: whose verdict is right, and the gold figures beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.experiment import ARMS, agrees, compared, gold_figures

GOLD = np.array([[4.0, 5.0], [3.0, 3.0], [2.0, 4.0], [6.0, 5.0]])


def test_a_verdict_agrees_with_the_higher_gold_mean():
    better, worse = f"{ARMS[1]['name']} better", f"{ARMS[0]['name']} better"
    assert agrees(better, GOLD) is True and agrees(worse, GOLD) is False and agrees("undecided", GOLD) is None


def test_gold_figures_count_ties_half():
    found = gold_figures(GOLD)
    assert found["win_rate"]["value"] == pytest.approx(1.5 / 4, abs=1e-3)
    assert found["mean_difference"]["value"] == pytest.approx(-0.5)
    assert found["mean_difference"]["low"] <= -0.5 <= found["mean_difference"]["high"]


def test_the_same_pair_is_found_in_a_comparison(tmp_path):
    assert compared(tmp_path) is None
    rows = [{"n_a": 16, "n_b": 16, "win_rate": 0.5}, {"n_a": 1, "n_b": 16, "win_rate": 0.2}]
    (tmp_path / "comparison.json").write_text(json.dumps({"win_rate_best_of": rows}))
    assert compared(tmp_path) == rows[1]
