"""The sampling loop: exact, reproducible, and stopped where it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from deliberation.types import InputError
from rl import sampling
from rl.drawing import draw, nucleus, uniforms
from rl.policy import Sample, sample
from rl.prompt_tree import PromptTree

import tiny

PROMPTS = ["Question: Should school meals be free?", "Tax", "A rather longer prompt about speed limits on roads."]
SEEDS = [11, 12, 13]


def with_bias(model, **bias):
    """The model with an output bias on the tokens of the given ids (``t7=3.0``): steers where samples end."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight.data.copy_(model.lm_head.weight)
    head.bias.data.zero_()
    for token, value in bias.items():
        head.bias.data[int(token[1:])] = value
    model.lm_head = head
    return model


def naive(model, tokenizer, prompt, n, seed, max_new_tokens, temperature=1.0, top_p=1.0):
    """Samples drawn one by one, each token from a fresh forward of the whole text: no cache, no batch, no mask."""
    found = []
    for row in uniforms(seed, n, max_new_tokens):
        ids, new = tokenizer(prompt).input_ids, []
        while len(new) < max_new_tokens and (not new or new[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + new])).logits[:, -1]
            new.append(int(draw(logits, row[len(new)][None], temperature, top_p)[0]))
        found.append(new)
    return found


def ids_of(samples: list[Sample]) -> list[list[int]]:
    return [one.ids for one in samples]


def gpt2(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1, **sizes)).eval()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])  # rotary and absolute positions
def test_equals_sampling_one_token_at_a_time_without_cache(tiny_tokenizer, arch):
    model = gpt2(tiny_tokenizer) if arch == "gpt2" else tiny.make_policy(tiny_tokenizer, arch)
    model = with_bias(model, t2=4.0)  # samples end at different steps, so that rows leave the batch
    got = sample(model, tiny_tokenizer, PROMPTS, n=5, seeds=SEEDS, max_new_tokens=12, stop_at_line_break=False)
    lengths = {len(one.ids) for group in got for one in group}
    assert len(lengths) > 3
    for prompt, seed, group in zip(PROMPTS, SEEDS, got, strict=True):
        assert ids_of(group) == naive(model, tiny_tokenizer, prompt, 5, seed, 12)


def test_temperature_and_top_p_equal_the_naive_loop(tiny_policy, tiny_tokenizer):
    options = {"temperature": 0.6, "top_p": 0.7}
    got = sample(
        tiny_policy, tiny_tokenizer, PROMPTS[:1], n=4, seeds=[3], max_new_tokens=8, stop_at_line_break=False, **options
    )
    assert ids_of(got[0]) == naive(tiny_policy, tiny_tokenizer, PROMPTS[0], 4, 3, 8, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 64])
def test_same_alone_in_a_batch_and_in_any_order(tiny_policy, tiny_tokenizer, batch_size):
    model = with_bias(tiny_policy, t2=3.0)
    alone = [
        sample(model, tiny_tokenizer, [p], n=4, seeds=[s], max_new_tokens=16)[0]
        for p, s in zip(PROMPTS, SEEDS, strict=True)
    ]
    together = sample(model, tiny_tokenizer, PROMPTS, n=4, seeds=SEEDS, max_new_tokens=16, batch_size=batch_size)
    backwards = sample(
        model, tiny_tokenizer, PROMPTS[::-1], n=4, seeds=SEEDS[::-1], max_new_tokens=16, batch_size=batch_size
    )
    assert together == alone
    assert backwards[::-1] == alone


def test_samples_do_not_depend_on_n_nor_on_the_limit(tiny_policy, tiny_tokenizer):
    model = with_bias(tiny_policy, t2=3.0)
    many = sample(model, tiny_tokenizer, PROMPTS[:1], n=9, seeds=[5], max_new_tokens=20)[0]
    few = sample(model, tiny_tokenizer, PROMPTS[:1], n=3, seeds=[5], max_new_tokens=20)[0]
    short = sample(model, tiny_tokenizer, PROMPTS[:1], n=9, seeds=[5], max_new_tokens=6)[0]
    assert few == many[:3]
    assert [one.ids[:6] for one in many] == ids_of(short)


def test_seeds_make_the_difference(tiny_policy, tiny_tokenizer):
    first, second = sample(tiny_policy, tiny_tokenizer, [PROMPTS[0]] * 2, n=2, seeds=[1, 2], max_new_tokens=8)
    assert first != second and first[0] != first[1]


def test_global_random_state_is_neither_used_nor_changed(tiny_policy, tiny_tokenizer):
    torch.manual_seed(0)
    first = sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=2, seeds=[1], max_new_tokens=8)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after
    assert sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=2, seeds=[1], max_new_tokens=8) == first


@given(seed=st.integers(0, 2**62), n=st.integers(1, 8), steps=st.integers(1, 40))
def test_uniforms_depend_on_seed_sample_and_step_only(seed, n, steps):
    numbers = uniforms(seed, n, steps)
    assert numbers.dtype == torch.float64 and bool(((numbers >= 0) & (numbers < 1)).all())
    assert torch.equal(uniforms(seed, 8, 40)[:n, :steps], numbers)


# ---- the distribution ------------------------------------------------------------------------------------------------


def frequencies(logits, count=20_000, **options):
    """How often each token is drawn when the uniform numbers lie on a fine, even grid: no chance is involved."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = draw(logits.expand(count, -1), grid, **options)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 1.7]), vocabulary=st.sampled_from([40, 100]))
def test_draws_follow_the_softmax(seed, temperature, vocabulary):
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    expected = torch.softmax(logits[0] / temperature, dim=-1)
    assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 1.1e-4  # two grid cells


def test_sampled_first_tokens_follow_the_policy(tiny_policy, tiny_tokenizer):
    n = 4000
    got = sample(tiny_policy, tiny_tokenizer, ["Why?"], n=n, seeds=[0], max_new_tokens=1, batch_size=1000)[0]
    counts = torch.bincount(torch.tensor([one.ids[0] for one in got]), minlength=260)
    with torch.no_grad():
        logits = tiny_policy(input_ids=torch.tensor([tiny_tokenizer("Why?").input_ids])).logits[0, -1]
    expected = torch.softmax(logits, -1) * n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 259 + 4 * (2 * 259) ** 0.5  # mean and four standard deviations of chi-square, 259 degrees


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    edges = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(4, -1), edges)
    assert tokens.tolist() == [1, 1, 3, 3] and logprobs.exp().tolist() == [0.5] * 4


@given(seed=st.integers(0, 1000), vocabulary=st.integers(1, 200), top_p=st.sampled_from([0.2, 0.9, 1.0]))
def test_draws_invert_the_running_sum_over_the_whole_vocabulary(seed, vocabulary, top_p):
    random = torch.Generator().manual_seed(seed)
    logits, uniform = 4 * torch.randn(50, vocabulary, generator=random), torch.rand(50, generator=random).double()
    chances = torch.softmax(logits, -1)
    running = (nucleus(chances, top_p) if top_p < 1 else chances).double().cumsum(-1)
    expected = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True).squeeze(-1)
    assert torch.equal(draw(logits, uniform, top_p=top_p)[0], expected)


@pytest.mark.parametrize("vocabulary", [5, 64, 130])
def test_of_logits_that_are_no_numbers_some_token_is_drawn(vocabulary):
    tokens, logprobs = draw(torch.full((2, vocabulary), torch.nan), torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert bool((tokens < vocabulary).all()) and bool(logprobs.isnan().all())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_the_log_probabilities_are_those_the_tokens_were_drawn_with(tiny_policy, tiny_tokenizer, top_p):
    """Of a plain forward pass, at the temperature, renormalised inside the nucleus."""
    one = sample(tiny_policy, tiny_tokenizer, ["Why?"], n=2, seeds=[4], temperature=0.8, top_p=top_p)[0][1]
    ids = tiny_tokenizer("Why?").input_ids
    with torch.no_grad():
        logits = tiny_policy(input_ids=torch.tensor([ids + one.ids])).logits[0, len(ids) - 1 : -1]
    chances = torch.softmax(logits / 0.8, -1)
    chances = nucleus(chances, top_p) if top_p < 1 else chances
    expected = (chances / chances.sum(-1, keepdim=True))[range(len(one.ids)), one.ids].log()
    torch.testing.assert_close(torch.tensor(one.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    p = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
    assert nucleus(p, 0.4).nonzero()[:, 1].tolist() == [1]
    assert nucleus(p, 0.41).nonzero()[:, 1].tolist() == [1, 3]
    assert nucleus(p, 0.8).nonzero()[:, 1].tolist() == [1, 3, 4]
    assert torch.equal(nucleus(p, 0.9999), p)


@given(seed=st.integers(0, 200), top_p=st.floats(0.05, 0.999), flat=st.booleans())
def test_nucleus_of_flat_and_peaked_rows(seed, top_p, flat):
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 if flat else 4.0
    p = torch.softmax(torch.randn(3, 400, generator=generator) * scale, -1)  # 400 > NUCLEUS_TOP
    kept = nucleus(p, top_p)
    mass = kept.double().sum(-1)
    assert bool((mass >= top_p - 1e-6).all())
    smallest = torch.where(kept > 0, kept, 1.0).min(-1).values.double()
    assert bool((mass - smallest < top_p + 1e-6).all())  # one token less would not reach it
    assert bool((torch.where(kept == 0, p, 0.0).max(-1).values <= smallest).all())


def test_top_p_bounds_what_is_sampled(tiny_policy, tiny_tokenizer):
    with torch.no_grad():
        logits = tiny_policy(input_ids=torch.tensor([tiny_tokenizer("Why?").input_ids])).logits[:, -1]
    allowed = set(nucleus(torch.softmax(logits, -1), 0.3).nonzero()[:, 1].tolist())
    got = sample(tiny_policy, tiny_tokenizer, ["Why?"], n=300, seeds=[0], max_new_tokens=1, top_p=0.3)[0]
    assert {one.ids[0] for one in got} <= allowed
    assert len({one.ids[0] for one in got}) > len(allowed) / 2


# ---- where a completion ends -----------------------------------------------------------------------------------------


def test_every_id_of_an_eos_list_ends_a_completion(tiny_policy, tiny_tokenizer):
    stops = {65, 66, 67}
    model = with_bias(tiny_policy, t65=3.0, t66=3.0)
    model.generation_config.eos_token_id = sorted(stops)
    got = sample(model, tiny_tokenizer, PROMPTS, n=16, seeds=SEEDS, max_new_tokens=24, stop_at_line_break=False)
    every = [one for group in got for one in group]
    assert {65, 66} <= {one.ids[-1] for one in every if one.finished}
    for one in every:
        assert not (stops | {2}) & set(one.ids[:-1])
        assert one.finished == (one.ids[-1] in stops | {2})
        assert one.finished or len(one.ids) == 24


def test_unfinished_when_cut(tiny_policy, tiny_tokenizer):
    model = with_bias(tiny_policy, t2=-100.0)
    got = sample(model, tiny_tokenizer, PROMPTS[:1], n=3, seeds=[0], max_new_tokens=5, stop_at_line_break=False)[0]
    assert [(len(one.ids), one.finished) for one in got] == [(5, False)] * 3


def test_empty_completion(tiny_policy, tiny_tokenizer):
    model = with_bias(tiny_policy, t2=1000.0)
    got = sample(model, tiny_tokenizer, PROMPTS, n=2, seeds=SEEDS, max_new_tokens=5)
    assert got == [[Sample("", [2], True, [])] * 2] * 3


def test_line_break_ends_a_statement_but_not_before_its_text(tiny_policy, tiny_tokenizer):
    newline = tiny_tokenizer("\n").input_ids[-1]
    model = with_bias(tiny_policy, **{f"t{newline}": 3.5, "t2": -100.0})
    got = sample(model, tiny_tokenizer, PROMPTS, n=16, seeds=SEEDS, max_new_tokens=24)
    every = [one for group in got for one in group]
    assert any(one.text.startswith("\n") and one.text.strip() for one in every)
    for one in every:
        assert "\n" not in one.text.lstrip()[:-1]
        assert one.finished == (one.text.lstrip()[-1:] == "\n")
    free = sample(model, tiny_tokenizer, PROMPTS, n=16, seeds=SEEDS, max_new_tokens=24, stop_at_line_break=False)
    assert any("\n" in one.text.strip() for group in free for one in group)


def test_text_is_the_decoded_completion(tiny_policy, tiny_tokenizer):
    for one in sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=4, seeds=[0], max_new_tokens=8)[0]:
        assert one.text == tiny_tokenizer.decode(one.ids, skip_special_tokens=True)


# ---- modes and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_sampling_runs_in_eval_mode(tiny_policy, tiny_tokenizer, training):
    tiny_policy.train(training)
    seen = []
    tiny_policy.register_forward_hook(lambda m, i, o: seen.append((m.training, torch.is_grad_enabled())))
    sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=2, seeds=[0], max_new_tokens=3)
    assert tiny_policy.training is training and torch.is_grad_enabled()
    assert set(seen) == {(False, False)}


def test_mode_is_restored_after_an_error(tiny_policy, tiny_tokenizer, monkeypatch):
    tiny_policy.train()

    def fail(*args):
        raise RuntimeError("no draw")

    monkeypatch.setattr(sampling, "draw", fail)
    with pytest.raises(RuntimeError, match="no draw"):
        sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=2, seeds=[0])
    assert tiny_policy.training


def test_a_prompt_is_read_once_for_all_its_samples(tiny_policy, tiny_tokenizer):
    read = []
    tiny_policy.register_forward_hook(
        lambda m, args, kwargs, out: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    sample(tiny_policy, tiny_tokenizer, PROMPTS[:1], n=16, seeds=[0], max_new_tokens=2, stop_at_line_break=False)
    assert read[0] == len(tiny_tokenizer(PROMPTS[0]).input_ids)
    assert sum(read[1:]) <= 16


ALIKE = [f"{PROMPTS[2]} {end}" for end in ("Yes.", "No, never.", "")] + ["Tax"]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_prompts_that_begin_alike_are_read_as_one_and_sampled_as_if_alone(tiny_tokenizer, arch):
    model = gpt2(tiny_tokenizer) if arch == "gpt2" else tiny.make_policy(tiny_tokenizer, arch)
    model, read, counts, seeds = with_bias(model, t2=3.0), [], [2, 1, 3, 2], [1, 2, 3, 4]
    hook = model.register_forward_hook(
        lambda m, a, kwargs, out: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    options = {"max_new_tokens": 12, "stop_at_line_break": False}
    together = sample(model, tiny_tokenizer, ALIKE, n=counts, seeds=seeds, **options)
    hook.remove()
    assert [ids_of(group) for group in together] == [
        naive(model, tiny_tokenizer, *one, 12) for one in zip(ALIKE, counts, seeds, strict=True)
    ]
    lengths = [len(tiny_tokenizer(prompt).input_ids) for prompt in ALIKE]
    assert read[0][0] == 2 and read[0][1] < sum(lengths[:3]) / 2


def test_a_tree_holds_every_common_beginning_once():
    tree = PromptTree.of([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3], [1, 2, 5]])
    assert tree.ids == [1, 2, 3, 4, 5]
    assert tree.paths == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2], [0, 1, 4]]
    assert tree.positions().tolist() == [0, 1, 2, 3, 2]
    assert [row.nonzero()[:, 0].tolist() for row in tree.seen()] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": [1, 2]}, "n"),
        ({"n": [0]}, "n"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompts": [""]}, "prompts[0]"),
        ({"prompts": ["x" * 2040]}, "prompts[0]"),
    ],
)
def test_bad_arguments_are_named(tiny_policy, tiny_tokenizer, change, field):
    arguments = {"prompts": ["Why?"], "n": 2, "seeds": [0], "max_new_tokens": 16, **change}
    with pytest.raises(InputError) as error:
        sample(tiny_policy, tiny_tokenizer, arguments.pop("prompts"), **arguments)
    assert error.value.field == field


def test_special_tokens_in_a_text_are_text_and_in_ids_are_tokens(tiny_policy, tiny_tokenizer):
    eos, options = tiny_tokenizer.eos_token, {"n": 3, "seeds": [1], "max_new_tokens": 6}
    text = f"Tax{eos}"
    plain = [tiny_tokenizer.convert_tokens_to_ids(c) for c in text]
    assert sample(tiny_policy, tiny_tokenizer, [text], **options) == sample(
        tiny_policy, tiny_tokenizer, [plain], **options
    )
    parsed = tiny_tokenizer(text).input_ids
    assert parsed[-1] == tiny_tokenizer.eos_token_id
    assert sample(tiny_policy, tiny_tokenizer, [parsed], **options) != sample(
        tiny_policy, tiny_tokenizer, [text], **options
    )
