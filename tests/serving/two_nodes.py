"""Deploys the HTTP interface on a Ray of two nodes, once for each database URL: ``python two_nodes.py URL ...``.

Prints a JSON list: for every URL why the deployment failed, or what ``/healthz`` answers. In a process of its own: a
test session's Ray has one node, and Ray's files belong below ``RAY_TMPDIR``, away from other clusters on the machine.
"""

from __future__ import annotations

import json
import sys

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions

from serving.config import ServeConfig
from serving.ingress import Api
from serving.own_ray import own_ports

LOOPBACK = "127.0.0.1"
NODE = {"num_cpus": 2, "object_store_memory": 100_000_000}


def outcome(url: str, port: int) -> str:
    """What becomes of the interface with that database; no model stands behind it."""
    api = Api.options(num_replicas=1, graceful_shutdown_timeout_s=1)
    try:
        serve.run(api.bind({}, {}, ServeConfig(database=url)), name="consensus", route_prefix="/")
        return httpx.get(f"http://{LOOPBACK}:{port}/healthz", trust_env=False, timeout=120).text
    except RuntimeError:  # which does not say why; `serve status` does
        return serve.status().applications["consensus"].deployments["Api"].message
    finally:
        serve.delete("consensus")


def main(urls: list[str]) -> list[str]:
    with own_ports() as (gcs, agent, port, *_):  # ports looked up could be others' when they are listened on
        cluster = Cluster()
        try:
            ports = {"gcs_server_port": gcs, "dashboard_agent_listen_port": agent}
            for keys in ({"include_dashboard": False, **ports}, {}):
                cluster.add_node(wait=False, **NODE, **keys)
            cluster.wait_for_nodes(timeout=200)  # `wait` would take 30 s for a failure
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            assert sum(node["Alive"] for node in ray.nodes()) == 2
            serve.start(http_options=HTTPOptions(host=LOOPBACK, port=port))
            return [outcome(url, port) for url in urls]
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
