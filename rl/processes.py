"""What the processes of a run have to agree on: how many they are, and who holds which part of the model."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from deliberation.types import InputError


def check_processes(args: TrainingArguments) -> None:
    """Refuse processes that a launcher started together and that would each train alone.

    Accelerate counts one process where it finds no accelerator and was not told to use the CPU.

    Raises:
        InputError: if the launcher started another number of processes than train together.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    started = torch.distributed.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        mend = f"{args.world_size} would train together, and each alone: no accelerator was found; on CPUs, set use_cpu"
        raise InputError("WORLD_SIZE", started, mend)


def check_sharding(args: Any) -> None:
    """Refuse ways of sharing a model among processes in which PPO would train wrongly, or not at all.

    Args:
        args: a ``PPOConfig`` after the checks of ``TrainingArguments``.

    Raises:
        InputError: naming the key.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        mend = "is not supported: with bf16 it would round log-probabilities; use DeepSpeed ZeRO-3, or ZeRO-2 or DDP"
        raise InputError("fsdp", args.fsdp or "from accelerate launch", mend)
    if args.deepspeed_plugin is None:
        return
    settings, stage = args.deepspeed_plugin.hf_ds_config.config, args.deepspeed_plugin.zero_stage
    if stage not in (2, 3):
        mend = "must be 2 (gradients and optimiser are shared out) or 3 (the weights too, outside sampling)"
        raise InputError("deepspeed: zero_optimization.stage", stage, mend)
    for key in ("optimizer", "scheduler"):  # DeepSpeed's own would know nothing of value_learning_rate
        if key in settings:
            raise InputError(f"deepspeed: {key}", settings[key], "take it out; set the keys of the trainer")
    if "gradient_clipping" not in settings:
        raise InputError("deepspeed: gradient_clipping", None, 'write "auto", or max_grad_norm does nothing')
    for key in ("offload_optimizer", "offload_param"):
        if settings.get("zero_optimization", {}).get(key):
            raise InputError(f"deepspeed: zero_optimization.{key}", "set", "is not supported: take it out")
    if args.torch_compile:
        raise InputError("torch_compile", True, "must be false with DeepSpeed, whose hooks it would compile away")
    if args.target_kl is not None:
        mend = "is not supported with DeepSpeed, which has taken the step before the KL is known"
        raise InputError("target_kl", args.target_kl, mend)
    if args.value_warmup_updates:
        mend = "must be 0 with DeepSpeed, which steps the policy's optimiser state too"
        raise InputError("value_warmup_updates", args.value_warmup_updates, mend)
