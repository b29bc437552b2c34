"""The bi-encoder beside the cross-encoder: a vector of the opinion, one of the statement, and small networks on both.

The cross-encoder reads opinion and statement together. A bi-encoder reads each text alone (Reimers & Gurevych 2019),
and its networks read how the two vectors lie to each other (Conneau et al. 2017). Its score is added to the
cross-encoder's. On disk it is the folder ``bi_encoder`` of the preference model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deliberation.tokens import plain_ids
from deliberation.types import InputError
from reward.heads import room_of

FOLDER = "bi_encoder"
NETWORKS_FILE = "networks.safetensors"
HIDDEN = 128
"""Width of a network's one hidden layer."""

DROPOUT = 0.5
BATCH_TOKENS, BATCH_ROWS = 4096, 8192
"""Tokens (padding included) in one pass of the encoder, rows in one of the networks. Bounds the memory alone."""


@dataclass
class BiEncoder:
    """A sentence encoder and the networks that read its vectors.

    Attributes:
        encoder: its mean over the token states is a text's vector; kept as it was pretrained.
        tokenizer: the encoder's.
        networks: one a head of the ensemble, features [rows, 4 width] -> score [rows, 1].
    """

    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    networks: nn.ModuleList

    @torch.inference_mode()
    def scores(self, opinions: Sequence[str], statements: Sequence[str]) -> Tensor:
        """Scores float32 [rows, networks] of (opinion, statement) i; each distinct text is read once."""
        texts = list(dict.fromkeys([*opinions, *statements]))
        vectors, place = self.vectors(texts), {text: k for k, text in enumerate(texts)}
        rows = torch.tensor([(place[o], place[s]) for o, s in zip(opinions, statements, strict=True)])
        return torch.cat([self.read(vectors[o], vectors[s]) for o, s in (part.T for part in rows.split(BATCH_ROWS))])

    def read(self, opinions: Tensor, statements: Tensor) -> Tensor:
        """Vectors [rows, width] each -> scores [rows, networks]."""
        features = pair_features(opinions, statements)
        return torch.cat([network(features) for network in self.networks], dim=1)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Vectors float32 [texts, width] of about unit variance a component: the mean over a text's lines.

        What someone endorsed stands on lines of its own, and the mean does not depend on their order.

        Raises:
            InputError: field ``bi_encoder``, on a line longer than what the encoder reads.
        """
        lines = _lines(texts)
        distinct = _distinct(lines)
        read = torch.cat([self._unit_vectors(part) for part in self._passes(distinct)])
        place = {line: k for k, line in enumerate(distinct)}
        means = torch.stack([read[[place[line] for line in text]].mean(0) for text in lines])
        return means * means.shape[1] ** 0.5

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Refuse texts that ``vectors`` could not read.

        Raises:
            InputError: field ``bi_encoder``, on a line longer than what the encoder reads.
        """
        self._passes(_distinct(_lines(texts)))

    def _passes(self, texts: list[str]) -> list[list[list[int]]]:
        """Token ids of texts in order of length, cut into forward passes."""
        room = room_of(self.encoder, self.tokenizer)
        passes: list[list[list[int]]] = [[]]
        for text in texts:
            ids = plain_ids(self.tokenizer, text)
            if len(ids) > room:
                mend = f"is longer than the {room} that the bi-encoder reads; shorten it, or break it into lines"
                raise InputError("bi_encoder", f"{text[:40]!r} ({len(ids)} tokens)", mend)
            longest = max([len(ids), *map(len, passes[-1])])
            if passes[-1] and (len(passes[-1]) + 1) * longest > BATCH_TOKENS:
                passes.append([])
            passes[-1].append(ids)
        return passes

    def _unit_vectors(self, rows: list[list[int]]) -> Tensor:
        device, width = self.encoder.device, max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[..., None].float()
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> BiEncoder:
        """Load what ``save`` wrote. No code is trusted."""
        encoder, tokenizer = load_encoder(str(folder), device)
        tensors = load_file(folder / NETWORKS_FILE)
        networks = make_networks(encoder.config.hidden_size, 1 + max(int(name.split(".")[0]) for name in tensors))
        networks.load_state_dict(tensors)
        return cls(encoder, tokenizer, networks.to(device).eval())

    def save(self, folder: Path) -> None:
        """Encoder, tokenizer and networks, as safetensors."""
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(
            {name: p.detach().contiguous() for name, p in self.networks.state_dict().items()}, folder / NETWORKS_FILE
        )


def _lines(texts: Sequence[str]) -> list[list[str]]:
    """The lines of each text that say something; a blank text is its own."""
    return [[line for line in text.split("\n") if line.strip()] or [text] for text in texts]


def _distinct(lines: Sequence[Sequence[str]]) -> list[str]:
    """Every line once, in order of length."""
    return sorted({line for text in lines for line in text}, key=lambda line: (len(line), line))


def load_encoder(name: str, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained encoder in float32, and its tokenizer; safetensors alone, no code trusted."""
    encoder = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    return encoder.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def without_weights(folder: Path) -> BiEncoder:
    """What ``BiEncoder.load`` loads, without weights and networks: to check lengths."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = AutoModel.from_config(config, trust_remote_code=False)
    return BiEncoder(encoder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), nn.ModuleList())


def make_networks(width: int, count: int) -> nn.ModuleList:
    """``count`` networks on features of vectors of ``width`` components."""
    return nn.ModuleList(pair_network(width, HIDDEN, DROPOUT) for _ in range(count))


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
