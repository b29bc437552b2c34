"""Settings of :class:`rl.trainer.PPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from deliberation.types import InputError
from rl.gathering import load_whole, shares_weights
from rl.processes import check_processes, check_sharding


@dataclass
class PPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and the settings of PPO.

    One Trainer step (``max_steps``, ``logging_steps``, ``eval_steps``, ``save_steps``, the learning-rate schedule) is
    one UPDATE: sample, score, then ``num_ppo_epochs * num_mini_batches`` optimiser steps. Sources of the defaults:
    ``docs`` of the project, "The N implementation details of RLHF with PPO" (2024), TRL.

    There is no top_p, top_k, minimum length or suppressed token: rollouts are pure samples of the policy, or the
    log-probabilities would be those of another distribution.
    """

    # -- defaults of TrainingArguments that differ --------------------------------------------------------------
    learning_rate: float = 1e-6
    """Peak learning rate of the policy. 1e-6 for a full model of billions of parameters; 2e-4 for the embedded one."""

    per_device_train_batch_size: int = 16
    """Completions in one forward and backward pass (a micro-batch, after sorting by length). Changes memory and speed,
    not the result; a multiple of ``num_generations`` keeps a prompt's completions in one row."""

    share_prefix: bool = True
    """Completions of one prompt share one row, and its computation, in every pass (gradient through it). Exact for full
    attention, without which no policy is taken. Off, with a warning, where the attention kernel takes no mask
    (flash-attention)."""

    logging_steps: float = 1
    """Log every so many updates."""

    lr_scheduler_type: str = "constant"
    """An update's size should not depend on how many updates are planned: KL or the held-out reward ends the run."""

    adam_epsilon: float = 1e-5
    """As in the N+ details (their detail 5), not AdamW's 1e-8."""

    remove_unused_columns: bool | None = False
    """Must stay False: the other columns go to the reward functions."""

    metric_for_best_model: str | None = "eval_reward"
    """Predicted held-out reward chooses the best checkpoint (``load_best_model_at_end``); ``eval_objective`` is the
    reward less ``beta * KL``."""

    # -- rollout ------------------------------------------------------------------------------------------------
    num_prompts: int = 16
    """Prompts an update, over all processes. >= 1."""

    num_generations: int = 4
    """Completions a prompt (TRL's name). >= 1. ``num_prompts * num_generations`` is the batch of an update."""

    max_completion_length: int = 64
    """Longest completion, in tokens; longer ones are cut and pay ``missing_eos_penalty``. >= 1."""

    temperature: float = 1.0
    """Divides the logits of policy and reference, in sampling and in training alike. > 0."""

    stop_at_line_break: bool = True
    """A completion ends at the first line break after text, too (statements are one line)."""

    rollout_batch_size: int = 64
    """Completions sampled at once, whole prompts. Where an update has more, the reward functions get each batch as soon
    as it is there, and score it in a thread of their own while the next is sampled. Changes speed only (and rounding),
    as long as a completion's reward does not depend on the others of the call."""

    # -- reward -------------------------------------------------------------------------------------------------
    reward_weights: list[float] | None = None
    """One factor a reward function. None: all 1."""

    reward_clip: float | None = 10.0
    """Scores are clipped to [-clip, clip] before the penalty; logged as ``reward/clipped_ratio``. None: not at all."""

    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion without a stop token. >= 0, in units of the reward."""

    length_penalty: float = 0.0
    """Taken off the score for every token of a completion. >= 0, in units of the reward a token. 0: length is free."""

    whiten_rewards: bool = False
    """Token rewards (KL included) of an update to variance 1, their mean kept, over all processes: for rewards whose
    scale is unknown or drifts. The value model then learns returns on that scale. Off, as in TRL."""

    beta: float = 0.05
    """Coefficient of the per-token KL penalty (k1) inside the reward. >= 0. With ``kl_target`` where it starts."""

    kl_target: float | None = None
    """Adapt ``beta`` until the mean KL to the reference is this, in nats a completion. > 0; None: ``beta`` is fixed."""

    kl_horizon: int = 10_000
    """Completions in which an adapted ``beta`` may change by about a fifth (Ziegler et al. 2019). At least those of an
    update. ``eval_objective`` keeps the first ``beta``, so that evaluations can be compared."""

    best_of_n: int = 1
    """Train for the best of so many samples, which is how a reranked policy is served: a completion's score becomes
    what it adds to the best of n - 1 others of its prompt. 1: the mean of the samples (plain PPO). Unbiased up to
    ``num_generations``; above, the others stand for more than they are. Sample several times n: with
    ``num_generations`` of n, only the best completion of a prompt earns anything. >= 1."""

    entropy_coef: float = 0.0
    """Adds ``-entropy_coef`` times its log-probability to a token's reward, which rewards entropy: samples that differ
    are what best-of-N lives on. >= 0, in units of the reward a nat. 0: off."""

    # -- PPO ----------------------------------------------------------------------------------------------------
    num_ppo_epochs: int = 2
    """Passes over an update's completions. >= 1."""

    num_mini_batches: int = 2
    """Optimiser steps a pass; must divide ``num_prompts * num_generations / processes``."""

    gamma: float = 1.0
    """Discount a token, in (0, 1]."""

    lam: float = 0.95
    """Lambda of generalised advantage estimation, in [0, 1]."""

    cliprange: float = 0.2
    """The policy ratio's clip, around 1. > 0."""

    cliprange_value: float = 0.2
    """How far a value may move from the old one in the value loss, in units of the reward. > 0."""

    vf_coef: float = 0.1
    """Weight of the value loss. >= 0 (N+ details: 0.1)."""

    leave_one_out_baseline: bool = False
    """Take the mean score of a prompt's other completions off each score before the advantages, so that the value
    model need not learn how hard a prompt is. Needs ``num_generations`` of 2 or more. Metrics show the raw scores."""

    whiten_advantages: bool = True
    """Advantages of all action tokens of an update to mean 0, variance 1, over all processes."""

    value_learning_rate: float | None = None
    """Learning rate of the value head, or value model. None: 5 times ``learning_rate``."""

    init_value_to_reward: bool = True
    """Before the first update, shift the value head's bias so that the mean value is the batch's mean score."""

    value_warmup_updates: int = 0
    """Updates at the start in which only the value head, or value model, learns: the policy does not move."""

    target_kl: float | None = None
    """End an update's optimiser steps once the approximate KL between its old and new policy (nats a token) is above
    this. None: never."""

    max_kl: float | None = None
    """End the TRAINING once the mean KL to the reference (nats a completion) of fresh samples is above this."""

    # -- evaluation and tables ----------------------------------------------------------------------------------
    num_generations_eval: int = 1
    """Completions a prompt in evaluation. Their seeds are the same at every evaluation."""

    log_completions: bool = False
    """Write the table of completions of every logged update to ``completions/step-N.jsonl``. Callbacks that have a
    method ``on_completions(args, state, control, table=...)`` get it for every update in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_processes(self)
        check_sharding(self)
        if shares_weights(self):
            load_whole()
        self.check_ppo_keys(self.world_size)

    def check_ppo_keys(self, processes: int) -> None:
        """Refuse what PPO cannot train with on so many processes.

        Raises:
            InputError: naming the key.
        """
        for name in (
            "num_prompts",
            "num_generations",
            "max_completion_length",
            "num_ppo_epochs",
            "num_mini_batches",
            "rollout_batch_size",
            "num_generations_eval",
            "kl_horizon",
            "best_of_n",
        ):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1")
        for name in ("temperature", "cliprange", "cliprange_value", "gamma"):
            if not getattr(self, name) > 0:
                raise InputError(name, getattr(self, name), "must be above 0")
        for name in (
            "beta",
            "missing_eos_penalty",
            "length_penalty",
            "entropy_coef",
            "vf_coef",
            "value_warmup_updates",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(name, getattr(self, name), "must not be negative")
        if self.max_grad_norm is None:
            raise InputError("max_grad_norm", None, "must be a number; 0 clips nothing")
        if not (self.gamma <= 1 and 0 <= self.lam <= 1):
            raise InputError("gamma, lam", (self.gamma, self.lam), "must be at most 1")
        if self.kl_target is not None and not (self.kl_target > 0 and self.beta > 0):
            raise InputError("kl_target, beta", (self.kl_target, self.beta), "must both be above 0")
        if (self.leave_one_out_baseline or self.best_of_n > 1) and self.num_generations < 2:
            mend = "leave_one_out_baseline and best_of_n above 1 need at least 2"
            raise InputError("num_generations", self.num_generations, mend)
        if self.leave_one_out_baseline and self.best_of_n > 1:
            raise InputError(
                "leave_one_out_baseline", True, "must be false: best_of_n above 1 has a baseline of its own"
            )
        rows, parts = self.num_prompts * self.num_generations, self.num_mini_batches * processes
        if self.num_prompts % processes or rows % parts:
            raise InputError(
                "num_mini_batches",
                self.num_mini_batches,
                f"{rows} completions an update do not divide "
                f"by {self.num_mini_batches} mini-batches on {processes} processes",
            )
        if self.kl_target is not None and self.kl_horizon < rows:  # beyond, one update could turn beta negative
            raise InputError("kl_horizon", self.kl_horizon, f"must be at least the {rows} completions of an update")
        if self.gradient_accumulation_steps != 1:
            raise InputError(
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                "must be 1; an update is cut into micro-batches of per_device_train_batch_size",
            )
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns", True, "must be false: reward functions read the other columns")
        for name, mend in (
            ("save_only_model", "a run could not go on from such a checkpoint"),
            ("push_to_hub", "checkpoints are written under another name first; call trainer.push_to_hub() at the end"),
        ):
            if getattr(self, name):
                raise InputError(name, True, f"must be false: {mend}")
        if self.enable_jit_checkpoint:  # it would save in the middle of an update
            raise InputError("enable_jit_checkpoint", True, "must be false: SIGTERM is heeded at the end of an update")
        if self.fp16:
            raise InputError("fp16", True, "is not supported; use bf16 or neither")

    @property
    def value_lr(self) -> float:
        """Learning rate of the value head or value model."""
        return 5 * self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    @property
    def rows_per_update(self) -> int:
        """Completions an update, over all processes."""
        return self.num_prompts * self.num_generations
