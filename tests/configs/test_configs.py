"""Every shipped configuration: all keys known to the real parser, and the Qwen3 stages run with a tiny model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import yaml

import cli
from deliberation.datasets import write_jsonl
from deliberation.types import InputError
from reward.preference import PreferenceModel

import stage_inputs
import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
STAGE_FILES = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.stem in cli.STAGES]
ON_CPU = ["--bf16", "false"]
"""The GPU configurations ask for bfloat16 autocast, which transformers refuses without a GPU."""


def parse(file: Path, *words: str):
    """The file's config, through the parser that the command uses."""
    stage = cli.STAGES[file.stem]
    config_class = getattr(importlib.import_module(stage.module), stage.config)
    (config,) = cli.make_parser(file.stem, config_class).parse_args_and_config(["--config", str(file), *words])
    return config


def on_cpu(file: Path) -> list[str]:
    return ON_CPU if yaml.safe_load(file.read_text()).get("bf16") else []


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_all_stages_are_shipped():
    shipped = {name_of(path) for path in STAGE_FILES}
    assert shipped >= {f"embedded/{name}" for name, stage in cli.STAGES.items() if stage.word is None}
    assert shipped >= {f"qwen3-0.6b/{stage}" for stage in ("sft", "preference", "ppo", "serve")}


@pytest.mark.parametrize("file", STAGE_FILES, ids=name_of)
def test_every_key_is_known_and_arrives(file):
    config = parse(file, *on_cpu(file))
    for key, value in yaml.safe_load(file.read_text()).items():
        if key == "bf16":
            continue
        arrived = getattr(config, key)
        arrived = getattr(arrived, "value", arrived)  # transformers makes enums of some strings
        if key == "report_to":
            assert arrived in ([], value)
        elif isinstance(value, str):
            assert str(arrived) == value
        else:
            assert arrived == value, key


@pytest.mark.parametrize("file", STAGE_FILES, ids=name_of)
def test_an_unknown_key_is_refused(file, tmp_path):
    worse = tmp_path / file.name
    worse.write_text(file.read_text() + "\nno_such_key: 1\n")
    with pytest.raises(InputError, match="no_such_key"):
        parse(worse, *on_cpu(file))


def test_deepspeed_file_is_zero_2_and_the_accelerate_file_trains_in_bf16():
    zero = json.loads((CONFIGS / "qwen3-0.6b" / "deepspeed_zero2.json").read_text())
    assert zero["zero_optimization"]["stage"] == 2
    # "auto": transformers fills these in from the stage's YAML, so that the two cannot disagree.
    assert zero["train_micro_batch_size_per_gpu"] == zero["gradient_accumulation_steps"] == "auto"
    from accelerate.commands.config.config_args import load_config_from_file

    accelerate = load_config_from_file(str(CONFIGS / "qwen3-0.6b" / "accelerate.yaml"))
    assert (accelerate.mixed_precision, accelerate.num_processes) == ("bf16", 1)


# --- the Qwen3 stages, one after the other, for two steps with a tiny random Qwen3 ----------------------------------

QWEN = CONFIGS / "qwen3-0.6b"
BRIEF = [*ON_CPU, "--max_steps", "2"]


def run(stage: str, *words: str) -> None:
    assert cli.main([stage, "--config", str(QWEN / f"{stage}.yaml"), *map(str, words)]) == 0


def steps_taken(folder: Path) -> int:
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny Qwen3 and the data files; the stages write their outputs beside them."""
    home = tmp_path_factory.mktemp("qwen3")
    stage_inputs.save_policy(home / "base", arch="qwen3")
    stage_inputs.write_statements(home / "statements.jsonl")
    stage_inputs.write_ratings(home / "ratings.jsonl")
    stage_inputs.write_deliberations(home / "deliberations.jsonl")
    return home


@pytest.fixture(scope="module")
def sft(home) -> Path:
    run("sft", *BRIEF, "--model_name_or_path", home / "base", "--statements", home / "statements.jsonl",
        "--output_dir", home / "sft")  # fmt: skip
    return home / "sft"


@pytest.fixture(scope="module")
def preference(home) -> Path:
    run("preference", *BRIEF, "--model_name_or_path", home / "base", "--ratings", home / "ratings.jsonl",
        "--output_dir", home / "preference", "--per_device_train_batch_size", 2)  # fmt: skip
    return home / "preference"


@pytest.fixture(scope="module")
def ppo(home, sft, preference) -> Path:
    run("ppo", *BRIEF, "--model_name_or_path", sft, "--preference_model", preference,
        "--deliberations", home / "deliberations.jsonl", "--eval_deliberations", home / "deliberations.jsonl",
        "--output_dir", home / "ppo", "--num_prompts", 2, "--num_generations", 2, "--num_mini_batches", 2,
        "--max_completion_length", 8, "--eval_steps", 1, "--save_steps", 1)  # fmt: skip
    return home / "ppo"


def test_the_human_benchmarks_stage_runs_with_a_tiny_encoder(tmp_path):
    tokenizer = tiny.make_encoder_tokenizer()
    tiny.make_encoder(tokenizer).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    head = {"question": "Q?", "opinion": "Buses.", "topic": "t"}
    votes = [{**head, "deliberation_id": f"d{d}", "member": m, "statement": s, "vote": v}
             for d in range(4) for m in (0, 1) for s, v in (("Yes.", 1 - 2 * m), ("No.", 2 * m - 1))]  # fmt: skip
    choices = [{**head, "deliberation_id": "d0", "member": 0, "chosen": "Yes.", "rejected": "No."}]
    held_out = [{**row, "deliberation_id": "x"} for row in votes]
    for name, rows in (("votes", votes), ("choices", choices), ("held_out", held_out)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    words = [*ON_CPU, "--max_steps", "2", "--model_name_or_path", tmp_path / "encoder",
             "--bi_encoder", tmp_path / "encoder",
             "--output_dir", tmp_path / "out",
             "--ratings", tmp_path / "votes.jsonl", tmp_path / "choices.jsonl",
             "--eval_ratings", tmp_path / "held_out.jsonl"]  # fmt: skip
    config = CONFIGS / "human" / "preference.yaml"
    assert cli.main(["preference", "--config", str(config), *map(str, words)]) == 0
    loaded = PreferenceModel.load(tmp_path / "out")
    assert loaded.attention == "prefix" and loaded.calibration.values == (1, 7)
    assert loaded.bi_encoder is not None


def test_qwen3_sft_writes_an_adapter(sft):
    assert steps_taken(sft) == 2
    adapter = json.loads((sft / "adapter_config.json").read_text())
    shipped = yaml.safe_load((QWEN / "sft.yaml").read_text())
    assert adapter["r"] == shipped["lora_r"] and set(adapter["target_modules"]) == set(shipped["lora_target_modules"])
    assert (sft / "adapter_model.safetensors").is_file()


def test_qwen3_preference_writes_a_merged_calibrated_model(preference):
    from reward.preference import PreferenceModel

    model = PreferenceModel.load(preference)
    assert type(model.model).__name__ == "Qwen3ForSequenceClassification"
    assert not any("lora" in name for name, _ in model.model.named_parameters())
    assert model.metadata["measures"]["pairs"] > 0


def test_qwen3_ppo_trains_an_adapter_of_its_own(ppo):
    from rl.policy import load_policy

    assert steps_taken(ppo) == 2
    policy, _ = load_policy(str(ppo), device="cpu")
    assert type(policy).__name__.startswith("Peft")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in policy.named_parameters())


def test_qwen3_serve_answers(ppo, preference):
    from fastapi.testclient import TestClient

    from serving.api import make_app
    from serving.local import LocalServices

    config = parse(QWEN / "serve.yaml", "--model_name_or_path", str(ppo), "--preference_model", str(preference),
                   "--device", "cpu", "--max_new_tokens", "24")  # fmt: skip
    client = TestClient(make_app(LocalServices.load(config), config))
    body = {"question": stage_inputs.QUESTIONS[0], "opinions": stage_inputs.OPINIONS, "n": 4, "seed": 1}
    answer = client.post("/v1/consensus", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["candidates"]) == 4
    again = client.post("/v1/consensus", json=body)
    assert again.json()["candidates"] == answer.json()["candidates"]
