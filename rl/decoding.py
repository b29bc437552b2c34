"""Decoding many samples of a prompt over one key/value cache.

The samples of one prompt, or of several that begin alike, are the *query positions of one batch row*: at every step the
row's queries (of each sample still running its last token, and what is guessed to follow) read one shared cache, and a
4D mask lets each see its prompt and its own tokens only. So the prompt's cache is neither copied nor read once a
sample, and a finished sample costs nothing more. Exact for full attention (Llama, Qwen2, Qwen3 ...), which
``rl.policy.load_policy`` checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from deliberation.last_layer import last_feed_forward_at
from rl.lookup import MOST, Lookup, even_out
from rl.prompt_tree import PromptTree
from rl.value import backbone_of

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
        ids, logprobs: of each, its tokens so far and what they were drawn with.
        running: positions in ``samples`` still being extended.
        finished, has_text: of each, whether a stop ended it, whether it has more than blanks.
        last_two: of each, the last two tokens of its prompt and of what follows (-1 where there is none).
        held: of each, the places in the cache of its tokens.
        free: places of the row that were given back.
        used: places of the row that were ever given away, the prompt's included.
    """

    tree: PromptTree
    samples: list[tuple[int, int]]
    of_prompt: list[int]
    uniforms: Tensor
    ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    has_text: list[bool] = field(default_factory=list)
    last_two: list[tuple[int, int]] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    used: int = 0

    def __post_init__(self) -> None:
        count = len(self.samples)
        self.ids, self.held = [[] for _ in range(count)], [[] for _ in range(count)]
        self.logprobs = [[] for _ in range(count)]
        self.running, self.finished, self.has_text = list(range(count)), [False] * count, [False] * count
        ends = [[-1, *self.prompt(sample)[-2:]][-2:] for sample in range(count)]
        self.last_two = [(first, second) for first, second in ends]

    def prompt(self, sample: int) -> list[int]:
        """The sample's prompt."""
        return [self.tree.ids[node] for node in self.path(sample)]

    def path(self, sample: int) -> list[int]:
        """The nodes of the tree that the sample continues."""
        return self.tree.paths[self.of_prompt[sample]]

    def take(self, count: int) -> list[int]:
        """Places in the row's cache."""
        given = [self.free.pop() for _ in range(min(count, len(self.free)))]
        new = range(self.used, self.used + count - len(given))
        self.used = new.stop
        return [*given, *new]


@dataclass
class Places:
    """Where the next pass writes its keys and values, and how far it reads: the same for all layers.

    Attributes:
        index: [rows, queries], or None for one place after the other from the start.
        end: places that are read.
    """

    index: Tensor | None
    end: int


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, capacity, head_dim], written in place, returned as a view."""

    def __init__(self, capacity: int, places: Places):
        super().__init__()
        self.capacity, self.places = capacity, places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: a place that no query of a row has written yet is read, and weighs nothing only if it is a number
        rows, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.capacity, head_dim)
        self.values = value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        index, end = self.places.index, self.places.end
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if index is None:
                kept[:, :, :end] = states
            else:
                kept.scatter_(2, index[:, None, :, None].expand_as(states), states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.end, 0

    def get_seq_length(self) -> int:
        return self.places.end

    def get_max_length(self) -> int:
        return self.capacity

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only; copies the filled part."""
        assert self.keys is not None and self.values is not None
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(indices), *old.shape[1:])
            new[:, :, : self.places.end] = old[:, :, : self.places.end][indices]
            setattr(self, name, new)


@dataclass
class Reading:
    """What one pass reads: of some samples the last token and what is guessed to follow.

    Attributes:
        asked: (row, sample, guess, places in the cache), in the order of the queries.
        rows, cols, samples, steps: of every query its row and column in the batch, its sample, and the number of the
            token that is drawn after it. [queries] each.
    """

    asked: list[tuple[int, int, list[int], list[int]]]
    rows: Tensor
    cols: Tensor
    samples: Tensor
    steps: Tensor


class Batch:
    """Streams decoded together. Rows: streams; queries of a row: its samples', padded to the widest row."""

    def __init__(self, model: PreTrainedModel, streams: list[Stream], max_new_tokens: int):
        self.model, self.streams, self.device = model, streams, model.device
        self.max_new_tokens = max_new_tokens
        self.width = max(len(s.tree) for s in streams)  # trees are left-padded to this
        samples = max(len(s.samples) for s in streams)
        self.spare = self.width  # the place of queries that only pad
        capacity = self.width + 1 + samples * max_new_tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.places = Places(None, self.width)
        self.cache = Cache(layers=[InPlaceLayer(capacity, self.places) for _ in range(layers)])
        # What each sample may read: 0 or -inf, added to the attention scores. [rows, samples, capacity]
        self.seen = torch.full((len(streams), samples, capacity), -torch.inf, dtype=model.dtype, device=self.device)
        self.uniforms = torch.zeros(len(streams), samples, max_new_tokens, dtype=torch.float64)
        self.lengths = torch.zeros(len(streams), samples, dtype=torch.long)  # of each sample's prompt
        self.lookup = Lookup()
        for row, stream in enumerate(streams):
            stream.used = self.spare + 1
            self.uniforms[row, : len(stream.samples)] = stream.uniforms
            for sample in stream.running:
                path = stream.path(sample)
                self.lengths[row, sample] = len(path)
                self.seen[row, sample, self.width - len(stream.tree) + torch.tensor(path)] = 0
            for path in stream.tree.paths:
                self.lookup.read([stream.tree.ids[node] for node in path])
        self.uniforms, self.lengths = self.uniforms.to(self.device), self.lengths.to(self.device)

    def prefill(self) -> tuple[Reading, Tensor]:
        """Read the prompts. Returns every sample's last token of its prompt, and logits [rows, samples, vocabulary]."""
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
        read = (torch.arange(rows)[:, None] * width + kept).flatten().to(self.device)
        with last_feed_forward_at(backbone_of(self.model), read, ids.shape):
            logits = self._forward(ids.to(self.device), positions.to(self.device), mask, kept.to(self.device))
        reading = self._reading([[[] for _ in stream.running] for stream in self.streams], places=False)
        return reading, logits[torch.arange(rows, device=self.device)[:, None], place.to(self.device)]

    def keep(
        self, reading: Reading, tokens: list[int], logprobs: list[float], ends: Callable[[Stream, int, int], bool]
    ) -> None:
        """Append what was drawn after every query to its sample, as far as what was guessed before it was drawn.

        Args:
            ends: whether the token ends the stream's sample.
        """
        drawn = zip(tokens, logprobs, strict=True)
        kept: list[tuple[int, int, int]] = []
        for row, sample, guess, places in reading.asked:
            stream, found = self.streams[row], [next(drawn) for _ in range(1 + len(guess))]
            right = 0
            for token, logprob in found:
                stream.ids[sample].append(token)
                stream.logprobs[sample].append(logprob)
                stream.last_two[sample] = self.lookup.note(stream.last_two[sample], token)
                stream.finished[sample] = ends(stream, sample, token)
                if stream.finished[sample] or right == len(guess) or token != guess[right]:
                    break
                right += 1
            stream.held[sample] += places[: 1 + right]
            stream.free += places[1 + right :]
            kept += [(row, sample, place) for place in places[: 1 + right]]
            if stream.finished[sample] or len(stream.ids[sample]) == self.max_new_tokens:
                stream.running.remove(sample)
                stream.free += stream.held[sample]
        if kept:
            self.seen[torch.tensor(kept, device=self.device).unbind(-1)] = 0

    def read(self) -> tuple[Reading, Tensor]:
        """Read every running sample's last token, and a guess. Returns what was read, and logits [rows, queries, V]."""
        # 1. Guess
        guesses = [[self._guess(stream, sample) for sample in stream.running] for stream in self.streams]
        even_out(guesses)
        reading = self._reading(guesses, places=True)
        # 2. Lay the queries out; those that pad read what sample 0 reads, and nothing reads them
        rows, cols = reading.rows, reading.cols
        shape = len(self.streams), int(cols.max()) + 1
        ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        of_sample, steps, index = torch.zeros_like(ids), torch.ones_like(ids), torch.full_like(ids, self.spare)
        of_sample[rows, cols], steps[rows, cols] = reading.samples, reading.steps
        ids[rows, cols], index[rows, cols] = torch.tensor(
            [
                pair
                for row, sample, guess, places in reading.asked
                for pair in zip([self.streams[row].ids[sample][-1], *guess], places, strict=True)
            ],
            device=self.device,
        ).unbind(-1)
        self.places.index, self.places.end = index, max(stream.used for stream in self.streams)
        # 3. Each reads its sample's tokens, itself and the guesses before it
        every_row = torch.arange(shape[0], device=self.device)[:, None]
        mask = self.seen[every_row, of_sample, : self.places.end]
        queries, places = self._own_places(reading)
        mask[rows[queries], cols[queries], places] = 0
        return reading, self._forward(ids, self.lengths[every_row, of_sample] + steps - 1, mask)

    def _guess(self, stream: Stream, sample: int) -> list[int]:
        """What may follow the sample's last token, leaving room for the token that is drawn after it."""
        room = self.max_new_tokens - len(stream.ids[sample]) - 1
        return self.lookup.guess(stream.last_two[sample], min(MOST, room))

    def _own_places(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Of every query, and itself and each guess before it: the query's number, the place of what it reads."""
        found, first = [], 0
        for *_, places in reading.asked:
            found += [(first + j, place) for j in range(len(places)) for place in places[: j + 1]]
            first += len(places)
        queries, places = torch.tensor(found, device=self.device).unbind(-1)
        return queries, places

    def _reading(self, guesses: list[list[list[int]]], places: bool) -> Reading:
        """Queries for every running sample and its guess; ``places``: with places in the cache."""
        asked, queries = [], []
        for row, (stream, of_row) in enumerate(zip(self.streams, guesses, strict=True)):
            col = 0
            for sample, guess in zip(stream.running, of_row, strict=True):
                asked.append((row, sample, guess, stream.take(1 + len(guess)) if places else []))
                first = len(stream.ids[sample])
                queries += [(row, col + j, sample, first + j) for j in range(1 + len(guess))]
                col += 1 + len(guess)
        return Reading(asked, *torch.tensor(queries, device=self.device).unbind(-1))

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask[:, None],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits

    def drop_finished(self) -> bool:
        """Take finished streams out of the batch when enough have finished to pay for the copy. True if any runs on."""
        keep = [row for row, stream in enumerate(self.streams) if stream.running]
        if keep and len(keep) < DROP_BELOW * len(self.streams):
            index = torch.tensor(keep, device=self.device)
            self.streams = [self.streams[row] for row in keep]
            self.seen, self.uniforms, self.lengths = self.seen[index], self.uniforms[index], self.lengths[index]
            self.cache.batch_select_indices(index)
        return bool(keep)
