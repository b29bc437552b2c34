"""Fits the networks of a bi-encoder to what people said of statements, by the loss the cross-encoder is fitted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from deliberation.types import Response
from reward.bi_encoder import BiEncoder, load_encoder, make_networks
from reward.calibration import Calibration
from reward.examples import Collator, Member, members_of
from reward.held_out import texts_of
from reward.objective import preference_loss
from reward.preference import PreferenceModel
from reward.preference_config import PreferenceConfig
from reward.scoring import score_ratings

EPOCHS = 6
BATCH = 64
"""Members."""

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2


class _Numbered:
    """Stands where a ``PreferenceModel`` does when examples are made: a text's number in place of its tokens."""

    shares_prefixes = True

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def prefix_ids(self, question: str, opinion: str) -> list[int]:
        return [self.numbers.setdefault(opinion, len(self.numbers))]

    def suffix_ids(self, statement: str) -> list[int]:
        return [self.numbers.setdefault(statement, len(self.numbers))]


def fit_bi_encoder(
    name: str,
    responses: Sequence[Response],
    start: Calibration,
    config: PreferenceConfig,
    progress: bool = True,
    held_out: Sequence[Response] = (),
) -> BiEncoder:
    """Fit to what the cross-encoder is fitted to, see ``reward.train.fit``; scores are in logits, see ``weigh_alike``.

    Pairs between members (``between_weight``) are left to the cross-encoder.

    Args:
        name: the sentence encoder, a folder or a hub name.
        start: the fixed scale that the cross-encoder's scores move on.
        config: of the fit; every head of the ensemble is a network here.
        held_out: responses it will be asked to score, whose texts are checked before anything is fitted.

    Raises:
        InputError: field ``bi_encoder``, on a line longer than what the encoder reads, of ``held_out`` too.
    """
    logits = Calibration(start.cut_points, 1.0, start.values)  # the networks' own scale
    # 1. Every text once
    numbered = _Numbered()
    members = members_of(numbered, responses, config.margin, config.heads, config.seed)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        model = BiEncoder(*load_encoder(name, config.device), make_networks(1, 0))
        model.check_lengths([text for row in texts_of(held_out) for text in (row.opinion, row.statement)])
        vectors = model.vectors(list(numbered.numbers)).cpu().clone()  # out of inference mode
        # 2. The networks, by AdamW with a linear decay
        torch.manual_seed(config.seed)
        model.networks = make_networks(vectors.shape[1], config.heads)
        collator = Collator(numbered, config.margin, 1 << 30)  # type: ignore[arg-type]
        steps = EPOCHS * -(-len(members) // BATCH)
        optimiser = torch.optim.AdamW(model.networks.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
        with tqdm(total=steps, desc="bi-encoder", unit="batch", mininterval=5, disable=not progress) as bar:
            for _ in range(EPOCHS):
                for part in torch.randperm(len(members)).split(BATCH):
                    loss = _loss(
                        model, vectors, collator, [members[i] for i in part.tolist()], logits, config.ordinal_weight
                    )
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    bar.update()
    model.networks.eval().requires_grad_(False).to(config.device)
    return model


def weigh_alike(model: PreferenceModel, responses: Sequence[Response]) -> None:
    """Scale the networks' scores so that they have the standard deviation of the cross-encoder's.

    Left alone where one of the two scores all of ``responses`` (held out from both fits) alike.
    """
    assert model.bi_encoder is not None
    rows = texts_of(responses)
    read_together = float(score_ratings(replace(model, bi_encoder=None), rows).std())
    scores = model.bi_encoder.scores([row.opinion for row in rows], [row.statement for row in rows])
    read_apart = float(scores.mean(1).std(correction=0))
    if read_together > 0 and read_apart > 0:
        for network in model.bi_encoder.networks:
            for parameter in network[-1].parameters():  # type: ignore[index]
                parameter.mul_(read_together / read_apart)


def _loss(
    model: BiEncoder,
    vectors: torch.Tensor,
    collator: Collator,
    members: list[Member],
    start: Calibration,
    ordinal_weight: float,
) -> torch.Tensor:
    batch = collator(members)
    (rows,) = batch["passes"]
    opinions, statements = batch["prefix_ids"][rows["owners"], 0], rows["ids"][:, 0]
    scores = model.read(vectors[opinions], vectors[statements])
    return preference_loss(scores, batch, start, ordinal_weight)[0] / len(members)
