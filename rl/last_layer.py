"""The last layer's feed-forward network where its result is read, and nowhere else.

Only the positions that predict an action token are read behind the last layer. What its feed-forward network makes of
the others (most of a prompt) goes nowhere, so it is left out: the same numbers and gradients for less work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers that end in ``x + mlp(post_attention_layernorm(x))``, token by token."""


@contextmanager
def last_feed_forward_at(backbone: nn.Module, source: Tensor, shape: torch.Size) -> Iterator[None]:
    """Inside, ``backbone``'s last layer runs its feed-forward network at ``source`` alone; other outputs are undefined.

    Does nothing for a layer that is not in ``LAYERS``, or that will be run again by the backward pass (activation
    checkpointing), after this block.

    Args:
        source: int64 [N], flat indices into the batch's ``R * L`` positions; may repeat.
        shape: (R, L).
    """
    layer: Any = backbone.layers[-1] if hasattr(backbone, "layers") else None
    if type(layer).__name__ not in LAYERS or layer.gradient_checkpointing:
        yield
        return
    places = source.unique()

    def gather(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].flatten(0, 1).index_select(0, places)

    def scatter(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        return everywhere.index_copy(0, places, output).unflatten(0, shape)

    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(gather),
        layer.mlp.register_forward_hook(scatter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
