"""Teachers of the human benchmark: how likely training people are to agree, with what they voted on and what not.

One vote is a coin toss around what a person thinks, and a person votes on few statements. Two teachers, fitted to the
votes of training people alone, say how likely each of them is to agree with any statement of their conversation; the
preference model, which reads text only, learns from that (distillation, Hinton et al. 2015).

Where people vote on many statements (Polis), a logistic matrix factorisation of the votes (Koren et al. 2009). Where
they answer and vote on few (dialogues), an MLP on sentence vectors, fitted to votes and choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.human_mlp import pair_features, pair_network

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


@dataclass(frozen=True)
class Reader:
    """Settings of the MLP teacher: the mean logit of ``fits`` networks.

    Chosen among a few with the public validation splits in view, as those of the anchor were.
    """

    hidden: int = 64
    dropout: float = 0.5
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 256
    epochs: int = 15
    fits: int = 4


@dataclass(frozen=True)
class Answers:
    """Votes and choices on sentence vectors of about unit variance a component; rows are numbers of vectors.

    Attributes:
        vectors: [texts, width].
        votes: (opinion, statement), [votes, 2].
        agreed: [votes], 0 or 1.
        choices: (opinion, chosen, rejected), [choices, 3].
    """

    vectors: Tensor
    votes: Tensor
    agreed: Tensor
    choices: Tensor


class Networks(nn.Module):
    """Opinion and statement vectors -> logit of P(agree)."""

    def __init__(self, width: int, settings: Reader):
        super().__init__()
        self.fits = nn.ModuleList(pair_network(width, settings.hidden, settings.dropout) for _ in range(settings.fits))

    def forward(self, opinions: Tensor, statements: Tensor) -> Tensor:
        """Vectors [n, width] each -> one logit a network, [n, fits]."""
        features = pair_features(opinions, statements)
        return torch.cat([fit(features) for fit in self.fits], dim=-1)


def fit_reader(answers: Answers, settings: Reader, seed: int) -> Networks:
    """Networks fitted to votes (cross-entropy) and choices (Bradley-Terry), in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks, x = Networks(answers.vectors.shape[1], settings), answers.vectors
        optimiser = torch.optim.AdamW(
            networks.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * -(-len(answers.votes) // settings.batch)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
        for _ in range(settings.epochs):
            for part in torch.randperm(len(answers.votes)).split(settings.batch):
                opinion, statement = answers.votes[part].unbind(1)
                truth = answers.agreed[part, None].expand(-1, settings.fits)
                loss = F.binary_cross_entropy_with_logits(networks(x[opinion], x[statement]), truth)
                if len(answers.choices):
                    some = torch.randint(len(answers.choices), (settings.batch,))
                    opinion, chosen, rejected = answers.choices[some].unbind(1)
                    ahead = networks(x[opinion], x[chosen]) - networks(x[opinion], x[rejected])
                    loss = loss - F.logsigmoid(ahead).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return networks.eval()


@torch.no_grad()
def p_agree(networks: Networks, opinion: Tensor, statements: Tensor) -> FloatArray:
    """P(agree) of one opinion's vector [width] with statements' vectors [n, width] -> [n]."""
    logits = networks(opinion.expand_as(statements), statements).double().mean(dim=-1)
    return logits.sigmoid().numpy()
