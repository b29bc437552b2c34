"""Prompts that begin alike, as one tree of tokens: what they share is there, and read, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORTH_SHARING = 0.5
"""Share of a prompt's tokens that it must have in common with another from which on both share a tree: below, the
attention of each to the other's tokens, which is computed and masked, costs more than is saved."""


@dataclass(frozen=True)
class PromptTree:
    """Some prompts' tokens, each common beginning once; parents come before their children.

    Attributes:
        ids: one token a node.
        paths: for each prompt, its nodes from the first token to the last.
    """

    ids: list[int]
    paths: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> PromptTree:
        """The tree of prompts given as token ids, none of them empty."""
        ids: list[int] = []
        paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for prompt in prompts:
            node, path = -1, []
            for token in prompt:
                node = children.setdefault((node, token), len(ids))
                if node == len(ids):
                    ids.append(token)
                path.append(node)
            paths.append(path)
        return cls(ids, paths)

    def positions(self) -> Tensor:
        """Each node's position in its prompts, [nodes]."""
        found = torch.zeros(len(self), dtype=torch.long)
        for path in self.paths:
            found[path] = torch.arange(len(path))
        return found

    def seen(self) -> Tensor:
        """What each node reads: itself and what leads to it. Bool [nodes, nodes]."""
        found = torch.zeros(len(self), len(self), dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            found[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return found


def begins_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether a tree of the two pays for itself."""
    needed = WORTH_SHARING * max(len(first), len(second))
    return list(first[: int(needed)]) == list(second[: int(needed)])
