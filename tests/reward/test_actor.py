"""What runs in a reward actor, without Ray: it answers each group of a batch by itself."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from deliberation.types import InputError
from reward.actor import RewardActor, _remove
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


def test_rays_folder_is_removed_though_a_log_writer_makes_it_anew_once(tmp_path, monkeypatch):
    folder, remove, calls = tmp_path / "consensus-1", shutil.rmtree, []

    def removed_and_made_anew(path, ignore_errors):
        calls.append(path)
        remove(path, ignore_errors)
        if len(calls) == 1:
            (folder / "logs").mkdir(parents=True)

    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", removed_and_made_anew)
    _remove(str(folder))
    assert not folder.exists() and len(calls) == 2


def test_a_folder_of_rays_that_stays_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    monkeypatch.setattr("reward.actor.REMOVE_WITHIN_S", 0.0)
    _remove(str(tmp_path))
    assert str(tmp_path) in caplog.text
