"""Services with models that take no time: what surrounds the models is tested with them."""

from __future__ import annotations

import asyncio

import numpy as np

from serving.exchange import Draft, Judgement

REQUEST = {"question": "Should tea be free?", "opinions": ["Yes, for all.", "No.", "Only green tea."], "n": 4}


class StubServices:
    """A policy that counts aloud, and a judge to whom every statement is as good as it is long.

    Attributes:
        calls, ended: how often the policy was asked, and was done (or was told to stop).
        failures, judge_failures: errors that the next calls of the policy, and of the judge, raise, in order.
        pause_s: how long a call takes.
        gate: calls wait until it is set, where there is one.
    """

    policies = preference_models = ("default",)

    def __init__(self):
        self.calls, self.ended, self.failures, self.pause_s = 0, 0, [], 0.0
        self.gate: asyncio.Event | None = None
        self.judge_failures: list[Exception] = []

    def sampler(self, policy):
        return _Sampler(self)

    def judge(self, preference_model):
        return _Judge(self)

    async def versions(self):
        return {"preference_model:default": "sha256:judge", "policy:default": "sha256:policy"}


class _Sampler:
    def __init__(self, services):
        self.services = services

    async def sample(self, question, opinions, orders):
        self.services.calls += 1
        try:
            if self.services.gate is not None:
                await self.services.gate.wait()
            await asyncio.sleep(self.services.pause_s)
        finally:
            self.services.ended += 1
        if self.services.failures:
            raise self.services.failures.pop(0)
        return [
            Draft(tuple(f"Tea {order.seed % 97} {k}." for k in range(order.count)), (True,) * order.count,
                  order.members, "sha256:policy", prompt_tokens=10, completion_tokens=3 * order.count)
            for order in orders
        ]  # fmt: skip


class _Judge:
    def __init__(self, services):
        self.services = services

    async def judge(self, question, opinions, statements):
        if self.services.judge_failures:
            raise self.services.judge_failures.pop(0)
        size = (len(opinions), len(statements))
        worth = np.array([[(len(s) * 7 + len(o)) % 5 for s in statements] for o in opinions], dtype=np.float64)
        probabilities = np.full((*size, 7), 0.05)
        np.put_along_axis(probabilities, (1 + worth.astype(int))[..., None], 0.7, axis=2)
        return Judgement(worth.astype(np.float32), probabilities @ np.arange(1, 8), probabilities, "sha256:judge")
