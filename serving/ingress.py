"""Ray Serve's deployment of the HTTP interface, in front of those of the models."""

from __future__ import annotations

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serving.api import make_app
from serving.config import ServeConfig
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
        self._services, self._config = RemoteServices(policies, rewards), config

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy echoes the request's id itself
        return make_app(self._services, self._config, metrics=RayMetrics(), echo_request_id=False)
