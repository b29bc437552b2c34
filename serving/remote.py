"""The models behind deployment handles, as the HTTP interface sees them: calls that outlive a replica."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deliberation.types import InputError
from serving.exchange import Draft, Judgement, Order
from serving.problems import Overloaded
from serving.worker import Busy, Refusal

TRIES = 5
FIRST_PAUSE_S = 0.05
VERSIONS_AGE_S = 1.0
"""How long the versions that the models told are good for."""

log = logging.getLogger(__name__)


async def call(method: Any, *args: Any) -> Any:
    """Call a deployment's method; another replica gets the call when one dies or cannot be reached.

    Calls may be repeated: scores and seeded samples depend on their arguments alone.

    Raises:
        InputError: what the deployment refused.
        Overloaded: if its queue is full, or the server's behind it.
        RayActorError: if ``TRIES`` replicas were lost one after the other.
    """
    for tried in range(1, TRIES + 1):
        try:
            result = await method.remote(*args)
            break
        except BackPressureError as error:
            raise Overloaded from error
        except RayActorError as error:
            if tried == TRIES:
                raise
            log.warning("a replica was lost (%s), try %d of %d", type(error).__name__, tried, TRIES)
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (tried - 1))
    if isinstance(result, Refusal):
        raise InputError(result.field, result.value, result.mend)
    if isinstance(result, Busy):
        raise Overloaded(result.retry_after_s)
    return result


def _direct(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle with calls that go straight to a replica's own gRPC server, which asks for Ray's token where Ray has
    one, instead of through Ray's object store."""
    return handle.options(_by_reference=False)


class RemoteSampler:
    """``AsyncSampler`` on a policy's deployment."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        return await call(self._handle.sample, question, opinions, orders)


class RemoteJudge:
    """``AsyncJudge`` on a ``Reward`` deployment."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        return await call(self._handle.judge, question, opinions, statements)


class RemoteServices:
    """``serving.api.Services`` on deployment handles.

    Args:
        policies: policy name -> its deployment.
        rewards: name of the preference model -> its deployment.
    """

    def __init__(self, policies: Mapping[str, DeploymentHandle], rewards: Mapping[str, DeploymentHandle]):
        self.policies, self.preference_models = tuple(policies), tuple(rewards)
        self._policies = {name: _direct(handle) for name, handle in policies.items()}
        self._rewards = {name: _direct(handle) for name, handle in rewards.items()}
        self._asking, self._asked = asyncio.Lock(), -math.inf  # when the models were asked, seconds of monotonic()
        self._versions: dict[str, str] = {}

    def sampler(self, policy: str) -> RemoteSampler:
        return RemoteSampler(self._policies[policy])

    def judge(self, preference_model: str) -> RemoteJudge:
        return RemoteJudge(self._rewards[preference_model])

    async def versions(self) -> dict[str, str]:
        """``preference_model:NAME`` and ``policy:NAME`` -> print of the weights, told at most ``VERSIONS_AGE_S`` ago.

        However many callers there are, they take one place in each model's queue.

        Raises:
            Overloaded, RayActorError: as ``call``; the next caller asks anew.
        """
        async with self._asking:
            if time.monotonic() - self._asked > VERSIONS_AGE_S:
                self._versions, self._asked = await self._ask(), time.monotonic()
            return dict(self._versions)

    async def _ask(self) -> dict[str, str]:
        handles = {f"preference_model:{name}": handle for name, handle in self._rewards.items()}
        handles |= {f"policy:{name}": handle for name, handle in self._policies.items()}
        found = await asyncio.gather(*(call(handle.version) for handle in handles.values()))
        return dict(zip(handles, found, strict=True))
