"""The switch of transformers' attention: who sets it, and that numbers stay the same but for rounding."""

from __future__ import annotations

import os

import pytest
import torch

from deliberation.kernels import SWITCH, share_heads
from reward.calibration import VOTES, Calibration
from reward.preference import PreferenceModel
from reward.scoring import score
from rl.inputs import collate_shared
from rl.policy import load_policy
from rl.sampling import sample
from rl.setup import load
from rl.value import PolicyAndValue

import tiny


@pytest.fixture
def shared(monkeypatch):
    """Whether each call of the attention shared its heads."""
    monkeypatch.delenv(SWITCH, raising=False)
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args, **kwargs):
        seen.append(bool(kwargs.get("enable_gqa")))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def results():
    tokenizer = tiny.make_tokenizer()
    policy = PolicyAndValue(tiny.make_policy(tokenizer)).train()
    out = policy(collate_shared([[5, 6, 7]] * 2, [[8, 9], [10, 11, 12]], 0), 0.7)
    out.logprobs.sum().backward()
    drawn = sample(policy.policy, tokenizer, ["ab cd"], n=3, seeds=[0], max_new_tokens=8)
    judge = PreferenceModel(tiny.make_judge(tokenizer), tokenizer, Calibration((0.0,), 1.0, VOTES))
    scores = score(judge, "Q?", ["one", "two"], ["a", "b c"]).raw
    return drawn, torch.from_numpy(scores), out.logprobs.detach(), *(p.grad for p in policy.policy.parameters())


def ids(samples):
    return [[one.ids for one in of_prompt] for of_prompt in samples]


def test_shared_heads_give_the_same_samples_scores_and_gradients(shared, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    copied = results()
    assert not all(shared)  # without a mask they are shared in any case
    shared.clear()
    monkeypatch.setenv(SWITCH, "1")
    for a, b in zip(results(), copied, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) if isinstance(a, torch.Tensor) else ids(a) == ids(b)
    assert all(shared)


def test_models_on_a_machine_without_a_gpu_share_their_heads(shared, monkeypatch, tmp_path):
    tokenizer = tiny.make_tokenizer()
    policy = tiny.make_policy(tokenizer)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = tiny.make_judge(tokenizer)
    ways = (
        lambda: load_policy(str(tmp_path), device="cpu"),
        lambda: load(policy, tokenizer, None),
        lambda: PreferenceModel(judge, tokenizer, Calibration((0.0,), 1.0, VOTES)),
    )
    for way in ways:
        for cuda in (True, False):
            monkeypatch.delenv(SWITCH, raising=False)
            monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
            way()
            assert (SWITCH in os.environ) is not cuda


def test_what_the_user_set_stands(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    share_heads(cuda=False)
    assert os.environ[SWITCH] == "0"
