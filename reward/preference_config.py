"""The keys of ``consensus preference``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import IntervalStrategy, TrainingArguments

from deliberation.types import InputError
from reward.preference import PAIR, PREFIX
from reward.raters import MIN_ITEMS


@dataclass
class PreferenceConfig(TrainingArguments):
    """Arguments of ``consensus preference``: transformers' ``TrainingArguments`` and the keys below.

    A batch counts members (all that a member said in one deliberation stays together), not ratings.
    """

    model_name_or_path: str = field(
        default="embedded/judge", metadata={"help": "Sequence classifier or language model to start from."}
    )
    ratings: list[str] | None = field(
        default=None, metadata={"help": "Ratings, votes, soft votes, ranks or choices to fit: JSONL or Parquet files."}
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
        default=0.0,
        metadata={
            "help": "Weight of pairs of members told apart by one statement. 0: none. Not read by the bi-encoder's fit."
        },
    )
    heads: int = field(default=4, metadata={"help": "Heads of the ensemble on the shared backbone. 1: no ensemble."})
    min_kappa: float = field(
        default=0.6,
        metadata={
            "help": f"Members who rated {MIN_ITEMS} statements or more twice are kept from this weighted kappa on "
            "(others always); -1 keeps everybody."
        },
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the input embeddings as they are."})
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Of an encoder: 'pair', or 'prefix', where a member's prefix is shared. "
            "Default: as the model it starts from was fitted, else 'pair'."
        },
    )
    bi_encoder: str | None = field(
        default=None,
        metadata={"help": "Sentence encoder (folder or hub name) of a bi-encoder beside it. Default: none."},
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
        if self.attention not in (None, PAIR, PREFIX):
            raise InputError("attention", self.attention, f"must be {PAIR} or {PREFIX}")
        if self.heads < 1:
            raise InputError("heads", self.heads, "must be 1 or more")
        if self.eval_strategy != "no":
            mend = "must be no: the held-out answers are for calibration and measures, after training"
            raise InputError("eval_strategy", IntervalStrategy(self.eval_strategy).value, mend)
        if self.label_smoothing_factor:
            raise InputError("label_smoothing_factor", self.label_smoothing_factor, "must be 0: our loss has none")
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
