"""``consensus cycle``: what members rated becomes the next policy, and the next policy an arm of an experiment.

Ratings of members who consented -> ``consensus preference`` -> ``consensus ppo`` -> an experiment between the policy
before and the new one. Every finished step is a row of the table ``lineage``: the same command does no step twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from deliberation.types import InputError
from embedded import resolve
from reward.preference import PreferenceModel, fingerprint
from rl.policy import load_policy
from serving import cycle_data, new_arm
from serving.ask import KEY_VARIABLE
from serving.config import DEFAULT_POLICY, ServeConfig
from serving.export import export_rows
from serving.lineage import Made, ancestors, made_id, record, recorded
from serving.steps import Cluster, Step, alone, begin, run_as_job, run_here
from serving.store import open_store

EXPORT, PREFERENCE, PPO = "export", "preference", "ppo"


@dataclass
class CycleConfig:
    """Keys of ``consensus cycle``. How models are trained is set in the two files it names."""

    output_dir: str = "runs/cycle"
    """Folder for data, models and experiment.yaml; a new one each time round, on shared storage if jobs run on a
    cluster. With the folder of a run that broke off, the same command goes on."""

    database: str = ServeConfig.database
    """URL of the service's database."""

    policy: str = ServeConfig.model_name_or_path
    """Folder or name of the policy before: PPO starts from it, and the experiment compares with it."""

    preference_config: str = "configs/embedded/preference.yaml"
    """Keys of ``consensus preference``."""

    ppo_config: str = "configs/embedded/ppo.yaml"
    """Keys of ``consensus ppo``."""

    eval_share: float = 0.2
    """Share of the deliberations, between 0 and 1, held out: the preference model is calibrated and PPO watched on
    them."""

    min_ratings: int = 200
    """Ratings below which nothing is trained, those held out not counted."""

    ray_address: str | None = None
    """Job server of a Ray cluster, e.g. http://127.0.0.1:8265: each training is a job there. None trains here."""

    ray_working_dir: str | None = None
    """Folder with this project that Ray copies to each job; None where the cluster has it installed."""

    ray_python: str = "python"
    """Python of the cluster, with what the project needs."""

    ray_gpus: float = 0.0
    """GPUs (or a share of one) Ray reserves for a job."""

    url: str | None = None
    """Service in which to create the experiment, once it serves the new policy. An API key is read from the variable
    CONSENSUS_API_KEY."""

    policy_name: str = DEFAULT_POLICY
    """What the service calls the policy before; with ``url``, its weights tell."""

    samples: int = 1
    """Candidates each arm of the experiment samples and chooses from, 1 to 64."""

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise InputError("eval_share", self.eval_share, "must be between 0 and 1")
        if self.min_ratings < 1:
            raise InputError("min_ratings", self.min_ratings, "must be at least 1")
        if self.ray_gpus < 0:
            raise InputError("ray_gpus", self.ray_gpus, "must be 0 or more")
        for name in ("preference_config", "ppo_config"):
            if not Path(getattr(self, name)).is_file():
                raise InputError(name, getattr(self, name), "is not a file; give one like configs/embedded/ppo.yaml")
        new_arm.check_samples(self.samples)


def main(config: CycleConfig) -> None:
    """Go round once, print what was made from what, and how to serve it."""
    policy = _whole_path(config.policy)
    before = print_of_policy(policy)
    engine, out = open_store(config.database), Path(config.output_dir).resolve()
    with alone(out) as lock:
        # 1. What people said.
        export = _export(config, engine, out)
        # 2. What they think of statements.
        preference = _trained(config, engine, _preference_step(config, export, out), (export.id,), out, lock)
        # 3. What to write for them.
        step = _ppo_step(config, preference, policy, before, out)
        earlier = [made.id for made in recorded(engine, kind=PPO, print=before)][-1:]
        ppo = _trained(config, engine, step, (export.id, preference.id, *earlier), out, lock)
    for made in ancestors(engine, [ppo.id]):
        print(made.line())
    # 4. Is it better?
    print(new_arm.offer(ppo, before, config.policy_name, config.samples, out, config.url, os.environ.get(KEY_VARIABLE)))


def print_of_policy(path: str) -> str:
    """Short SHA-256 of a policy's weights, as the service gives it.

    Raises:
        InputError: if it cannot be loaded.
    """
    return fingerprint(load_policy(path, device="cpu")[0])


def print_of_preference(path: str) -> str:
    """Short SHA-256 of a preference model's weights, as the service gives it.

    Raises:
        InputError: if it cannot be loaded.
    """
    return PreferenceModel.load(path).version


def _whole_path(path: str) -> str:
    """A folder's absolute path, for jobs run elsewhere; a hub name as it is."""
    found = resolve(path)
    return str(Path(found).resolve()) if Path(found).is_dir() else found


def _export(config: CycleConfig, engine: Engine, out: Path) -> Made:
    """The export in ``out``: the recorded one, or a new one."""
    for made in recorded(engine, kind=EXPORT, place=str(out)):
        if made.print != cycle_data.print_of(out):
            mend = f"its data is not that of {made.id} any more; give a new folder"
            raise InputError("output_dir", str(out), mend)
        return made
    data = cycle_data.gather(engine, export_rows(engine), config.eval_share)
    cycle_data.check_enough(data, config.min_ratings, config.eval_share)
    cycle_data.write(data, out)
    digest = str(cycle_data.print_of(out))
    made = Made(made_id(EXPORT, str(out), digest), EXPORT, data.experiments, digest, str(out))
    record(engine, made)
    print(f"{len(data.ratings)} ratings to fit to, {len(data.eval_ratings)} held out: {out}", flush=True)
    return made


def _preference_step(config: CycleConfig, export: Made, out: Path) -> Step:
    words = {
        "ratings": out / cycle_data.RATINGS,
        "eval_ratings": out / cycle_data.EVAL_RATINGS,
        "output_dir": out / PREFERENCE,
    }
    return _step(PREFERENCE, config.preference_config, words, export.id)


def _ppo_step(config: CycleConfig, preference: Made, policy: str, before: str, out: Path) -> Step:
    words = {
        "model_name_or_path": policy,
        "preference_model": preference.place,
        "deliberations": out / cycle_data.DELIBERATIONS,
        "eval_deliberations": out / cycle_data.EVAL_DELIBERATIONS,
        "output_dir": out / PPO,
        "resume_from_checkpoint": "auto",
    }
    return _step(PPO, config.ppo_config, words, preference.id, before)


def _step(stage: str, file: str, words: Mapping[str, object], *inputs: str) -> Step:
    arguments = ["--config", file, *(word for key, value in words.items() for word in (f"--{key}", str(value)))]
    return Step(stage, tuple(arguments), made_id(stage, Path(file).read_text(encoding="utf-8"), arguments[2:], inputs))


def _trained(config: CycleConfig, engine: Engine, step: Step, made_from: tuple[str, ...], out: Path, lock: int) -> Made:
    """The model that the step makes: the recorded one, or trained now."""
    place = str(out / step.stage)
    for made in recorded(engine, kind=step.stage, place=place):
        if made.id != step.id:
            mend = f"has a {step.stage} model of other keys ({made.id}); give a new folder"
            raise InputError("output_dir", str(out), mend)
        if made.print != _print(step.stage, place):
            raise InputError("output_dir", place, f"its weights are not those of {made.id} any more; give a new folder")
        return made
    begin(step, Path(place))
    if config.ray_address is None:
        run_here(step, lock)
    else:
        cluster = Cluster(config.ray_address, config.ray_working_dir, config.ray_python, config.ray_gpus)
        run_as_job(step, cluster)
    made = Made(step.id, step.stage, made_from, _print(step.stage, place), place)
    record(engine, made)
    return made


def _print(stage: str, place: str) -> str:
    return print_of_preference(place) if stage == PREFERENCE else print_of_policy(place)
