"""Fitting the preference model: the loss by hand, its invariances, and that it learns what it should."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from trl import TrlParser

from deliberation.types import InputError, Rating
from reward import train
from reward.preference import Calibration, PreferenceModel, ordinal_log_likelihood
from reward.scoring import pad, prefix_states, score_one_by_one, score_ratings, suffix_scores
from reward.train import PreferenceConfig, _Collator, _Member, fit, hold_out, pairs_of, preference_loss

import tiny

TOKENIZER = tiny.make_tokenizer()
START = Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0), slope=1.5)
CUTS = torch.tensor(START.cut_points)
MEMBERS = [
    _Member([5, 6, 7], [[11], [12, 13, 14], [15, 16], [17] * 6], [7, 2, 4, 4]),
    _Member([8], [[20, 21], [22]], [3, 4]),
    _Member([9, 10], [[30], [31, 32]], [1, 6]),
]


def config(tmp_path, **changes):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 3e-3, "disable_tqdm": True}
    return PreferenceConfig(**(values | changes))


def world(deliberations, seed=0, first=0):
    """Members like what is blue and dislike what is pink; generous members rate two points above strict ones."""
    rng = np.random.default_rng(seed)
    ratings = []
    for d in range(first, first + deliberations):
        topic = f"t{d % 5}"
        for member, (opinion, level) in enumerate([("generous", 2), ("strict", 0)]):
            for colour, liking in (("pink", 1), ("blue", 4), ("pink", 1), ("blue", 4)):
                noise = int(rng.integers(0, 2))
                statement = f"{colour} {rng.choice(['car', 'hat', 'sea'])}"
                ratings.append(Rating(f"d{d}", member, "Q?", opinion, statement, liking + level + noise, 4, topic))
    return ratings


# --- the loss


def test_pairs_keep_the_margin():
    assert pairs_of([7, 2, 4, 4], 2) == [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]
    assert pairs_of([7, 2, 4, 4], 4) == [(0, 1)]
    assert pairs_of([3, 4], 2) == []


def test_loss_equals_a_plain_loop():
    batch = _Collator(margin=2, rows_a_pass=3)(MEMBERS)
    rows = [(int(o), int(i)) for one in batch["passes"] for o, i in zip(one["owners"], one["ids"][:, 0], strict=True)]
    value = {row: 0.1 * row[1] - 0.7 * row[0] for row in rows}  # any score, told apart by first token
    scores = torch.tensor([value[row] for row in rows])
    expected = 0.0
    for i, member in enumerate(MEMBERS):
        s = [value[i, suffix[0]] for suffix in member.suffixes]
        pairs = pairs_of(member.ratings, 2)
        for w, other in pairs:
            expected += np.log1p(np.exp(-1.5 * (s[w] - s[other]))) / len(pairs)
        likely = START.probabilities(s)[np.arange(len(s)), np.array(member.ratings) - 1]
        expected += 0.25 * -np.log(likely).mean()
    assert float(preference_loss(scores, batch, CUTS, 1.5, 0.25)) == pytest.approx(expected, rel=1e-5)


def test_the_sign_the_preferred_statement_rises():
    batch = _Collator(2, 16)([_Member([5], [[6], [7]], [7, 1])])
    scores = torch.zeros(2, requires_grad=True)
    preference_loss(scores, batch, CUTS, 1.0, 0.0).backward()
    assert scores.grad[0] < 0 < scores.grad[1]


def test_loss_and_gradient_do_not_depend_on_passes_or_order_of_members():
    def run(members, rows_a_pass):
        model = tiny.make_judge(TOKENIZER)
        batch = _Collator(2, rows_a_pass)(members)
        states = prefix_states(model, batch["prefix_ids"], batch["prefix_lengths"])
        scores = torch.cat([suffix_scores(model, states, **one) for one in batch["passes"]])
        loss = preference_loss(scores, batch, CUTS, 1.5, 0.5)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradient = run(MEMBERS, 16)
    for members, rows_a_pass in ((MEMBERS, 1), (MEMBERS, 3), (MEMBERS[::-1], 16)):
        again, other = run(members, rows_a_pass)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        for name, value in gradient.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    # and members add up: one batch is the sum of its members
    torch.testing.assert_close(sum(run([m], 16)[0] for m in MEMBERS), loss, rtol=1e-5, atol=1e-6)


def test_a_batch_without_pairs_still_has_a_gradient():
    batch = _Collator(2, 16)([MEMBERS[1]])
    scores = torch.zeros(2, requires_grad=True)
    loss = preference_loss(scores, batch, CUTS, 1.0, 1.0)
    loss.backward()
    expected = -ordinal_log_likelihood(torch.zeros(2), torch.tensor([3, 4]), CUTS, 1.0).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert scores.grad.abs().sum() > 0


# --- the fit


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    judge = tiny.make_judge(TOKENIZER)
    arguments = config(folder, num_train_epochs=3)
    return fit(arguments, world(40), world(10, seed=1, first=40), judge, TOKENIZER, progress=False)


def test_it_learns_what_members_like_and_how_they_rate(fitted):
    held_out = world(10, seed=2, first=90)
    found = fitted.metadata["measures"]
    assert found["accuracy"] > 0.9 > found["longest"]
    assert found["correlation"] > 0.85
    utilities = fitted.calibration.utilities(score_ratings(fitted, held_out))
    means = {
        (opinion, colour): utilities[[r.opinion == opinion and colour in r.statement for r in held_out]].mean()
        for opinion in ("generous", "strict")
        for colour in ("pink", "blue")
    }
    assert means["generous", "blue"] == pytest.approx(6.5, abs=0.8)
    assert means["strict", "pink"] == pytest.approx(1.5, abs=0.8)
    assert means["generous", "pink"] - means["strict", "pink"] > 1


def test_it_saves_loads_and_scores_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = PreferenceModel.load(tmp_path / "model")
    arguments = ("Q?", ["generous", "strict"], ["blue hat", "pink sea"])
    np.testing.assert_allclose(
        score_one_by_one(loaded, *arguments).utilities, score_one_by_one(fitted, *arguments).utilities, atol=1e-5
    )
    assert loaded.metadata["measures"]["accuracy"] == fitted.metadata["measures"]["accuracy"]


def test_the_same_seed_gives_the_same_model_and_another_does_not(tmp_path):
    def scores(seed):
        model = tiny.make_judge(TOKENIZER)
        result = fit(config(tmp_path, seed=seed), world(12), world(3, first=50), model, TOKENIZER, progress=False)
        return score_one_by_one(result, "Q?", ["strict"], ["blue hat"]).raw

    assert scores(1) == scores(1)
    assert scores(1) != scores(2)
    assert not any(tmp_path.iterdir())  # fit itself writes nothing


def test_batch_accumulated_equals_batch_at_once(tmp_path):
    def weights(batch, accumulation):
        model = tiny.make_judge(TOKENIZER)
        arguments = config(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            warmup_steps=0,
            optim="sgd",
            max_grad_norm=0.0,
        )
        fit(arguments, world(4), world(2, first=50), model, TOKENIZER, progress=False)  # 8 members: one step
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.cat([p.detach().flatten() for p in tiny.make_judge(TOKENIZER).parameters()])
    at_once, accumulated = weights(8, 1), weights(2, 4)
    assert (at_once - before).abs().max() > 1e-4
    torch.testing.assert_close(accumulated, at_once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_lora_trains_and_is_merged(tmp_path, arch):
    model = tiny.make_judge(TOKENIZER, arch=arch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit(
        config(tmp_path, use_peft=True, lora_r=4, num_train_epochs=2, lora_target_modules=["q_proj", "v_proj"]),
        world(12),
        world(4, first=50),
        model,
        TOKENIZER,
        progress=False,
    )
    after = dict(result.model.named_parameters())
    assert set(after) == set(before)
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if n.endswith(("q_proj.weight", "v_proj.weight")) or n == "score.weight"}
    result.save(tmp_path / "m")
    assert PreferenceModel.load(tmp_path / "m").model.config.num_labels == 1


def test_a_language_model_gets_a_head(tmp_path):
    base = tmp_path / "writer"
    tiny.make_policy(TOKENIZER).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    arguments = config(tmp_path, model_name_or_path=str(base), max_steps=2)
    result = fit(arguments, world(6), world(4, first=50), progress=False)
    assert result.model.config.num_labels == 1
    assert result.metadata["base"] == str(base)


def test_starting_scale_keeps_what_scores_tell_and_else_makes_one_deviation_a_logit(fitted):
    own = train._starting_scale(fitted, world(20, seed=5))
    assert own.slope == pytest.approx(fitted.calibration.slope, rel=0.5)
    random = PreferenceModel(tiny.make_judge(TOKENIZER, seed=7), TOKENIZER, START)
    ratings = [r for r in world(20) for _ in (0, 1)]
    shuffled = np.random.default_rng(0).permutation([r.agreement for r in ratings])
    ratings = [
        Rating(r.deliberation_id, r.member, "Q?", "o", r.statement, int(a), 4)
        for r, a in zip(ratings, shuffled, strict=True)
    ]
    scale = train._starting_scale(random, ratings)
    assert scale.slope * score_ratings(random, ratings).std() == pytest.approx(1, rel=1e-4)


def test_dropout_is_off_in_training(tmp_path):
    model = tiny.make_judge(TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.add_module("extra", torch.nn.Dropout(0.5))
    train._no_dropout(model)
    model.train()
    states = prefix_states(model, *pad([[5, 6, 7]]))
    once, twice = (suffix_scores(model, states, *pad([[8, 9]]), torch.tensor([0])) for _ in range(2))
    assert torch.equal(once, twice) and model.extra.p == 0


# --- bad input


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"margin": 0}, "margin"),
        ({"margin": 7}, "margin"),
        ({"ordinal_weight": -1.0}, "ordinal_weight"),
        ({"eval_share": 1.0}, "eval_share"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"resume_from_checkpoint": "runs/nowhere/checkpoint-1"}, "resume_from_checkpoint"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, field):
    with pytest.raises(InputError) as error:
        config(tmp_path, **changes)
    assert error.value.field == field


@pytest.mark.parametrize(
    "ratings, eval_ratings, field",
    [
        ([], world(1), "ratings"),
        (world(1), [], "eval_ratings"),
        (world(2), world(1), "eval_ratings"),
        (world(1)[:1], world(1, first=5), "ratings"),
    ],
)
def test_unusable_ratings_are_refused(tmp_path, ratings, eval_ratings, field):
    with pytest.raises(InputError) as error:
        fit(config(tmp_path), ratings, eval_ratings, tiny.make_judge(TOKENIZER), TOKENIZER, progress=False)
    assert error.value.field == field


def test_hold_out_keeps_topics_whole():
    ratings = world(20)
    kept, held = hold_out(ratings, 0.2, seed=0)
    assert len({r.topic for r in held}) == 1 and not {r.topic for r in held} & {r.topic for r in kept}
    assert len(kept) + len(held) == len(ratings)
    one_topic = [r for r in ratings if r.topic == "t0"]
    kept, held = hold_out(one_topic, 0.25, seed=0)
    assert len({r.deliberation_id for r in held}) == 1 and len({r.deliberation_id for r in kept}) == 3
    with pytest.raises(InputError):
        hold_out(one_topic[:3], 0.2, seed=0)


def test_a_base_without_safetensors_is_refused(tmp_path):
    torch.save(tiny.make_judge(TOKENIZER).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors") as error:
        fit(config(tmp_path / "out", model_name_or_path=str(tmp_path)), world(2), world(1, first=5), progress=False)
    assert error.value.field == "model_name_or_path"


# --- the command


def test_keys_come_from_yaml_and_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "preference.yaml"
    file.write_text("ratings: r.jsonl\nmargin: 3\nlearning_rate: 2.0e-4\nuse_peft: true\noutput_dir: out\n")
    (parsed,) = TrlParser(PreferenceConfig).parse_args_and_config(["--config", str(file), "--margin", "1"])
    assert (parsed.margin, parsed.learning_rate, parsed.use_peft, parsed.ratings) == (1, 2e-4, True, "r.jsonl")
    assert parsed.bf16 is False and parsed.num_train_epochs == 1
    with pytest.raises(SystemExit) as end:
        TrlParser(PreferenceConfig).parse_args_and_config(["--help"])
    assert end.value.code == 0
    assert "--ordinal_weight" in capsys.readouterr().out


def test_main_reads_fits_and_saves(tmp_path):
    base, data = tmp_path / "judge", tmp_path / "ratings.jsonl"
    tiny.make_judge(TOKENIZER).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    data.write_text("\n".join(json.dumps(vars(r)) for r in world(10)))
    out = tmp_path / "out"
    train.main(config(out, model_name_or_path=str(base), ratings=str(data), max_steps=2))
    loaded = PreferenceModel.load(out)
    assert loaded.metadata["ratings"] == 64 and loaded.metadata["eval_ratings"] == 16


def test_data_seed_zero_is_a_seed(tmp_path):
    def order(**keys):
        arguments = config(tmp_path, **keys)
        members = [_Member([1], [[2, 3]], [4])] * 40
        start = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0))
        return list(
            train._PreferenceTrainer(
                tiny.make_judge(TOKENIZER), arguments, members, start, TOKENIZER
            )._get_train_sampler()
        )

    assert order(seed=5, data_seed=0) == order(seed=0) != order(seed=5)


def test_a_base_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        train._load_base("runs/judge")
