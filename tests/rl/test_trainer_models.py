"""Models that PPOTrainer is given: adapters, bfloat16, frozen ones, and those it must refuse."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from ppo_helpers import ROWS, ascii_share, changed, config, make_trainer, weights
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deliberation.types import InputError
from rl.inputs import collate
from rl.trainer import PPOTrainer

import tiny

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def sizes():
    return tiny._sizes(tiny.make_tokenizer())


def adapter_folder(tmp_path):
    """A base model and an adapter on it, each in a folder."""
    tokenizer = tiny.make_tokenizer()
    tiny.make_policy(tokenizer, "llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_given_as_a_folder_is_trained_and_its_base_is_not(tmp_path):
    trainer = make_trainer(tmp_path / "run", model=str(adapter_folder(tmp_path)))
    before = weights(trainer.model.policy)
    trainer.train()
    moved = changed(trainer.model.policy, before)
    assert moved == {name for name in before if "lora_" in name}
    assert trainer.state.log_history[0]["objective/kl"] == 0.0  # the reference is the adapter as it was given
    assert trainer.state.log_history[1]["objective/kl"] != 0.0


def test_a_policy_of_which_nothing_would_be_trained_is_refused(tmp_path):
    folder = adapter_folder(tmp_path)
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    with pytest.raises(InputError, match="frozen.*is_trainable"):
        make_trainer(tmp_path / "run", model=frozen)
    with pytest.raises(InputError, match="frozen"):
        make_trainer(tmp_path / "run", model=tiny.make_policy(tiny.make_tokenizer(), "llama").requires_grad_(False))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapters_with_biases_are_refused_as_the_reference_would_move(tmp_path, bias):
    with pytest.raises(InputError, match="bias.*reference would move"):
        make_trainer(tmp_path, peft_config=LoraConfig(**LORA, bias=bias))


def test_the_reference_of_an_adapter_stays(tmp_path):
    model = Qwen2ForCausalLM(Qwen2Config(**sizes()))
    trainer = make_trainer(tmp_path, model=model, peft_config=LoraConfig(**LORA), learning_rate=1e-2)
    inputs = collate([[5, 6, 7, 8]], [[9, 10, 11, 12]], 0)
    before = trainer._reference_logprobs(inputs)
    trainer.train()
    assert torch.equal(trainer._reference_logprobs(inputs), before)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(tmp_path, kind):
    with pytest.raises(InputError, match="trains a prompt"):
        make_trainer(tmp_path, peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize("extra", [{}, {"share_prefix": False}, {"peft_config": LoraConfig(**LORA)}])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_in_bfloat16_too_the_kl_of_the_same_weights_is_exactly_0_always(tmp_path, arch, extra):
    trainer = make_trainer(tmp_path, arch=arch, bf16=True, learning_rate=0.0, eval_dataset=ROWS[:4], **extra)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.state.log_history[1]["objective/kl"] == 0.0
    assert trainer.evaluate()["eval_kl"] == before == 0.0


def test_in_bfloat16_values_keep_their_precision(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    inputs, found = collate([[5, 6, 7]], [[8, 9]], 0), []
    for bias in (5.0, 5.005, 5.01):
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.model.value_head.bias.fill_(bias)
            found.append(trainer.model(inputs, 1.0).values[0].item())
    assert found == pytest.approx([5.0, 5.005, 5.01], abs=1e-6)


def test_an_adapter_on_a_base_in_bfloat16_beside_a_value_model_in_float32(tmp_path):
    tokenizer = tiny.make_tokenizer()
    policy = tiny.make_policy(tokenizer, "llama").to(torch.bfloat16)
    value = tiny.make_judge(tokenizer, seed=1)
    trainer = make_trainer(tmp_path, model=policy, value_model=value, peft_config=LoraConfig(**LORA))
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == 0.0


@pytest.mark.parametrize("extra", [{"share_prefix": False}, {"num_generations": 1}])
def test_sampling_needs_full_attention_whatever_share_prefix(tmp_path, extra):
    model = MistralForCausalLM(MistralConfig(**sizes(), sliding_window=8))
    with pytest.raises(InputError, match="full attention"):
        make_trainer(tmp_path, model=model, **extra)


def test_a_value_model_without_a_score_layer_is_refused(tmp_path):
    with pytest.raises(InputError, match="value_model.*score"):
        make_trainer(tmp_path, value_model=tiny.make_encoder(tiny.make_tokenizer()))


def test_a_head_reads_what_the_logits_read(tmp_path):
    """OPT-350m projects its states before the output embeddings."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes(), ffn_dim=48, word_embed_proj_dim=16))
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert trainer.model.value_head.in_features == 16


# ---- data and rewards ------------------------------------------------------------------------------------------------


def test_rows_have_the_same_columns(tmp_path):
    plain, weighted = {"prompt": "a"}, {"prompt": "b", "weights": [1]}
    for rows in ([plain, weighted], [weighted, plain]):
        with pytest.raises(InputError, match=r"train_dataset\[1\].*columns of the first row"):
            make_trainer(tmp_path, rows=rows)


def test_one_data_set_is_evaluated(tmp_path):
    with pytest.raises(InputError, match="eval_dataset.*several"):
        make_trainer(tmp_path, eval_dataset={"a": ROWS})


def test_a_column_for_the_table_has_a_value_for_each_completion(tmp_path):
    def reward(prompts, completions, log_extra, **columns):
        log_extra("mood", [1])
        return [1.0] * len(completions)

    with pytest.raises(InputError, match=r"log_extra\('mood'\).*1 values.*give 8"):
        make_trainer(tmp_path, reward).train()


def test_no_limit_of_the_gradient_is_written_as_0(tmp_path):
    with pytest.raises(InputError, match="max_grad_norm"):
        config(tmp_path, max_grad_norm=None)
    PPOTrainer(
        tiny.make_policy(tiny.make_tokenizer(), "llama"),
        ascii_share,
        config(tmp_path, max_grad_norm=0.0, max_steps=1),
        ROWS,
        processing_class=tiny.make_tokenizer(),
    ).train()
