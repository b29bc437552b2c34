"""Responses -> one example a member of a deliberation -> batches, for fitting a preference model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from deliberation.types import Choice, InputError, Rank, Rating, Response, SoftVote, Vote
from reward.calibration import RATINGS, VOTES
from reward.preference import PreferenceModel
from reward.prefixes import pad
from reward.scoring import encoder_inputs

Pairs = list[tuple[int, int]]
"""(preferred, other) as row numbers."""


@dataclass(frozen=True)
class Member:
    """What one member said in one deliberation, as token ids.

    Attributes:
        deliberation: number of the deliberation; members of the same one rated the same statements.
        prefix: question and opinion.
        suffixes: the statements, each once.
        labels: for each statement its rating's place on the scale, from 1; 0 where it has none (ranked, or chosen);
            between two places where a teacher says how likely either is.
        pairs: statements the member told apart.
        soft: (statement, P(agree)) of what a teacher said.
        weights: one a head of the ensemble, mean 1 over members (Bayesian bootstrap, Rubin 1981).
    """

    deliberation: int
    prefix: list[int]
    suffixes: list[list[int]]
    labels: list[float]
    pairs: Pairs
    weights: list[float]
    soft: list[tuple[int, float]] = field(default_factory=list)


def scale_of(responses: Sequence[Response]) -> tuple[int, ...]:
    """The values people answered with: ``RATINGS``, or ``VOTES`` (also where there are ranks or choices alone).

    Raises:
        InputError: field ``ratings``, if there are ratings beside votes or soft votes.
    """
    kinds = {type(r) for r in responses}
    if Rating in kinds and kinds & {Vote, SoftVote}:
        raise InputError("ratings", "ratings beside votes or soft votes", "are on two scales; fit to one of them")
    return RATINGS if Rating in kinds else VOTES


def rows_of_members(responses: Sequence[Response]) -> dict[tuple[str, int], list[int]]:
    """Row numbers of each (deliberation, member), in order of first appearance."""
    rows: dict[tuple[str, int], list[int]] = {}
    for row, response in enumerate(responses):
        rows.setdefault((response.deliberation_id, response.member), []).append(row)
    return rows


def members_of(
    model: PreferenceModel, responses: Sequence[Response], margin: int, heads: int = 1, seed: int = 0
) -> list[Member]:
    """One example a member and deliberation.

    Args:
        margin: smallest difference of two ratings that makes a pair; votes and ranks make one wherever they differ.
        heads: of the ensemble; one head has weights of 1.
        seed: of the bootstrap weights.
    """
    groups = rows_of_members(responses)
    numbers = {name: k for k, name in enumerate(dict.fromkeys(name for name, _ in groups))}
    weights = torch.ones(len(groups), heads)
    if heads > 1:
        weights.exponential_(generator=torch.Generator().manual_seed(seed))
    return [
        _member(model, [responses[row] for row in rows], margin, numbers[name], weights[k].tolist())
        for k, ((name, _), rows) in enumerate(groups.items())
    ]


def check_one_opinion(responses: Sequence[Response]) -> None:
    """Refuse responses under one deliberation and member number that are of several people.

    Raises:
        InputError: field ``opinion``.
    """
    if len({(r.question, r.opinion) for r in responses}) > 1:
        where = f"deliberation {responses[0].deliberation_id!r}, member {responses[0].member}"
        raise InputError("opinion", where, "has two opinions (or questions); give each a number of its own")


def _member(
    model: PreferenceModel, responses: Sequence[Response], margin: int, deliberation: int, weights: list[float]
) -> Member:
    check_one_opinion(responses)
    # 1. Each statement once
    texts = [text for r in responses for text in ((r.chosen, r.rejected) if isinstance(r, Choice) else (r.statement,))]
    place = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    # 2. What was said of it
    labels, pairs = [0.0] * len(place), []  # type: list[float], Pairs
    worth: dict[type, list[tuple[int, int]]] = {Rating: [], Vote: [], Rank: []}
    soft = [(place[r.statement], float(r.p_agree)) for r in responses if isinstance(r, SoftVote)]
    for r in responses:
        if isinstance(r, Choice):
            pairs.append((place[r.chosen], place[r.rejected]))
        elif isinstance(r, Rating):
            labels[place[r.statement]] = r.agreement
            worth[Rating].append((place[r.statement], r.agreement))
        elif isinstance(r, Vote) and r.vote:  # a pass says nothing
            labels[place[r.statement]] = 1 + (r.vote > 0)
            worth[Vote].append((place[r.statement], r.vote))
        elif isinstance(r, Rank):
            worth[Rank].append((place[r.statement], -r.rank))
    for k, p in soft:
        if labels[k]:
            where = f"deliberation {responses[0].deliberation_id!r}, member {responses[0].member}: {list(place)[k]!r}"
            raise InputError("statement", where, "has a soft vote beside another answer; leave one of them out")
        labels[k] = 1 + p
    # 3. What was told apart
    for kind, least in ((Rating, margin), (Vote, 1), (Rank, 1)):
        rows = worth[kind]
        told = [(rows[i][0], rows[j][0]) for i, j in pairs_of([value for _, value in rows], least)]
        pairs += [(i, j) for i, j in told if i != j]  # a text that was met twice
    prefix = model.prefix_ids(responses[0].question, responses[0].opinion)
    return Member(deliberation, prefix, [model.suffix_ids(text) for text in place], labels, pairs, weights, soft)


def soft_pairs(member: Member) -> list[tuple[int, int, float]]:
    """(Preferred, other, weight) of the statements a teacher spoke of; none where no two votes could differ.

    The weight is the chance that two independent votes tell the statements apart in this way, as a share of all the
    member's pairs: Bradley-Terry's loss on them is its mean over such votes. Weights add up to 1.
    """
    found = [(i, j, p * (1 - q)) for i, p in member.soft for j, q in member.soft if i != j]
    total = sum(weight for _, _, weight in found)
    return [(i, j, weight / total) for i, j, weight in found if weight]


def pairs_of(values: Sequence[int], margin: int) -> Pairs:
    """All (i, j) with values[i] - values[j] >= margin."""
    return [(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if a - b >= margin]


@dataclass(frozen=True)
class Collator:
    """Members -> one batch: rows sorted by length and cut into passes of similar length.

    ``pairs`` [pairs, 2] holds (preferred, other) as row numbers, within members first, then between members (on the
    same statement). A member's pairs, its soft pairs and its rows weigh as much as the member each; a deliberation's
    pairs between members as much as its members together, times ``between_weight``. Weights are [pairs or rows, heads].
    """

    model: PreferenceModel
    margin: int
    rows_a_pass: int
    between_weight: float = 0.0

    def __call__(self, members: Sequence[Member]) -> dict[str, Any]:
        rows = [(i, j) for i, member in enumerate(members) for j in range(len(member.suffixes))]
        rows.sort(key=lambda row: self._length(members, *row))
        place = {row: number for number, row in enumerate(rows)}
        pairs = [(place[i, w], place[i, x], i, 1 / len(m.pairs)) for i, m in enumerate(members) for w, x in m.pairs]
        pairs += [
            (place[i, w], place[i, x], i, weight) for i, m in enumerate(members) for w, x, weight in soft_pairs(m)
        ]
        if self.between_weight:
            pairs += self._between(members, place)
        bootstrap = torch.tensor([member.weights for member in members])
        labels = torch.tensor([members[i].labels[j] for i, j in rows])
        rated = [max(1, sum(label > 0 for label in member.labels)) for member in members]
        owners = torch.tensor([i for i, _ in rows])
        pair_owners, pair_weights = torch.tensor([p[2] for p in pairs], dtype=torch.long), [p[3] for p in pairs]
        prefix_ids, prefix_lengths = pad([member.prefix for member in members])
        return {
            "prefix_ids": prefix_ids,
            "prefix_lengths": prefix_lengths,
            "passes": [self._one_pass(members, part) for part in _chunks(rows, self.rows_a_pass)],
            "pairs": torch.tensor([p[:2] for p in pairs], dtype=torch.long).reshape(-1, 2),
            "pair_weights": torch.tensor(pair_weights)[:, None] * bootstrap[pair_owners],
            "labels": labels,
            "row_weights": (labels > 0)[:, None] * bootstrap[owners] / torch.tensor(rated)[owners][:, None],
        }

    def _length(self, members: Sequence[Member], i: int, j: int) -> int:
        return len(members[i].suffixes[j]) + (0 if self.model.shares_prefixes else len(members[i].prefix))

    def _one_pass(self, members: Sequence[Member], part: list[tuple[int, int]]) -> dict[str, Any]:
        if not self.model.shares_prefixes:
            pairs = [(members[i].prefix, members[i].suffixes[j]) for i, j in part]
            return dict(zip(("ids", "attention_mask", "types"), encoder_inputs(self.model, pairs, "cpu"), strict=True))
        ids, lengths = pad([members[i].suffixes[j] for i, j in part])
        return {"ids": ids, "lengths": lengths, "owners": torch.tensor([i for i, _ in part])}

    def _between(
        self, members: Sequence[Member], place: dict[tuple[int, int], int]
    ) -> list[tuple[int, int, int, float]]:
        """Pairs of members that rated the same statement apart; the preferring member's bootstrap weight counts."""
        seen: dict[int, dict[tuple[int, ...], list[tuple[int, int, float]]]] = {}
        sizes: dict[int, int] = {}
        for i, member in enumerate(members):
            sizes[member.deliberation] = sizes.get(member.deliberation, 0) + 1
            for j, suffix in enumerate(member.suffixes):
                if member.labels[j]:
                    same = seen.setdefault(member.deliberation, {}).setdefault(tuple(suffix), [])
                    same.append((i, place[i, j], member.labels[j]))
        found = []
        for deliberation, statements in seen.items():
            told = [
                (a[1], b[1], a[0])
                for same in statements.values()
                for a in same
                for b in same
                if a[2] - b[2] >= self.margin
            ]
            weight = self.between_weight * sizes[deliberation] / max(1, len(told))
            found += [(w, x, i, weight) for w, x, i in told]
        return found


def _chunks(rows: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


class LengthSampler(LengthGroupedSampler):
    """transformers' sampler of batches of similar length, in an order of each epoch's own."""

    def __init__(self, members: Sequence[Member], batch_size: int, seed: int):
        tokens = [len(m.prefix) + len(m.suffixes) * max(map(len, m.suffixes)) for m in members]
        super().__init__(batch_size, lengths=tokens, generator=torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that a resumed run meets the order it would have met."""
        self.generator.manual_seed(_seed_of_epoch(self.seed, epoch))


def _seed_of_epoch(seed: int, epoch: int) -> int:
    return seed + 1_000_003 * epoch


class DeliberationSampler(Sampler[int]):
    """Members of a deliberation one after the other, deliberations and members in an order of each epoch's own."""

    def __init__(self, members: Sequence[Member], seed: int):
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self._groups: dict[int, list[int]] = {}
        for i, member in enumerate(members):
            self._groups.setdefault(member.deliberation, []).append(i)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that a resumed run meets the order it would have met."""
        self.generator.manual_seed(_seed_of_epoch(self.seed, epoch))

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[int]:
        groups = list(self._groups.values())
        for k in torch.randperm(len(groups), generator=self.generator).tolist():
            for i in torch.randperm(len(groups[k]), generator=self.generator).tolist():
                yield groups[k][i]
