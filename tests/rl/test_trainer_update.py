"""One update of PPOTrainer: exactness before the first step, invariances, what moves and what does not."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig
from ppo_helpers import ROWS, ascii_share, changed, constant, make_trainer, weights
from transformers import TrainerCallback

from deliberation.types import InputError
from rl import ppo
from rl import trainer as trainer_module
from rl.rewards import background
from rl.rollout import prompt_seeds

import tiny


def fresh_rollout(trainer, rows=None):
    rows = rows or ROWS[:4]
    trainer._metrics.clear()
    rollout = trainer._rollout(rows, trainer.args.num_generations, prompt_seeds(0, 0, 0, len(rows)))
    trainer._evaluate_tokens(rollout)
    return rollout


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shared", [True, False])
def test_before_the_first_step_the_ratio_is_exactly_1_and_the_kl_exactly_0(arch, temperature, shared, tmp_path):
    trainer = make_trainer(
        tmp_path, arch=arch, temperature=temperature, per_device_train_batch_size=3, share_prefix=shared
    )
    rollout = fresh_rollout(trainer)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    assert rollout.kl()[0].abs().max() == 0 and rollout.kl()[1].abs().max() == 0
    for rows in (rows for batch in trainer._mini_batches(rollout, 0) for rows in batch):
        new = trainer.model.train()(trainer._inputs(rollout, rows), temperature).logprobs
        assert new.requires_grad and torch.equal(new, rollout.old_logprobs[rows][rollout.mask[rows]])


def test_the_rollout_really_is_a_sample_of_the_distribution_it_is_trained_under(tmp_path):
    """Mean of -log p over samples = entropy, at a temperature; any filter or wrong temperature breaks it."""
    trainer = make_trainer(tmp_path, temperature=0.5, num_generations=64, max_completion_length=8)
    rollout = fresh_rollout(trainer)
    surprise = -rollout.old_logprobs[rollout.mask]
    gap = (surprise - rollout.entropy[rollout.mask]).mean()
    assert abs(gap) < 4 * surprise.std() / len(surprise) ** 0.5
    assert rollout.entropy[rollout.mask].mean() < 5.3  # T = 0.5 is well below log(260) = 5.56: the test can fail


def gradients(tmp_path, micro: int, order=None, shared=True):
    trainer = make_trainer(tmp_path, share_prefix=shared, num_mini_batches=1, init_value_to_reward=False)
    rollout = fresh_rollout(trainer)
    trainer._compute_advantages(rollout)
    torch.nn.init.constant_(trainer.model.value_head.weight, 0.3)
    noise = torch.sin(torch.arange(rollout.mask.numel())).view_as(rollout.mask)
    rollout.old_logprobs = rollout.old_logprobs + 0.1 * noise
    trainer.model_wrapped = trainer.model
    rows = torch.arange(len(rollout)) if order is None else order
    trainer.model.zero_grad()
    found = trainer._backward(trainer.model, rollout, list(rows.split(micro)), warm_up=False)
    return found, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_and_gradient_do_not_depend_on_micro_batches_or_order(tmp_path):
    whole, expected = gradients(tmp_path, 8)
    shuffled = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    for found, got in (
        gradients(tmp_path, 1),
        gradients(tmp_path, 3),
        gradients(tmp_path, 8, shuffled),
        gradients(tmp_path, 3, shared=False),
    ):
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in expected.values()) > 1e-3


def test_mini_batches_cover_every_row_once_a_pass_and_keep_groups_together(tmp_path):
    trainer = make_trainer(tmp_path, num_prompts=8, num_generations=4, per_device_train_batch_size=4)
    rollout = fresh_rollout(trainer, ROWS[:8])
    passes = [trainer._mini_batches(rollout, epoch) for epoch in range(3)]
    for batches in passes:
        assert len(batches) == 2 and sorted(torch.cat([r for b in batches for r in b]).tolist()) == list(range(32))
        assert all(len({i // 4 for i in rows.tolist()}) == 1 for b in batches for rows in b)
    assert sorted(torch.cat(passes[0][0]).tolist()) == list(range(16))  # the first pass is in order
    assert {tuple(torch.cat(b).tolist()) for b in passes[1]} != {tuple(torch.cat(b).tolist()) for b in passes[2]}


def test_zero_reward_variance_gives_no_policy_gradient(tmp_path):
    trainer = make_trainer(tmp_path, reward=constant, missing_eos_penalty=0.0, max_steps=2)
    before = weights(trainer.model.policy)
    trainer.train()
    after = dict(trainer.model.policy.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert max((after[n] - before[n]).abs().max() for n in before) < 1e-6


def per_prompt(prompts, completions, **columns):
    """Prompts differ in how easy they are; completions of one prompt are all alike."""
    return [float(len(p)) for p in prompts]


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_how_easy_a_prompt_is_teaches_nothing_with_the_leave_one_out_baseline(leave_one_out, tmp_path):
    settings = dict(reward=per_prompt, missing_eos_penalty=0.0, reward_clip=None, max_steps=2)
    trainer = make_trainer(tmp_path, leave_one_out_baseline=leave_one_out, **settings)
    before = weights(trainer.model.policy)
    trainer.train()
    after = dict(trainer.model.policy.named_parameters())
    moved = float(max((after[n] - before[n]).abs().max() for n in before))
    assert moved < 1e-6 if leave_one_out else moved > 1e-5


def test_every_trainable_parameter_moves_and_the_reference_does_not(tmp_path):
    trainer = make_trainer(tmp_path)
    before, reference = weights(trainer.model), weights(trainer.ref_model)
    trainer.train()
    assert changed(trainer.model, before) == set(before)
    assert not changed(trainer.ref_model, reference)


def test_dropout_of_the_model_and_of_its_adapters_is_off_in_training(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer(tmp_path, peft_config=lora)
    rollout = fresh_rollout(trainer)
    inputs = trainer._inputs(rollout, torch.arange(len(rollout)))
    one, other = (trainer.model.train()(inputs, 1.0).logprobs for _ in range(2))
    assert torch.equal(one, other)


def test_low_precision_parameters_are_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(InputError, match="bfloat16"):
        make_trainer(tmp_path, model=tiny.make_policy(tiny_tokenizer).to(torch.bfloat16))


def test_the_reward_functions_get_text_and_columns_and_what_they_give_is_what_is_optimised(tmp_path):
    calls, tables = [], []

    def reward(prompts, completions, *, target, completion_ids, trainer_state, log_metric, log_extra):
        assert all(isinstance(x, str) for x in [*prompts, *completions]) and target == ["e"] * len(prompts)
        log_metric("seen", trainer_state.global_step)
        log_extra("index", list(range(len(completions))))
        rewards = [float(len(ids)) for ids in completion_ids]
        calls.append(rewards)
        return rewards

    from transformers import TrainerCallback

    class Tables(TrainerCallback):
        def on_completions(self, args, state, control, table=None, **kwargs):
            tables.append(table)

    trainer = make_trainer(tmp_path, reward=reward, reward_clip=5.0, missing_eos_penalty=2.0, callbacks=[Tables()])
    optimised = []
    compute = trainer._compute_advantages

    def spy(rollout):
        compute(rollout)
        optimised.append((rollout, {k: v.clone() for k, v in vars(rollout).items() if torch.is_tensor(v)}))

    trainer._compute_advantages = spy
    trainer.train()
    for step, (given, table, (rollout, before)) in enumerate(zip(calls, tables, optimised, strict=True)):
        expected = [min(r, 5.0) - 2.0 * (not done) for r, done in zip(given, rollout.finished.tolist(), strict=True)]
        plain = rollout.token_rewards + 0.05 * (rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask
        rows = torch.arange(len(rollout))
        torch.testing.assert_close(plain[rows, ppo.last_token_index(rollout.mask)], torch.tensor(expected))
        line = trainer.state.log_history[step]
        assert line["reward"] == pytest.approx(sum(given) / len(given))
        assert line["objective/scores"] == pytest.approx(sum(expected) / len(expected))
        assert line["seen"] == step
        assert [row["reward"] for row in table] == given and [row["score"] for row in table] == pytest.approx(expected)
        assert [row["index"] for row in table] == list(range(8))
        for name, tensor in before.items():  # neither the update nor the logging changed a tensor
            assert torch.equal(tensor, getattr(rollout, name)), name


def test_batches_scored_while_others_are_sampled_give_what_one_after_the_other_gives(tmp_path, monkeypatch):
    """Four batches of one prompt: the same weights, log and table as with scoring in turn, and several calls."""

    def run(name, in_turn):
        calls, tables = [], []

        def reward(prompts, completions, log_metric, log_extra, **columns):
            calls.append(threading.current_thread() is threading.main_thread())
            log_metric("share", sum(ascii_share(prompts, completions)) / len(completions))
            log_extra("first", [c[:1] for c in completions])
            return ascii_share(prompts, completions)

        class Tables(TrainerCallback):
            def on_completions(self, args, state, control, table, **kwargs):
                tables.append(table)

        if in_turn:
            monkeypatch.setattr(trainer_module, "background", lambda wanted: background(False))
        trainer = make_trainer(
            tmp_path / name, reward, rollout_batch_size=2, max_steps=2, eval_dataset=ROWS[:3], callbacks=[Tables()]
        )
        trainer.train()
        log = [
            {k: v for k, v in line.items() if "time" not in k and "second" not in k}
            for line in trainer.state.log_history
        ]
        return weights(trainer.model), log, tables, trainer.evaluate()["eval_share"], calls

    beside, in_turn = run("beside", False), run("in turn", True)
    assert all(torch.equal(beside[0][name], in_turn[0][name]) for name in beside[0])
    assert beside[1:4] == in_turn[1:4]
    assert len(beside[4]) == 2 * 4 + 2 and not any(beside[4]) and all(in_turn[4])  # in evaluation two prompts, and one


def test_rows_without_any_reward_train_nothing(tmp_path):
    def half(prompts, completions, **columns):
        return [None if i % 2 else 100.0 * (i % 3) for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward=half, reward_clip=None)
    rollout = fresh_rollout(trainer)
    trainer._compute_advantages(rollout)
    assert (rollout.advantages[1::2] == 0).all() and rollout.advantages[::2].abs().sum() > 0
    assert not rollout.train_mask[1::2].any()


def test_the_only_completion_with_a_reward_is_not_held_against_it_when_trained_for_the_best_of_n(tmp_path):
    def some(prompts, completions, **columns):
        return [None if i == 1 else float(i) for i in range(len(completions))]

    trainer = make_trainer(tmp_path, some, best_of_n=2)
    rollout = fresh_rollout(trainer)
    trainer._compute_advantages(rollout)
    assert rollout.scored.tolist() == [False, False] + [True] * 6
    assert (rollout.advantages[0] == 0).all() and rollout.advantages[3].any()


@pytest.mark.parametrize("option", [dict(length_penalty=0.5), dict(entropy_coef=0.5), dict(whiten_rewards=True)])
def test_an_option_changes_the_token_rewards_and_nothing_before_them(option, tmp_path):
    rollouts = []
    for settings in ({}, option):
        trainer = make_trainer(tmp_path, reward_clip=None, beta=0.0, max_steps=1, **settings)
        compute = trainer._compute_advantages

        def keep(rollout, compute=compute):
            compute(rollout)
            rollouts.append(rollout)

        trainer._compute_advantages = keep
        trainer.train()
    plain, changed_ = rollouts
    assert torch.equal(plain.raw_scores, changed_.raw_scores) and torch.equal(plain.mask, changed_.mask)
    (name,) = option
    if name == "length_penalty":
        expected = plain.token_rewards.sum(1) - 0.5 * plain.lengths
        torch.testing.assert_close(changed_.token_rewards.sum(1), expected)
    elif name == "entropy_coef":
        expected = plain.token_rewards - 0.5 * plain.old_logprobs * plain.mask
        torch.testing.assert_close(changed_.token_rewards, expected)
    else:
        kept = changed_.token_rewards[plain.mask]
        assert float(kept.var(unbiased=False)) == pytest.approx(1, abs=1e-3)
        assert float(kept.mean()) == pytest.approx(float(plain.token_rewards[plain.mask].mean()), abs=1e-4)


def test_the_first_values_are_the_mean_score(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout = fresh_rollout(trainer)
    trainer._shift_values(rollout)
    assert rollout.values[rollout.mask].unique().item() == pytest.approx(rollout.scores.mean().item(), abs=1e-6)
    assert trainer.model.value_head.bias.item() == pytest.approx(rollout.scores.mean().item(), abs=1e-6)


def test_value_warm_up_leaves_the_actor_untouched(tmp_path):
    trainer = make_trainer(tmp_path, value_warmup_updates=2, weight_decay=0.1)
    policy, head = weights(trainer.model.policy), weights(trainer.model.value_head)
    trainer.train()
    assert not changed(trainer.model.policy, policy)
    assert changed(trainer.model.value_head, head)


def test_the_value_parameters_have_their_own_learning_rate(tmp_path, tiny_tokenizer):
    trainer = make_trainer(
        tmp_path,
        value_learning_rate=0.0,
        max_steps=1,
        value_model=tiny.make_judge(tiny_tokenizer),
        init_value_to_reward=False,
    )
    joint = trainer.model
    policy, head, critic = (weights(m) for m in (joint.policy, joint.value_head, joint.value_model))
    trainer.train()
    assert changed(trainer.model.policy, policy)
    assert not changed(trainer.model.value_head, head) and not changed(trainer.model.value_model, critic)
    assert make_trainer(tmp_path, learning_rate=2e-4).args.value_lr == pytest.approx(1e-3)


def test_a_separate_value_model_learns(tmp_path, tiny_tokenizer):
    trainer = make_trainer(tmp_path, value_model=tiny.make_judge(tiny_tokenizer), max_steps=1)
    before = weights(trainer.model.value_model)
    trainer.train()
    assert changed(trainer.model.value_model, before) == set(before) - {"score.weight"}


def test_target_kl_ends_an_update_before_the_step_that_would_follow(tmp_path):
    trainer = make_trainer(tmp_path, target_kl=1e-9, num_ppo_epochs=3, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["update/optimizer_steps"] == 2  # one step taken, the second found KL > target
    free = make_trainer(tmp_path, num_ppo_epochs=3, max_steps=1)
    free.train()
    assert free.state.log_history[0]["update/optimizer_steps"] == 6


def test_max_kl_ends_the_training_without_a_further_step(tmp_path):
    trainer = make_trainer(tmp_path, max_kl=0.02, max_steps=30, learning_rate=5e-3, num_generations=8)
    seen = []
    step = trainer._update
    trainer._update = lambda *a: (seen.append(1), step(*a))[1]
    trainer.train()
    assert 1 < trainer.state.global_step < 30
    assert len(seen) == trainer.state.global_step - 1
    kls = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kls[-1] > 0.02 and all(kl <= 0.02 for kl in kls[:-1])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    compute = trainer._compute_advantages

    def poison(rollout):
        compute(rollout)
        rollout.returns[0, 0] = float("nan")

    trainer._compute_advantages = poison
    with pytest.raises(FloatingPointError, match="nan"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_prompts=0),
        dict(temperature=0.0),
        dict(beta=-1.0),
        dict(lam=1.5),
        dict(num_mini_batches=3),
        dict(gradient_accumulation_steps=2),
        dict(remove_unused_columns=True),
        dict(missing_eos_penalty=-1.0),
        dict(length_penalty=-0.1),
        dict(entropy_coef=-0.1),
        dict(leave_one_out_baseline=True, num_generations=1),
        dict(best_of_n=2, num_generations=1),
        dict(best_of_n=2, leave_one_out_baseline=True),
        dict(best_of_n=0),
        dict(kl_target=0.0),
        dict(kl_target=1.0, beta=0.0),
        dict(kl_target=1.0, kl_horizon=7),
        dict(save_only_model=True),
        dict(push_to_hub=True),
        dict(enable_jit_checkpoint=True),
    ],
)
def test_settings_out_of_range_are_refused(settings, tmp_path):
    with pytest.raises(InputError):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_new_tokens", "suppress_tokens"])
def test_there_is_no_setting_that_would_filter_the_rollout(name, tmp_path):
    with pytest.raises(TypeError):
        make_trainer(tmp_path, **{name: 1})


def test_data_without_prompts_is_refused(tmp_path):
    with pytest.raises(InputError, match="prompt"):
        make_trainer(tmp_path, rows=[{"text": "a"}])


@pytest.mark.slow
@pytest.mark.parametrize("fewer", [False, True])
def test_it_learns(fewer, tmp_path):
    """A reward with an easy optimum is reached: letters more often, or (the negative) less often."""
    sign = -1.0 if fewer else 1.0

    def reward(prompts, completions, **columns):
        return [sign * r for r in ascii_share(prompts, completions)]

    trainer = make_trainer(
        tmp_path,
        reward=reward,
        max_steps=25,
        num_prompts=8,
        num_generations=4,
        learning_rate=1e-2,
        beta=0.01,
        num_ppo_epochs=3,
        missing_eos_penalty=0.0,
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3 > 0.12


@pytest.mark.slow
def test_one_token_bandit_learns_to_stop(tmp_path):
    """One action: the EOS is the only completion without the penalty; its probability must rise."""
    trainer = make_trainer(
        tmp_path,
        reward=constant,
        max_completion_length=1,
        max_steps=12,
        num_prompts=4,
        num_generations=16,
        learning_rate=1e-2,
        beta=0.0,
        num_ppo_epochs=4,
        missing_eos_penalty=5.0,
    )
    # make the stop token likely enough to be met: 260 tokens, and the reward is only learned from samples
    with torch.no_grad():
        trainer.model.policy.model.embed_tokens.weight[2] *= 3
    trainer.train()
    ended = [1 - line["completions/clipped_ratio"] for line in trainer.state.log_history if "kl" in line]
    assert sum(ended[-3:]) / 3 > sum(ended[:3]) / 3 + 0.3


def test_a_max_grad_norm_of_0_clips_nothing(tmp_path):
    """As in the Trainer: neither its own last step of an update nor ours before it."""
    trained = []
    for norm in (0.0, 1e9):
        trainer = make_trainer(tmp_path, max_grad_norm=norm, max_steps=1)
        trainer.train()
        trained.append(weights(trainer.model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
