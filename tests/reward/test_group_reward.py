"""The group reward: TRL's contract, grouping, empty statements, weights, metrics, and a real GRPO step."""

from __future__ import annotations

import asyncio
import inspect
import math

import numpy as np
import pytest
import torch

from deliberation.types import InputError
from reward.calibration import Calibration
from reward.group_reward import LocalScorer, make_group_reward
from reward.preference import PreferenceModel
from reward.scoring import score, score_one_by_one
from reward.uncertainty import Uncertainty
from reward.welfare import welfare

import tiny

TOKENIZER = tiny.make_tokenizer()
MODEL = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0)))
BUSES, TREES = "Should buses be free?", "Should we plant trees?"
RIDERS = ["Yes, for all.", "No, it costs too much.", "For children."]
WALKERS = ["Shade is good.", "Leaves block drains."]


def run(reward, completions, question, opinions, **columns):
    prompts = ["prompt"] * len(completions)
    return asyncio.run(reward(prompts, completions, question=question, opinions=opinions, **columns))


class CountingScorer:
    """An awaitable scorer over the real model that records its calls."""

    def __init__(self):
        self.calls = []

    async def score(self, question, opinions, statements):
        self.calls.append((question, len(opinions), len(statements)))
        await asyncio.sleep(0)
        return score(MODEL, question, opinions, statements)


def test_it_is_an_async_function_with_a_name():
    reward = make_group_reward(LocalScorer(MODEL), "nash")
    assert inspect.iscoroutinefunction(reward)
    assert reward.__name__ == "group_reward"


@pytest.mark.parametrize("name, alpha", [("utilitarian", 0), ("nash", 1), ("rawlsian", math.inf), ("2", 2)])
def test_reward_is_the_welfare_of_the_predicted_utilities(name, alpha):
    statements = ["Free for all.", "Not free."]
    utilities = score_one_by_one(MODEL, BUSES, RIDERS, statements).utilities
    rewards = run(make_group_reward(LocalScorer(MODEL), name), statements, [BUSES] * 2, [RIDERS] * 2)
    np.testing.assert_allclose(rewards, welfare(utilities, alpha), atol=1e-5)
    assert all(type(r) is float for r in rewards)


def test_rows_of_one_group_share_a_call_and_keep_their_order():
    scorer = CountingScorer()
    reward = make_group_reward(scorer, "utilitarian")
    rows = [(BUSES, RIDERS, "A."), (TREES, WALKERS, "Plant."), (BUSES, RIDERS, "B is better."), (BUSES, WALKERS, "A.")]
    question, opinions, completions = map(list, zip(*rows, strict=True))
    rewards = run(reward, completions, question, opinions)
    assert sorted(scorer.calls) == [(BUSES, 2, 1), (BUSES, 3, 2), (TREES, 2, 1)]
    alone = [run(reward, [s], [q], [o])[0] for q, o, s in rows]
    np.testing.assert_allclose(rewards, alone, atol=1e-5)
    assert len(set(np.round(rewards, 6))) == 4


def test_a_completion_longer_than_the_model_reads_is_not_scored_and_leaves_the_others_as_they_were(caplog):
    model = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, MODEL.calibration)
    model.model.config.max_position_embeddings = 150
    reward, logged = make_group_reward(LocalScorer(model), "nash"), {}
    completions = ["Free for all.", "word " * 18, "x" * 400, "Not free.", "x" * 300]
    opinions = [["Yes."], ["Yes.", "An opinion of some length."], ["Yes."], ["Yes."], ["No."]]
    rewards = run(reward, completions, [BUSES] * 5, opinions, log_metric=logged.__setitem__)
    assert [r is None for r in rewards] == [False, True, True, False, True]
    assert logged["rewards/too_long"] == 0.6 and "3 of 5" in caplog.text
    short = run(reward, ["Free for all.", "Not free."], [BUSES] * 2, [["Yes."]] * 2)
    np.testing.assert_allclose([rewards[0], rewards[3]], short, atol=1e-5)
    assert run(reward, completions[2:3], [BUSES], [["Yes."]], log_metric=logged.__setitem__) == [None]
    with pytest.raises(InputError) as error:  # an opinion that leaves no room for any statement is another fault
        run(reward, completions[:1], [BUSES], [["Yes.", "word " * 50]])
    assert error.value.field == "opinions[1]"


def test_completions_are_cleaned_and_messages_are_read():
    reward = make_group_reward(LocalScorer(MODEL), "nash")
    clean, raw, messages = run(
        reward,
        ["Free for all.", ' "Free for all."\nOpinion: and more', [{"role": "assistant", "content": " Free for all."}]],
        [BUSES] * 3,
        [RIDERS] * 3,
    )
    assert clean == raw == messages


@pytest.mark.parametrize("empty", ["", "  \n ", '""', []])
def test_an_empty_statement_is_worth_the_least_and_is_not_scored(empty):
    scorer = CountingScorer()
    rewards = run(make_group_reward(scorer, "nash"), [empty, "Free."], [BUSES] * 2, [RIDERS] * 2)
    assert rewards[0] == 1.0 < rewards[1]
    assert scorer.calls == [(BUSES, 3, 1)]
    assert run(make_group_reward(scorer, "nash"), [empty], [BUSES], [RIDERS]) == [1.0]
    assert len(scorer.calls) == 1


def test_weights_are_per_row():
    reward = make_group_reward(LocalScorer(MODEL), "utilitarian")
    u = score(MODEL, BUSES, RIDERS, ["Free."]).utilities[:, 0]
    rewards = run(reward, ["Free."] * 3, [BUSES] * 3, [RIDERS] * 3, weights=[None, [1, 0, 0], [0, 1, 3]])
    np.testing.assert_allclose(rewards, [u.mean(), u[0], (u[1] + 3 * u[2]) / 4], rtol=1e-6)


def with_ensemble():
    model = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, MODEL.calibration)
    torch.manual_seed(1)
    model.ensemble, model.uncertainty = torch.nn.Linear(32, 4, bias=False), Uncertainty(tau=0.3, rho=0.1, kappa=1.0)
    return model


def test_uncertain_utilities_count_for_less():
    model, logged = with_ensemble(), {}
    scores = score(model, BUSES, RIDERS, ["Free.", "Not free at all."])
    assert scores.sd.min() > 0
    reward = make_group_reward(LocalScorer(model), "utilitarian", uncertainty_penalty=0.5)
    rewards = run(reward, ["Free.", "Not free at all."], [BUSES] * 2, [RIDERS] * 2, log_metric=logged.__setitem__)
    np.testing.assert_allclose(rewards, np.maximum(1, scores.utilities - 0.5 * scores.sd).mean(axis=0), atol=1e-5)
    assert logged["rewards/utility_sd"] == pytest.approx(scores.sd.mean(), rel=1e-5)
    certain = make_group_reward(LocalScorer(model), "utilitarian", uncertainty_penalty=1e6)
    assert run(certain, ["Free.", ""], [BUSES] * 2, [RIDERS] * 2, log_metric=logged.__setitem__) == [1.0, 1.0]
    assert logged["rewards/clamped"] == pytest.approx(0.5)


def test_a_penalty_without_an_ensemble_is_refused_and_so_is_a_bad_one():
    with pytest.raises(InputError, match="ensemble"):
        run(make_group_reward(LocalScorer(MODEL), "nash", 1.0), ["Free."], [BUSES], [RIDERS])
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(InputError) as error:
            make_group_reward(LocalScorer(MODEL), "nash", bad)
        assert error.value.field == "uncertainty_penalty"


def test_clusters_are_per_row():
    reward = make_group_reward(LocalScorer(MODEL), "worst_cluster")
    u = score(MODEL, BUSES, RIDERS, ["Free."]).utilities[:, 0]
    rewards = run(reward, ["Free."] * 2, [BUSES] * 2, [RIDERS] * 2, clusters=[["a", "a", "b"], [1, 2, 3]])
    np.testing.assert_allclose(rewards, [min(u[:2].mean(), u[2]), u.min()], rtol=1e-6)


def test_other_columns_are_ignored_and_metrics_logged():
    logged = {}
    run(
        make_group_reward(LocalScorer(MODEL), "nash"),
        ["A.", "Plant."],
        [BUSES, TREES],
        [RIDERS, WALKERS],
        log_metric=logged.__setitem__,
        completion_ids=[[1], [2]],
        trainer_state=None,
        log_extra=None,
        topic=["x", "y"],
    )
    u = score(MODEL, BUSES, RIDERS, ["A."]).utilities[:, 0], score(MODEL, TREES, WALKERS, ["Plant."]).utilities[:, 0]
    expected = {
        "rewards/member_0/mean": (u[0][0] + u[1][0]) / 2,
        "rewards/member_1/mean": (u[0][1] + u[1][1]) / 2,
        "rewards/member_2/mean": u[0][2],
        "rewards/worst_member/mean": (u[0].min() + u[1].min()) / 2,
        "rewards/too_long": 0.0,
    }
    assert logged == pytest.approx(expected, rel=1e-5)


def test_no_rows_give_no_rewards():
    assert run(make_group_reward(LocalScorer(MODEL), "nash"), [], [], [], log_metric=lambda *_: None) == []


@pytest.mark.parametrize(
    "columns, field",
    [
        ({"question": [BUSES]}, "question"),
        ({"opinions": [RIDERS]}, "opinions"),
        ({"weights": [[1, 1, 1]]}, "weights"),
        ({"opinions": [RIDERS, []]}, "opinions[1]"),
        ({"weights": [[1, 1, 1], [1]]}, "weights"),
        ({"clusters": [[1, 1, 1]]}, "clusters"),
    ],
)
def test_bad_columns_are_refused_by_name(columns, field):
    good = {"question": [BUSES] * 2, "opinions": [RIDERS] * 2}
    with pytest.raises(InputError) as error:
        run(make_group_reward(LocalScorer(MODEL), "nash"), ["A.", "B."], **(good | columns))
    assert error.value.field == field


def test_an_unknown_welfare_is_refused_at_once():
    with pytest.raises(InputError) as error:
        make_group_reward(LocalScorer(MODEL), "fair")
    assert error.value.field == "welfare"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_trains_two_steps_on_it_unchanged(tmp_path, name):
    import trl
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "Say:", "question": BUSES, "opinions": RIDERS}] * 8)
    args = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    reward = make_group_reward(LocalScorer(with_ensemble()), "nash", uncertainty_penalty=0.5)
    policy, folder = tiny.make_policy(TOKENIZER), str(tmp_path / "policy")
    policy.save_pretrained(folder)
    before = dict(policy.named_parameters())
    trainer = getattr(trl, f"{name}Trainer")(folder, reward, args, data, processing_class=TOKENIZER)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "rewards/group_reward/mean" in log]
    assert len(steps) == 2
    for logs in steps:
        assert 1 <= logs["rewards/group_reward/mean"] <= 7
        assert 1 <= logs["rewards/worst_member/mean"] <= logs["rewards/member_0/mean"] <= 7
    assert any(not torch.equal(p.cpu(), before[name]) for name, p in trainer.model.named_parameters())
