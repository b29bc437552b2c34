"""A model is tried once, where its use begins: alone and in a batch it must read the same."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForSequenceClassification,
)

from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from reward.probe import check_reading

import tiny

TOKENIZER = tiny.make_tokenizer()
SIZES = dict(
    vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, max_position_embeddings=512,
)  # fmt: skip
PAIRS = {"mobilebert": dict(embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32)}
PAIRS |= {"albert": dict(embedding_size=16), "bert": {}, "roberta": {}, "electra": dict(embedding_size=32)}
BART = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)


def make(name, **keys):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **{**SIZES, **keys})).eval()


def refused(model, shares=True, reads_types=False):
    with pytest.raises(InputError) as error:
        check_reading(model, shares, reads_types, "base")
    assert error.value.field == "base"
    return error.value


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_models_that_share_prefixes_pass_and_are_left_as_they_were(arch):
    model = tiny.make_judge(TOKENIZER, arch=arch).train()
    state = torch.random.get_rng_state()
    check_reading(model, True, False, "base")
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("reads_types", [False, True])
def test_a_bert_passes_with_and_without_types_in_both_attentions(reads_types):
    model = tiny.make_encoder(tiny.make_encoder_tokenizer())
    for shares in (False, True):
        check_reading(model, shares, reads_types, "base")


@pytest.mark.parametrize(
    "name, keys",
    [
        ("gpt_neo", dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])),  # a window of 256
        ("mpt", dict(d_model=32, n_heads=4, n_layers=2)),  # ALiBi by place
        ("llama", dict(is_causal=False)),
        ("qwen3", dict(head_dim=8, num_key_value_heads=2, is_causal=False)),
        ("gemma2", dict(head_dim=8, num_key_value_heads=2)),
        ("openai-gpt", dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)),
    ],
)
def test_causal_models_that_read_otherwise_after_a_shared_prefix_are_refused(name, keys):
    assert refused(make(name, **keys)).value == name


def test_sliding_windows_and_convolutions_are_refused():
    window = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=128)
    assert "cache" in refused(MistralForSequenceClassification(window).eval()).mend
    convolving = Lfm2ForCausalLM(Lfm2Config(**SIZES, num_key_value_heads=2, full_attn_idxs=[1])).eval()
    convolving.score = torch.nn.Linear(32, 1)
    assert "conv" in refused(convolving).mend


@pytest.mark.parametrize("name", PAIRS)
def test_encoders_of_text_pairs_pass_and_prefix_attention_is_for_those_that_take_its_mask(name):
    model = make(name, **PAIRS[name])
    check_reading(model, False, True, "base")
    if name != "bert":
        assert "attention: pair" in refused(model, reads_types=True).mend


@pytest.mark.parametrize("name, keys", [("fnet", {}), ("nystromformer", {}), ("bart", dict(d_model=32, **BART))])
def test_encoders_whose_score_depends_on_the_padding_or_that_have_another_head_are_refused(name, keys):
    assert refused(make(name, **keys), shares=False).value == name


def test_a_folder_of_such_a_model_is_not_loaded(tmp_path):
    calibration = Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0))
    PreferenceModel(make("mpt", d_model=32, n_heads=4, n_layers=2), TOKENIZER, calibration).save(tmp_path / "m")
    with pytest.raises(InputError, match="mpt") as error:
        PreferenceModel.load(tmp_path / "m")
    assert error.value.field == "preference_model"
