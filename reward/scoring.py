"""Scores of all members for all statements, with every member's prefix computed once.

A row is one (member, statement): the member's prefix (question, opinion) and the statement as suffix. The prefix runs
once and leaves its keys and values; the rows of that member attend to them. The same two functions, ``prefix_states``
and ``suffix_scores``, serve training (with gradient) and scoring (without), so both see the same numbers.

Exact for causal full attention only, so recurrent, convolutional and sliding-window models are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from deliberation.types import InputError, Rating
from reward.preference import PreferenceModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Tokens (rows x padded length, prefix included) in one forward pass: what was fastest (a CPU likes what fits its
cache). Bounds the memory, not the result."""


@dataclass(frozen=True)
class Scores:
    """What every member makes of every statement.

    Attributes:
        raw: the model's scores, float32 [members, statements]; always kept, since the map to utilities may change.
        utilities: expected ratings in [1, 7], same shape and type.
    """

    raw: NDArray[np.float32]
    utilities: NDArray[np.float32]


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of some members' prefixes.

    Attributes:
        layers: (keys, values) a layer, each [members, key heads, width, head size], padded on the right.
        lengths: real tokens of each prefix, [members].
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[2]


class _SharedPrefixLayer(DynamicLayer):
    """A cache layer that holds each prefix once and repeats it for its rows only while they are computed."""

    def __init__(self, keys: Tensor, values: Tensor, owners: Tensor):
        super().__init__()
        self.keys, self.values, self.owners, self.is_initialized = keys, values, owners, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix + suffix, [rows, heads, width + suffix, size]; stores nothing."""
        keys = torch.cat([self.keys.index_select(0, self.owners), key_states], dim=-2)
        return keys, torch.cat([self.values.index_select(0, self.owners), value_states], dim=-2)


def score(
    preference_model: PreferenceModel,
    question: str,
    opinions: Sequence[str],
    statements: Sequence[str],
    *,
    batch_tokens: int | None = None,
) -> Scores:
    """Score every statement for every member.

    Equal opinions and equal statements are computed once. Neither order nor batch changes a score (1e-5, float32).

    Raises:
        InputError: on an empty group, no or blank statements, a text too long for the model, or an architecture
            whose prefixes cannot be shared.
    """
    _check_texts(opinions, statements)
    prefixes, member = _distinct([tuple(preference_model.prefix_ids(question, o)) for o in opinions])
    suffixes, statement = _distinct([tuple(preference_model.suffix_ids(s)) for s in statements])
    owners = [i for i in range(len(prefixes)) for _ in suffixes]
    raw = score_rows(preference_model, prefixes, suffixes * len(prefixes), owners, batch_tokens=batch_tokens)
    return _scores(preference_model, raw.reshape(len(prefixes), len(suffixes))[np.ix_(member, statement)])


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
            ids = preference_model.prefix_ids(question, opinion) + preference_model.suffix_ids(statement)
            raw[i, j] = float(model(torch.tensor([ids], device=model.device)).logits[0, 0])
    return _scores(preference_model, raw)


def score_ratings(
    preference_model: PreferenceModel, ratings: Sequence[Rating], *, batch_tokens: int | None = None
) -> NDArray[np.float32]:
    """Raw score of each rating's statement for its member, [ratings]; equal prefixes are computed once."""
    prefixes, owners = _distinct([tuple(preference_model.prefix_ids(r.question, r.opinion)) for r in ratings])
    suffixes = [tuple(preference_model.suffix_ids(r.statement)) for r in ratings]
    return score_rows(preference_model, prefixes, suffixes, owners, batch_tokens=batch_tokens)


@torch.inference_mode()
def score_rows(
    preference_model: PreferenceModel,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    owners: Sequence[int],
    *,
    batch_tokens: int | None = None,
) -> NDArray[np.float32]:
    """Raw scores [rows] of suffix i after prefix ``owners[i]``, all as token ids, in batches of similar length.

    ``batch_tokens`` None takes ``BATCH_TOKENS`` of the model's device.
    """
    model = preference_model.model.eval()
    limit = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    rows_of: list[list[int]] = [[] for _ in prefixes]
    for row, owner in enumerate(owners):
        rows_of[owner].append(row)
    raw = np.empty(len(suffixes), dtype=np.float32)
    # 1. Members of similar prefix length together: each prefix once
    by_length = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    for members in _batches(by_length, [len(p) for p in prefixes], 0, limit):
        states = prefix_states(model, *pad([prefixes[i] for i in members], model.device))
        place = {member: i for i, member in enumerate(members)}
        # 2. Their rows, in batches of similar suffix length
        rows = sorted((row for i in members for row in rows_of[i]), key=lambda row: len(suffixes[row]))
        for batch in _batches(rows, [len(s) for s in suffixes], states.width, limit):
            batch_owners = torch.tensor([place[owners[row]] for row in batch], device=model.device)
            ids, lengths = pad([suffixes[row] for row in batch], model.device)
            raw[batch] = suffix_scores(model, states, ids, lengths, batch_owners).cpu().numpy()
    return raw


def prefix_states(model: nn.Module, ids: Tensor, lengths: Tensor) -> Prefixes:
    """Run prefixes ids [members, width] (right-padded, real ``lengths`` [members]) and keep their keys and values.

    Keeps the graph where gradients are on: the prefix then gets the gradient of all its rows in one backward pass.

    Raises:
        InputError: field ``preference_model``, if the model is not causal full attention.
    """
    backbone, _ = _parts(model)
    kinds = set(getattr(backbone.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise _not_shareable(backbone.config.model_type, f"has layers of type {', '.join(sorted(kinds))}")
    output = backbone(input_ids=ids, attention_mask=_mask(lengths, ids.shape[1]), use_cache=True)
    cache = output.get("past_key_values")
    if not isinstance(cache, Cache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise _not_shareable(backbone.config.model_type, "keeps no plain key-value cache")
    return Prefixes([(layer.keys, layer.values) for layer in cache.layers], lengths)


def suffix_scores(model: nn.Module, prefixes: Prefixes, ids: Tensor, lengths: Tensor, owners: Tensor) -> Tensor:
    """Scores float32 [rows] at the last real token of each suffix, with gradient where gradients are on.

    Args:
        ids: suffixes [rows, width], right-padded; what stands in the padding is never read.
        lengths: real tokens of each suffix, [rows], >= 1.
        owners: the row's member as an index into ``prefixes``, [rows].
    """
    backbone, head = _parts(model)
    before = prefixes.lengths[owners]
    _check_positions(backbone.config, int((before + lengths).max()))
    layers = [_SharedPrefixLayer(keys, values, owners) for keys, values in prefixes.layers]
    hidden = backbone(
        input_ids=ids,
        attention_mask=torch.cat([_mask(before, prefixes.width), _mask(lengths, ids.shape[1])], dim=1),
        position_ids=before[:, None] + torch.arange(ids.shape[1], device=ids.device),
        past_key_values=Cache(layers=layers),
        use_cache=True,
    ).last_hidden_state
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
    return head(last)[:, 0].float()


def pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids [rows, longest], padded on the right with 0 (masked by length, so any id would do), and lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def _mask(lengths: Tensor, width: int) -> Tensor:
    """1 for real tokens, 0 for padding: [rows, width]."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


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


def _distinct(keys: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct keys in order of first appearance, and each key's index among them."""
    place: dict[tuple[int, ...], int] = {}
    index = [place.setdefault(key, len(place)) for key in keys]
    return list(place), index


def _parts(model: nn.Module) -> tuple[Any, Any]:
    """The transformer and the scalar head of a sequence classifier, PEFT adapters included."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    backbone, head = getattr(inner, inner.base_model_prefix, None), getattr(inner, "score", None)
    if backbone is None or head is None:
        raise _not_shareable(type(inner).__name__, "is not a causal sequence classifier with a `score` head")
    return backbone, head


def _not_shareable(what: str, why: str) -> InputError:
    return InputError("preference_model", what, f"{why}; use a causal full-attention model such as Llama or Qwen3")


def _check_positions(config: Any, needed: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        mend = f"with question and opinion; shorten it, as the model reads at most {limit}"
        raise InputError("statements", f"{needed} tokens", mend)


def _check_texts(opinions: Sequence[str], statements: Sequence[str]) -> None:
    if not opinions:
        raise InputError("opinions", opinions, "the group is empty; give at least one opinion")
    if not statements:
        raise InputError("statements", statements, "give at least one statement")
    for i, statement in enumerate(statements):
        if not statement.strip():
            raise InputError(f"statements[{i}]", statement, "is empty; write at least one word")


def _scores(preference_model: PreferenceModel, raw: NDArray[np.float32]) -> Scores:
    return Scores(raw, preference_model.calibration.utilities(raw).astype(np.float32))
