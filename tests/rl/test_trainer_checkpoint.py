"""Saving, resuming bit for bit, adapters, held-out evaluation, files a run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from ppo_helpers import ROWS, ascii_share, changed, make_trainer, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from deliberation.types import InputError
from rl.checkpoints import damage, to_resume
from rl.inputs import collate
from rl.logs import PromptStream, read_log

import tiny

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


class Kill(TrainerCallback):
    """Dies in the middle of an update, after the checkpoint of the one before (as SIGKILL would: nothing cleans up)."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def timeless(path: Path) -> list[dict]:
    drop = ("time/", "train_runtime", "train_samples", "train_steps", "train_loss")
    return [{k: v for k, v in line.items() if not k.startswith(drop)} for line in read_log(path / "log.jsonl")]


RUN = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=2,
    eval_strategy="steps",
    eval_steps=3,
    lr_scheduler_type="linear",
    weight_decay=0.01,
    kl_target=0.01,
    kl_horizon=50,
)


@pytest.mark.parametrize("layout", ["head", "value_model", "lora"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(layout, tmp_path):
    def build(folder, **kwargs):
        torch.manual_seed(0)
        layouts = {
            "head": {},
            "value_model": {"value_model": tiny.make_judge(tiny.make_tokenizer())},
            "lora": {"peft_config": LoraConfig(**LORA)},
        }
        return make_trainer(folder, eval_dataset=ROWS[:3], **RUN, **layouts[layout], **kwargs)

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", callbacks=[Kill(5)]).train()
    torch.manual_seed(12345)
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(whole.model))
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert same(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert resumed.beta == whole.beta != whole.args.beta


def without_head(folder):
    (folder / "value_model" / "value_head.safetensors").unlink()


def cut_short(folder):
    (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-100])


def torn_list(folder):
    (folder / "checkpoint.json").write_text((folder / "checkpoint.json").read_text()[:-9])


def unsealed(folder):
    (folder / "checkpoint.json").unlink()


@pytest.mark.parametrize(
    "tear, says",
    [
        (without_head, "lacks value_model"),
        (cut_short, "optimizer.pt has"),
        (torn_list, "cut short"),
        (unsealed, "not finished"),
    ],
)
def test_a_torn_checkpoint_is_told_and_the_one_before_is_used(tear, says, tmp_path, caplog):
    settings = {**RUN, "max_steps": 4, "eval_strategy": "no"}
    make_trainer(tmp_path, **settings).train()
    tear(tmp_path / "checkpoint-4")
    with pytest.raises(InputError, match=says):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert to_resume(True, str(tmp_path)) == to_resume("auto", str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert says in caplog.text
    tear(tmp_path / "checkpoint-2")
    assert to_resume("auto", str(tmp_path)) is None
    with pytest.raises(InputError, match="no whole checkpoint"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_a_new_run_does_not_start_among_the_checkpoints_of_another(tmp_path):
    """``auto`` would take the other's for its own: the preempted run, tried again, would end as the old one did."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    before = sorted(path.name for path in tmp_path.iterdir()), read_log(tmp_path / "log.jsonl")
    with pytest.raises(InputError, match="output_dir.*holds checkpoints"):
        make_trainer(tmp_path, max_steps=2, beta=0.3).train()
    assert (sorted(path.name for path in tmp_path.iterdir()), read_log(tmp_path / "log.jsonl")) == before


def test_a_run_that_goes_back_sets_the_later_checkpoints_aside(tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=3, **run).train()
    for _ in range(2):  # the second time, names are taken
        make_trainer(tmp_path, max_steps=2, beta=0.5, **run).train(str(tmp_path / "checkpoint-1"))
        assert to_resume("auto", str(tmp_path)) == str(tmp_path / "checkpoint-2")
        assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line] == [1, 2]
    kept = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert kept == [
        "aside-1-checkpoint-2",
        "aside-1-checkpoint-3",
        "aside-2-checkpoint-2",
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert damage(tmp_path / "aside-1-checkpoint-3") is None


def test_what_was_not_logged_yet_is_in_the_checkpoint(tmp_path):
    """Logged every four updates, saved every three: the resumed run's means are over all four."""
    run = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "whole", **run).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "killed", callbacks=[Kill(3)], **run).train()
    make_trainer(tmp_path / "killed", **run).train("auto")
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


def test_a_checkpoint_written_again_replaces_the_old_one_and_old_ones_are_deleted_last(tmp_path):
    settings = {**RUN, "max_steps": 6, "eval_strategy": "no", "save_total_limit": 2}
    make_trainer(tmp_path, **settings).train()
    assert {f.name for f in tmp_path.glob("checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    before = (tmp_path / "checkpoint-6" / "checkpoint.json").stat().st_ino
    again = make_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert {f.name for f in tmp_path.glob("checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    assert (tmp_path / "checkpoint-6" / "checkpoint.json").stat().st_ino != before
    assert damage(tmp_path / "checkpoint-6") is None


def test_what_a_checkpoint_holds(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=1, save_strategy="steps", save_steps=1, value_model=tiny.make_judge(tiny.make_tokenizer())
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "ppo_state.json",
        "value_model/value_head.safetensors",
        "value_model/model.safetensors",
    ):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "ppo_state.json").read_text())["num_tokens"] == trainer.num_tokens > 0
    policy = AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, trainer.model.policy(ids).logits)
        value = trainer.model(collate([[1, 40, 41, 42]], [[2]], 0), 1.0).values - trainer.model.value_head.bias
        torch.testing.assert_close(critic(ids).logits[0], value)
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == trainer.processing_class("ab").input_ids


def test_with_adapters_the_reference_is_the_base_and_only_adapters_and_head_learn(tmp_path):
    base = tiny.make_policy(tiny.make_tokenizer())
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        expected = base(ids).logits.clone()
    trainer = make_trainer(
        tmp_path, model=base, peft_config=LoraConfig(**LORA), max_steps=3, save_strategy="steps", save_steps=3
    )
    assert trainer.ref_model is None
    before = weights(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved == {n for n in before if "lora_" in n or "value_head" in n}
    policy = trainer.model.policy.eval()
    with torch.no_grad():
        trained = policy(ids).logits
        with policy.disable_adapter():
            assert torch.equal(policy(ids).logits, expected)
        inputs = collate([[1, 40, 41]], [[42, 43]], 0)
        plain = expected[0].log_softmax(-1)[[2, 3], [42, 43]]
        torch.testing.assert_close(trainer._reference_logprobs(inputs), plain)
        assert not torch.allclose(trained, expected)
        fresh = PeftModel.from_pretrained(tiny.make_policy(tiny.make_tokenizer()), tmp_path / "checkpoint-3").eval()
        assert torch.equal(fresh(ids).logits, trained)
        fresh.merge_and_unload().save_pretrained(tmp_path / "merged")  # one model without adapters, as it is served
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=1e-5)
    assert (tmp_path / "checkpoint-3" / "value_model" / "value_head.safetensors").is_file()


def test_new_adapters_on_a_model_with_adapters_are_refused(tmp_path):
    from peft import get_peft_model

    adapted = get_peft_model(tiny.make_policy(tiny.make_tokenizer()), LoraConfig(**LORA))
    with pytest.raises(InputError, match="peft_config"):
        make_trainer(tmp_path, model=adapted, peft_config=LoraConfig(**LORA))


def test_adapters_trained_further_are_compared_with_where_they_started(tmp_path):
    from peft import get_peft_model

    adapted = get_peft_model(tiny.make_policy(tiny.make_tokenizer()), LoraConfig(**LORA, init_lora_weights=False))
    trainer = make_trainer(tmp_path, model=adapted, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0  # an SFT adapter switched off would not be the start


def test_evaluation_scores_held_out_prompts_with_the_same_luck_each_time(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS[:5], num_generations_eval=3, reward_clip=0.1)
    seen = []
    functions = trainer.reward_functions
    call = functions.functions[0]

    def spy(prompts, completions, **columns):
        seen.append((prompts, completions))
        return call(prompts, completions, **columns)

    functions.functions[0] = spy
    before = weights(trainer.model)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second and not changed(trainer.model, before)
    prompts = [p for batch in seen[: len(seen) // 2] for p in batch[0]]
    assert prompts == [row["prompt"] for row in ROWS[:5] for _ in range(3)]
    raw = [r for batch in seen[: len(seen) // 2] for r in ascii_share(*batch)]
    assert first["eval_reward"] == pytest.approx(sum(raw) / len(raw))  # the raw reward, neither clipped nor penalised
    assert first["eval_kl"] == 0
    assert first["eval_objective"] == pytest.approx(
        sum(min(r, 0.1) for r in raw) / len(raw) - first["eval_completions/clipped_ratio"]
    )
    other = trainer.evaluate(ROWS[5:8])
    assert other["eval_reward"] != first["eval_reward"]


def test_what_a_reward_logs_in_evaluation_is_the_mean_over_all_rows(tmp_path):
    """Five prompts in batches of four and one: the last batch counts for one prompt."""

    def reward(prompts, completions, target, log_metric, **columns):
        values = [float(t) for t in target]
        log_metric("seen", sum(values) / len(values))
        return values

    rows = [{**row, "target": str(i)} for i, row in enumerate(ROWS[:5])]
    trainer = make_trainer(tmp_path, reward, eval_dataset=rows, num_generations_eval=2)
    found = trainer.evaluate()
    assert found["eval_seen"] == pytest.approx(2.0) == found["eval_reward"]


def test_the_best_checkpoint_is_the_one_of_the_best_held_out_reward(tmp_path):
    """A reward that grows, then falls off: the weights at the end are those of the best evaluation."""
    state = {}

    def reward(prompts, completions, trainer_state, **columns):
        state["step"] = trainer_state.global_step
        return [{2: 1.0, 4: 3.0, 6: 2.0}.get(trainer_state.global_step, 0.0)] * len(completions)

    seen = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = weights(model)

    trainer = make_trainer(
        tmp_path,
        reward=reward,
        eval_dataset=ROWS[:2],
        callbacks=[Keep()],
        load_best_model_at_end=True,
        **{**RUN, "eval_steps": 2, "save_total_limit": 1},
    )
    trainer.train()
    assert trainer.state.best_global_step == 4 and trainer.state.best_metric == 3.0
    assert same(weights(trainer.model), seen[4]) and not same(seen[4], seen[6])


def test_the_run_leaves_a_jsonl_log_and_tables_of_completions(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ROWS[:2], eval_strategy="steps", eval_steps=1, log_completions=True)
    trainer.train()
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log if "kl" in line] == [1, 2]
    assert [line["step"] for line in log if "eval/reward" in line] == [1, 2]
    names = [
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/ascii_share/mean",
        "kl",
        "kl/k3",
        "entropy",
        "num_tokens",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "val/ratio_var",
        "val/num_eos_tokens",
        "val/explained_var",
        "episode",
        "learning_rate",
        "objective/beta",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "time/rollout",
        "time/score",
        "time/logprob",
        "time/update",
    ]
    for name in names:
        assert math.isfinite(log[0][name]), name
    assert log[0]["kl"] == 0 and log[0]["episode"] == 8
    assert log[0]["sampling/sampling_logp_difference/max"] < 1e-4  # one engine: rounding alone
    table = [json.loads(line) for line in (tmp_path / "completions" / "step-00002.jsonl").read_text().splitlines()]
    columns = {"prompt", "completion", "reward", "score", "kl", "length", "finished"}
    assert len(table) == 8 and table[0].keys() >= columns
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(torn) == [{"step": 1}]


def test_the_log_keeps_what_was_evaluated_before_training_and_drops_an_older_run(tmp_path):
    def steps():
        return [(line["step"], "eval/reward" in line) for line in read_log(tmp_path / "log.jsonl") if "epoch" in line]

    for _ in range(2):
        trainer = make_trainer(tmp_path, max_steps=1, eval_dataset=ROWS[:2])
        trainer.evaluate()
        trainer.train()
        assert [step for step, of_eval in steps() if of_eval] == [0]
        assert [step for step, of_eval in steps() if not of_eval] == [1, 1]  # the update, and the run's end
    trainer.train()
    assert not any(of_eval for _, of_eval in steps())  # a run of its own


def test_the_stream_of_prompts_is_fair_and_does_not_depend_on_its_length():
    stream = list(PromptStream(7, 30, seed=5))
    assert list(PromptStream(7, 18, seed=5)) == stream[:18]
    for start in range(0, 28, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))
    assert stream[:7] != stream[7:14] and list(PromptStream(7, 30, seed=6)) != stream


def test_epochs_count_prompts(tmp_path):
    assert make_trainer(tmp_path, max_steps=-1, num_train_epochs=2).args.max_steps == math.ceil(2 * len(ROWS) / 4)


def test_messages_and_a_policy_given_as_a_path(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tiny.make_policy(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []

    async def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    from ppo_helpers import config

    from rl.trainer import PPOTrainer

    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(4)]
    trainer = PPOTrainer(str(tmp_path / "model"), reward, config(tmp_path / "run", max_steps=1), rows)
    trainer.train()
    assert len(seen) == 8 and seen[0][1][0]["role"] == "assistant" and seen[0][0][0]["role"] == "user"
