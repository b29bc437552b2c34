"""Fits the preference model to people's ratings, calibrates it, and measures it.

Loss, one member on one deliberation at a time (Bakker et al. 2022, appendix; Stiennon et al. 2020 for the sign):

    - mean over pairs (w, l) with r_w - r_l >= margin of  log sigmoid(slope (s_w - s_l))        Bradley-Terry
    - ordinal_weight * mean over ratings of               log P(r | s)                           cumulative logit

averaged over members, so that a member with 15 pairs weighs as much as one with 1. The first term orders one member's
statements; the second puts the scores of different members on one scale, which welfare needs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from deliberation.datasets import read_ratings
from deliberation.types import InputError, Rating, is_hub_name
from embedded import resolve
from reward.measures import measures, rows_of_members
from reward.preference import WEIGHTS, Calibration, PreferenceModel, ordinal_log_likelihood
from reward.scoring import pad, prefix_states, score_ratings, suffix_scores

_SCALE_MEMBERS = 64
"""Members whose ratings tell, before training, what scale the model's scores are on."""

_ROWS_A_PASS = {"cpu": 16, "cuda": 256}
"""Suffixes in one forward pass of training: what was fastest. Changes nothing but speed."""


@dataclass
class PreferenceConfig(TrainingArguments):
    """Arguments of ``consensus preference``: transformers' ``TrainingArguments`` and the keys below.

    A batch counts members (all of a member's ratings on one deliberation stay together), not ratings.
    """

    model_name_or_path: str = field(
        default="embedded/judge", metadata={"help": "Sequence classifier or language model to start from."}
    )
    ratings: str | None = field(default=None, metadata={"help": "Ratings to fit, JSONL or Parquet."})
    eval_ratings: str | None = field(
        default=None, metadata={"help": "Held-out ratings for calibration and measures. Default: a part of `ratings`."}
    )
    eval_share: float = field(
        default=0.15, metadata={"help": "Share of topics held out of `ratings` where `eval_ratings` is not given."}
    )
    margin: int = field(default=2, metadata={"help": "Smallest difference of a pair that is trained on, 1 to 6."})
    ordinal_weight: float = field(
        default=0.5, metadata={"help": "Weight of the ordinal term beside the pairwise term. 0: pairs alone."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter (merged when saved)."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA adapter."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: peft's choice."})

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs; reward models overfit after one."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Members in a batch."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or share of all steps if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints: 'no', 'epoch', 'steps'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # the collator reads our own fields, not the model's arguments
        if not 1 <= self.margin <= 6:
            raise InputError("margin", self.margin, "must be from 1 to 6")
        if not self.ordinal_weight >= 0:
            raise InputError("ordinal_weight", self.ordinal_weight, "must be 0 or more")
        if not 0 < self.eval_share < 1:
            raise InputError("eval_share", self.eval_share, "must be between 0 and 1")
        checkpoint = self.resume_from_checkpoint
        if checkpoint is not None and not Path(checkpoint).is_dir():
            mend = "no such folder; give one like runs/NAME/checkpoint-100"
            raise InputError("resume_from_checkpoint", checkpoint, mend)
        if self.activation_checkpointing:  # it drops the key-value cache, and the prefix with it
            raise InputError("activation_checkpointing", True, "must be off: the shared prefix lives in the cache")


@dataclass(frozen=True)
class _Member:
    """One member's ratings on one deliberation, as token ids."""

    prefix: list[int]
    suffixes: list[list[int]]
    ratings: list[int]


def fit(
    config: PreferenceConfig,
    ratings: Sequence[Rating],
    eval_ratings: Sequence[Rating],
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> PreferenceModel:
    """Fit to ``ratings``, calibrate on ``eval_ratings`` (other deliberations), and note the measures on them.

    Args:
        config: what to start from and how to train; writes only what its ``save_strategy`` asks for.
        ratings, eval_ratings: agreement is fitted; quality is not read.
        model, tokenizer: start from these instead of ``config.model_name_or_path``; the model is trained in place.
        progress: show a progress bar (logged losses, where ``config.disable_tqdm``).

    Raises:
        InputError: no ratings, no pair that differs by the margin, a deliberation in both sets, or several processes.
    """
    _check(config, ratings, eval_ratings)
    # 1. Model
    set_seed(config.seed)
    if model is None or tokenizer is None:
        model, tokenizer = _load_base(config.model_name_or_path)
    _no_dropout(model)
    unfitted = PreferenceModel(model, tokenizer, Calibration.of_ratings([r.agreement for r in ratings]))
    # 2. The scale its scores are on
    groups = list(rows_of_members(ratings).values())
    sample = np.random.default_rng(config.seed).permutation(len(groups))[:_SCALE_MEMBERS]
    start = _starting_scale(unfitted, [ratings[row] for i in sample for row in groups[i]])
    # 3. Fit
    arguments = copy.copy(config)
    arguments.disable_tqdm = config.disable_tqdm or not progress
    members = [_member(unfitted, [ratings[row] for row in rows]) for rows in groups]
    trainer = _PreferenceTrainer(_with_adapter(model, config), arguments, members, start, tokenizer)
    if not progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    fitted: Any = trainer.accelerator.unwrap_model(trainer.model)
    fitted = fitted.merge_and_unload() if config.use_peft else fitted
    # 4. Calibrate and measure on ratings it has not seen
    facts = {"base": config.model_name_or_path, "seed": config.seed, "margin": config.margin, "ratings": len(ratings)}
    return _calibrated(PreferenceModel(fitted.eval(), tokenizer, start, facts), eval_ratings)


def _calibrated(model: PreferenceModel, eval_ratings: Sequence[Rating]) -> PreferenceModel:
    """The model with its calibration fitted to ratings it has not seen, and with its measures on them."""
    scores = score_ratings(model, eval_ratings)
    model.calibration = Calibration.fit(scores, [r.agreement for r in eval_ratings])
    found = measures(model, eval_ratings, scores=scores)
    model.metadata = {**model.metadata, "eval_ratings": len(eval_ratings), "measures": found}
    return model


def main(config: PreferenceConfig) -> PreferenceModel:
    """``consensus preference``: read ratings, fit, save the preference model in ``output_dir``."""
    if config.ratings is None:
        raise InputError("ratings", None, "give a JSONL or Parquet file of ratings")
    if config.output_dir is None:
        raise InputError("output_dir", None, "give the folder to write the preference model to")
    config.model_name_or_path = resolve(config.model_name_or_path)
    ratings = read_ratings(config.ratings)
    if config.eval_ratings is not None:
        held_out = read_ratings(config.eval_ratings)
    else:
        ratings, held_out = hold_out(ratings, config.eval_share, config.seed)
    result = fit(config, ratings, held_out)
    result.save(Path(config.output_dir))
    return result


def hold_out(ratings: Sequence[Rating], share: float, seed: int) -> tuple[list[Rating], list[Rating]]:
    """Split whole topics (deliberations, where there is only one topic) into (kept, about ``share`` held out).

    Raises:
        InputError: field ``ratings``, if there are fewer than two deliberations.
    """
    by_topic = len({r.topic for r in ratings}) > 1
    units = [r.topic if by_topic else r.deliberation_id for r in ratings]
    names = sorted(set(units))
    if len(names) < 2:
        raise InputError("ratings", f"{len(names)} deliberations", "give at least two, so that one can be held out")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    kept = [r for r, unit in zip(ratings, units, strict=True) if unit not in chosen]
    return kept, [r for r, unit in zip(ratings, units, strict=True) if unit in chosen]


def _check(config: PreferenceConfig, ratings: Sequence[Rating], eval_ratings: Sequence[Rating]) -> None:
    if config.world_size > 1:  # gradients flow past the model's forward, so DDP would not synchronise them
        raise InputError("world_size", config.world_size, "fit the preference model in one process")
    for name, rows in (("ratings", ratings), ("eval_ratings", eval_ratings)):
        if not rows:
            raise InputError(name, 0, "there are none; give at least one rating")
    both = {r.deliberation_id for r in ratings} & {r.deliberation_id for r in eval_ratings}
    if both:
        raise InputError("eval_ratings", min(both), "this deliberation is trained on too; hold out whole deliberations")
    spread = {key: [ratings[i].agreement for i in rows] for key, rows in rows_of_members(ratings).items()}
    if not any(max(seen) - min(seen) >= config.margin for seen in spread.values()):
        raise InputError("ratings", len(ratings), f"no member's ratings differ by {config.margin} or more")


def _load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A one-label classifier in float32 (a language model gets a new head) and its tokenizer; safetensors alone."""
    if not Path(name).is_dir() and not is_hub_name(name):
        raise InputError("model_name_or_path", name, "no such folder; give one, or a hub name owner/model")
    if Path(name).is_dir() and not any(Path(name).glob(WEIGHTS)):
        raise InputError("model_name_or_path", name, "has no safetensors weights; save it with safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _no_dropout(model: torch.nn.Module) -> None:
    """Switch dropout off wherever a model keeps it, so that a score is the same in training and in use."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _with_adapter(model: PreTrainedModel, config: PreferenceConfig) -> torch.nn.Module:
    if not config.use_peft:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=config.lora_target_modules,
    )
    return get_peft_model(model, lora)


def _member(model: PreferenceModel, ratings: Sequence[Rating]) -> _Member:
    prefix = model.prefix_ids(ratings[0].question, ratings[0].opinion)
    return _Member(prefix, [model.suffix_ids(r.statement) for r in ratings], [r.agreement for r in ratings])


def _starting_scale(model: PreferenceModel, ratings: Sequence[Rating]) -> Calibration:
    """Cut-points and slope of the loss, fixed during training; the scores move to fit them.

    A model whose scores already tell ratings apart keeps its scale. Any other gets one where the standard deviation
    of its scores is worth one logit, so that the loss does not depend on how a new head was initialised.
    """
    scores, seen = score_ratings(model, ratings).astype(np.float64), [r.agreement for r in ratings]
    spread = max(float(scores.std()), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scores that tell nothing are expected here, and handled below
        fitted = Calibration.fit(scores, seen)
    if fitted.slope * spread >= 0.5:
        return fitted
    shift = float(scores.mean()) / spread
    return Calibration(tuple(np.add(Calibration.of_ratings(seen).cut_points, shift)), 1 / spread)


@dataclass(frozen=True)
class _Collator:
    """Members -> one batch: prefixes once, suffixes sorted by length and cut into passes of similar length.

    ``pairs`` [pairs, 2] holds (preferred, other) as row numbers; ``pair_weights`` and ``row_weights`` sum to 1 for
    each member (a member without a pair has none).
    """

    margin: int
    rows_a_pass: int

    def __call__(self, members: Sequence[_Member]) -> dict[str, Any]:
        rows = [(i, j) for i, member in enumerate(members) for j in range(len(member.ratings))]
        rows.sort(key=lambda row: len(members[row[0]].suffixes[row[1]]))
        place = {row: number for number, row in enumerate(rows)}
        passes = []
        for first in range(0, len(rows), self.rows_a_pass):
            part = rows[first : first + self.rows_a_pass]
            ids, lengths = pad([members[i].suffixes[j] for i, j in part])
            passes.append({"ids": ids, "lengths": lengths, "owners": torch.tensor([i for i, _ in part])})
        pairs, pair_weights = [], []
        for i, member in enumerate(members):
            own = pairs_of(member.ratings, self.margin)
            pairs += [(place[i, winner], place[i, loser]) for winner, loser in own]
            pair_weights += [1 / len(own) for _ in own]
        prefix_ids, prefix_lengths = pad([member.prefix for member in members])
        return {
            "prefix_ids": prefix_ids,
            "prefix_lengths": prefix_lengths,
            "passes": passes,
            "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
            "pair_weights": torch.tensor(pair_weights),
            "ratings": torch.tensor([members[i].ratings[j] for i, j in rows]),
            "row_weights": torch.tensor([1 / len(members[i].ratings) for i, _ in rows]),
        }


def pairs_of(ratings: Sequence[int], margin: int) -> list[tuple[int, int]]:
    """All (i, j) with ratings[i] - ratings[j] >= margin."""
    return [(i, j) for i, a in enumerate(ratings) for j, b in enumerate(ratings) if a - b >= margin]


def preference_loss(
    scores: Tensor, batch: dict[str, Any], cut_points: Tensor, slope: float, ordinal_weight: float
) -> Tensor:
    """The loss at the top of this file, summed over the batch's members: scores [rows] -> scalar."""
    preferred, other = scores[batch["pairs"][:, 0]], scores[batch["pairs"][:, 1]]
    pairwise = -(batch["pair_weights"] * F.logsigmoid(slope * (preferred - other))).sum()
    ordinal = -(batch["row_weights"] * ordinal_log_likelihood(scores, batch["ratings"], cut_points, slope)).sum()
    return pairwise + ordinal_weight * ordinal


class _PreferenceTrainer(Trainer):
    """transformers' Trainer with the loss above; checkpoints, schedules and trackers are the library's."""

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the batch's members

    def __init__(
        self,
        model: torch.nn.Module,
        args: PreferenceConfig,
        members: list[_Member],
        start: Calibration,
        tokenizer: PreTrainedTokenizerBase,
    ):
        rows_a_pass = _ROWS_A_PASS.get(args.device.type, _ROWS_A_PASS["cuda"])
        collator = _Collator(args.margin, rows_a_pass)
        super().__init__(model, args, data_collator=collator, train_dataset=members, processing_class=tokenizer)  # type: ignore[arg-type]
        self._members, self._start, self._ordinal_weight = members, start, args.ordinal_weight

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        tokens = [len(m.prefix) + len(m.suffixes) * max(map(len, m.suffixes)) for m in self._members]
        generator = torch.Generator().manual_seed(
            self.args.data_seed if self.args.data_seed is not None else self.args.seed
        )
        return LengthGroupedSampler(self.args.train_batch_size, lengths=tokens, generator=generator)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean loss over the batch's members; each prefix runs once and gets the gradient of all its statements."""
        model = self.accelerator.unwrap_model(model)
        prefixes = prefix_states(model, inputs["prefix_ids"], inputs["prefix_lengths"])
        scores = torch.cat([suffix_scores(model, prefixes, **one) for one in inputs["passes"]])
        cuts = torch.tensor(self._start.cut_points, dtype=scores.dtype, device=scores.device)
        loss = preference_loss(scores, inputs, cuts, self._start.slope, self._ordinal_weight)
        return loss / len(inputs["prefix_ids"])
