"""Trains a few updates and saves the weights from rank 0: ``python distributed_run.py FOLDER LAYOUT+LAYOUT``."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from ppo_helpers import ROWS, ascii_share, make_trainer

from rl import value
from rl.gathering import whole_weights

import tiny

ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
ZERO_3 = {  # without the threshold, models as small as these would stay whole
    **ZERO_2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def with_deepspeed(settings: dict, joined: bool = True) -> dict:
    """Arguments for DeepSpeed where there is no accelerator: its processes must be joined by hand."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; this one would be compiled first
    if joined:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo", timeout=timedelta(seconds=300))  # a process that waits in vain must end
    return {"deepspeed": settings, "use_cpu": False, "accelerator_config": {"use_configured_state": joined}}


def main(folder: Path, layout: str) -> None:
    torch.manual_seed(0)
    layouts = {
        "head": dict,
        "value_model": lambda: {"value_model": tiny.make_judge(tiny.make_tokenizer())},
        "lora": lambda: {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])},
        "parts": lambda: setattr(value, "MAX_LOGITS", 1) or {},  # each token alone; there are more on one rank
        "checkpointing": lambda: {"activation_checkpointing": True},
        "best": lambda: {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_kl"},
        "zero_2": lambda: with_deepspeed(ZERO_2),
        "zero_2_alone": lambda: with_deepspeed(ZERO_2, joined=False),
        "zero_3": lambda: with_deepspeed(ZERO_3),
    }
    settings: dict = {"eval_steps": 3}
    for word in layout.split("+"):
        settings |= layouts[word]()
    model = tiny.make_policy(tiny.make_tokenizer())
    model.generation_config.eos_token_id = list(range(20, 125))  # processes sample unequally many tokens
    trainer = make_trainer(
        folder,
        ascii_share,
        model=model,
        eval_dataset=ROWS[:3],
        max_steps=3,
        max_completion_length=12,
        num_mini_batches=1,  # two would hold other prompts on two ranks than on one
        num_generations=3,
        per_device_train_batch_size=3,
        learning_rate=1e-4,  # Adam makes steps of rounding errors, of this size
        kl_target=0.01,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint="auto")
    with whole_weights(trainer.model_wrapped):
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        moved = max(float((weights[name] - start[name]).abs().max()) for name in start)
        torch.save(
            {"weights": weights, "moved": moved, "log": trainer.state.log_history, "beta": trainer.beta},
            folder / "end.pt",
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
