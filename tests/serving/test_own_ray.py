"""The environment that a Ray of our own starts with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serving.own_ray import HAPROXY_FILES, HAPROXY_PORTS, RAY_ENVIRONMENT, serving_settings


@pytest.fixture
def environment(monkeypatch):
    """Without the settings, whatever the session's Ray was started with."""
    for name in (*RAY_ENVIRONMENT, *HAPROXY_FILES, *HAPROXY_PORTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("serving.own_ray.ray.is_initialized", lambda: False)


def test_the_settings_stand_as_long_as_the_ray_and_leave_nothing(environment):
    before = dict(os.environ)
    with serving_settings():
        assert RAY_ENVIRONMENT.items() <= os.environ.items()
        folders = {Path(os.environ[name]).parent for name, file in HAPROXY_FILES.items() if file}
        (folder,) = folders
        assert folder.stat().st_mode & 0o077 == 0  # its command socket is open to whoever reaches it
        assert len({os.environ[name] for name in HAPROXY_PORTS}) == len(HAPROXY_PORTS)
    assert dict(os.environ) == before and not folder.exists()


def test_a_variable_that_is_set_stands(environment, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with serving_settings():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_a_ray_that_runs_keeps_its_own(environment, monkeypatch):
    monkeypatch.setattr("serving.own_ray.ray.is_initialized", lambda: True)
    before = dict(os.environ)
    with serving_settings():
        assert dict(os.environ) == before
