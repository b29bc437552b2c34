"""Shared-prefix scores equal one-by-one scores, whatever the order, batch, padding or architecture."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from deliberation.prompts import preference_prefix, preference_suffix
from deliberation.types import InputError, Rating
from reward import scoring
from reward.heads import apply_head, head_of
from reward.preference import Calibration, PreferenceModel
from reward.prefix_cache import PrefixCache
from reward.prefixes import pad, prefix_states, shared_states, suffix_features
from reward.scoring import score, score_one_by_one, score_ratings

import tiny

CALIBRATION = Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0), slope=2.0)
QUESTION = "Should buses be free?"
OPINIONS = ["Yes.", "Only if the council can pay for it without closing libraries.", "No, never; riders should pay."]
STATEMENTS = ["Free.", "Buses should be free for those who need it most.", "No.", "Let us try it for a year first."]


def preference_model(arch="llama", seed=0):
    tokenizer = tiny.make_tokenizer()
    return PreferenceModel(tiny.make_judge(tokenizer, arch=arch, seed=seed), tokenizer, CALIBRATION)


MODEL = preference_model()


def absolute_positions():
    """GPT-2: learned absolute positions, where a wrong position id cannot hide as it can with RoPE."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return PreferenceModel(GPT2ForSequenceClassification(config).eval(), tokenizer, CALIBRATION)


def same(a, b):
    np.testing.assert_allclose(a.raw, b.raw, atol=1e-5, rtol=0)
    np.testing.assert_allclose(a.utilities, b.utilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [preference_model, lambda: preference_model("qwen3"), absolute_positions])
@pytest.mark.parametrize("batch_tokens", [1, 150, 600, 100_000])
def test_equals_one_by_one_for_any_batch(make, batch_tokens):
    model = make()
    reference = score_one_by_one(model, QUESTION, OPINIONS, STATEMENTS)
    assert reference.raw.std() > 1e-2  # the rows differ, so that agreement means something
    same(score(model, QUESTION, OPINIONS, STATEMENTS, batch_tokens=batch_tokens), reference)


@settings(max_examples=15)
@given(
    st.lists(st.text("ab é.", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=4),
    st.lists(st.text("abc d.", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=5),
    st.integers(1, 400),
)
def test_equals_one_by_one_for_any_text(opinions, statements, batch_tokens):
    same(
        score(MODEL, QUESTION, opinions, statements, batch_tokens=batch_tokens),
        score_one_by_one(MODEL, QUESTION, opinions, statements),
    )


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_last_feed_forward_network_runs_for_the_last_token_of_each_statement_alone(arch):
    model, seen = preference_model(arch), []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, k=k: seen.append((k, args[0].shape[:-1].numel())))
        for k, layer in enumerate(model.model.model.layers)
    ]
    score(model, QUESTION, OPINIONS, STATEMENTS)
    for hook in hooks:
        hook.remove()
    of_last = sum(rows for k, rows in seen if k == len(hooks) - 1)
    assert of_last == len(set(OPINIONS)) * len(set(STATEMENTS)) < sum(rows for k, rows in seen if k == 0) / 10


def test_order_changes_nothing():
    forward = score(MODEL, QUESTION, OPINIONS, STATEMENTS)
    backward = score(MODEL, QUESTION, OPINIONS[::-1], STATEMENTS[::-1])
    np.testing.assert_allclose(backward.raw[::-1, ::-1], forward.raw, atol=1e-5, rtol=0)


def test_one_member_and_one_statement():
    alone = score(MODEL, QUESTION, OPINIONS[1:2], STATEMENTS[2:3])
    assert alone.raw.shape == alone.utilities.shape == (1, 1)
    assert alone.raw.dtype == alone.utilities.dtype == np.float32
    together = score(MODEL, QUESTION, OPINIONS, STATEMENTS)
    assert alone.raw[0, 0] == pytest.approx(together.raw[1, 2], abs=1e-5)


def test_utilities_are_the_calibrated_scores():
    scores = score(MODEL, QUESTION, OPINIONS, STATEMENTS)
    np.testing.assert_allclose(scores.utilities, CALIBRATION.utilities(scores.raw), rtol=1e-6)


def suffix_scores(model, *rows):
    return apply_head(head_of(model), suffix_features(model, *rows, reads_types=False))[:, 0]


def test_prefixes_once_and_equal_texts_once(monkeypatch):
    seen = {"prefixes": 0, "rows": 0}

    def count_prefixes(model, prefixes, device):
        seen["prefixes"] += len(prefixes)
        return shared_states(model, prefixes, device)

    def count_rows(model, states, ids, lengths, owners, **keys):
        seen["rows"] += len(ids)
        return suffix_features(model, states, ids, lengths, owners, **keys)

    monkeypatch.setattr(scoring, "shared_states", count_prefixes)
    monkeypatch.setattr(scoring, "suffix_features", count_rows)
    opinions, statements = [*OPINIONS, OPINIONS[0]], [*STATEMENTS, STATEMENTS[1], " " + STATEMENTS[1] + "\n"]
    scores = score(MODEL, QUESTION, opinions, statements, batch_tokens=200)
    assert seen == {"prefixes": 3, "rows": 12}
    np.testing.assert_array_equal(scores.raw[0], scores.raw[3])
    np.testing.assert_array_equal(scores.raw[:, 1], scores.raw[:, 5])
    same(scores, score_one_by_one(MODEL, QUESTION, opinions, statements))


def test_the_question_runs_once_for_all_members(monkeypatch):
    tokens = []
    forward = MODEL.model.model.forward
    monkeypatch.setattr(
        MODEL.model.model, "forward", lambda **kw: tokens.append(int(kw["input_ids"].numel())) or forward(**kw)
    )
    question = "Should buses be free? " * 8
    scores = score(MODEL, question, OPINIONS, STATEMENTS[:1])
    monkeypatch.undo()
    shared = len(MODEL.prefix_ids(question, ""))
    whole = sum(len(MODEL.prefix_ids(question, opinion)) for opinion in OPINIONS)
    assert sum(tokens) < whole - shared  # padding and statements included, it is less than the prefixes alone
    same(scores, score_one_by_one(MODEL, question, OPINIONS, STATEMENTS[:1]))


@pytest.mark.parametrize("prefixes", [[[5, 6, 7]], [[5] * 20, [5] * 9, [5] * 8 + [6] * 30], [[5, 6], [7, 8, 9]]])
def test_shared_states_equal_those_of_each_prefix_alone(prefixes):
    with torch.no_grad():
        together = shared_states(MODEL.model, prefixes, "cpu")
        assert together.lengths.tolist() == [len(p) for p in prefixes]
        for member, prefix in zip(together.split(), prefixes, strict=True):
            alone = prefix_states(MODEL.model, *pad([prefix])).split()[0]
            for ours, reference in zip(member, alone, strict=True):
                torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


# --- prefixes kept across calls


def test_a_cache_keeps_members_across_calls_and_changes_no_score():
    cache = PrefixCache()
    for opinions in (OPINIONS[:2], OPINIONS, OPINIONS[::-1]):
        same(
            score(MODEL, QUESTION, opinions, STATEMENTS, cache=cache),
            score_one_by_one(MODEL, QUESTION, opinions, STATEMENTS),
        )
    assert (cache.hits, cache.misses) == (2 + 3, 2 + 1)


def test_a_cache_is_bounded_and_drops_what_was_used_least_recently():
    one = PrefixCache()
    score(MODEL, QUESTION, OPINIONS[:1], STATEMENTS[:1], cache=one)
    cache = PrefixCache(max_bytes=int(one.bytes * 2.5))
    for opinion in ("Yes.", "Noo.", "Yes.", "Why."):  # "Noo." goes, not "Yes."
        score(MODEL, QUESTION, [opinion], STATEMENTS[:1], cache=cache)
        assert cache.bytes <= cache.max_bytes
    before = cache.misses
    score(MODEL, QUESTION, ["Yes.", "Why."], STATEMENTS[:1], cache=cache)
    assert cache.misses == before
    score(MODEL, QUESTION, ["Noo."], STATEMENTS[:1], cache=cache)
    assert cache.misses == before + 1


def test_a_prefix_larger_than_the_cache_is_scored_and_not_kept():
    cache = PrefixCache(max_bytes=10)
    same(score(MODEL, QUESTION, OPINIONS, STATEMENTS, cache=cache), score(MODEL, QUESTION, OPINIONS, STATEMENTS))
    assert cache.bytes == 0


# --- encoders


def encoder(arch):
    """A tiny random BERT (with token types) or RoBERTa (offset positions, a head in two layers)."""
    torch.manual_seed(0)
    tokenizer = tiny.make_encoder_tokenizer(arch)
    return PreferenceModel(tiny.make_encoder(tokenizer, arch), tokenizer, CALIBRATION)


@pytest.mark.parametrize("arch", ["bert", "roberta"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_encoders_equal_one_by_one_and_the_plain_text_pair(arch, batch_tokens):
    model = encoder(arch)
    scores = score(model, QUESTION, [*OPINIONS, OPINIONS[0]], STATEMENTS, batch_tokens=batch_tokens)
    reference = score_one_by_one(model, QUESTION, [*OPINIONS, OPINIONS[0]], STATEMENTS)
    assert reference.raw.std() > 1e-2
    same(scores, reference)
    pair = model.tokenizer(
        preference_prefix(QUESTION, OPINIONS[1]), preference_suffix(STATEMENTS[2]), return_tensors="pt"
    )
    with torch.no_grad():
        assert scores.raw[1, 2] == pytest.approx(model.model(**pair).logits[0, 0].item(), abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_prefix_attention_of_an_encoder_shares_prefixes_and_equals_the_plain_model_with_its_mask(batch_tokens):
    model = encoder("bert")
    pair = score_one_by_one(model, QUESTION, OPINIONS, STATEMENTS)
    model.attention = "prefix"
    reference = score_one_by_one(model, QUESTION, OPINIONS, STATEMENTS)
    assert np.abs(reference.raw - pair.raw).max() > 1e-3  # the mask is another model
    cache = PrefixCache()
    for keep in (None, cache, cache):
        same(score(model, QUESTION, OPINIONS, STATEMENTS, batch_tokens=batch_tokens, cache=keep), reference)
    assert cache.hits == 3


@pytest.mark.parametrize("types", [1, 2])
def test_prefix_attention_of_a_bert_whose_tokenizer_makes_no_types_reads_none(types):
    torch.manual_seed(0)
    tokenizer = tiny.make_encoder_tokenizer("roberta")
    network = tiny.make_encoder(tokenizer, "bert")
    network.bert.embeddings.token_type_embeddings = torch.nn.Embedding(types, 32)
    model = PreferenceModel(network, tokenizer, CALIBRATION, attention="prefix")
    same(score(model, QUESTION, OPINIONS, STATEMENTS), score_one_by_one(model, QUESTION, OPINIONS, STATEMENTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_attention_masks_the_padding_also_in_eager_attention(dtype):
    model = encoder("bert")
    model.attention = "prefix"
    found = {}
    for implementation in ("sdpa", "eager"):
        model.model.set_attn_implementation(implementation)
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            found[implementation] = score(model, QUESTION, ["short", "word " * 20], STATEMENTS).raw
            slow = score_one_by_one(model, QUESTION, ["short", "word " * 20], STATEMENTS).raw
        np.testing.assert_allclose(slow, found[implementation], atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0)
    np.testing.assert_allclose(found["eager"], found["sdpa"], atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("make", [preference_model, lambda: encoder("bert")])
def test_threads_may_share_a_model_and_a_cache(make):
    model, cache = make(), PrefixCache(max_bytes=30_000)
    groups = [(f"Question {k}?", [f"opinion {k}", "the same"], STATEMENTS) for k in range(8)]
    expected = [score(model, *group).raw for group in groups]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda k: score(model, *groups[k % 8], cache=cache).raw, range(64)))
    for k, raw in enumerate(found):
        np.testing.assert_allclose(raw, expected[k % 8], atol=1e-5, rtol=0)
    assert cache.bytes == sum(t.nbytes for states in cache._kept.values() for layer in states for t in layer)


# --- texts that do not fit


def test_an_opinion_that_does_not_fit_is_an_error_that_names_the_member_or_is_cut_with_a_warning():
    model = small_context(120)
    opinions = ["short", "word " * 40, "also short"]
    with pytest.raises(InputError) as error:
        score(model, "Q?", opinions, ["yes", "no"])
    assert error.value.field == "opinions[1]"
    scores = score(model, "Q?", opinions, ["yes", "no"], truncate=True)
    assert len(scores.warnings) == 1 and scores.warnings[0].startswith("Opinion 1 was cut to its first ")
    assert scores.warnings[0].endswith(" of 199 characters.")
    kept = int(scores.warnings[0].split(" first ")[1].split()[0])
    read = opinions[1][:kept]
    assert read.endswith(" word")  # words are cut whole
    same(scores, score_one_by_one(model, "Q?", [opinions[0], read, opinions[2]], ["yes", "no"]))
    with pytest.raises(InputError):  # one more word would not fit
        score(model, "Q?", [read + " word"], ["yes", "no"])


@pytest.mark.parametrize("before", ["", "Yes: "])
def test_an_opinion_written_without_spaces_is_cut_between_characters(before):
    model, opinion = small_context(120), before + "公共汽车应该免费" * 40
    scores = score(model, "Q?", [opinion], ["yes", "no"], truncate=True)
    kept = int(scores.warnings[0].split(" first ")[1].split()[0])
    assert scores.warnings[0].endswith(f" of {len(opinion)} characters.") and kept > len(before) + 10
    same(scores, score_one_by_one(model, "Q?", [opinion[:kept]], ["yes", "no"]))
    with pytest.raises(InputError):
        score(model, "Q?", [opinion[: kept + 1]], ["yes", "no"])


def test_padding_is_never_read_even_when_pad_is_eos():
    model = MODEL.model
    prefixes, suffixes = [[5, 6, 7, 8], [9, 10]], [[11, 2], [12, 13, 14], [2]]  # 2 is eos, a real token here
    owners = torch.tensor([0, 1, 1])

    def run(prefix_pad, suffix_pad):
        (p, p_lengths), (s, s_lengths) = pad(prefixes), pad(suffixes)
        p[torch.arange(p.shape[1]) >= p_lengths[:, None]] = prefix_pad
        s[torch.arange(s.shape[1]) >= s_lengths[:, None]] = suffix_pad
        with torch.no_grad():
            return suffix_scores(model, prefix_states(model, p, p_lengths), s, s_lengths, owners)

    torch.testing.assert_close(run(0, 0), run(200, 2), atol=1e-6, rtol=0)
    with torch.no_grad():
        whole = model(torch.tensor([[9, 10, 2]])).logits[0, 0]
    torch.testing.assert_close(run(2, 2)[2], whole, atol=1e-5, rtol=0)


def test_gradient_through_a_shared_prefix_equals_the_dense_gradient():
    model = preference_model(seed=1).model
    prefixes, suffixes, owners = [[5, 6, 7, 8], [9, 10]], [[11], [12, 13, 14], [15, 16]], [0, 1, 0]
    weights = torch.tensor([1.0, -2.0, 0.5])

    model.zero_grad()
    shared = suffix_scores(model, prefix_states(model, *pad(prefixes)), *pad(suffixes), torch.tensor(owners))
    (shared * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    for suffix, owner, weight in zip(suffixes, owners, weights, strict=True):
        (model(torch.tensor([prefixes[owner] + suffix])).logits[0, 0] * weight).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4)
    assert ours["model.layers.0.self_attn.k_proj.weight"].abs().max() > 1e-4


def test_ratings_of_different_members_have_different_statements():
    rows = [(0, 0), (1, 3), (0, 2), (2, 1), (1, 0)]
    ratings = [Rating("d", i, QUESTION, OPINIONS[i], STATEMENTS[j], 4, 4) for i, j in rows]
    table = score_one_by_one(MODEL, QUESTION, OPINIONS, STATEMENTS).raw
    for batch_tokens in (1, 10_000):
        ours = score_ratings(MODEL, ratings, batch_tokens=batch_tokens)
        np.testing.assert_allclose(ours, [table[row] for row in rows], atol=1e-5, rtol=0)


# --- refusals


class _Classifier(torch.nn.Module):
    """An Lfm2 language model dressed as a classifier, as transformers has no such class."""

    base_model_prefix = "model"

    def __init__(self, causal):
        super().__init__()
        self.model, self.config, self.device = causal.model, causal.config, torch.device("cpu")
        self.score = torch.nn.Linear(causal.config.hidden_size, 1)


def test_convolutional_layers_are_refused():
    config = Lfm2Config(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        full_attn_idxs=[1],
    )
    model = PreferenceModel(_Classifier(Lfm2ForCausalLM(config)), MODEL.tokenizer, CALIBRATION)
    with pytest.raises(InputError, match="conv") as error:
        score(model, QUESTION, OPINIONS, STATEMENTS)
    assert error.value.field == "preference_model"


def test_sliding_windows_are_refused():
    config = MistralConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        num_labels=1,
        pad_token_id=0,
    )
    model = PreferenceModel(MistralForSequenceClassification(config).eval(), MODEL.tokenizer, CALIBRATION)
    with pytest.raises(InputError, match="cache|sliding"):
        score(model, QUESTION, OPINIONS, STATEMENTS)


def small_context(positions):
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        num_labels=1,
        pad_token_id=0,
    )
    return PreferenceModel(LlamaForSequenceClassification(config).eval(), MODEL.tokenizer, CALIBRATION)


def test_a_statement_longer_than_the_model_reads_is_refused_by_name():
    model = small_context(80)
    assert score(model, "Q?", ["o"], ["yes"]).raw.shape == (1, 1)
    with pytest.raises(InputError, match="at most 80") as error:
        score(model, "Q?", ["o"], ["yes", "y" * 60], truncate=True)
    assert error.value.field == "statements[1]"
    with pytest.raises(InputError, match="at most 80"):
        score_ratings(model, [Rating("d", 0, "Q?", "o", "y" * 60, 4, 4)])


@pytest.mark.parametrize(
    "opinions, statements, field",
    [([], ["yes"], "opinions"), (["o"], [], "statements"), (["o"], ["yes", " \n"], "statements[1]")],
)
def test_nothing_to_score_is_refused(opinions, statements, field):
    for function in (score, score_one_by_one):
        with pytest.raises(InputError) as error:
            function(MODEL, QUESTION, opinions, statements)
        assert error.value.field == field


@pytest.mark.slow
def test_imports_without_ray():
    code = "import reward.scoring, reward.group_reward, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
