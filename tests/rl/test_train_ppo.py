"""PPO wired to the group reward: in this process, with LoRA, and with Ray actors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from deliberation.types import InputError
from reward.bi_encoder import BiEncoder, make_networks
from reward.preference import Calibration, PreferenceModel
from rl.checkpoints import last_whole
from rl.data import ppo_prompts
from rl.policy import load_policy
from rl.train import PPOScriptConfig, main, train_ppo

import tiny

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    {"question": "Should trams be free?", "opinions": ["Yes, for all.", "No, too dear."]},
    {"question": "Ban cars?", "opinions": ["No.", "Yes, in the centre.", "On Sundays."]},
]


@pytest.fixture
def folders(tmp_path, tiny_tokenizer):
    """(policy, preference model): saved tiny Qwen3 policy, tiny Llama judge."""
    tiny.make_policy(tiny_tokenizer, "qwen3").save_pretrained(tmp_path / "policy")
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0))
    PreferenceModel(tiny.make_judge(tiny_tokenizer), tiny_tokenizer, calibration, {}).save(tmp_path / "judge")
    return str(tmp_path / "policy"), str(tmp_path / "judge")


def settings(tmp_path, folders, **keys) -> PPOScriptConfig:
    defaults = {
        "model_name_or_path": folders[0],
        "preference_model": folders[1],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "num_prompts": 2,
        "num_generations": 2,
        "num_mini_batches": 1,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return PPOScriptConfig(**{**defaults, **keys})


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_updates_save_a_policy_and_log_every_member(tmp_path, folders):
    trainer = train_ppo(settings(tmp_path, folders), ROWS)
    assert trainer.state.global_step == 2
    policies = [load_policy(path, device="cpu")[0] for path in (folders[0], str(tmp_path / "run"))]
    before, after = (dict(policy.named_parameters()) for policy in policies)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    updates = [line for line in log_of(tmp_path / "run") if "reward" in line]
    assert len(updates) == 2
    assert {"rewards/group_reward/mean", "rewards/member_0/mean", "rewards/worst_member/mean"} <= set(updates[0])
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


def test_told_to_leave_the_command_says_try_again_and_the_same_command_goes_on(tmp_path, folders):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = dict(deliberations=str(tmp_path / "rows.jsonl"), resume_from_checkpoint="auto", save_strategy="no")
    log = tmp_path / "run" / "log.jsonl"

    def tell():
        while not (log.is_file() and log.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        main(settings(tmp_path, folders, max_steps=500, **keys))
    assert left.value.code == 75
    assert not (tmp_path / "run" / "model.safetensors").exists()  # it is not finished
    step = int(last_whole(tmp_path / "run").rpartition("-")[2])
    assert 1 <= step < 500
    main(settings(tmp_path, folders, max_steps=step + 1, **keys))
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == step + 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_welfare_reaches_the_reward(tmp_path, folders):
    """On the same first samples the worst-off member's utility is below the mean of all."""
    first = {}
    for welfare in ("utilitarian", "rawlsian"):
        run = tmp_path / welfare
        train_ppo(settings(tmp_path, folders, welfare=welfare, output_dir=str(run), max_steps=1), ROWS)
        first[welfare] = next(line for line in log_of(run) if "reward" in line)
    assert first["rawlsian"]["reward"] == pytest.approx(first["rawlsian"]["rewards/worst_member/mean"])
    assert first["rawlsian"]["reward"] < first["utilitarian"]["reward"]


def test_lora_trains_an_adapter(tmp_path, folders):
    keys = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    train_ppo(settings(tmp_path, folders, **keys), ROWS)
    model, _ = load_policy(str(tmp_path / "run"), device="cpu")
    assert isinstance(model, PeftModel)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("use_peft", [True, False])
def test_an_adapter_as_policy_is_merged_so_that_it_is_the_reference(tmp_path, folders, tiny_tokenizer, use_peft):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    fine_tuned = get_peft_model(load_policy(folders[0], device="cpu")[0], lora).eval()
    fine_tuned.save_pretrained(tmp_path / "sft")
    tiny_tokenizer.save_pretrained(tmp_path / "sft")
    keys = {"use_peft": use_peft, "lora_r": 4, "lora_target_modules": ["q_proj"]}
    config = settings(tmp_path, folders, model_name_or_path=str(tmp_path / "sft"), **keys)
    train_ppo(config, ROWS)
    # The KL to the reference starts at 0: the reference is the fine-tuned policy, not its base.
    assert next(line for line in log_of(tmp_path / "run") if "kl" in line)["kl"] == pytest.approx(0, abs=1e-6)
    model, _ = load_policy(str(tmp_path / "run"), device="cpu")
    assert isinstance(model, PeftModel) == use_peft
    if use_peft:  # what is loaded from disk stands on the fine-tuned policy
        ids = torch.tensor([[5, 6, 7, 8]])
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, fine_tuned(input_ids=ids).logits)
    else:  # all of it was trained, not the value head alone
        before = dict(fine_tuned.merge_and_unload().named_parameters())
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() == 2)


def test_a_separate_value_model_starts_from_the_preference_model(tmp_path, folders):
    trainer = train_ppo(settings(tmp_path, folders, separate_value_model=True, value_learning_rate=0.0), ROWS)
    judge = PreferenceModel.load(folders[1]).model
    inner = trainer.model.value_model
    assert torch.equal(inner.base_model.embed_tokens.weight, judge.base_model.embed_tokens.weight)
    assert (tmp_path / "run" / "value_model").is_dir()


def test_a_value_model_with_another_tokenizer_is_refused(tmp_path, folders, tiny_tokenizer):
    policy = tmp_path / "policy"
    text = (policy / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    (policy / "tokenizer.json").write_text(text)
    (policy / "tokenizer_config.json").write_text(
        (policy / "tokenizer_config.json").read_text().replace('"</s>"', '"<end>"')
    )
    with pytest.raises(InputError, match="another tokenizer"):
        train_ppo(settings(tmp_path, folders, separate_value_model=True), ROWS)


def test_main_reads_files_and_evaluates(tmp_path, folders, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main(
        settings(
            tmp_path,
            folders,
            deliberations=str(path),
            eval_deliberations=str(path),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
        )
    )
    assert any("eval/reward" in line for line in log_of(tmp_path / "run"))
    assert "nash welfare in 1 updates" in capsys.readouterr().out


@pytest.mark.slow
def test_ray_actors_give_the_same_training_as_this_process(tmp_path, folders, ray_cluster):
    local = train_ppo(settings(tmp_path, folders, output_dir=str(tmp_path / "local")), ROWS)
    remote = train_ppo(settings(tmp_path, folders, output_dir=str(tmp_path / "remote"), reward_actors=2), ROWS)
    for (name, a), (_, b) in zip(local.model.named_parameters(), remote.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


OWN_RAY = """
import os, sys
from rl.train import PPOScriptConfig, hosted_scorer
config = PPOScriptConfig(preference_model=sys.argv[1], output_dir=sys.argv[2], reward_actors=1, use_cpu=True)
with hosted_scorer(config) as scorer:
    print(os.environ["RAY_AUTH_MODE"], scorer.score_sync("Why?", ["Yes."], ["No."]).utilities.shape)
"""


@pytest.mark.slow
def test_a_ray_of_its_own_asks_for_a_token_and_leaves_nothing(tmp_path, folders):
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as short:  # Ray's socket names must be short
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": short, "HOME": str(tmp_path / "home")}
        for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
            environment.pop(name, None)
        words = [sys.executable, "-c", OWN_RAY, folders[1], str(tmp_path / "run")]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip().endswith("token (1, 1)")
        assert list(Path(short).glob("consensus-*")) == []
    assert not (tmp_path / "home" / ".ray").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"welfare": "kindness"}, "welfare"),
        ({"welfare": "-1"}, "welfare"),
        ({"reward_actors": -1}, "reward_actors"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"preference_model": None}, "preference_model"),
        ({"preference_model": "nowhere"}, "preference_model"),
        ({"preference_model": "nowhere", "reward_actors": 1}, "preference_model"),
        ({"model_name_or_path": None}, "model_name_or_path"),
    ],
)
def test_bad_keys_are_named_and_nothing_is_written(tmp_path, folders, change, field):
    with pytest.raises(InputError) as error:
        train_ppo(settings(tmp_path, folders, **change), ROWS)
    assert error.value.field == field
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_named(tmp_path, folders):
    with pytest.raises(InputError, match="at least one row"):
        train_ppo(settings(tmp_path, folders), [])
    with pytest.raises(InputError) as error:
        ppo_prompts([ROWS[0], {"question": "Why?", "opinions": []}])
    assert error.value.field == "deliberations row 1: opinions"
    with pytest.raises(InputError) as error:
        ppo_prompts([ROWS[0], {"question": "Why?", "opinions": 5}])
    assert error.value.field == "deliberations row 1: opinions"
    with pytest.raises(InputError, match="every row or in none"):
        ppo_prompts([{**ROWS[0], "weights": [1.0, 2.0]}, ROWS[1]])
    with pytest.raises(InputError) as error:
        main(settings(tmp_path, folders))
    assert error.value.field == "deliberations"


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [0, 0], [1.0, "2"], [True, 1.0], 3.0, "11"],
)
def test_bad_weights_are_named_before_training(weights):
    good = {**ROWS[0], "weights": [1, 0.5]}
    assert ppo_prompts([good])[0]["weights"] == [1, 0.5]
    with pytest.raises(InputError) as error:
        ppo_prompts([good, {**ROWS[0], "weights": weights}], "eval_deliberations")
    assert error.value.field == "eval_deliberations row 1: weights"


@pytest.mark.parametrize("clusters", [["a"], ["a", None], ["a", 1.5], "ab"])
def test_bad_clusters_are_named_before_training(clusters):
    good = {**ROWS[0], "clusters": ["a", 2]}
    assert ppo_prompts([good])[0]["clusters"] == ["a", 2]
    with pytest.raises(InputError) as error:
        ppo_prompts([good, {**ROWS[0], "clusters": clusters}])
    assert error.value.field == "deliberations row 1: clusters"


def test_worst_cluster_without_clusters_is_refused_before_training(tmp_path, folders):
    config = settings(tmp_path, folders, welfare="worst_cluster")
    with pytest.raises(InputError) as error:
        train_ppo(config, ROWS)
    assert error.value.field == "deliberations: clusters"
    assert not Path(config.output_dir).exists()


def test_a_penalty_on_uncertainty_without_an_ensemble_is_refused_before_training(tmp_path, folders):
    config = settings(tmp_path, folders, uncertainty_penalty=1.0)
    with pytest.raises(InputError, match="heads: 4") as error:
        train_ppo(config, ROWS)
    assert error.value.field == "preference_model"
    assert not Path(config.output_dir).exists()
    with pytest.raises(InputError, match="uncertainty_penalty"):
        settings(tmp_path, folders, uncertainty_penalty=-1.0)


def test_a_group_whose_opinions_leave_no_room_for_a_statement_is_named_before_training(tmp_path, folders):
    long = {"question": "Ban cars?", "opinions": ["No.", "word " * 396]}  # the tiny judge reads 2048 bytes
    train_ppo(settings(tmp_path, folders, max_steps=1), [*ROWS, long])
    config = settings(tmp_path, folders, max_completion_length=40, output_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match="max_completion_length") as error:
        train_ppo(config, ROWS, [*ROWS, long])
    assert error.value.field == "eval_deliberations row 2: opinions[1]"
    assert not Path(config.output_dir).exists()


def test_an_opinion_that_the_bi_encoder_cannot_read_is_named_before_training(tmp_path, folders):
    tokenizer = tiny.make_encoder_tokenizer()  # reads 512 bytes a line, the judge 2048
    judge = PreferenceModel.load(folders[1])
    judge.bi_encoder = BiEncoder(tiny.make_encoder(tokenizer).bert, tokenizer, make_networks(32, 1))
    judge.save(folders[1])
    with pytest.raises(InputError, match="bi-encoder reads") as error:
        train_ppo(settings(tmp_path, folders), [*ROWS, {"question": "Ban cars?", "opinions": ["word " * 120]}])
    assert error.value.field == "deliberations row 2: opinions[0]"


def test_weights_reach_the_reward(tmp_path, folders):
    first = []
    for weights in ([1.0, 1.0], [1.0, 0.0]):
        run = tmp_path / str(weights[1])
        train_ppo(
            settings(tmp_path, folders, output_dir=str(run), max_steps=1, num_prompts=1),
            [{**ROWS[0], "weights": weights}],
        )
        first.append(next(line for line in log_of(run) if "reward" in line))
    assert first[1]["reward"] == pytest.approx(first[1]["rewards/member_0/mean"])
    assert first[0]["reward"] != pytest.approx(first[1]["reward"])
