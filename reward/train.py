"""Fits the preference model to what people said of statements, calibrates it, and measures it.

Ratings (1 to 7), votes, a teacher's soft votes, rankings and choices between two statements; the loss is in
``objective``. The heads of an ensemble share the backbone, and each sees the members with weights of its own; the saved
head is their mean.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    set_seed,
)
from transformers.utils.peft_utils import find_adapter_config_file

from deliberation.datasets import read_responses
from deliberation.dropout import disable_dropout
from deliberation.types import Choice, InputError, Rating, Response, SoftVote, Vote, is_hub_name
from embedded import resolve
from reward.calibration import RATINGS, Calibration
from reward.examples import (
    Collator,
    DeliberationSampler,
    LengthSampler,
    Member,
    check_one_opinion,
    members_of,
    rows_of_members,
    scale_of,
    soft_pairs,
)
from reward.fit_bi_encoder import fit_bi_encoder, weigh_alike
from reward.heads import apply_head, encoder_features, head_of, set_head
from reward.held_out import calibrated, hold_out, texts_of
from reward.measures import answer_of
from reward.objective import preference_loss
from reward.plots import save_reliability
from reward.preference import PAIR, WEIGHTS, PreferenceModel, attention_of
from reward.preference_config import PreferenceConfig
from reward.prefixes import prefix_states, suffix_features
from reward.probe import check_reading
from reward.raters import consistent_raters, showings
from reward.scoring import score_ratings

_SCALE_MEMBERS = 64
"""Members whose ratings tell, before training, what scale the model's scores are on."""

_STEEPEST = 10.0
"""Logits that one unit of a new head's score is worth at most."""

_HEAD_NOISE = 0.3
"""How far an ensemble's heads start apart, as a share of the size of the head they start from."""

_ROWS_A_PASS = {"cpu": 32, "cuda": 256}
"""Suffixes in one forward pass of training: what was fastest. Changes nothing but speed."""


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
            several processes, a model that reads otherwise in a batch (see ``reward.probe``), or training diverged.
    """
    # 1. Data: one showing of each statement, of members who agree with themselves
    first, raters = consistent_raters(*showings(ratings), config.min_kappa)
    held_out, second = showings(eval_ratings)
    values = scale_of([*first, *held_out])
    _check(config, first, held_out, raters)
    if config.bi_encoder is not None:
        _check_pretrained("bi_encoder", config.bi_encoder)
    # 2. Model, and the scale its scores are on
    set_seed(config.seed)
    attention = config.attention or PAIR
    if model is None or tokenizer is None:
        model, tokenizer = _load_base(config.model_name_or_path)
        attention = config.attention or attention_of(config.model_name_or_path)
    disable_dropout(model)  # so that a score is the same in training and in use
    model.to(config.device)  # type: ignore[arg-type]  # already for the starting scale
    unfitted = PreferenceModel(model, tokenizer, Calibration.of_ratings(list(values), values), attention=attention)
    check_reading(model, unfitted.shares_prefixes, unfitted.reads_types, "model_name_or_path")
    _check_lengths(unfitted, [*first, *held_out])
    unfitted.calibration = _starting_scale(unfitted, _sample(first, config.seed), values)
    members = members_of(unfitted, first, config.margin, config.heads, config.seed)
    if not any(m.pairs or soft_pairs(m) for m in members):
        apart = f"differ by {config.margin} or more" if values == RATINGS else "differ"
        raise InputError("ratings", len(first), f"no two answers of a member {apart}; give some that do")
    # 3. The bi-encoder first: a text it cannot read must not cost an hour of training
    beside = None
    if config.bi_encoder is not None:
        beside = fit_bi_encoder(config.bi_encoder, first, unfitted.calibration, config, progress, held_out)
    # 4. Fit
    _spread_heads(model, config.heads)
    arguments = copy.copy(config)
    arguments.disable_tqdm = config.disable_tqdm or not progress
    trainer = _PreferenceTrainer(_trainable(model, config), arguments, members, unfitted)
    if not progress:
        trainer.remove_callback(PrinterCallback)
    with _fast_backward(model, trainer.args.device):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    fitted: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # its autocast too
    fitted = fitted.merge_and_unload() if config.use_peft else fitted
    _check_finite(fitted, config.learning_rate)
    # 5. Calibrate and measure on what they have not seen
    facts = {"base": config.model_name_or_path, "seed": config.seed, "margin": config.margin, "ratings": len(first)}
    result = PreferenceModel(fitted.eval(), tokenizer, unfitted.calibration, {**facts, **raters})
    result.ensemble, result.attention = _gather_heads(fitted), attention
    if beside is not None:
        result.bi_encoder = beside
        weigh_alike(result, held_out)
        result.metadata["bi_encoder"] = config.bi_encoder
    leveled = any(isinstance(r, Rating | Vote | SoftVote) for r in first)
    topics = {r.topic for r in first if r.topic}
    return calibrated(result, held_out, second, values, leveled, topics, config.min_kappa)


def main(config: PreferenceConfig) -> PreferenceModel:
    """``consensus preference``: read what people said, fit, save the preference model in ``output_dir``."""
    if config.ratings is None:
        raise InputError("ratings", None, "give JSONL or Parquet files of ratings, votes, soft votes, ranks or choices")
    if config.output_dir is None:
        raise InputError("output_dir", None, "give the folder to write the preference model to")
    config.model_name_or_path = resolve(config.model_name_or_path)
    ratings = [r for path in config.ratings for r in read_responses(path)]
    if config.eval_ratings is not None:
        held_out = [r for path in config.eval_ratings for r in read_responses(path)]
    elif any(isinstance(r, SoftVote) for r in ratings):
        raise InputError("eval_ratings", None, "give a file of what people said; soft votes cannot be held out for it")
    else:
        ratings, held_out = hold_out(ratings, config.eval_share, config.seed)
    result = fit(config, ratings, held_out)
    result.save(Path(config.output_dir))
    save_reliability(result, held_out, Path(config.output_dir))
    return result


def _check(
    config: PreferenceConfig,
    ratings: Sequence[Response],
    eval_ratings: Sequence[Response],
    raters: dict[str, Any],
) -> None:
    if config.world_size > 1:  # gradients flow past the model's forward, so DDP would not synchronise them
        raise InputError("world_size", config.world_size, "fit the preference model in one process")
    if not ratings and raters.get("raters_dropped"):
        mend = f"leaves none of {raters['raters_dropped']} members who rated twice; lower it, or -1 to keep everybody"
        raise InputError("min_kappa", config.min_kappa, mend)
    for name, rows in (("ratings", ratings), ("eval_ratings", eval_ratings)):
        if not rows:
            raise InputError(name, 0, "there are none; give at least one rating")
    both = {r.deliberation_id for r in ratings} & {r.deliberation_id for r in eval_ratings}
    if both:
        raise InputError("eval_ratings", min(both), "this deliberation is trained on too; hold out whole deliberations")
    for group in rows_of_members(eval_ratings).values():  # of those trained on, ``members_of`` checks it
        check_one_opinion([eval_ratings[row] for row in group])
    if any(isinstance(r, SoftVote) for r in eval_ratings):
        mend = "are a teacher's, not people's; give files of what people said as eval_ratings"
        raise InputError("eval_ratings", "soft votes", mend)
    if config.between_weight and any(isinstance(r, SoftVote) for r in ratings):
        mend = "must be 0 beside soft votes: it makes no pairs of them"
        raise InputError("between_weight", config.between_weight, mend)
    if any(isinstance(r, Rating) for r in ratings) and not any(isinstance(r, Rating) for r in eval_ratings):
        raise InputError("eval_ratings", len(eval_ratings), "has no rating; hold some out to calibrate on")


def _check_finite(model: nn.Module, learning_rate: float) -> None:
    """Refuse weights that are no numbers, before they are calibrated or saved.

    Raises:
        InputError: field ``learning_rate``.
    """
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise InputError("learning_rate", learning_rate, "training diverged to weights that are no numbers; lower it")


def _check_lengths(model: PreferenceModel, responses: Sequence[Response]) -> None:
    """Refuse a text the model cannot read before anything is trained.

    Raises:
        InputError: naming the deliberation, the member and how long the texts may be.
    """
    prefixes = {(r.question, r.opinion) for r in responses}
    suffixes = {text.statement for text in texts_of(responses)}
    prefix = {texts: len(model.prefix_ids(*texts)) for texts in prefixes}
    suffix = {text: len(model.suffix_ids(text)) for text in suffixes}
    for r in responses:
        texts = (r.chosen, r.rejected) if isinstance(r, Choice) else (r.statement,)
        tokens = prefix[r.question, r.opinion] + max(suffix[text] for text in texts)
        if tokens > model.room:
            where = f"deliberation {r.deliberation_id!r}, member {r.member}: {tokens} tokens"
            mend = f"question, opinion and statement together; shorten them to what the model reads ({model.room})"
            raise InputError("ratings", where, mend)


def _sample(ratings: Sequence[Response], seed: int) -> list[Response]:
    """All responses of some members."""
    groups = list(rows_of_members(ratings).values())
    chosen = np.random.default_rng(seed).permutation(len(groups))[:_SCALE_MEMBERS]
    return [ratings[row] for i in chosen for row in groups[i]]


def _check_pretrained(field: str, name: str) -> None:
    """Refuse what is neither a folder with safetensors nor a hub name, and what is an adapter.

    Raises:
        InputError: naming ``field``.
    """
    if not Path(name).is_dir() and not is_hub_name(name):
        raise InputError(field, name, "no such folder; give one, or a hub name owner/model")
    if Path(name).is_dir() and not any(Path(name).glob(WEIGHTS)):
        raise InputError(field, name, "has no safetensors weights; save it with safetensors")
    if find_adapter_config_file(name) is not None:  # its weights would be frozen, and saved without their base
        raise InputError(field, name, "is an adapter; start from a full model")


def _load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A one-label classifier in float32 (a language model gets a new head) and its tokenizer; safetensors alone."""
    _check_pretrained("model_name_or_path", name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@contextmanager
def _fast_backward(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """On a CPU, attention as plain matrix products: the fused kernel's backward pass is slow on short rows."""
    before = model.config._attn_implementation
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _spread_heads(model: PreTrainedModel, heads: int) -> None:
    """Replace a one-label head by an ensemble's: copies of it, moved apart."""
    if heads == 1:
        return
    head = head_of(model)
    several = nn.Linear(head.in_features, heads, bias=head.bias is not None)
    with torch.no_grad():
        noise = torch.randn_like(several.weight)  # made on the CPU, the same for every device
        several.weight.copy_(head.weight.cpu() + _HEAD_NOISE * head.weight.cpu().pow(2).mean().sqrt() * noise)
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

    A model whose scores already tell ratings apart, by more than noise would, keeps its scale. Any other gets one where
    the standard deviation of its scores is worth one logit, so that the loss does not depend on how a new head was
    initialised; less, where the scores hardly differ, or every step of training would be magnified with them.
    """
    rated = [r for r in responses if isinstance(r, Rating) or (isinstance(r, Vote) and r.vote)]
    scores = score_ratings(model, texts_of(rated or responses)).astype(np.float64)
    spread = max(float(scores.std()), 1e-6)
    seen = [answer_of(r) for r in rated]
    if seen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scores that tell nothing are expected here, and handled below
            fitted = Calibration.fit(scores, seen, values)
        if fitted.slope * spread >= max(0.5, 5 / len(seen) ** 0.5):
            return fitted
    spread = max(spread, 1 / _STEEPEST)
    level = Calibration.of_ratings(seen or list(values), values).cut_points
    return Calibration(tuple(np.add(level, float(scores.mean()) / spread)), 1 / spread, values)


class _PreferenceTrainer(Trainer):
    """transformers' Trainer with the loss of ``objective``; checkpoints, schedules and trackers are the library's."""

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the batch's members

    def __init__(
        self, model: torch.nn.Module, args: PreferenceConfig, members: list[Member], unfitted: PreferenceModel
    ):
        self._members, self._start, self._pair = members, unfitted.calibration, not unfitted.shares_prefixes
        self._reads_types = unfitted.reads_types
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
        return LengthSampler(self._members, self.args.train_batch_size, seed)

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
                types = self._reads_types
                features = [suffix_features(model, prefixes, **one, reads_types=types) for one in inputs["passes"]]
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
