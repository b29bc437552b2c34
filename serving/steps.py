"""Training commands of a cycle, each done once: in a process of its own, or as a Ray job."""

from __future__ import annotations

import fcntl
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deliberation.types import InputError

LOCK = "cycle.lock"
MARK = "cycle.step"
NOT_SHIPPED = [".git", ".venv", "runs", "tests", "**/__pycache__"]
"""What of the working directory Ray does not copy."""
LOG_CHARS = 4000
"""How much of a failed job's log is shown."""


@dataclass(frozen=True)
class Step:
    """A training command: ``consensus STAGE ARGUMENTS``; ``id`` names what it makes."""

    stage: str
    arguments: tuple[str, ...]
    id: str


@dataclass(frozen=True)
class Cluster:
    """Where jobs run.

    Attributes:
        address: of the job server, e.g. ``http://127.0.0.1:8265``.
        working_dir: folder with this project that Ray copies to a job; None where the cluster has it installed.
        python: the cluster's Python.
        gpus: that Ray reserves for a job.
    """

    address: str
    working_dir: str | None
    python: str
    gpus: float


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the folder's lock; yields its file descriptor. A process that inherits it holds the lock as well.

    Raises:
        InputError: field ``output_dir``, if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            mend = "is being worked on by another process; wait for it, or give another folder"
            raise InputError("output_dir", str(folder), mend) from error
        yield file.fileno()


def begin(step: Step, folder: Path) -> None:
    """Note in the folder which step writes there: it may go on from a checkpoint of its own, and from no other.

    Raises:
        InputError: field ``output_dir``, if another step, or something else, has written there.
    """
    mark = folder / MARK
    before = mark.read_text() if mark.is_file() else None
    if before != step.id and folder.is_dir() and any(file != mark for file in folder.iterdir()):
        mend = "holds what other keys, or something else, began; remove it, or give another output_dir"
        raise InputError("output_dir", str(folder), mend)
    folder.mkdir(exist_ok=True)
    mark.write_text(step.id)


def run_here(step: Step, lock: int) -> None:
    """Run the command as a process that holds the lock too: if we die, nobody begins beside it.

    SIGTERM is passed on, and its end waited for: PPO writes a checkpoint first.

    Raises:
        SystemExit: with the command's exit code, if it is not 0 (of a signal's, 128 and its number); the command has
            said why.
    """
    code = _run([sys.executable, "-m", "cli", step.stage, *step.arguments], lock)
    if code:
        code = code if code > 0 else 128 - code
        print(f"{step.stage} ended with exit code {code}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(code)


def _run(command: list[str], lock: int) -> int:
    """The command's return code, not 0 once SIGTERM came; in the main thread, where signals arrive."""
    process: subprocess.Popen | None = None
    asked = False

    def pass_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process = subprocess.Popen(command, pass_fds=[lock])
        if asked:  # it came while the process was being started
            process.terminate()
        code = process.wait()
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code or (-signal.SIGTERM if asked else 0)


def job_of(step: Step, cluster: Cluster) -> dict[str, Any]:
    """What is submitted: arguments of ``JobSubmissionClient.submit_job``."""
    words = [cluster.python, "-m", "cli", step.stage, *step.arguments]
    shipped = {} if cluster.working_dir is None else {"working_dir": cluster.working_dir, "excludes": NOT_SHIPPED}
    return {
        "entrypoint": shlex.join(words),
        "submission_id": job_id(step),
        "runtime_env": shipped,
        "entrypoint_num_gpus": cluster.gpus,
    }


def job_id(step: Step) -> str:
    """The same step has the same id, so that Ray itself refuses to run it twice."""
    return f"{step.stage}-{step.id}"


def run_as_job(step: Step, cluster: Cluster, poll_s: float = 1.0) -> None:
    """Submit the command, or join the job of an earlier run, and wait for its end; a failed one is submitted anew.

    Raises:
        InputError: field ``ray_address``, if no job server answers.
        SystemExit: if the job fails.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient  # only here: without a cluster no Ray is needed

    try:
        client = JobSubmissionClient(cluster.address)
    except (ConnectionError, RuntimeError) as error:
        raise InputError("ray_address", cluster.address, "no job server answers; is the cluster up?") from error
    name = job_id(step)
    known = {job.submission_id: job.status for job in client.list_jobs()}
    if name in known and known[name] in (JobStatus.FAILED, JobStatus.STOPPED):
        client.delete_job(name)
        del known[name]
    if name not in known:
        client.submit_job(**job_of(step, cluster))
    print(f"{step.stage}: Ray job {name}", flush=True)
    while not (status := client.get_job_status(name)).is_terminal():
        time.sleep(poll_s)
    if status != JobStatus.SUCCEEDED:
        print(client.get_job_logs(name)[-LOG_CHARS:], file=sys.stderr)
        print(f"Ray job {name}: {status}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(1)
