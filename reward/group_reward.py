"""The reward a trainer calls: a group's welfare from each statement, under TRL's reward-function contract.

One plain async function drives our ``PPOTrainer`` and TRL's GRPO and RLOO trainers unchanged: members come from the
dataset columns ``question``, ``opinions`` and (optional) ``weights``; it receives text or messages, never token ids.
"""

from __future__ import annotations

import asyncio
import inspect
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
        """Welfare, in [1, 7], of each completion as a statement to its row's group.

        Args:
            prompts: not read; the policy may have been shown fewer opinions than the reward judges by.
            completions: texts, or lists of messages.
            question, opinions, weights, clusters: one entry a completion; weights None counts all members alike;
                clusters, one label a member, are needed by ``worst_cluster``.
            log_metric: receives ``rewards/member_{i}/mean`` and ``rewards/worst_member/mean``, and with an
                ``uncertainty_penalty`` also ``rewards/utility_sd`` and ``rewards/clamped`` (share of the utilities).

        Raises:
            InputError: if a column's length is not that of the completions, or a group or weight is bad.
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
        utilities, deviations = await _utilities(scorer, question, opinions, statements)
        if uncertainty_penalty:
            pairs = zip(utilities, deviations, strict=True)
            lowered = [lower_utilities(u, sd, uncertainty_penalty) for u, sd in pairs]
            utilities = [bound for bound, _ in lowered]
            if log_metric is not None and rows:
                log_metric("rewards/utility_sd", float(np.mean([np.mean(sd) for sd in deviations if sd is not None])))
                log_metric("rewards/clamped", float(np.mean([share for _, share in lowered])))
        if log_metric is not None and rows:
            _log(utilities, log_metric)
        row_weights = weights if weights is not None else [None] * rows
        row_clusters = clusters if clusters is not None else [None] * rows
        groups = zip(utilities, row_weights, row_clusters, strict=True)
        return [float(group_welfare(u, function, w, c)) for u, w, c in groups]

    return group_reward


def _text(completion: Any) -> str:
    """A completion's text: itself, or what its messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


async def _utilities(
    scorer: Scorer, questions: Sequence[str], opinions: Sequence[Sequence[str]], statements: Sequence[str]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64] | None]]:
    """Each row's utilities [members] and their standard deviations; rows of one group share one call of the scorer.

    An empty statement's utility is certain; None where the model has no ensemble.
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
    answers = await asyncio.gather(*(_ask(scorer, *key, texts) for key, texts in calls.items()))
    # 3. Back to rows
    utilities = [np.full(len(group), LOWEST_UTILITY) for group in opinions]
    deviations: list[NDArray[np.float64] | None] = [np.zeros(len(group)) for group in opinions]
    for key, scores in zip(calls, answers, strict=True):
        for column, row in enumerate(asked[key]):
            utilities[row] = np.asarray(scores.utilities[:, column], dtype=np.float64)
            deviations[row] = None if scores.sd is None else np.asarray(scores.sd[:, column], dtype=np.float64)
    return utilities, deviations


async def _ask(scorer: Scorer, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Scores:
    answer = scorer.score(question, opinions, statements)
    return await answer if inspect.isawaitable(answer) else answer


def _log(utilities: Sequence[NDArray[np.float64]], log_metric: Callable[[str, float], None]) -> None:
    """Mean utility of the i-th member over the rows that have one, and of each row's worst-off member."""
    for i in range(max(len(u) for u in utilities)):
        log_metric(f"rewards/member_{i}/mean", float(np.mean([u[i] for u in utilities if len(u) > i])))
    log_metric("rewards/worst_member/mean", float(np.mean([u.min() for u in utilities])))
