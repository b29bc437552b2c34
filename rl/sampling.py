"""Sampling statements from a policy: pure, reproducible, and the prompt computed once for all its samples.

What is repeated is guessed and read several tokens at a time (``rl.lookup``); no guess changes what is drawn.

Token ``t`` of sample ``i`` inverts the cumulative distribution at a uniform number that depends on (seed, i, t) alone:
not on n, on the other prompts, on their order, or on which samples have ended. Probabilities differ by rounding (about
1e-7) with the shape of the batch, so a draw can differ between two batchings with a chance of about 1e-6 a token; with
``batch_size <= n`` every prompt runs alone and the result is the same bit for bit on CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deliberation.tokens import plain_ids
from deliberation.types import InputError
from rl.decoding import Batch, Stream
from rl.drawing import draw, uniforms
from rl.prompt_tree import PromptTree, begins_alike


@dataclass(frozen=True)
class Sample:
    """One sampled completion.

    Attributes:
        text: the decoded completion, without special tokens (not cleaned: see ``clean_statement``).
        ids: the sampled token ids, the stop token included: the actions a policy loss is computed on.
        finished: whether a stop token ended it; False if it was cut at ``max_new_tokens``.
        logprobs: of the ids, as they were drawn (temperature and nucleus included). For comparison with the trainer's,
            never for its losses; not part of equality, as they differ by rounding between batches.
    """

    text: str
    ids: list[int]
    finished: bool
    logprobs: list[float] = field(compare=False)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All ids that end a completion: ``generation_config.eos_token_id`` (int or list) and the tokenizer's own EOS."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}


@lru_cache(maxsize=8)
def _line_breaks(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Token ids (with a line break; with one after text of their own; blank). Looked up once a tokenizer."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    breaks = {i for i, text in enumerate(texts) if "\n" in text}
    after_text = {i for i in breaks if "\n" in texts[i].lstrip()}
    blank = {i for i, text in enumerate(texts) if not text.strip()}
    return frozenset(breaks), frozenset(after_text), frozenset(blank)


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradient, and an attention kernel that takes a 4D mask; restores what was there."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention not in ("sdpa", "eager"):  # flash kernels take no 4D mask
        model.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            yield
    finally:
        if attention not in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
        model.train(training)


class _Stops:
    """When a completion ends: a stop id, or (for statements) a line break once there is text."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at_line_break: bool):
        self.ids = stop_token_ids(model, tokenizer)
        self.at_line_break = at_line_break
        self.breaks, self.after_text, self.blank = _line_breaks(tokenizer) if at_line_break else (frozenset(),) * 3

    def ends(self, stream: Stream, sample: int, token: int) -> bool:
        """Whether ``token``, its newest, ends the sample."""
        if token in self.ids:
            return True
        if not self.at_line_break:
            return False
        ends = token in self.after_text or (stream.has_text[sample] and token in self.breaks)
        stream.has_text[sample] |= token not in self.blank
        return ends


def _decode(batch: Batch, stops: _Stops, temperature: float, top_p: float) -> None:
    """Fill in the ids of the batch's streams."""
    # 1. Prompts.
    reading, logits = batch.prefill()
    while True:
        # 2. One token after every token that was read.
        uniform = batch.uniforms[reading.rows, reading.samples, reading.steps]
        tokens, logprobs = draw(logits[reading.rows, reading.cols], uniform, temperature, top_p)
        # 3. Keep them as far as the guesses were right. Who ends here?
        batch.keep(reading, tokens.tolist(), logprobs.tolist(), stops.ends)
        # 4. Make the batch smaller, read the new tokens and new guesses.
        if not batch.drop_finished():
            return
        reading, logits = batch.read()


def _check(
    prompts: Sequence[str | list[int]],
    seeds: Sequence[int],
    n: Sequence[int],
    counts: dict[str, int],
    temperature: float,
    top_p: float,
) -> None:
    for name, count in [*(("n", one) for one in n), *counts.items()]:
        if count < 1:
            raise InputError(name, count, "must be at least 1")
    for name, given in (("seeds", seeds), ("n", n)):
        if len(given) != len(prompts):
            raise InputError(name, f"{len(given)} {name}", f"give one a prompt: {len(prompts)}")
    if not temperature > 0:
        raise InputError("temperature", temperature, "must be above 0")
    if not 0 < top_p <= 1:
        raise InputError("top_p", top_p, "must be above 0 and at most 1")


def _prompt_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for i, prompt in enumerate(prompts):
        prompt_ids = plain_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
        if not prompt_ids:
            raise InputError(f"prompts[{i}]", prompt, "has no tokens; write at least one word")
        if limit is not None and len(prompt_ids) + max_new_tokens > limit:
            mend = f"with {max_new_tokens} new tokens is longer than the model's {limit} positions; shorten it"
            raise InputError(f"prompts[{i}]", f"{len(prompt_ids)} tokens", mend)
        found.append(prompt_ids)
    return found


def _streams(
    prompts: Sequence[list[int]], n: Sequence[int], seeds: Sequence[int], max_new_tokens: int, batch_size: int
) -> list[Stream]:
    """The work, longest first: neighbours that begin alike share a stream; none has more than ``batch_size`` samples,
    so that a prompt with more becomes several."""
    families: list[list[tuple[int, range]]] = []  # prompts, and which of their samples
    for i, prompt in enumerate(prompts):
        last = families[-1] if families else []
        room = batch_size - sum(len(samples) for _, samples in last)
        if last and n[i] <= room and begins_alike(prompts[last[0][0]], prompt):
            last.append((i, range(n[i])))
        else:
            families += [[(i, range(n[i])[start : start + batch_size])] for start in range(0, n[i], batch_size)]
    numbers = [uniforms(seed, count, max_new_tokens) for seed, count in zip(seeds, n, strict=True)]
    streams = [
        Stream(
            tree=PromptTree.of([prompts[i] for i, _ in family]),
            samples=[(i, k) for i, samples in family for k in samples],
            of_prompt=[place for place, (_, samples) in enumerate(family) for _ in samples],
            uniforms=torch.cat([numbers[i][list(samples)] for i, samples in family]),
        )
        for family in families
    ]
    return sorted(streams, key=lambda s: -len(s.tree))


def _batches(streams: Sequence[Stream], batch_size: int) -> Iterator[list[Stream]]:
    """Neighbours with at most ``batch_size`` samples together."""
    batch: list[Stream] = []
    for stream in streams:
        if batch and sum(len(one.samples) for one in [*batch, stream]) > batch_size:
            yield batch
            batch = []
        batch.append(stream)
    if batch:
        yield batch


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    *,
    n: int | Sequence[int],
    seeds: list[int],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    stop_at_line_break: bool = True,
) -> list[list[Sample]]:
    """Sample ``n`` completions of every prompt. Neighbours among the prompts that begin alike are read as one.

    Args:
        model: full-attention causal language model; left in the mode (train or eval) it came in.
        prompts: texts, in which special tokens are text like any other, or the token ids of a prompt that has some.
        n: samples of each prompt: a number for all, or one a prompt.
        seeds: one a prompt. The same (prompt, seed) gives the same samples alone or in any batch, and the first of
            them whatever ``n``.
        temperature: > 0, divides the logits. top_p: in (0, 1], the nucleus; 1 samples purely.
        batch_size: samples in flight at once.
        stop_at_line_break: end a completion at the first line break that follows text (a statement is one line).

    Returns:
        [prompts][n of that prompt] samples, in the order of ``prompts``.

    Raises:
        InputError: on an argument out of range or a prompt longer than the model can read.
    """
    each = list(n) if isinstance(n, Sequence) else [n] * len(prompts)
    _check(prompts, seeds, each, {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, temperature, top_p)
    stops = _Stops(model, tokenizer, stop_at_line_break)
    prompt_ids = _prompt_ids(model, tokenizer, prompts, max_new_tokens)
    streams = _streams(prompt_ids, each, seeds, max_new_tokens, batch_size)
    with generation_mode(model):
        for streams_together in _batches(streams, batch_size):
            _decode(Batch(model, streams_together, max_new_tokens), stops, temperature, top_p)
    found = {
        place: Sample(tokenizer.decode(ids, skip_special_tokens=True), ids, s.finished[k], logprobs)
        for s in streams
        for k, (place, ids, logprobs) in enumerate(zip(s.samples, s.ids, s.logprobs, strict=True))
    }
    return [[found[p, i] for i in range(count)] for p, count in enumerate(each)]
