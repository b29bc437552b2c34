"""The HTTP interface's deployment: what it refuses to start with, and what a replica of it writes down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from deliberation.types import InputError
from serving import ingress
from serving.config import ServeConfig
from serving.ingress import Api, check_door


@pytest.fixture
def listening(monkeypatch):
    """Have Ray Serve listen on an address."""

    def on(host):
        found = SimpleNamespace(http_config=SimpleNamespace(host=host))
        monkeypatch.setattr(ingress, "_get_global_client", lambda: found)

    return on


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "consensus.example"])
def test_without_keys_the_interface_does_not_start_where_others_reach_it(listening, host):
    listening(host)
    with pytest.raises(InputError, match="require_keys") as caught:
        check_door(ServeConfig())
    assert caught.value.field == "http_options.host"
    check_door(ServeConfig(require_keys=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", None])
def test_on_loopback_it_starts_without_keys(listening, host):
    listening(host)
    check_door(ServeConfig())


@pytest.mark.slow
def test_a_replica_writes_its_line_where_ray_keeps_what_processes_say(ray_cluster, port, tmp_path):
    from ray._private.worker import global_worker

    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    address = _get_global_client().http_config  # not ours where Serve ran already
    api = Api.options(num_replicas=1, graceful_shutdown_timeout_s=1)
    try:
        serve.run(api.bind({}, {}, ServeConfig(database=f"sqlite:///{tmp_path}/service.db")), name="consensus")
        headers = {"X-Request-Id": "look-for-me"}
        url = f"http://{address.host}:{address.port}/healthz"
        httpx.get(url, headers=headers, trust_env=False, timeout=60)
        rebound = httpx.get(url, headers={"Host": "evil.example"}, trust_env=False, timeout=60)
    finally:
        serve.delete("consensus")
    assert rebound.status_code == 421 and rebound.json()["type"].endswith(":wrong-host")
    lines = written(Path(global_worker.node.get_logs_dir_path()), "look-for-me")
    assert [(line["event"], line["route"], line["status"]) for line in lines] == [("request", "/healthz", 200)]


def written(folder, request_id):
    """The access log's lines of a request, once there are any."""
    deadline = time.monotonic() + 120
    while True:
        text = "".join(file.read_text(errors="replace") for file in folder.glob("worker-*.err"))
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{") and request_id in line]
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.2)
