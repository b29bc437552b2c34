"""Two processes against one: the same samples, the same numbers, the same weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.checkpoints import damage

HERE = Path(__file__).parent


def launch(processes: int, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    # Alone on the machine: torchrun listens on a port of its own choice. One looked up here could be another's by then.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)


def train(folder: Path, layout: str, processes: int) -> dict:
    folder.mkdir(exist_ok=True)
    done = launch(processes, str(HERE / "distributed_run.py"), str(folder), layout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert damage(folder / "checkpoint-3") is None
    saved = {
        f"{file.relative_to(folder)}: {name}": weight
        for file in folder.glob("checkpoint-3/**/*.safetensors")
        for name, weight in load_file(file).items()
    }
    return torch.load(folder / "end.pt") | {"saved": saved}


def assert_same_weights(one: dict, two: dict, tolerance: float) -> None:
    """At the end in memory, and in the last checkpoint."""
    for where in ("weights", "saved"):
        assert one[where].keys() == two[where].keys() != set()
        for name, weight in one[where].items():
            torch.testing.assert_close(two[where][name], weight, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a layout in one process, trained once."""
    return cache(lambda layout: train(tmp_path_factory.mktemp("alone") / layout, layout, 1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["head", "value_model", "lora"])
def test_two_processes_train_as_one(layout, alone, tmp_path):
    one, two = alone(layout), train(tmp_path / "two", layout, 2)
    assert_same_weights(one, two, 1e-6)
    assert one["moved"] > 1e-4
    assert one["beta"] == pytest.approx(two["beta"])
    whole = ("reward", "kl", "objective/rlhf_reward", "loss/policy_avg", "loss/value_avg", "num_tokens", "episode")
    for a, b in zip(one["log"], two["log"], strict=True):
        for name in whole if "kl" in a else [key for key in a if key.startswith("eval_")]:
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "sharing"),
    [
        ("head", "zero_2"),
        ("lora", "zero_3"),
        ("value_model+parts+checkpointing+best", "zero_3"),
    ],
)
def test_two_processes_of_deepspeed_train_as_one_and_go_on_bit_for_bit(layout, sharing, alone, tmp_path):
    """Real DeepSpeed. It clips with the norm itself, torch with the norm plus 1e-6; Adam then differs as above."""
    pytest.importorskip("deepspeed")
    one, two = alone(layout), train(tmp_path / "two", f"{layout}+{sharing}", 2)
    assert_same_weights(one, two, 1e-6)
    assert one["beta"] == pytest.approx(two["beta"])
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    again = train(tmp_path / "two", f"{layout}+{sharing}", 2)
    assert_same_weights(two, again, 0)
    assert again["beta"] == two["beta"]


@pytest.mark.slow
def test_deepspeed_processes_that_would_each_train_alone_are_refused(tmp_path):
    """Where there is no accelerator, accelerate counts one process under DeepSpeed, however many were started."""
    pytest.importorskip("deepspeed")
    done = launch(2, str(HERE / "distributed_run.py"), str(tmp_path), "zero_2_alone")
    assert done.returncode != 0 and "InputError: WORLD_SIZE = 2: 1 would train together" in done.stderr
