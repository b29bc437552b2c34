"""Shared prefixes: a member's question and opinion run once, all the statements it judges attend to them.

``prefix_states`` keeps keys and values, ``suffix_features`` continues from them; both serve training (with gradient)
and scoring (without). ``shared_states`` also runs the beginning that all prefixes share, the question, once.

Exact for causal models with full attention (``reward.probe`` refuses others where their use begins), and for BERT
fitted with *prefix attention*: the prefix does not see the statement, the statement and [CLS] see everything.
``prefix_attention`` is the mask with which the plain model gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from deliberation.last_layer import last_feed_forward_at
from deliberation.types import InputError
from reward.heads import inner_model, is_encoder

_SHORTEST_SHARED = 8
"""Tokens from which a common beginning is worth a forward pass of its own."""


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of some members' prefixes.

    Attributes:
        layers: (keys, values) a layer, each [members, key heads, width, head size], padded on the right.
        lengths: real tokens of each prefix, [members].
        opening: an encoder's [CLS], which reads the statement and so belongs to the suffix; None in causal models.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    opening: int | None = None

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[2]

    def split(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Each member's keys and values without padding, [key heads, length, head size], in memory of their own."""
        lengths = self.lengths.tolist()
        return [
            [(keys[i, :, :n].clone(), values[i, :, :n].clone()) for keys, values in self.layers]
            for i, n in enumerate(lengths)
        ]

    @classmethod
    def join(cls, members: Sequence[list[tuple[Tensor, Tensor]]], opening: int | None) -> Prefixes:
        """The inverse of ``split``."""
        lengths = [member[0][0].shape[1] for member in members]
        layers = [
            (_padded([m[layer][0] for m in members]), _padded([m[layer][1] for m in members]))
            for layer in range(len(members[0]))
        ]
        return cls(layers, torch.tensor(lengths, device=layers[0][0].device), opening)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [heads, length, size] -> [rows, heads, longest, size]."""
    return nn.utils.rnn.pad_sequence([row.transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2)


class _SharedPrefixLayer(DynamicLayer):
    """A cache layer that holds each prefix once and repeats it for its rows only while they are computed."""

    def __init__(self, keys: Tensor, values: Tensor, owners: Tensor, keep: bool):
        super().__init__()
        self.keys, self.values, self.owners, self.is_initialized = keys, values, owners, True
        self.keep, self.whole = keep, (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix + suffix, [rows, heads, width + suffix, size]; stores nothing but where asked."""
        keys = torch.cat([self.keys.index_select(0, self.owners), key_states], dim=-2)
        values = torch.cat([self.values.index_select(0, self.owners), value_states], dim=-2)
        if self.keep:
            self.whole = keys, values
        return keys, values


def prefix_states(model: nn.Module, ids: Tensor, lengths: Tensor) -> Prefixes:
    """Run prefixes ids [members, width] (right-padded, real ``lengths`` [members]) and keep their keys and values.

    Keeps the graph where gradients are on: the prefix then gets the gradient of all its rows in one backward pass.

    Raises:
        InputError: field ``preference_model``, if the model is not causal full attention.
    """
    backbone = sharing_backbone(model)
    opening = int(ids[0, 0]) if is_encoder(model) else None
    if opening is None:
        with last_feed_forward_at(backbone, lengths[:0], ids.shape):
            output = backbone(input_ids=ids, attention_mask=mask(lengths, ids.shape[1]), use_cache=True)
        cache = output.get("cache")
    else:
        ids, lengths, cache = ids[:, 1:], lengths - 1, DynamicCache(config=backbone.config)
        backbone(
            input_ids=ids,
            attention_mask=_encoder_mask(backbone, mask(lengths, ids.shape[1]).bool(), ids.shape[1]),
            position_ids=1 + torch.arange(ids.shape[1], device=ids.device)[None],
            cache=cache,
        )
    if not isinstance(cache, Cache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise _not_shareable(backbone.config.model_type, "keeps no plain key-value cache")
    return Prefixes([(layer.keys, layer.values) for layer in cache.layers], lengths, opening)


def shared_states(model: nn.Module, prefixes: Sequence[Sequence[int]], device: torch.device | str) -> Prefixes:
    """``prefix_states`` of token ids, the beginning that all of them share computed once."""
    shared = 0 if is_encoder(model) else _common_beginning(prefixes)  # in an encoder the question sees the opinion
    if shared < _SHORTEST_SHARED or len(prefixes) == 1:
        return prefix_states(model, *pad(prefixes, device))
    beginning = prefix_states(model, *pad([prefixes[0][:shared]], device))
    ids, lengths = pad([prefix[shared:] for prefix in prefixes], device)
    layers = [_SharedPrefixLayer(*layer, torch.zeros_like(lengths), keep=True) for layer in beginning.layers]
    with last_feed_forward_at(sharing_backbone(model), lengths[:0], ids.shape):
        _continue(model, beginning, layers, ids, lengths, torch.zeros_like(lengths))
    return Prefixes([layer.whole for layer in layers], lengths + shared)


def _common_beginning(prefixes: Sequence[Sequence[int]]) -> int:
    """Tokens that all prefixes begin with, at least one less than the shortest has."""
    rows = [tuple(prefix) for prefix in prefixes]
    first, last = min(rows), max(rows)  # in the order of tuples, these two differ the earliest
    limit = min(len(prefix) for prefix in prefixes) - 1
    return next((k for k in range(limit) if first[k] != last[k]), limit)


def suffix_features(
    model: nn.Module, prefixes: Prefixes, ids: Tensor, lengths: Tensor, owners: Tensor, *, reads_types: bool
) -> Tensor:
    """What the head reads of each row, [rows, hidden]: the state at the last real token of each suffix.

    Args:
        ids: suffixes [rows, width], right-padded; what stands in the padding is never read.
        lengths: real tokens of each suffix, [rows], >= 1.
        owners: the row's member as an index into ``prefixes``, [rows].
        reads_types: whether an encoder tells prefix and suffix apart by token types; means nothing in causal models.
    """
    layers = [_SharedPrefixLayer(keys, values, owners, keep=False) for keys, values in prefixes.layers]
    if prefixes.opening is not None:
        return _read_opening(model, prefixes, layers, ids, lengths, owners, reads_types)
    rows, width = ids.shape
    last = torch.arange(rows, device=ids.device) * width + lengths - 1
    with last_feed_forward_at(sharing_backbone(model), last, ids.shape):
        hidden = _continue(model, prefixes, layers, ids, lengths, owners)
    return hidden.flatten(0, 1)[last]


def _continue(
    model: nn.Module, prefixes: Prefixes, layers: Sequence[Any], ids: Tensor, lengths: Tensor, owners: Tensor
) -> Tensor:
    """Hidden states [rows, width, hidden] of ids that follow their owner's prefix."""
    before = prefixes.lengths[owners]
    return sharing_backbone(model)(
        input_ids=ids,
        attention_mask=torch.cat([mask(before, prefixes.width), mask(lengths, ids.shape[1])], dim=1),
        position_ids=before[:, None] + torch.arange(ids.shape[1], device=ids.device),
        cache=Cache(layers=list(layers)),
        use_cache=True,
    ).last_hidden_state


def _read_opening(
    model: nn.Module,
    prefixes: Prefixes,
    layers: Sequence[Any],
    ids: Tensor,
    lengths: Tensor,
    owners: Tensor,
    reads_types: bool,
) -> Tensor:
    """What BERT's head reads, [rows, hidden]: the pooled [CLS], which stands before the prefix and sees all of it."""
    rows, width = ids.shape
    before = prefixes.lengths[owners]
    first = torch.full((rows, 1), int(prefixes.opening or 0), device=ids.device)
    after = 1 + before[:, None] + torch.arange(width, device=ids.device)
    backbone = sharing_backbone(model)
    seen = torch.cat([mask(before, prefixes.width), mask(lengths + 1, width + 1)], dim=1).bool()
    types = token_types([1] * rows, width + 1, ids.device)
    return backbone(
        input_ids=torch.cat([first, ids], dim=1),
        **({"token_type_ids": types} if reads_types else {}),
        attention_mask=_encoder_mask(backbone, seen, width + 1),
        position_ids=torch.cat([torch.zeros_like(first), after], dim=1),
        cache=Cache(layers=list(layers)),
    ).pooler_output


def _encoder_mask(backbone: Any, seen: Tensor, queries: int) -> Tensor:
    """Keys that every query of a row sees, bool [rows, keys], as a mask [rows, 1, queries, keys]."""
    return attention_mask(backbone, seen[:, None, None, :].expand(-1, 1, queries, -1))


def attention_mask(model: Any, seen: Tensor) -> Tensor:
    """What may be seen, bool [rows, 1, queries, keys], as the model's attention takes it.

    Eager attention adds the mask to its logits, whatever its type: true and false would be 1 and 0.
    """
    if model.config._attn_implementation != "eager":
        return seen
    kind = seen.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def prefix_attention(prefix_length: int, length: int) -> Tensor:
    """What each token of [CLS] + prefix + statement sees in an encoder with prefix attention, bool [1, 1, n, n].

    For ``attention_mask`` of the plain model (through :func:`attention_mask`, where its attention is eager): [CLS] and
    the statement see everything, the prefix sees itself.
    """
    sees = torch.ones(length, length, dtype=torch.bool)
    sees[1:prefix_length, 0] = False
    sees[1:prefix_length, prefix_length:] = False
    return sees[None, None]


def pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest], padded on the right with 0 (masked by length, so any id would do), and lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def mask(lengths: Tensor, width: int) -> Tensor:
    """1 for real tokens, 0 for padding: [rows, width]."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def token_types(prefix_lengths: Sequence[int], width: int, device: torch.device | str) -> Tensor:
    """0 for the prefix, 1 for what follows: [rows, width]."""
    return 1 - mask(torch.tensor(prefix_lengths, device=device), width)


def sharing_backbone(model: nn.Module) -> Any:
    """The transformer below the head.

    Raises:
        InputError: field ``preference_model``, if its config names layers other than full attention.
    """
    inner = inner_model(model)
    backbone = getattr(inner, inner.base_model_prefix)
    named = getattr(backbone.config, "layer_types", None) or getattr(backbone.config, "attention_layers", None)
    kinds = set(named or []) - {"full_attention", "global"}  # the latter is GPT-Neo's word
    if kinds:
        raise _not_shareable(backbone.config.model_type, f"has layers of type {', '.join(sorted(kinds))}")
    return backbone


def _not_shareable(what: str, why: str) -> InputError:
    return InputError("preference_model", what, f"{why}; use a causal full-attention model such as Llama or Qwen3")
