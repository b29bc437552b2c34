"""Fitting the preference model: the loss by hand, its invariances, and that it learns what it should."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import TrlParser

from deliberation.prompts import preference_prefix, preference_suffix
from deliberation.types import Choice, InputError, Rank, Rating, SoftVote, Vote
from reward import train
from reward.calibration import RATINGS, VOTES, Calibration, ordinal_log_likelihood
from reward.examples import Collator, DeliberationSampler, Member, members_of, pairs_of
from reward.heads import apply_head, head_of
from reward.held_out import calibrated
from reward.objective import preference_loss
from reward.preference import PreferenceModel
from reward.prefixes import prefix_states, suffix_features
from reward.raters import showings
from reward.scoring import score, score_one_by_one, score_ratings, score_responses
from reward.train import PreferenceConfig, fit, hold_out

import tiny

TOKENIZER = tiny.make_tokenizer()
START = Calibration((-2.0, -1.0, -0.3, 0.3, 1.0, 2.0), slope=1.5)
CUTS = torch.tensor(START.cut_points)
UNFITTED = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, START)


def member(prefix, suffixes, labels, deliberation=0, heads=1):
    return Member(deliberation, prefix, suffixes, labels, pairs_of(labels, 2), [1.0] * heads)


MEMBERS = [
    member([5, 6, 7], [[11], [12, 13, 14], [15, 16], [17] * 6], [7, 2, 4, 4]),
    member([8], [[20, 21], [22]], [3, 4], deliberation=1),
    member([9, 10], [[30], [31, 32]], [1, 6], deliberation=2),
]


def collate(members, rows_a_pass=16, **keys):
    return Collator(UNFITTED, 2, rows_a_pass, **keys)(members)


def loss_of(scores, batch, slope, ordinal_weight):
    """The loss of one head: scores [rows]."""
    return preference_loss(scores[:, None], batch, Calibration(START.cut_points, slope), ordinal_weight)[0]


def suffix_scores(model, prefixes, ids, lengths, owners):
    return apply_head(head_of(model), suffix_features(model, prefixes, ids, lengths, owners, reads_types=False))[:, 0]


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
    batch = collate(MEMBERS, 3)
    rows = [(int(o), int(i)) for one in batch["passes"] for o, i in zip(one["owners"], one["ids"][:, 0], strict=True)]
    value = {row: 0.1 * row[1] - 0.7 * row[0] for row in rows}  # any score, told apart by first token
    scores = torch.tensor([value[row] for row in rows])
    expected = 0.0
    for i, one in enumerate(MEMBERS):
        s = [value[i, suffix[0]] for suffix in one.suffixes]
        pairs = pairs_of(one.labels, 2)
        for w, other in pairs:
            expected += np.log1p(np.exp(-1.5 * (s[w] - s[other]))) / len(pairs)
        likely = START.probabilities(s)[np.arange(len(s)), np.array(one.labels) - 1]
        expected += 0.25 * -np.log(likely).mean()
    assert float(loss_of(scores, batch, 1.5, 0.25)) == pytest.approx(expected, rel=1e-5)


def test_the_sign_the_preferred_statement_rises():
    batch = collate([member([5], [[6], [7]], [7, 1])])
    scores = torch.zeros(2, requires_grad=True)
    loss_of(scores, batch, 1.0, 0.0).backward()
    assert scores.grad[0] < 0 < scores.grad[1]


def test_loss_and_gradient_do_not_depend_on_passes_or_order_of_members():
    def run(members, rows_a_pass):
        model = tiny.make_judge(TOKENIZER)
        batch = collate(members, rows_a_pass)
        states = prefix_states(model, batch["prefix_ids"], batch["prefix_lengths"])
        scores = torch.cat([suffix_scores(model, states, **one) for one in batch["passes"]])
        loss = loss_of(scores, batch, 1.5, 0.5)
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
    batch = collate([MEMBERS[1]])
    scores = torch.zeros(2, requires_grad=True)
    loss = loss_of(scores, batch, 1.0, 1.0)
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
    own = train._starting_scale(fitted, world(20, seed=5), RATINGS)
    assert own.slope == pytest.approx(fitted.calibration.slope, rel=0.5)
    random = PreferenceModel(tiny.make_judge(TOKENIZER, seed=7), TOKENIZER, START)
    ratings = [r for r in world(20) for _ in (0, 1)]
    shuffled = np.random.default_rng(0).permutation([r.agreement for r in ratings])
    ratings = [
        Rating(r.deliberation_id, r.member, "Q?", "o", r.statement, int(a), 4)
        for r, a in zip(ratings, shuffled, strict=True)
    ]
    scale = train._starting_scale(random, ratings, RATINGS)
    assert scale.slope * score_ratings(random, ratings).std() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("precision, dtype", [({}, torch.float32), ({"bf16": True}, torch.bfloat16)])
def test_bfloat16_reaches_the_backbone(tmp_path, precision, dtype):
    """The loss does not run through the model's forward, around which the library puts its autocast."""
    model, seen = tiny.make_judge(TOKENIZER), set()

    def watch(module, inputs, output):
        if module.training:
            seen.add(output.dtype)

    model.model.layers[0].mlp.gate_proj.register_forward_hook(watch)
    fit(config(tmp_path, max_steps=1, **precision), world(4), world(2, first=50), model, TOKENIZER, progress=False)
    assert seen == {dtype}


def test_dropout_is_off_in_training(tmp_path):
    model = tiny.make_judge(TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    fit(config(tmp_path, max_steps=1), world(4), world(2, first=50), model, TOKENIZER, progress=False)
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


def test_the_starting_scale_is_measured_where_the_model_is_trained(tmp_path, monkeypatch):
    model, moved = tiny.make_judge(TOKENIZER), []
    monkeypatch.setattr(model, "to", lambda place, *_, **__: moved.append(torch.device(place)) or model)
    arguments = config(tmp_path, max_steps=1)

    def measure(*_):
        assert moved == [arguments.device]
        return START

    monkeypatch.setattr(train, "_starting_scale", measure)
    fit(arguments, world(4), world(2, first=50), model, TOKENIZER, progress=False)


@pytest.mark.parametrize("kind", [Rating, Choice])
def test_a_fit_that_diverged_is_refused(tmp_path, kind):
    rows = {Rating: (world(6), world(2, first=50)), Choice: (told(Choice, 6), told(Choice, 2, 50))}[kind]
    arguments = config(tmp_path, learning_rate=1e30, max_grad_norm=0.0, max_steps=3)
    with pytest.raises(InputError, match="lower it") as error:
        fit(arguments, *rows, tiny.make_judge(TOKENIZER), TOKENIZER, progress=False)
    assert error.value.field == "learning_rate"


def test_held_out_scores_that_are_no_numbers_are_refused():
    model = PreferenceModel(tiny.make_judge(TOKENIZER), TOKENIZER, Calibration((0.0,), 1.0, VOTES))
    with torch.no_grad():
        model.model.score.weight.fill_(torch.inf)
    for rows in (told(Vote, 2), told(Choice, 2)):
        with pytest.raises(InputError, match="lower it") as error:
            calibrated(model, rows, [], VOTES, True, set(), 0.6)
        assert error.value.field == "learning_rate"


# --- every kind of response, encoders, and the ensemble


def told(kind, deliberations, first=0):
    """The likings of ``world`` as votes, ranks or choices."""
    colours = {"blue": 1, "pink": -1}
    rows = []
    for d in range(first, first + deliberations):
        for k, opinion in enumerate(("generous", "strict")):
            if kind is Choice:
                rows += [Choice(f"d{d}", k, "Q?", opinion, f"blue {x}", f"pink {x}") for x in ("car", "hat")]
                continue
            for colour, liking in colours.items():
                for x in ("car", "hat"):
                    value = liking if kind is Vote else int(liking < 0)
                    rows.append(kind(f"d{d}", k, "Q?", opinion, f"{colour} {x}", value))
    return rows


@pytest.mark.parametrize("kind", [Vote, Rank, Choice])
def test_it_fits_votes_ranks_and_choices(tmp_path, kind):
    model = tiny.make_judge(TOKENIZER)
    result = fit(config(tmp_path, max_steps=25), told(kind, 20), told(kind, 5, 50), model, TOKENIZER, progress=False)
    assert result.calibration.values == VOTES
    utilities = score_one_by_one(result, "Q?", ["generous"], ["blue hat", "pink hat"]).utilities[0]
    assert 1 <= utilities[1] < utilities[0] - 1 <= 6
    result.save(tmp_path / "m")
    assert PreferenceModel.load(tmp_path / "m").calibration == result.calibration


def test_choices_beside_votes_are_fitted_and_ratings_beside_votes_are_refused(tmp_path):
    both = [*told(Vote, 6), *told(Choice, 6)]
    result = fit(config(tmp_path, max_steps=1), both, told(Vote, 2, 50), tiny.make_judge(TOKENIZER), TOKENIZER, False)
    assert result.metadata["measures"]["auc"] is not None
    with pytest.raises(InputError, match="two scales") as error:
        fit(config(tmp_path), [*told(Vote, 2), *world(2)], world(2, first=50), tiny.make_judge(TOKENIZER), TOKENIZER)
    assert error.value.field == "ratings"


def test_soft_votes_are_the_mean_over_hard_ones_and_their_pairs_over_those_told_apart():
    def loss(*rows):
        batch = collate(members_of(UNFITTED, rows, margin=1))
        scores = torch.tensor([[0.8], [-0.3]])
        return preference_loss(scores, batch, Calibration((0.4,), 1.5, VOTES), 1.0)[1]

    def soft(a, b):
        return [SoftVote("d", 0, "Q?", "o", text, p) for text, p in (("a", a), ("b", b))]

    def hard(a, b):
        return [Vote("d", 0, "Q?", "o", text, vote) for text, vote in (("a", a), ("b", b))]

    found = loss(*soft(0.7, 0.2))
    chance = {1: {1: 0.7, -1: 0.3}, 2: {1: 0.2, -1: 0.8}}
    expected = {(a, b): chance[1][a] * chance[2][b] for a in (1, -1) for b in (1, -1)}
    ordinal = sum(p * loss(*hard(*votes))["ordinal"] for votes, p in expected.items())
    assert found["ordinal"] == pytest.approx(ordinal)
    told = {votes: p for votes, p in expected.items() if sum(votes) == 0}  # the two ways to tell them apart
    pairwise = sum(p * loss(*hard(*votes))["pairwise"] for votes, p in told.items()) / sum(told.values())
    assert found["pairwise"] == pytest.approx(pairwise)
    assert loss(*soft(1, 0)) == pytest.approx(loss(*hard(1, -1)))
    assert loss(*soft(1, 1))["pairwise"] == 0 and "accuracy" not in loss(*soft(1, 1))


def test_soft_votes_beside_votes_teach_and_are_no_measure(tmp_path):
    taught = [
        SoftVote(r.deliberation_id, r.member, r.question, r.opinion, r.statement, 0.9 if r.vote > 0 else 0.1)
        for r in told(Vote, 20)
    ]
    for ordinal_weight in (0.0, 1.0):
        model = tiny.make_judge(TOKENIZER)
        keys = config(tmp_path, max_steps=25, ordinal_weight=ordinal_weight)
        result = fit(keys, taught, told(Vote, 5, 50), model, TOKENIZER, progress=False)
        utilities = score_one_by_one(result, "Q?", ["generous"], ["blue hat", "pink hat"]).utilities[0]
        assert utilities[1] < utilities[0] - 1
    with pytest.raises(InputError, match="teacher") as error:
        fit(config(tmp_path), told(Vote, 2), [replace(taught[0], deliberation_id="other")], model, TOKENIZER)
    assert error.value.field == "eval_ratings"
    with pytest.raises(InputError, match="two scales"):
        fit(config(tmp_path), [*taught, *world(2)], world(2, first=50), model, TOKENIZER)
    with pytest.raises(InputError, match="soft votes") as error:
        fit(config(tmp_path, between_weight=1.0), taught, told(Vote, 5, 50), model, TOKENIZER)
    assert error.value.field == "between_weight"


@pytest.mark.parametrize("order", [1, -1])
def test_a_soft_vote_beside_an_answer_on_the_same_statement_is_refused(order):
    rows = [Vote("d", 3, "Q?", "o", "a statement", 1), SoftVote("d", 3, "Q?", "o", "a statement", 0.2)]
    with pytest.raises(InputError, match="member 3: 'a statement'"):
        members_of(UNFITTED, rows[::order], margin=1)


def test_soft_votes_without_held_out_answers_are_refused(tmp_path):
    path = tmp_path / "soft.jsonl"
    row = {"deliberation_id": "d", "member": 0, "question": "Q?", "opinion": "o", "statement": "s", "p_agree": 0.5}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="soft votes") as error:
        train.main(config(tmp_path, ratings=[str(path)], output_dir=str(tmp_path / "m")))
    assert error.value.field == "eval_ratings"


def test_a_warm_started_model_keeps_its_scale_also_beside_soft_votes(fitted):
    votes = [
        Vote(r.deliberation_id, r.member, r.question, r.opinion, r.statement, 1 if r.agreement > 4 else -1)
        for r in world(20, seed=5)
    ]
    soft = [SoftVote(r.deliberation_id, r.member, r.question, r.opinion, r.statement, 0.5) for r in votes]
    alone, beside = (train._starting_scale(fitted, rows, VOTES) for rows in (votes, [*votes, *soft]))
    assert alone == beside and alone.slope > 0.5


def test_a_head_whose_scores_hardly_differ_is_not_magnified_without_bound():
    model = PreferenceModel(tiny.make_judge(TOKENIZER, seed=7), TOKENIZER, START)
    with torch.no_grad():
        model.model.score.weight.mul_(1e-4)
    assert train._starting_scale(model, told(Choice, 4), VOTES).slope == 10
    rng = np.random.default_rng(0)
    for count in (3, 12, 50):  # votes at random: what little they seem to say is noise
        votes = [Vote("d", k, "Q?", f"opinion {k}", f"thing {k}", int(rng.choice((-1, 1)))) for k in range(count)]
        assert train._starting_scale(model, votes, VOTES).slope == 10


def test_a_fit_on_a_cpu_leaves_the_attention_it_found(tmp_path):
    model, seen = tiny.make_judge(TOKENIZER), set()
    before = model.config._attn_implementation
    model.model.layers[0].register_forward_pre_hook(
        lambda module, _: seen.add(model.config._attn_implementation) if module.training else None
    )
    fit(config(tmp_path, max_steps=1), told(Vote, 4), told(Vote, 2, 50), model, TOKENIZER, progress=False)
    assert seen == {"eager"} and model.config._attn_implementation == before != "eager"


def test_a_pass_is_no_vote():
    rows = [Vote("d", 0, "Q?", "o", text, vote) for text, vote in (("a", 1), ("b", 0), ("c", -1))]
    (one,) = members_of(UNFITTED, rows, margin=1)
    assert one.labels == [2, 0, 1] and one.pairs == [(0, 2)]


@pytest.mark.parametrize("arch", ["bert", "roberta"])
@pytest.mark.parametrize("peft", [False, True])
def test_encoders_are_fitted_in_full_and_with_lora_and_load_plainly(tmp_path, arch, peft):
    tokenizer = tiny.make_encoder_tokenizer(arch)
    arguments = config(
        tmp_path, max_steps=40, use_peft=peft, lora_target_modules=["query", "value"], lora_r=8, learning_rate=5e-3
    )
    model = tiny.make_encoder(tokenizer, arch)
    result = fit(arguments, world(20), world(5, seed=1, first=50), model, tokenizer, progress=False)
    assert result.metadata["measures"]["accuracy"] > 0.8
    result.save(tmp_path / "m")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    pair = tokenizer(preference_prefix("Q?", "strict"), preference_suffix("blue hat"), return_tensors="pt")
    ours = score_one_by_one(PreferenceModel.load(tmp_path / "m"), "Q?", ["strict"], ["blue hat"]).raw[0, 0]
    with torch.no_grad():
        assert plain(**pair).logits.shape == (1, 1)
        assert plain(**pair).logits[0, 0].item() == pytest.approx(float(ours), abs=1e-5)


def test_an_encoder_is_fitted_with_prefix_attention_and_keeps_it(tmp_path):
    tokenizer = tiny.make_encoder_tokenizer()
    arguments = config(tmp_path, max_steps=40, attention="prefix", learning_rate=5e-3, freeze_embeddings=True)
    model = tiny.make_encoder(tokenizer)
    before = model.bert.embeddings.word_embeddings.weight.clone()
    result = fit(arguments, world(20), world(5, seed=1, first=50), model, tokenizer, progress=False)
    assert result.metadata["measures"]["accuracy"] > 0.8
    assert torch.equal(result.model.bert.embeddings.word_embeddings.weight, before)
    result.save(tmp_path / "m")
    loaded = PreferenceModel.load(tmp_path / "m")
    assert loaded.attention == "prefix"
    texts = "Q?", ["strict", "generous"], ["blue hat", "pink sea"]
    np.testing.assert_allclose(score(loaded, *texts).raw, score_one_by_one(result, *texts).raw, atol=1e-5)
    for asked, kept in ((None, "prefix"), ("pair", "pair")):  # a fit that starts from it keeps it unless told otherwise
        arguments = config(tmp_path, model_name_or_path=str(tmp_path / "m"), max_steps=1, attention=asked)
        assert fit(arguments, world(4), world(2, first=50), progress=False).attention == kept


def test_the_saved_head_is_the_mean_of_the_ensemble_and_members_lie_beside_it(fitted, tmp_path):
    fitted.save(tmp_path / "m")
    loaded = PreferenceModel.load(tmp_path / "m")
    assert (tmp_path / "m" / "ensemble.safetensors").is_file() and loaded.ensemble.out_features == 4
    rows = score_responses(loaded, world(2, first=90))
    np.testing.assert_allclose(rows.ensemble.mean(axis=1), rows.raw, atol=1e-5)
    assert rows.ensemble.std(axis=1).min() > 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    ids = loaded.prefix_ids("Q?", "strict") + loaded.suffix_ids("blue hat")
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits
    assert logits.shape == (1, 1)
    assert logits[0, 0].item() == pytest.approx(
        float(score(loaded, "Q?", ["strict"], ["blue hat"]).raw[0, 0]), abs=1e-5
    )
    scores = score(loaded, "Q?", ["strict", "generous"], ["blue hat"])
    assert scores.sd.shape == (2, 1) and (scores.sd > 0).all()
    np.testing.assert_allclose(scores.sd, score(fitted, "Q?", ["strict", "generous"], ["blue hat"]).sd, atol=1e-6)


def test_one_head_is_no_ensemble(tmp_path):
    model = tiny.make_judge(TOKENIZER)
    result = fit(config(tmp_path, heads=1, max_steps=1), world(4), world(2, first=50), model, TOKENIZER, progress=False)
    assert result.ensemble is None and score(result, "Q?", ["o"], ["s"]).sd is None
    result.save(tmp_path / "m")
    assert not (tmp_path / "m" / "ensemble.safetensors").exists()


def test_each_head_sees_its_own_weights_of_members():
    several = members_of(UNFITTED, world(200), margin=2, heads=3, seed=1)
    weights = np.array([m.weights for m in several])
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.15)
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.15
    batch = collate(several[:4])
    assert batch["pair_weights"].shape == (len(batch["pairs"]), 3) and batch["row_weights"].shape[1] == 3


def test_between_pairs_are_members_of_a_deliberation_told_apart_by_one_statement():
    same = [member([5], [[9], [8]], [7, 1]), member([6], [[9], [8]], [2, 2]), member([7], [[9]], [1], deliberation=1)]
    batch = collate(same, between_weight=0.5)
    rows = [(same[o].prefix[0], int(i[0])) for one in batch["passes"] for o, i in zip(one["owners"], one["ids"])]
    weights = batch["pair_weights"][:, 0].tolist()
    found = {(rows[w], rows[x]): weight for (w, x), weight in zip(batch["pairs"], weights, strict=True)}
    assert found == {((5, 9), (5, 8)): 1.0, ((5, 9), (6, 9)): 1.0}  # within; between: 0.5 x 2 members / 1 pair


def test_with_between_pairs_a_deliberations_members_come_together():
    members = members_of(UNFITTED, world(12), margin=2)
    order = list(DeliberationSampler(members, seed=3))
    assert sorted(order) == list(range(24))
    together = [members[i].deliberation for i in order]
    assert all(a == b for a, b in zip(together[::2], together[1::2], strict=True))
    assert order == list(DeliberationSampler(members, seed=3)) != list(DeliberationSampler(members, seed=4))


def test_between_pairs_teach_whose_opinion_is_read(tmp_path):
    def gap(weight):
        arguments = config(tmp_path, between_weight=weight, ordinal_weight=0.0, max_steps=30, heads=1)
        rows = [Rating(f"d{d}", k, "Q?", o, "so", a, 4) for d in range(20) for k, (o, a) in enumerate(OPPOSED)]
        rows += [Rating("x", 0, "Q?", "none", text, a, 4) for text, a in (("up", 7), ("down", 1))]
        model = tiny.make_judge(TOKENIZER)
        model = fit(arguments, rows, world(2, first=50), model, TOKENIZER, progress=False)
        raw = score_one_by_one(model, "Q?", [o for o, _ in OPPOSED], ["so"]).raw[:, 0]
        return raw[0] - raw[1]

    assert gap(2.0) > gap(0.0) + 0.5


OPPOSED = [("yes please", 7), ("not at all", 1)]


# --- stop and go


@pytest.mark.parametrize("keys", [{}, {"between_weight": 1.0}, {"use_peft": True, "lora_target_modules": ["q_proj"]}])
def test_a_resumed_fit_equals_the_uninterrupted_one_also_in_a_later_epoch(tmp_path, keys):
    def weights(folder, **more):
        arguments = config(folder, num_train_epochs=3, save_strategy="steps", save_steps=6, **keys, **more)
        result = fit(arguments, world(16), world(2, first=50), tiny.make_judge(TOKENIZER), TOKENIZER, progress=False)
        return torch.cat([p.detach().flatten() for p in result.model.parameters()])

    whole = weights(tmp_path)  # 4 steps an epoch: step 6 is in the second
    assert torch.equal(weights(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-6")), whole)


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_every_epoch_has_an_order_of_its_own(tmp_path, between):
    members = [member([1], [[2, 3]], [4], deliberation=k // 4) for k in range(40)]
    arguments = config(tmp_path, between_weight=between)
    sampler = train._PreferenceTrainer(tiny.make_judge(TOKENIZER), arguments, members, UNFITTED)._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


def test_what_is_calibrated_is_what_is_loaded_after_a_fit_in_bfloat16(tmp_path):
    tokenizer = tiny.make_encoder_tokenizer()
    arguments = config(tmp_path, max_steps=2, bf16=True)
    result = fit(arguments, world(6), world(2, first=50), tiny.make_encoder(tokenizer), tokenizer, progress=False)
    result.save(tmp_path / "m")
    texts = "Q?", ["strict"], ["blue hat", "pink sea"]
    np.testing.assert_allclose(
        score(PreferenceModel.load(tmp_path / "m"), *texts).raw, score(result, *texts).raw, atol=1e-6
    )


# --- what is held out


def test_choices_held_out_keep_the_level_that_votes_taught(tmp_path):
    votes = [Vote(f"d{d}", 0, "Q?", "o", "blue", 1 if d % 10 == 0 else -1) for d in range(40)]
    votes += [Vote(f"d{d}", 0, "Q?", "o", "pink", -1) for d in range(40)]  # 4 of 80 agree
    arguments = config(tmp_path, max_steps=1)
    result = fit(arguments, votes, told(Choice, 2, 50), tiny.make_judge(TOKENIZER), TOKENIZER, progress=False)
    assert score_one_by_one(result, "Q?", ["o"], ["blue", "pink"]).utilities.mean() < 3  # a toss-up would be 4


@pytest.mark.parametrize("kind", [Choice, Rank])
def test_choices_and_ranks_are_measured_with_their_controls(tmp_path, kind):
    arguments, held_out = config(tmp_path, max_steps=25), told(kind, 4, 50)
    result = fit(arguments, told(kind, 20), held_out, tiny.make_judge(TOKENIZER), TOKENIZER, progress=False)
    found = result.metadata["measures"]
    assert found["accuracy"] > 0.9 and found["swapped"] > 0.9  # members here differ in level alone
    assert found["longest"] == 0.5 and found["overlap"] == 0.5
    assert found["pairs"] == (16 if kind is Choice else 32)
    assert score(result, "Q?", ["o"], ["s"]).sd is not None


def test_held_out_choices_beside_votes_are_measured_apart(tmp_path):
    held_out = [*told(Vote, 2, 50), *told(Choice, 2, 50)]
    result = fit(config(tmp_path, max_steps=1), told(Vote, 6), held_out, tiny.make_judge(TOKENIZER), TOKENIZER, False)
    assert {"accuracy", "compared_accuracy", "compared_swapped"} <= set(result.metadata["measures"])


# --- bad input


def refused(ratings, eval_ratings, model=None, tokenizer=TOKENIZER, **keys):
    """The error of a fit that must not train: its model is not touched."""
    model = tiny.make_judge(TOKENIZER) if model is None else model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError) as error:
        fit(PreferenceConfig(output_dir="unused", use_cpu=True, **keys), ratings, eval_ratings, model, tokenizer, False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return error.value


def test_ratings_need_ratings_held_out():
    assert refused(world(4), told(Choice, 2, 50)).field == "eval_ratings"


@pytest.mark.parametrize("where", ["trained", "held_out"])
def test_a_text_too_long_for_the_model_is_named_before_training(where):
    rows = {"trained": world(3), "held_out": world(2, first=50)}
    rows[where].append(Rating("dx", 3, "Q?", "word " * 380, "word " * 100, 4, 4))  # a byte a token, 2048 at most
    error = refused(rows["trained"], rows["held_out"])
    assert error.field == "ratings" and "'dx', member 3" in str(error.value)


def test_a_member_with_two_opinions_is_refused():
    rows = world(3)
    error = refused([*rows, replace(rows[0], opinion="another", statement="new")], world(2, first=50))
    assert error.field == "opinion"
    held_out = world(2, first=50)
    error = refused(rows, [*held_out, replace(held_out[0], opinion="another", statement="new")])
    assert error.field == "opinion" and "'d50', member 0" in error.value


def test_a_filter_that_leaves_nobody_says_so():
    once = [Rating("d", 0, "Q?", "o", f"s{k}", a, 4) for k, a in enumerate((1, 7, 1, 7, 1, 7))]
    again = [replace(r, agreement=8 - r.agreement) for r in once]
    assert refused([*once, *again], world(2, first=50)).field == "min_kappa"


def test_a_text_met_twice_makes_no_pair_with_itself():
    rows = [Vote("d", 0, "Q?", "o", "a", 1), Vote("d", 0, "Q?", "o", "a", -1), Vote("d", 0, "Q?", "o", "b", -1)]
    (one,) = members_of(UNFITTED, rows, margin=1)
    assert all(i != j for i, j in one.pairs)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"margin": 0}, "margin"),
        ({"margin": 7}, "margin"),
        ({"ordinal_weight": -1.0}, "ordinal_weight"),
        ({"between_weight": -0.1}, "between_weight"),
        ({"heads": 0}, "heads"),
        ({"attention": "causal"}, "attention"),
        ({"min_kappa": 1.5}, "min_kappa"),
        ({"eval_share": 1.0}, "eval_share"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"label_smoothing_factor": 0.3}, "label_smoothing_factor"),
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


def test_an_adapter_as_base_is_refused_before_anything_is_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny.make_policy(TOKENIZER).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    arguments = config(tmp_path / "out", model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="is an adapter") as error:
        fit(arguments, world(4), world(2, first=50), progress=False)
    assert error.value.field == "model_name_or_path"


def test_an_architecture_that_reads_otherwise_in_a_batch_is_refused_before_anything_is_trained(tmp_path):
    model = tiny.make_judge(TOKENIZER)
    model.config.is_causal = False
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="llama") as error:
        fit(config(tmp_path), world(4), world(2, first=50), model, TOKENIZER, progress=False)
    assert error.value.field == "model_name_or_path"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_bert_whose_tokenizer_makes_no_types_learns_without_them_in_prefix_attention(tmp_path):
    tokenizer = tiny.make_encoder_tokenizer("roberta")
    model, seen = tiny.make_encoder(tokenizer, "bert"), []
    model.bert.embeddings.token_type_embeddings.register_forward_hook(
        lambda module, args, _: seen.append(args[0].max())
    )
    arguments = config(tmp_path, max_steps=2, attention="prefix")
    fit(arguments, world(4), world(2, first=50), model, tokenizer, progress=False)
    assert seen and not any(seen)


# --- the command


def test_keys_come_from_yaml_and_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "preference.yaml"
    file.write_text("ratings: r.jsonl\nmargin: 3\nlearning_rate: 2.0e-4\nuse_peft: true\noutput_dir: out\n")
    (parsed,) = TrlParser(PreferenceConfig).parse_args_and_config(["--config", str(file), "--margin", "1"])
    assert (parsed.margin, parsed.learning_rate, parsed.use_peft, parsed.ratings) == (1, 2e-4, True, ["r.jsonl"])
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
    kept, held_out = hold_out(world(10), 0.15, seed=42)  # a statement drawn twice counts once, as in a second showing
    assert loaded.metadata["ratings"] == len(showings(kept)[0])
    assert loaded.metadata["eval_ratings"] == len(showings(held_out)[0])
    assert (out / "reliability.png").stat().st_size > 5000


def test_data_seed_zero_is_a_seed(tmp_path):
    def order(**keys):
        arguments = config(tmp_path, **keys)
        members = [member([1], [[2, 3]], [4])] * 40
        trainer = train._PreferenceTrainer(tiny.make_judge(TOKENIZER), arguments, members, UNFITTED)
        return list(trainer._get_train_sampler())

    assert order(seed=5, data_seed=0) == order(seed=0) != order(seed=5)


def test_a_base_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        train._load_base("runs/judge")
