"""What the trainer's tests share: a trainer on a tiny random model, and simple rewards."""

from __future__ import annotations

import torch

from rl.trainer import PPOConfig, PPOTrainer

import tiny

ROWS = [{"prompt": "ab cd ef"[: 2 + i % 6] + f" {i}", "target": "e"} for i in range(11)]


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def ascii_share(prompts, completions, **columns):
    """Share of letters and blanks: something a random byte model gets a varied reward for."""
    return [sum(ch.isascii() and (ch.isalpha() or ch == " ") for ch in c) / max(1, len(c)) for c in completions]


def config(folder, **kwargs) -> PPOConfig:
    settings = dict(
        output_dir=str(folder),
        max_steps=2,
        num_prompts=4,
        num_generations=2,
        max_completion_length=6,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-3,
        disable_tqdm=True,
        seed=3,
        per_device_train_batch_size=4,
    )
    return PPOConfig(**{**settings, **kwargs})


def make_trainer(folder, reward=ascii_share, *, arch="llama", model=None, eval_dataset=None, rows=None, **kwargs):
    names = ("peft_config", "value_model", "callbacks")
    extra = {name: kwargs.pop(name) for name in names if name in kwargs}
    tokenizer = tiny.make_tokenizer()
    return PPOTrainer(
        model or tiny.make_policy(tokenizer, arch),
        reward,
        config(folder, **kwargs),
        rows or ROWS,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        **extra,
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
