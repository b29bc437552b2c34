"""The environment that a Ray of our own starts with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from serving.own_ray import BLOCKS, HAPROXY_FILES, PORTS, RAY_ENVIRONMENT, REPLICA_PORTS, serving_settings

SETTINGS = (*RAY_ENVIRONMENT, *HAPROXY_FILES, *PORTS, *REPLICA_PORTS)


@pytest.fixture
def environment(monkeypatch):
    """Without the settings, whatever the session's Ray was started with."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("serving.own_ray.ray.is_initialized", lambda: False)


def test_the_settings_stand_as_long_as_the_ray_and_leave_nothing(environment):
    before = dict(os.environ)
    with serving_settings():
        assert RAY_ENVIRONMENT.items() <= os.environ.items()
        folders = {Path(os.environ[name]).parent for name, file in HAPROXY_FILES.items() if file}
        (folder,) = folders
        assert folder.stat().st_mode & 0o077 == 0  # its command socket is open to whoever reaches it
        first, end = (int(os.environ[name]) for name in REPLICA_PORTS)
        assert {int(os.environ[name]) for name in PORTS} == set(range(first - len(PORTS), first))
        assert end - first > 100
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


def ports():
    """All that the environment gives a Ray."""
    return {int(os.environ[name]) for name in PORTS} | set(range(*(int(os.environ[name]) for name in REPLICA_PORTS)))


def test_two_services_on_a_machine_have_no_port_in_common(environment, monkeypatch):
    with serving_settings():
        ours = ports()
        with monkeypatch.context() as other:
            for name in SETTINGS:
                other.delenv(name)
            with serving_settings():
                assert not ours & ports()


def test_a_block_whose_port_another_program_has_is_left_alone(environment):
    with serving_settings():
        taken = min(ports())
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        with serving_settings():
            assert taken not in ports()


def test_the_port_a_service_listens_on_is_in_no_block(environment):
    with serving_settings():
        first = min(ports()) - 1  # held, and in none of the variables
    for port in (first, first + 1, first + 9):
        with serving_settings(port):
            found = ports()  # of an earlier block, if another service has ended meanwhile
            assert port not in {min(found) - 1, *found}


def test_a_machine_without_a_free_block_is_told(environment, monkeypatch):
    monkeypatch.setattr("serving.own_ray._is_free", lambda port: False)
    with pytest.raises(RuntimeError, match=f"from {BLOCKS.start} to {BLOCKS.stop} are free"), serving_settings():
        pass
