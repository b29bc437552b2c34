"""The last layer's feed-forward network where its result is read, and nowhere else.

Only some positions are read behind the last layer: those that predict a sampled token, or a statement's last, which a
score is read from. What its feed-forward network makes of the others goes nowhere, so it is left out: the same numbers
and gradients for less work. It imports no torch: modules and tensors are what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers that end in ``x + mlp(post_attention_layernorm(x))``, token by token."""


@contextmanager
def last_feed_forward_at(backbone: Any, source: Any, shape: Any) -> Iterator[None]:
    """Inside, ``backbone``'s last layer runs its feed-forward network at ``source`` alone; other outputs are undefined.

    Does nothing for a layer that is not in ``LAYERS``, or that will be run again by the backward pass (activation
    checkpointing), after this block.

    Args:
        backbone: a ``torch.nn.Module``.
        source: int64 tensor [N], flat indices into the batch's ``R * L`` positions; may repeat, and may be none.
        shape: ``torch.Size`` (R, L).
    """
    layer: Any = backbone.layers[-1] if hasattr(backbone, "layers") else None
    if type(layer).__name__ not in LAYERS or layer.gradient_checkpointing:
        yield
        return
    places = source.unique()

    def gather(_: Any, inputs: Any) -> Any:
        return inputs[0].flatten(0, 1).index_select(0, places)

    def scatter(_: Any, inputs: Any, output: Any) -> Any:
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
