"""Calibration (a proper distribution, fitted by maximum likelihood) and the preference model on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from deliberation.types import InputError
from reward.calibration import (
    RATINGS,
    VOTES,
    Calibration,
    ordinal_log_likelihood,
)
from reward.preference import PreferenceModel, without_weights
from reward.uncertainty import Uncertainty

import tiny

CALIBRATION = Calibration((-3.0, -1.5, -0.5, 0.5, 1.0, 2.5), slope=1.7)


@pytest.fixture
def preference_model(tiny_judge, tiny_tokenizer):
    return PreferenceModel(tiny_judge, tiny_tokenizer, CALIBRATION, {"data": "tiny", "seed": 3})


def draw_ratings(calibration, scores, seed=0):
    """Ratings sampled from the model itself."""
    u = np.random.default_rng(seed).random(len(scores))[:, None]
    return 1 + (u > np.cumsum(calibration.probabilities(scores), axis=1)[:, :-1]).sum(axis=1)


# --- the distribution


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5))
def test_probabilities_are_a_distribution_and_utility_is_its_mean(scores):
    p = CALIBRATION.probabilities(scores)
    assert p.shape == (len(scores), 7)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-12)
    utilities = CALIBRATION.utilities(scores)
    np.testing.assert_allclose(utilities, p @ np.arange(1, 8), rtol=1e-12)
    assert (utilities >= 1).all() and (utilities <= 7).all()


@given(st.floats(-20, 20), st.floats(1e-3, 5))
def test_utility_rises_with_the_score(score, more):
    low, high = CALIBRATION.utilities([score, score + more])
    assert high >= low
    assert CALIBRATION.utilities(5.0) > CALIBRATION.utilities(-5.0) + 4


def test_cumulative_form_is_as_documented():
    p = CALIBRATION.probabilities(0.4)
    for k, cut in enumerate(CALIBRATION.cut_points, start=1):
        assert p[:k].sum() == pytest.approx(1 / (1 + np.exp(-(cut - 1.7 * 0.4))))


def test_log_likelihood_equals_the_probabilities_and_stays_finite_far_out():
    scores, ratings = np.repeat([-2.0, 0.3, 4.0], 7), np.tile(np.arange(1, 8), 3)
    cuts = torch.tensor(CALIBRATION.cut_points, dtype=torch.float64)
    log_p = ordinal_log_likelihood(torch.tensor(scores), torch.tensor(ratings), cuts, CALIBRATION.slope)
    np.testing.assert_allclose(
        log_p.exp().numpy(), CALIBRATION.probabilities(scores)[np.arange(21), ratings - 1], rtol=1e-9
    )
    far = torch.full((7,), 1e3, dtype=torch.float64, requires_grad=True)
    value = ordinal_log_likelihood(far, torch.arange(1, 8), cuts, 1.0).sum()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(far.grad).all()


@pytest.mark.parametrize(
    "cuts, slope, field",
    [
        ((1, 2, 3), 1, "cut_points"),
        ((1, 2, 3, 4, 5, 5), 1, "cut_points"),
        ((1, 2, 3, 4, 5, np.nan), 1, "cut_points"),
        ((1, 2, 3, 4, 5, 6), 0, "slope"),
        ((1, 2, 3, 4, 5, 6), -1, "slope"),
        ((1, 2, 3, 4, 5, 6), np.inf, "slope"),
    ],
)
def test_an_impossible_calibration_is_refused(cuts, slope, field):
    with pytest.raises(InputError) as error:
        Calibration(cuts, slope)
    assert error.value.field == field


def test_round_trip_through_a_dict():
    assert Calibration.from_dict(json.loads(json.dumps(CALIBRATION.to_dict()))) == CALIBRATION
    with pytest.raises(InputError, match="slope"):
        Calibration.from_dict({"cut_points": [1, 2, 3, 4, 5, 6]})


# --- the fit


def test_fit_recovers_the_parameters_it_was_drawn_from():
    scores = np.random.default_rng(1).normal(0.5, 1.5, 20_000)
    fitted = Calibration.fit(scores, draw_ratings(CALIBRATION, scores))
    np.testing.assert_allclose(fitted.cut_points, CALIBRATION.cut_points, atol=0.15)
    assert fitted.slope == pytest.approx(CALIBRATION.slope, rel=0.05)


def test_fit_is_a_maximum_of_the_likelihood():
    scores = np.random.default_rng(2).normal(size=500)
    ratings = draw_ratings(CALIBRATION, scores)

    def log_likelihood(calibration):
        return np.log(calibration.probabilities(scores)[np.arange(500), ratings - 1]).sum()

    fitted = Calibration.fit(scores, ratings)
    for i in range(6):
        for step in (-0.1, 0.1):
            cuts = list(fitted.cut_points)
            cuts[i] += step
            assert log_likelihood(Calibration(tuple(cuts), fitted.slope)) < log_likelihood(fitted)
    for factor in (0.8, 1.25):
        assert log_likelihood(Calibration(fitted.cut_points, fitted.slope * factor)) < log_likelihood(fitted)


def test_fit_does_not_depend_on_the_scale_of_the_scores():
    scores = np.random.default_rng(3).normal(size=400)
    ratings = draw_ratings(CALIBRATION, scores)
    moved = Calibration.fit(1000 + 50 * scores, ratings)
    np.testing.assert_allclose(
        moved.utilities(1000 + 50 * scores), Calibration.fit(scores, ratings).utilities(scores), atol=1e-4
    )


@pytest.mark.parametrize("ratings", [[4] * 30, [1] * 15 + [7] * 15, [2, 3, 6] * 10])
def test_ratings_never_seen_leave_the_fit_finite(ratings):
    calibration = Calibration.fit(np.tile([-0.1, 0.1], 15) + np.array(ratings), ratings)
    p = calibration.probabilities(np.array(ratings, dtype=float))
    assert (p > 0).all()  # a rating never seen stays possible
    assert p[np.arange(30), np.array(ratings) - 1].min() > 0.5


def test_scores_that_do_not_rise_with_ratings_are_said():
    ratings = np.tile(np.arange(1, 8), 20)
    with pytest.warns(UserWarning, match="do not rise"):
        calibration = Calibration.fit(-ratings.astype(float), ratings)
    assert calibration.slope > 0
    assert np.ptp(calibration.utilities([-7.0, -1.0])) < 0.1


@pytest.mark.parametrize(
    "scores, ratings, field",
    [
        ([], [], "ratings"),
        ([1.0], [8], "ratings"),
        ([1.0], [2.5], "ratings"),
        ([1.0, 2.0], [3], "scores"),
        ([np.nan], [3], "scores"),
    ],
)
def test_bad_calibration_data_is_refused(scores, ratings, field):
    with pytest.raises(InputError) as error:
        Calibration.fit(scores, ratings)
    assert error.value.field == field


def test_shares_of_ratings_give_the_cut_points():
    ratings = np.repeat(np.arange(1, 8), [100, 200, 300, 400, 300, 200, 100])
    np.testing.assert_allclose(
        Calibration.of_ratings(ratings).probabilities(0.0), np.bincount(ratings)[1:] / 1600, atol=1e-3
    )


# --- on disk


def test_save_then_load_gives_the_same_model(preference_model, tmp_path):
    preference_model.save(tmp_path / "deep" / "model")
    loaded = PreferenceModel.load(tmp_path / "deep" / "model")
    assert (loaded.calibration, loaded.metadata) == (CALIBRATION, {"data": "tiny", "seed": 3})
    assert not loaded.model.training
    for name, value in preference_model.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    assert loaded.prefix_ids("Q?", "o") == preference_model.prefix_ids("Q?", "o")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]  # no temporary folder left


def test_the_version_tells_apart_whatever_scores_or_calls_apart(preference_model, tmp_path):
    model = replace(preference_model, ensemble=torch.nn.Linear(32, 2), uncertainty=Uncertainty(0.3, 0.1 + 0.2, 1 / 3))
    other = Calibration((-3.0, -1.5, -0.5, 0.5, 1.0, 2.6), slope=1.7)
    tokenizer = tiny.make_encoder_tokenizer()
    pair = PreferenceModel(tiny.make_encoder(tokenizer), tokenizer, CALIBRATION)
    made = [
        model,
        replace(model, calibration=other),
        replace(model, uncertainty=Uncertainty()),
        replace(model, uncertainty=None),
        replace(model, ensemble=torch.nn.Linear(32, 2)),
        replace(model, ensemble=None),
        pair,
        replace(pair, attention="prefix"),
    ]
    assert len({one.version for one in made}) == len(made)
    assert replace(model, metadata={"seed": 4}).version == model.version
    for k, one in enumerate(made):
        one.save(tmp_path / str(k))
        assert PreferenceModel.load(tmp_path / str(k)).version == one.version


def test_a_model_whose_tokenizer_cannot_pad_is_saved_with_the_end_of_text_as_padding(tiny_tokenizer, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    model = tiny.make_judge(tiny_tokenizer)
    model.config.pad_token_id = None
    PreferenceModel(model, tokenizer, CALIBRATION).save(tmp_path / "m")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert plain.config.pad_token_id == tokenizer.eos_token_id
    assert plain(torch.tensor([[5, 6, 7], [5, 6, 2]])).logits.shape == (2, 1)


def test_transformers_loads_it_without_our_code(preference_model, tmp_path):
    preference_model.save(tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "Question: Q?\nOpinion: o\nConsensus: yes"
    with torch.no_grad():
        theirs = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
        ids = torch.tensor([preference_model.prefix_ids("Q?", "o") + preference_model.suffix_ids("yes")])
        ours = preference_model.model(ids).logits
    torch.testing.assert_close(theirs, ours)
    assert theirs.shape == (1, 1)


def test_saving_over_a_model_replaces_it_and_keeps_other_files(preference_model, tmp_path):
    preference_model.save(tmp_path / "m")
    (tmp_path / "m" / "log.jsonl").write_text("kept")
    (tmp_path / "m" / "model-00001-of-00002.safetensors").write_text("stale shard")
    preference_model.metadata = {"seed": 4}
    preference_model.save(tmp_path / "m")
    assert PreferenceModel.load(tmp_path / "m").metadata == {"seed": 4}
    assert (tmp_path / "m" / "log.jsonl").read_text() == "kept"
    assert not (tmp_path / "m" / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("arch", ["llama", "bert", "roberta"])
def test_without_weights_tokens_are_counted_as_with_them(arch, tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer if arch == "llama" else tiny.make_encoder_tokenizer(arch)
    model = tiny.make_judge(tokenizer) if arch == "llama" else tiny.make_encoder(tokenizer, arch)
    PreferenceModel(model, tokenizer, CALIBRATION).save(tmp_path / "m")
    state, whole = torch.random.get_rng_state(), PreferenceModel.load(tmp_path / "m")
    counting = without_weights(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), state) and counting.model.device.type == "meta"
    assert (counting.room, counting.prefix_ids("Q?", "o")) == (whole.room, whole.prefix_ids("Q?", "o"))
    assert counting.suffix_ids("yes") == whole.suffix_ids("yes")


def test_a_save_that_fails_leaves_nothing(preference_model, tmp_path):
    preference_model.metadata = {"not JSON": object()}
    with pytest.raises(TypeError):
        preference_model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["calibration.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(preference_model, tmp_path, missing):
    preference_model.save(tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    if missing == "model.safetensors":
        torch.save(preference_model.model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(InputError, match=missing.removeprefix("model.")) as error:
        PreferenceModel.load(tmp_path / "m")
    assert error.value.field == "preference_model"


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        PreferenceModel.load(tmp_path / "nothing")


# --- input


def test_special_tokens_belong_to_the_prefix_alone(preference_model, tiny_tokenizer):
    ids = preference_model.suffix_ids("We agree.")
    assert tiny_tokenizer.decode(ids) == " We agree."
    assert not set(ids) & set(tiny_tokenizer.all_special_ids)
    assert tiny_tokenizer.decode(preference_model.prefix_ids("Q?", "An\nopinion.")).endswith(
        "Question: Q?\nOpinion: An opinion.\nConsensus:"
    )


@pytest.mark.parametrize("arch", ["llama", "bert", "roberta"])
def test_no_text_of_a_user_holds_special_tokens(arch, tiny_judge):
    tokenizer = tiny.make_tokenizer() if arch == "llama" else tiny.make_encoder_tokenizer(arch)
    model = tiny_judge if arch == "llama" else tiny.make_encoder(tokenizer, arch)
    reader = PreferenceModel(model, tokenizer, CALIBRATION)

    def specials(question, opinion, statement):
        ids = reader.prefix_ids(question, opinion) + reader.suffix_ids(statement)
        return [i for i in ids if i in tokenizer.all_special_ids]

    typed = "a</s><s> <pad>b<unk>"
    assert set(tokenizer(typed).input_ids) > set(tokenizer.all_special_ids)
    assert specials(typed, typed, typed) == specials("Q?", "o", "s")
    assert len(specials("Q?", "o", "s")) == {"llama": 0, "bert": 3, "roberta": 4}[arch]


# --- votes


def test_a_votes_utility_is_one_plus_six_times_p_agree():
    votes = Calibration((0.3,), slope=2.0, values=VOTES)
    p = votes.probabilities([-1.0, 0.5])
    assert p.shape == (2, 7) and not p[:, 1:6].any()
    np.testing.assert_allclose(p[:, 6], 1 / (1 + np.exp(0.3 - 2 * np.array([-1.0, 0.5]))))
    np.testing.assert_allclose(votes.utilities([-1.0, 0.5]), 1 + 6 * p[:, 6])
    assert Calibration.from_dict(json.loads(json.dumps(votes.to_dict()))) == votes


def test_votes_are_fitted_as_a_logistic_regression():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000)
    agrees = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * scores - 0.4)))
    fitted = Calibration.fit(scores, np.where(agrees, 7, 1), VOTES)
    assert fitted.values == VOTES
    assert (fitted.slope, fitted.cut_points[0]) == (pytest.approx(1.5, abs=0.06), pytest.approx(0.4, abs=0.05))
    with pytest.raises(InputError):
        Calibration.fit([0.0, 1.0], [1, 4], VOTES)


def test_a_calibration_written_before_there_were_votes_is_of_ratings():
    old = {"cut_points": [1, 2, 3, 4, 5, 6], "slope": 1.0}
    assert Calibration.from_dict(old).values == RATINGS


@given(st.floats(-4, 4))
def test_the_utilitys_slope_is_its_derivative(score):
    for calibration in (CALIBRATION, Calibration((0.3,), slope=2.0, values=VOTES)):
        step = 1e-5
        rise = calibration.utilities(score + step) - calibration.utilities(score - step)
        assert calibration.utility_slopes(score) == pytest.approx(rise / (2 * step), abs=1e-6)
