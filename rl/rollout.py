"""Prompts -> completions -> rewards -> one documented batch. Lengths and finish flags, never sentinels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from deliberation.tokens import plain_ids
from deliberation.types import InputError
from rl import ppo, sampling

Prompt = str | list[dict]


@dataclass
class Rollout:
    """``B`` completions with everything PPO needs to know about them; ``T`` is the longest completion in tokens.

    Rows of one prompt are neighbours. Filled by :func:`collect` (texts and ids), then by the trainer, in this order.

    Attributes:
        prompts: the dataset's ``prompt`` (text or messages) of every row.
        columns: the dataset's other columns, one value a row.
        prompt_ids, completion_ids: token ids; a completion's include its stop token if it was produced.
        texts: completions as text, without special tokens: what reward functions read.
        finished: bool [B], the sampler's flag that a stop token was produced.
        drawn_logprobs: log-probabilities the tokens were drawn with; logged beside the trainer's, never trained on.
        num_generations: completions a prompt.
        mask: bool [B, T], from the lengths.
        rewards_per_func: [B, functions], NaN where a function gave None.
        raw_scores: [B], weighted sum of them, as the reward functions gave it.
        scored: bool [B], False where every function gave None; such a row trains nothing.
        scores: [B], after clip and missing-EOS penalty: what is optimised.
        old_logprobs, ref_logprobs, values: [B, T], by the training code path, before the first step.
        entropy: [B, T] of the old policy, nats.
        token_rewards, advantages, returns: [B, T].
    """

    prompts: list[Prompt]
    columns: dict[str, list]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: list[str]
    finished: Tensor
    drawn_logprobs: list[list[float]]
    num_generations: int
    mask: Tensor = field(init=False)
    rewards_per_func: Tensor = field(init=False)
    raw_scores: Tensor = field(init=False)
    scored: Tensor = field(init=False)
    scores: Tensor = field(init=False)
    old_logprobs: Tensor = field(init=False)
    ref_logprobs: Tensor = field(init=False)
    values: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    token_rewards: Tensor = field(init=False)
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(ids) for ids in self.completion_ids], device=self.finished.device)
        if int(lengths.min()) == 0:
            raise ValueError("the sampler gave a completion without tokens; a completion has at least its stop token")
        self.mask = ppo.length_mask(lengths)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """int64 [B], action tokens a row."""
        return self.mask.sum(dim=1)

    @property
    def train_mask(self) -> Tensor:
        """bool [B, T]: the action tokens of scored rows."""
        return self.mask & self.scored[:, None]

    def kl(self) -> tuple[Tensor, Tensor]:
        """KL(policy || reference) of every completion [B], nats: estimators k1 (unbiased) and k3 (never negative)."""
        k1, _, k3 = ppo.kl_estimators(self.old_logprobs, self.ref_logprobs)
        return (k1 * self.mask).sum(1), (k3 * self.mask).sum(1)

    def cpu(self) -> Rollout:
        """A copy whose tensors are on the CPU."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(twin, name, value.cpu())
        return twin

    def completions(self) -> list:
        """What reward functions get: text for text prompts, one assistant message for messages (TRL's contract)."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]


def merge(parts: list[Rollout]) -> Rollout:
    """Several ranks' rollouts as one, in their order; every tensor that is filled in, padded with 0 to the widest."""
    columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
    lists = {
        name: [value for part in parts for value in getattr(part, name)]
        for name in ("prompts", "prompt_ids", "completion_ids", "texts", "drawn_logprobs")
    }
    flags = torch.cat([part.finished for part in parts])
    whole = Rollout(columns=columns, finished=flags, num_generations=parts[0].num_generations, **lists)
    width = whole.mask.shape[1]
    for name, value in vars(parts[0]).items():
        if torch.is_tensor(value) and name not in ("finished", "mask"):
            tensors = [getattr(part, name) for part in parts]
            if value.shape == parts[0].mask.shape and name != "rewards_per_func":  # [B, T]
                tensors = [F.pad(x, (0, width - x.shape[1])) for x in tensors]
            setattr(whole, name, torch.cat(tensors))
    return whole


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text the policy continues: the prompt itself, or its messages through the chat template.

    Raises:
        InputError: on an empty prompt or one that is neither text nor messages.
    """
    if isinstance(prompt, str) and prompt:
        return prompt
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)):
        raise InputError("prompt", prompt, "must be non-empty text or a list of messages with role and content")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # A template may write the BOS token itself; the tokenizer would then add a second one.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of ``render_prompt``: a text prompt is data without special tokens, a chat template may write some."""
    text = render_prompt(tokenizer, prompt)
    return plain_ids(tokenizer, text) if isinstance(prompt, str) else list(tokenizer(text).input_ids)


def prompt_seeds(seed: int, step: int, first: int, count: int) -> list[int]:
    """One seed a prompt from the run's seed, the update and the prompt's place in the (global) update.

    No generator has a state to save: a resumed run samples exactly what the uninterrupted one would have.
    """
    return [((seed * 1_000_003 + step) * 1_000_003 + first + i) % (2**63 - 1) for i in range(count)]


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    *,
    num_generations: int,
    seeds: list[int],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    stop_at_line_break: bool,
    device: torch.device,
    sample: Callable | None = None,
) -> Rollout:
    """Sample ``num_generations`` completions of every row's ``prompt``: pure sampling, nothing filtered.

    Args:
        rows: dataset rows: ``prompt`` and further columns, which are repeated for every completion.
        seeds: one a row.
        sample: the sampler (default :func:`rl.sampling.sample`).
    """
    encoded = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    groups = (sample or sampling.sample)(
        model,
        tokenizer,
        encoded,
        n=num_generations,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0,
        batch_size=batch_size,
        stop_at_line_break=stop_at_line_break,
    )
    flat = [(i, one) for i, group in enumerate(groups) for one in group]
    columns = [name for name in rows[0] if name not in ("prompt", "completion", "completion_ids")]
    return Rollout(
        prompts=[rows[i]["prompt"] for i, _ in flat],
        columns={name: [rows[i][name] for i, _ in flat] for name in columns},
        prompt_ids=[encoded[i] for i, _ in flat],
        completion_ids=[list(one.ids) for _, one in flat],
        texts=[one.text for _, one in flat],
        finished=torch.tensor([one.finished for _, one in flat], device=device),
        drawn_logprobs=[one.logprobs for _, one in flat],
        num_generations=num_generations,
    )


def mini_batches(rollout: Rollout, count: int, micro_size: int, seed: int | None) -> list[list[Tensor]]:
    """One pass over a rollout: ``count`` mini-batches, each a list of micro-batches of at most ``micro_size`` rows.

    Row indices, on the CPU. A prompt's rows stay together. With ``seed`` None the prompts come in order: the old
    log-probabilities are computed in exactly these micro-batches, and the same tensor shapes give the same rounding, so
    that the first ratio is exactly 1; other passes are shuffled by their seed.
    """
    groups = torch.arange(len(rollout)).view(-1, rollout.num_generations)
    if seed is not None:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    lengths = torch.tensor([len(prompt) for prompt in rollout.prompt_ids])
    batches = []
    for rows in groups.flatten().chunk(count):
        by_length = rows[lengths[rows].argsort(stable=True)]  # less padding; stable: keeps groups together
        batches.append(list(by_length.split(micro_size)))
    return batches
