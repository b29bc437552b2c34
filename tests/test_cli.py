"""The ``consensus`` command: help, overrides, and bad input in one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import cli
from deliberation.types import InputError

ROOT = Path(__file__).parents[1]


@dataclass
class StageConfig(TrainingArguments):
    """A stage of the test's own: two keys beside those of transformers."""

    welfare: str = field(default="nash", metadata={"help": "how utilities become one number"})
    arms: list[str] = field(default_factory=lambda: ["base"])
    """What to compare,
    100 % of it."""


@pytest.fixture
def seen(monkeypatch):
    """Replace the stage ``ppo`` by one that records its config; returns the list of configs."""
    configs: list[StageConfig] = []
    stage = types.ModuleType("stage_under_test")
    stage.StageConfig, stage.main = StageConfig, configs.append
    monkeypatch.setitem(sys.modules, "stage_under_test", stage)
    monkeypatch.setitem(cli.STAGES, "ppo", cli.Stage("stage_under_test", "StageConfig", "a stage"))
    return configs


@pytest.fixture
def write(tmp_path):
    def write(**keys) -> str:
        path = tmp_path / "stage.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def refused(capfd, *words: str) -> str:
    """Run the command, expect exit code 2, and return the one line on stderr."""
    assert cli.main(list(words)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_yaml_keys_reach_the_stage(seen, write, tmp_path):
    file = write(
        learning_rate="3e-5", welfare=2, output_dir=str(tmp_path / "run"), arms=["sft", "ppo"], report_to="none"
    )
    assert cli.main(["ppo", "--config", file]) == 0
    (config,) = seen
    assert (config.learning_rate, config.welfare, config.arms) == (3e-5, "2", ["sft", "ppo"])
    assert config.output_dir == str(tmp_path / "run")


def test_the_command_line_wins_over_the_file(seen, write):
    file = write(learning_rate=1e-5, welfare="nash", bf16=True)
    assert cli.main(["ppo", f"--config={file}", "--welfare", "rawlsian", "--bf16", "false", "--arms", "a", "b"]) == 0
    (config,) = seen
    assert (config.learning_rate, config.welfare, config.bf16, config.arms) == (1e-5, "rawlsian", False, ["a", "b"])


def test_unknown_key_in_the_file_is_refused_with_the_nearest_name(seen, write, capfd):
    line = refused(capfd, "ppo", "--config", write(learning_rat=1e-5))
    assert "'learning_rat'" in line and "did you mean learning_rate?" in line
    assert not seen


def test_unknown_key_on_the_command_line_is_refused(seen, capfd):
    assert "'welfair'" in refused(capfd, "ppo", "--welfair", "nash")
    # No abbreviations either: a key that gets a longer sister later must not change its meaning.
    assert "'welf'" in refused(capfd, "ppo", "--welf", "nash")
    assert not seen


@pytest.mark.parametrize("value", ["abc", [1, 2], True])
def test_bad_number_names_field_value_and_mend(seen, write, capfd, value):
    line = refused(capfd, "ppo", "--config", write(max_steps=value))
    assert "max_steps = " in line and str(value) in line
    assert "--help" in line
    assert not seen


def test_bad_values_are_refused_alike_in_file_and_command_line(seen, write, capfd):
    in_file = refused(capfd, "ppo", "--config", write(eval_strategy="sometimes"))
    typed = refused(capfd, "ppo", "--eval_strategy", "sometimes")
    assert in_file == typed
    assert "eval_strategy = 'sometimes'" in typed and "'epoch'" in typed


def test_fraction_for_a_whole_number_is_refused(seen, write, capfd):
    assert "max_steps = '2.5'" in refused(capfd, "ppo", "--config", write(max_steps=2.5))


def test_keys_that_do_not_go_together_are_one_line(seen, write, capfd):
    line = refused(capfd, "ppo", "--config", write(load_best_model_at_end=True))
    assert "load_best_model_at_end" in line


def test_missing_file_missing_value_two_files(seen, write, capfd):
    assert "nowhere.yaml" in refused(capfd, "ppo", "--config", "nowhere.yaml")
    assert "config" in refused(capfd, "ppo", "--config")
    assert "twice" in refused(capfd, "ppo", "--config", write(), "--config", write())


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_file_that_is_no_mapping_is_one_line(seen, tmp_path, capfd, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert str(path) in refused(capfd, "ppo", "--config", str(path))
    assert not seen


def test_stray_word_and_unknown_stage(seen, capfd):
    assert "'stray'" in refused(capfd, "ppo", "stray")
    line = refused(capfd, "ppoo")
    assert "'ppoo'" in line and "preference" in line


def test_input_error_of_a_stage_is_one_line_and_a_bug_keeps_its_traceback(seen, monkeypatch, capfd):
    stage = sys.modules["stage_under_test"]

    def bad_input(config):
        raise InputError("opinions", [], "the group is empty;\ngive at least one opinion")

    monkeypatch.setattr(stage, "main", bad_input)
    assert "opinions = []: the group is empty; give at least one opinion" in refused(capfd, "ppo")

    def bug(config):
        raise ValueError("not the user's doing")

    monkeypatch.setattr(stage, "main", bug)
    with pytest.raises(ValueError, match="not the user's doing"):
        cli.main(["ppo"])


def test_own_keys_come_first_in_the_help(seen, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (
        text.index("keys of ppo") < text.index("--welfare") < text.index("keys inherited") < text.index("--max_steps")
    )


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cli", *words], cwd=cwd, capture_output=True, text=True, env=environment, timeout=300
    )


def test_overview_names_every_stage():
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.STAGES)


@pytest.mark.parametrize("name", cli.STAGES)
def test_help_of_every_stage(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: consensus {name} ")
    key = {"serve": "port", "export": "output"}.get(name, cli.STAGES[name].word or "output_dir")
    assert f"--{key} " in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preference", "serve"])
def test_help_in_a_process_of_its_own(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: consensus {name} ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo", "compare", "demo"])
def test_unknown_key_as_a_user_sees_it(name, tmp_path):
    done = run(name, "--no_such_key", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'no_such_key'" in done.stderr
    assert not list(tmp_path.iterdir())
