"""The small network that reads a pair of sentence vectors: of the anchor, and of the dialogues' teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pair_features(opinions: Tensor, statements: Tensor) -> Tensor:
    """Vectors [n, width] each -> [n, 4 width]: p, s, p * s, |p - s|."""
    return torch.cat([opinions, statements, opinions * statements, (opinions - statements).abs()], dim=-1)


def pair_network(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Features of vectors of ``width`` components, [n, 4 width] -> logit [n, 1]."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(4 * width, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, 1),
    )
