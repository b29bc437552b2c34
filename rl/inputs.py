"""Token ids as the model reads them: padded rows, or one row a prompt with all its completions behind it.

The last token of a completion predicts nothing (no action follows it), so it is never fed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ModelInputs(NamedTuple):
    """``R`` rows of ``L`` positions, with the places of the ``N`` action tokens (completion by completion, in order).

    ``source[i]`` is the flat index into ``[R * L]`` of the position that PREDICTS action token i (the one before it);
    ``targets[i]`` is that token's id. The state value before action i is read at ``source[i]`` too.
    """

    input_ids: Tensor  # int64 [R, L]
    attention_mask: Tensor | None  # int64 [R, L], or additive [R, 1, L, L]; None: causality alone hides the padding
    position_ids: Tensor | None  # int64 [R, L]; None: 0, 1, 2, ...
    source: Tensor  # int64 [N]
    targets: Tensor  # int64 [N]


def collate(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_id: int,
    *,
    padding_side: str = "right",
    device: torch.device | str = "cpu",
) -> ModelInputs:
    """One row a completion: its prompt, then itself. Outputs do not depend on the padding side."""
    rows = [[*p, *c[:-1]] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    real = torch.zeros_like(ids)
    source: list[int] = []
    for i, row in enumerate(rows):
        start = width - len(row) if padding_side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        real[i, start : start + len(row)] = 1
        first = i * width + start + len(prompt_ids[i]) - 1
        source.extend(range(first, first + len(completion_ids[i])))
    left = padding_side == "left"
    positions = (real.cumsum(1) - 1).clamp(min=0)
    targets = torch.tensor([token for c in completion_ids for token in c])
    return ModelInputs(
        ids.to(device),
        real.to(device) if left else None,
        positions.to(device) if left else None,
        torch.tensor(source, device=device),
        targets.to(device),
    )


def collate_shared(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_id: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelInputs:
    """One row a distinct prompt: the prompt once, then every completion, each blind to the others.

    Exact for full attention, gradient included (the mask makes each completion see the prompt and itself; position
    ids start again behind the prompt), and (P + nR) instead of n(P + R) tokens for n completions of a prompt.

    Args:
        dtype: of the additive mask: the model's.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompt_ids):
        groups.setdefault(tuple(prompt), []).append(i)
    width = max(len(p) + sum(len(completion_ids[i]) - 1 for i in members) for p, members in groups.items())
    ids = torch.full((len(groups), width), pad_id, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segment = torch.full_like(ids, -1)  # 0: prompt; k: the k-th completion behind it; -1: padding
    source: list[list[int]] = [[] for _ in prompt_ids]
    for row, (shared, members) in enumerate(groups.items()):
        behind = start = len(shared)
        ids[row, :start], positions[row, :start] = torch.tensor(shared), torch.arange(start)
        segment[row, :start] = 0
        for k, i in enumerate(members, start=1):
            fed = completion_ids[i][:-1]
            end = start + len(fed)
            ids[row, start:end] = torch.tensor(fed, dtype=torch.long)
            positions[row, start:end] = torch.arange(behind, behind + len(fed))
            segment[row, start:end] = k
            source[i] = [row * width + behind - 1, *range(row * width + start, row * width + end)]
            start = end
    by_key, by_query = segment[:, None, :], segment[:, :, None]
    allowed = torch.ones(width, width, dtype=torch.bool).tril() & ((by_key == 0) | (by_key == by_query))
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
    targets = torch.tensor([token for c in completion_ids for token in c])
    return ModelInputs(
        ids.to(device),
        mask.to(device),
        positions.to(device),
        torch.tensor([s for part in source for s in part], device=device),
        targets.to(device),
    )


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Values of action tokens ``[N]`` laid out as ``mask`` ``[B, T]`` says, zero elsewhere; with gradient."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
