"""The pool of real Ray actors: the same scores as in this process, whatever happens to the actors."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks.pool import measure, weights_mib
from deliberation.types import InputError
from reward.dispatch import PoolError
from reward.group_reward import LocalScorer, make_group_reward
from reward.pool import RewardPool
from reward.preference import Calibration, PreferenceModel

import tiny

QUESTION, OPINIONS = "Should buses be free?", ["Yes.", "No, never."]
STATEMENTS = ["Free.", "Not free at all.", "Later."]
GROUP = (QUESTION, OPINIONS, STATEMENTS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "model"
    tokenizer = tiny.make_tokenizer()
    PreferenceModel(tiny.make_judge(tokenizer), tokenizer, Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0))).save(folder)
    return folder


@pytest.fixture(scope="module")
def local(model_folder):
    return LocalScorer(PreferenceModel.load(model_folder))


@pytest.fixture(scope="module")
def pool(ray_cluster, model_folder):
    with RewardPool(model_folder, actors=2, num_cpus=0.5) as pool:
        yield pool


def assert_equal(found, expected):
    np.testing.assert_allclose(found.raw, expected.raw, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.utilities, expected.utilities, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_scores_equal_local_scores(pool, local):
    expected = local.score(*GROUP)
    assert_equal(pool.score_sync(*GROUP), expected)
    assert_equal(asyncio.run(pool.score(*GROUP)), expected)


@pytest.mark.slow
def test_the_group_reward_is_the_same_by_either_scorer(pool, local):
    rows = {"question": [QUESTION] * 3, "opinions": [OPINIONS, OPINIONS, OPINIONS[:1]]}
    found, expected = (
        asyncio.run(make_group_reward(scorer, "nash")(["p"] * 3, STATEMENTS, **rows)) for scorer in (pool, local)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_many_threads_with_many_event_loops(pool, local):
    """Each thread runs one event loop after another, as a trainer does; both actors get work."""
    groups = [(f"{QUESTION} {i}", OPINIONS, STATEMENTS) for i in range(6)]
    expected = [local.score(*group) for group in groups]

    async def all_at_once():
        return await asyncio.gather(*(pool.score(*group) for group in groups))

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(lambda _: asyncio.run(all_at_once()), range(9)):
            for one, other in zip(found, expected, strict=True):
                assert_equal(one, other)


@pytest.mark.slow
def test_bad_input_comes_back_as_such(pool):
    before = pool.pids
    with pytest.raises(InputError, match="statements\\[0\\]") as error:
        pool.score_sync(QUESTION, OPINIONS, [" "])
    assert error.value.field == "statements[0]" and pool.pids == before


@pytest.mark.slow
def test_actors_are_named_and_names_of_two_pools_differ(pool, model_folder):
    with RewardPool(model_folder, actors=1, num_cpus=0.1) as other:
        assert set(pool.pids).isdisjoint(other.pids)
        assert {name: ray.get(ray.get_actor(name).pid.remote()) for name in pool.pids} == pool.pids
        (name,) = other.pids
        assert name.startswith("reward-")


@pytest.mark.slow
def test_actors_of_a_node_share_the_pages_of_the_weights(pool):
    pool.score_sync(*GROUP)
    pids = list(pool.pids.values())
    assert all("model.safetensors" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    assert weights_mib(pids, "Pss") < 0.9 * weights_mib(pids, "Rss")


@pytest.mark.slow
def test_metrics_are_at_the_prometheus_endpoint_of_ray(pool):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: pool.score_sync(*GROUP), range(24)))
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    wanted = {"queue_length", "batch_size_bucket", "scores_total", "latency_seconds_bucket"}
    pattern = re.compile(rf'^ray_consensus_reward_(\w+){{.*pool="{pool.name}".*}} ([\d.]+)$', re.MULTILINE)
    deadline, found = time.monotonic() + 300, {}
    while not wanted <= set(found) or found["scores_total"] < 24 * 6:  # Ray exports every ten seconds
        assert time.monotonic() < deadline, found
        time.sleep(1)
        with suppress(OSError):  # whoever tells them may not be up yet, or have no core for a while
            text = opener.open(url, timeout=60).read().decode()
            found = {name: float(value) for name, value in pattern.findall(text)}


@pytest.mark.slow
def test_a_killed_actor_is_restarted_and_its_call_repeated(ray_cluster, model_folder, local):
    with RewardPool(model_folder, actors=1, num_cpus=0.5) as pool, ThreadPoolExecutor(1) as thread:
        (pid,) = pool.pids.values()
        os.kill(pid, signal.SIGSTOP)  # so that the call is under way, for sure, when the actor dies
        call = thread.submit(pool.score_sync, *GROUP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        assert_equal(call.result(), local.score(*GROUP))
        assert pid not in pool.pids.values()


@pytest.mark.slow
def test_when_no_actor_can_the_error_names_the_deliberation_and_the_cause(ray_cluster, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    with RewardPool(folder, actors=1, num_cpus=0.5) as pool:
        (folder / "calibration.json").unlink()
        (pid,) = pool.pids.values()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PoolError, match="'Should buses be free\\?' not scored: no actor is left.* no calibration"):
            pool.score_sync(*GROUP)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_said(ray_cluster, tmp_path):
    with pytest.raises(PoolError, match="cannot load the preference model: .* is not a folder"):
        RewardPool(tmp_path / "nothing", actors=1, num_cpus=0.5)


@pytest.mark.slow
def test_no_room_in_the_cluster_is_said(ray_cluster, model_folder):
    with pytest.raises(PoolError, match="1 actors of 1000 CPUs and 0 GPUs found no room"):
        RewardPool(model_folder, actors=1, num_cpus=1000, load_timeout=2)


@pytest.mark.slow
def test_closing_ends_the_actors(ray_cluster, model_folder):
    with RewardPool(model_folder, actors=1, num_cpus=0.5) as pool:
        ((name, pid),) = pool.pids.items()
    pool.close()
    with pytest.raises(PoolError, match="closed"):
        pool.score_sync(*GROUP)
    with pytest.raises(ValueError, match=name):
        ray.get_actor(name)
    deadline = time.monotonic() + 120
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_under_load_with_an_actor_killed_every_few_seconds_no_call_fails(ray_cluster, model_folder):
    """A short run of the benchmark, which is the gate: 60 s, one kill every 5 s or so."""
    found = measure(str(model_folder), seconds=15, undisturbed_s=3, kill_every=4)
    assert found["failed"] == 0 and found["kills"] >= 2 and found["calls"] > 0, found
    assert found["max_difference"] <= 1e-5


@pytest.mark.parametrize("field", ["actors", "max_batch", "max_outstanding"])
def test_numbers_out_of_range_are_named(field):
    with pytest.raises(InputError) as error:
        RewardPool("anywhere", **{field: 0})
    assert error.value.field == field


def test_a_pool_needs_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PoolError, match="not connected to Ray"):
        RewardPool("anywhere")
