"""``torch_compile``: the same training, through compiled layers."""

from __future__ import annotations

import pytest
import torch
from ppo_helpers import make_trainer, weights
from transformers import GPT2Config, GPT2LMHeadModel

from deliberation.types import InputError

import tiny


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    """TrainingArguments leaves its wish in the environment, for all that come after."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)  # and restored at the end
    yield
    torch.compiler.reset()


def trained(folder, **changes):
    tokenizer = tiny.make_tokenizer()
    trainer = make_trainer(folder, value_model=tiny.make_judge(tokenizer, seed=1), **changes)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones_and_the_wish_ends_with_the_trainer(tmp_path):
    compiled = trained(tmp_path / "compiled", torch_compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    made = compiled.model
    for backbone in (made.policy.model, made.value_model.model, compiled.ref_model.model):
        assert [layer._compiled_call_impl is not None for layer in backbone.layers] == [True, False]
    plain = trained(tmp_path / "plain")  # the environment still asks for it
    assert plain.model_wrapped is plain.model
    for a, b in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        for name in ("reward", "objective/kl", "loss/value_avg", "policy/entropy_avg", "num_tokens"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=1e-4)
    assert abs(float(compiled.state.log_history[0]["objective/kl"])) < 1e-5
    for name, parameter in weights(plain.model).items():
        torch.testing.assert_close(weights(made)[name], parameter, rtol=0, atol=1e-4)


def test_layers_of_another_kind_are_refused(tmp_path):
    tokenizer = tiny.make_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(InputError, match="torch_compile = 'GPT2Model': must be false"):
        make_trainer(tmp_path, model=model, torch_compile=True)
