"""Scores of all members for all statements, nothing computed twice.

A row is one (member, statement): the member's prefix (question, opinion) and the statement as suffix, tokenised apart.
Causal models run the question once, each prefix once, and each statement once a member after it (``prefixes``), and so
do encoders fitted with prefix attention. Others read prefix and statement together, in batches of similar length.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deliberation.types import InputError
from reward.heads import apply_head, encoder_features, head_of, is_encoder
from reward.preference import PreferenceModel
from reward.prefix_cache import PrefixCache
from reward.prefixes import attention_mask, mask, pad, prefix_attention, shared_states, suffix_features, token_types

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Tokens (rows x padded length, prefix included) in one forward pass: what was fastest (a CPU likes what fits its
cache). Bounds the memory, not the result."""


_LONGEST_WORD = 40
"""Characters; what is longer is several words written without spaces."""


@dataclass(frozen=True)
class Scores:
    """What every member makes of every statement.

    Attributes:
        raw: the model's scores, float32 [members, statements]; always kept, since the map to utilities may change.
        utilities: expected ratings in [1, 7], same shape and type.
        sd: standard deviations of the utilities on the 1 to 7 scale, same shape and type; None if the model has no
            ensemble.
        warnings: sentences on what was not scored as given, e.g. an opinion that was cut.
    """

    raw: NDArray[np.float32]
    utilities: NDArray[np.float32]
    sd: NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()


class HasTexts(Protocol):
    """What is read of a response."""

    @property
    def question(self) -> str: ...
    @property
    def opinion(self) -> str: ...
    @property
    def statement(self) -> str: ...


@dataclass(frozen=True)
class Answered:
    """A member, known by an opinion, and a statement."""

    question: str
    opinion: str
    statement: str


@dataclass(frozen=True)
class RowScores:
    """Scores of rows: ``raw`` float32 [rows]; ``ensemble`` float32 [rows, members of the ensemble], or None.

    ``rows`` may be two dimensions, [members, statements].
    """

    raw: NDArray[np.float32]
    ensemble: NDArray[np.float32] | None


def score(
    preference_model: PreferenceModel,
    question: str,
    opinions: Sequence[str],
    statements: Sequence[str],
    *,
    batch_tokens: int | None = None,
    cache: PrefixCache | None = None,
    truncate: bool = False,
) -> Scores:
    """Score every statement for every member.

    Equal opinions and equal statements are computed once. Neither order nor batch changes a score (1e-5, float32).

    Args:
        batch_tokens: bound of one forward pass; None takes ``BATCH_TOKENS`` of the model's device.
        cache: keeps this model's prefixes across calls.
        truncate: cut an opinion that does not fit the model at the end and warn, instead of raising.

    Raises:
        InputError: on an empty group, no or blank statements, an opinion (``opinions[i]``) or statement too long for
            the model, or an architecture whose layers are not full attention (see ``reward.probe``).
    """
    _check_texts(opinions, statements)
    endings = [tuple(preference_model.suffix_ids(s)) for s in statements]
    opinions, beginnings, warnings = _fitting_opinions(preference_model, question, opinions, endings, truncate)
    prefixes, member = _distinct(beginnings)
    suffixes, statement = _distinct(endings)
    owners = [i for i in range(len(prefixes)) for _ in suffixes]
    rows = score_rows(
        preference_model, prefixes, suffixes * len(prefixes), owners, batch_tokens=batch_tokens, cache=cache
    )
    place = np.arange(len(owners)).reshape(-1, len(suffixes))[np.ix_(member, statement)]
    on_grid = RowScores(rows.raw[place], None if rows.ensemble is None else rows.ensemble[place])
    return _scores(preference_model, _with_bi_encoder(preference_model, on_grid, opinions, statements), warnings)


@torch.inference_mode()
def score_one_by_one(
    preference_model: PreferenceModel, question: str, opinions: Sequence[str], statements: Sequence[str]
) -> Scores:
    """The slow reference: one whole sequence a row through the model's own forward, nothing shared or padded."""
    _check_texts(opinions, statements)
    raw = np.empty((len(opinions), len(statements)), dtype=np.float32)
    model = preference_model.model.eval()
    for i, opinion in enumerate(opinions):
        for j, statement in enumerate(statements):
            prefix, suffix = preference_model.prefix_ids(question, opinion), preference_model.suffix_ids(statement)
            ids = torch.tensor([prefix + suffix], device=model.device)
            extra = {}
            if preference_model.reads_types:
                extra["token_type_ids"] = token_types([len(prefix)], ids.shape[1], model.device)
            if is_encoder(model) and preference_model.shares_prefixes:
                seen = prefix_attention(len(prefix), ids.shape[1]).to(model.device)
                extra["attention_mask"] = attention_mask(model, seen)
            raw[i, j] = float(model(ids, **extra).logits[0, 0])
            if preference_model.bi_encoder is not None:
                raw[i, j] += float(preference_model.bi_encoder.scores([opinion], [statement]).mean())
    return Scores(raw, preference_model.calibration.utilities(raw).astype(np.float32))


def score_ratings(
    preference_model: PreferenceModel, ratings: Sequence[HasTexts], *, batch_tokens: int | None = None
) -> NDArray[np.float32]:
    """Raw score of each response's statement for its member, [responses]; equal prefixes are computed once."""
    return score_responses(preference_model, ratings, batch_tokens=batch_tokens).raw


def score_responses(
    preference_model: PreferenceModel, responses: Sequence[HasTexts], *, batch_tokens: int | None = None
) -> RowScores:
    """``score_ratings`` with what every member of the ensemble says."""
    prefix_of = {(r.question, r.opinion): () for r in responses}  # type: dict[tuple[str, str], tuple[int, ...]]
    for question, opinion in prefix_of:
        prefix_of[question, opinion] = tuple(preference_model.prefix_ids(question, opinion))
    suffix_of = {text: tuple(preference_model.suffix_ids(text)) for text in {r.statement for r in responses}}
    prefixes, owners = _distinct([prefix_of[r.question, r.opinion] for r in responses])
    suffixes = [suffix_of[r.statement] for r in responses]
    rows = score_rows(preference_model, prefixes, suffixes, owners, batch_tokens=batch_tokens)
    opinions, statements = [r.opinion for r in responses], [r.statement for r in responses]
    return _with_bi_encoder(preference_model, rows, opinions, statements)


@torch.inference_mode()
def score_rows(
    preference_model: PreferenceModel,
    prefixes: Sequence[tuple[int, ...]],
    suffixes: Sequence[tuple[int, ...]],
    owners: Sequence[int],
    *,
    batch_tokens: int | None = None,
    cache: PrefixCache | None = None,
) -> RowScores:
    """The cross-encoder's scores [rows] of suffix i after prefix ``owners[i]``, all as token ids, in batches of similar
    length."""
    longest = max((len(prefixes[o]) + len(s) for o, s in zip(owners, suffixes, strict=True)), default=0)
    if longest > preference_model.room:
        mend = f"with question and opinion; shorten it, as the model reads at most {preference_model.room}"
        raise InputError("statements", f"{longest} tokens", mend)
    model = preference_model.model.eval()
    limit = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    runs = _shared_runs if preference_model.shares_prefixes else _pair_runs
    members = preference_model.ensemble
    raw = np.empty(len(suffixes), dtype=np.float32)
    ensemble = None if members is None else np.empty((len(suffixes), members.out_features), dtype=np.float32)
    with preference_model.lock:
        for rows, features in runs(preference_model, prefixes, suffixes, owners, limit, cache):
            raw[rows] = apply_head(head_of(model), features)[:, 0].cpu().numpy()
            if members is not None and ensemble is not None:
                ensemble[rows] = apply_head(members, features).cpu().numpy()
    return RowScores(raw, ensemble)


Runs = Iterator[tuple[list[int], Tensor]]
"""Row numbers and their features [rows, hidden]."""


def _shared_runs(
    preference_model: PreferenceModel,
    prefixes: Sequence[tuple[int, ...]],
    suffixes: Sequence[tuple[int, ...]],
    owners: Sequence[int],
    limit: int,
    cache: PrefixCache | None,
) -> Runs:
    model = preference_model.model
    states_of: Callable = shared_states if cache is None else cache.states
    rows_of: list[list[int]] = [[] for _ in prefixes]
    for row, owner in enumerate(owners):
        rows_of[owner].append(row)
    # 1. Members of similar prefix length together: each prefix once
    by_length = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    for members in _batches(by_length, [len(p) for p in prefixes], 0, limit):
        states = states_of(model, [prefixes[i] for i in members], model.device)
        place = {member: i for i, member in enumerate(members)}
        # 2. Their rows, in batches of similar suffix length
        rows = sorted((row for i in members for row in rows_of[i]), key=lambda row: len(suffixes[row]))
        for batch in _batches(rows, [len(s) for s in suffixes], states.width, limit):
            batch_owners = torch.tensor([place[owners[row]] for row in batch], device=model.device)
            ids, lengths = pad([suffixes[row] for row in batch], model.device)
            types = preference_model.reads_types
            yield batch, suffix_features(model, states, ids, lengths, batch_owners, reads_types=types)


def _pair_runs(
    preference_model: PreferenceModel,
    prefixes: Sequence[tuple[int, ...]],
    suffixes: Sequence[tuple[int, ...]],
    owners: Sequence[int],
    limit: int,
    cache: PrefixCache | None,
) -> Runs:
    model = preference_model.model
    lengths = [len(prefixes[o]) + len(s) for o, s in zip(owners, suffixes, strict=True)]
    for batch in _batches(sorted(range(len(suffixes)), key=lengths.__getitem__), lengths, 0, limit):
        pairs = [(prefixes[owners[row]], suffixes[row]) for row in batch]
        yield batch, encoder_features(model, *encoder_inputs(preference_model, pairs, model.device))


def encoder_inputs(
    preference_model: PreferenceModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token ids, attention mask and token types (None where the model has none) of (prefix, suffix) pairs."""
    ids, lengths = pad([[*prefix, *suffix] for prefix, suffix in pairs], device)
    types = token_types([len(prefix) for prefix, _ in pairs], ids.shape[1], device)
    return ids, mask(lengths, ids.shape[1]), types if preference_model.reads_types else None


def _with_bi_encoder(
    preference_model: PreferenceModel, scores: RowScores, opinions: Sequence[str], statements: Sequence[str]
) -> RowScores:
    """Add what the bi-encoder says, if there is one; ``scores`` of as many rows, or [opinions, statements]."""
    beside = preference_model.bi_encoder
    if beside is None:
        return scores
    if scores.raw.ndim == 2:
        opinions, statements = [o for o in opinions for _ in statements], [*statements] * len(opinions)
    added = beside.scores(opinions, statements).cpu().numpy().reshape(*scores.raw.shape, -1)
    return RowScores(scores.raw + added.mean(-1), None if scores.ensemble is None else scores.ensemble + added)


def _fitting_opinions(
    preference_model: PreferenceModel,
    question: str,
    opinions: Sequence[str],
    suffixes: Sequence[tuple[int, ...]],
    truncate: bool,
) -> tuple[list[str], list[tuple[int, ...]], tuple[str, ...]]:
    """Every opinion and its prefix, short enough for every statement, and a warning for each that was cut."""
    total, shortest = preference_model.room, len(preference_model.prefix_ids(question, ""))
    for j, suffix in enumerate(suffixes):
        if shortest + len(suffix) > total:
            mend = f"with the question ({shortest}); shorten either, as the model reads at most {total}"
            raise InputError(f"statements[{j}]", f"{len(suffix)} tokens", mend)
    room = total - max(len(suffix) for suffix in suffixes)
    read, prefixes, warnings = [], [], []
    for i, opinion in enumerate(opinions):
        prefix = preference_model.prefix_ids(question, opinion)
        if len(prefix) > room:
            if not truncate:
                mend = f"with the question; the model has room for {room} beside the longest statement: shorten it"
                raise InputError(f"opinions[{i}]", f"{len(prefix)} tokens", mend)
            whole = " ".join(opinion.split())
            opinion = _beginning(preference_model, question, whole, room)
            prefix = preference_model.prefix_ids(question, opinion)
            warnings.append(f"Opinion {i} was cut to its first {len(opinion)} of {len(whole)} characters.")
        read.append(opinion)
        prefixes.append(tuple(prefix))
    return read, prefixes, tuple(warnings)


def _beginning(preference_model: PreferenceModel, question: str, opinion: str, room: int) -> str:
    """The words of an opinion that fit into ``room`` tokens with the question, and the characters of the next one where
    it is longer than a word can be."""

    def most(beginnings: Sequence[str]) -> int:
        return bisect.bisect_right(beginnings, room, key=lambda text: len(preference_model.prefix_ids(question, text)))

    words = opinion.split(" ")
    ends = [end - 1 for end in accumulate(len(word) + 1 for word in words)]
    count = most([opinion[:end] for end in ends])
    end = ends[count - 1] if count else 0
    if count < len(words) and len(words[count]) > _LONGEST_WORD:  # Chinese, say, is written without spaces
        start = ends[count] - len(words[count])
        more = most([opinion[:k] for k in range(start + 1, ends[count] + 1)])
        end = start + more if more else end
    return opinion[:end]


def _batches(order: Sequence[int], lengths: Sequence[int], extra: int, limit: int) -> Iterator[list[int]]:
    """Cut ``order`` (ascending in length) into runs of at most ``limit`` padded tokens, ``extra`` more a row."""
    run: list[int] = []
    for i in order:
        if run and (len(run) + 1) * (lengths[i] + extra) > limit:
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _distinct(keys: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct keys in order of first appearance, and each key's index among them."""
    place: dict[tuple[int, ...], int] = {}
    index = [place.setdefault(key, len(place)) for key in keys]
    return list(place), index


def _check_texts(opinions: Sequence[str], statements: Sequence[str]) -> None:
    if not opinions:
        raise InputError("opinions", opinions, "the group is empty; give at least one opinion")
    if not statements:
        raise InputError("statements", statements, "give at least one statement")
    for i, statement in enumerate(statements):
        if not statement.strip():
            raise InputError(f"statements[{i}]", statement, "is empty; write at least one word")


def _scores(preference_model: PreferenceModel, found: RowScores, warnings: tuple[str, ...]) -> Scores:
    """What follows from scores [members, statements]."""
    raw = found.raw
    utilities = preference_model.calibration.utilities(raw).astype(np.float32)
    if found.ensemble is None or preference_model.uncertainty is None:
        return Scores(raw, utilities, None, warnings)
    sd = preference_model.uncertainty.sd(preference_model.calibration, raw, found.ensemble)
    return Scores(raw, utilities, sd.astype(np.float32), warnings)
