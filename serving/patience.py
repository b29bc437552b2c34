"""Models that are waited for where they are full: for work that nobody waits for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serving.answering import Services
from serving.exchange import AsyncJudge, AsyncSampler, Draft, Judgement, Order
from serving.problems import Overloaded

T = TypeVar("T")

PAUSE_S = 1.0
"""Between two calls of a full model, on average."""


class Patient:
    """Services whose models are asked again as long as they are full; what they have answered is not asked again."""

    def __init__(self, services: Services):
        self._services = services
        self.policies, self.preference_models = services.policies, services.preference_models

    def sampler(self, policy: str) -> AsyncSampler:
        return _PatientSampler(self._services.sampler(policy))

    def judge(self, preference_model: str) -> AsyncJudge:
        return _PatientJudge(self._services.judge(preference_model))

    async def versions(self) -> dict[str, str]:
        return await self._services.versions()


@dataclass(frozen=True)
class _PatientSampler:
    model: AsyncSampler

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        return await _until_there_is_room(lambda: self.model.sample(question, opinions, orders))


@dataclass(frozen=True)
class _PatientJudge:
    model: AsyncJudge

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        return await _until_there_is_room(lambda: self.model.judge(question, opinions, statements))


async def _until_there_is_room(call: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await call()
        except Overloaded:
            await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))  # or all who wait would come back together
