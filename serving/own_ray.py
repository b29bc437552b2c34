"""Settings of a Ray that serves, read when it starts: one that runs already keeps its own."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # by default one that takes 5 s to start is started anew
    # One thread a replica, whose code waits and does not compute: no hand-over between three
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_worker_niceness": "0",  # 15 by default: on a busy machine a model then takes minutes to load
}
"""What differs from Ray's defaults; a variable that is set already stands."""

PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",  # Ray's proxy, behind HAProxy where no replica of the interface runs
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
REPLICA_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
"""The interface's replicas listen from the one up to the other, which is left out.

By default every Ray has the same, and proxies of one user may share a port: requests of one service then reach
another.
"""

BLOCK = 250
"""Ports of one Ray: one that a replica has left rests for some minutes, at a replica lost every 3 s some 50."""
BLOCKS = range(20_000, 32_500, BLOCK)
"""First ports: above those of Ray's workers, below those that systems give to connections."""

HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "counts",
}
"""What HAProxy keeps, in a folder of ours: by default one that all users share, with a socket they may all command.

Short names: a socket's path has 97 characters at most, 57 of them the name Ray gives the node."""


def _binds(probe: socket.socket, port: int) -> bool:
    """Whether the port of every interface was free, and is the socket's now."""
    try:
        probe.bind(("", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return _binds(probe, port)


@contextmanager
def own_ports(without: int = 0) -> Iterator[range]:
    """A block of ports that is no other service's as long as this lasts: its first, which it leaves out, is held.

    Systems do not give them to connections, as they do one that was looked up by binding to port 0.

    Args:
        without: a port that the block must not hold.

    Raises:
        RuntimeError: if there is none.
    """
    for first in BLOCKS:
        block = range(first + 1, first + BLOCK)
        with socket.socket() as claim:  # never listens
            if without not in (first, *block) and _binds(claim, first) and all(map(_is_free, block[: len(PORTS)])):
                yield block
                return
    raise RuntimeError(f"no {BLOCK} ports from {BLOCKS.start} to {BLOCKS.stop} are free; stop another service")


@contextmanager
def serving_settings(port: int = 0) -> Iterator[None]:
    """The environment a Ray of our own starts with, as long as it runs; nothing where this process has one already.

    Args:
        port: the one the service will listen on; no other of Ray's may be that.

    Raises:
        RuntimeError: if the machine has no ports left.
    """
    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ha-", ignore_cleanup_errors=True) as folder, own_ports(port) as own:
        wanted = RAY_ENVIRONMENT | {name: str(Path(folder, file)) for name, file in HAPROXY_FILES.items()}
        numbers = [*own[: len(PORTS)], own[len(PORTS)], own.stop]
        wanted |= {name: str(port) for name, port in zip((*PORTS, *REPLICA_PORTS), numbers, strict=True)}
        ours = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]
