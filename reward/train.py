"""Fits the preference model to what people said of statements, calibrates it, and measures it.

Ratings (1 to 7), votes, rankings and choices between two statements; the loss is in ``objective``. The heads of an
ensemble share the backbone, and each sees the members with weights of its own; the saved head is their mean.
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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Sampler
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

from deliberation.datasets import read_responses
from deliberation.types import Choice, InputError, Rating, Response, Vote, is_hub_name
from embedded import resolve
from reward.calibration import RATINGS, Calibration
from reward.examples import Collator, DeliberationSampler, Member, members_of, rows_of_members, scale_of
from reward.heads import apply_head, encoder_features, head_of, set_head
from reward.measures import accuracies, answer_of, measures
from reward.objective import preference_loss
from reward.plots import save_reliability
from reward.preference import PAIR, PREFIX, WEIGHTS, PreferenceModel
from reward.prefixes import prefix_states, suffix_features
from reward.raters import consistent_raters, showings
from reward.scoring import Answered, score_ratings, score_responses
from reward.uncertainty import Uncertainty

_SCALE_MEMBERS = 64
"""Members whose ratings tell, before training, what scale the model's scores are on."""

_MIN_DOUBLED = 100
"""Statements rated twice from which the size of a utility's error can be told; below, the ensemble's spread is it."""

_HEAD_NOISE = 0.3
"""How far an ensemble's heads start apart, as a share of the size of the head they start from."""

_ROWS_A_PASS = {"cpu": 16, "cuda": 256}
"""Suffixes in one forward pass of training: what was fastest. Changes nothing but speed."""


@dataclass
class PreferenceConfig(TrainingArguments):
    """Arguments of ``consensus preference``: transformers' ``TrainingArguments`` and the keys below.

    A batch counts members (all that a member said in one deliberation stays together), not ratings.
    """

    model_name_or_path: str = field(
        default="embedded/judge", metadata={"help": "Sequence classifier or language model to start from."}
    )
    ratings: list[str] | None = field(
        default=None, metadata={"help": "Ratings, votes, ranks or choices to fit: JSONL or Parquet files."}
    )
    eval_ratings: list[str] | None = field(
        default=None, metadata={"help": "Held-out ones for calibration and measures. Default: a part of `ratings`."}
    )
    eval_share: float = field(
        default=0.15, metadata={"help": "Share of topics held out of `ratings` where `eval_ratings` is not given."}
    )
    margin: int = field(default=2, metadata={"help": "Smallest difference of a pair that is trained on, 1 to 6."})
    ordinal_weight: float = field(
        default=0.5, metadata={"help": "Weight of the ordinal term beside the pairwise term. 0: pairs alone."}
    )
    between_weight: float = field(
        default=0.0, metadata={"help": "Weight of pairs of members told apart by one statement. 0: none."}
    )
    heads: int = field(default=4, metadata={"help": "Heads of the ensemble on the shared backbone. 1: no ensemble."})
    min_kappa: float = field(
        default=0.6,
        metadata={"help": "Members who rated twice are kept from this weighted kappa on; -1 keeps everybody."},
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the input embeddings as they are."})
    attention: str = field(
        default=PAIR, metadata={"help": "Of an encoder: 'pair', or 'prefix', where a member's prefix is shared."}
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
        for name in ("ratings", "eval_ratings"):
            if isinstance(getattr(self, name), str | Path):
                setattr(self, name, [getattr(self, name)])
        self.remove_unused_columns = False  # the collator reads our own fields, not the model's arguments
        if not 1 <= self.margin <= 6:
            raise InputError("margin", self.margin, "must be from 1 to 6")
        for name in ("ordinal_weight", "between_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(name, getattr(self, name), "must be 0 or more")
        if self.attention not in (PAIR, PREFIX):
            raise InputError("attention", self.attention, f"must be {PAIR} or {PREFIX}")
        if self.heads < 1:
            raise InputError("heads", self.heads, "must be 1 or more")
        if not -1 <= self.min_kappa <= 1:
            raise InputError("min_kappa", self.min_kappa, "must be from -1 (keep everybody) to 1")
        if not 0 < self.eval_share < 1:
            raise InputError("eval_share", self.eval_share, "must be between 0 and 1")
        checkpoint = self.resume_from_checkpoint
        if checkpoint is not None and not Path(checkpoint).is_dir():
            mend = "no such folder; give one like runs/NAME/checkpoint-100"
            raise InputError("resume_from_checkpoint", checkpoint, mend)
        if self.activation_checkpointing:  # it drops the key-value cache, and the prefix with it
            raise InputError("activation_checkpointing", True, "must be off: the shared prefix lives in the cache")


def fit(
    config: PreferenceConfig,
    ratings: Sequence[Response],
    eval_ratings: Sequence[Response],
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> PreferenceModel:
    """Fit to ``ratings``, calibrate on ``eval_ratings`` (other deliberations), and note the measures on them.

    Args:
        config: what to start from and how to train; writes only what its ``save_strategy`` asks for.
        ratings, eval_ratings: agreement is fitted; quality is not read. A member's second rating of a statement tells
            how consistent the member is (``min_kappa``) and how far to trust a utility; it is not trained on.
        model, tokenizer: start from these instead of ``config.model_name_or_path``; the model is trained in place.
        progress: show a progress bar (logged losses, where ``config.disable_tqdm``).

    Raises:
        InputError: no ratings, no pair that differs by the margin, ratings beside votes, a deliberation in both sets,
            or several processes.
    """
    # 1. Data: one showing of each statement, of members who agree with themselves
    first, raters = consistent_raters(*showings(ratings), config.min_kappa)
    held_out, second = showings(eval_ratings)
    values = scale_of([*first, *held_out])
    _check(config, first, held_out)
    # 2. Model, and the scale its scores are on
    set_seed(config.seed)
    if model is None or tokenizer is None:
        model, tokenizer = _load_base(config.model_name_or_path)
    _no_dropout(model)
    unfitted = PreferenceModel(model, tokenizer, Calibration.of_ratings(list(values), values))
    unfitted.attention = config.attention
    unfitted.calibration = _starting_scale(unfitted, _sample(first, config.seed), values)
    # 3. Fit
    _spread_heads(model, config.heads)
    members = members_of(unfitted, first, config.margin, config.heads, config.seed)
    if not any(m.pairs for m in members):
        raise InputError("ratings", len(first), f"no member's ratings differ by {config.margin} or more")
    arguments = copy.copy(config)
    arguments.disable_tqdm = config.disable_tqdm or not progress
    trainer = _PreferenceTrainer(_trainable(model, config), arguments, members, unfitted)
    if not progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    fitted: Any = trainer.accelerator.unwrap_model(trainer.model)
    fitted = fitted.merge_and_unload() if config.use_peft else fitted
    # 4. Calibrate and measure on what it has not seen
    facts = {"base": config.model_name_or_path, "seed": config.seed, "margin": config.margin, "ratings": len(first)}
    result = PreferenceModel(fitted.eval(), tokenizer, unfitted.calibration, {**facts, **raters})
    result.ensemble, result.attention = _gather_heads(fitted), config.attention
    topics = {r.topic for r in first if r.topic}
    return _calibrated(result, held_out, second, values, topics, config.min_kappa)


def _calibrated(
    model: PreferenceModel,
    held_out: Sequence[Response],
    second: Sequence[Rating],
    values: tuple[int, ...],
    trained_topics: set[str],
    min_kappa: float,
) -> PreferenceModel:
    """The model with its calibration fitted to responses it has not seen, and with its measures on them."""
    rated = [r for r in held_out if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    if not rated:  # ranks and choices say nothing of the level: a statement of mean score is a toss-up
        scores = score_ratings(model, _texts(held_out)).astype(np.float64)
        model.calibration = Calibration(
            (float(model.calibration.slope * scores.mean()),), model.calibration.slope, values
        )
        model.metadata["eval_ratings"] = len(held_out)
        return model
    found = score_responses(model, rated)
    answers = np.array([answer_of(r) for r in rated])
    model.calibration = Calibration.fit(found.raw, answers, values)
    place = {(r.deliberation_id, r.member, r.statement): k for k, r in enumerate(rated)}
    at = [place[r.deliberation_id, r.member, r.statement] for r in second]
    if found.ensemble is not None:
        model.uncertainty = Uncertainty()
        if len(second) >= _MIN_DOUBLED:
            twice = answers[at], np.array([r.agreement for r in second])
            model.uncertainty = Uncertainty.fit(model.calibration, found.raw[at], found.ensemble[at], *twice)
    again = [second[k] for k in np.argsort(at)] if len(at) == len(rated) else None  # a ceiling needs all rated twice
    measured = measures(model, rated, again, scores=found.raw, trained_topics=trained_topics)
    measured["accuracy_consistent_raters"] = _accuracy_of_consistent(found.raw, rated, second, min_kappa)
    model.metadata = {**model.metadata, "eval_ratings": len(rated), "measures": measured}
    return model


def _accuracy_of_consistent(
    scores: NDArray[np.float32], rated: Sequence[Rating | Vote], second: Sequence[Rating], min_kappa: float
) -> float | None:
    """Pairwise accuracy on the held-out members who agree with themselves; None where nobody rated twice."""
    if not second:
        return None
    kept = {id(r) for r in consistent_raters(rated, second, min_kappa)[0]}
    rows = [k for k, r in enumerate(rated) if id(r) in kept]
    return accuracies(scores[rows], [rated[k] for k in rows])["accuracy"] if rows else None


def main(config: PreferenceConfig) -> PreferenceModel:
    """``consensus preference``: read what people said, fit, save the preference model in ``output_dir``."""
    if config.ratings is None:
        raise InputError("ratings", None, "give a JSONL or Parquet file of ratings, votes, ranks or choices")
    if config.output_dir is None:
        raise InputError("output_dir", None, "give the folder to write the preference model to")
    config.model_name_or_path = resolve(config.model_name_or_path)
    ratings = [r for path in config.ratings for r in read_responses(path)]
    if config.eval_ratings is not None:
        held_out = [r for path in config.eval_ratings for r in read_responses(path)]
    else:
        ratings, held_out = hold_out(ratings, config.eval_share, config.seed)
    result = fit(config, ratings, held_out)
    result.save(Path(config.output_dir))
    save_reliability(result, held_out, Path(config.output_dir))
    return result


def hold_out(ratings: Sequence[Response], share: float, seed: int) -> tuple[list[Response], list[Response]]:
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


def _check(config: PreferenceConfig, ratings: Sequence[Response], eval_ratings: Sequence[Response]) -> None:
    if config.world_size > 1:  # gradients flow past the model's forward, so DDP would not synchronise them
        raise InputError("world_size", config.world_size, "fit the preference model in one process")
    for name, rows in (("ratings", ratings), ("eval_ratings", eval_ratings)):
        if not rows:
            raise InputError(name, 0, "there are none; give at least one rating")
    both = {r.deliberation_id for r in ratings} & {r.deliberation_id for r in eval_ratings}
    if both:
        raise InputError("eval_ratings", min(both), "this deliberation is trained on too; hold out whole deliberations")


def _texts(responses: Sequence[Response]) -> list[Answered]:
    """Every (member, statement) that a response speaks of."""
    return [
        Answered(r.question, r.opinion, text)
        for r in responses
        for text in ((r.chosen, r.rejected) if isinstance(r, Choice) else (r.statement,))
    ]


def _sample(ratings: Sequence[Response], seed: int) -> list[Response]:
    """All responses of some members."""
    groups = list(rows_of_members(ratings).values())
    chosen = np.random.default_rng(seed).permutation(len(groups))[:_SCALE_MEMBERS]
    return [ratings[row] for i in chosen for row in groups[i]]


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


def _spread_heads(model: PreTrainedModel, heads: int) -> None:
    """Replace a one-label head by an ensemble's: copies of it, moved apart."""
    if heads == 1:
        return
    head = head_of(model)
    several = nn.Linear(head.in_features, heads, bias=head.bias is not None)
    with torch.no_grad():
        noise = torch.randn_like(several.weight)
        several.weight.copy_(head.weight + _HEAD_NOISE * head.weight.pow(2).mean().sqrt() * noise)
        if head.bias is not None:
            several.bias.copy_(head.bias.expand(heads))
    set_head(model, several.to(head.weight.device))


def _gather_heads(model: PreTrainedModel) -> nn.Linear | None:
    """The ensemble's heads, their mean put in their place; None if there is one head."""
    heads = head_of(model)
    if heads.out_features == 1:
        return None
    mean = nn.Linear(heads.in_features, 1, bias=heads.bias is not None)
    with torch.no_grad():
        mean.weight.copy_(heads.weight.mean(dim=0, keepdim=True))
        if heads.bias is not None:
            mean.bias.copy_(heads.bias.mean(dim=0, keepdim=True))
    set_head(model, mean.to(heads.weight.device, heads.weight.dtype))
    return heads.requires_grad_(False)


def _trainable(model: PreTrainedModel, config: PreferenceConfig) -> nn.Module:
    if config.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
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


def _starting_scale(model: PreferenceModel, responses: Sequence[Response], values: tuple[int, ...]) -> Calibration:
    """Cut-points and slope of the loss, fixed during training; the scores move to fit them.

    A model whose scores already tell ratings apart keeps its scale. Any other gets one where the standard deviation
    of its scores is worth one logit, so that the loss does not depend on how a new head was initialised.
    """
    scores = score_ratings(model, _texts(responses)).astype(np.float64)
    spread = max(float(scores.std()), 1e-6)
    seen = [answer_of(r) for r in responses if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    if len(seen) == len(scores):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scores that tell nothing are expected here, and handled below
            fitted = Calibration.fit(scores, seen, values)
        if fitted.slope * spread >= 0.5:
            return fitted
    level = Calibration.of_ratings(seen or list(values), values).cut_points
    return Calibration(tuple(np.add(level, float(scores.mean()) / spread)), 1 / spread, values)


class _PreferenceTrainer(Trainer):
    """transformers' Trainer with the loss of ``objective``; checkpoints, schedules and trackers are the library's."""

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the batch's members

    def __init__(
        self, model: torch.nn.Module, args: PreferenceConfig, members: list[Member], unfitted: PreferenceModel
    ):
        self._members, self._start, self._pair = members, unfitted.calibration, not unfitted.shares_prefixes
        margin = args.margin if self._start.values == RATINGS else 1
        rows_a_pass = _ROWS_A_PASS.get(args.device.type, _ROWS_A_PASS["cuda"])
        collator = Collator(unfitted, margin, rows_a_pass, args.between_weight)
        super().__init__(
            model, args, data_collator=collator, train_dataset=members, processing_class=unfitted.tokenizer
        )  # type: ignore[arg-type]
        self._metrics: dict[str, list[float]] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.args.between_weight:
            return DeliberationSampler(self._members, seed)
        tokens = [len(m.prefix) + len(m.suffixes) * max(map(len, m.suffixes)) for m in self._members]
        generator = torch.Generator().manual_seed(seed)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=tokens, generator=generator)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean loss over the batch's members; each prefix runs once and gets the gradient of all its statements."""
        model = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():  # the library puts it around forward, which is not what runs here
            if self._pair:
                features = [encoder_features(model, *one.values()) for one in inputs["passes"]]
            else:
                prefixes = prefix_states(model, inputs["prefix_ids"], inputs["prefix_lengths"])
                features = [suffix_features(model, prefixes, **one) for one in inputs["passes"]]
            scores = apply_head(head_of(model), torch.cat(features))
        loss, metrics = preference_loss(scores, inputs, self._start, self.args.ordinal_weight)
        members = len(inputs["prefix_ids"])
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value if name == "accuracy" else value / members)
        return loss / members

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The library's log with the means of our metrics since the last one."""
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        super().log({**logs, **means}, *args, **kwargs)
