"""One side of ``benchmarks.ppo_curves``: TRL's last PPOTrainer (in its own venv) or ours, rewarded by citizens.

    python -m benchmarks._ppo_citizens_side --side trl|ours --seed 0

Both start from the same writer, with a value model of their own from its weights, and see the same prompts, each once,
one completion each. Prints one JSON line: the mean reward of every update's completions, before it learns from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from deliberation.citizens import Group, draw_group
from deliberation.prompts import clean_statement, statement_prompt
from deliberation.questions import load_questions
from embedded import resolve
from evaluation.gold import CitizenGold

PROMPTS, NEW = 32, 64
"""Of an update, and new tokens a completion at most."""
SHARED = dict(learning_rate=3e-4, num_ppo_epochs=2, num_mini_batches=2, gamma=1.0, lam=0.95, temperature=0.7,
              vf_coef=0.1, cliprange=0.2, cliprange_value=0.2, missing_eos_penalty=1.0, use_cpu=True, report_to=[],
              save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1)  # fmt: skip
"""Settings of both; in all else each trainer's own defaults."""
BETA = 0.05


class Citizens:
    """Groups and their mean agreement (1 to 7, without noise) with what is said to them; keeps every batch's mean."""

    def __init__(self, count: int, seed: int):
        questions, rng = load_questions("train"), Random(f"curves {seed}")
        self.groups: list[Group] = [draw_group(rng.choice(questions), rng) for _ in range(count)]
        self.gold, self.means = CitizenGold(self.groups), []  # type: CitizenGold, list[float]
        self.prompts = [statement_prompt(g.question.text, [c.opinion for c in g.citizens]) for g in self.groups]

    def rewards(self, numbers: list[int], texts: list[str]) -> list[float]:
        """The group's mean agreement with each text; ``numbers`` are those of the groups."""
        found = [
            float(self.gold.rate(k, [clean_statement(text)]).agreement.mean())
            for k, text in zip(numbers, texts, strict=True)
        ]
        self.means.append(sum(found) / len(found))
        return found


class CitizensModel(nn.Module):
    """The citizens in the shape TRL asks for: a backbone whose hidden states are the token ids, and a ``score``."""

    base_model_prefix = "backbone"

    def __init__(self, citizens: Citizens, tokenizer: Any):
        super().__init__()
        self.citizens, self.tokenizer = citizens, tokenizer
        self.known = [tuple(tokenizer(prompt).input_ids) for prompt in citizens.prompts]

    def backbone(self, input_ids: Tensor, **ignored: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1)])

    def score(self, ids: Tensor) -> Tensor:
        """Token ids [B, L, 1], padding 0 on both sides -> the completion's reward at every position [B, L, 1]."""
        numbers, texts = [], []
        for row in ids.squeeze(-1).tolist():
            said = [token for token in row if token]
            number = next(k for k, prompt in enumerate(self.known) if tuple(said[: len(prompt)]) == prompt)
            numbers.append(number)
            texts.append(self.tokenizer.decode(said[len(self.known[number]) :], skip_special_tokens=True))
        return torch.tensor(self.citizens.rewards(numbers, texts))[:, None, None].expand(ids.shape).clone()


def value_model(path: str) -> Any:
    """The writer's backbone with a score of zeros."""
    model = LlamaForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    nn.init.zeros_(model.score.weight)
    return model


def trl_side(path: str, citizens: Citizens, tokenizer: Any, updates: int, seed: int, folder: str) -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    args = PPOConfig(output_dir=folder, per_device_train_batch_size=PROMPTS, total_episodes=PROMPTS * updates,
                     gradient_accumulation_steps=1, response_length=NEW, local_rollout_forward_batch_size=PROMPTS,
                     num_sample_generations=0, bf16=False, gradient_checkpointing=False, kl_coef=BETA, seed=seed,
                     stop_token="eos", **SHARED)  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [tokenizer(prompt).input_ids for prompt in citizens.prompts]})
    trainer = PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=reference,
                         reward_model=CitizensModel(citizens, tokenizer), value_model=value_model(path),
                         train_dataset=rows)  # fmt: skip
    trainer.train()


def our_side(path: str, citizens: Citizens, tokenizer: Any, updates: int, seed: int, folder: str) -> None:
    from rl.trainer import PPOConfig, PPOTrainer

    def reward(prompts: list[str], completions: list[str], number: list[int], **columns: Any) -> list[float]:
        return citizens.rewards(number, completions)

    args = PPOConfig(output_dir=folder, max_steps=updates, num_prompts=PROMPTS, num_generations=1, beta=BETA, seed=seed,
                     max_completion_length=NEW, **SHARED)  # fmt: skip
    rows = [{"prompt": prompt, "number": k} for k, prompt in enumerate(citizens.prompts)]
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    PPOTrainer(policy, reward, args, rows, processing_class=tokenizer, value_model=value_model(path)).train()


def main() -> None:
    """Train one side with one seed; print the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("trl", "ours"), required=True)
    parser.add_argument("--policy", default="embedded/writer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path, citizens = resolve(args.policy), Citizens(PROMPTS * args.updates, args.seed)
    side = trl_side if args.side == "trl" else our_side
    with tempfile.TemporaryDirectory(prefix="ppo-citizens-") as folder:
        side(path, citizens, AutoTokenizer.from_pretrained(path), args.updates, args.seed, folder)
    print(json.dumps({"side": args.side, "seed": args.seed, "reward": [round(x, 4) for x in citizens.means]}))


if __name__ == "__main__":
    main()
