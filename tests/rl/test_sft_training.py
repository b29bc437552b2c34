"""Supervised fine-tuning on statements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from deliberation.prompts import statement_prompt
from deliberation.types import InputError
from rl.data import sft_pairs
from rl.policy import load_policy
from rl.sft import SFTArguments, main, train_sft

import tiny

ROWS = [
    {
        "question": "Should trams be free?",
        "opinions": ["Yes, for all.", "No, too dear.", "Only at night."],
        "statement": f"Trams should be free at {hour}.",
    }
    for hour in ("night", "noon", "dawn", "dusk")
]


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    folder = tmp_path / "base"
    tiny.make_policy(tiny_tokenizer, "qwen3").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(tmp_path, base, **keys) -> SFTArguments:
    defaults = {
        "model_name_or_path": base,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_length": 2048,
    }
    return SFTArguments(**{**defaults, **keys})


def weights(path):
    return {name: p.clone() for name, p in load_policy(str(path), device="cpu")[0].named_parameters()}


def test_full_fine_tuning_moves_the_weights_and_saves_a_policy(tmp_path, base):
    train_sft(arguments(tmp_path, base, max_steps=8), ROWS)
    before, after = weights(base), weights(tmp_path / "run")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 8


def test_lora_saves_an_adapter_and_leaves_the_base_alone(tmp_path, base):
    before = weights(base)
    keys = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    trainer = train_sft(arguments(tmp_path, base, **keys), ROWS)
    model, tokenizer = load_policy(str(tmp_path / "run"), device="cpu")
    assert isinstance(model, PeftModel)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    with model.disable_adapter():
        ids = torch.tensor([tokenizer("Trams").input_ids])
        plain = load_policy(base, device="cpu")[0]
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert all(torch.equal(before[name], p) for name, p in weights(base).items())


def test_only_the_completion_and_its_end_are_trained_on(tmp_path, base, tiny_tokenizer):
    trainer = train_sft(arguments(tmp_path, base, max_steps=1), ROWS)
    batch = next(iter(trainer.get_train_dataloader()))
    taught = {tiny_tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert taught <= {f" {row['statement']}</s>" for row in ROWS} and len(taught) == 2


def test_pairs_follow_the_statement_prompt():
    (pair,) = sft_pairs(ROWS[:1], shuffle_opinions=False, seed=0)
    assert pair["prompt"] == statement_prompt(ROWS[0]["question"], ROWS[0]["opinions"])
    assert pair["completion"] == " Trams should be free at night."


def test_orders_of_opinions_are_shuffled_by_seed_and_row_alone():
    rows = [{**ROWS[0], "opinions": [f"Opinion {i}." for i in range(6)]}] * 4
    made = sft_pairs(rows, shuffle_opinions=True, seed=0)
    assert made == sft_pairs(rows, shuffle_opinions=True, seed=0)
    assert made[:2] == sft_pairs(rows[:2], shuffle_opinions=True, seed=0)
    assert made != sft_pairs(rows, shuffle_opinions=True, seed=1)
    assert len({pair["prompt"] for pair in made}) > 1
    assert {tuple(sorted(pair["prompt"].split("\n"))) for pair in made} == {
        tuple(sorted(statement_prompt(rows[0]["question"], rows[0]["opinions"]).split("\n")))
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"opinions": []}, "statements row 1: opinions"),
        ({"opinions": "one text"}, "statements row 1: opinions"),
        ({"opinions": ["Yes.", " "]}, "statements row 1: opinions[1]"),
        ({"statement": ""}, "statements row 1: statement"),
        ({"question": "x" * 3000}, "statements row 1: question"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, base, change, field):
    with pytest.raises(InputError) as error:
        train_sft(arguments(tmp_path, base), [ROWS[0], {**ROWS[1], **change}])
    assert error.value.field == field
    assert not (tmp_path / "run").exists()


def test_a_statement_that_would_be_cut_is_refused(tmp_path, base):
    with pytest.raises(InputError, match="row 0 has .* tokens") as error:
        train_sft(arguments(tmp_path, base, max_length=200), ROWS)
    assert error.value.field == "max_length" and not (tmp_path / "run").exists()


def test_bad_keys_are_refused(tmp_path, base):
    with pytest.raises(InputError, match="at least one row"):
        train_sft(arguments(tmp_path, base), [])
    with pytest.raises(InputError, match="load_in_4bit"):
        arguments(tmp_path, base, load_in_4bit=True)
    with pytest.raises(InputError, match="resume_from_checkpoint"):
        arguments(tmp_path, base, resume_from_checkpoint="nowhere")
    with pytest.raises(InputError, match="statements"):
        main(arguments(tmp_path, base))
    with pytest.raises(InputError, match="model_name_or_path"):
        train_sft(arguments(tmp_path, base, model_name_or_path=None), ROWS)


def test_bf16_is_off_until_asked_for(tmp_path, base):
    assert arguments(tmp_path, base).bf16 is False


def test_main_reads_files_and_evaluates_on_held_out_rows(tmp_path, base, capsys):
    for name, rows in (("train", ROWS), ("held_out", ROWS[:2])):
        Path(tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        arguments(
            tmp_path,
            base,
            statements=str(tmp_path / "train.jsonl"),
            eval_statements=str(tmp_path / "held_out.jsonl"),
            eval_strategy="steps",
            eval_steps=2,
        )
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("eval/loss" in line for line in log)
    assert "4 statements" in capsys.readouterr().out
