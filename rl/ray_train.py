"""Workers of Ray Train: the same training in several processes, started again together when one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from deliberation.types import InputError
from rl.checkpoints import AUTO, check_new

FOLDER = "ray_train"
"""Where Ray Train keeps its own notes, inside the run's folder."""


def check_resume(config: Any) -> None:
    """Refuse what would make a group that starts again take a checkpoint of another run.

    Raises:
        InputError: unless the run goes on from the last checkpoint in ``output_dir``, or there is none.
    """
    if not config.output_dir:
        raise InputError("output_dir", config.output_dir, "give a folder that every node of the cluster sees")
    if config.resume_from_checkpoint not in (None, AUTO):
        mend = f"must be {AUTO} with train_workers: a group that starts again goes on from the last checkpoint"
        raise InputError("resume_from_checkpoint", config.resume_from_checkpoint, mend)
    if config.resume_from_checkpoint is None:
        check_new(config.output_dir)


def train_in_workers(train: Callable[[dict[str, Any]], None], config: Any) -> None:
    """Run ``train`` in ``config.train_workers`` workers of the Ray this process is connected to; wait for its end.

    A worker that is lost, or raises, ends its group; a new group goes on from the last whole checkpoint.

    Args:
        train: gets the keys of the config each worker is to build for itself: without ``train_workers``, resuming.
        config: the keys ``train_workers``, ``train_worker_cpus``, ``train_worker_gpus``, ``max_failures``.

    Raises:
        InputError: as ``train`` raises it, once ``max_failures`` is used up.
        ray.train.TrainingFailedError: for every other error.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in the config are relative to this folder, not to a new one
    keys = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    trainer = TorchTrainer(
        train,
        train_loop_config={**keys, "train_workers": 0, "resume_from_checkpoint": AUTO},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train_workers,
            use_gpu=config.train_worker_gpus > 0,
            resources_per_worker={"CPU": config.train_worker_cpus, "GPU": config.train_worker_gpus},
        ),
        run_config=ray.train.RunConfig(
            name=FOLDER,
            storage_path=str(Path(config.output_dir).expanduser().resolve()),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise cause(error) from error


def cause(error: ray.train.WorkerGroupError) -> Exception:
    """The bad input that ended a worker, if that is what did; else the error itself."""
    raised = (getattr(failure, "_base_exc", None) for failure in error.worker_failures.values())
    return next((one for one in raised if isinstance(one, InputError)), error)
