"""The preference model behind real Ray actors gives the scores it gives in this process."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import ray

from deliberation.types import InputError
from reward.actor import RemoteScorer, start_actor
from reward.group_reward import LocalScorer, make_group_reward
from reward.preference import Calibration, PreferenceModel

import tiny

QUESTION, OPINIONS = "Should buses be free?", ["Yes.", "No, never."]
STATEMENTS = ["Free.", "Not free at all.", "Later."]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "model"
    tokenizer = tiny.make_tokenizer()
    PreferenceModel(tiny.make_judge(tokenizer), tokenizer, Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0))).save(folder)
    return folder


@pytest.fixture(scope="module")
def actors(ray_cluster, model_folder):
    handles = [start_actor(model_folder, num_cpus=0.5, name="judge"), start_actor(model_folder, num_cpus=0.5)]
    yield handles
    for handle in handles:
        ray.kill(handle)


def test_remote_scores_equal_local_scores(actors, model_folder):
    local = LocalScorer(PreferenceModel.load(model_folder)).score(QUESTION, OPINIONS, STATEMENTS)
    scorer = RemoteScorer(*actors)
    group = (QUESTION, OPINIONS, STATEMENTS)
    for remote in (scorer.score_sync(*group), asyncio.run(scorer.score(*group))):
        np.testing.assert_allclose(remote.raw, local.raw, atol=1e-5, rtol=0)
        np.testing.assert_allclose(remote.utilities, local.utilities, atol=1e-5, rtol=0)


def test_the_group_reward_is_the_same_through_actors(actors, model_folder):
    rows = {"question": [QUESTION] * 3, "opinions": [OPINIONS, OPINIONS, OPINIONS[:1]]}
    local = make_group_reward(LocalScorer(PreferenceModel.load(model_folder)), "nash")
    remote = make_group_reward(RemoteScorer(*actors), "nash")
    np.testing.assert_allclose(
        asyncio.run(remote(["p"] * 3, STATEMENTS, **rows)), asyncio.run(local(["p"] * 3, STATEMENTS, **rows)), atol=1e-5
    )


def test_an_actor_has_its_threads_and_its_name(actors):
    assert ray.get(actors[0].threads.remote()) == 1
    named = RemoteScorer(ray.get_actor("judge")).score_sync(QUESTION, OPINIONS, STATEMENTS[:1])
    assert named.raw.shape == (2, 1)


def test_bad_input_comes_back_as_such(actors):
    with pytest.raises(InputError, match="statements\\[0\\]"):
        RemoteScorer(actors[0]).score_sync(QUESTION, OPINIONS, [" "])


def test_a_model_that_does_not_load_is_said(ray_cluster, tmp_path):
    with pytest.raises(ray.exceptions.RayError, match="not a folder"):
        start_actor(tmp_path / "nothing", num_cpus=0.5)


def test_a_scorer_needs_an_actor():
    with pytest.raises(ValueError, match="at least one"):
        RemoteScorer()
