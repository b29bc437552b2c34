"""Tiny random models of the real architectures, built in milliseconds and without a hub."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 entries: every text round-trips, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_encoder_tokenizer(arch: str = "bert") -> PreTrainedTokenizerFast:
    """The same entries as an encoder's tokenizer: text pairs as BERT or RoBERTa write them."""
    raw = make_tokenizer().backend_tokenizer
    second, types = {"bert": ("$B:1 </s>:1", ["token_type_ids"]), "roberta": ("</s>:0 $B:0 </s>:0", [])}[arch]
    raw.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair=f"<s> $A </s> {second}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>",
        model_max_length=512, model_input_names=["input_ids", *types, "attention_mask"],
    )  # fmt: skip


def make_encoder(tokenizer: PreTrainedTokenizerFast, arch: str = "bert", seed: int = 0) -> PreTrainedModel:
    """A random one-label encoder (``bert``, or ``roberta``: offset positions, no token types, a head in two layers)."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if arch == "bert":
        return BertForSequenceClassification(BertConfig(max_position_embeddings=512, **sizes)).eval()
    roberta = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, **sizes)
    return RobertaForSequenceClassification(roberta).eval()


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_policy(tokenizer: PreTrainedTokenizerFast, arch: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random causal language model (``llama`` or ``qwen3``), in eval mode."""
    torch.manual_seed(seed)
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**_sizes(tokenizer))).eval()
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_sizes(tokenizer))).eval()


def make_judge(tokenizer: PreTrainedTokenizerFast, arch: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random one-label sequence classifier (``llama`` or ``qwen3``), in eval mode."""
    torch.manual_seed(seed)
    if arch == "llama":
        return LlamaForSequenceClassification(LlamaConfig(num_labels=1, **_sizes(tokenizer))).eval()
    return Qwen3ForSequenceClassification(Qwen3Config(head_dim=8, num_labels=1, **_sizes(tokenizer))).eval()
