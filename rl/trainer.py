"""PPOTrainer: PPO against plain reward functions, in the mould of TRL's maintained trainers.

One Trainer step is one update:

1. sample ``num_generations`` completions of ``num_prompts`` prompts (``rl.rollout``),
2. score them with the reward functions, as text (``rl.rewards``),
3. compute old and reference log-probabilities and values with the training code path (``rl.value``),
4. token rewards, advantages, whitening (``rl.ppo``),
5. ``num_ppo_epochs * num_mini_batches`` optimiser steps; the last one is left to the Trainer's own loop,
6. log (``rl.recording``).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, set_seed

from deliberation.dropout import disable_dropout
from deliberation.types import InputError
from rl import metrics as numbers
from rl import ppo
from rl.checkpoints import last_good
from rl.compiled import compile_layers, sampled_eagerly
from rl.gathering import add_to_parameter, load_whole, shares_weights, whole_weights
from rl.inputs import ModelInputs, collate, collate_shared, spread
from rl.logs import JsonlLog, PromptStream
from rl.ppo_config import PPOConfig
from rl.recording import RecordingTrainer
from rl.rewards import RewardFunction, RewardFunctions, Scores, background, merge_scores
from rl.rollout import Rollout, collect, merge, mini_batches, prompt_seeds
from rl.setup import can_share_prefix, check_dataset, check_precision, load, parameter_groups, reference_and_policy
from rl.value import (
    PolicyAndValue,
    TokenOutputs,
    backbone_of,
    check_logits,
    completion_logprobs,
    hidden_states,
)

__all__ = ["PPOConfig", "PPOTrainer"]

logger = logging.getLogger(__name__)

EVAL_SEED_OFFSET = 7_919  # evaluation draws from seeds of its own, the same at every evaluation


class PPOTrainer(RecordingTrainer):
    """Proximal policy optimisation of a causal language model against reward functions.

    Args:
        model: path or name (loaded by ``rl.policy.load_policy``), or a causal language model in fp32.
        reward_funcs: one or more ``f(prompts, completions, **columns) -> list[float | None]``, sync or async; also
            given are ``completion_ids``, ``trainer_state``, ``log_metric(name, value)``, ``log_extra(column, values)``.
        args: settings.
        train_dataset: rows with ``prompt`` (text or messages) and any further columns (``datasets.Dataset`` or a list
            of dicts).
        eval_dataset: the same, held out; gives ``eval_reward``, ``eval_kl``, ``eval_objective``.
        processing_class: the policy's tokenizer; None: loaded with the model.
        peft_config: wraps the policy; the reference is then the model with its adapters off. Otherwise the reference
            is a frozen copy.
        value_model: None for a head on the policy's backbone, or a one-label sequence classifier over the SAME
            tokenizer (for instance a preference model).
        callbacks: Trainer callbacks; one with ``on_completions`` gets the table of completions of every update.

    Raises:
        InputError: on settings, data or models it cannot train.
    """

    optimizer: Any
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        value_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        set_seed(args.seed)  # adapters start from random weights
        check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_dataset("eval_dataset", eval_dataset)
        model, processing_class = load(model, processing_class, args)
        check_logits(model)
        self.ref_model, policy = reference_and_policy(model, peft_config)
        self.reward_functions = RewardFunctions(reward_funcs, args.reward_weights)
        if args.max_steps <= 0:  # epochs are counted in prompts
            args.max_steps = max(1, math.ceil(args.num_train_epochs * len(train_dataset) / args.num_prompts))
        joint = PolicyAndValue(policy, value_model)
        self.share_prefix = can_share_prefix(args.share_prefix and args.num_generations > 1, model, value_model)
        for part in filter(None, (joint, self.ref_model)):
            disable_dropout(part)
        check_precision(joint)
        super().__init__(
            model=joint,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[JsonlLog(), *(callbacks or [])],
        )
        if shares_weights(args):
            load_whole()
            joint.most_tokens = args.per_device_train_batch_size * args.max_completion_length
        if args.n_gpu > 1:
            raise InputError(
                "CUDA_VISIBLE_DEVICES",
                f"{args.n_gpu} GPUs in one process",
                "start with accelerate launch, or make one GPU visible",
            )
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device)
            if args.activation_checkpointing:  # saves it nothing, but its last layer then runs as the policy's does
                self.ref_model.activation_checkpointing_enable()
        backbones = [backbone_of(part) for part in (policy, value_model, self.ref_model) if part is not None]
        compile_layers(backbones, args, self.accelerator)

    # ---- data, optimiser -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of prompt rows, one an update and process. One Trainer epoch is the whole run."""
        stream = PromptStream(
            len(self.train_dataset),
            self.args.max_steps * self.args.num_prompts,
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.num_prompts // self.args.world_size,
            sampler=stream,
            collate_fn=list,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the value parameters in groups of their own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        decay = set(self.get_decay_parameter_names(model))
        value = self.accelerator.unwrap_model(model).value_parameters()
        self.optimizer = cls(parameter_groups(model, value, decay, self.args), **kwargs)
        return self.optimizer

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        """Autocast as the wrapped model's forward has it: the reference, which is not wrapped, must round alike."""
        return self.accelerator.autocast()

    # ---- one update ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: list[dict], num_items_in_batch: Any = None) -> Tensor:
        """One update on the rows ``inputs``; leaves the last optimiser step to the Trainer. Returns the mean loss."""
        args = self.args
        model.train()
        first = args.process_index * len(inputs)
        seeds = prompt_seeds(args.seed, self.state.global_step, first, len(inputs))
        with whole_weights(model):
            # 1., 2. sample and score
            rollout = self._rollout(inputs, args.num_generations, seeds)
            # 3., 4. log-probabilities, values, advantages
            with self._timed("logprob"):
                self._evaluate_tokens(rollout)
        if self.state.global_step == 0 and args.init_value_to_reward:
            self._shift_values(rollout)
        self._compute_advantages(rollout)
        # 5. optimiser steps, unless the policy has gone too far from the reference
        kl = float(self._sum_over_ranks(rollout.kl()[0].sum())) / args.rows_per_update
        steps: list[dict[str, Tensor]] = []
        if args.max_kl is not None and kl > args.max_kl:
            logger.warning("KL %.1f is above max_kl %.1f: stopping; %s", kl, args.max_kl, last_good(args.output_dir))
            self.control.should_training_stop = self.control.should_log = True
        else:
            with self._timed("update"):
                steps = self._update(model, rollout)
        # 6. log, and the price of KL for the next update
        self._record(rollout, steps, kl)
        if args.kl_target is not None:
            self.beta = ppo.adapted_beta(self.beta, kl, args.kl_target, args.rows_per_update, args.kl_horizon)
        asked = torch.tensor(int(self.preemption.asked), device=args.device)
        unfinished = self.state.global_step + 1 < args.max_steps
        self.preemption.agreed = bool(self._sum_over_ranks(asked)) and unfinished
        loss = torch.stack([s["loss"] for s in steps]).mean() if steps else torch.zeros(())
        self._log_metric("loss", float(loss))  # the Trainer's own mean forgets, on resuming, what was not logged yet
        return loss.to(args.device)

    def _rollout(self, rows: list[dict], num_generations: int, seeds: list[int]) -> Rollout:
        """Sample and score; where the rows are several batches, each is scored while the next is sampled."""
        args, size = self.args, max(1, self.args.rollout_batch_size // num_generations)
        cuts = [slice(start, start + size) for start in range(0, len(rows), size)]
        with background(len(cuts) > 1) as start_scoring:
            with self._timed("rollout"), sampled_eagerly(args.torch_compile):
                sampled, waiting = [], []
                for cut in cuts:
                    sampled.append(self._sample(rows[cut], num_generations, seeds[cut]))
                    waiting.append(start_scoring(self._score, sampled[-1]))
            with self._timed("score"):
                found = merge_scores([result() for result in waiting])
        for name, (value,) in found.metrics.items():
            self._log_metric(name, value)
        self._extra = found.extra
        rollout, rewards = merge(sampled), found.rewards
        rollout.rewards_per_func = rewards.to(args.device)
        rollout.raw_scores, rollout.scored = (x.to(args.device) for x in self.reward_functions.combine(rewards))
        rollout.scores = ppo.shape_scores(
            rollout.raw_scores,
            rollout.finished,
            rollout.lengths,
            clip=args.reward_clip,
            missing_eos_penalty=args.missing_eos_penalty,
            length_penalty=args.length_penalty,
        )
        return rollout

    def _sample(self, rows: list[dict], num_generations: int, seeds: list[int]) -> Rollout:
        args = self.args
        return collect(
            self.model.policy,
            self.processing_class,
            rows,
            num_generations=num_generations,
            seeds=seeds,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            batch_size=args.rollout_batch_size,
            stop_at_line_break=args.stop_at_line_break,
            device=args.device,
        )

    def _score(self, rollout: Rollout) -> Scores:
        scores = Scores()
        scores.rewards = self.reward_functions(
            rollout.prompts,
            rollout.completions(),
            completion_ids=rollout.completion_ids,
            trainer_state=self.state,
            log_metric=scores.log_metric,
            log_extra=scores.log_extra,
            **rollout.columns,
        )
        return scores

    def _inputs(self, rollout: Rollout, rows: Tensor) -> ModelInputs:
        pad = self.processing_class.pad_token_id or 0  # fills space only: no mask is made from it
        prompts = [rollout.prompt_ids[i] for i in rows.tolist()]
        completions = [rollout.completion_ids[i] for i in rows.tolist()]
        if self.share_prefix:
            return collate_shared(prompts, completions, pad, dtype=self.model.policy.dtype, device=self.args.device)
        return collate(prompts, completions, pad, device=self.args.device)

    def _mini_batches(self, rollout: Rollout, epoch: int) -> list[list[Tensor]]:
        seed = prompt_seeds(self.args.seed + 1, self.state.global_step, epoch, 1)[0] if epoch else None
        return mini_batches(rollout, self.args.num_mini_batches, self.args.per_device_train_batch_size, seed)

    @torch.no_grad()
    def _evaluate_tokens(self, rollout: Rollout) -> None:
        """Fill in old and reference log-probabilities, values and entropies, all from the training code path."""
        shape, device = rollout.mask.shape, rollout.mask.device
        old, ref, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
        for rows in (rows for batch in self._mini_batches(rollout, epoch=0) for rows in batch):
            inputs = self._inputs(rollout, rows)
            with self.compute_loss_context_manager():
                out: TokenOutputs = self.model(inputs, self.args.temperature, entropy=True)
                reference = self._reference_logprobs(inputs)
            at, mask = rows.to(device), rollout.mask[rows.to(device)]
            for full, flat in ((old, out.logprobs), (ref, reference), (values, out.values), (entropy, out.entropy)):
                full[at] = spread(flat, mask)
        rollout.old_logprobs, rollout.ref_logprobs, rollout.values, rollout.entropy = old, ref, values, entropy

    def _reference_logprobs(self, inputs: ModelInputs) -> Tensor:
        policy = self.model.policy if self.ref_model is None else self.ref_model
        with policy.disable_adapter() if self.ref_model is None else contextlib.nullcontext():
            known = (inputs.targets, self.args.temperature, self.model.most_tokens)
            return completion_logprobs(policy, hidden_states(policy, inputs), *known)[0]

    def _shift_values(self, rollout: Rollout) -> None:
        """Move the head's bias, and the rollout's values, so that the mean value is the mean of what it predicts."""
        sums = [
            self._centred(rollout)[rollout.scored].sum(),
            rollout.scored.sum(),
            rollout.values[rollout.mask].sum(),
            rollout.mask.sum(),
        ]
        score, rows, value, tokens = self._sum_over_ranks(torch.stack([x.float() for x in sums])).tolist()
        shift = score / max(rows, 1.0) - value / tokens
        add_to_parameter(self.model.value_head.bias, shift)
        rollout.values = torch.where(rollout.mask, rollout.values + shift, rollout.values)

    def _centred(self, rollout: Rollout) -> Tensor:
        """The scores ``[B]`` that are learnt from: less the prompt's baseline, or what they add to the best of n."""
        known = (rollout.scores, rollout.scored, self.args.num_generations)
        if self.args.leave_one_out_baseline:
            return ppo.leave_one_out(*known)
        return ppo.best_of_n(*known, self.args.best_of_n)

    def _compute_advantages(self, rollout: Rollout) -> None:
        if self.args.best_of_n > 1:  # nothing tells what a completion adds that is the only one with a reward
            rivals = rollout.scored.view(-1, self.args.num_generations).sum(1) > 1
            rollout.scored = rollout.scored & rivals.repeat_interleave(self.args.num_generations)
        rollout.token_rewards = ppo.token_rewards(
            self._centred(rollout),
            rollout.old_logprobs,
            rollout.ref_logprobs,
            rollout.mask,
            self.beta,
            self.args.entropy_coef,
        )
        if self.args.whiten_rewards:
            rollout.token_rewards = ppo.whiten(
                rollout.token_rewards, rollout.train_mask, shift_mean=False, reduce=self._sum_over_ranks
            )
        rollout.advantages, rollout.returns = ppo.gae(
            rollout.token_rewards, rollout.values, rollout.mask, self.args.gamma, self.args.lam
        )
        if self.args.whiten_advantages:
            rollout.advantages = ppo.whiten(rollout.advantages, rollout.train_mask, reduce=self._sum_over_ranks)

    def _update(self, model: nn.Module, rollout: Rollout) -> list[dict[str, Tensor]]:
        """All optimiser steps but the last, and the gradients of the last. Returns the metrics of each."""
        warm_up = self.state.global_step < self.args.value_warmup_updates
        batches = [b for epoch in range(self.args.num_ppo_epochs) for b in self._mini_batches(rollout, epoch)]
        steps = []
        for i, micro_batches in enumerate(batches):
            found = self._backward(model, rollout, micro_batches, warm_up)
            steps.append(found)
            if not bool(found["loss"].isfinite()):
                where = f"the loss is {float(found['loss'])} at update {self.state.global_step}"
                raise FloatingPointError(f"{where}; {last_good(self.args.output_dir)}")
            if self.args.target_kl is not None and float(found["approxkl"]) > self.args.target_kl:
                model.zero_grad()  # the Trainer's own step then changes nothing
                break
            if i + 1 < len(batches):
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
        return steps

    def _backward(
        self, model: nn.Module, rollout: Rollout, micro_batches: list[Tensor], warm_up: bool
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of one mini-batch. Returns its metrics, summed over ranks."""
        everyone = torch.cat(micro_batches).to(rollout.mask.device)
        num_tokens = self._sum_over_ranks(rollout.train_mask[everyone].sum()).clamp(min=1)
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for i, rows in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step in `backward`
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss, found = self._loss(model, rollout, rows, num_tokens, warm_up)
                # ranks average their gradients, and num_tokens counts the tokens of all of them
                self.accelerator.backward(loss * self.args.world_size)
            for name, value in found.items():
                total[name] = total[name] + value
        return {name: self._sum_over_ranks(value) for name, value in total.items()}

    def _loss(
        self, model: nn.Module, rollout: Rollout, rows: Tensor, num_tokens: Tensor, warm_up: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, its share of the mini-batch's; in warm-up the value loss alone."""
        out: TokenOutputs = model(self._inputs(rollout, rows), self.args.temperature, value_only=warm_up)
        at = rows.to(rollout.mask.device)
        mask, real = rollout.train_mask[at], rollout.mask[at]
        policy, found = ppo.policy_loss(
            spread(out.logprobs, real),
            rollout.old_logprobs[at],
            rollout.advantages[at],
            mask,
            clip=self.args.cliprange,
            num_tokens=num_tokens,
        )
        value, of_value = ppo.value_loss(
            spread(out.values, real),
            rollout.values[at],
            rollout.returns[at],
            mask,
            clip=self.args.cliprange_value,
            num_tokens=num_tokens,
        )
        loss = self.args.vf_coef * value + (0.0 if warm_up else policy)
        return loss, {
            **found,
            "value_clipfrac": of_value["clipfrac"],
            "loss": loss.detach(),
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
        }

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample every held-out prompt and score it: ``reward`` (raw), ``kl`` (nats), ``objective``, ``length`` ...

        The seeds are the same at every call, so that two policies meet the same luck.
        """
        source = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = [source[i] for i in range(len(source))]
        world, rank, n = self.args.world_size, self.args.process_index, self.args.num_generations_eval
        seeds = prompt_seeds(self.args.seed + EVAL_SEED_OFFSET, 0, 0, len(rows))
        sums = torch.zeros(7, dtype=torch.float64, device=self.args.device)
        self._mode = "eval"
        with whole_weights(self.model_wrapped):  # once: processes have different numbers of batches
            for start in range(rank * self.args.num_prompts, len(rows), world * self.args.num_prompts):
                part = slice(start, start + self.args.num_prompts)
                self._eval_rows = len(rows[part])
                rollout = self._rollout(rows[part], n, seeds[part])
                self._evaluate_tokens(rollout)
                sums += numbers.eval_sums(rollout)
        self._mode = "train"
        result = self._record_evaluation(self._sum_over_ranks(sums), len(rows) * n, metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result
