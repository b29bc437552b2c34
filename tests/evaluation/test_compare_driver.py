"""The driver on tiny random models: what it samples, scores, measures and writes."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch

from deliberation.prompts import clean_statement, statement_prompt
from deliberation.questions import invented_question
from deliberation.types import InputError
from evaluation import compare as driver
from evaluation.compare import CompareConfig, Policies, gather, gather_all
from evaluation.gold import held_out_groups
from reward.preference import Calibration, PreferenceModel
from reward.scoring import score
from rl.policy import sample, sequence_logprobs

import tiny
from world import PREFERENCE, make_world

QUESTIONS = [invented_question(Random(i), held_out=True) for i in range(4)]


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny.make_tokenizer()
    policies = Policies(*((tiny.make_policy(tokenizer, seed=seed), tokenizer) for seed in (0, 1, 2)))
    judge = PreferenceModel(tiny.make_judge(tokenizer), tokenizer, Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)))
    groups = held_out_groups(QUESTIONS, 3, seed=0)
    return policies, judge, [g.deliberation(f"d{i}") for i, g in enumerate(groups)], groups


def config(**keys) -> CompareConfig:
    return CompareConfig(**{"num_candidates": 3, "max_new_tokens": 6, "kl_deliberations": 2, **keys})


@pytest.fixture(scope="module")
def gathered(parts):
    policies, judge, deliberations, _ = parts
    return gather(config(), deliberations, policies, judge)


def test_utilities_are_those_of_the_scoring_path(parts, gathered):
    _, judge, deliberations, _ = parts
    for one, d in zip(gathered, deliberations, strict=True):
        spoken = [k for k, text in enumerate(one.ppo) if text]
        expected = score(judge, d.question, d.opinions, [one.ppo[k] for k in spoken]).utilities
        np.testing.assert_allclose(one.ppo_utilities[:, spoken], expected, atol=1e-5)


def test_empty_statement_gets_the_lowest_utility(parts):
    _, judge, deliberations, _ = parts
    d = deliberations[0]
    found = driver.pool_utilities(judge, d, ["", "We should plan."])
    np.testing.assert_array_equal(found[:, 0], np.ones(len(d.opinions)))
    assert (found[:, 1] > 1).all()
    np.testing.assert_array_equal(driver.pool_utilities(judge, d, ["", ""]), np.ones((len(d.opinions), 2)))


def test_log_ratios_are_policy_minus_reference(parts, gathered):
    policies, _, deliberations, _ = parts
    d = deliberations[1]
    prompt, (model, tokenizer) = statement_prompt(d.question, d.opinions), policies.ppo
    seed = driver._seed(0, "ppo for the KL", 1)
    (pool,) = sample(model, tokenizer, [prompt], n=4, seeds=[seed], max_new_tokens=6)  # pure: top_p 1
    with torch.no_grad():
        for k, one in enumerate(pool):
            row = ([tokenizer(prompt).input_ids], [one.ids])
            (ours,), (theirs,) = sequence_logprobs(model, *row), sequence_logprobs(policies.sft[0], *row)
            assert gathered[1].ppo_log_ratios[k] == pytest.approx(float((ours - theirs).sum()), abs=1e-4)


def test_candidates_are_sampled_as_they_are_served(parts, gathered):
    policies, _, deliberations, _ = parts
    d = deliberations[1]
    prompt, (model, tokenizer) = statement_prompt(d.question, d.opinions), policies.ppo
    keys = {"n": 3, "seeds": [driver._seed(0, "ppo", 1)], "max_new_tokens": 6}
    (served,) = sample(model, tokenizer, [prompt], top_p=0.8, **keys)
    assert tuple(clean_statement(s.text) for s in served) == gathered[1].ppo  # alone as in the batch


def test_kl_of_the_sft_policy_to_itself_is_zero(parts):
    policies, judge, deliberations, _ = parts
    same = Policies(policies.sft, policies.sft, policies.sft)
    for one in gather(config(), deliberations[:1], same, judge):
        np.testing.assert_array_equal(one.ppo_log_ratios, np.zeros(4))
        assert one.ppo != one.sft  # the same policy, but its own random numbers


def test_kl_is_measured_on_the_first_deliberations_only(gathered):
    assert [one.ppo_log_ratios is None for one in gathered] == [False, False, True]


def test_parts_and_processes_change_no_result(parts, gathered, folders, monkeypatch):
    policies, judge, deliberations, _ = parts
    monkeypatch.setattr(driver, "PART", 2)
    models = driver.load_models(config(**paths(folders)))
    for workers in (1, 2):
        found = gather_all(config(**paths(folders), workers=workers), deliberations, models)
        for one, expected in zip(found, gathered, strict=True):
            assert (one.base, one.sft, one.ppo) == (expected.base, expected.sft, expected.ppo)
            np.testing.assert_allclose(one.ppo_utilities, expected.ppo_utilities, atol=1e-5)
            assert (one.ppo_log_ratios is None) == (expected.ppo_log_ratios is None)


def test_written_files_hold_the_whole_comparison(tmp_path):
    sampled, gold = make_world(4, size=2)
    result = driver.compare(sampled, gold, welfare="nash", preference=PREFERENCE, versions={}, seconds={}, draws=50)
    path = driver.write_comparison(tmp_path / "new", result, sampled)
    assert json.loads(path.read_text()) == result
    lines = [json.loads(line) for line in (path.parent / "statements.jsonl").read_text().splitlines()]
    assert [line["ppo"] for line in lines] == [list(one.ppo) for one in sampled]
    assert sorted(p.name for p in path.parent.iterdir()) == ["comparison.json", "statements.jsonl"]


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    policies, judge, _, _ = parts
    for name in ("base", "sft", "ppo"):
        model, tokenizer = getattr(policies, name)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    judge.save(root / "judge")
    rows = [{"question": q.text, "affirming_statement": q.affirming, "negating_statement": q.negating,
             "topic": q.topic} for q in QUESTIONS]  # fmt: skip
    (root / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def paths(root, **keys) -> dict:
    models = {f"{name}_model": str(root / name) for name in ("base", "sft", "ppo")}
    return {**models, "preference_model": str(root / "judge"), "questions": str(root / "questions.jsonl"), **keys}


def test_main_from_folders_to_report(folders, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 3.5}\n{"step": 2, "reward": 3.')  # torn last line
    out = tmp_path / "run"
    keys = paths(folders, output_dir=str(out), ppo_log=str(tmp_path / "log.jsonl"), num_deliberations=3)
    result = driver.main(config(**keys))
    written = json.loads((out / "comparison.json").read_text())
    assert written == result
    assert list(written["arms"]) == ["base", "sft", "sft_best_of_3", "ppo", "ppo_best_of_3", "best_opinion"]
    assert {"accuracy", "ceiling", "correlation", "longest", "overlap"} <= set(written["preference"])
    assert set(written["versions"]) == {"base", "sft", "ppo", "preference"}
    assert (out / "report.html").is_file() and str(out / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sft_model", ""), ("ppo_model", "/no/such/folder"), ("preference_model", "/no/such/folder"),
        ("welfare", "kantian"), ("questions", "/no/such/file"), ("ppo_log", "/no/such/log"),
    ],
)  # fmt: skip
def test_bad_keys_are_named_and_leave_no_run_folder(folders, tmp_path, field, value):
    out = tmp_path / "run"
    with pytest.raises(InputError) as error:
        driver.main(config(**paths(folders, output_dir=str(out), **{field: value})))
    assert error.value.field in (field, "model_name_or_path")
    assert not out.exists()


@pytest.mark.parametrize("field", ["num_candidates", "num_deliberations", "batch_size", "max_new_tokens"])
def test_counts_below_one_are_refused(field):
    with pytest.raises(InputError, match=field):
        config(**{field: 0})
    with pytest.raises(InputError, match="kl_deliberations"):
        config(kl_deliberations=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("questions", "runs/nowhere.jsonl")],
)  # fmt: skip
def test_sampling_keys_and_files_are_checked_before_anything_is_loaded(field, value):
    with pytest.raises(InputError) as error:
        config(**{field: value})
    assert error.value.field == field
