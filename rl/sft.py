"""Fine-tune the policy on statements people rated as good: TRL's ``SFTTrainer`` on prompt/completion pairs.

``consensus sft --config ...``; the prompt is the zero-shot one (``deliberation.prompts.statement_prompt``), the
completion ``" " + statement`` and the end-of-sequence token, and only the completion is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from deliberation.datasets import read_table
from deliberation.types import InputError
from rl.data import sft_pairs
from rl.logs import JsonlLog
from rl.policy import check_model_keys, load_from_keys

COLUMNS = ("question", "opinions", "statement")


@dataclass
class SFTArguments(SFTConfig, ModelConfig):
    """Keys of ``trl.SFTConfig`` and ``trl.ModelConfig`` (model, attention, LoRA), and ours."""

    statements: str | None = None
    """Training data: a JSONL or Parquet file with the columns question, opinions, statement."""

    eval_statements: str | None = None
    """The same, of held-out topics; needed for an ``eval_strategy``."""

    shuffle_opinions: bool = True
    """Show every row's opinions in an order of its own (from ``seed``), so that no place in the prompt counts more."""

    bf16: bool | None = False
    """bfloat16 mixed precision. TRL would switch it on where it is not set; ours stays off until asked for."""

    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a fifth slower. TRL would switch it on."""

    gradient_checkpointing: bool | None = None  # type: ignore[assignment]
    """Old name of ``activation_checkpointing``."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        super().__post_init__()
        check_model_keys(self)


def _check_lengths(
    made: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | None, source: str
) -> None:
    """TRL cuts long rows at the end, which is the statement: refuse them instead."""
    if max_length is None:
        return
    for i, pair in enumerate(made):
        length = len(tokenizer(pair["prompt"] + pair["completion"]).input_ids) + 1  # the end-of-sequence token
        if length > max_length:
            mend = f"{source} row {i} has {length} tokens, so its statement would be cut; raise max_length"
            raise InputError("max_length", max_length, mend)


def train_sft(
    config: SFTArguments,
    rows: Sequence[dict[str, Any]],
    eval_rows: Sequence[dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """Fine-tune and save to ``config.output_dir`` (full model, or adapter with ``use_peft``; tokenizer, log, state).

    Args:
        rows: question, opinions, statement of every training example; ``eval_rows`` the same.

    Returns:
        The trainer, with the fine-tuned ``model``.

    Raises:
        InputError: on bad rows, a model that is an adapter already, or a row longer than ``max_length``.
    """
    # 1. Data, model; everything that can be wrong is found before anything is written.
    shuffled = {"shuffle_opinions": config.shuffle_opinions, "seed": config.seed}
    train = sft_pairs(rows, **shuffled)
    held_out = None if eval_rows is None else sft_pairs(eval_rows, **shuffled, source="eval_statements")
    model, tokenizer = load_from_keys(config)
    if isinstance(model, PeftModel):
        raise InputError("model_name_or_path", config.model_name_or_path, "is an adapter; start from a full model")
    _check_lengths(train, tokenizer, config.max_length, "statements")
    _check_lengths(held_out or [], tokenizer, config.max_length, "eval_statements")
    # 2. Train; TRL appends the end-of-sequence token to each completion.
    set_seed(config.seed)  # adapters start from random weights
    config.completion_only_loss = True
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=get_peft_config(config),
        callbacks=[JsonlLog(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    # 3. Save.
    trainer.save_model()
    trainer.save_state()
    return trainer


def main(config: SFTArguments) -> None:
    """``consensus sft``: read the data named in the config, fine-tune, save."""
    if not config.statements:
        mend = "give a JSONL or Parquet file with question, opinions, statement"
        raise InputError("statements", config.statements, mend)
    rows = read_table(config.statements, COLUMNS)
    eval_rows = read_table(config.eval_statements, COLUMNS) if config.eval_statements else None
    train_sft(config, rows, eval_rows)
    if config.process_index == 0:
        print(f"Policy fine-tuned on {len(rows)} statements: {config.output_dir}")
