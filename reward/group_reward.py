"""The reward a trainer calls: a group's welfare from each statement, under TRL's reward-function contract.

One plain async function drives our ``PPOTrainer`` and TRL's GRPO and RLOO trainers unchanged: members come from the
dataset columns ``question``, ``opinions`` and (optional) ``weights``; it receives text or messages, never token ids.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deliberation.prompts import clean_statement
from deliberation.types import InputError
from reward.preference import PreferenceModel
from reward.prefix_cache import PrefixCache
from reward.scoring import Scores, score
from reward.welfare import LOWEST_UTILITY, check_uncertainty_penalty, lower_utilities, parse_welfare
from reward.welfare import welfare as group_welfare

logger = logging.getLogger(__name__)

_SHORT = "Yes."
"""A statement for which there is room beside any opinion that can be judged at all."""

Column = tuple[NDArray[np.float64], NDArray[np.float64] | None]
"""Utilities [members] of one statement, and their standard deviations where the model has an ensemble."""


class Scorer(Protocol):
    """Whatever scores statements for members: in this process, or behind an actor."""

    def score(
        self, question: str, opinions: Sequence[str], statements: Sequence[str]
    ) -> Scores | Awaitable[Scores]: ...


class LocalScorer:
    """A preference model in this process."""

    def __init__(self, preference_model: PreferenceModel, batch_tokens: int | None = None):
        self.preference_model, self.batch_tokens, self.cache = preference_model, batch_tokens, PrefixCache()

    def score(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
        """The members' prefixes stay in memory for the next call."""
        model, limit = self.preference_model, self.batch_tokens
        return score(model, question, opinions, statements, batch_tokens=limit, cache=self.cache)


def make_group_reward(
    scorer: Scorer, welfare: str | float, uncertainty_penalty: float = 0.0
) -> Callable[..., Awaitable[list[float | None]]]:
    """The reward function for one scorer and one welfare function (a name, or an inequality aversion).

    Args:
        uncertainty_penalty: lambda >= 0; utilities enter welfare as mean - lambda * sd, not below 1. Needs a
            preference model with an ensemble.

    Raises:
        InputError: field ``welfare`` or ``uncertainty_penalty``.
    """
    check_uncertainty_penalty(uncertainty_penalty)
    function = parse_welfare(welfare)

    async def group_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        question: Sequence[str],
        opinions: Sequence[Sequence[str]],
        weights: Sequence[Sequence[float] | None] | None = None,
        clusters: Sequence[Sequence[str | int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Welfare, in [1, 7], of each completion as a statement to its row's group; None if it is too long to be read.

        Args:
            prompts: not read; the policy may have been shown fewer opinions than the reward judges by.
            completions: texts, or lists of messages.
            question, opinions, weights, clusters: one entry a completion; weights None counts all members alike;
                clusters, one label a member, are needed by ``worst_cluster``.
            log_metric: receives ``rewards/too_long`` (share of the completions), ``rewards/member_{i}/mean`` and
                ``rewards/worst_member/mean``, and with an ``uncertainty_penalty`` also ``rewards/utility_sd`` and
                ``rewards/clamped`` (share of the utilities).

        Raises:
            InputError: if a column's length is not that of the completions, or a group or weight is bad, or an opinion
                leaves no room for any statement.
        """
        rows = len(completions)
        for name, column in (
            ("question", question),
            ("opinions", opinions),
            ("weights", weights),
            ("clusters", clusters),
        ):
            if column is not None and len(column) != rows:
                raise InputError(name, f"{len(column)} rows", f"give one a completion ({rows})")
        statements = [clean_statement(_text(completion)) for completion in completions]
        found, sds = await _utilities(scorer, question, opinions, statements)
        scored = [row for row, u in enumerate(found) if u is not None]
        utilities, deviations = [u for u in found if u is not None], [sds[row] for row in scored]
        if len(scored) < rows:
            logger.warning("%d of %d completions are too long for the preference model", rows - len(scored), rows)
        if log_metric is not None and rows:
            log_metric("rewards/too_long", 1 - len(scored) / rows)
        if uncertainty_penalty:
            pairs = zip(utilities, deviations, strict=True)
            lowered = [lower_utilities(u, sd, uncertainty_penalty) for u, sd in pairs]
            utilities = [bound for bound, _ in lowered]
            if log_metric is not None and scored:
                log_metric("rewards/utility_sd", float(np.mean([np.mean(sd) for sd in deviations if sd is not None])))
                log_metric("rewards/clamped", float(np.mean([share for _, share in lowered])))
        if log_metric is not None and scored:
            _log(utilities, log_metric)
        row_weights = weights if weights is not None else [None] * rows
        row_clusters = clusters if clusters is not None else [None] * rows
        rewards: list[float | None] = [None] * rows
        for row, u in zip(scored, utilities, strict=True):
            rewards[row] = float(group_welfare(u, function, row_weights[row], row_clusters[row]))
        return rewards

    return group_reward


def _text(completion: Any) -> str:
    """A completion's text: itself, or what its messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


async def _utilities(
    scorer: Scorer, questions: Sequence[str], opinions: Sequence[Sequence[str]], statements: Sequence[str]
) -> tuple[list[NDArray[np.float64] | None], list[NDArray[np.float64] | None]]:
    """Each row's utilities [members] and their standard deviations; rows of one group share one call of the scorer.

    An empty statement's utility is certain. Utilities are None where the statement is too long; deviations also where
    the model has no ensemble.
    """
    # 1. Rows of each group
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for row, (question, group) in enumerate(zip(questions, opinions, strict=True)):
        if not group:
            raise InputError(f"opinions[{row}]", list(group), "the group is empty; give at least one opinion")
        groups.setdefault((question, tuple(group)), []).append(row)
    # 2. One call a group, all at once; empty statements are not asked about
    asked = {key: [row for row in rows if statements[row]] for key, rows in groups.items()}
    calls = {key: [statements[row] for row in rows] for key, rows in asked.items() if rows}
    answers = await asyncio.gather(*(_columns(scorer, *key, texts) for key, texts in calls.items()))
    # 3. Back to rows
    utilities: list[NDArray[np.float64] | None] = [np.full(len(group), LOWEST_UTILITY) for group in opinions]
    deviations: list[NDArray[np.float64] | None] = [np.zeros(len(group)) for group in opinions]
    for key, columns in zip(calls, answers, strict=True):
        for column, row in zip(columns, asked[key], strict=True):
            utilities[row], deviations[row] = (None, None) if column is None else column
    return utilities, deviations


async def _columns(
    scorer: Scorer, question: str, opinions: Sequence[str], statements: Sequence[str]
) -> list[Column | None]:
    """One a statement, None for those that are too long: such a call fails, and each statement is asked about alone."""
    try:
        scores = await _ask(scorer, question, opinions, statements)
    except InputError as error:
        if error.field != "bi_encoder" and not error.field.startswith(("statements[", "opinions[")):
            raise
        if len(statements) == 1:
            await _ask(scorer, question, opinions, [_SHORT])  # raises if it is the opinion that is too long
            return [None]
        alone = await asyncio.gather(*(_columns(scorer, question, opinions, [text]) for text in statements))
        return [column for (column,) in alone]
    sds = [None] * len(statements) if scores.sd is None else list(np.asarray(scores.sd, dtype=np.float64).T)
    return list(zip(np.asarray(scores.utilities, dtype=np.float64).T, sds, strict=True))


async def _ask(scorer: Scorer, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
    answer = scorer.score(question, opinions, statements)
    return await answer if inspect.isawaitable(answer) else answer


def _log(utilities: Sequence[NDArray[np.float64]], log_metric: Callable[[str, float], None]) -> None:
    """Mean utility of the i-th member over the rows that have one, and of each row's worst-off member."""
    for i in range(max(len(u) for u in utilities)):
        log_metric(f"rewards/member_{i}/mean", float(np.mean([u[i] for u in utilities if len(u) > i])))
    log_metric("rewards/worst_member/mean", float(np.mean([u.min() for u in utilities])))
