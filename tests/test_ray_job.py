"""The PPO stage as a Ray job: submitted with Ray's job client, run in a copy of the working directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from serving.own_ray import own_ports

import stage_inputs

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = [".git", ".venv", "runs", "tests", "**/__pycache__"]


@pytest.fixture(scope="module")
def job_client():
    """A job client of a fresh local cluster (head only, dashboard on loopback), ended whatever happens."""
    # Not those that the system draws from: Ray draws dozens of them itself before it comes to the last that it is told.
    with own_ports() as ports:
        yield from _cluster(*ports[:6])


def _cluster(gcs: int, dashboard: int, listen: int, grpc: int, client: int, metrics: int):
    # Ray's sockets lie below this folder, and a socket's path may have 107 bytes at most.
    temp = tempfile.mkdtemp(prefix="rj-", dir="/tmp")
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4", "--num-gpus=0",
        "--object-store-memory=200000000", f"--temp-dir={temp}", f"--port={gcs}", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={listen}",
        f"--dashboard-agent-grpc-port={grpc}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", "--disable-usage-stats",
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    log = Path(temp) / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield connect(f"http://127.0.0.1:{dashboard}", listen, head, log)
    finally:
        # `ray start --block` ends all processes of its own node on SIGTERM, and only those.
        head.terminate()
        try:
            head.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(temp, ignore_errors=True)


def connect(address: str, agent: int, head: subprocess.Popen, log: Path) -> JobSubmissionClient:
    """Wait for the job server, and for the node's agent: the server waits ten seconds for it, then refuses a job."""
    deadline = time.monotonic() + 600
    while True:
        assert head.poll() is None, f"the cluster ended: {log.read_text()[-3000:]}"
        try:
            socket.create_connection(("127.0.0.1", agent), timeout=60).close()
            return JobSubmissionClient(address)
        except (OSError, RuntimeError):
            assert time.monotonic() < deadline, f"no job server: {log.read_text()[-3000:]}"
            time.sleep(1)


def finish(client: JobSubmissionClient, job: str, seconds: float) -> JobStatus:
    """The job's final state."""
    deadline = time.monotonic() + seconds
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-5000:]
        time.sleep(1)
    return status


@pytest.mark.slow
def test_ppo_as_a_ray_job(job_client, tmp_path):
    policy, judge, run = tmp_path / "policy", tmp_path / "judge", tmp_path / "run"
    stage_inputs.save_policy(policy)
    stage_inputs.save_preference_model(judge)
    data = stage_inputs.write_deliberations(tmp_path / "deliberations.jsonl")
    job = job_client.submit_job(
        entrypoint=f"{sys.executable} -m cli ppo --config configs/embedded/ppo.yaml --max_steps 2 "
        f"--model_name_or_path {policy} --preference_model {judge} --deliberations {data} "
        f"--eval_deliberations {data} --eval_steps 2 --save_steps 2 --output_dir {run} --reward_actors 1 "
        "--num_prompts 2 --num_generations 2 --num_mini_batches 1 --max_completion_length 8",
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": NOT_SHIPPED,
            "env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"},
        },
    )
    status = finish(job_client, job, seconds=1200)
    logs = job_client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs[-5000:]
    # It trained: two updates in the state that the Trainer keeps, and a policy that transformers can load.
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert list(run.glob("*.safetensors"))


@pytest.mark.slow
def test_bad_input_fails_the_job_in_one_line(job_client, tmp_path):
    job = job_client.submit_job(
        entrypoint=f"{sys.executable} -m cli ppo --config configs/embedded/ppo.yaml --welfare kindness",
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": NOT_SHIPPED,
            "env_vars": {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        },
    )
    assert finish(job_client, job, seconds=600) == JobStatus.FAILED
    logs = job_client.get_job_logs(job)
    assert "welfare = 'kindness'" in logs and "Traceback" not in logs
