"""What runs in a reward actor, without Ray: it answers each group of a batch by itself."""

from __future__ import annotations

import os

import numpy as np
import pytest

from deliberation.types import InputError
from reward.actor import RewardActor
from reward.dispatch import Failure
from reward.preference import Calibration, PreferenceModel
from reward.scoring import score

import tiny

GROUP = ("Should buses be free?", ["Yes.", "No, never."], ["Free.", "Later."])


@pytest.fixture
def actor(tmp_path, tiny_tokenizer):
    calibration = Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0))
    PreferenceModel(tiny.make_judge(tiny_tokenizer), tiny_tokenizer, calibration).save(tmp_path / "model")
    return RewardActor(str(tmp_path / "model"))


def test_each_group_of_a_batch_is_answered_by_itself(actor):
    bad, broken = ("Why?", ["Yes."], [" "]), ("Why?", ["Yes."], [None])
    good, refused, failed, again = actor.score_batch([GROUP, bad, broken, GROUP])
    expected = score(actor._preference_model, *GROUP)
    for scores in (good, again):
        np.testing.assert_array_equal(scores.raw, expected.raw)
    assert isinstance(refused, InputError) and refused.field == "statements[0]"
    assert isinstance(failed, Failure) and failed.reason.startswith("AttributeError: 'NoneType'")


def test_an_actor_tells_its_process(actor):
    assert actor.pid() == os.getpid()
