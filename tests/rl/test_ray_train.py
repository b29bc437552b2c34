"""Two workers of Ray Train against the two processes of torchrun; workers and reward actors that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray.train
import torch
from ray.train.v2._internal.util import construct_user_exception_with_traceback
from safetensors.torch import load_file

from deliberation.types import InputError
from rl.logs import read_log
from rl.ray_train import cause
from rl.train import PPOScriptConfig, main, train_ppo

import stage_inputs

KEYS = {
    "max_steps": 8,  # the kill comes after two; on a busy machine it may come some updates late
    "num_prompts": 2,
    "num_generations": 2,
    "num_mini_batches": 1,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "kl_target": 0.01,
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model_name_or_path": str(stage_inputs.save_policy(folder / "policy")),
        "preference_model": str(stage_inputs.save_preference_model(folder / "judge")),
        "deliberations": str(stage_inputs.write_deliberations(folder / "deliberations.jsonl")),
    }


def end_of(run: Path) -> dict:
    """Weights of policy and value head, schedule and log of a run that has ended."""
    drop = ("time/", "train_", "sampling/")  # the last measures how the sampler rounds
    log = [{k: v for k, v in line.items() if not k.startswith(drop)} for line in read_log(run / "log.jsonl")]
    policy, head = load_file(run / "model.safetensors"), load_file(run / "value_model" / "value_head.safetensors")
    return {"weights": {**policy, **head}, "log": log, "state": json.loads((run / "ppo_state.json").read_text())}


def same(a: dict, b: dict) -> bool:
    weights = all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    return weights and a["weights"].keys() == b["weights"].keys() and (a["log"], a["state"]) == (b["log"], b["state"])


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict:
    """The end of a run of two processes of torchrun, with the preference model in each."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    words = [f"--{key}={value}" for key, value in {**KEYS, **inputs, "output_dir": run}.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cli", "ppo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launch, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return end_of(run)


def processes(title: str) -> list[psutil.Process]:
    """Our own Ray's processes whose title says so."""
    return [one for one in psutil.Process().children(recursive=True) if title in title_of(one)]


def title_of(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # it ended meanwhile, or is a zombie
        return ""


def kill_after_two_updates(run: Path, title: str, killed: list[int]) -> None:
    while not (found := processes(title)):  # looked for now: it takes a moment, and two updates do not take many
        time.sleep(0.1)
    while len(read_log(run / "log.jsonl") if (run / "log.jsonl").is_file() else []) < 2:
        time.sleep(0.01)
    victim = found[0]
    victim.kill()
    killed.append(victim.pid)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["RewardActor", "RayTrainWorker"])
def test_ray_train_ends_as_torchrun_does_whoever_is_killed(victim, undisturbed, inputs, tmp_path, ray_cluster):
    """Bit for bit. A killed actor is no matter for the workers; a killed worker's group starts again."""
    run, killed = tmp_path / "run", []
    config = PPOScriptConfig(
        **KEYS, **inputs, output_dir=str(run), train_workers=2, reward_actors=1, reward_actor_cpus=0.5, max_failures=1
    )
    threading.Thread(target=kill_after_two_updates, args=(run, victim, killed), daemon=True).start()
    main(config)
    assert len(killed) == 1
    assert same(end_of(run), undisturbed)
    deadline = time.monotonic() + 120
    while left := processes("RewardActor") + processes("RayTrainWorker"):  # nobody is left behind
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"train_workers": -1}, "train_workers"),
        ({"train_workers": 3}, "num_mini_batches"),  # two prompts an update do not divide by three
        ({"resume_from_checkpoint": "."}, "resume_from_checkpoint"),
        ({"output_dir": None}, "output_dir"),
        ({"welfare": "kindness"}, "welfare"),
        ({"model_name_or_path": "no/such/folder"}, "model_name_or_path"),
        ({"deliberations": None}, "deliberations"),
        ({"preference_model": "nowhere"}, "preference_model"),
    ],
)
def test_bad_keys_are_named_before_a_worker_starts(change, field, inputs, tmp_path):
    with pytest.raises(InputError) as error:
        main(PPOScriptConfig(**{**KEYS, **inputs, "output_dir": str(tmp_path / "run"), "train_workers": 2, **change}))
    assert error.value.field == field
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_another_run_are_not_taken_for_those_of_this_one(inputs, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(InputError, match="auto") as error:
        main(PPOScriptConfig(**KEYS, **inputs, output_dir=str(tmp_path), train_workers=2))
    assert error.value.field == "output_dir"


def test_only_the_command_starts_workers(inputs, tmp_path):
    with pytest.raises(InputError, match="consensus ppo"):
        train_ppo(PPOScriptConfig(**KEYS, **inputs, output_dir=str(tmp_path), train_workers=2))


def test_bad_input_in_a_worker_is_told_as_such():
    bad, gone = InputError("deliberations", "x", "mend it"), ray.exceptions.ActorDiedError()
    error = ray.train.WorkerGroupError("failed", {0: gone, 1: construct_user_exception_with_traceback(bad)})
    assert cause(error) is bad
    error = ray.train.WorkerGroupError("failed", {0: gone})
    assert cause(error) is error
