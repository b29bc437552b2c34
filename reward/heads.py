"""The parts of a sequence classifier: which kind it is, its scalar head, and what an encoder's head reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from deliberation.types import InputError


def inner_model(model: nn.Module) -> Any:
    """The transformers model, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def room_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a model reads at most."""
    inner = inner_model(model)
    positions = int(getattr(inner.config, "max_position_embeddings", None) or tokenizer.model_max_length)
    table = getattr(getattr(getattr(inner, "base_model", None), "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:  # RoBERTa counts positions from behind its padding index
        positions -= padding + 1
    return min(positions, tokenizer.model_max_length)


def is_encoder(model: nn.Module) -> bool:
    """Whether it reads prefix and statement together (BERT and its family), so that no prefix can be shared.

    transformers calls the head of its causal classifiers ``score``, read at the last token.
    """
    return not hasattr(inner_model(model), "score")


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer, from features to the score; the one being trained, where PEFT keeps a copy."""
    inner = inner_model(model)
    head: Any = inner.classifier if is_encoder(model) else inner.score
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    return getattr(head, "out_proj", head)  # RoBERTa's family wraps it


def set_head(model: nn.Module, head: nn.Linear) -> None:
    """Put another last linear layer in its place, and its outputs as the number of labels."""
    inner = inner_model(model)
    name = "classifier" if is_encoder(model) else "score"
    if hasattr(getattr(inner, name), "out_proj"):
        getattr(inner, name).out_proj = head
    else:
        setattr(inner, name, head)
    inner.config.num_labels = inner.num_labels = head.out_features


def encoder_features(model: nn.Module, ids: Tensor, attention_mask: Tensor, types: Tensor | None) -> Tensor:
    """What an encoder's head reads of each row of token ids [rows, width] -> [rows, hidden]."""
    seen: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        extra = {} if types is None else {"token_type_ids": types}
        model(input_ids=ids, attention_mask=attention_mask, **extra)
    finally:
        hook.remove()
    return seen[0]


def apply_head(head: nn.Linear, features: Tensor) -> Tensor:
    """Scores [rows, outputs], in float32 whatever the head's type or the autocast: bfloat16 would tie candidates."""
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def write_heads(path: Path, heads: nn.Linear) -> None:
    """The linear heads of an ensemble as safetensors: weight [heads, hidden], bias [heads] where there is one."""
    save_file({name: p.detach().contiguous() for name, p in heads.named_parameters()}, path)


def read_heads(path: Path, like: nn.Linear) -> nn.Linear:
    """The inverse of ``write_heads``, on the device and in the type of the model's own head.

    Raises:
        InputError: field ``preference_model``, if the heads do not fit the model.
    """
    tensors = load_file(path)
    shape = tuple(tensors["weight"].shape)
    if shape[1] != like.in_features:
        mend = f"has heads of shape {shape}; the model's features are {like.in_features}: fit it again"
        raise InputError("preference_model", str(path), mend)
    heads = nn.Linear(like.in_features, shape[0], bias="bias" in tensors, device=like.weight.device)
    heads.load_state_dict(tensors)
    return heads.to(like.weight.dtype).requires_grad_(False)
