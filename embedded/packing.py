"""Several continuations of one prefix in one sequence: the prefix is computed once, no continuation sees another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Packed:
    """b sequences of length t; each is a prefix followed by its continuations.

    Attributes:
        ids: long [b, t], padded on the right.
        positions: long [b, t]; they start again behind the prefix for every continuation.
        mask: float [b, 1, t, t], 0 where attention may look, else -inf: the own prefix and the own continuation.
        segment: long [b, t]; 0 in the prefix, k in continuation k, -1 in padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    segment: torch.Tensor


def pack(rows: list[list[list[int]]], pad: int) -> Packed:
    """Pack rows of token ids, each [prefix, continuation, ...]."""
    length = max(sum(map(len, parts)) for parts in rows)
    shape = (len(rows), length)
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1)
    for b, parts in enumerate(rows):
        cursor = 0
        for s, part in enumerate(parts):
            end, first = cursor + len(part), len(parts[0]) if s else 0
            ids[b, cursor:end] = torch.tensor(part)
            positions[b, cursor:end] = torch.arange(first, first + len(part))
            segment[b, cursor:end] = s
            cursor = end
    causal = torch.ones(length, length).tril().bool()
    visible = causal & ((segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0))
    visible |= torch.eye(length).bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None]
    return Packed(ids, positions, mask, segment)
