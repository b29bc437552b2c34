"""A preference model as a Ray actor, and the Ray it may run on."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
import torch
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without types

from deliberation.types import InputError
from reward.dispatch import Failure, Group
from reward.preference import PreferenceModel
from reward.prefix_cache import PrefixCache
from reward.scoring import Scores, score

OBJECT_STORE_BYTES = 200_000_000
REMOVE_WITHIN_S = 10.0

logger = logging.getLogger(__name__)


class RewardActor:
    """Hosts one preference model; ``reward.pool`` makes it a Ray actor."""

    def __init__(self, path: str, threads: int = 1, device: str = "cpu"):
        torch.set_num_threads(threads)  # OpenMP threads that share cores with the trainer's spin and slow both down
        self._preference_model, self._cache = PreferenceModel.load(path, device), PrefixCache()

    def score_batch(self, groups: Sequence[Group]) -> list[Scores | InputError | Failure]:
        """One answer a group, so that one caller's bad input is not another's."""
        return [self._answer(group) for group in groups]

    def pid(self) -> int:
        """The actor's process; also tells that the model is loaded."""
        return os.getpid()

    def _answer(self, group: Group) -> Scores | InputError | Failure:
        try:
            return score(self._preference_model, *group, cache=self._cache)
        except InputError as error:
            return error
        except Exception as error:  # as text: not every exception survives pickling
            logger.exception("scoring failed")
            return Failure(f"{type(error).__name__}: {error}")


@contextmanager
def local_ray() -> Iterator[None]:
    """The Ray this process is connected to, or a local one with its own temporary folder for the time being."""
    if ray.is_initialized():
        yield
        return
    # Even a local Ray listens on every interface, and whoever reaches it runs code: ask for a token, one that lives
    # in this process's environment alone. Left to itself Ray 2.60 would write one to the home folder. It stays set
    # for the life of the process, since Ray reads it once. A mode the user has set is respected.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        Config.initialize("")  # this process read its settings when ray was imported; Ray refreshes them so too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = tempfile.mkdtemp(prefix="consensus-")  # short: Ray's socket names below it may have 107 characters
    try:
        with _own_group():
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                _temp_dir=folder,
            )
        yield
    finally:
        ray.shutdown()
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove Ray's folder, again while its log writers still make files there."""
    deadline = time.monotonic() + REMOVE_WITHIN_S
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        if time.monotonic() > deadline:
            logger.warning("%s of Ray's could not be removed", folder)
            return
        time.sleep(0.1)


@contextmanager
def _own_group() -> Iterator[None]:
    """Processes started within are a group of their own, and end with this process all the same.

    A signal to our whole group, as ``timeout`` sends it, would end Ray at once, and nothing could be stopped in order.
    """
    if sys.platform != "linux" or os.getpid() == os.getsid(0):  # the leader of a session cannot change its group
        yield
        return
    ours, anchor = os.getpgrp(), subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0)
    try:
        os.setpgid(0, anchor.pid)
        yield
    finally:
        os.setpgid(0, ours)
        anchor.communicate()
