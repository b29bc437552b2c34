"""The bi-encoder beside the cross-encoder: what it reads, that it learns, and that the folder keeps it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from deliberation.types import InputError, Vote
from reward.bi_encoder import FOLDER, BiEncoder, make_networks
from reward.calibration import VOTES, Calibration
from reward.fit_bi_encoder import fit_bi_encoder, weigh_alike
from reward.preference import PreferenceModel, fingerprint
from reward.preference_config import PreferenceConfig
from reward.scoring import score, score_one_by_one, score_responses
from reward.train import fit

import tiny

OPINIONS = ["I like pink.\nThe sea is far.", "No cars here, please.", "The sea is far.\nI like pink.", "hats"]
STATEMENTS = ["pink cars for all", "We all want the sea.", "hats"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a sentence encoder of random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), tiny.make_encoder_tokenizer()
    tiny.make_encoder(tokenizer, seed=1).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bi_encoder(arch="bert", heads=3):
    tokenizer = tiny.make_encoder_tokenizer(arch)
    model = tiny.make_encoder(tokenizer, arch, seed=1).base_model
    torch.manual_seed(0)
    return BiEncoder(model, tokenizer, make_networks(model.config.hidden_size, heads).eval())


def preference_model(heads=3, beside=True):
    tokenizer = tiny.make_encoder_tokenizer()
    model = PreferenceModel(
        tiny.make_encoder(tokenizer), tokenizer, Calibration((0.0,), 1.0, VOTES), attention="prefix"
    )
    model.ensemble = torch.nn.Linear(model.model.config.hidden_size, heads) if heads > 1 else None
    model.bi_encoder = bi_encoder(heads=heads) if beside else None
    return model


def world(seed=0, first=0, people=60):
    """Whoever likes a colour agrees with statements that have its name, and no other."""
    rng = np.random.default_rng(seed)
    return [
        Vote(
            f"d{d}",
            0,
            "Q?",
            f"I like {liked}.",
            f"{colour} {rng.choice(['car', 'hat', 'sea'])}",
            1 if colour == liked else -1,
        )
        for d in range(first, first + people)
        for liked in [rng.choice(["pink", "blue"])]
        for colour in ("pink", "blue")
    ]


def config(tmp_path, **changes):
    keys = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "heads": 2}
    return PreferenceConfig(**(keys | changes))


# --- what it reads


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_a_vector_is_the_mean_over_the_lines_whatever_is_read_beside_it(arch, monkeypatch):
    model = bi_encoder(arch)
    together = model.vectors([*OPINIONS, *STATEMENTS])
    alone = torch.cat([model.vectors([text]) for text in [*OPINIONS, *STATEMENTS]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0], together[2])
    lines = model.vectors(OPINIONS[0].split("\n"))
    torch.testing.assert_close(together[0], lines.mean(0), atol=1e-5, rtol=0)
    width = lines.shape[1]
    torch.testing.assert_close(lines.pow(2).sum(1), torch.full((2,), float(width)))  # unit vectors, scaled
    monkeypatch.setattr("reward.bi_encoder.BATCH_TOKENS", 1)
    torch.testing.assert_close(model.vectors([*OPINIONS, *STATEMENTS]), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_a_line_longer_than_what_the_encoder_reads_is_refused_and_lines_are_not(arch):
    model = bi_encoder(arch)
    with pytest.raises(InputError, match="bi_encoder = .*pink.*tokens.*longer than"):
        model.vectors(["pink " * 2000])
    assert model.vectors(["pink\n" * 2000]).isfinite().all()


def test_scores_do_not_depend_on_the_rows_beside(monkeypatch):
    model = bi_encoder()
    pairs = [(o, s) for o in OPINIONS for s in STATEMENTS]
    together = model.scores(*map(list, zip(*pairs, strict=True)))
    assert together.shape == (12, 3) and together.std() > 0
    torch.testing.assert_close(torch.cat([model.scores([o], [s]) for o, s in pairs]), together, atol=1e-5, rtol=0)
    monkeypatch.setattr("reward.bi_encoder.BATCH_ROWS", 5)
    torch.testing.assert_close(model.scores(*map(list, zip(*pairs, strict=True))), together, atol=1e-5, rtol=0)


# --- beside the cross-encoder


@pytest.mark.parametrize("heads", [1, 3])
def test_its_scores_are_added_to_the_models_and_to_every_member_of_the_ensemble(heads):
    both, alone = preference_model(heads), preference_model(heads, beside=False)
    alone.ensemble = both.ensemble
    group = ("Q?", OPINIONS, STATEMENTS)
    added = [[both.bi_encoder.scores([o], [s])[0].numpy() for s in STATEMENTS] for o in OPINIONS]
    found = score(both, *group)
    np.testing.assert_allclose(found.raw, score(alone, *group).raw + np.mean(added, axis=2), atol=1e-5)
    np.testing.assert_allclose(found.raw, score_one_by_one(both, *group).raw, atol=1e-5)
    assert found.raw.std() > 0 and found.utilities.dtype == np.float32
    votes = [Vote("d", i, "Q?", o, s, 1) for i, o in enumerate(OPINIONS) for s in STATEMENTS]
    rows, plain = score_responses(both, votes), score_responses(alone, votes)
    np.testing.assert_allclose(rows.raw.reshape(4, 3), found.raw, atol=1e-5)
    if heads > 1:
        np.testing.assert_allclose(rows.ensemble, plain.ensemble + np.reshape(added, (12, heads)), atol=1e-5)


def test_of_an_opinion_that_was_cut_it_reads_what_is_left():
    model = preference_model(heads=1)
    long = "pink car " * 400
    cut = score(model, "Q?", [long], STATEMENTS, truncate=True)
    kept = int(cut.warnings[0].split("first ")[1].split(" ")[0])
    again = score(model, "Q?", [long[:kept]], STATEMENTS)
    np.testing.assert_allclose(cut.raw, again.raw, atol=1e-5)


def test_the_folder_keeps_it_and_stays_one_that_transformers_loads(tmp_path):
    model = preference_model()
    model.save(tmp_path / "m")
    again = PreferenceModel.load(tmp_path / "m")
    np.testing.assert_array_equal(
        score(again, "Q?", OPINIONS, STATEMENTS).raw, score(model, "Q?", OPINIONS, STATEMENTS).raw
    )
    assert again.version == model.version != replace(model, bi_encoder=None).version
    with torch.no_grad():
        again.bi_encoder.networks[0][-1].bias.add_(1)
    assert again.version != model.version
    again.save(tmp_path / "m")  # in place of the old one
    assert PreferenceModel.load(tmp_path / "m").version == again.version
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.model.parameters(), strict=True))
    replace(model, bi_encoder=None).save(tmp_path / "m")
    assert not (tmp_path / "m" / FOLDER).exists() and PreferenceModel.load(tmp_path / "m").bi_encoder is None


# --- the fit


def test_it_learns_whose_opinion_it_reads_and_the_seed_alone_decides(tmp_path, encoder):
    start, arguments = Calibration((0.0,), 4.0, VOTES), config(tmp_path)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model = fit_bi_encoder(encoder, world(people=4000), start, arguments, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    votes = world(seed=1, people=200)
    found = model.scores([v.opinion for v in votes], [v.statement for v in votes])
    assert found.shape == (400, 2)
    right = (found.mean(1) > 0).numpy() == (np.array([v.vote for v in votes]) > 0)
    assert right.mean() > 0.95
    assert 0.2 < float(found.std()) < 10  # in logits
    again = fit_bi_encoder(encoder, world(people=4000), start, arguments, progress=False)
    torch.testing.assert_close(again.scores([v.opinion for v in votes], [v.statement for v in votes]), found)


def test_the_command_fits_and_saves_both_and_the_cross_encoder_is_the_same_as_without(tmp_path, encoder):
    tokenizer, data = tiny.make_encoder_tokenizer(), (world(), world(seed=1, first=100, people=20))
    keys = {"attention": "prefix", "bi_encoder": encoder}
    both, alone = (
        fit(config(tmp_path, **k), *data, tiny.make_encoder(tokenizer), tokenizer, progress=False)
        for k in (keys, keys | {"bi_encoder": None})
    )
    assert fingerprint(both.model) == fingerprint(alone.model)
    assert both.calibration != alone.calibration and both.metadata["bi_encoder"] == encoder
    assert len(both.bi_encoder.networks) == both.ensemble.out_features == 2
    together, apart = score_responses(alone, data[1]).raw, score_responses(both, data[1]).raw
    np.testing.assert_allclose((apart - together).std(), together.std(), rtol=1e-4)


def test_where_all_scores_are_one_nothing_is_weighed():
    model = preference_model(heads=1)
    before = score(model, "Q?", OPINIONS, STATEMENTS).raw
    weigh_alike(model, [Vote("d", 0, "Q?", OPINIONS[0], STATEMENTS[0], 1)])
    np.testing.assert_array_equal(score(model, "Q?", OPINIONS, STATEMENTS).raw, before)


def test_a_held_out_line_too_long_for_it_is_refused_before_anything_is_trained(tmp_path, encoder):
    data, held_out = world(), world(seed=1, first=100, people=20)
    model = tiny.make_judge(tiny.make_tokenizer())  # which reads longer texts
    held_out[3] = replace(held_out[3], statement="word " * 110)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="that the bi-encoder reads") as error:
        fit(config(tmp_path, bi_encoder=encoder), data, held_out, model, tiny.make_tokenizer(), progress=False)
    assert error.value.field == "bi_encoder"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_no_encoder_is_refused_before_anything_is_trained(tmp_path):
    tokenizer, (data, held_out) = tiny.make_encoder_tokenizer(), (world(), world(seed=1, first=100, people=20))
    with pytest.raises(InputError, match="bi_encoder = 'no/such/folder': no such folder"):
        fit(config(tmp_path, bi_encoder="no/such/folder"), data, held_out, tiny.make_encoder(tokenizer), tokenizer)
    with pytest.raises(InputError, match="has no safetensors"):
        fit(config(tmp_path, bi_encoder=str(tmp_path)), data, held_out, tiny.make_encoder(tokenizer), tokenizer)
