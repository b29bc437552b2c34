"""Trains a few updates and saves the weights from rank 0: ``python distributed_run.py FOLDER LAYOUT``, on any ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from ppo_helpers import ROWS, ascii_share, make_trainer

import tiny

ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def with_deepspeed(joined: bool) -> dict:
    """Arguments for DeepSpeed where there is no accelerator: its processes must be joined by hand."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does; this one would be compiled first
    if joined:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    return {"deepspeed": ZERO_2, "use_cpu": False, "accelerator_config": {"use_configured_state": joined}}


def main(folder: Path, layout: str) -> None:
    torch.manual_seed(0)
    layouts = {
        "head": dict,
        "value_model": lambda: {"value_model": tiny.make_judge(tiny.make_tokenizer())},
        "lora": lambda: {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])},
        "zero_2": lambda: with_deepspeed(joined=True),
        "zero_2_alone": lambda: with_deepspeed(joined=False),
    }
    trainer = make_trainer(
        folder,
        ascii_share,
        eval_dataset=ROWS[:3],
        max_steps=3,
        num_mini_batches=1,  # two would hold other prompts on two ranks than on one
        num_generations=3,
        per_device_train_batch_size=3,
        learning_rate=1e-4,  # Adam makes steps of rounding errors, of this size
        kl_target=0.01,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=1,
        **layouts[layout](),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint="auto")
    if trainer.is_world_process_zero():
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        moved = max(float((weights[name] - start[name]).abs().max()) for name in start)
        torch.save(
            {"weights": weights, "moved": moved, "log": trainer.state.log_history, "beta": trainer.beta},
            folder / "end.pt",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
