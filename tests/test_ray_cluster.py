"""``ray_cluster.yaml`` is checked with Ray's own code, offline and without cloud credentials."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[1] / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load(FILE.read_text())


def test_ray_accepts_the_file(cluster):
    validate_config(prepare_config(cluster))


def test_ray_refuses_an_unknown_top_level_key(cluster):
    cluster["head_node_tpye"] = "head"
    with pytest.raises(jsonschema.ValidationError, match="head_node_tpye"):
        validate_config(prepare_config(cluster))


def test_ray_refuses_a_head_type_that_is_not_there(cluster):
    cluster["head_node_type"] = "nobody"
    # Ray's own function asserts or raises, depending on which step sees it first.
    with pytest.raises((ValueError, KeyError, AssertionError)):
        validate_config(prepare_config(cluster))


def test_cpu_head_and_gpu_workers_from_zero(cluster):
    ready = prepare_config(cluster)
    head, worker = (ready["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert "GPU" not in head["resources"]
    assert worker["resources"]["GPU"] == 1
    assert (worker["min_workers"], worker["max_workers"]) == (0, ready["max_workers"])


def test_all_nodes_run_the_same_image(cluster):
    images = {node["node_config"]["ImageId"] for node in cluster["available_node_types"].values()}
    assert len(images) == 1


def test_dashboard_on_loopback_and_token_on_every_node(cluster):
    ready = prepare_config(cluster)
    head, worker = ("\n".join(ready[f"{role}_start_ray_commands"]) for role in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in head
    for commands in (head, worker):
        assert "RAY_AUTH_MODE=token" in commands.split("ray start")[0]
    assert ready["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_set_up_installs_this_project(cluster):
    ready = prepare_config(cluster)
    target = next(remote for remote, local in ready["file_mounts"].items() if local == ".")
    for role in ("head", "worker"):
        assert any(f"-e {target}" in command for command in ready[f"{role}_setup_commands"])
