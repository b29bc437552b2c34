"""One deliberation's statements, judged: what was sampled, what the gold rater says, which statement is each arm's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deliberation.types import Deliberation, InputError
from evaluation import measures
from evaluation.measures import Array
from reward.welfare import welfare as aggregate


class GoldRatings(Protocol):
    """Noise-free gold ratings, each [members, statements], floats from 1 to 7."""

    @property
    def agreement(self) -> Array: ...
    @property
    def quality(self) -> Array: ...
    @property
    def agreement_without_voice(self) -> Array: ...
    @property
    def quality_without_voice(self) -> Array: ...


class GoldRater(Protocol):
    """Knows what the members of each compared deliberation truly think."""

    def rate(self, index: int, statements: Sequence[str]) -> GoldRatings:
        """Rate ``statements`` by the members of the deliberation at ``index`` (its place in the compared list)."""
        ...


@dataclass(frozen=True)
class Sampled:
    """What the policies said on one held-out deliberation. N candidates a policy, cleaned statements.

    Attributes:
        deliberation: id, question and opinions.
        base: one zero-shot statement of the base model.
        sft, ppo: N statements each, in the order they were sampled.
        sft_utilities, ppo_utilities: predicted agreement [members, N] by the preference model.
        ppo_log_ratios: [K] log pi_ppo - log pi_sft of K pure samples (top_p 1) of the PPO policy, summed over their
            tokens, in nats; None where not measured. Not of the candidates: a nucleus is another distribution.
        base_log_ratios: the same for the base model.

    Raises:
        InputError: on shapes that do not fit, or utilities that are not finite.
    """

    deliberation: Deliberation
    base: str
    sft: tuple[str, ...]
    ppo: tuple[str, ...]
    sft_utilities: Array
    ppo_utilities: Array
    ppo_log_ratios: Array | None = None
    base_log_ratios: Array | None = None

    def __post_init__(self) -> None:
        members, size = len(self.deliberation.opinions), len(self.sft)
        where = f"deliberation {self.deliberation.id!r}"
        if size < 1 or len(self.ppo) != size:
            raise InputError("ppo", f"{len(self.ppo)} statements", f"{where}: sft has {size}; give as many, at least 1")
        for name in ("sft_utilities", "ppo_utilities"):
            found = np.asarray(getattr(self, name))
            if found.shape != (members, size) or not np.isfinite(found).all():
                raise InputError(name, found.shape, f"{where}: give finite numbers of shape {(members, size)}")
        for name in ("ppo_log_ratios", "base_log_ratios"):
            ratios = getattr(self, name)
            if ratios is not None and (np.ndim(ratios) != 1 or not np.size(ratios)):
                raise InputError(name, np.shape(ratios), f"{where}: give a row of at least one number")


@dataclass(frozen=True)
class Judged:
    """One deliberation, judged. Each array runs over the statements base, sft pool, ppo pool, opinions.

    Attributes:
        statements: the texts.
        agreement: gold agreement [members, statements].
        values: measure name -> [statements], the gold measures of each statement.
        chosen: arm -> index of its statement.
        kl: arm -> nats per response (NaN where not measured).
        predicted: predicted welfare of the pools, policy -> [N].
        pools: policy -> slice of its candidates.
        policy_kl: policy -> mean log-ratio to the SFT policy in nats, NaN where not measured.
    """

    statements: tuple[str, ...]
    agreement: Array
    values: dict[str, Array]
    chosen: dict[str, int]
    kl: dict[str, float]
    predicted: dict[str, Array]
    pools: dict[str, slice]
    policy_kl: dict[str, float]


def judge(index: int, one: Sampled, gold: GoldRater, function: str | float) -> tuple[Judged, Judged]:
    """One deliberation with and without the one-person's-voice penalty."""
    statements = (one.base, *one.sft, *one.ppo, *one.deliberation.opinions)
    ratings = gold.rate(index, statements)
    shape = (len(one.deliberation.opinions), len(statements))
    names = ("agreement", "quality", "agreement_without_voice", "quality_without_voice")
    for name in names:
        found = np.asarray(getattr(ratings, name), dtype=np.float64)
        if found.shape != shape or not ((found >= 1) & (found <= 7)).all():
            raise InputError(f"gold.{name}", found.shape, f"must be numbers from 1 to 7 of shape {shape}")
    agreement, quality, *without = (np.asarray(getattr(ratings, name), dtype=np.float64) for name in names)
    bare_agreement, bare_quality = without
    return (
        _variant(one, statements, agreement, quality, function),
        _variant(one, statements, bare_agreement, bare_quality, function),
    )


def _variant(
    one: Sampled, statements: tuple[str, ...], agreement: Array, quality: Array, function: str | float
) -> Judged:
    """Measure every statement and choose each arm's."""
    size = len(one.sft)
    pools = {"sft": slice(1, 1 + size), "ppo": slice(1 + size, 1 + 2 * size)}
    values = {
        "mean": agreement.mean(axis=0),
        "min": agreement.min(axis=0),
        "welfare": np.asarray(aggregate(agreement, function)),
        "quality": quality.mean(axis=0),
        "unanimity": measures.unanimous(agreement),
        "length": np.array([measures.words(s) for s in statements], dtype=np.float64),
    }
    predicted = {
        "sft": np.asarray(aggregate(np.asarray(one.sft_utilities, dtype=np.float64), function)),
        "ppo": np.asarray(aggregate(np.asarray(one.ppo_utilities, dtype=np.float64), function)),
    }
    policy_kl = {"sft": 0.0, "ppo": _mean_or_nan(one.ppo_log_ratios)}
    best = {policy: int(predicted[policy].argmax()) for policy in pools}
    chosen = {
        "base": 0,
        "sft": pools["sft"].start,
        f"sft_best_of_{size}": pools["sft"].start + best["sft"],
        "ppo": pools["ppo"].start,
        f"ppo_best_of_{size}": pools["ppo"].start + best["ppo"],
        "best_opinion": 1 + 2 * size + int(values["mean"][1 + 2 * size :].argmax()),
    }
    kl = {
        "base": _mean_or_nan(one.base_log_ratios),
        "sft": 0.0,
        f"sft_best_of_{size}": measures.kl_best_of_n(size),
        "ppo": policy_kl["ppo"],
        f"ppo_best_of_{size}": measures.kl_best_of_n(size) + policy_kl["ppo"],
        "best_opinion": math.nan,
    }
    return Judged(statements, agreement, values, chosen, kl, predicted, pools, policy_kl)


def _mean_or_nan(ratios: Array | None) -> float:
    return math.nan if ratios is None else float(np.mean(ratios))
