"""The last layer's feed-forward network runs where it is read: same numbers, same gradients, less work."""

from __future__ import annotations

import pytest
import torch
from ppo_helpers import make_trainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deliberation import last_layer
from rl.inputs import collate, collate_shared
from rl.value import PolicyAndValue

import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [5, 6, 7, 8, 9, 10]]
COMPLETIONS = [[20, 21, 2], [22, 23, 24, 25], [26]]
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make(kind):
    config, model = KINDS[kind]
    torch.manual_seed(0)
    sizes = tiny._sizes(tiny.make_tokenizer()) | ({"sliding_window": None} if kind == "mistral" else {})
    return PolicyAndValue(model(config(**sizes))).train()


def outputs(model, inputs, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(inputs, 0.7)
    (out.logprobs.square().sum() + out.values.square().sum()).backward()
    return [out.logprobs.detach(), out.values.detach(), *(p.grad.clone() for p in model.parameters())]


def rows_of_the_last_layer(model):
    seen = []
    model.policy.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("collated", [collate, collate_shared])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_values_and_gradients_are_those_of_the_whole_layer(kind, collated, monkeypatch):
    model, inputs = make(kind), collated(PROMPTS, COMPLETIONS, 0)
    seen = rows_of_the_last_layer(model)
    with torch.no_grad():  # the head's weights start at 0
        model.value_head.weight.normal_()
    at_the_places = outputs(model, inputs)
    monkeypatch.setattr(last_layer, "LAYERS", set())
    for a, b in zip(at_the_places, outputs(model, inputs), strict=True):
        assert (a - b).abs().max() < 1e-5 + 1e-5 * b.abs().max()
    assert seen == [inputs.source.unique().numel(), inputs.input_ids.numel()]
    assert seen[0] < seen[1] / 2


def test_under_autocast_too(monkeypatch):
    model, inputs = make("llama"), collate(PROMPTS, COMPLETIONS, 0)
    at_the_places = outputs(model, inputs, autocast=True)
    monkeypatch.setattr(last_layer, "LAYERS", set())
    for a, b in zip(at_the_places, outputs(model, inputs, autocast=True), strict=True):
        assert (a - b).abs().max() < 0.02 + 0.05 * b.abs().max()


def test_with_activation_checkpointing_the_layer_is_whole_with_and_without_gradient():
    model, inputs = make("llama"), collate(PROMPTS, COMPLETIONS, 0)
    plain = outputs(model, inputs)
    seen = rows_of_the_last_layer(model)
    model.activation_checkpointing_enable()
    for a, b in zip(outputs(model, inputs), plain, strict=True):
        assert (a - b).abs().max() < 1e-5 + 1e-5 * b.abs().max()
    with torch.no_grad():
        model(inputs, 0.7)
    assert set(seen) == {inputs.input_ids.numel()}


def test_an_error_inside_leaves_no_hook_behind():
    model, inputs = make("llama"), collate(PROMPTS, COMPLETIONS, 0)
    broken = inputs._replace(position_ids=torch.zeros(7, 7))
    with pytest.raises(RuntimeError):
        model(broken._replace(attention_mask=torch.ones_like(inputs.input_ids)), 0.7)
    layer = model.policy.model.layers[-1]
    assert not layer.mlp._forward_hooks and not layer.post_attention_layernorm._forward_pre_hooks


def test_with_activation_checkpointing_the_reference_runs_as_the_policy_does(tmp_path):
    trainer, seen = make_trainer(tmp_path, activation_checkpointing=True, max_steps=1), {"policy": set(), "ref": set()}
    for name, model in (("policy", trainer.model.policy), ("ref", trainer.ref_model)):
        mlp = model.model.layers[-1].mlp
        mlp.register_forward_pre_hook(lambda _, args, name=name: seen[name].add(args[0].ndim))
    trainer.train()
    assert seen == {"policy": {3}, "ref": {3}}  # whole rows, not a list of places
    assert trainer.state.log_history[0]["objective/kl"] == 0.0
