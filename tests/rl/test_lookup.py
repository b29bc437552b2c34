"""Guessed tokens: looked up, laid out evenly, kept where they are right, and never seen in what is drawn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_policy_sampling import PROMPTS, SEEDS, gpt2, ids_of, naive, with_bias

from rl.decoding import Batch
from rl.lookup import MOST, Lookup, even_out
from rl.policy import sample

import tiny


def test_a_guess_goes_on_as_it_went_on_before_and_ends_where_nothing_is_known():
    lookup = Lookup()
    lookup.read([1, 2, 3, 4, 9, 1, 2, 5])
    assert lookup.guess((1, 2), 6) == [5]  # the last time counts
    assert lookup.guess((2, 3), 6) == [4, 9, 1, 2, 5]
    assert lookup.guess((2, 3), 2) == [4, 9]
    assert lookup.guess((3, 1), 6) == [] == lookup.guess((2, 3), 0)
    assert lookup.note((1, 2), 7) == (2, 7)
    assert lookup.guess((1, 2), 6) == [7]


@given(st.lists(st.lists(st.integers(0, MOST), min_size=0, max_size=5), min_size=1, max_size=6))
def test_no_row_is_wider_than_the_mean_row_and_guesses_lose_their_ends_alone(lengths):
    if not any(lengths):
        return
    rows = [[list(range(n)) for n in row] for row in lengths]
    before = copy.deepcopy(rows)
    even_out(rows)
    mean = sum(len(row) + sum(row) for row in lengths) / len(lengths)
    limit = max(math.ceil(mean), *(len(row) for row in lengths), 0)
    for row, old in zip(rows, before, strict=True):
        wanted = len(old) + sum(map(len, old))
        assert len(row) + sum(map(len, row)) == min(wanted, limit)
        assert all(new == was[: len(new)] for new, was in zip(row, old, strict=True))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_right_guesses_save_passes_and_wrong_ones_change_nothing(tiny_tokenizer, arch, monkeypatch):
    model = gpt2(tiny_tokenizer) if arch == "gpt2" else tiny.make_policy(tiny_tokenizer, arch)
    model = with_bias(model, t2=2.0, t65=9.0, t66=8.5)  # few tokens, so that what was said before is often said again
    guessed, passes, keep = [], [], Batch.keep

    def watched(batch, reading, tokens, logprobs, ends):
        passes.append(len(tokens))
        before = {(row, s): len(batch.streams[row].ids[s]) for row, s, *_ in reading.asked}
        streams = list(batch.streams)
        keep(batch, reading, tokens, logprobs, ends)
        guessed.extend(
            (len(guess), len(streams[row].ids[s]) - before[row, s] - 1) for row, s, guess, _ in reading.asked
        )

    monkeypatch.setattr(Batch, "keep", watched)
    got = sample(model, tiny_tokenizer, PROMPTS, n=5, seeds=SEEDS, max_new_tokens=24, stop_at_line_break=False)
    assert [ids_of(group) for group in got] == [
        naive(model, tiny_tokenizer, prompt, 5, seed, 24) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert any(right == of > 1 for of, right in guessed), "no guess of several tokens was right"
    assert any(0 < right < of for of, right in guessed), "no guess was right in part"
    assert any(right == 0 < of for of, right in guessed), "no guess was wrong"
    assert len(passes) < max(len(one.ids) for group in got for one in group)


def test_places_that_were_given_back_are_taken_again(tiny_policy, tiny_tokenizer, monkeypatch):
    """The cache has a place for each new token and no more, however many guesses were wrong."""
    model = with_bias(tiny_policy, t65=9.0, t66=8.5)
    batches, init = [], Batch.__init__

    def watched(batch, *args):
        init(batch, *args)
        batches.append((batch, batch.streams[0]))

    monkeypatch.setattr(Batch, "__init__", watched)
    sample(model, tiny_tokenizer, PROMPTS[:1], n=8, seeds=[1], max_new_tokens=30, stop_at_line_break=False)
    ((batch, stream),) = batches
    assert stream.used <= batch.seen.shape[-1] == batch.width + 1 + 8 * 30
    assert sorted(stream.free) == list(range(batch.width + 1, stream.used))  # all are back at the end
    assert torch.isfinite(batch.cache.layers[0].keys).all()
