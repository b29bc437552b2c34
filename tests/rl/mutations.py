"""Puts known bugs of PPO code bases back, one at a time, and shows that a test fails for each.

    python tests/rl/mutations.py            # some ten seconds a bug; exit code 1 if one goes unnoticed

Works on a copy of the tree. The bugs are those of other projects' issue trackers, by their numbers in docs/ppo.md. Not
a test itself: it runs tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` in ``file`` becomes ``new``, and ``test`` must fail."""

    bug: str
    file: str
    old: str
    new: str
    test: str


UPDATE, ROLLOUT, MATH = (f"tests/rl/test_{name}.py::test_" for name in ("trainer_update", "rollout_inputs", "ppo_math"))
SAMPLING, SAVED = (f"tests/rl/test_{name}.py::test_" for name in ("policy_sampling", "trainer_checkpoint"))
MODELS = "tests/rl/test_trainer_models.py::test_"
SCORING, REWARD = "tests/reward/test_scoring.py::test_", "tests/reward/test_reward_train.py::test_"

MUTATIONS = [
    Mutation("1 old log-probabilities from the sampler", "rl/trainer.py",
             "rollout.old_logprobs, rollout.ref_logprobs, rollout.v",
             "old = spread(torch.tensor([x for r in rollout.drawn_logprobs for x in r]).float(), rollout.mask)\n"
             "        rollout.old_logprobs, rollout.ref_logprobs, rollout.v",
             UPDATE + "before_the_first_step_the_ratio_is_exactly_1_and_the_kl_exactly_0"),
    Mutation("1 log-softmax in bfloat16", "rl/value.py", "(hidden).float() / temperature",
             "(hidden).bfloat16().float() / temperature",
             ROLLOUT + "log_probabilities_equal_a_plain_forward"),
    Mutation("2 no temperature in training", "rl/value.py", "(hidden).float() / temperature", "(hidden).float()",
             UPDATE + "the_rollout_really_is_a_sample_of_the_distribution_it_is_trained_under"),
    Mutation("2 no temperature in the reference", "rl/trainer.py", "known = (inputs.targets, self.args.temperature",
             "known = (inputs.targets, 1.0",
             UPDATE + "before_the_first_step_the_ratio_is_exactly_1_and_the_kl_exactly_0"),
    Mutation("3 temperature on the values", "rl/value.py", "float().squeeze(-1)\n        return TokenOutputs",
             "float().squeeze(-1) / temperature\n        return TokenOutputs",
             ROLLOUT + "the_temperature_never_touches_the_values"),
    Mutation("4 dropout stays on", "rl/trainer.py", "            disable_dropout(part)", "            pass",
             UPDATE + "dropout_of_the_model_and_of_its_adapters_is_off_in_training"),
    Mutation("5 left padding without positions", "rl/inputs.py", "positions.to(device) if left else None", "None",
             ROLLOUT + "outputs_do_not_depend_on_padding_side_amount_or_batch_mates"),
    Mutation("6 mask from token ids", "rl/rollout.py", "self.mask = ppo.length_mask(lengths)",
             "self.mask = ppo.length_mask(lengths - torch.tensor([ids[-1] == 2 for ids in self.completion_ids]).int())",
             ROLLOUT + "masks_come_from_lengths_and_flags_from_the_sampler_even_if_pad_is_eos"),
    Mutation("7 the preference model reads padding", "reward/prefixes.py", "width + lengths - 1", "width + width - 1",
             SCORING + "padding_is_never_read_even_when_pad_is_eos"),
    Mutation("8 reward before the last token", "rl/ppo.py", "mask.shape[1] - 1 - mask",
             "mask.shape[1] - 2 - mask", MATH + "the_score_sits_on_the_last_action_token"),
    Mutation("8 finished means EOS", "rl/sampling.py", "        if token in self.ids:\n            return True",
             "        if token == 2:\n            return True",
             SAMPLING + "every_id_of_an_eos_list_ends_a_completion"),
    Mutation("9 masked positions leak", "rl/ppo.py",
             "return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))", "return x * mask",
             MATH + "masked_positions_change_neither_losses_nor_gradients_nor_metrics"),
    Mutation("10 rollouts from a nucleus", "rl/rollout.py", "top_p=1.0,", "top_p=0.9,",
             UPDATE + "the_rollout_really_is_a_sample_of_the_distribution_it_is_trained_under"),
    Mutation("11 mean of means", "rl/trainer.py", "found = self._loss(model, rollout, rows, num_tokens, warm_up)",
             "found = self._loss(model, rollout, rows, rollout.train_mask[rows].sum() * len(micro_batches), warm_up)",
             UPDATE + "loss_and_gradient_do_not_depend_on_micro_batches_or_order"),
    Mutation("12 whitening over a shard", "rl/trainer.py", "rollout.train_mask, reduce=self._sum_over_ranks)",
             "rollout.train_mask)", "tests/rl/test_trainer_distributed.py::test_two_processes_train_as_one[head]"),
    Mutation("12 whitening of nothing", "rl/ppo.py", "count = count.clamp(min=1)", "count = count",
             MATH + "whitening_is_defined_for_few_tokens"),
    Mutation("13 advantages run through padding", "rl/ppo.py",
             "torch.where(keep, delta + gamma * lam * next_advantage, next_advantage)",
             "delta + gamma * lam * next_advantage", MATH + "gae_equals_the_loop_and_reads_no_masked_position"),
    Mutation("13 a cut completion is bootstrapped", "rl/ppo.py", "next_value = torch.zeros_like(values[:, 0])",
             "next_value = values[:, -1].clone()", MATH + "gae_worked_by_hand"),
    Mutation("14 the reward gets token ids", "rl/trainer.py", "rollout.completions(),", "rollout.completion_ids,",
             UPDATE + "the_reward_functions_get_text_and_columns_and_what_they_give_is_what_is_optimised"),
    Mutation("15 the suffix brings tokens of its own", "reward/preference.py",
             "return plain_ids(self.tokenizer, text, add_special_tokens=False)",
             "return plain_ids(self.tokenizer, ' ' + text, add_special_tokens=False)",
             "tests/reward/test_preference.py::test_special_tokens_belong_to_the_prefix_alone"),
    Mutation("16 adapters frozen", "rl/setup.py", "return None, get_peft_model(model, peft_config)",
             "return None, get_peft_model(model, peft_config).requires_grad_(False)",
             SAVED + "with_adapters_the_reference_is_the_base_and_only_adapters_and_head_learn"),
    Mutation("16 reference with adapters on", "rl/trainer.py",
             "with policy.disable_adapter() if self.ref_model is None else contextlib.nullcontext():",
             "with contextlib.nullcontext():",
             SAVED + "with_adapters_the_reference_is_the_base_and_only_adapters_and_head_learn"),
    Mutation("17 critic not saved", "rl/recording.py", "        self.model.save_value(folder)\n", "",
             SAVED + "what_a_checkpoint_holds"),
    Mutation("18 resume forgets the KL coefficient", "rl/recording.py",
             'self.num_tokens, self.beta = state["num_tokens"], state["beta"]',
             'self.num_tokens = state["num_tokens"]',
             SAVED + "a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit[head]"),
    Mutation("18 resume starts the data anew", "rl/trainer.py", "        check_precision(joint)\n",
             "        check_precision(joint)\n        args.ignore_data_skip = True\n",
             SAVED + "a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit[head]"),
    Mutation("19 bfloat16 weights are trained", "rl/trainer.py", "        check_precision(joint)\n", "",
             UPDATE + "low_precision_parameters_are_refused"),
    Mutation("16 an adapter is loaded frozen", "rl/setup.py", "loaded.set_adapter(loaded.active_adapter)", "pass",
             MODELS + "an_adapter_given_as_a_folder_is_trained_and_its_base_is_not"),
    Mutation("1 the reference outside autocast", "rl/trainer.py", "return self.accelerator.autocast()",
             "return contextlib.nullcontext()",
             MODELS + "in_bfloat16_too_the_kl_of_the_same_weights_is_exactly_0_always"),
    Mutation("a wrong guess is kept", "rl/decoding.py", " or token != guess[right]", "",
             "tests/rl/test_lookup.py::test_right_guesses_save_passes_and_wrong_ones_change_nothing"),
    Mutation("a wrong guess stays in sight", "rl/decoding.py", "for place in places[: 1 + right]]",
             "for place in places]",
             "tests/rl/test_lookup.py::test_right_guesses_save_passes_and_wrong_ones_change_nothing"),
    Mutation("20 sampling in training mode", "rl/sampling.py", "    model.eval()\n", "",
             SAMPLING + "mode_is_restored_and_sampling_runs_in_eval_mode"),
    Mutation("21 sampler and trainer differ", "rl/trainer.py", "temperature=args.temperature,",
             "temperature=args.temperature * 1.01,", SAVED + "the_run_leaves_a_jsonl_log_and_tables_of_completions"),
    Mutation("22 shared rows without a block mask", "rl/inputs.py", "((by_key == 0) | (by_key == by_query))",
             "(by_key >= 0)",
             ROLLOUT + "completions_that_share_their_prompt_s_row_equal_dense_rows_with_gradient"),
    Mutation("23 another reward logged than optimised", "rl/metrics.py", '"score": scores[i]', '"score": raw[i]',
             UPDATE + "the_reward_functions_get_text_and_columns_and_what_they_give_is_what_is_optimised"),
    Mutation("24 logging changes what it logs", "rl/metrics.py", "    k1, k3 = rollout.kl()\n",
             "    k1, k3 = rollout.kl()\n    rollout.old_logprobs.zero_()\n",
             UPDATE + "the_reward_functions_get_text_and_columns_and_what_they_give_is_what_is_optimised"),
    Mutation("I3 gradients not averaged by tokens of all ranks", "rl/trainer.py",
             "self._sum_over_ranks(rollout.train_mask[everyone].sum()).clamp(min=1)",
             "rollout.train_mask[everyone].sum().clamp(min=1)",
             "tests/rl/test_trainer_distributed.py::test_two_processes_train_as_one[head]"),
    Mutation("best of n against n others", "rl/ppo.py",
             "best_of_chances(n - 1, len(known) - 1)", "best_of_chances(n, len(known) - 1)",
             "tests/rl/test_ppo_best_of_n.py::test_the_policy_gradient_is_that_of_the_expected_best_of_n"),
    Mutation("checkpoint that nobody sealed", "rl/recording.py", "            publish(part / name, run / name)\n",
             "            (part / name).rename(run / name)\n",
             SAVED + "a_torn_checkpoint_is_told_and_the_one_before_is_used"),
]  # fmt: skip


def noticed(mutation: Mutation, tree: Path) -> bool:
    """Whether the test passes in the tree as it is and fails with the bug."""
    file = tree / mutation.file
    source = file.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.bug}: {mutation.old!r} is {source.count(mutation.old)} times in {mutation.file}")
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        return run(tree, mutation.test.split()) == 1  # pytest: some tests failed
    finally:
        file.write_text(source)


def run(tree: Path, tests: list[str]) -> int:
    """Pytest's exit code, with the tree's own modules in front of installed ones."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode


def main() -> None:
    """All of them, or those whose name contains an argument."""
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.bug for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".hypothesis")
        )
        tests = sorted({test for m in wanted for test in m.test.split()})
        if run(tree, tests):
            raise SystemExit("the tests fail without any bug put back; mend that first")
        missed = []
        for mutation in wanted:
            seen = noticed(mutation, tree)
            print(f"{'noticed' if seen else 'MISSED '}  {mutation.bug}: {mutation.test}", flush=True)
            missed += [] if seen else [mutation.bug]
    print(f"{len(wanted) - len(missed)} of {len(wanted)} noticed")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
