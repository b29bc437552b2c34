"""``consensus demo`` (``make demo``): the whole main job on the embedded models, from opinions to a served answer.

Citizens are simulated; what they would have said is known, so that every stage can be measured. The stages are the
ones of ``consensus sft|preference|ppo|compare|serve`` with the keys of ``configs/embedded/``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from deliberation.citizens import Group, draw_group
from deliberation.datasets import write_jsonl
from deliberation.prompts import clean_statement, statement_prompt
from deliberation.questions import load_questions, read_questions
from deliberation.types import InputError, Rating
from embedded.disguise import rephrased
from evaluation.citizen_ratings import first_candidates, good_statements, rated, shown_twice

CONFIGS = Path(__file__).parent / "configs" / "embedded"
IN_OTHER_WORDS = 0.5
"""Share of PPO's groups whose opinions stand in phrases and sentences that the citizens do not use."""


@dataclass
class DemoConfig:
    """Keys of ``consensus demo``. Everything else is set in ``configs/embedded/<stage>.yaml``."""

    output_dir: str = "runs/demo"
    """Folder for data, models, comparison.json and report.html; a run before it is overwritten."""

    seed: int = 0
    """Of citizens, samples, training and bootstrap."""

    sft_groups: int = 200
    """Groups whose citizens rate the base writer's candidates; the statements of high quality are learnt from."""

    candidates: int = 6
    """Candidates a group rates, as in Bakker et al. 2022."""

    min_quality: float = 5.0
    """Least mean quality (1 to 7) of a statement that is learnt from (the paper's best threshold)."""

    preference_groups: int = 200
    """Groups whose ratings the preference model is fitted to, half base and half SFT candidates."""

    calibration_groups: int = 100
    """Held-out groups (validation topics) whose ratings calibrate the preference model."""

    ppo_groups: int = 640
    """Groups whose opinions PPO writes for."""

    ppo_updates: int | None = None
    """PPO updates; None keeps ``max_steps`` of ``configs/embedded/ppo.yaml``."""

    eval_groups: int = 40
    """Held-out groups (validation topics) on which PPO's predicted welfare and KL are watched."""

    num_deliberations: int = 200
    """Held-out groups (test topics, held-out words) of the comparison."""

    questions: str | None = None
    """JSONL file of debate questions for the comparison, instead of our own test topics."""

    def __post_init__(self) -> None:
        counts = (
            "sft_groups",
            "candidates",
            "preference_groups",
            "calibration_groups",
            "ppo_groups",
            "eval_groups",
            "num_deliberations",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1")
        if self.candidates < 2:
            raise InputError("candidates", self.candidates, "must be at least 2: people compare statements")
        if not 1 <= self.min_quality <= 7:
            raise InputError("min_quality", self.min_quality, "must be from 1 to 7")
        if self.questions:
            read_questions(self.questions)  # a wrong path must not cost minutes of training
        if self.preference_groups > self.sft_groups:
            raise InputError("preference_groups", self.preference_groups, f"at most sft_groups ({self.sft_groups})")


class Stages:
    """Numbers the stages, times them, prints one line after each."""

    def __init__(self, total: int):
        self.total, self.seconds = total, {}  # type: int, dict[str, float]

    @contextlib.contextmanager
    def __call__(self, name: str, title: str) -> Iterator[list[str]]:
        """Run a stage; the body appends its one-line result to the yielded list."""
        number, start = len(self.seconds) + 1, time.perf_counter()
        print(f"[{number}/{self.total}] {title}", flush=True)
        result: list[str] = []
        yield result
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"      {' '.join(result)} ({self.seconds[name]:.0f} s)", flush=True)


def stage_config(stage: str, **overrides: Any) -> Any:
    """The config of one stage: its YAML of ``configs/embedded`` with some keys replaced."""
    import cli

    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return cli._parse(stage, str(CONFIGS / f"{stage}.yaml"), words)[1]


def draw_groups(split: str, count: int, seed: str, held_out: bool = False) -> list[Group]:
    """Groups on our questions of one split."""
    questions, rng = load_questions(split), Random(f"demo {seed}")
    return [draw_group(rng.choice(questions), rng, held_out) for _ in range(count)]


def sample_candidates(path: str, groups: Sequence[Group], n: int, seed: int, title: str) -> list[list[str]]:
    """``n`` statements of the policy at ``path`` for every group, sampled as they are in the comparison."""
    from tqdm import tqdm

    from rl.policy import load_policy, sample

    model, tokenizer = load_policy(path, device="cpu")
    served = stage_config("compare")
    keys = {"max_new_tokens": served.max_new_tokens, "temperature": served.temperature, "top_p": served.top_p}
    found: list[list[str]] = []
    for start in tqdm(range(0, len(groups), 32), desc=title, unit="batch"):
        part = groups[start : start + 32]
        prompts = [statement_prompt(g.question.text, [c.opinion for c in g.citizens]) for g in part]
        seeds = [seed * 1_000_003 + start + k for k in range(len(part))]
        drawn = sample(model, tokenizer, prompts, n=n, seeds=seeds, **keys)
        found += [[clean_statement(s.text) for s in row] for row in drawn]
    return found


def deliberation_rows(name: str, groups: Sequence[Group], in_other_words: float = 0.0) -> list[dict[str, Any]]:
    """Groups as the rows PPO reads, a share of them in phrases and sentences that the citizens do not use."""
    rng, rows = Random(name), []
    for k, group in enumerate(groups):
        said = group.deliberation(f"{name}-{k}")
        rows.append(asdict(rephrased(said, group, rng) if rng.random() < in_other_words else said))
    return rows


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send the trainers' chatter to ``log``; progress bars stay on the screen."""
    with log.open("a") as file, contextlib.redirect_stdout(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ask(url: str, group: Group) -> dict[str, Any]:
    """One real ``POST /v1/consensus``."""
    opinions = [c.opinion for c in group.citizens]
    body = json.dumps({"question": group.question.text, "opinions": opinions, "n": 16, "seed": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/consensus", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy
    with opener.open(request, timeout=120) as response:
        return json.load(response)


def main(config: DemoConfig) -> None:
    """Run all stages; ends with the table of arms and the report's path."""
    _prepare()
    out, data = Path(config.output_dir), Path(config.output_dir) / "data"
    _clear(out)
    log, stages = out / "train.log", Stages(7)
    data.mkdir(parents=True)
    log.write_text("")  # also the sign that a demo made this folder
    from serving.deployments import local_ray

    with local_ray():
        _load_base(stages)
        groups, base_ratings = _sft(config, stages, out, data, log)
        _rate_candidates(config, stages, out, data, groups, base_ratings)
        _preference(stages, config, out, data, log)
        _ppo(stages, config, out, data, log)
        comparison = _compare(stages, config, out)
        _serve(stages, config, out)
    _finish(stages, out, comparison)


def _clear(out: Path) -> None:
    """Remove what an earlier demo left, so that no two runs mix; a folder that no demo made is refused, not emptied."""
    if out.exists() and any(out.iterdir()) and not (out / "train.log").is_file():
        raise InputError("output_dir", str(out), "holds files of something else; give a new or empty folder")
    for name in ("data", "sft", "preference", "ppo"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("comparison.json", "statements.jsonl", "report.html"):
        (out / name).unlink(missing_ok=True)


def _prepare() -> None:
    """Quiet libraries, one torch thread a process: on two cores more of them get in each other's way."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is plenty, and the trainers take one a process
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ray").setLevel(logging.ERROR)


def _load_base(stages: Stages) -> None:
    from rl.policy import load_policy

    with stages("load", "Load the base writer and judge that ship with the project") as result:
        model, _ = load_policy("embedded/writer", device="cpu")
        count = sum(p.numel() for p in model.parameters()) / 1e6
        result.append(f"{model.config.model_type}, {count:.1f} M parameters; citizens are simulated throughout")


def _sft(config: DemoConfig, stages: Stages, out: Path, data: Path, log: Path) -> tuple[list[Group], list[Rating]]:
    from rl.sft import main as sft

    with stages("sft", "Fine-tune the writer on its statements that citizens rate high in quality (SFT)") as result:
        groups = draw_groups("train", config.sft_groups, f"sft {config.seed}")
        texts = sample_candidates("embedded/writer", groups, config.candidates, config.seed, "base candidates")
        ratings = rated(groups, texts, "base", config.seed)
        rows = good_statements(groups, ratings, config.min_quality)
        if not rows:
            raise InputError("min_quality", config.min_quality, "no statement is that good; lower it or add sft_groups")
        write_jsonl(data / "statements.jsonl", rows)
        keys = {"statements": data / "statements.jsonl", "output_dir": out / "sft", "seed": config.seed}
        with quiet(log):
            sft(stage_config("sft", **keys))
        result.append(f"{len(rows)} of {sum(map(len, texts))} candidates were good enough; policy in {out / 'sft'}")
    return groups, ratings


def _rate_candidates(
    config: DemoConfig, stages: Stages, out: Path, data: Path, groups: list[Group], base: list[Rating]
) -> None:
    with stages("candidates", "Citizens rate candidates of the base and the fine-tuned writer") as result:
        half, few = config.candidates // 2, groups[: config.preference_groups]
        texts = sample_candidates(str(out / "sft"), few, config.candidates - half, config.seed + 1, "SFT candidates")
        fresh = rated(few, texts, "base", config.seed + 1)
        ratings = shown_twice(few, [*first_candidates(base, half, len(few)), *fresh], config.seed)
        write_jsonl(data / "ratings.jsonl", [asdict(r) for r in ratings])
        held_out = _calibration_ratings(config, str(out / "sft"))
        write_jsonl(data / "eval_ratings.jsonl", [asdict(r) for r in held_out])
        result.append(f"{len(ratings)} ratings in {data / 'ratings.jsonl'}")


def _calibration_ratings(config: DemoConfig, policy: str) -> list[Rating]:
    """Ratings of candidates of both writers on topics that neither the shipped judge nor the fit has seen."""
    groups = draw_groups("validation", config.calibration_groups, f"calibration {config.seed}")
    ratings: list[Rating] = []
    for k, path in enumerate(("embedded/writer", policy)):
        texts = sample_candidates(
            path, groups, config.candidates // 2, config.seed + 2 + k, "candidates for calibration"
        )
        ratings += rated(groups, texts, "held-out", config.seed + 2 + k)
    return shown_twice(groups, ratings, config.seed + 1)


def _preference(stages: Stages, config: DemoConfig, out: Path, data: Path, log: Path) -> None:
    from reward.train import main as preference

    with stages("preference", "Fit the preference model to those ratings") as result:
        keys = {"ratings": data / "ratings.jsonl", "eval_ratings": data / "eval_ratings.jsonl",
                "output_dir": out / "preference", "seed": config.seed}  # fmt: skip
        with quiet(log):
            fitted = preference(stage_config("preference", **keys))
        found = fitted.metadata["measures"]
        result.append(
            f"pairwise accuracy {found['accuracy']:.3f} on held-out topics "
            f"(longest statement {found['longest']:.3f}, word overlap {found['overlap']:.3f})"
        )


def _ppo(stages: Stages, config: DemoConfig, out: Path, data: Path, log: Path) -> None:
    from evaluation.gold import make_gold_observer
    from rl.logs import read_log
    from rl.train import train_ppo

    title = "PPO against the group's predicted welfare, the preference model in a Ray actor"
    with stages("ppo", title) as result:
        train = draw_groups("train", config.ppo_groups, f"ppo {config.seed}")
        held_out = draw_groups("validation", config.eval_groups, f"eval {config.seed}", held_out=True)
        # people who type are not citizens: the policy also practises on sentences of another kind
        for name, part, share in (("deliberations", train, IN_OTHER_WORDS), ("eval_deliberations", held_out, 0.0)):
            write_jsonl(data / f"{name}.jsonl", deliberation_rows(name, part, share))
        updates = {} if config.ppo_updates is None else {"max_steps": config.ppo_updates}
        ppo = stage_config(
            "ppo",
            **updates,
            model_name_or_path=out / "sft",
            preference_model=out / "preference",
            output_dir=out / "ppo",
            deliberations=data / "deliberations.jsonl",
            eval_deliberations=data / "eval_deliberations.jsonl",
            seed=config.seed,
        )
        with quiet(log):
            trainer = train_ppo(ppo, observers=[make_gold_observer([*train, *held_out], ppo.welfare)])
        curve = [line for line in read_log(out / "ppo" / "log.jsonl") if "eval/reward" in line]
        result.append(
            f"{trainer.state.global_step} updates; held-out predicted welfare "
            f"{curve[0]['eval/reward']:.2f} -> {max(c['eval/reward'] for c in curve):.2f}"
        )


def _compare(stages: Stages, config: DemoConfig, out: Path) -> dict[str, Any]:
    from evaluation.compare import main as compare

    with stages("compare", "Compare all arms on held-out deliberations") as result:
        keys = {
            "sft_model": out / "sft",
            "ppo_model": out / "ppo",
            "preference_model": out / "preference",
            "ppo_log": out / "ppo" / "log.jsonl",
            "output_dir": out,
            "seed": config.seed,
            "num_deliberations": config.num_deliberations,
        }
        if config.questions:
            keys["questions"] = config.questions
        with quiet(out / "train.log"):
            found = compare(stage_config("compare", **keys), earlier=dict(stages.seconds))
        pair = next(p for p in found["pairs"] if p["a"] == "ppo" and p["b"] == "sft")
        result.append(
            f"PPO beats SFT on {pair['win_rate']:.0%} [{pair['low']:.0%}, {pair['high']:.0%}] of "
            f"{pair['n']} deliberations"
        )
    return found


def _serve(stages: Stages, config: DemoConfig, out: Path) -> None:
    from serving.deployments import running_service

    with stages("serve", "Start the Ray Serve app and ask it once: POST /v1/consensus") as result:
        group = draw_groups("test", 1, f"serve {config.seed}", held_out=True)[0]
        serve = stage_config("serve", model_name_or_path=out / "ppo", preference_model=out / "preference", port=0)
        with running_service(serve) as url:
            answer = ask(url, group)
        print(f"      Question: {group.question.text}")
        for citizen, member in zip(group.citizens, answer["members"], strict=True):
            print(f"      Opinion ({member['agreement']:.1f}): {citizen.opinion}")
        print(f"      Consensus: {answer['statement']}")
        result.append("answered and stopped")


def _finish(stages: Stages, out: Path, comparison: dict[str, Any]) -> None:
    """Put the last stage's time into ``comparison.json``, print the table."""
    from evaluation.report import print_table

    path = out / "comparison.json"
    comparison["seconds"] = {**stages.seconds, **comparison["seconds"]}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    print()
    print_table(comparison)
    print(f"\nReport: {out / 'report.html'}   Serve this policy: make serve")
