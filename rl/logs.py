"""Files a training run always leaves: one JSON line a log event, and (on request) tables of completions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

LOG_FILE = "log.jsonl"


class JsonlLog(TrainerCallback):
    """Appends every log event to ``output_dir/log.jsonl``.

    A resumed run first drops what lies beyond its checkpoint; a new one all that an earlier trainer left, but not what
    its own evaluated before it trained. Keys are those of the trackers: ``eval/reward`` for the trainer's
    ``eval_reward``; always a ``step``.
    """

    def __init__(self) -> None:
        self._first: int | None = None  # lines of the file before this trainer's own, None while it has none

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_log(path) if path.is_file() else []
            if state.global_step == 0:
                lines = [] if self._first is None else lines[self._first :]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self._first = None  # what it trains after this is a run of its own

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs is not None:
            line: dict[str, Any] = {"step": state.global_step}
            for name, value in logs.items():
                key = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else name
                # JSON has no NaN or infinity
                line[key] = None if isinstance(value, float) and not math.isfinite(value) else value
            path = Path(args.output_dir) / LOG_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._first is None:
                self._first = len(read_log(path)) if path.is_file() else 0
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; a last line torn by a kill is left out."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_completions(output_dir: str, step: int, table: list[dict[str, Any]]) -> None:
    """``output_dir/completions/step-NNNNN.jsonl``, one completion a line."""
    folder = Path(output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    (folder / f"step-{step:05d}.jsonl").write_text(text)


class PromptStream(Sampler[int]):
    """Indices of ``total`` prompts: one seeded permutation of the data set after the other, without a break.

    Position k is the same whatever ``total`` is, so that a run can be resumed, and prolonged; every update is full.
    """

    def __init__(self, size: int, total: int, seed: int):
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self):
        for start in range(0, self.total, self.size):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start // self.size)
            order = torch.randperm(self.size, generator=generator).tolist()
            yield from order[: self.total - start]
