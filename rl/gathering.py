"""Weights of which a process holds a share (DeepSpeed ZeRO-3), and moments in which every process needs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def shares_weights(args: Any) -> bool:
    """Whether training with ``args`` (a ``PPOConfig``) leaves a process a share of the weights: ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def load_whole() -> None:
    """Make transformers load models whole from here on; told of ZeRO-3, it would share out a preference model too.

    Both the settings of a run and its ``Trainer`` tell it, so this comes after each.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


@contextmanager
def whole_weights(model: nn.Module, *, changes: bool = False) -> Iterator[None]:
    """All weights of ``model`` on every process inside the block, in which it is called as any torch module.

    Every process must enter: the weights are gathered once, so inside each may call the model as often as it likes.
    Blocks do not nest. Does nothing where the weights are not shared out.

    Args:
        model: as the Trainer wrapped it (``model_wrapped``).
        changes: keep what the first process makes of the weights; otherwise changes are lost.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(model.parameters(), modifier_rank=0 if changes else None):
        remove_hooks(model)  # they would give the weights of a layer back as soon as it was called
        try:
            yield
        finally:
            add_hooks(model)


def add_to_parameter(parameter: nn.Parameter, number: float) -> None:
    """Add ``number`` to every element; to DeepSpeed's copy, which the next step starts from, too. On every process."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3: the weights, and a copy of which every process has its share
        import deepspeed
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        with torch.no_grad(), deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.add_(number)
        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter) + number)
        return
    with torch.no_grad():
        parameter.add_(number)
    if hasattr(parameter, "set_full_hp_param"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.detach())
