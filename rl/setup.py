"""What the trainer does once, before training: load, check, reference model, parameter groups."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deliberation.kernels import share_heads
from deliberation.types import InputError
from rl.ppo_config import PPOConfig
from rl.value import check_masks

logger = logging.getLogger(__name__)


def check_dataset(name: str, dataset: Any) -> None:
    """Raise InputError unless ``dataset`` has rows, a column ``prompt``, and the same columns in every row."""
    if isinstance(dataset, dict):
        raise InputError(name, sorted(dataset), "is several data sets; give one")
    if len(dataset) == 0:
        raise InputError(name, "0 rows", "give at least one row")
    columns = sorted(dataset[0])
    if "prompt" not in columns:
        raise InputError(name, columns, "needs a column 'prompt' (text or messages)")
    for i, row in enumerate(dataset if isinstance(dataset, list) else []):  # in a table they are the same
        if sorted(row) != columns:
            raise InputError(f"{name}[{i}]", sorted(row), f"must have the columns of the first row, {columns}")


def load(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: PPOConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what is given as a path, an adapter to be trained; a model object brings its tokenizer along."""
    share_heads(torch.cuda.is_available())
    if isinstance(model, str):
        from rl.policy import load_policy

        loaded, own = load_policy(model, device=args.device, dtype=torch.float32)
        if isinstance(loaded, PeftModel):
            loaded.set_adapter(loaded.active_adapter)  # PEFT loads adapters frozen
        return loaded, tokenizer or own
    if tokenizer is None:
        raise InputError("processing_class", None, "give the tokenizer of a model that is passed as an object")
    check_masks(model)  # sampling reads several completions over one prompt, whatever share_prefix
    return model, tokenizer


def reference_and_policy(model: PreTrainedModel, peft_config: Any) -> tuple[nn.Module | None, nn.Module]:
    """``(reference, policy)``; no reference model if it is the policy with its (new) adapters off.

    Raises:
        InputError: on a policy of which nothing is trained, or adapters whose base is not what it was with them off.
    """
    adapters = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if adapters is not None and adapters.is_prompt_learning:
        raise InputError("peft_config", type(adapters).__name__, "trains a prompt, not the model; use LoraConfig")
    if peft_config is None:
        if not any(p.requires_grad for p in model.parameters()):
            mend = "is frozen: load an adapter with is_trainable=True, or call model.requires_grad_(True)"
            raise InputError("model", type(model).__name__, mend)
        reference = copy.deepcopy(model).requires_grad_(False).eval()
        return reference, model
    if getattr(peft_config, "bias", "none") != "none":
        mend = "must be 'none': trained biases stay when the adapters are off, and the reference would move"
        raise InputError("peft_config", f"bias={peft_config.bias!r}", mend)
    if isinstance(model, PeftModel):
        raise InputError(
            "peft_config",
            type(peft_config).__name__,
            "the model has adapters already: merge them first, "
            "or leave peft_config out to train them against a frozen copy",
        )
    return None, get_peft_model(model, peft_config)


def check_precision(model: nn.Module) -> None:
    """Refuse trainable parameters below fp32: at small learning rates their updates round to nothing."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(
                "model",
                f"{name} in {parameter.dtype}",
                "load the model with dtype=torch.float32 (bf16: true still computes in bfloat16)",
            )


def parameter_groups(
    model: nn.Module, value_parameters: list[nn.Parameter], decay: set[str], args: PPOConfig
) -> list[dict[str, Any]]:
    """Optimiser groups: policy before value, each with its learning rate, with and without weight decay."""
    value = {id(p) for p in value_parameters}
    groups: dict[tuple[bool, bool], list] = {(v, d): [] for v in (False, True) for d in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[id(parameter) in value, name in decay].append(parameter)
    return [
        {
            "params": params,
            "weight_decay": args.weight_decay if decays else 0.0,
            "lr": args.value_lr if of_value else args.learning_rate,
        }
        for (of_value, decays), params in groups.items()
        if params
    ]


def load_policy_weights(policy: nn.Module, folder: Path) -> None:
    """Read the weights ``policy.save_pretrained(folder)`` wrote back into ``policy`` (full model or adapter).

    Raises:
        InputError: if the folder holds none.
    """
    adapter = hasattr(policy, "peft_config")
    if not any(folder.glob("adapter_model.safetensors" if adapter else "model*.safetensors")):
        raise InputError("resume_from_checkpoint", str(folder), "holds no safetensors of the policy")
    if adapter:
        policy.load_adapter(str(folder), policy.active_adapter, is_trainable=True)
        return
    saved = type(policy).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    policy.load_state_dict(saved.state_dict())


def can_share_prefix(wanted: bool, policy: PreTrainedModel, value_model: PreTrainedModel | None) -> bool:
    """Whether one row may hold a prompt and several completions: wanted, and both models' attention takes a 4D mask.

    Raises:
        InputError: if it is wanted of a value model for which it would be wrong (a policy is checked by ``load``).
    """
    if not wanted:
        return False
    if value_model is not None:
        check_masks(value_model)
    for model in filter(None, (policy, value_model)):
        if model.config._attn_implementation not in ("sdpa", "eager"):
            logger.warning("share_prefix is off: %s takes no custom mask", model.config._attn_implementation)
            return False
    return True
