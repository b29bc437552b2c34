"""Deploys the HTTP interface on a Ray of two nodes, once for each database URL: ``python two_nodes.py URL ...``.

Prints a JSON list: for every URL why the deployment failed, or what ``/healthz`` answers. In a process of its own: a
test session's Ray has one node, and Ray's files belong below ``RAY_TMPDIR``, away from other clusters on the machine.
"""

from __future__ import annotations

import json
import socket
import sys

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions

from serving.config import ServeConfig
from serving.ingress import Api

LOOPBACK = "127.0.0.1"
NODE = {"num_cpus": 2, "object_store_memory": 100_000_000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def outcome(url: str, port: int) -> str:
    """What becomes of the interface with that database; no model stands behind it."""
    api = Api.options(num_replicas=1, graceful_shutdown_timeout_s=1)
    try:
        serve.run(api.bind({}, {}, ServeConfig(database=url)), name="consensus", route_prefix="/")
        return httpx.get(f"http://{LOOPBACK}:{port}/healthz", trust_env=False, timeout=30).text
    except RuntimeError:  # which does not say why; `serve status` does
        return serve.status().applications["consensus"].deployments["Api"].message
    finally:
        serve.delete("consensus")


def main(urls: list[str]) -> list[str]:
    cluster = Cluster()
    try:
        cluster.add_node(
            **NODE, include_dashboard=False, gcs_server_port=free_port(), dashboard_agent_listen_port=free_port()
        )
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        port = free_port()
        serve.start(http_options=HTTPOptions(host=LOOPBACK, port=port))
        return [outcome(url, port) for url in urls]
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
