"""Decoding many samples of a prompt over one key/value cache.

The samples of one prompt, or of several that begin alike, are the *query positions of one batch row*: at every step the
row's queries (one a sample still running) read one shared cache, and a 4D mask lets each see its prompt and its own
tokens only. So the prompt's cache is neither copied nor read once a sample, and a finished sample costs nothing more.
Exact for full attention (Llama, Qwen2, Qwen3 ...), which ``rl.policy.load_policy`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rl.prompt_tree import PromptTree

DROP_BELOW = 0.75
"""Finished prompts leave the batch (a copy of the cache) once fewer than this share of its rows still run."""


@dataclass
class Stream:
    """Samples that share a batch row.

    Attributes:
        tree: their prompts.
        samples: of each, (prompt in the call, number among that prompt's samples).
        of_prompt: of each, which of the tree's prompts it continues.
        uniforms: [samples, max_new_tokens] float64 in [0, 1).
        running: positions in ``samples`` still being extended.
    """

    tree: PromptTree
    samples: list[tuple[int, int]]
    of_prompt: list[int]
    uniforms: Tensor
    ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    has_text: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids, self.logprobs = [[] for _ in self.samples], [[] for _ in self.samples]
        self.running = list(range(len(self.samples)))
        self.has_text = [False for _ in self.samples]

    def path(self, sample: int) -> list[int]:
        """The nodes of the tree that the sample continues."""
        return self.tree.paths[self.of_prompt[sample]]


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, capacity, head_dim], written in place, returned as a view."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, head_dim)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only; copies the filled part."""
        assert self.keys is not None and self.values is not None
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(indices), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length][indices]
            setattr(self, name, new)


class Batch:
    """Streams decoded together. Rows: streams; queries of a row: its running samples, padded to the widest row."""

    def __init__(self, model: PreTrainedModel, streams: list[Stream], max_new_tokens: int):
        self.model, self.streams, self.device = model, streams, model.device
        self.width = max(len(s.tree) for s in streams)  # trees are left-padded to this
        samples = max(len(s.samples) for s in streams)
        capacity = self.width + samples * max_new_tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[InPlaceLayer(capacity) for _ in range(layers)])
        # What each sample may read: 0 or -inf, added to the attention scores. [rows, samples, capacity]
        self.seen = torch.full((len(streams), samples, capacity), -torch.inf, dtype=model.dtype, device=self.device)
        self.uniforms = torch.zeros(len(streams), samples, max_new_tokens, dtype=torch.float64)
        self.lengths = torch.zeros(len(streams), samples, dtype=torch.long)  # of each sample's prompt
        for row, stream in enumerate(streams):
            self.uniforms[row, : len(stream.samples)] = stream.uniforms
            for sample in stream.running:
                path = stream.path(sample)
                self.lengths[row, sample] = len(path)
                self.seen[row, sample, self.width - len(stream.tree) + torch.tensor(path)] = 0
        self.uniforms, self.lengths = self.uniforms.to(self.device), self.lengths.to(self.device)

    def layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every running sample: its row, its query column, its sample position. Three [running] tensors."""
        places = [(row, col, s) for row, stream in enumerate(self.streams) for col, s in enumerate(stream.running)]
        rows, cols, samples = torch.tensor(places, device=self.device).reshape(-1, 3).unbind(-1)
        return rows, cols, samples

    def prefill(self) -> Tensor:
        """Read the prompts. Returns the logits of the first new token, [rows, samples, vocabulary]."""
        rows, width = len(self.streams), self.width
        ids = torch.zeros(rows, width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        allowed = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)  # padding reads itself; nothing reads padding
        ends = torch.full((rows, self.seen.shape[1]), width - 1)  # the last token of each sample's prompt
        for row, stream in enumerate(self.streams):
            padding = width - len(stream.tree)
            ids[row, padding:] = torch.tensor(stream.tree.ids)
            positions[row, padding:] = stream.tree.positions()
            allowed[row, padding:, padding:] = stream.tree.seen()
            ends[row, : len(stream.samples)] = torch.tensor([padding + stream.path(i)[-1] for i in stream.running])
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf).to(self.device, self.model.dtype)
        kept, place = ends.unique(return_inverse=True)
        logits = self._forward(ids.to(self.device), positions.to(self.device), mask, kept.to(self.device))
        return logits[torch.arange(rows, device=self.device)[:, None], place.to(self.device)]

    def step(self, tokens: Tensor, new_tokens: int, layout: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Extend every running sample by its token. Returns logits [rows, queries, vocabulary].

        Args:
            tokens: [running] in the layout's order.
            new_tokens: how many tokens each of them has, this one included.
        """
        rows, cols, samples = layout
        shape = len(self.streams), int(cols.max()) + 1
        ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        ids[rows, cols] = tokens
        of_sample = torch.zeros_like(ids)  # padding queries read what sample 0 reads; nothing reads them
        of_sample[rows, cols] = samples
        start = self.cache.get_seq_length()
        self.seen[rows, samples, start + cols] = 0
        every_row = torch.arange(shape[0], device=self.device)[:, None]
        mask = self.seen[every_row, of_sample, : start + shape[1]]
        positions = self.lengths[every_row, of_sample] + (new_tokens - 1)
        return self._forward(ids, positions, mask)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask[:, None],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits

    def drop_finished(self) -> None:
        """Take finished streams out of the batch when enough have finished to pay for the copy."""
        keep = [row for row, stream in enumerate(self.streams) if stream.running]
        if not keep or len(keep) >= DROP_BELOW * len(self.streams):
            return
        index = torch.tensor(keep, device=self.device)
        self.streams = [self.streams[row] for row in keep]
        self.seen, self.uniforms, self.lengths = self.seen[index], self.uniforms[index], self.lengths[index]
        self.cache.batch_select_indices(index)
