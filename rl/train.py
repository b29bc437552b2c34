"""PPO of a policy against a group's welfare: wires the group reward into ``PPOTrainer``.

The same function as a plain process, under ``accelerate launch``, or as a Ray job::

    consensus ppo --config configs/embedded/ppo.yaml
    ray job submit --working-dir . --entrypoint-num-gpus 1 -- consensus ppo --config configs/qwen3-0.6b/ppo.yaml
        --model_name_or_path /fsx/consensus/sft --preference_model /fsx/consensus/preference
        --deliberations /fsx/consensus/deliberations.jsonl --eval_deliberations /fsx/consensus/eval_deliberations.jsonl
        --output_dir /fsx/consensus/ppo --reward_actors 1 --reward_actor_gpus 1

(one line; a job runs in a temporary copy of the working directory, so its paths are absolute, on shared storage.)

``resume_from_checkpoint: auto`` goes on from the last whole checkpoint in ``output_dir``, if there is one. On SIGTERM
the update at hand is finished, a checkpoint written, and the exit code is 75.

With ``reward_actors: 0`` the preference model runs in the training process; with more, in that many Ray actors (for
every training process), on the cluster the job runs on or on a local one started for the run.

With ``train_workers`` Ray Train runs the same function in that many processes (``rl.ray_train``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import ModelConfig, get_peft_config

from deliberation.datasets import read_table
from deliberation.types import InputError
from embedded import resolve
from reward.bi_encoder import BiEncoder
from reward.group_reward import LocalScorer, Scorer, make_group_reward
from reward.preference import PreferenceModel, check_ensemble, check_folder, without_weights
from reward.welfare import check_uncertainty_penalty, parse_welfare
from rl.checkpoints import AUTO, PREEMPTED
from rl.data import ppo_prompts
from rl.logs import LOG_FILE
from rl.policy import check_model_keys, check_policy, load_from_keys
from rl.ppo_config import PPOConfig
from rl.rewards import RewardFunction
from rl.trainer import PPOTrainer

COLUMNS = ("question", "opinions")
REFERENCE_FOLDER = "reference"

logger = logging.getLogger(__name__)


@dataclass
class PPOScriptConfig(PPOConfig, ModelConfig):
    """Keys of ``PPOConfig`` and of ``trl.ModelConfig`` (model, attention, LoRA), and those that wire them up."""

    deliberations: str | None = None
    """Training data: a JSONL or Parquet file with the columns question, opinions (and optional weights, clusters)."""

    eval_deliberations: str | None = None
    """The same, of held-out topics; needed for an ``eval_strategy``."""

    preference_model: str | None = None
    """Folder of the preference model that scores statements for every member."""

    welfare: str = "nash"
    """How members' utilities become one reward: utilitarian, nash, rawlsian, an inequality aversion >= 0, p10, trimmed
    or worst_cluster (which needs the column clusters)."""

    uncertainty_penalty: float = 0.0
    """Lambda >= 0: utilities enter welfare as mean - lambda * standard deviation, not below 1. Needs a preference model
    with an ensemble."""

    reward_actors: int = 0
    """Ray actors that host the preference model; 0 keeps it in the training process."""

    reward_actor_cpus: float = 1.0
    """CPUs Ray reserves for a reward actor, which uses as many torch threads (at least one)."""

    reward_actor_gpus: float = 0.0
    """GPUs (or a share of one) Ray reserves for a reward actor."""

    train_workers: int = 0
    """Training processes that Ray Train starts, and starts again from the last checkpoint when one is lost; 0 trains in
    this process (or in those of ``accelerate launch``)."""

    train_worker_cpus: float = 1.0
    """CPUs Ray reserves for a training process."""

    train_worker_gpus: float = 0.0
    """GPUs Ray reserves for a training process: 1, or 0 to train on CPUs."""

    max_failures: int = 3
    """How often Ray Train starts its workers again, after an error too; -1: without end."""

    separate_value_model: bool = False
    """Start a value model of its own from the preference model, instead of a value head on the policy's backbone. Needs
    a preference model with the policy's tokenizer."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        if self.train_workers > 0:  # the rest is for the workers: this process may have no GPU, and trains nothing
            self.check_ppo_keys(self.train_workers)
        else:
            super().__post_init__()
        check_model_keys(self, also_resumes=(AUTO,))
        parse_welfare(self.welfare)
        check_uncertainty_penalty(self.uncertainty_penalty)
        for key in ("reward_actors", "train_workers"):
            if getattr(self, key) < 0:
                raise InputError(key, getattr(self, key), "must be 0 or more")


@contextmanager
def hosted_scorer(config: PPOScriptConfig) -> Iterator[Scorer]:
    """The preference model in this process, or behind Ray actors that end with the block.

    Raises:
        InputError: field ``preference_model``.
    """
    path = _preference_path(config)
    if config.reward_actors == 0:
        yield LocalScorer(PreferenceModel.load(path, config.device))
        return
    from reward.pool import RewardPool  # only where actors are asked for: training without Ray needs no Ray

    cpus, gpus = config.reward_actor_cpus, config.reward_actor_gpus
    with _cluster():
        with RewardPool(
            path, actors=config.reward_actors, num_cpus=cpus, num_gpus=gpus, threads=max(1, int(cpus))
        ) as pool:
            yield pool


@contextmanager
def _cluster() -> Iterator[None]:
    """The Ray this process is connected to, the cluster a Ray job runs on (RAY_ADDRESS), or a local one of its own."""
    import ray

    from reward.actor import local_ray

    if ray.is_initialized() or "RAY_ADDRESS" not in os.environ:
        with local_ray():
            yield
        return
    ray.init(log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _preference_path(config: PPOScriptConfig) -> str:
    if not config.preference_model:
        raise InputError("preference_model", config.preference_model, "give the folder of a preference model")
    return resolve(config.preference_model)


def value_model_from(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A trainable copy of the preference model's network, to predict the policy's reward token by token.

    Raises:
        InputError: if it does not read the policy's token ids.
    """
    if AutoTokenizer.from_pretrained(path).get_vocab() != tokenizer.get_vocab():
        mend = "has another tokenizer than the policy; set separate_value_model to false"
        raise InputError("separate_value_model", path, mend)
    return AutoModelForSequenceClassification.from_pretrained(path, dtype="float32", use_safetensors=True)


def _merged(model: Any, tokenizer: PreTrainedTokenizerBase, config: PPOScriptConfig) -> PreTrainedModel:
    """A policy that is an adapter, merged into its base, so that PPO's reference is that policy and not the base.

    With ``use_peft`` the merged model is kept in ``output_dir/reference``: PPO's own adapter belongs on top of it.
    """
    if not isinstance(model, PeftModel):
        return model
    merged = model.merge_and_unload().requires_grad_(True)  # PEFT had frozen it
    if config.use_peft:
        folder = Path(config.output_dir) / REFERENCE_FOLDER
        if config.should_save:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        merged.name_or_path = merged.config._name_or_path = str(folder)
        logger.info("the policy is an adapter; merged into its base and kept in %s", folder)
    return merged


def train_ppo(
    config: PPOScriptConfig,
    rows: Sequence[dict[str, Any]] | None = None,
    eval_rows: Sequence[dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    observers: Sequence[RewardFunction] = (),
) -> PPOTrainer:
    """Optimise the policy for the group's welfare and save it to ``config.output_dir``.

    Args:
        rows: question, opinions (optional weights, clusters) of every deliberation; None reads
            ``config.deliberations``.
        eval_rows: the same, held out; None reads ``config.eval_deliberations`` if it is set.
        callbacks: Trainer callbacks.
        observers: reward functions that return None for every completion: they see and log, and reward nothing.

    Returns:
        The trainer after training; its reward actors have ended. If it was told to leave (``preemption.agreed``), its
        last checkpoint is in ``output_dir``, and nothing else.

    Raises:
        InputError: on data, models or keys that do not fit; nothing has been written then.
    """
    if config.train_workers:
        raise InputError("train_workers", config.train_workers, "is for the command `consensus ppo`; must be 0 here")
    # 1. Data and models; what can be wrong is found before anything is written (and not by an actor that dies).
    train, held_out = _checked_prompts(config, rows, eval_rows)
    model, tokenizer = load_from_keys(config)
    value_model = value_model_from(_preference_path(config), tokenizer) if config.separate_value_model else None
    # 2. Train against the welfare of each group.
    with hosted_scorer(config) as scorer:
        trainer = PPOTrainer(
            model=_merged(model, tokenizer, config),
            reward_funcs=[make_group_reward(scorer, config.welfare, config.uncertainty_penalty), *observers],
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(config),
            value_model=value_model,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    # 3. Save, unless it will go on later.
    if not trainer.preemption.agreed:
        trainer.save_model()
        trainer.save_state()
    return trainer


def _checked_prompts(
    config: PPOScriptConfig, rows: Sequence[dict[str, Any]] | None, eval_rows: Sequence[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Training and held-out prompts, if they and the preference model's folder can be trained with."""
    train = ppo_prompts(_table("deliberations", config.deliberations) if rows is None else rows)
    if eval_rows is None and config.eval_deliberations:
        eval_rows = _table("eval_deliberations", config.eval_deliberations)
    held_out = None if eval_rows is None else ppo_prompts(eval_rows, "eval_deliberations")
    for source, prompts in (("deliberations", train), ("eval_deliberations", held_out)):
        if prompts and parse_welfare(config.welfare) == "worst_cluster" and "clusters" not in prompts[0]:
            raise InputError(f"{source}: clusters", None, "worst_cluster needs them: give one label a member")
    check_folder(_preference_path(config))
    judge = without_weights(_preference_path(config))
    for source, prompts in (("deliberations", train), ("eval_deliberations", held_out)):
        _check_room(judge, prompts or [], config.max_completion_length, source)
    if config.uncertainty_penalty:
        check_ensemble(_preference_path(config))
    return train, held_out


def _check_room(judge: PreferenceModel, prompts: Sequence[dict[str, Any]], longest: int, source: str) -> None:
    """Refuse opinions beside which the preference model could not read a completion of ``longest`` tokens.

    Its tokens are counted as the preference model's; a completion that takes more of them is not scored.

    Raises:
        InputError: naming ``source``, the row and the opinion.
    """
    room = judge.room - longest - len(judge.suffix_ids(""))
    for i, row in enumerate(prompts):
        for k, opinion in enumerate(row["opinions"]):
            tokens = len(judge.prefix_ids(row["question"], opinion))
            if tokens > room:
                mend = f"with the question; the preference model reads {judge.room} in all: shorten it, or lower "
                mend += f"max_completion_length ({longest})"
                raise InputError(f"{source} row {i}: opinions[{k}]", f"{tokens} tokens", mend)
            if judge.bi_encoder is not None:
                _check_lines(judge.bi_encoder, opinion, f"{source} row {i}: opinions[{k}]")


def _check_lines(beside: BiEncoder, opinion: str, field: str) -> None:
    """Refuse an opinion that the bi-encoder could not read.

    Raises:
        InputError: field ``field``.
    """
    try:
        beside.check_lengths([opinion])
    except InputError as error:
        raise InputError(field, error.value, error.mend) from error


def _table(key: str, path: str | None) -> list[dict[str, Any]]:
    if not path:
        raise InputError(key, path, "give a JSONL or Parquet file with question, opinions")
    return read_table(path, COLUMNS)


def _train_in_worker(keys: dict[str, Any]) -> None:
    """What a worker of Ray Train runs."""
    train_ppo(PPOScriptConfig(**keys))


def _train_in_workers(config: PPOScriptConfig) -> None:
    from rl.ray_train import check_resume, train_in_workers

    check_resume(config)
    check_policy(config.model_name_or_path)
    _checked_prompts(config, None, None)
    print(f"Training in {config.train_workers} Ray workers; {config.output_dir}/{LOG_FILE} has a line an update")
    with _cluster():
        train_in_workers(_train_in_worker, config)
    print(f"Policy optimised for {config.welfare} welfare: {config.output_dir}")


def main(config: PPOScriptConfig) -> None:
    """``consensus ppo``: train with the data and models named in the config, save."""
    if config.train_workers:
        _train_in_workers(config)
        return
    trainer = train_ppo(config)
    trainer.accelerator.end_training()  # threads of a process group that is left to the interpreter may abort it
    updates = trainer.state.global_step
    if trainer.preemption.agreed:
        logger.warning("left after %d updates; the same command with --resume_from_checkpoint auto goes on", updates)
        raise SystemExit(PREEMPTED)
    if config.process_index == 0:
        print(f"Policy optimised for {config.welfare} welfare in {updates} updates: {config.output_dir}")
