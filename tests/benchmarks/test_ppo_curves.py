"""Learning curves side by side: the paired difference, and that both sides are rewarded alike."""

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks._ppo_citizens_side import Citizens, CitizensModel
from benchmarks.ppo_curves import difference, last_quarter
from embedded import resolve


def test_the_difference_is_paired_and_as_wide_as_student_s_t_makes_it():
    assert last_quarter([1, 2, 3, 4, 5, 6, 7, 9]) == 8
    found = difference([2.0, 3.0, 4.0], [1.0, 3.0, 2.0])  # 1, 0, 2: mean 1, standard error 1 / sqrt(3)
    assert found == {
        "value": 1.0,
        "low": pytest.approx(1 - 4.303 / 3**0.5, abs=1e-3),
        "high": pytest.approx(3.484, abs=1e-3),
    }


def test_the_model_trl_asks_gives_what_our_reward_function_gives():
    citizens, tokenizer = Citizens(3, seed=0), AutoTokenizer.from_pretrained(resolve("embedded/writer"))
    texts = ["We should go ahead with it.", "We agree.", citizens.groups[2].citizens[0].opinion]
    rows = [
        tokenizer(prompt).input_ids + tokenizer(text).input_ids
        for prompt, text in zip(citizens.prompts, texts, strict=True)
    ]
    width = max(map(len, rows)) + 2
    ids = torch.tensor([[0] * (width - len(row) - 1) + row + [0] for row in rows])  # padded on both sides
    model = CitizensModel(citizens, tokenizer)
    found = model.score(model.backbone(ids).hidden_states[-1])
    assert found.shape == (3, width, 1)
    expected = citizens.rewards([0, 1, 2], texts)
    assert found[:, -1, 0].tolist() == pytest.approx(expected) and len(set(expected)) > 1
    assert citizens.means == [pytest.approx(sum(expected) / 3)] * 2
