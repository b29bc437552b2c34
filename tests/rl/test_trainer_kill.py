"""Processes that are killed, and processes that are told to leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ppo_helpers import ROWS, ascii_share, changed, make_trainer, weights

from rl.checkpoints import damage

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_killed_two_dozen_times_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL in rollout, scoring, evaluation of tokens, update and saving: weights, optimiser and log bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "kill_resume.py"), str(tmp_path), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 20 and all(found["equal"]), found
    assert sum(count > 0 for count in found["hit"].values()) >= 4, found


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "no"},
        # the second update would be evaluated, is not the best, and one checkpoint is kept beside the best
        dict(
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
        ),
    ],
)
def test_told_to_leave_it_finishes_the_update_saves_and_goes_on_as_if_nothing_had_been(saving, tmp_path):
    settings = dict(max_steps=4, learning_rate=1e-2, **saving)

    def told(prompts, completions, trainer_state, **columns):
        if trainer_state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the second update
        return ascii_share(prompts, completions)

    told.__name__ = "ascii_share"
    whole = make_trainer(tmp_path / "whole", eval_dataset=ROWS[:2], **settings)
    whole.train()
    assert not whole.preemption.agreed
    before = signal.getsignal(signal.SIGTERM)
    left = make_trainer(tmp_path / "left", told, eval_dataset=ROWS[:2], **settings)
    left.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert left.preemption.agreed and left.state.global_step == 2
    assert damage(tmp_path / "left" / "checkpoint-2") is None
    again = make_trainer(tmp_path / "left", eval_dataset=ROWS[:2], **settings)
    again.train(resume_from_checkpoint="auto")
    assert not again.preemption.agreed and again.state.global_step == 4
    assert not changed(again.model, weights(whole.model))
