"""The teacher of the human benchmark: how likely training people are to agree, with what they voted on and what not.

One vote is a coin toss around what a person thinks, and a person votes on few statements. A logistic matrix
factorisation (Koren et al. 2009) of the votes of training people alone says how likely each of them is to agree with
any statement of their conversation; the preference model, which reads text only, learns from that (distillation,
Hinton et al. 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Factorisation:
    """Settings chosen by hiding a fifth of training people's own votes.

    ``ridge`` is the precision of the normal prior on factors, ``bias_ridge`` that on the biases.
    """

    rank: int = 6
    ridge: float = 4.0
    bias_ridge: float = 1.0
    steps: int = 300
    learning_rate: float = 0.05


def factorise(
    people: Sequence[int], statements: Sequence[int], agreed: Sequence[bool], settings: Factorisation, seed: int
) -> FloatArray:
    """P(agree) of every person with every statement, [people, statements], in (0, 1).

    logit P = m + a_person + b_statement + u_person . v_statement, by penalised maximum likelihood.

    Args:
        people, statements: numbers from 0 of who voted, and on what, [votes].
        agreed: how, [votes].
    """
    generator = torch.Generator().manual_seed(seed)
    who, what, truth = torch.tensor(people), torch.tensor(statements), torch.tensor(agreed, dtype=torch.float32)
    n, m, rank = int(who.max()) + 1, int(what.max()) + 1, settings.rank
    u, v = (nn.Parameter(0.1 * torch.randn(size, rank, generator=generator)) for size in (n, m))
    a, b = (nn.Parameter(torch.zeros(size)) for size in (n, m))
    mean = nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.Adam([u, v, a, b, mean], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, settings.steps)
    for _ in range(settings.steps):
        logits = mean + a[who] + b[what] + (u[who] * v[what]).sum(dim=1)
        prior = settings.ridge * (u.pow(2).sum() + v.pow(2).sum())
        prior = prior + settings.bias_ridge * (a.pow(2).sum() + b.pow(2).sum())
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") + prior / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return (mean + a[:, None] + b + u @ v.T).double().sigmoid().numpy()
