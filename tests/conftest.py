"""Shared fixtures: tiny models, one Ray cluster a test session."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: on a busy core a model then takes minutes to load
os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")  # one that is longer in starting ends its node with it
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # it ends workers when others fill the machine's memory
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

import tiny

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a machine that is busy is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def tiny_policy(tiny_tokenizer):
    return tiny.make_policy(tiny_tokenizer)


@pytest.fixture
def tiny_judge(tiny_tokenizer):
    return tiny.make_judge(tiny_tokenizer)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray a session: 2 CPUs (logical 4), own temp folder, shut down whatever happens."""
    import ray
    from ray import serve

    from serving.own_ray import serving_settings

    with serving_settings(), tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temp:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200_000_000,
            _temp_dir=temp,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            yield
        finally:
            serve.shutdown()  # HAProxy is no process of Ray's
            ray.shutdown()
