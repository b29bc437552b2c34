"""Ray Serve's deployments of models: a policy, a policy behind a server, the preference model.

Light: no replica loads torch itself, so a lost one is soon replaced.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray import serve

from deliberation.types import InputError
from serving.config import Sampling, Server
from serving.exchange import Draft, Judgement, Order
from serving.nursery import ModelLost, ModelProcess
from serving.openai_policy import ServerBusy, ServerSampler
from serving.worker import Busy, Refusal, Worker

OPTIONS: dict[str, Any] = {
    "max_surge_percent": 100,  # a new replica answers before an old one stops: an upgrade is no outage
    "health_check_period_s": 1,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.5,
}
"""What every deployment needs and Ray's defaults do not give."""


class ModelReplica:
    """A replica with a model process, which it calls in a thread.

    Args:
        limit_s: seconds without progress after which a replica with work is replaced.
        kind, args: of the ``ModelProcess``.
    """

    def __init__(self, limit_s: float, kind: str, *args: Any):
        self._model, self._worker = ModelProcess(kind, *args), Worker(limit_s)
        self._version = self._model.call("version")

    async def version(self) -> str:
        return self._version

    async def check_health(self) -> None:
        await self._worker.check(lambda: self._call("probe"))

    async def _run(self, method: str, *args: Any) -> Any:
        return await self._worker.run(self._call, method, *args)

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return self._model.call(method, *args)
        except ModelLost:
            os._exit(1)  # of no use without it: callers see a lost replica and ask another, Ray starts a new one


@serve.deployment(max_ongoing_requests=2, **OPTIONS)  # one in work, one that waits
class Policy(ModelReplica):
    """One policy: draws drafts."""

    def __init__(self, limit_s: float, model_name_or_path: str, sampling: Sampling, device: str):
        super().__init__(limit_s, "HostedPolicy", model_name_or_path, sampling, device)

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft] | Refusal:
        return await self._run("sample", question, opinions, orders)


@serve.deployment(max_ongoing_requests=4, **OPTIONS)
class Reward(ModelReplica):
    """The preference model: judges statements for all members."""

    def __init__(self, limit_s: float, path: str, device: str):
        super().__init__(limit_s, "HostedJudge", path, device)

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement | Refusal:
        return await self._run("judge", question, opinions, statements)


@serve.deployment(max_ongoing_requests=16, **OPTIONS)
class ServerPolicy:
    """A policy behind an OpenAI-compatible server. It needs no health check: a restart here would mend nothing there.

    Args:
        timeout_s: of one request to the server.
    """

    async def __init__(self, server: Server, sampling: Sampling, timeout_s: float):  # type: ignore[misc]  # Ray awaits it
        self._sampler = ServerSampler(server, sampling, timeout_s)
        await self._sampler.check_version()

    async def sample(
        self, question: str, opinions: Sequence[str], orders: Sequence[Order]
    ) -> list[Draft] | Refusal | Busy:
        try:
            return await self._sampler.sample(question, opinions, orders)
        except InputError as error:
            return Refusal(error.field, error.value, error.mend)
        except ServerBusy as error:
            return Busy(error.retry_after_s)

    async def version(self) -> str:
        return await self._sampler.check_version()
