"""The demo's own small decisions; the whole of it is ``make demo``."""

from __future__ import annotations

from pathlib import Path

import pytest

from deliberation.types import InputError
from demo import DemoConfig, _clear, deliberation_rows, draw_groups


def test_a_folder_that_no_demo_made_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        _clear(tmp_path)
    assert (tmp_path / "data" / "mine.txt").read_text() == "mine"


def test_an_earlier_demo_is_cleared(tmp_path: Path):
    (tmp_path / "train.log").write_text("")
    (tmp_path / "sft").mkdir()
    (tmp_path / "comparison.json").write_text("{}")
    _clear(tmp_path)
    assert not (tmp_path / "sft").exists() and not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize("key, value", [("candidates", 1), ("min_quality", 8), ("questions", "nowhere.jsonl")])
def test_bad_keys_are_refused_before_anything_starts(key, value):
    with pytest.raises(InputError, match=key):
        DemoConfig(**{key: value})


def test_a_policy_is_trained_rated_compared_and_served_at_one_temperature():
    from demo import stage_config

    ppo, compare, serve = (stage_config(stage) for stage in ("ppo", "compare", "serve"))
    assert ppo.temperature == compare.temperature == serve.temperature
    assert compare.top_p == serve.top_p == 1.0  # PPO's rollouts are pure samples
    assert ppo.max_completion_length == compare.max_new_tokens == serve.max_new_tokens


def test_a_share_of_ppos_groups_speaks_in_other_words():
    groups = draw_groups("train", 40, "other words")
    said, other = ([list(row["opinions"]) for row in deliberation_rows("x", groups, share)] for share in (0.0, 0.5))
    assert said == [[c.opinion for c in g.citizens] for g in groups]
    assert [len(o) for o in other] == [len(s) for s in said]
    assert 10 <= sum(o != s for o, s in zip(other, said, strict=True)) <= 30
