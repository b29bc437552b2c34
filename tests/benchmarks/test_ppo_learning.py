"""The learning benchmark's measures, on pools whose figures are known by hand, and its pools on the embedded writer."""

import math

import numpy as np
import pytest

from benchmarks.ppo_learning import check_settings, interval
from benchmarks.ppo_learning_plot import plot
from benchmarks.ppo_pools import Pool, best_of, draw_pool, wins, worth
from deliberation.types import InputError
from demo import draw_groups, stage_config
from embedded import resolve
from reward.preference import PreferenceModel


def pool(gold, predicted=None):
    gold = np.array(gold, dtype=float)
    return Pool(gold, gold, gold if predicted is None else np.array(predicted, dtype=float), np.zeros_like(gold))


def test_a_win_counts_all_pairs_of_samples_and_half_of_a_tie():
    a, b = pool([[1, 4]]), pool([[2, 4]])
    np.testing.assert_allclose(wins(a, 1, b, 1), [(0 + 0 + 1 + 0.5) / 4])
    np.testing.assert_allclose(wins(a, 2, b, 1), [(1 + 0.5) / 2])


def test_best_of_n_selects_by_what_is_predicted_and_is_judged_by_gold():
    misled = pool([[1, 2, 6]], predicted=[[3, 2, 1]])
    assert best_of(misled, 3)["gold"] == 1 and best_of(misled, 3)["predicted"] == 3
    assert best_of(misled, 1)["gold"] == pytest.approx(3)


def test_a_sample_is_worth_the_n_whose_best_has_the_same_gold_mean():
    sft = pool([[1, 2, 3, 4]])  # best of 1, 2, 3, 4: 2.5, 3.33, 3.75, 4
    assert worth(pool([[2.5] * 4]), sft) == pytest.approx(1)
    assert worth(pool([[3.75] * 4]), sft) == pytest.approx(3)
    assert math.isnan(worth(pool([[2.4] * 4]), sft)) and worth(pool([[4.1] * 4]), sft) == math.inf


def test_an_interval_is_as_wide_as_seeds_and_groups_make_it():
    same = interval(np.full((3, 20), 0.6))
    assert same["low"] == same["high"] == same["value"] == 0.6
    by_seed = interval(np.repeat([[0.0], [1.0]], 50, axis=1))  # the groups agree, the seeds do not
    assert by_seed["low"] == 0 and by_seed["high"] == 1 and by_seed["seeds"] == [0, 1]


def test_pools_of_the_embedded_writer_and_their_plot(tmp_path):
    groups, writer = draw_groups("validation", 2, "pools", held_out=True), resolve("embedded/writer")
    judge = PreferenceModel.load(resolve("embedded/judge"), device="cpu")
    config = stage_config("compare", num_candidates=3)
    found = draw_pool(writer, writer, judge, groups, config, seed=5)
    assert found.gold.shape == found.predicted.shape == (2, 3)
    assert ((found.gold >= 1) & (found.gold <= 7)).all()
    np.testing.assert_allclose(found.log_ratios, 0, atol=1e-5)  # the policy is its own reference
    again = draw_pool(writer, writer, judge, groups, config, seed=6)
    assert (again.gold != found.gold).any()
    run = [{"kl": 0.0, "welfare": 3.0, "predicted": 3.1}, {"kl": 2.0, "welfare": 4.0, "predicted": 4.2}]
    plot({"ppo": [run]}, [{"kl": 0.0, "welfare": 3.0, "predicted": 3.0}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_what_was_kept_with_other_settings_is_not_reported_under_these(tmp_path):
    check_settings(tmp_path, {"updates": 40})
    check_settings(tmp_path, {"updates": 40})
    with pytest.raises(InputError, match="updates"):
        check_settings(tmp_path, {"updates": 80})
