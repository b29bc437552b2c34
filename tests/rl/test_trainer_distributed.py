"""Two processes against one: the same samples, the same numbers, the same weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rl.checkpoints import damage

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(folder: Path, layout: str, processes: int) -> dict:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *address]
    command = [sys.executable, *launch, str(HERE / "distributed_run.py"), str(folder), layout]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert damage(folder / "checkpoint-3") is None
    return torch.load(folder / "end.pt")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["head", "value_model", "lora"])
def test_two_processes_train_as_one(layout, tmp_path):
    one, two = (train(tmp_path / str(n), layout, n) for n in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-6, msg=name)
    assert one["moved"] > 1e-4
    assert one["beta"] == pytest.approx(two["beta"])
    whole = ("reward", "kl", "objective/rlhf_reward", "loss/policy_avg", "loss/value_avg", "num_tokens", "episode")
    for a, b in zip(one["log"], two["log"], strict=True):
        for name in whole if "kl" in a else [key for key in a if key.startswith("eval_")]:
            assert a[name] == pytest.approx(b[name], abs=1e-5), name
