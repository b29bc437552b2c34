"""Carries out a planned request on the services' models, step by step, and reports each step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np

from deliberation.types import InputError
from serving.best_of_n import Plan, choose, readable, statements
from serving.exchange import AsyncJudge, AsyncSampler, Judgement
from serving.metrics import Metrics
from serving.result import Consensus
from serving.tracing import note, stage_span

MEMBERS_A_CALL = 64
"""Members judged in one call of the preference model, so that a large group's progress is seen."""

Events = Sequence[tuple[str, Any]]
Report = Callable[[Events], Awaitable[None]]
"""Takes (type, JSON-able data) of what happened."""


class Services(Protocol):
    """The models behind the interface.

    Attributes:
        policies, preference_models: their names.
    """

    policies: tuple[str, ...]
    preference_models: tuple[str, ...]

    def sampler(self, policy: str) -> AsyncSampler:
        """The policy of that name (InputError, Overloaded where it is called)."""

    def judge(self, preference_model: str) -> AsyncJudge:
        """The preference model of that name (the same)."""

    async def versions(self) -> dict[str, str]:
        """Prints of the weights: ``preference_model:NAME`` and ``policy:NAME``; fails if a model does not answer."""


def check_models(services: Services, policy: str, preference_model: str, place: str = "") -> None:
    """Refuse names of models that are not served.

    Args:
        place: where the fields stand, e.g. ``arms[0].``.

    Raises:
        InputError: field ``policy`` or ``preference_model``.
    """
    if policy not in services.policies:
        raise InputError(f"{place}policy", policy, f"must be one of {', '.join(services.policies)}")
    if preference_model not in services.preference_models:
        mend = f"must be one of {', '.join(services.preference_models)}"
        raise InputError(f"{place}preference_model", preference_model, mend)


async def silent(events: Events) -> None:
    """A ``Report`` that nobody reads."""


async def carry_out(services: Services, plan: Plan, metrics: Metrics, report: Report = silent) -> Consensus:
    """Sample, judge, choose.

    Reports ``candidate`` (index, statement) for every sample, ``scored`` (members so far, of how many) for every part
    of the group.

    Raises:
        InputError: if a text does not fit a model. NoStatement: if every candidate is empty. Overloaded.
    """
    # 1. Sample
    started = time.perf_counter()
    with stage_span("sample", policy=plan.policy, prompts=len(plan.orders), candidates=plan.n) as span:
        drafts = await services.sampler(plan.policy).sample(plan.question, plan.opinions, plan.orders)
        read, wrote = (sum(getattr(d, f"{kind}_tokens") for d in drafts) for kind in ("prompt", "completion"))
        note(span, prompt_tokens=read, completion_tokens=wrote)
    texts = statements(plan, drafts)
    metrics.stage("sample", time.perf_counter() - started)
    metrics.candidates(plan.n)
    metrics.tokens(read, wrote)
    await report([("candidate", {"index": i, "statement": text}) for i, text in enumerate(texts)])
    # 2. Judge, a part of the group at a time
    started, kept, parts = time.perf_counter(), readable(texts), []
    judge, many = services.judge(plan.preference_model), len(plan.opinions)
    with stage_span("judge", preference_model=plan.preference_model, members=many, statements=len(kept)):
        for first in range(0, many, MEMBERS_A_CALL):
            members = plan.opinions[first : first + MEMBERS_A_CALL]
            parts.append(await judge.judge(plan.question, members, kept))
            await report([("scored", {"members": first + len(members), "of": many})])
    metrics.stage("judge", time.perf_counter() - started)
    # 3. Choose: a large group's welfare takes a moment, and the loop serves others
    with stage_span("choose", members=many, candidates=plan.n):
        if len(parts) == 1:
            return choose(plan, drafts, parts[0])
        return await asyncio.to_thread(choose, plan, drafts, joined(parts))


def joined(parts: Sequence[Judgement]) -> Judgement:
    """The judgements of parts of a group as one."""
    if len(parts) == 1:
        return parts[0]
    sd = None if parts[0].sd is None else np.concatenate([part.sd for part in parts])  # type: ignore[misc]
    raw, utilities, probabilities = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("raw", "utilities", "probabilities")
    )
    return Judgement(raw, utilities, probabilities, parts[0].version, sd)
