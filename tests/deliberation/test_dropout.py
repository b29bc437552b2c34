"""Dropout is off wherever a library's model keeps its rates, in training mode too."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from deliberation.dropout import disable_dropout

SMALL = dict(vocab_size=260, hidden_size=32, num_attention_heads=4, pad_token_id=0)
LAYERS = {
    "llama": dict(intermediate_size=48, num_hidden_layers=1, attention_dropout=0.3),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=1, dropout=0.3, attention_dropout=0.3),
    "bloom": dict(n_layer=1, hidden_dropout=0.3, attention_dropout=0.3),
    "falcon": dict(num_hidden_layers=1, hidden_dropout=0.3, attention_dropout=0.3),
    "gpt2": dict(n_layer=1, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_passes_agree_once_dropout_is_off(name, lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **LAYERS[name]))
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    model.train()
    ids = torch.arange(3, 30)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the test can fail
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
