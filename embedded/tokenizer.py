"""The embedded models' tokenizer: byte-level BPE, learnt from the training world only."""

from __future__ import annotations

import re
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embedded.corpus import writer_document
from embedded.words import Pieces

VOCABULARY = 4096
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def train_tokenizer(documents: int = 30_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Learn the merges from ``documents`` training documents. Any text round-trips, byte by byte if need be."""
    rng = Random(f"tokenizer {seed}")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        show_progress=False,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(("".join(writer_document(rng)) for _ in range(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=2048,
    )


def word_pieces(tokenizer: PreTrainedTokenizerFast) -> Pieces:
    """The vocabulary's lower-case pieces of two letters or more: those that start a word, those that go on with one."""
    vocabulary = sorted(tokenizer.get_vocab())
    starts = tuple(t[1:] for t in vocabulary if re.fullmatch("Ġ[a-z]{2,}", t))
    return starts, tuple(t for t in vocabulary if re.fullmatch("[a-z]{2,}", t))
