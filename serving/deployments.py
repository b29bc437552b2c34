"""The Ray Serve application: an ingress, the policies and the preference model as deployments of their own.

Thin: what they do is in ``serving.local`` (models) and ``serving.api`` (HTTP); here is where they live.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deliberation.types import InputError, is_hub_name
from embedded import resolve
from reward.actor import local_ray
from reward.preference import check_ensemble
from serving.api import Overloaded, make_app
from serving.best_of_n import Draft, Judgement, Order, Plan, answer_async
from serving.config import DEFAULT_POLICY, Sampling, ServeConfig
from serving.result import Consensus
from serving.schemas import EXAMPLES

APPLICATION = "consensus"
CALIBRATION = "calibration.json"
READY_TIMEOUT_S = 120.0

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """An ``InputError`` on its way between deployments, as a value: exceptions lose their fields when pickled."""

    field: str
    value: object
    mend: str


class _Worker:
    """Runs blocking torch calls in one thread, so that the event loop stays free for health checks.

    One thread: torch modules are not made for two callers at once, and a second would only share the core.
    """

    def __init__(self) -> None:
        import torch  # here, so that the ingress does not load it

        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(max_workers=1)

    async def run(self, work: Callable[..., T], *args: Any) -> T | Refusal:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        except InputError as error:
            return Refusal(error.field, error.value, error.mend)


@serve.deployment(max_ongoing_requests=4, max_queued_requests=16, ray_actor_options={"num_cpus": 0.3})
class Policy:
    """One policy: draws drafts."""

    def __init__(self, model_name_or_path: str, sampling: Sampling, device: str):
        self._worker = _Worker()
        from serving.local import LocalSampler

        self._sampler = LocalSampler.load(model_name_or_path, sampling, device)

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft] | Refusal:
        return await self._worker.run(self._sampler.sample, question, opinions, orders)

    async def version(self) -> str:
        return self._sampler.version


@serve.deployment(max_ongoing_requests=8, max_queued_requests=32, ray_actor_options={"num_cpus": 0.3})
class Reward:
    """The preference model: judges statements for all members."""

    def __init__(self, path: str, device: str):
        self._worker = _Worker()
        from serving.local import LocalJudge

        self._judge = LocalJudge.load(path, device)

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement | Refusal:
        return await self._worker.run(self._judge.judge, question, opinions, statements)

    async def version(self) -> str:
        return self._judge.version


@serve.deployment(max_ongoing_requests=64, max_queued_requests=128, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Api:
    """The HTTP interface in front of them."""

    def __init__(self, policies: dict[str, DeploymentHandle], reward: DeploymentHandle, config: ServeConfig):
        self._services, self._config = RemoteServices(policies, reward), config

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._services, self._config, echo_request_id=False)  # Serve's proxy echoes it


# --- the ingress's view of the models -------------------------------------------------------------------------


async def _call(method: Any, *args: Any) -> Any:
    """Call a deployment; a refusal is raised again, a full queue becomes ``Overloaded``."""
    try:
        result = await method.remote(*args)
    except BackPressureError as error:
        raise Overloaded from error
    if isinstance(result, Refusal):
        raise InputError(result.field, result.value, result.mend)
    return result


class RemoteSampler:
    """``AsyncSampler`` on a ``Policy`` deployment."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        return await _call(self._handle.sample, question, opinions, orders)


class RemoteJudge:
    """``AsyncJudge`` on a ``Reward`` deployment."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def judge(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> Judgement:
        return await _call(self._handle.judge, question, opinions, statements)


class RemoteServices:
    """``serving.api.Services`` on deployment handles."""

    def __init__(self, policies: dict[str, DeploymentHandle], reward: DeploymentHandle):
        self.policies = tuple(policies)
        self._policies, self._reward = policies, reward

    async def consensus(self, plan: Plan) -> Consensus:
        return await answer_async(RemoteSampler(self._policies[plan.policy]), RemoteJudge(self._reward), plan)

    async def versions(self) -> dict[str, str]:
        handles = {"preference_model": self._reward, **{f"policy:{k}": v for k, v in self._policies.items()}}
        found = await asyncio.gather(*(_call(handle.version) for handle in handles.values()))
        return dict(zip(handles, found, strict=True))


# --- the application ------------------------------------------------------------------------------------------


def build(args: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application for ``serve.run`` or a Serve YAML (``import_path: serving.deployments:build``).

    Args:
        args: a ``ServeConfig`` or its keys. ``host`` and ``port`` are for ``running_service`` alone.
    """
    config = args if isinstance(args, ServeConfig) else ServeConfig(**args)
    folders = {
        name: model_folder("model_name_or_path" if name == DEFAULT_POLICY else "policies", path)
        for name, path in config.policy_folders().items()
    }
    judge = model_folder("preference_model", config.preference_model)
    if config.uncertainty_penalty:
        check_ensemble(judge)
    gpus = round(0.99 / (len(folders) + 1), 2) if config.device == "cuda" else 0
    options = {"num_cpus": 0.3, "num_gpus": gpus}
    policies = {
        name: Policy.options(name=f"Policy-{name}", ray_actor_options=options).bind(  # type: ignore[attr-defined]
            folder, config.sampling, config.device
        )
        for name, folder in folders.items()
    }
    reward = Reward.options(ray_actor_options=options).bind(judge, config.device)  # type: ignore[attr-defined]
    return Api.bind(policies, reward, config)  # type: ignore[attr-defined]


def model_folder(field: str, name_or_path: str) -> str:
    """Absolute path of a model folder (replicas may run elsewhere), or a policy's hub name as it is.

    Raises:
        InputError: naming ``field``: checked here, before anything is started.
    """
    path = Path(resolve(name_or_path))
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise InputError(field, name_or_path, "holds no *.safetensors; save the model with save_pretrained")
        if field == "preference_model" and not (path / CALIBRATION).is_file():
            raise InputError(field, name_or_path, f"has no {CALIBRATION}; fit it with `consensus preference`")
        return str(path.resolve())
    if field == "preference_model" or not is_hub_name(name_or_path):  # calibration is never on the hub
        raise InputError(field, name_or_path, "no such folder; train the model first or name another")
    return name_or_path


@contextmanager
def running_service(config: ServeConfig) -> Iterator[str]:
    """Start the service, wait until ``/healthz`` is ready, yield its URL, stop it.

    A Ray cluster this process is connected to is used and left running, Serve with other applications (and its
    address, if it ran before) too; otherwise a local one is started on loopback, with its own temporary folder, and
    shut down again. Nothing else on the machine is stopped.

    Raises:
        InputError: if the port is taken or a model folder is not one.
        RuntimeError: if a model cannot be loaded or the service is not ready within ``READY_TIMEOUT_S``.
    """
    application = build(config)
    config = replace(config, port=_port(config.host, config.port))
    with local_ray():
        timeout = config.request_timeout_s + 10  # the ingress answers 504 first, in our words
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=timeout))
        address = _get_global_client().http_config  # not ours where Serve ran already
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            url = f"http://{address.host}:{address.port}"
            _wait_until_ready(url)
            yield url
        finally:
            serve.delete(APPLICATION)  # shutdown() would end other applications too; our own Ray ends with Serve


def main(config: ServeConfig) -> None:
    """``consensus serve``: serve until SIGINT or SIGTERM."""
    stop = threading.Event()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # our own line says where to call
    with running_service(config) as url:
        before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            print(
                f"Serving on {url} (documentation: {url}/docs). Try:\n\n{curl_line(url)}\n\nCtrl-C stops it.",
                flush=True,
            )
            while not stop.wait(1.0):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped.", flush=True)


def curl_line(url: str) -> str:
    """A command that asks the service for a consensus."""
    body = shlex.quote(json.dumps(EXAMPLES[0]))
    return f"curl -s {url}/v1/consensus -H 'Content-Type: application/json' -d {body}"


def _port(host: str, port: int) -> int:
    """``port`` if it is free, a free one for 0.

    Raises:
        InputError: if it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError("port", port, f"cannot listen there ({error.strerror}); choose another") from error
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with opener.open(f"{url}/healthz", timeout=10) as response:
                log.info("ready: %s", response.read().decode())
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}/healthz is not ready after {READY_TIMEOUT_S:.0f} s") from error
            time.sleep(0.2)
