"""Ray Serve's deployment of the HTTP interface, in front of those of the models."""

from __future__ import annotations

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deliberation.types import InputError
from serving.api import make_app
from serving.config import LOOPBACK, ServeConfig
from serving.guard import LOCAL_HOSTS, write_access_log
from serving.ray_metrics import RayMetrics
from serving.remote import RemoteServices
from serving.replicas import OPTIONS
from serving.store import check_nodes


def check_database(config: ServeConfig) -> None:
    """Refuse a file as the database of a cluster of several nodes.

    Raises:
        InputError: field ``database``.
    """
    check_nodes(config.database, sum(node["Alive"] for node in ray.nodes()))


def check_door(config: ServeConfig) -> None:
    """Refuse to be reached from elsewhere without keys: ``serve deploy`` listens where its own file says.

    Raises:
        InputError: field ``http_options.host``.
    """
    host = _get_global_client().http_config.host  # None: Ray Serve listens nowhere
    if not config.require_keys and host not in (None, *LOOPBACK, "::1"):
        raise InputError("http_options.host", host, f"set require_keys: true, or listen on {LOOPBACK[0]}")


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=128,
    backpressure_config={"status_code": 429, "retry_after_s": 2},
    ray_actor_options={"num_cpus": 0.1},
    **OPTIONS,
)
@serve.ingress()
class Api:
    """The HTTP interface in front of them."""

    def __init__(
        self, policies: dict[str, DeploymentHandle], rewards: dict[str, DeploymentHandle], config: ServeConfig
    ):
        check_database(config)
        check_door(config)
        write_access_log()
        self._services, self._config = RemoteServices(policies, rewards), config

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy echoes the request's id itself
        hosts = None if self._config.require_keys else LOCAL_HOSTS
        return make_app(self._services, self._config, metrics=RayMetrics(), echo_request_id=False, hosts=hosts)
