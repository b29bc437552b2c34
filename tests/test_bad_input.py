"""What a user gets wrong in files and folders: one line, exit code 2, and no output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
from deliberation.types import MAX_OPINION_CHARS

import stage_inputs

CONFIGS = Path(__file__).parents[1] / "configs" / "embedded"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """One good file or folder of each kind; every test below spoils one of them."""
    home = tmp_path_factory.mktemp("good")
    return {
        "policy": stage_inputs.save_policy(home / "policy"),
        "judge": stage_inputs.save_preference_model(home / "judge"),
        "statements": stage_inputs.write_statements(home / "statements.jsonl"),
        "ratings": stage_inputs.write_ratings(home / "ratings.jsonl"),
        "deliberations": stage_inputs.write_deliberations(home / "deliberations.jsonl"),
        "ppo_log": stage_inputs.write_log(home / "log.jsonl"),
    }


def arguments(stage: str, good: dict[str, Path]) -> dict[str, object]:
    """Keys with which the stage would run."""
    keys: dict[str, object] = {"model_name_or_path": good["policy"], "max_steps": 1}
    if stage == "sft":
        return keys | {"statements": good["statements"]}
    if stage == "preference":
        return keys | {"ratings": good["ratings"]}
    if stage == "ppo":
        data = {"deliberations": good["deliberations"], "eval_deliberations": good["deliberations"]}
        return keys | data | {"preference_model": good["judge"], "reward_actors": 0}
    if stage == "compare":
        models = {"base_model": good["policy"], "sft_model": good["policy"], "ppo_model": good["policy"]}
        return models | {"preference_model": good["judge"], "ppo_log": good["ppo_log"], "num_deliberations": 2}
    return {"model_name_or_path": good["policy"], "preference_model": good["judge"], "port": 0}


@pytest.fixture
def refuse(good, tmp_path, capfd):
    """Run a stage with some keys spoilt; returns its one line on stderr."""

    def refuse(stage: str, **spoilt: object) -> str:
        run = tmp_path / "run"
        keys = arguments(stage, good) | ({} if stage == "serve" else {"output_dir": run}) | spoilt
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        code = cli.main([stage, "--config", str(CONFIGS / f"{stage}.yaml"), *words])
        error = capfd.readouterr().err
        assert code == 2, error
        assert not run.exists(), "a half-written run folder"
        # Progress bars of loading are rewritten in place; what stays on the screen is the last line.
        lines = [line for line in error.splitlines() if line.startswith("consensus ")]
        assert len(lines) == 1 and error.endswith(lines[0] + "\n"), error
        assert "Traceback" not in error
        return lines[0]

    return refuse


DATA = {"sft": "statements", "preference": "ratings", "ppo": "deliberations"}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spoil(tmp_path: Path, path: Path, **changes: object) -> Path:
    """A copy of a data file whose last row has other values (a value of ``...`` drops the column everywhere)."""
    spoilt = rows(path)
    for key, value in changes.items():
        if value is ...:
            for row in spoilt:
                del row[key]
        else:
            spoilt[-1][key] = value
    target = tmp_path / "spoilt.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    return target


@pytest.mark.parametrize("stage", DATA)
def test_missing_data_file(refuse, stage):
    assert "nowhere.jsonl" in refuse(stage, **{DATA[stage]: "nowhere.jsonl"})


@pytest.mark.parametrize(
    ("stage", "column"), [("sft", "statement"), ("sft", "opinions"), ("preference", "agreement"), ("ppo", "question")]
)
def test_data_file_without_a_needed_column(refuse, good, tmp_path, stage, column):
    file = spoil(tmp_path, good[DATA[stage]], **{column: ...})
    assert column in refuse(stage, **{DATA[stage]: file})


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("opinions", [[], ["  "], ["x" * (MAX_OPINION_CHARS + 1)], "one text"])
def test_bad_group(refuse, good, tmp_path, stage, opinions):
    file = spoil(tmp_path, good[DATA[stage]], opinions=opinions)
    assert "opinion" in refuse(stage, **{DATA[stage]: file})


@pytest.mark.parametrize("agreement", [0, 8, 4.5])
def test_rating_off_the_scale(refuse, good, tmp_path, agreement):
    line = refuse("preference", ratings=spoil(tmp_path, good["ratings"], agreement=agreement))
    assert "agreement" in line and str(agreement) in line


@pytest.mark.parametrize("stage", ["sft", "preference", "ppo", "serve"])
def test_model_folder_without_safetensors(refuse, tmp_path, stage):
    folder = tmp_path / "pickled"
    stage_inputs.save_policy(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    line = refuse(stage, model_name_or_path=folder)
    assert "safetensors" in line and "pickled" in line


@pytest.mark.parametrize("stage", ["sft", "preference", "ppo", "serve"])
@pytest.mark.parametrize("name", ["runs/nowhere", "runs/nowhere/sft", "embedded/nowhere", "./nowhere", None])
def test_model_folder_that_is_not_there(refuse, tmp_path, stage, name):
    line = refuse(stage, model_name_or_path=name or tmp_path / "nowhere")
    assert "nowhere" in line and "no such folder" in line


READS_A_JUDGE = [("ppo", {"reward_actors": 0}), ("ppo", {"reward_actors": 1}), ("compare", {})]


@pytest.mark.parametrize(("stage", "keys"), READS_A_JUDGE)
@pytest.mark.parametrize("missing", ["model.safetensors", "calibration.json", "config.json"])
def test_preference_model_that_lacks_a_file(refuse, tmp_path, stage, keys, missing):
    folder = stage_inputs.save_preference_model(tmp_path / "judge")
    (folder / missing).unlink()
    line = refuse(stage, preference_model=folder, **keys)
    assert "preference_model" in line and missing.split(".")[-1] in line


@pytest.mark.parametrize(("stage", "keys"), READS_A_JUDGE)
def test_preference_model_with_two_labels(refuse, tmp_path, stage, keys):
    folder = stage_inputs.save_preference_model(tmp_path / "judge")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "config.json").write_text(json.dumps(settings))
    line = refuse(stage, preference_model=folder, **keys)
    assert "preference_model" in line and "2 labels" in line


@pytest.mark.parametrize("stage", ["ppo", "compare", "serve"])
@pytest.mark.parametrize("welfare", ["kindness", "-1", "nan"])
def test_unknown_welfare_or_negative_alpha(refuse, stage, welfare):
    line = refuse(stage, welfare=welfare)
    assert "welfare" in line and welfare in line


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [("serve", "num_candidates", 65), ("serve", "num_candidates", 0), ("compare", "num_candidates", 0),
     ("ppo", "num_generations", 0), ("ppo", "beta", -1), ("preference", "margin", 7), ("sft", "max_length", 8)],
)  # fmt: skip
def test_number_out_of_range(refuse, stage, key, value):
    line = refuse(stage, **{key: value})
    assert key in line and str(value) in line
