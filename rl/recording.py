"""What a PPO run leaves behind: metrics, the table of completions, checkpoints. The updates are in ``rl.trainer``."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from rl import metrics as numbers
from rl.checkpoints import PART_FOLDER, Preemption, publish, set_aside_later, to_resume
from rl.gathering import whole_weights
from rl.logs import write_completions
from rl.rewards import RewardFunctions
from rl.rollout import Rollout, merge
from rl.setup import load_policy_weights

STATE_FILE = "ppo_state.json"


class RecordingTrainer(Trainer):
    """The part of ``PPOTrainer`` that records: metrics, logs, checkpoints. Of the updates it knows nothing.

    Attributes:
        reward_functions: set by ``PPOTrainer``; their names head columns and metrics.
        num_tokens: tokens of all prompts and completions so far, over all ranks.
        beta: coefficient of the KL penalty, which ``kl_target`` adapts.
        preemption: whether the run was told to leave.
        completions_table: one dict a completion of the last update, of all ranks (``rl.metrics.completions_table``).
    """

    reward_functions: RewardFunctions

    def __init__(self, **kwargs: Any):
        self._metrics: dict[str, list[float]] = defaultdict(list)  # one value an update
        self._eval_metrics: dict[str, list[tuple[float, int]]] = defaultdict(list)  # (mean of a batch, its rows)
        self._eval_rows = 0  # rows of the evaluation batch at hand
        self._extra: dict[str, list] = {}
        self._part: Path | None = None  # where a checkpoint is being written
        self.preemption = Preemption()
        self._mode = "train"
        self.num_tokens = 0
        self.beta: float = kwargs["args"].beta
        self.completions_table: list[dict[str, Any]] = []
        kwargs["callbacks"] = [*kwargs["callbacks"], self.preemption]
        super().__init__(**kwargs)

    # ---- logging -------------------------------------------------------------------------------------------------

    def _log_metric(self, name: str, value: float) -> None:
        if self._mode == "eval":
            self._eval_metrics[name].append((float(value), self._eval_rows))
        else:
            self._metrics[name].append(float(value))

    @contextlib.contextmanager
    def _timed(self, name: str):
        start = time.perf_counter()
        yield
        self._log_metric(f"time/{name}", time.perf_counter() - start)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum") if self.args.world_size > 1 else x

    def _of_all_ranks(self, x: Any) -> list[Any]:
        """What every rank gives, in their order."""
        return gather_object([x]) if self.args.world_size > 1 else [x]

    def _record(self, rollout: Rollout, steps: list[dict[str, Tensor]], kl: float) -> None:
        """Append this update's numbers, make the table of completions, and warn about a negative KL."""
        args = self.args
        if args.world_size > 1:
            rollouts, extras = zip(*self._of_all_ranks((rollout.cpu(), self._extra)), strict=True)
            names = dict.fromkeys(name for one in extras for name in one)
            self._extra = {
                name: [v for one, part in zip(extras, rollouts, strict=True) for v in one.get(name, [None] * len(part))]
                for name in names
            }
            rollout = merge(list(rollouts))
        self.num_tokens += int(rollout.lengths.sum())
        self.num_tokens += sum(len(ids) for ids in rollout.prompt_ids[:: args.num_generations])
        found = {
            **numbers.reward_metrics(rollout, self.reward_functions.names, args.num_generations, args.reward_clip),
            **numbers.best_of_metrics(rollout, args.num_generations, args.best_of_n),
            **numbers.length_metrics(rollout),
            **numbers.sampling_metrics(rollout),
            **numbers.objective_metrics(rollout, self.beta),
            **numbers.update_metrics(steps),
            "update/optimizer_steps": float(len(steps)),
        }
        for name, value in found.items():
            self._metrics[name].append(value)
        if kl < -0.5:
            warnings.warn(
                f"mean KL to the reference is {kl:.2f} nats, far below 0: sampling and training disagree "
                "about the policy's distribution",
                stacklevel=2,
            )
        self.completions_table = numbers.completions_table(
            rollout, self.reward_functions.names, self._extra, self.state.global_step + 1
        )
        self._extra.clear()
        for callback in (c for c in self.callback_handler.callbacks if hasattr(c, "on_completions")):
            callback.on_completions(args, self.state, self.control, table=self.completions_table)

    def _record_evaluation(self, sums: Tensor, rows: int, prefix: str) -> dict[str, float]:
        """Log and return the means over ``rows`` completions, from the ``sums`` of ``rl.metrics.eval_sums``."""
        found = numbers.eval_metrics(sums.tolist(), rows, self.args.beta)
        ranks = self._of_all_ranks(dict(self._eval_metrics))
        logged = {name: [one for rank in ranks for one in rank.get(name, [])] for rank in ranks for name in rank}
        extra = {
            name: sum(value * weight for value, weight in batches) / sum(weight for _, weight in batches)
            for name, batches in logged.items()
            if not name.startswith("time/")
        }
        self._eval_metrics.clear()
        self._extra.clear()
        result = {f"{prefix}_{k}": v for k, v in {**extra, **found}.items()}
        self.log(result)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the updates since the last log to the Trainer's own training logs."""
        if "loss" in logs:
            ranks = self._of_all_ranks({name: sum(v) / len(v) for name, v in self._metrics.items()})
            means = {name: fmean(one[name] for one in ranks if name in one) for rank in ranks for name in rank}
            self._metrics.clear()
            logs = {
                **logs,
                **means,
                "num_tokens": self.num_tokens,
                "episode": self.state.global_step * self.args.rows_per_update,
            }
            if self.args.log_completions and self.is_world_process_zero():
                write_completions(self.args.output_dir, self.state.global_step, self.completions_table)
        super().log(logs, start_time)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """The Trainer's, from a checkpoint that is whole (``rl.checkpoints.to_resume``), and leaving on SIGTERM."""
        checkpoint = to_resume(resume_from_checkpoint, self.args.output_dir)
        self.accelerator.wait_for_everyone()  # all have looked
        own = checkpoint is not None and Path(checkpoint).parent.resolve() == Path(self.args.output_dir).resolve()
        if checkpoint is not None and own and self.is_world_process_zero():
            set_aside_later(checkpoint)
        self.accelerator.wait_for_everyone()
        with self.preemption.listening():
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; but a run that will go on keeps its last weights, and its last checkpoint beside the best."""
        kept = self.args.load_best_model_at_end, self.args.save_total_limit
        if self.preemption.agreed:
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = kept

    def _get_output_dir(self, trial: Any = None) -> str:
        return super()._get_output_dir(trial) if self._part is None else str(self._part)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """The Trainer's, written beside and renamed when it is whole; older ones are deleted after that."""
        run, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        part = run / PART_FOLDER
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._part = part
        super()._save_checkpoint(model, trial)
        self._part = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            self.state.save_to_json(str(part / name / TRAINER_STATE_NAME))
            publish(part / name, run / name)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as ``save_pretrained`` writes it, its tokenizer, and the value model in ``value_model/``.

        Whole, by the first process; every process must call it.
        """
        metrics = self._of_all_ranks(dict(self._metrics))  # of updates that are not logged yet
        with whole_weights(self.model_wrapped):
            if self.args.should_save:
                self._write(Path(output_dir if output_dir is not None else self.args.output_dir), metrics)

    def _write(self, folder: Path, metrics: list[dict[str, list[float]]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        self.model.save_value(folder)
        state = {"num_tokens": self.num_tokens, "beta": self.beta, "metrics": metrics}
        (folder / STATE_FILE).write_text(json.dumps(state))
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_policy_weights(self.model.policy, folder)
        self.model.load_value(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's, and the numbers of the run: DeepSpeed loads its weights without ``_load_from_checkpoint``."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            metrics = self._load_state(checkpoint)["metrics"]
            if len(metrics) == self.args.world_size:  # of other processes nothing can be said
                self._metrics = defaultdict(list, metrics[self.args.process_index])

    def _load_state(self, checkpoint: str) -> dict[str, Any]:
        state = json.loads((Path(checkpoint) / STATE_FILE).read_text())
        self.num_tokens, self.beta = state["num_tokens"], state["beta"]
        return state

    def _load_best_model(self) -> None:
        with whole_weights(self.model_wrapped, changes=True):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._load_state(self.state.best_model_checkpoint)
