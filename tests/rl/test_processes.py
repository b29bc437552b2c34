"""Ways of sharing a run, or its model, among processes that are refused."""

from __future__ import annotations

import os

import pytest
from distributed_run import ZERO_2, ZERO_3
from transformers import AutoModelForCausalLM

from deliberation.types import InputError
from rl.trainer import PPOConfig

import tiny


def test_processes_that_would_each_train_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    with pytest.raises(InputError, match="use_cpu") as error:
        PPOConfig(output_dir=str(tmp_path))
    assert error.value.field == "WORLD_SIZE"


@pytest.mark.parametrize("from_launcher", [False, True])
def test_fsdp_is_refused(from_launcher, monkeypatch, tmp_path):
    if from_launcher:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError) as error:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=None if from_launcher else "full_shard")
    assert error.value.field == "fsdp"


@pytest.fixture
def deepspeed_forgotten():
    """DeepSpeed's settings are kept in the environment, and in a global that models look up when they are loaded."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    yield
    unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("settings", "keys", "field"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, "deepspeed: zero_optimization.stage"),
        ({"zero_optimization": {"stage": 1}}, {}, "deepspeed: zero_optimization.stage"),
        ({"optimizer": {"type": "AdamW", "params": {}}}, {}, "deepspeed: optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, {}, "deepspeed: scheduler"),
        ({"gradient_clipping": None}, {}, "deepspeed: gradient_clipping"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "deepspeed: zero_optimization.offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {},
            "deepspeed: zero_optimization.offload_param",
        ),
        ({}, {"target_kl": 0.1}, "target_kl"),
        ({}, {"value_warmup_updates": 1}, "value_warmup_updates"),
    ],
)
def test_what_deepspeed_would_train_wrongly_is_refused(settings, keys, field, deepspeed_forgotten, tmp_path):
    given = {name: value for name, value in {**ZERO_2, **settings}.items() if value is not None}
    with pytest.raises(InputError) as error:
        PPOConfig(output_dir=str(tmp_path), deepspeed=given, **keys)
    assert error.value.field == field


def test_under_zero_3_models_are_loaded_whole(deepspeed_forgotten, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tiny.make_policy(tokenizer).save_pretrained(tmp_path)
    args = PPOConfig(output_dir=str(tmp_path), deepspeed=ZERO_3)  # transformers remembers them while they live
    assert args.deepspeed_plugin.zero_stage == 3
    assert all(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
