"""Whether a model reads a text beside others, or after a shared prefix, as alone: tried where its use begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deliberation.types import InputError
from reward.heads import encoder_features, inner_model, is_encoder
from reward.prefixes import attention_mask, mask, pad, prefix_attention, shared_states, suffix_features, token_types

_PREFIXES, _SUFFIXES = (18, 10), (2, 6)
"""Tokens of the made-up texts; the prefixes begin alike, as members' do with the question."""

_MOST = {"cpu": 1e-3, "cuda": 1e-2}
"""Largest difference there may be in float32, as a share of the largest feature (a GPU may multiply in TF32). Rounding
makes 1e-6; wrong masks and positions made .04 to .7 in tiny models of random weights."""
_MOST_ROUNDED = 0.1
"""The same in types of fewer bits."""

_CAUSAL = "is not causal full attention with positions as given; use e.g. Llama or Qwen3"
_PREFIX = "cannot read with prefix attention; use attention: pair, or a BERT with a pooled [CLS]"
_PAIR = "does not read a text pair beside a longer one as it reads it alone; use e.g. BERT, RoBERTa or DeBERTa"


@torch.no_grad()
def check_reading(model: Any, shares: bool, reads_types: bool, field: str) -> None:
    """Refuse a model whose score of a text depends on what is computed beside it.

    A window longer than the made-up texts shows in the config alone (see ``reward.prefixes.sharing_backbone``). Weights
    that are no numbers are another fault, and pass. Leaves the model as it was.

    Args:
        shares, reads_types: as of ``PreferenceModel``.
        field: what the error names.

    Raises:
        InputError: whose value is the architecture.
    """
    training, kind = model.training, inner_model(model).config.model_type
    mend = _PAIR if not shares else _PREFIX if is_encoder(model) else _CAUSAL
    prefixes, suffixes = _texts(inner_model(model).config)
    model.eval()
    try:
        pairs = list(zip(prefixes, suffixes, strict=True))
        if shares:
            together = _after_prefixes(model, prefixes, suffixes, reads_types)
        else:
            together = _read(model, pairs, reads_types)
        alone = torch.cat([_read(model, [pair], reads_types, shares) for pair in pairs])
        most = _MOST.get(alone.device.type, 1e-2) if alone.dtype == torch.float32 else _MOST_ROUNDED
        differ = bool(alone.isfinite().all()) and not (together - alone).abs().max() <= most * alone.abs().max()
    except Exception as error:  # whatever a model says that takes no such mask, cache or head
        why = error.mend.partition(";")[0] if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(field, kind, f"{mend} ({why})") from error
    finally:
        model.train(training)
    if differ:
        raise InputError(field, kind, mend)


def _texts(config: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of two prefixes and two suffixes, none of them padding."""
    usable = [k for k in range(64) if k < config.get_text_config().vocab_size and k != config.pad_token_id]
    ids = [usable[k % len(usable)] for k in range(3, 3 + max(_PREFIXES) + sum(_SUFFIXES))]
    long, short = _PREFIXES
    one, other = _SUFFIXES
    return [ids[:long], ids[:short]], [ids[long : long + one], ids[long + one : long + one + other]]


def _after_prefixes(model: Any, prefixes: list[list[int]], suffixes: list[list[int]], reads_types: bool) -> Tensor:
    """What the head reads of suffix i after prefix i, [rows, hidden], as scoring computes it."""
    states = shared_states(model, prefixes, model.device)
    owners = torch.arange(len(prefixes), device=model.device)
    return suffix_features(model, states, *pad(suffixes, model.device), owners, reads_types=reads_types)


def _read(model: Any, pairs: list[tuple[list[int], list[int]]], reads_types: bool, prefix_mask: bool = False) -> Tensor:
    """What the head reads of whole (prefix, suffix) rows, [rows, hidden], through the model's own forward."""
    ids, lengths = pad([[*prefix, *suffix] for prefix, suffix in pairs], model.device)
    types = token_types([len(prefix) for prefix, _ in pairs], ids.shape[1], model.device) if reads_types else None
    seen = mask(lengths, ids.shape[1])
    if not is_encoder(model):  # its head is applied to every token, and read at the last
        return encoder_features(model, ids, seen, None)[torch.arange(len(pairs)), lengths.cpu() - 1]
    if prefix_mask:
        seen = attention_mask(model, prefix_attention(len(pairs[0][0]), ids.shape[1]).to(model.device))
    return encoder_features(model, ids, seen, types)
