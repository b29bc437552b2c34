"""The benchmark on people's votes, on a made-up folder and a tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import human_anchor, human_preferences
from benchmarks.human_report import table
from benchmarks.human_scoring import agreement, fitting_opinions, score_table
from benchmarks.human_splits import Predictor, make_plan, measure_split
from benchmarks.human_votes import limited, load_sets, swapped_profiles
from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel

REAL = Path(__file__).parents[3] / "shared" / "data"
CALIBRATION = Calibration((-3.0, -2.0, -1.0, 0.0, 1.0, 2.0))


class WordVectors:
    """Stands in for the sentence encoder: the mean of a random vector a word."""

    def __call__(self, texts):
        return torch.stack([torch.stack([self.vector(word) for word in text.split()]).mean(0) for text in texts])

    def vector(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return torch.randn(16, generator=torch.Generator().manual_seed(seed)) / 4


@pytest.fixture
def preference_model(tiny_judge, tiny_tokenizer):
    return PreferenceModel(tiny_judge, tiny_tokenizer, CALIBRATION, {"data": "tiny", "measures": {"accuracy": 0.5}})


@pytest.fixture
def model_folder(preference_model, tmp_path):
    preference_model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def small_anchor(monkeypatch):
    monkeypatch.setattr(human_preferences, "SentenceEncoder", WordVectors)
    monkeypatch.setattr(human_anchor, "FITS", 1)


def run(capsys, *arguments):
    status = human_preferences.main([*map(str, arguments), "--json", "--draws", "2", "--resamplings", "200"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if status == 0 else err


# --- the folder


def test_votes_and_choices_are_read_as_written(people, tmp_path):
    data = load_sets(people(tmp_path / "data"))["remesh"]
    split = data.splits["val_participant"]
    assert (split.persons, len(split.labels), len(split.chooser)) == (12, 96, 12)  # "unsure" is no choice
    profile, statement = split.preferred[0]
    assert data.opinions[profile].startswith(
        "I need fewer buses".replace("buses", data.statements[statement].split()[3])
    )
    assert "We need fewer" in data.statements[statement]  # the first person chose a, the first statement
    assert split.preferred[0, 1] != split.other[0, 1]
    assert [s.name for s in data.measured] == ["val_participant", "new_conversation"]


def test_an_absent_set_or_split_is_no_error(people, tmp_path, model_folder, capsys):
    folder = people(tmp_path / "data", sets=("remesh",), splits={"train": 24, "elsewhere": 12})
    status, report = run(capsys, "--model", model_folder, "--data", folder)
    assert status == 0
    assert {name: list(splits) for name, splits in report["results"].items()} == {"remesh": ["elsewhere"]}


@pytest.mark.parametrize("missing", ["polis_profiles.parquet", "polis_statements.parquet", "polis_conversations.jsonl"])
def test_a_missing_table_is_named(people, tmp_path, missing):
    folder = people(tmp_path / "data")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing):
        load_sets(folder)


def test_a_folder_without_votes_is_refused(tmp_path):
    with pytest.raises(InputError, match="polis_targets"):
        load_sets(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        load_sets(tmp_path / "none")


def test_a_limit_keeps_whole_persons(people, tmp_path):
    split = load_sets(people(tmp_path / "data"))["remesh"].splits["val_participant"]
    few = limited(split, 5, np.random.default_rng(0))
    assert few.persons == 5
    assert np.bincount(few.person).tolist() == [8] * 5
    assert np.bincount(few.chooser).tolist() == [1] * 5
    assert limited(split, 99, np.random.default_rng(0)) is split


# --- swaps


def test_a_swap_is_another_person_of_the_same_conversation_and_split(people, tmp_path):
    data = load_sets(people(tmp_path / "data"))["polis"]
    profiles = data.splits["val_participant"].pairs[:, 0]
    for seed in range(20):
        stand_ins = swapped_profiles(data, profiles, np.random.default_rng(seed))
        for own, other in zip(profiles.tolist(), stand_ins.tolist(), strict=True):
            assert data.owners[own] != data.owners[other]
            assert data.places[own] == data.places[other]
        assert len({*zip(profiles.tolist(), stand_ins.tolist(), strict=True)}) == len(set(profiles.tolist()))


def test_a_person_alone_in_a_conversation_has_no_stand_in(people, tmp_path):
    folder = people(tmp_path / "data", sets=("polis",), splits={"alone": 2, "many": 12})
    data = load_sets(folder)["polis"]
    plan = make_plan(data, data.splits["alone"], draws=2, seed=0, resamplings=50)
    assert not plan.with_stand_in.any()
    found = measure_split(plan, Predictor(lambda pairs: pairs[:, 1] * 1.0, lambda s: s / 100))
    assert found["model"]["votes_without_stand_in"] == 16
    assert found["model"]["gain"]["auc"]["value"] is None
    assert found["model"]["auc"]["value"] is not None


# --- scores


def test_each_pair_is_asked_once_and_found_again(people, tmp_path):
    data = load_sets(people(tmp_path / "data"))["polis"]
    pairs = data.splits["val_participant"].pairs
    asked = []

    def score(part):
        asked.extend(map(tuple, part.tolist()))
        return part[:, 0] * 1000 + part[:, 1]

    look_up = score_table(score, data, np.concatenate([pairs, pairs[::-1]]), chunk=7)
    assert len(asked) == len(set(asked)) == len(pairs)
    np.testing.assert_array_equal(look_up(pairs), pairs[:, 0] * 1000 + pairs[:, 1])
    with pytest.raises(KeyError):
        look_up(np.array([[0, 10**6]]))
    with pytest.raises(InputError, match="not finite"):
        score_table(lambda part: np.full(len(part), np.nan), data, pairs)


def test_agreement_is_the_probability_of_a_rating_above_4_or_of_a_vote():
    p = agreement(CALIBRATION, np.array([-100.0, 0.0, 100.0]))
    np.testing.assert_allclose(p, [0, CALIBRATION.probabilities(0.0)[4:].sum(), 1], atol=1e-9)
    votes = Calibration((0.5,), values=(1, 7))
    assert agreement(votes, np.array([0.2]))[0] == pytest.approx((votes.utilities(0.2) - 1) / 6)


def test_an_opinion_too_long_for_the_model_is_cut_and_counted(people, tmp_path, preference_model):
    data = load_sets(people(tmp_path / "data"))["polis"]
    pairs = data.splits["val_participant"].pairs
    assert fitting_opinions(preference_model, data, pairs) == (data.opinions, 0)
    one = int(pairs[0, 0])
    data.opinions[one] = "first line\n" + "word " * 1000
    opinions, cut = fitting_opinions(preference_model, data, pairs)
    assert cut == 1
    assert opinions[one].startswith("first line\nword word")
    longest = max(len(preference_model.suffix_ids(data.statements[s])) for p, s in pairs.tolist() if p == one)
    used = len(preference_model.prefix_ids(data.questions[one], opinions[one])) + longest
    assert preference_model.room - len(" word") <= used <= preference_model.room


# --- the whole


def test_a_model_against_itself_differs_by_nothing(people, tmp_path):
    data = load_sets(people(tmp_path / "data"))["remesh"]
    plan = make_plan(data, data.splits["val_participant"], draws=3, seed=1, resamplings=200)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(data.opinions), len(data.statements)))
    same = Predictor(lambda pairs: noise[pairs[:, 0], pairs[:, 1]], lambda s: 1 / (1 + np.exp(-s)))
    found = measure_split(plan, same, same)
    assert found["model"] == found["anchor"]
    for key in ("auc", "pairs", "choices"):
        assert [found["model_minus_anchor"][key][k] for k in ("value", "low", "high")] == [0, 0, 0]


def test_the_gain_is_own_minus_swapped_and_nothing_for_a_reader_of_statements_only(people, tmp_path):
    data = load_sets(people(tmp_path / "data"))["polis"]
    split = data.splits["val_participant"]
    plan = make_plan(data, split, draws=3, seed=0, resamplings=200)
    blind = measure_split(plan, Predictor(lambda pairs: pairs[:, 1] * 1.0))["model"]
    assert [blind["gain"]["auc"][k] for k in ("value", "low", "high")] == [0, 0, 0]

    def knowing(pairs):
        likes = np.array(["want more" in opinion for opinion in data.opinions])[pairs[:, 0]]
        asks = np.array(["want more" in statement for statement in data.statements])[pairs[:, 1]]
        return (likes == asks).astype(float)

    found = measure_split(plan, Predictor(knowing))["model"]
    gain = found["auc"]["value"] - found["swapped"]["auc"]["value"]
    assert found["gain"]["auc"]["value"] == pytest.approx(gain, abs=1e-6)
    assert found["gain"]["auc"]["low"] > 0.1


def test_the_report_is_one_json_line_of_every_set_and_split(people, tmp_path, model_folder, capsys):
    folder, output = people(tmp_path / "data"), tmp_path / "out"
    status, report = run(capsys, "--model", model_folder, "--data", folder, "--output", output, "--seed", 3)
    assert status == 0
    assert {name: set(s) for name, s in report["results"].items()} == {
        "polis": {"val_participant", "new_conversation"},
        "remesh": {"val_participant", "new_conversation"},
    }
    found = report["results"]["remesh"]["val_participant"]
    assert (found["votes"], found["persons"], found["choices"]) == (96, 12, 12)
    assert {"auc", "pairs", "choices", "brier", "ece", "accuracy", "length_slope", "gain"} <= set(found["model"])
    assert {"auc", "pairs", "choices"} == set(found["model_minus_anchor"])
    assert found["controls"]["majority"]["auc"]["value"] == 0.5
    assert sum(b["votes"] for b in found["model"]["reliability"]) == 96
    assert "choices" not in report["results"]["polis"]["val_participant"]["model"]
    for who in (found["model"], found["anchor"], found["model_minus_anchor"], *found["controls"].values()):
        for value in who.values():
            if isinstance(value, dict) and value.get("low") is not None:
                assert value["low"] - 1e-6 <= value["value"] <= value["high"] + 1e-6
    assert report["model"]["metadata"] == {"data": "tiny"}
    assert json.loads((output / "human_preferences.json").read_text()) == report
    assert (output / "human_preferences.png").read_bytes()[1:4] == b"PNG"
    assert str(tmp_path) not in json.dumps(report)  # no machine paths
    shown = table(report)
    assert "remesh / new_conversation" in shown
    assert "model minus anchor" in shown


def test_the_same_seed_gives_the_same_figures(people, tmp_path, model_folder, capsys):
    folder = people(tmp_path / "data", sets=("polis",))
    reports = [run(capsys, "--model", model_folder, "--data", folder, "--limit", 10)[1] for _ in range(2)]
    assert reports[0]["results"] == reports[1]["results"]
    assert reports[0]["results"]["polis"]["val_participant"]["persons"] == 10


def test_a_folder_without_train_needs_anchor_data(people, tmp_path, model_folder, capsys):
    folder = people(tmp_path / "data", sets=("polis",), splits={"test": 12})
    status, error = run(capsys, "--model", model_folder, "--data", folder)
    assert status == 2
    assert "--anchor-data" in error
    status, error = run(capsys, "--model", model_folder, "--data", folder, "--anchor-data", folder)
    assert status == 2
    other = people(tmp_path / "public", seed=1)
    status, report = run(capsys, "--model", model_folder, "--data", folder, "--anchor-data", other)
    assert status == 0
    assert "model_minus_anchor" in report["results"]["polis"]["test"]
    status, report = run(capsys, "--model", model_folder, "--data", folder, "--no-anchor")
    assert status == 0
    assert "anchor" not in report["results"]["polis"]["test"]


def test_the_anchor_learns_who_likes_what(people, tmp_path):
    folder = people(tmp_path / "data", sets=("polis",), splits={"train": 80, "test": 40})
    data = load_sets(folder)["polis"]
    vectors = human_anchor.vectors_of(data, WordVectors())
    settings = human_anchor.AnchorSettings(batch=64, epochs=40, patience=8)
    anchor = human_anchor.Anchor(data, vectors, settings=settings)
    p = anchor.probabilities(vectors, data.splits["test"].pairs)
    assert ((p > 0) & (p < 1)).all()
    plan = make_plan(data, data.splits["test"], draws=1, seed=0, resamplings=50)
    assert (
        measure_split(plan, Predictor(lambda pairs: anchor.probabilities(vectors, pairs)))["model"]["auc"]["value"]
        > 0.6
    )


def test_the_encoders_package_is_named_where_it_is_missing(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(human_anchor.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"\.\[benchmark\]"):
        human_anchor.SentenceEncoder()


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared votes are not on this machine")
def test_counts_of_the_shared_votes_match_their_readme():
    expected = {
        "polis": {"train": (66691, 2450), "val_participant": (16886, 606), "val_conversation": (10621, 455)},
        "remesh": {"train": (8051, None), "val_participant": (2524, 144), "val_conversation": (1501, 302)},
    }
    choices = {"val_participant": 2421, "val_conversation": 1390}
    for name, data in load_sets(REAL).items():
        assert set(data.splits) == set(expected[name])
        for split, (votes, persons) in expected[name].items():
            assert len(data.splits[split].labels) == votes
            assert persons is None or data.splits[split].persons == persons
        if name == "remesh":
            assert {split: len(data.splits[split].chooser) for split in choices} == choices
