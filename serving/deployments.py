"""The Ray Serve application, and a process that runs it: models, HTTP interface and Ray put together."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from deliberation.types import InputError, is_hub_name
from embedded import resolve
from reward.actor import local_ray
from reward.preference import check_ensemble
from serving.ask import KEY_VARIABLE
from serving.config import DEFAULT_POLICY, DEFAULT_PREFERENCE_MODEL, ServeConfig, server_of
from serving.ingress import Api, check_database
from serving.own_ray import own_ports, serving_settings
from serving.replicas import Policy, Reward, ServerPolicy
from serving.schemas import EXAMPLES
from serving.store import absolute

APPLICATION = "consensus"
CALIBRATION = "calibration.json"
READY_TIMEOUT_S = 120.0


# --- the application ------------------------------------------------------------------------------------------


def build(args: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application for ``serve.run`` or a Serve YAML (``import_path: serving.deployments:build``).

    Args:
        args: a ``ServeConfig``, or its keys; with ``config``, a file of keys (one shipped as ``configs/...``, or any
            path), which the others override. ``host`` and ``port`` are for ``running_service`` alone.

    Raises:
        InputError: on a key, a file or a model folder that is not good.
    """
    config = args if isinstance(args, ServeConfig) else read_settings(args)
    config = replace(config, database=absolute(config.database))  # replicas have working directories of their own
    options = model_options(config)
    rewards = {name: _reward(name, place, config, options) for name, place in config.preference_folders().items()}
    policies = {name: _policy(name, place, config, options) for name, place in config.policy_folders().items()}
    api = Api.options(  # type: ignore[attr-defined]
        num_replicas=config.api_replicas, graceful_shutdown_timeout_s=config.request_timeout_s
    )
    return api.bind(policies, rewards, config)


def _reward(name: str, place: str, config: ServeConfig, options: dict[str, Any]) -> serve.Application:
    """The deployment of one preference model."""
    field = "preference_model" if name == DEFAULT_PREFERENCE_MODEL else "preference_models"
    folder = preference_folder(field, place)
    if config.uncertainty_penalty:
        check_ensemble(folder)
    deployment = Reward.options(name=f"Reward-{name}", **options)  # type: ignore[attr-defined]
    return deployment.bind(config.request_timeout_s, folder, config.device)


def _policy(name: str, place: str, config: ServeConfig, options: dict[str, Any]) -> serve.Application:
    """The deployment of one policy: of a server, or of a folder or hub name."""
    options = {"name": f"Policy-{name}", **options}
    server = server_of(place)
    if server is not None:
        options = {**options, "ray_actor_options": {"num_cpus": config.replica_cpus}}
        return ServerPolicy.options(**options).bind(  # type: ignore[attr-defined]
            server, config.sampling, config.request_timeout_s
        )
    folder = model_folder("model_name_or_path" if name == DEFAULT_POLICY else "policies", place)
    return Policy.options(**options).bind(  # type: ignore[attr-defined]
        config.request_timeout_s, folder, config.sampling, config.device
    )


def read_settings(args: dict[str, Any]) -> ServeConfig:
    """The ``ServeConfig`` of a Serve YAML's ``args``: see ``build``.

    Raises:
        InputError: on an unknown key, or a file that is not there.
    """
    keys = dict(args)
    if "config" in keys:
        file = Path(keys.pop("config"))
        if file.parts[0] == "configs":  # a shipped one, from any working directory
            file = Path(__file__).parents[1] / file
        if not file.is_file():
            raise InputError("config", str(file), "no such file; give the path of a serve.yaml")
        keys = {**yaml.safe_load(file.read_text(encoding="utf-8")), **keys}
    unknown = sorted(set(keys) - {field.name for field in fields(ServeConfig)})
    if unknown:
        raise InputError(unknown[0], keys[unknown[0]], "is no key of `consensus serve`; see `consensus serve --help`")
    return ServeConfig(**keys)


def model_options(config: ServeConfig) -> dict[str, Any]:
    """Ray Serve's options of a deployment with a model."""
    gpus = {"num_gpus": config.replica_gpus} if config.device == "cuda" else {}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": 2,  # one in work, one that waits
            "metrics_interval_s": 2,
            "look_back_period_s": 10,
            "upscale_delay_s": 10,
            "downscale_delay_s": 120,
        },
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": config.request_timeout_s,
        "ray_actor_options": {"num_cpus": config.replica_cpus, **gpus},
    }


def model_folder(field: str, name_or_path: str) -> str:
    """Absolute path of a model folder (replicas may run elsewhere), or a policy's hub name as it is.

    Raises:
        InputError: naming ``field``: checked here, before anything is started.
    """
    path = Path(resolve(name_or_path))
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise InputError(field, name_or_path, "holds no *.safetensors; save the model with save_pretrained")
        return str(path.resolve())
    if not is_hub_name(name_or_path):
        raise InputError(field, name_or_path, "no such folder; train the model first or name another")
    return name_or_path


def preference_folder(field: str, path: str) -> str:
    """Absolute path of a preference model's folder: never a hub name, for calibration is not on the hub.

    Raises:
        InputError: naming ``field``.
    """
    if not Path(resolve(path)).is_dir():
        raise InputError(field, path, "no such folder; train the model first or name another")
    folder = model_folder(field, path)
    if not (Path(folder) / CALIBRATION).is_file():
        raise InputError(field, path, f"has no {CALIBRATION}; fit it with `consensus preference`")
    return folder


@contextmanager
def running_service(config: ServeConfig) -> Iterator[str]:
    """Start the service, wait until all models answer, yield its URL, stop it.

    A Ray cluster this process is connected to is used and left running, Serve with other applications (and its
    address, if it ran before) too; otherwise a local one is started on loopback, with its own temporary folder, and
    shut down again. Nothing else on the machine is stopped.

    Raises:
        InputError: if the port is taken or a model folder is not one.
        RuntimeError: if a model cannot be loaded or the service is not ready within ``READY_TIMEOUT_S``.
    """
    application = build(config)
    ours = not ray.is_initialized()
    with _port(config.host, config.port) as port, serving_settings(port), local_ray():
        check_database(config)  # Serve would only say that Api does not start
        timeout = config.request_timeout_s + 10  # the ingress answers 504 first, in our words
        serve.start(http_options=HTTPOptions(host=config.host, port=port, request_timeout_s=timeout))
        address = _get_global_client().http_config  # not ours where Serve ran already
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            url = f"http://{address.host}:{address.port}"
            _wait_until_ready(url)
            yield url
        finally:
            serve.delete(APPLICATION)
            if ours:
                serve.shutdown()  # ends HAProxy, which is no process of Ray's; where Ray ran it would end others' too


def main(config: ServeConfig) -> None:
    """``consensus serve``: serve until SIGINT or SIGTERM."""
    stop = threading.Event()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # our own line says where to call
    with running_service(config) as url:
        before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            line = curl_line(url, config.require_keys)
            print(f"Serving on {url} (documentation: {url}/docs). Try:\n\n{line}\n\nCtrl-C stops it.", flush=True)
            while not stop.wait(1.0):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped.", flush=True)


def curl_line(url: str, keys: bool = False) -> str:
    """A command that asks the service for a consensus, where ``keys`` are needed with the one in the environment."""
    body = shlex.quote(json.dumps(EXAMPLES[0]))
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if keys else ""
    return f"curl -s {url}/v1/consensus{key} -H 'Content-Type: application/json' -d {body}"


@contextmanager
def _port(host: str, port: int) -> Iterator[int]:
    """``port`` if it is free; for 0, one that is nobody else's as long as this lasts.

    Raises:
        InputError: if it is taken.
    """
    if port == 0:
        with own_ports() as ports:
            yield ports[0]
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError("port", port, f"cannot listen there ({error.strerror}); choose another") from error
    yield port


def _wait_until_ready(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with opener.open(f"{url}/readyz", timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}/readyz is not ready after {READY_TIMEOUT_S:.0f} s") from error
            time.sleep(0.2)
