"""Loading policies, and their log-probabilities."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from deliberation.types import InputError
from rl.policy import load_policy, resolve_attention, sample, sequence_logprobs
from rl.value import check_masks

import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 2], [26]]


def absolute_positions():
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def model(request, tiny_tokenizer):
    return absolute_positions() if request.param == "gpt2" else tiny.make_policy(tiny_tokenizer, request.param)


def plain_logprobs(model, prompt, completion, temperature):
    """One row, no padding, all logits."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    return torch.stack([logprobs[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_whatever_the_padding(model, temperature):
    with torch.no_grad():
        got = sequence_logprobs(model, PROMPTS, COMPLETIONS, temperature)
        for prompt, completion, row in zip(PROMPTS, COMPLETIONS, got, strict=True):
            assert row.dtype == torch.float32 and len(row) == len(completion)
            torch.testing.assert_close(row, plain_logprobs(model, prompt, completion, temperature), atol=1e-5, rtol=0)


def test_logprobs_do_not_depend_on_batch_mates_or_order(model):
    with torch.no_grad():
        together = sequence_logprobs(model, PROMPTS, COMPLETIONS)
        backwards = sequence_logprobs(model, PROMPTS[::-1], COMPLETIONS[::-1])[::-1]
        for i, row in enumerate(together):
            alone = sequence_logprobs(model, [PROMPTS[i]], [COMPLETIONS[i]])[0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(row, backwards[i], atol=1e-5, rtol=0)


def test_gradients_are_finite_and_equal_those_of_a_plain_forward(tiny_policy):
    weight = tiny_policy.model.layers[0].self_attn.q_proj.weight
    torch.cat(sequence_logprobs(tiny_policy, PROMPTS, COMPLETIONS)).sum().backward()
    padded, weight.grad = weight.grad, None
    plain = [plain_logprobs(tiny_policy, p, c, 1.0) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.cat(plain).sum().backward()
    assert padded.isfinite().all() and padded.abs().max() > 0
    torch.testing.assert_close(padded, weight.grad, atol=1e-5, rtol=1e-4)


def test_pad_token_in_the_text_is_a_token_like_any_other(tiny_policy):
    """Masks come from lengths: an id that equals the padding must still be read."""
    with torch.no_grad():
        got = sequence_logprobs(tiny_policy, [[0, 0, 5], [6]], [[0, 7], [8, 0, 0]])
        torch.testing.assert_close(got[0], plain_logprobs(tiny_policy, [0, 0, 5], [0, 7], 1.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(got[1], plain_logprobs(tiny_policy, [6], [8, 0, 0], 1.0), atol=1e-5, rtol=0)


def test_an_empty_completion_has_no_logprobs(tiny_policy):
    with torch.no_grad():
        got = sequence_logprobs(tiny_policy, [[5], [6]], [[], [7]])
    assert [len(row) for row in got] == [0, 1]


# ---- loading ---------------------------------------------------------------------------------------------------------


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_saved_and_loaded_policy_is_the_same(tmp_path, tiny_policy, tiny_tokenizer):
    path = save(tmp_path / "policy", tiny_policy, tiny_tokenizer)
    model, tokenizer = load_policy(path, device="cpu")
    assert not model.training and next(model.parameters()).dtype == torch.float32
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, tiny_policy(input_ids=ids).logits)
    assert tokenizer("Tax?").input_ids == tiny_tokenizer("Tax?").input_ids


def test_bfloat16_weights_are_computed_in_float32_on_cpu(tmp_path, tiny_policy, tiny_tokenizer):
    path = save(tmp_path / "policy", tiny_policy.bfloat16(), tiny_tokenizer)
    assert next(load_policy(path, device="cpu")[0].parameters()).dtype == torch.float32
    assert next(load_policy(path, device="cpu", dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16


def adapted(model):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


def test_an_adapter_finds_its_base_from_any_working_directory(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    save(tmp_path / "here" / "base", tiny_policy, tiny_tokenizer)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    peft = adapted(load_policy("base", device="cpu")[0])
    peft.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "there")
    model, _ = load_policy(str(tmp_path / "adapter"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, peft(input_ids=ids).logits)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_adapter_is_loaded_on_its_base(tmp_path, tiny_policy, tiny_tokenizer, with_tokenizer):
    base = save(tmp_path / "base", tiny_policy, tiny_tokenizer)
    plain, _ = load_policy(base, device="cpu")
    peft = adapted(load_policy(base, device="cpu")[0])
    peft.save_pretrained(tmp_path / "adapter")
    if with_tokenizer:
        tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    model, tokenizer = load_policy(str(tmp_path / "adapter"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert isinstance(model, PeftModel) and len(tokenizer) == len(tiny_tokenizer)
    assert torch.equal(model(input_ids=ids).logits, peft(input_ids=ids).logits)
    assert not torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    # Sampling and log-probabilities take an adapted policy, and see the adapter.
    samples = sample(model, tokenizer, ["Why?"], n=4, seeds=[0], max_new_tokens=8)
    assert samples != sample(plain, tokenizer, ["Why?"], n=4, seeds=[0], max_new_tokens=8)
    rows = [one.ids for one in samples[0]]
    prompts = [tokenizer("Why?").input_ids] * 4
    with torch.no_grad():
        seen = torch.cat(sequence_logprobs(model, prompts, rows))
        assert (seen - torch.cat(sequence_logprobs(plain, prompts, rows))).abs().max() > 1e-3


def test_folder_without_safetensors_is_refused(tmp_path, tiny_policy, tiny_tokenizer):
    path = save(tmp_path / "policy", tiny_policy, tiny_tokenizer)
    weights = tmp_path / "policy" / "model.safetensors"
    torch.save(tiny_policy.state_dict(), tmp_path / "policy" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="safetensors") as error:
        load_policy(path, device="cpu")
    assert error.value.field == "model_name_or_path"


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_policy(str(tmp_path / "nowhere"), device="cpu")


GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
MPT_SIZES = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
LOCAL = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}


def model_of(kind, **sizes):
    torch.manual_seed(0)
    made = {**tiny._sizes(tiny.make_tokenizer()), **sizes}
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**made))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": None}),
        ("GPT2", GPT2_SIZES),
        ("GPTNeoX", {}),
        ("Falcon", {}),
    ],
)
def test_full_attention_passes_in_both_modes_which_stay(kind, sizes):
    model = model_of(kind, **sizes)
    for training in (True, False):
        model.train(training)
        check_masks(model)
        assert model.training is training


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),  # convolution layers
        ("Mistral", {"sliding_window": 128}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1, "head_dim": 8}),
        ("GPTNeo", LOCAL),  # a window that no short text shows
        ("Mamba", {}),
        ("Rwkv", {}),
        ("Mpt", MPT_SIZES),  # positions by place (ALiBi): no error, other numbers
        ("Bloom", {"n_layer": 2, "n_head": 4}),  # the same, and takes no such mask
    ],
)
def test_what_a_shared_row_would_change_is_refused(kind, sizes):
    with pytest.raises(InputError, match="full attention"):
        check_masks(model_of(kind, **sizes))


def test_a_loaded_policy_is_checked(tiny_tokenizer, tmp_path):
    model_of("Mistral", sliding_window=8).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="full attention"):
        load_policy(str(tmp_path), device="cpu")


def test_flash_attention_only_with_cuda_and_the_package(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rl.policy")
    assert resolve_attention(None, "cpu") == "sdpa"
    assert "attention: sdpa" in caplog.text
    assert resolve_attention("eager", "cpu") == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace() if name == "flash_attn" else None)
    assert resolve_attention(None, "cuda") == "flash_attention_2"
    assert resolve_attention(None, "cpu") == "sdpa"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_attention(None, "cuda") == "sdpa"
