"""The comparison over a synthetic world in which every rating is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from deliberation.types import Deliberation, InputError
from evaluation.comparison import compare
from evaluation.judging import Sampled
from evaluation.measures import kl_best_of_n

from world import PREFERENCE, TableGold, make_world

ARMS = ["base", "sft", "sft_best_of_16", "ppo", "ppo_best_of_16", "best_opinion"]


def run(sampled, gold, **keys):
    settings = {"welfare": "nash", "preference": PREFERENCE, "versions": {"sft": "ab"}, "seconds": {"ppo": 1.5}}
    return compare(sampled, gold, **{**settings, "draws": 300, **keys})


@pytest.fixture(scope="module")
def world():
    return make_world(60)


@pytest.fixture(scope="module")
def comparison(world):
    return run(*world)


def pair(comparison, a, b):
    return next(row for row in comparison["pairs"] if (row["a"], row["b"]) == (a, b))


def by_hand() -> tuple[list[Sampled], TableGold]:
    """One deliberation of two members and two candidates, all ratings written out."""
    table = {
        "Base.": [2, 4], "Sft one.": [3, 5], "Sft two here.": [6, 5], "Ppo one.": [4, 4], "Ppo two.": [7, 2],
        "I say yes.": [7, 1], "I say no.": [4, 5],
    }  # fmt: skip
    one = Sampled(
        Deliberation("d", "Should we?", ("I say yes.", "I say no.")), "Base.", ("Sft one.", "Sft two here."),
        ("Ppo one.", "Ppo two."), np.array([[3.0, 5.0], [3.0, 5.0]]), np.array([[4.0, 6.0], [4.0, 1.0]]),
        np.array([1.0, 3.0]), np.array([0.0, 1.0]),
    )  # fmt: skip
    return [one], TableGold([{k: np.array(v, dtype=float) for k, v in table.items()}], voice=1.0)


def test_every_arm_by_hand():
    arms = run(*by_hand(), welfare="utilitarian")["arms"]
    assert {name: row["mean"] for name, row in arms.items()} == {
        "base": 3, "sft": 4, "sft_best_of_2": 5.5, "ppo": 4, "ppo_best_of_2": 4, "best_opinion": 4.5,
    }  # fmt: skip
    assert {name: row["min"] for name, row in arms.items()} == {
        "base": 2, "sft": 3, "sft_best_of_2": 5, "ppo": 4, "ppo_best_of_2": 4, "best_opinion": 4,
    }  # fmt: skip
    assert arms["sft_best_of_2"]["unanimity"] == 1 and arms["best_opinion"]["unanimity"] == 0
    assert arms["sft_best_of_2"]["length"] == 3 and arms["base"]["length"] == 1
    assert arms["sft"]["quality"] == 4.5 and arms["sft"]["predicted"] == 3 and arms["best_opinion"]["predicted"] is None


def test_the_run_welfare_chooses_the_candidate():
    # predicted (4, 4) and (6, 1): mean 4 against 3.5, minimum 4 against 1; the second SFT candidate wins everywhere
    sampled, gold = by_hand()
    sampled = [replace(sampled[0], ppo_utilities=np.array([[3.0, 7.0], [3.0, 1.0]]))]
    assert run(sampled, gold, welfare="utilitarian")["arms"]["ppo_best_of_2"]["min"] == 2
    assert run(sampled, gold, welfare="rawlsian")["arms"]["ppo_best_of_2"]["min"] == 4


def test_kl_of_every_arm_by_hand():
    arms = run(*by_hand(), welfare="utilitarian")["arms"]
    assert arms["sft"]["kl"] == 0 and arms["base"]["kl"] == 0.5 and arms["best_opinion"]["kl"] is None
    assert arms["sft_best_of_2"]["kl"] == pytest.approx(kl_best_of_n(2))
    assert arms["ppo"]["kl"] == pytest.approx(2.0)
    assert arms["ppo_best_of_2"]["kl"] == pytest.approx(kl_best_of_n(2) + 2.0)
    assert arms["best_opinion"]["undefined"] == {"kl": 1}


def test_ties_count_half_and_are_counted():
    row = pair(run(*by_hand()), "ppo", "sft")  # both have the gold mean 4; the minimum decides for ppo
    assert (row["win_rate"], row["ties"], row["n"], row["without_ties"]) == (0.5, 1, 1, None)
    assert row["min"]["win_rate"] == 1 and row["min"]["without_ties"] == 1


def test_without_voice_penalty_changes_only_personal_texts():
    comparison = run(*by_hand())
    with_, without = comparison["arms"], comparison["without_voice_penalty"]["arms"]
    assert without["best_opinion"]["mean"] == 5.5 and with_["best_opinion"]["mean"] == 4.5
    assert without["best_opinion"]["quality"] > with_["best_opinion"]["quality"] == 5
    assert without["sft_best_of_2"] == with_["sft_best_of_2"]


def test_best_opinion_is_the_best_by_gold_mean(world, comparison):
    sampled, gold = world
    best = [max(gold.tables[i][o].mean() for o in one.deliberation.opinions) for i, one in enumerate(sampled)]
    assert comparison["arms"]["best_opinion"]["mean"] == pytest.approx(np.mean(best))


def test_shape_of_the_file(comparison):
    assert list(comparison["arms"]) == ARMS
    for row in comparison["arms"].values():
        assert {"mean", "min", "quality", "unanimity", "length", "kl"} <= set(row)
    pairs = [(row["a"], row["b"]) for row in comparison["pairs"]]
    assert sorted(pairs) == sorted((a, b) for a in ARMS for b in ARMS if a != b)
    assert all({"win_rate", "low", "high", "n"} <= set(row) for row in comparison["pairs"])
    assert comparison["preference"] == PREFERENCE and comparison["seed"] == 0
    assert comparison["versions"] == {"sft": "ab"} and comparison["seconds"] == {"ppo": 1.5}
    assert set(comparison["without_voice_penalty"]) == {"arms", "pairs"}


def test_json_holds_no_nan_and_round_trips(comparison):
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_pairs_are_antisymmetric_with_mirrored_intervals(comparison):
    for row in comparison["pairs"]:
        back = pair(comparison, row["b"], row["a"])
        assert row["win_rate"] + back["win_rate"] == pytest.approx(1)
        assert row["low"] + back["high"] == pytest.approx(1, abs=1e-6)


def test_a_lift_of_half_a_point_is_found_and_none_is_not(comparison):
    assert pair(comparison, "ppo", "sft")["low"] > 0.5
    level = [pair(run(*make_world(60, size=1, lift=0.0, seed=seed)), "ppo", "sft") for seed in range(30)]
    assert sum(row["low"] <= 0.5 <= row["high"] for row in level) >= 25  # expected: 28.5


def test_best_of_curve_ends_at_the_arms(comparison):
    for policy in ("sft", "ppo"):
        rows = comparison["best_of"][policy]
        assert [row["n"] for row in rows] == [1, 2, 4, 8, 16]
        arm = comparison["arms"][f"{policy}_best_of_16"]
        for name in ("mean", "min", "welfare", "predicted", "kl"):
            assert rows[-1][name] == pytest.approx(arm[name])
        assert all(a["welfare"] < b["welfare"] for a, b in zip(rows, rows[1:], strict=False))
        assert all(row["low"] < row["welfare"] < row["high"] for row in rows)


def test_best_of_one_is_the_mean_of_the_pool(world, comparison):
    sampled, gold = world
    pool = [np.mean([gold.tables[i][s].mean() for s in one.sft]) for i, one in enumerate(sampled)]
    assert comparison["best_of"]["sft"][0]["mean"] == pytest.approx(np.mean(pool))


def test_win_rate_best_of(world, comparison):
    rows = {(row["n_a"], row["n_b"]): row for row in comparison["win_rate_best_of"]}
    assert set(rows) == {(n, n) for n in (1, 2, 4, 8, 16)} | {(1, n) for n in (2, 4, 8, 16)}
    assert rows[16, 16]["win_rate"] == pytest.approx(pair(comparison, "ppo_best_of_16", "sft_best_of_16")["win_rate"])
    sampled, gold = world
    means = [[[gold.tables[i][s].mean() for s in pool] for pool in (one.ppo, one.sft)] for i, one in enumerate(sampled)]
    brute = np.mean([[[a > b for b in sft] for a in ppo] for ppo, sft in means])
    assert rows[1, 1]["win_rate"] == pytest.approx(brute)
    assert rows[1, 16]["win_rate"] < rows[1, 1]["win_rate"]


def test_unmeasured_kl_is_null_and_counted(world):
    sampled, gold = world
    part = [
        replace(one, ppo_log_ratios=None, base_log_ratios=None) if i >= 20 else one for i, one in enumerate(sampled)
    ]
    none = [replace(one, ppo_log_ratios=None, base_log_ratios=None) for one in sampled]
    some, nothing = run(part, gold), run(none, gold)
    assert some["arms"]["ppo"]["kl"] == pytest.approx(np.mean([one.ppo_log_ratios.mean() for one in sampled[:20]]))
    assert some["arms"]["ppo"]["undefined"] == {"kl": 40}
    assert nothing["arms"]["ppo"]["kl"] is None and nothing["best_of"]["ppo"][0]["kl"] is None
    assert nothing["best_of"]["ppo"][0]["welfare"] is not None


def test_same_input_same_output_and_the_seed_moves_only_intervals(world, comparison):
    assert run(*world) == comparison
    other = run(*world, seed=1)
    assert pair(other, "ppo", "sft")["win_rate"] == pair(comparison, "ppo", "sft")["win_rate"]
    assert any(a["low"] != b["low"] for a, b in zip(other["pairs"], comparison["pairs"], strict=True))


def test_members_order_does_not_matter(world, comparison):
    sampled, gold = world
    turned, tables = [], [{k: v[::-1] for k, v in table.items()} for table in gold.tables]
    for one in sampled:
        d = replace(one.deliberation, opinions=one.deliberation.opinions[::-1])
        turned.append(replace(one, deliberation=d, sft_utilities=one.sft_utilities[::-1],
                              ppo_utilities=one.ppo_utilities[::-1]))  # fmt: skip
    other = run(turned, TableGold(tables))
    for arm in ARMS:
        assert other["arms"][arm]["welfare"] == pytest.approx(comparison["arms"][arm]["welfare"])


def test_examples_are_typical(comparison):
    means = [one["arms"]["ppo"]["mean"] for one in comparison["examples"]]
    assert means[1] < means[0] < means[2]  # lower quartile < median < upper quartile
    assert set(comparison["examples"][0]["arms"]) == set(ARMS)


def test_few_deliberations_are_warned_about(comparison):
    assert comparison["warnings"] == []
    assert "descriptive" in run(*make_world(5))["warnings"][0]
    assert "too short" in run(*make_world(20))["warnings"][0]


def test_gold_off_the_scale_is_refused():
    sampled, gold = by_hand()
    gold.tables[0]["Base."] = np.array([0.0, 4.0])
    with pytest.raises(InputError, match="agreement.*from 1 to 7"):
        run(sampled, gold)
    gold.tables[0]["Base."] = np.array([math.nan, 4.0])
    with pytest.raises(InputError, match="agreement"):
        run(sampled, gold)


def test_bad_input_names_field_and_mend(world):
    sampled, gold = world
    with pytest.raises(InputError, match="held-out"):
        run([], gold)
    with pytest.raises(InputError, match="same number"):
        run([sampled[0], make_world(1, size=4)[0][0]], gold)
    with pytest.raises(InputError, match="welfare"):
        run(sampled, gold, welfare="kantian")
    with pytest.raises(InputError, match="ceiling"):
        run(sampled, gold, preference={"accuracy": 0.8})


def test_utilities_that_do_not_fit_are_refused(world):
    one = world[0][0]
    with pytest.raises(InputError, match="sft_utilities"):
        replace(one, sft_utilities=one.sft_utilities[:, :-1])
    with pytest.raises(InputError, match="ppo_utilities"):
        replace(one, ppo_utilities=one.ppo_utilities * np.nan)
    with pytest.raises(InputError, match="at least one number"):
        replace(one, ppo_log_ratios=np.zeros(0))
    with pytest.raises(InputError, match="as many"):
        replace(one, ppo=one.ppo[:-1])
