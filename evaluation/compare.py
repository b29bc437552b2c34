"""The driver behind ``consensus compare``: load, sample, score, then ``comparison.compare`` and the report.

Held-out deliberations come from simulated citizens on our own test questions (topics never trained on, held-out
words), or on the questions of a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from deliberation.prompts import clean_statement, statement_prompt
from deliberation.questions import load_questions, read_questions
from deliberation.types import Deliberation, InputError
from embedded import resolve
from evaluation.comparison import compare
from evaluation.gold import CitizenGold, held_out_groups, noisy_ratings
from evaluation.judging import Sampled
from evaluation.measures import correlation as correlation_of
from evaluation.report import print_table, write_report
from reward.measures import accuracies
from reward.preference import PreferenceModel, fingerprint
from reward.scoring import score
from reward.welfare import parse_welfare
from rl.logs import read_log
from rl.policy import Sample, load_policy, sample, sequence_logprobs

__all__ = ["CompareConfig", "Policies", "compare", "gather", "main", "read_history", "write_comparison"]

PART = 10
"""Deliberations sampled and scored at a time: small, so that the progress can be seen and processes end together."""
RATED = 6
"""Statements of a pool each citizen rates for the preference model's figures, as in Bakker et al. 2022."""


@dataclass
class CompareConfig:
    """Keys of ``consensus compare``."""

    output_dir: str = "runs/compare"
    """Folder for comparison.json, statements.jsonl, report.html and its PNG files."""
    base_model: str = "embedded/writer"
    """The base model, prompted without fine-tuning."""
    sft_model: str = ""
    """The fine-tuned policy PPO started from: the reference of every KL."""
    ppo_model: str = ""
    """The policy PPO made of it."""
    preference_model: str = ""
    """Folder of the preference model that chooses among candidates."""
    ppo_log: str | None = None
    """JSONL log of the PPO run, for the report's learning curves."""
    welfare: str = "nash"
    """Welfare function that chooses among candidates: utilitarian, nash, rawlsian, a number, p10 or trimmed."""
    num_candidates: int = 16
    """Candidates a policy and deliberation; names the best-of arms."""
    num_deliberations: int = 200
    """Held-out deliberations."""
    questions: str | None = None
    """JSONL file of debate questions to use instead of our own test questions."""
    max_new_tokens: int = 64
    """Longest statement in tokens."""
    temperature: float = 1.0
    """Sampling temperature of all policies; the KL is measured at it."""
    top_p: float = 0.8
    """Nucleus of the candidates, as served (Bakker et al. 2022). The KL is measured on pure samples."""
    batch_size: int = 64
    """Samples in flight at once."""
    workers: int = 1
    """Processes that sample and score; more than one pay off on a CPU."""
    kl_deliberations: int = 50
    """Deliberations on which the KL to the SFT policy is measured."""
    kl_samples: int = 4
    """Pure samples (top_p 1) a policy and deliberation for it."""
    device: str = "cpu"
    """Where the models run."""
    seed: int = 0
    """Of citizens, samples and bootstrap."""

    def __post_init__(self) -> None:
        for name in ("num_candidates", "num_deliberations", "batch_size", "max_new_tokens", "kl_samples", "workers"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1")
        if self.kl_deliberations < 0:
            raise InputError("kl_deliberations", self.kl_deliberations, "must be at least 0")
        if not 0 < self.temperature < math.inf:  # written so that NaN is refused too
            raise InputError("temperature", self.temperature, "must be a finite number above 0")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "must be above 0 and at most 1")
        if self.questions and not Path(self.questions).is_file():
            raise InputError("questions", self.questions, "no such file; give a JSONL file of debate questions")


@dataclass
class Policies:
    """The three policies, each a (model, tokenizer) as ``load_policy`` returns it."""

    base: tuple[Any, Any]
    sft: tuple[Any, Any]
    ppo: tuple[Any, Any]


Models = tuple[Policies, PreferenceModel]


def load_models(config: CompareConfig) -> Models:
    """The three policies and the preference model that ``config`` names.

    Raises:
        InputError: naming the one that cannot be loaded.
    """
    names = (config.base_model, config.sft_model, config.ppo_model)
    policies = Policies(*(load_policy(name, device=config.device) for name in names))
    return policies, PreferenceModel.load(resolve(config.preference_model), device=config.device)


class Stopwatch:
    """Wall time by stage, in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def gather(
    config: CompareConfig,
    deliberations: Sequence[Deliberation],
    policies: Policies,
    preference_model: PreferenceModel,
    first: int = 0,
) -> list[Sampled]:
    """Sample and score every arm on every deliberation.

    Each deliberation has its own seed, so that its statements depend neither on the others nor on the batch.

    Args:
        first: place of ``deliberations[0]`` among all compared ones; it seeds the samples.
    """
    prompts = [statement_prompt(d.question, d.opinions) for d in deliberations]
    # 1. Sample: one statement of the base, a pool of each policy.
    base = _sample(config, policies.base, prompts, 1, "base", first)
    sft = _sample(config, policies.sft, prompts, config.num_candidates, "sft", first)
    ppo = _sample(config, policies.ppo, prompts, config.num_candidates, "ppo", first)
    # 2. Distance of the PPO and base samples from the SFT policy, on the first deliberations.
    measured = prompts[: max(0, config.kl_deliberations - first)]
    ppo_ratios = _log_ratios(config, policies.ppo, policies.sft, measured, "ppo", first)
    base_ratios = _log_ratios(config, policies.base, policies.sft, measured, "base", first)
    # 3. Predicted agreement of every member with every candidate.
    sampled = []
    for i, d in enumerate(deliberations):
        pools = [tuple(clean_statement(s.text) for s in pool[i]) for pool in (sft, ppo)]
        utilities = [pool_utilities(preference_model, d, pool) for pool in pools]
        sampled.append(Sampled(
            d, clean_statement(base[i][0].text), pools[0], pools[1], utilities[0], utilities[1],
            ppo_ratios[i] if i < len(ppo_ratios) else None,
            base_ratios[i] if i < len(base_ratios) else None,
        ))  # fmt: skip
    return sampled


def gather_all(config: CompareConfig, deliberations: Sequence[Deliberation], models: Models) -> list[Sampled]:
    """``gather`` a few deliberations at a time, in ``config.workers`` processes; their number changes no result."""
    parts = [(start, deliberations[start : start + PART]) for start in range(0, len(deliberations), PART)]
    with ExitStack() as stack:
        found: Iterator[list[Sampled]]
        if config.workers == 1:
            found = (gather(config, part, *models, first=start) for start, part in parts)
        else:
            # spawn: a forked copy of a process that has run torch or Ray may hang
            pool = stack.enter_context(
                ProcessPoolExecutor(config.workers, get_context("spawn"), _start_worker, (config,))
            )
            found = pool.map(_gather_part, parts)
        bar = tqdm(found, desc="sample and score", total=len(parts), unit=f"{PART} deliberations")
        return [one for part in bar for one in part]


_worker: tuple[CompareConfig, Models]


def _start_worker(config: CompareConfig) -> None:
    """Load the models once a process; two threads on a busy pair of cores only wait for each other."""
    global _worker
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _worker = config, load_models(config)


def _gather_part(part: tuple[int, Sequence[Deliberation]]) -> list[Sampled]:
    config, models = _worker
    return gather(config, part[1], *models, first=part[0])


def pool_utilities(preference_model: PreferenceModel, d: Deliberation, pool: Sequence[str]) -> np.ndarray:
    """Predicted agreement [members, candidates]; an empty statement gets the lowest rating, 1, unread."""
    utilities = np.ones((len(d.opinions), len(pool)))
    spoken = [k for k, text in enumerate(pool) if text]
    if spoken:
        scores = score(preference_model, d.question, d.opinions, [pool[k] for k in spoken])
        utilities[:, spoken] = scores.utilities
    return utilities


def _sample(
    config: CompareConfig,
    policy: tuple[Any, Any],
    prompts: list[str],
    n: int,
    name: str,
    first: int,
    top_p: float | None = None,
) -> list[list[Sample]]:
    """``n`` samples of every prompt."""
    return sample(
        *policy,
        prompts,
        n=n,
        seeds=[_seed(config.seed, name, first + k) for k in range(len(prompts))],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p if top_p is None else top_p,
        batch_size=config.batch_size,
    )


def _seed(seed: int, name: str, index: int) -> int:
    """An independent seed for one deliberation and policy: samples of two policies share no random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {index}".encode()).digest()[:4])


@torch.no_grad()
def _log_ratios(
    config: CompareConfig,
    policy: tuple[Any, Any],
    reference: tuple[Any, Any],
    prompts: list[str],
    name: str,
    first: int,
) -> list[np.ndarray]:
    """log pi - log pi_reference of ``kl_samples`` pure samples a prompt, summed over tokens, at the temperature."""
    samples = _sample(config, policy, prompts, config.kl_samples, f"{name} for the KL", first, top_p=1.0)
    ratios = []
    for prompt, pool in zip(prompts, samples, strict=True):
        ids = [list(policy[1](prompt).input_ids)] * len(pool)
        if ids[0] != list(reference[1](prompt).input_ids):
            raise InputError("sft_model", f"another tokenizer than {name}'s", "compare policies that share a tokenizer")
        completions = [s.ids for s in pool]
        ours, theirs = (
            sequence_logprobs(model, ids, completions, config.temperature) for model in (policy[0], reference[0])
        )
        ratios.append(np.array([float((a - b).sum()) for a, b in zip(ours, theirs, strict=True)]))
    return ratios


def main(config: CompareConfig, earlier: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Compare, then write ``comparison.json``, ``statements.jsonl`` and ``report.html`` into ``output_dir``.

    Args:
        config: the stage's keys.
        earlier: seconds of stages that came before (training), to stand in the same file.

    Returns:
        The comparison, as written.

    Raises:
        InputError: before anything is written, on a missing model, file or unknown welfare.
    """
    for name in ("sft_model", "ppo_model", "preference_model"):
        if not getattr(config, name):
            raise InputError(name, "", "name the folder (see `consensus compare --help`)")
    parse_welfare(config.welfare, clusters=False)
    history = read_history(config.ppo_log)
    questions = read_questions(config.questions) if config.questions else load_questions("test")
    watch = Stopwatch()
    # 1. Load everything first: a wrong path must not cost an hour of sampling.
    policies, preference_model = load_models(config)
    models = {"base": policies.base[0], "sft": policies.sft[0], "ppo": policies.ppo[0]}
    versions = {name: fingerprint(m) for name, m in models.items()} | {"preference": preference_model.version}
    groups = held_out_groups(questions, config.num_deliberations, config.seed)
    deliberations = [group.deliberation(f"held-out-{i}") for i, group in enumerate(groups)]
    # 2. Sample and score; 3. measure the preference model; 4. judge.
    with watch("compare: sampling and scoring"):
        sampled = gather_all(config, deliberations, (policies, preference_model))
    with watch("compare: preference model"):
        preference = _preference(sampled, groups, config.seed)
    with watch("compare: judging"):
        result = compare(
            sampled, CitizenGold(groups), welfare=config.welfare, preference=preference, seed=config.seed,
            versions=versions, seconds=watch.seconds,
        )  # fmt: skip
    result["seconds"] = {**(earlier or {}), **watch.seconds}  # judging's own time included
    write_comparison(config.output_dir, result, sampled)
    report = write_report(config.output_dir, result, history)
    print_table(result)
    print(f"Report: {report}")
    return result


def _preference(sampled: Sequence[Sampled], groups: Sequence[Any], seed: int) -> dict[str, float | None]:
    """Accuracy, ceiling and baselines on noisy ratings of the policies' samples; correlation with noise-free gold."""
    gold = CitizenGold(groups)
    ratings, second, scores, utilities, truth = [], [], [], [], []
    for i, (one, group) in enumerate(zip(sampled, groups, strict=True)):
        name, half = one.deliberation.id, RATED // 2
        statements = [*one.sft[:half], *one.ppo[:half]]
        predicted = np.concatenate([one.sft_utilities[:, :half], one.ppo_utilities[:, :half]], axis=1)
        known = dict(zip(statements, predicted.T, strict=True))  # statement -> utility of each member
        first = noisy_ratings(group, name, statements, f"first {seed} {i}")
        ratings += first
        second += noisy_ratings(group, name, statements, f"second {seed} {i}")
        scores += [known[r.statement][r.member] for r in first]
        utilities.append(np.ravel(np.concatenate([one.sft_utilities, one.ppo_utilities], axis=1)))
        truth.append(np.ravel(gold.rate(i, [*one.sft, *one.ppo]).agreement))
    correlation = correlation_of(np.concatenate(utilities), np.concatenate(truth))
    return {**accuracies(scores, ratings, second), "correlation": correlation}


def read_history(path: str | None) -> list[dict[str, Any]]:
    """The PPO log as ``rl/logs.py`` wrote it; an empty list for None.

    Raises:
        InputError: field ``ppo_log``, if there is no such file.
    """
    if path is None:
        return []
    if not Path(path).is_file():
        raise InputError("ppo_log", path, "no such file; give the log.jsonl in the PPO run's output_dir")
    return read_log(path)


def write_comparison(folder: str | os.PathLike[str], comparison: dict[str, Any], sampled: Sequence[Sampled]) -> Path:
    """Write ``comparison.json`` and, one line a deliberation, everything sampled (``statements.jsonl``).

    Each file appears whole or not at all. Returns the path of ``comparison.json``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({
            "id": one.deliberation.id, "question": one.deliberation.question,
            "opinions": one.deliberation.opinions, "base": one.base, "sft": one.sft, "ppo": one.ppo,
            "sft_utilities": np.round(one.sft_utilities, 4).tolist(),
            "ppo_utilities": np.round(one.ppo_utilities, 4).tolist(),
        }, ensure_ascii=False)
        for one in sampled
    ]  # fmt: skip
    texts = {
        "statements.jsonl": "\n".join(lines) + "\n",
        "comparison.json": json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        beside = folder / f"{name}.tmp"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / name)
    return folder / "comparison.json"
