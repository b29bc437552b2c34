"""One side of ``benchmarks.ppo_update``, in a process of its own: TRL's last PPOTrainer (in its own venv), or ours.

    python -m benchmarks._ppo_side --side trl|ours|recommended --updates 2

Every side builds its models here: Llama of 5.8 million parameters with random weights from one seed, a reward model of
the same size, prompts of 200 random tokens, 64 new ones (nothing ends a completion early). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

VOCABULARY, PROMPT, NEW = 4096, 200, 64
COMPLETIONS = 32
"""A update."""
OUR_PASS = 16
"""Completions we pass through the model at a time (our default; it changes no result, TRL's anchor takes all)."""
EPOCHS = 4
SHARED = dict(learning_rate=3e-6, num_ppo_epochs=EPOCHS, num_mini_batches=1, gamma=1.0, lam=0.95, temperature=0.7,
              seed=0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1)  # fmt: skip


def make_model(kind: type, **extra: Any) -> Any:
    """A Llama of 5.77 M parameters, random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    limits = dict(intermediate_size=768, max_position_embeddings=2048, tie_word_embeddings=True)
    return kind(LlamaConfig(**sizes, **tokens, **limits, **extra))


def make_tokenizer(eos: str | None = None) -> PreTrainedTokenizerFast:
    """Token k is the word ``wk``: any ids survive the way to text and back."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{k}": k for k in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", unk_token="w1", eos_token=eos, padding_side="left"
    )


def make_prompts(count: int) -> list[list[int]]:
    """Random token ids, [count, 200]."""
    return torch.randint(2, VOCABULARY, (count, PROMPT), generator=torch.Generator().manual_seed(7)).tolist()


class Clock(TrainerCallback):
    """Seconds of this process's CPU at the end of every update."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks.append(time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(time.process_time())


def trl_side(updates: int, folder: str) -> Clock:
    """TRL 1.12: separate value and reward models, all completions of an update in one micro-batch.

    It needs a tokenizer with an end token; its sampling does not stop there.
    """
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock = Clock()
    policy, reference = make_model(LlamaForCausalLM), make_model(LlamaForCausalLM)
    value, reward = (make_model(LlamaForSequenceClassification, num_labels=1) for _ in range(2))
    args = PPOConfig(output_dir=folder, per_device_train_batch_size=COMPLETIONS, total_episodes=COMPLETIONS * updates,
                     gradient_accumulation_steps=1, response_length=NEW, local_rollout_forward_batch_size=COMPLETIONS,
                     num_sample_generations=0, bf16=False, gradient_checkpointing=False, kl_coef=0.05,
                     **SHARED)  # fmt: skip
    prompts = Dataset.from_dict({"input_ids": make_prompts(COMPLETIONS * updates)})
    trainer = PPOTrainer(args=args, processing_class=make_tokenizer("w1"), model=policy, ref_model=reference,
                         reward_model=reward, value_model=value, train_dataset=prompts,
                         callbacks=[clock])  # fmt: skip
    trainer.train()
    return clock


def our_side(updates: int, folder: str, recommended: bool, bf16: bool) -> Clock:
    """Ours: TRL's settings (one completion a prompt, separate value model, fp32), or those we recommend.

    Recommended: four completions of a prompt, which share its computation (the reward model's too, by
    ``reward.scoring``), a value head on the policy's backbone, and bfloat16 where ``autocast_is_faster``.
    """
    from reward.calibration import Calibration
    from reward.preference import PreferenceModel
    from reward.scoring import score_rows
    from rl.trainer import PPOConfig, PPOTrainer

    clock, tokenizer = Clock(), make_tokenizer()
    classifier = make_model(LlamaForSequenceClassification, num_labels=1)
    reward = PreferenceModel(classifier, tokenizer, Calibration.of_ratings([1, 7], (1, 7)))

    def reward_model(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        distinct = list(dict.fromkeys(prompts))
        prefixes, suffixes = ([tuple(ids) for ids in tokenizer(texts).input_ids] for texts in (distinct, completions))
        return score_rows(reward, prefixes, suffixes, [distinct.index(prompt) for prompt in prompts]).raw.tolist()

    generations = 4 if recommended else 1
    args = PPOConfig(output_dir=folder, max_steps=updates, num_prompts=COMPLETIONS // generations,
                     num_generations=generations, per_device_train_batch_size=OUR_PASS, beta=0.05,
                     max_completion_length=NEW, rollout_batch_size=COMPLETIONS, stop_at_line_break=False,
                     bf16=bf16, **SHARED)  # fmt: skip
    rows = [{"prompt": text} for text in tokenizer.batch_decode(make_prompts(args.num_prompts * updates))]
    value = None if recommended else make_model(LlamaForSequenceClassification, num_labels=1)
    trainer = PPOTrainer(make_model(LlamaForCausalLM), reward_model, args, rows, processing_class=tokenizer,
                         value_model=value, callbacks=[clock])  # fmt: skip
    trainer.train()
    return clock


def autocast_is_faster() -> bool:
    """Whether this machine multiplies bfloat16 matrices of the work's size faster than float32 ones (medians of 9)."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):
        for dtype, found in seconds.items():
            a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
            start = time.process_time()
            for _ in range(5):
                a @ b
            found.append(time.process_time() - start)
    fp32, bf16 = (statistics.median(found[1:]) for found in seconds.values())  # the first call sets up
    return bf16 < 0.8 * fp32


def main() -> None:
    """Run one side, print CPU seconds an update (the first is left out where there are more) and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("trl", "ours", "recommended"), required=True)
    parser.add_argument("--updates", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bf16 = args.side == "recommended" and autocast_is_faster()
    with tempfile.TemporaryDirectory(prefix="ppo-side-") as folder:
        if args.side == "trl":
            clock = trl_side(args.updates, folder)
        else:
            clock = our_side(args.updates, folder, args.side == "recommended", bf16)
    seconds = [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"side": args.side, "cpu_s": seconds[1:] or seconds, "peak_gib": round(peak, 3), "bf16": bf16}))


if __name__ == "__main__":
    main()
