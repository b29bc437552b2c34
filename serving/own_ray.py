"""Settings of a Ray that serves, read when it starts: one that runs already keeps its own."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray

RAY_ENVIRONMENT = {
    # HAProxy, which sends requests straight to the HTTP interface's replicas, in place of Ray's slower proxy
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # a replica that stops: HAProxy hears of it in .1 s, not 30
    # A connection from before a swap leads to replicas that have gone: each is asked once, then Ray's proxy
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a lost HTTP proxy is back in seconds, by default in half a minute
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
    # One thread a replica, whose code waits and does not compute: no hand-over between three
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_worker_niceness": "0",  # 15 by default: on a busy machine a model then takes minutes to load
}
"""What differs from Ray's defaults; a variable that is set already stands."""

HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
"""Ports of its counts; the usual ones may be another service's."""

HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "counts",
}
"""What HAProxy keeps, in a folder of ours: by default one that all users share, with a socket they may all command.

Short names: a socket's path has 97 characters at most, 57 of them the name Ray gives the node."""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def serving_settings() -> Iterator[None]:
    """The environment a Ray of our own starts with, as long as it runs; nothing where this process has one already."""
    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ha-", ignore_cleanup_errors=True) as folder:
        wanted = RAY_ENVIRONMENT | {name: str(Path(folder, file)) for name, file in HAPROXY_FILES.items()}
        wanted |= dict(zip(HAPROXY_PORTS, map(str, _free_ports(len(HAPROXY_PORTS))), strict=True))
        ours = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]
