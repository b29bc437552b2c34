"""Checkpoints that are whole or not there, and leaving in order when the machine is taken away.

A checkpoint is written to a folder of another name, sealed with a list of its files, and renamed: a process killed at
any moment leaves the checkpoints before it as they were. What was torn afterwards (a copy that broke off) is told by
the list.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from deliberation.types import InputError

MANIFEST = "checkpoint.json"
"""Every file of a checkpoint and its size in bytes; written last."""

PART_FOLDER = "checkpoint.part"
"""Where a checkpoint grows, inside the run's folder."""

AUTO = "auto"
"""``resume_from_checkpoint``: from the last whole checkpoint, or from the start where there is none yet."""

PREEMPTED = 75
"""Exit code of a run that was told to leave and can be resumed (``EX_TEMPFAIL`` of sysexits.h: try again)."""

logger = logging.getLogger(__name__)


def publish(part: Path, final: Path) -> None:
    """Seal the finished checkpoint ``part`` and rename it to ``final``, in place of an older one of that name."""
    files = {str(file.relative_to(part)): file.stat().st_size for file in sorted(part.rglob("*")) if file.is_file()}
    with (part / MANIFEST).open("w") as out:
        json.dump(files, out)
        out.flush()
        os.fsync(out.fileno())
    if final.exists():  # of a run resumed from further back
        final.rename(part.with_name(f"{final.name}.old"))
    part.rename(final)
    shutil.rmtree(part.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there in its size."""
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}: it was not finished"
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is cut short"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes of {size}"
    return None


def last_whole(output_dir: str | Path) -> str | None:
    """The run's last checkpoint that is whole, None if there is none; warns of each later one that is torn."""
    for folder in reversed(sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []):
        wrong = damage(Path(folder))
        if wrong is None:
            return folder
        logger.warning("%s %s; taking the one before", folder, wrong)
    return None


def last_good(output_dir: str | Path) -> str:
    """Words that name the last whole checkpoint, for the error that ends a run."""
    found = last_whole(output_dir)
    return f"go on from {found}" if found else f"no checkpoint was written in {output_dir} yet"


def to_resume(wanted: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to go on from.

    Args:
        wanted: a checkpoint's folder; True: the last whole one; ``AUTO``: the same, or None if there is none yet (a job
            that is tried again has the command it had); None or False: none.

    Raises:
        InputError: field ``resume_from_checkpoint``, if it is torn or not there; field ``output_dir``, if a new run
            would start among the checkpoints of another, one of which ``AUTO`` would take for its own.
    """
    if wanted is None or wanted is False:
        check_new(output_dir)
        return None
    if wanted is True or wanted == AUTO:
        found = last_whole(output_dir)
        if found is None and wanted is True:
            raise InputError("resume_from_checkpoint", output_dir, "holds no whole checkpoint; start anew, or give one")
        return found
    wrong = damage(Path(wanted))
    if wrong is not None:
        raise InputError("resume_from_checkpoint", wanted, f"{wrong}; give a whole one")
    return str(wanted)


def check_new(output_dir: str | Path) -> None:
    """Refuse a folder with checkpoints.

    Raises:
        InputError: field ``output_dir``.
    """
    folder = Path(output_dir).expanduser()
    if folder.is_dir() and sort_checkpoints(str(folder)):
        mend = f"holds checkpoints: set resume_from_checkpoint to {AUTO} to go on from the last, or take another folder"
        raise InputError("output_dir", str(output_dir), mend)


def set_aside_later(checkpoint: str | Path) -> None:
    """Rename the checkpoints beyond ``checkpoint`` in its folder: a run that goes on from there is another from there.

    ``checkpoint-9`` becomes ``aside-1-checkpoint-9``, or the next number that is free.
    """
    chosen = Path(checkpoint).resolve()
    step = _step(chosen)
    for folder in map(Path, sort_checkpoints(str(chosen.parent))):
        if _step(folder) > step:
            free = (folder.with_name(f"aside-{k}-{folder.name}") for k in itertools.count(1))
            target = next(path for path in free if not path.exists())
            logger.warning("going on from %s: %s is kept as %s", chosen, folder, target.name)
            folder.rename(target)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class Preemption(TrainerCallback):
    """Leaves on SIGTERM: the update at hand is finished, a checkpoint written, and the training stopped.

    Attributes:
        asked: this process was told to leave.
        agreed: some process was; set by the trainer at the end of an update, on all of them alike.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM inside the block; does nothing outside the main thread, where Python delivers no signals."""
        self.asked = self.agreed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True  # said at the end of the update: a signal handler may not write

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer's loop to log, save and stop; not to evaluate, for which there may be no time."""
        if self.agreed:
            logger.warning("told to leave (SIGTERM): writing a checkpoint after update %d", state.global_step)
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
