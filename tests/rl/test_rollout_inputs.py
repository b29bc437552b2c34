"""From ids to log-probabilities and values: padding, batch mates, temperature; collecting rollouts."""

from __future__ import annotations

import asyncio
import functools
import math
import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from deliberation.types import InputError
from rl import value
from rl.inputs import collate, collate_shared
from rl.rewards import RewardFunctions, Scores, background, merge_scores
from rl.rollout import Rollout, collect, merge, prompt_ids, prompt_seeds, render_prompt
from rl.sampling import Sample
from rl.value import PolicyAndValue, check_logits

import tiny


def drawn(text: str, ids: list[int], finished: bool) -> Sample:
    return Sample(text, ids, finished, [-1.0] * len(ids))


PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11], [1, 20], [1, 30, 2, 31]]  # the third holds an EOS (2) inside
COMPLETIONS = [[40, 41, 2], [50, 51, 52, 53, 54], [2]]


def make(arch: str, tokenizer) -> PolicyAndValue:
    torch.manual_seed(3)
    if arch == "gpt2":  # absolute positions: hides nothing, unlike RoPE
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
        model = PolicyAndValue(GPT2LMHeadModel(config).eval())
    else:
        model = PolicyAndValue(tiny.make_policy(tokenizer, arch))
    torch.nn.init.normal_(model.value_head.weight)
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_do_not_depend_on_padding_side_amount_or_batch_mates(arch, side, tiny_tokenizer):
    model = make(arch, tiny_tokenizer)
    with torch.no_grad():
        alone = [model(collate([p], [c], 0), 0.7) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        together = model(collate(PROMPTS, COMPLETIONS, 0, padding_side=side), 0.7)
        reversed_ = model(collate(PROMPTS[::-1], COMPLETIONS[::-1], 2, padding_side=side), 0.7)  # pad == eos
    for name in ("logprobs", "values"):
        expected = torch.cat([getattr(x, name) for x in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=1e-5)
        backwards = torch.cat([getattr(x, name) for x in alone[::-1]])
        torch.testing.assert_close(getattr(reversed_, name), backwards, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_plain_forward(arch, temperature, tiny_tokenizer):
    model = make(arch, tiny_tokenizer)
    with torch.no_grad():
        got = model(collate(PROMPTS, COMPLETIONS, 0), temperature, entropy=True)
        assert model(collate(PROMPTS, COMPLETIONS, 0), temperature).entropy is None
        expected, entropy = [], []
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            logits = model.policy(torch.tensor([prompt + completion])).logits[0].double() / temperature
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected += [logprobs[i, token] for i, token in enumerate(completion)]
            entropy += list(-(logprobs.exp() * logprobs).sum(-1))
    assert got.logprobs.dtype == got.values.dtype == torch.float32
    torch.testing.assert_close(got.logprobs.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), torch.stack(entropy), rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_goes_through_in_parts_with_the_same_gradient(tiny_tokenizer, monkeypatch):
    model = make("llama", tiny_tokenizer)

    def outputs():
        model.zero_grad()
        out = model(collate(PROMPTS, COMPLETIONS, 0), 0.7, entropy=True)
        (out.logprobs.square().sum() + out.values.square().sum()).backward()
        return [*out, *(p.grad.clone() for p in model.parameters())]

    whole, seen = outputs(), []
    monkeypatch.setattr(value, "MAX_LOGITS", 2 * model.config.vocab_size + 1)
    model.policy.get_output_embeddings().register_forward_hook(lambda head, args, logits: seen.append(len(logits)))
    for a, b in zip(outputs(), whole, strict=True):
        assert (a - b).abs().max() < 1e-5 + 1e-5 * b.abs().max()
    assert max(seen) == 2 and sum(seen) == 2 * sum(map(len, COMPLETIONS))  # backward makes them again


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_completions_that_share_their_prompt_s_row_equal_dense_rows_with_gradient(arch, tiny_tokenizer):
    model = make(arch, tiny_tokenizer)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[0]]  # ragged groups, one of 1
    completions = [[40, 41, 2], [50], [42, 43, 44, 45, 46], [2], [51, 52], [40, 41, 2]]

    def outputs(inputs):
        model.zero_grad()
        out = model(inputs, 0.7)
        (out.logprobs.square().sum() + out.values.square().sum()).backward()
        return [out.logprobs.detach(), out.values.detach(), *(p.grad.clone() for p in model.parameters())]

    dense = outputs(collate(prompts, completions, 0))
    shared = collate_shared(prompts, completions, 0)
    assert len(shared.input_ids) == 3  # three distinct prompts
    for a, b in zip(outputs(shared), dense, strict=True):
        assert (a - b).abs().max() < 1e-5 + 1e-5 * b.abs().max()
    leaky = shared._replace(attention_mask=None)  # completions see their siblings: the test can fail
    assert not torch.allclose(outputs(leaky)[0], dense[0], rtol=1e-3, atol=1e-3)


def test_the_temperature_never_touches_the_values(tiny_tokenizer):
    model, inputs = make("llama", tiny_tokenizer), collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        one, other = model(inputs, 1.0), model(inputs, 0.5)
    assert torch.equal(one.values, other.values)
    assert not torch.allclose(one.logprobs, other.logprobs)


def test_value_only_cuts_the_gradient_to_the_policy(tiny_tokenizer):
    model = make("llama", tiny_tokenizer)
    model(collate(PROMPTS, COMPLETIONS, 0), 1.0, value_only=True).values.sum().backward()
    assert all(p.grad is None for p in model.policy.parameters())
    assert model.value_head.weight.grad.abs().sum() > 0


def test_a_separate_value_model_reads_every_state_and_is_saved_with_its_head(tiny_tokenizer, tmp_path):
    judge = tiny.make_judge(tiny_tokenizer)
    model = PolicyAndValue(tiny.make_policy(tiny_tokenizer), judge)
    with torch.no_grad():
        model.value_head.bias += 0.25
        values = model(collate(PROMPTS[:1], COMPLETIONS[:1], 0), 1.0).values
        for i in range(3):  # the value before token i is the classifier's score of what precedes it
            seen = torch.tensor([PROMPTS[0] + COMPLETIONS[0][:i]])
            torch.testing.assert_close(values[i], judge(seen).logits[0, 0] + 0.25, rtol=1e-5, atol=1e-5)
        model.value_head.weight += 1.0
    model.save_value(tmp_path)
    torch.manual_seed(9)
    fresh = PolicyAndValue(tiny.make_policy(tiny_tokenizer), tiny.make_judge(tiny_tokenizer, seed=5))
    fresh.load_value(tmp_path)
    with torch.no_grad():
        inputs = collate(PROMPTS, COMPLETIONS, 0)
        assert torch.equal(fresh(inputs, 1.0).values, model(inputs, 1.0).values)
    with pytest.raises(InputError, match="value_head"):
        fresh.load_value(tmp_path / "nowhere")


def test_a_policy_that_transforms_its_logits_is_refused(tiny_policy):
    check_logits(tiny_policy)
    forward = tiny_policy.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 0.1 * torch.tanh(out.logits / 0.1)
        return out

    tiny_policy.forward = capped
    with pytest.raises(InputError, match="logits"):
        check_logits(tiny_policy)


# ---- rollouts ------------------------------------------------------------------------------------------------------


def collected(tokenizer, rows, sampler, n=2) -> Rollout:
    return collect(
        None,
        tokenizer,
        rows,
        num_generations=n,
        seeds=[0] * len(rows),
        max_new_tokens=4,
        temperature=1.0,
        batch_size=8,
        stop_at_line_break=True,
        device=torch.device("cpu"),
        sample=sampler,
    )


def test_masks_come_from_lengths_and_flags_from_the_sampler_even_if_pad_is_eos():
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token, eos = tokenizer.eos_token, tokenizer.eos_token_id
    outputs = [
        drawn("a", [9, eos], True),
        drawn("", [eos], True),
        drawn("abcd", [9, 10, 11, 12], False),
        drawn("a\n", [9, 14], True),
    ]  # the last stopped at a token that is not the EOS
    rollout = collected(tokenizer, [{"prompt": "p"}], lambda *a, **k: [outputs], n=4)
    assert rollout.mask.sum(1).tolist() == [2, 1, 4, 2]
    assert rollout.finished.tolist() == [True, True, False, True]


def test_a_sampler_without_tokens_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="without tokens"):
        collected(tiny_tokenizer, [{"prompt": "p"}], lambda *a, **k: [[drawn("", [], True)]], n=1)


def test_rollouts_of_several_ranks_are_merged_in_order():
    """The first rank's completions are one token long: as wide as its rewards, which are no tokens."""

    def part(ids, reward):
        rollout = collected(
            tiny.make_tokenizer(), [{"prompt": "p", "n": 1}], lambda *a, **k: [[drawn("x", i, True) for i in ids]]
        )
        rollout.rewards_per_func = torch.full((len(ids), 1), reward)
        rollout.values = torch.ones(rollout.mask.shape)
        return rollout

    whole = merge([part([[7], [8]], 1.0), part([[9, 10, 11], [12]], 2.0)])
    assert whole.lengths.tolist() == [1, 1, 3, 1] and whole.rewards_per_func.tolist() == [[1.0], [1.0], [2.0], [2.0]]
    assert whole.values.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert whole.columns == {"n": [1] * 4} and whole.completion_ids == [[7], [8], [9, 10, 11], [12]]


def test_rows_of_a_prompt_are_neighbours_and_columns_follow():
    tokenizer = tiny.make_tokenizer()
    rows = [{"prompt": "one", "opinions": ["a"]}, {"prompt": [{"role": "user", "content": "two"}], "opinions": ["b"]}]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}>"
    seen = {}

    def sampler(model, tokenizer, prompts, **kwargs):
        seen.update(kwargs, prompts=prompts)
        return [[drawn("x", [7], True), drawn("y", [8], True)] for _ in prompts]

    rollout = collected(tokenizer, rows, sampler)
    assert seen["top_p"] == 1.0  # pure sampling
    assert rollout.columns == {"opinions": [["a"], ["a"], ["b"], ["b"]]}
    assert rollout.texts == ["x", "y", "x", "y"]
    assert rollout.completions()[0] == "x" and rollout.completions()[2] == [{"role": "assistant", "content": "x"}]
    assert rollout.prompt_ids[0] == tokenizer("one").input_ids
    assert rollout.prompt_ids[2] == tokenizer("<s>two>").input_ids
    assert [rollout.prompt_ids[0], rollout.prompt_ids[2]] == seen["prompts"]  # sampled from what is trained on


def test_a_text_prompt_writes_no_special_tokens_and_a_chat_template_does():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    text, chat = (prompt_ids(tokenizer, p) for p in ("a</s><s>", [{"role": "user", "content": "a"}]))
    assert not set(text) & set(tokenizer.all_special_ids) and tokenizer.decode(text) == "a</s><s>"
    assert chat == [tokenizer.bos_token_id, *tokenizer("a").input_ids]


def test_a_template_and_a_tokenizer_do_not_both_add_the_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    prompt = [{"role": "user", "content": "hi"}]
    assert render_prompt(tokenizer, prompt) == "<s>hi"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert render_prompt(tokenizer, prompt) == "hi"
    assert tokenizer(render_prompt(tokenizer, prompt)).input_ids.count(1) == 1


@pytest.mark.parametrize("prompt", ["", [], None, 3, ["a"]])
def test_bad_prompts_are_named(prompt, tiny_tokenizer):
    with pytest.raises(InputError, match="prompt"):
        render_prompt(tiny_tokenizer, prompt)


def test_seeds_differ_by_prompt_update_and_run():
    seeds = [s for seed in range(3) for step in range(4) for s in prompt_seeds(seed, step, 0, 8)]
    assert len(set(seeds)) == len(seeds)
    assert prompt_seeds(1, 2, 4, 4) == prompt_seeds(1, 2, 0, 8)[4:]  # the second of two ranks


# ---- reward functions ----------------------------------------------------------------------------------------------


def test_reward_functions_sync_and_async_are_weighted_and_named():
    both = asyncio.Barrier(2)  # opens once both wait at it: awaited one after the other, neither would come past

    def short(prompts, completions, **kwargs):
        return [1.0, None]

    async def long(prompts, completions, factor=1.0, **kwargs):
        await asyncio.wait_for(both.wait(), 60)
        return [2.0 * factor, None]

    class Judge:
        async def __call__(self, prompts, completions, **kwargs):
            await asyncio.wait_for(both.wait(), 60)
            return [0.5, 3.0]

    functions = RewardFunctions([short, functools.partial(long, factor=2.0), Judge()], [1.0, 10.0, 2.0])
    assert functions.names == ["short", "long", "Judge"]
    rewards = functions(["p", "p"], ["a", "b"], opinions=[["x"], ["y"]])
    assert rewards[0].tolist() == [1.0, 4.0, 0.5] and rewards[1].isnan().tolist() == [True, True, False]
    total, scored = functions.combine(rewards)
    assert total.tolist() == [42.0, 6.0] and scored.tolist() == [True, True]
    assert functions.combine(torch.tensor([[math.nan] * 3]))[1].tolist() == [False]


@pytest.mark.parametrize(
    "output, message", [([1.0], "must return 2"), ([1.0, math.nan], "finite"), ([math.inf, 1.0], "finite")]
)
def test_wrong_rewards_are_errors_that_name_the_function(output, message):
    def broken(prompts, completions, **kwargs):
        return output

    with pytest.raises(InputError, match=f"broken.*{message}"):
        RewardFunctions(broken)(["p", "p"], ["a", "b"])


def test_an_error_inside_a_reward_function_passes_through():
    async def raising(prompts, completions, **kwargs):
        raise KeyError("my column")

    with pytest.raises(KeyError, match="my column"):
        RewardFunctions(raising)(["p"], ["a"])


@pytest.mark.parametrize("functions, weights", [([], None), (["a model id"], None), ([max], [1.0, 2.0])])
def test_bad_reward_functions_are_refused(functions, weights):
    with pytest.raises(InputError, match="reward_"):
        RewardFunctions(functions, weights)


# ---- scoring beside sampling ---------------------------------------------------------------------------------------


def test_scores_of_batches_are_merged_by_their_sizes_and_columns_keep_their_rows():
    first, second = Scores(torch.ones(3, 1)), Scores(torch.zeros(1, 1))
    for scores, number in ((first, 1.0), (second, 5.0)):
        scores.log_metric("m", number)
    second.log_metric("late", 7.0)
    second.log_extra("why", ["short"])
    found = merge_scores([first, second])
    assert found.rewards.tolist() == [[1.0]] * 3 + [[0.0]]
    assert found.metrics == {"m": [2.0], "late": [7.0]}
    assert found.extra == {"why": [None, None, None, "short"]}


def test_work_in_the_background_is_done_in_order_beside_the_caller_and_its_errors_arrive():
    seen, may_end = [], threading.Event()

    def work(k):
        assert may_end.wait(20)
        seen.append((k, threading.current_thread() is threading.main_thread()))
        if k == 2:
            raise RuntimeError("broken reward")
        return k

    with background(True) as start:
        waiting = [start(work, k) for k in range(3)]
        assert seen == []  # the caller goes on
        may_end.set()
        assert [waiting[0](), waiting[1]()] == [0, 1]
        with pytest.raises(RuntimeError, match="broken reward"):
            waiting[2]()
    assert seen == [(0, False), (1, False), (2, False)]
    seen.clear()
    with background(False) as start:
        waiting = [start(work, k) for k in range(2)]
        assert [result() for result in waiting] == [0, 1] and seen == [(0, True), (1, True)]
