"""Ratings to the next policy: the split, the lineage, one run at a time, what is refused; and the whole circle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import yaml
from sqlalchemy import delete, insert, select, update
from test_ray_job import ROOT, job_client  # noqa: F401

from benchmarks._local_service import running
from deliberation.citizens import draw_group
from deliberation.datasets import read_table
from deliberation.questions import load_questions
from deliberation.types import InputError
from rl.checkpoints import PREEMPTED
from rl.logs import LOG_FILE, read_log
from serving import cycle, cycle_data, new_arm
from serving.ballots import Ballots
from serving.citizen_members import deliberate, rating
from serving.cycle import CycleConfig
from serving.experiment_schemas import NewExperiment
from serving.export import export_rows
from serving.lineage import Made, ancestors, made_id, record, recorded
from serving.sessions import INVITE_PREFIX, MEMBER_PREFIX, Member, Sessions, new_token
from serving.steps import Cluster, Step, alone, begin, job_of, run_here
from serving.store import open_store, reading
from serving.tables import deliberations, experiments, lineage, members

import stage_inputs

QUESTION = "Should tea be free?"


@pytest.fixture
def engine(sqlite_url):
    return open_store(sqlite_url)


def held(engine, opinions=("Yes.", "No."), consents=(True, True), experiment=None, statements=stage_inputs.STATEMENTS):
    """A closed deliberation; every member rates every statement, otherwise each. Returns its id."""
    sessions, ballots, invite = Sessions(engine), Ballots(engine), new_token(INVITE_PREFIX)
    name = sessions.create("anna", QUESTION, {}, invite)
    people = [sessions.join(name, invite, "m", yes, new_token(MEMBER_PREFIX)) for yes in consents]
    for person, text in zip(people, opinions, strict=True):
        sessions.write_opinion(person, text, 0)
    sessions.freeze(name, "anna", revise=False)
    common = {"policy": "default", "versions": '{"policy_weights": "sha256:0"}', "welfare": 4.0, "predicted": "{}"}
    rows = [
        common | {"id": f"can_{name[4:]}{k}", "number": k, "statement": text, "winner": k == 0}
        for k, text in enumerate(statements)
    ]
    sessions.keep(name, sessions.get(name).generation, rows, [])
    for m, person in enumerate(people):
        for k, row in enumerate(rows):
            ballots.rate(person, row["id"], 1 + (2 * k + 3 * m) % 7, 5)
    sessions.close(name, "anna")
    if experiment is not None:
        with engine.begin() as connection:
            connection.execute(update(deliberations).where(deliberations.c.id == name).values(experiment=experiment))
    return name


def exported(name, member=0, opinion="Yes.", statement="We want it.", agreement=6):
    return {
        "number": 1, "deliberation_id": name, "member": member, "question": QUESTION, "opinion": opinion,
        "statement": statement, "agreement": agreement, "quality": 5, "topic": "",
    }  # fmt: skip


# ---------------------------------------------------------------- the split


def test_a_deliberation_is_held_out_by_its_id_alone():
    names = [f"del_{k:016x}" for k in range(5000)]
    some = {name for name in names if cycle_data.is_held_out(name, 0.2)}
    assert abs(len(some) / 5000 - 0.2) < 4 * (0.2 * 0.8 / 5000) ** 0.5
    assert some < {name for name in names if cycle_data.is_held_out(name, 0.3)}  # a larger share adds to it
    assert not any(cycle_data.is_held_out(name, 1e-12) for name in names)


def test_no_deliberation_is_cut_and_groups_are_those_who_consented(engine):
    names = [held(engine, ("Yes.", "No.", "Perhaps."), (True, False, True)) for _ in range(12)]
    rows = [exported(name, m) for name in names for m in (0, 2)]
    data = cycle_data.gather(engine, rows, 0.5)
    kept, held_out = ({row["deliberation_id"] for row in part} for part in (data.ratings, data.eval_ratings))
    assert kept | held_out == set(names) and not kept & held_out
    assert len(data.ratings) + len(data.eval_ratings) == len(rows)
    assert [row["id"] for row in data.deliberations] == [name for name in names if name in kept]
    assert [row["id"] for row in data.eval_deliberations] == [name for name in names if name in held_out]
    assert all(row["opinions"] == ["Yes.", "Perhaps."] for row in [*data.deliberations, *data.eval_deliberations])
    assert data == cycle_data.gather(engine, rows, 0.5)


def test_a_member_who_left_gives_no_opinion(engine):
    name = held(engine)
    with reading(engine) as connection:
        first = connection.execute(select(members).where(members.c.number == 0)).one()
    Sessions(engine).erase_member(Member(first.id, name, 0))
    assert cycle_data.group_row(engine, name)["opinions"] == ["No."]


def test_the_experiments_that_ratings_come_from_are_named(engine):
    row = {"id": "exp_1", "owner": "anna", "name": "x", "spec": "{}", "salt": "s", "created": 1.0}
    with engine.begin() as connection:
        connection.execute(insert(experiments).values(row))
    names = [held(engine), held(engine, experiment="exp_1"), held(engine)]
    assert cycle_data.gather(engine, [exported(name) for name in names], 0.3).experiments == ("exp_1",)
    assert cycle_data.gather(engine, [exported(names[0])], 0.3).experiments == ()


def test_the_print_is_of_all_four_files(tmp_path, engine):
    data = cycle_data.gather(engine, [exported(held(engine)) for _ in range(8)], 0.5)
    assert cycle_data.print_of(tmp_path) is None
    cycle_data.write(data, tmp_path)
    found = cycle_data.print_of(tmp_path)
    for name in cycle_data.FILES:
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text + b" ")
        assert cycle_data.print_of(tmp_path) not in (None, found)
        (tmp_path / name).write_bytes(text)
    assert cycle_data.print_of(tmp_path) == found and len(found) <= 100


# ---------------------------------------------------------------- the lineage


def test_lineage_goes_back_to_the_first_export(engine):
    made = [
        Made("lin_a", "export", (), "sha256:1", "one"),
        Made("lin_b", "preference", ("lin_a",), "sha256:2", "one/preference"),
        Made("lin_c", "ppo", ("lin_a", "lin_b"), "sha256:3", "one/ppo"),
        Made("lin_x", "export", (), "sha256:4", "other"),
        Made("lin_d", "export", ("exp_1",), "sha256:5", "two"),
        Made("lin_e", "ppo", ("lin_d", "lin_c"), "sha256:6", "two/ppo"),
    ]
    for one in [*made, *made]:  # keeping a row is safe to repeat
        record(engine, one)
    assert ancestors(engine, ["lin_e"]) == [one for one in made if one.id != "lin_x"]
    assert ancestors(engine, ["lin_b"]) == made[:2]
    assert ancestors(engine, ["lin_nobody"]) == []
    assert recorded(engine, kind="ppo") == [made[2], made[5]]
    assert recorded(engine, kind="ppo", print="sha256:3") == [made[2]]
    assert recorded(engine, kind="export", place="two") == [made[4]]


def test_the_same_facts_have_the_same_id():
    assert made_id("ppo", ["a", "b"]) == made_id("ppo", ["a", "b"]) != made_id("ppo", ["a", "c"])
    assert made_id("ab", "c") != made_id("a", "bc")


# ---------------------------------------------------------------- one run at a time, steps


def test_a_folder_is_worked_on_by_one_process_and_its_children(tmp_path):
    code = "import sys, time; print('up', flush=True); time.sleep(600)"
    with alone(tmp_path) as lock:
        with pytest.raises(InputError, match="another process"), alone(tmp_path):
            pass
        child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[lock], stdout=subprocess.PIPE)
        child.stdout.readline()
    with pytest.raises(InputError, match="output_dir"), alone(tmp_path):  # we are done, a child of ours is not
        pass
    child.kill()
    child.communicate()
    with alone(tmp_path):
        pass


def test_a_step_goes_on_from_its_own_beginnings_alone(tmp_path):
    folder, step, other = tmp_path / "ppo", Step("ppo", (), "lin_1"), Step("ppo", (), "lin_2")
    begin(other, folder)
    begin(step, folder)  # the other one has left nothing
    (folder / "checkpoint-1").mkdir()
    begin(step, folder)
    with pytest.raises(InputError, match="other keys"):
        begin(other, folder)
    (folder / "cycle.step").unlink()
    with pytest.raises(InputError, match="something else"):
        begin(step, folder)


def test_a_step_that_fails_ends_the_run_with_its_exit_code(tmp_path, capfd):
    with alone(tmp_path) as lock, pytest.raises(SystemExit) as end:
        run_here(Step("preference", ("--config", "nowhere.yaml"), "lin_1"), lock)
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert "nowhere.yaml" in err and "exit code 2" in err and "Traceback" not in err


def test_the_same_step_is_the_same_job():
    step = Step("ppo", ("--output_dir", "a folder"), "lin_1")
    job = job_of(step, Cluster("http://127.0.0.1:1", "src", "python3", 0.5))
    assert job["submission_id"] == "ppo-lin_1" and job["entrypoint_num_gpus"] == 0.5
    assert job["entrypoint"] == "python3 -m cli ppo --output_dir 'a folder'"
    assert job["runtime_env"]["working_dir"] == "src" and ".git" in job["runtime_env"]["excludes"]
    assert job_of(step, Cluster("http://127.0.0.1:1", None, "python", 0.0))["runtime_env"] == {}


# ---------------------------------------------------------------- what is refused, before anything is trained


@pytest.mark.parametrize(
    "key, value",
    [("eval_share", 0.0), ("eval_share", 1.0), ("min_ratings", 0), ("ray_gpus", -1.0), ("samples", 0), ("samples", 65),
     ("preference_config", "nowhere.yaml"), ("ppo_config", "nowhere.yaml")],
)  # fmt: skip
def test_bad_keys_are_named(key, value):
    with pytest.raises(InputError) as error:
        CycleConfig(**{key: value})
    assert error.value.field == key


@pytest.fixture
def keys(tmp_path, sqlite_url):
    return {"database": sqlite_url, "output_dir": str(tmp_path / "run"), "policy": str(tmp_path / "policy")}


def test_a_policy_that_is_not_there_is_refused(keys):
    with pytest.raises(InputError):
        cycle.main(CycleConfig(**keys))


def test_too_few_ratings_train_nothing(tmp_path, keys, engine):
    stage_inputs.save_policy(tmp_path / "policy")
    with pytest.raises(InputError, match="min_ratings") as error:
        cycle.main(CycleConfig(**keys))
    assert error.value.field == "ratings" and error.value.value == 0
    assert recorded(engine, kind="export") == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cycle.lock"]


def test_nothing_held_out_is_refused(engine):
    name = next(name for name in iter(lambda: held(engine), "") if not cycle_data.is_held_out(name, 0.2))
    data = cycle_data.gather(engine, [exported(name)], 0.2)
    with pytest.raises(InputError, match="holds out none") as error:
        cycle_data.check_enough(data, 1, 0.2)
    assert error.value.field == "eval_share"


def test_an_export_that_was_changed_is_refused(tmp_path, keys, engine):
    stage_inputs.save_policy(tmp_path / "policy")
    out = tmp_path / "run"
    cycle_data.write(cycle_data.gather(engine, [exported(held(engine)) for _ in range(8)], 0.5), out)
    record(engine, Made("lin_1", "export", (), cycle_data.print_of(out), str(out)))
    with (out / cycle_data.RATINGS).open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="not that of lin_1") as error:
        cycle.main(CycleConfig(**keys))
    assert error.value.field == "output_dir"


def test_a_model_of_other_keys_is_refused(tmp_path, keys, engine):
    stage_inputs.save_policy(tmp_path / "policy")
    out = tmp_path / "run"
    cycle_data.write(cycle_data.gather(engine, [exported(held(engine)) for _ in range(8)], 0.5), out)
    record(engine, Made("lin_1", "export", (), cycle_data.print_of(out), str(out)))
    record(engine, Made("lin_2", "preference", ("lin_1",), "sha256:0", str(out / "preference")))
    with pytest.raises(InputError, match="of other keys"):
        cycle.main(CycleConfig(**keys))


# ---------------------------------------------------------------- the new arm


def test_the_experiment_compares_the_new_policy_with_the_one_before(tmp_path):
    made = Made("lin_1", "ppo", (), "sha256:0123456789abcdef", str(tmp_path / "ppo"))
    said = new_arm.offer(made, "sha256:old", "default", 1, tmp_path, None, None)
    assert f"--policies ppo-01234567={tmp_path / 'ppo'}" in said and str(tmp_path / "experiment.yaml") in said
    body = NewExperiment(**yaml.safe_load((tmp_path / "experiment.yaml").read_text()))
    assert [(arm.policy, arm.n) for arm in body.arms] == [("ppo-01234567", 1), ("default", 1)]
    assert body.spec({}).mode == "paired"


def test_a_policy_that_learned_nothing_is_no_arm(tmp_path):
    made = Made("lin_1", "ppo", (), "sha256:0123456789abcdef", "x")
    assert "nothing to compare" in new_arm.offer(made, made.print, "default", 1, tmp_path, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_does_not_answer_is_named(tmp_path):
    made = Made("lin_1", "ppo", (), "sha256:0123456789abcdef", "x")
    with pytest.raises(InputError, match="is the service up") as error:
        new_arm.offer(made, "sha256:old", "default", 1, tmp_path, "http://127.0.0.1:9", None)
    assert error.value.field == "url"


# ---------------------------------------------------------------- the circle


def write_configs(folder: Path, **ppo: object) -> dict[str, str]:
    """Configs of trainings that take seconds."""
    embedded = ROOT / "configs" / "embedded"
    small = {
        "preference": {"per_device_train_batch_size": 4},
        "ppo": {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "num_prompts": 2, "num_generations": 4,
                "num_mini_batches": 1, "max_completion_length": 24, "reward_actors": 0} | ppo,
    }  # fmt: skip
    for stage, keys in small.items():
        whole = yaml.safe_load((embedded / f"{stage}.yaml").read_text()) | keys
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(whole))
    return {f"{stage}_config": str(folder / f"{stage}.yaml") for stage in small}


def made_by(engine, out: Path) -> list[Made]:
    return ancestors(engine, [made.id for made in recorded(engine, kind="ppo", place=str(out / "ppo"))])


@pytest.mark.slow
def test_the_circle(tmp_path, sqlite_url, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    out, engine, rng = tmp_path / "run", open_store(sqlite_url), Random("circle")
    groups = [draw_group(question, rng) for question in rng.sample(load_questions("train"), 8)]
    service = {"database": sqlite_url, "num_candidates": 4, "max_new_tokens": 32, "reshuffle": False}
    # 1. Members rate what the embedded policy writes; one group does not consent.
    with running(tmp_path / "log", **service) as url:
        reports = list(deliberate(url, groups[:7], shown=3))
        refused = list(deliberate(url, groups[7:], shown=3, consent=False))
    assert all(report.deliberation.state == "closed" for report in [*reports, *refused])
    share = fitting_share([report.deliberation.id for report in reports])
    keys = dict(database=sqlite_url, output_dir=str(out), policy="embedded/writer", min_ratings=10, eval_share=share,
                **write_configs(tmp_path))  # fmt: skip
    # 2. Round once.
    cycle.main(CycleConfig(**keys))
    export, preference, ppo = made_by(engine, out)
    assert [made.kind for made in (export, preference, ppo)] == ["export", "preference", "ppo"]
    assert preference.made_from == (export.id,) and ppo.made_from == (export.id, preference.id)
    said = capfd.readouterr().out
    assert all(made.line() in said for made in (export, preference, ppo)) and export.print == cycle_data.print_of(out)
    assert ppo.print == cycle.print_of_policy(ppo.place) != cycle.print_of_policy("embedded/writer")
    assert what_was_exported(out) == what_was_rated(groups, reports)
    # 3. Once more: nothing is trained again. Without the last row it is, from the last checkpoint, to the same weights.
    weights = out / "ppo" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    cycle.main(CycleConfig(**keys))
    assert weights.stat().st_mtime_ns == before and made_by(engine, out) == [export, preference, ppo]
    with engine.begin() as connection:
        connection.execute(delete(lineage).where(lineage.c.id == ppo.id))
    cycle.main(CycleConfig(**keys))
    assert weights.stat().st_mtime_ns != before and made_by(engine, out) == [export, preference, ppo]
    # 4. The service gets the new policy, and members an experiment.
    new = f"{new_arm.name_of(ppo)}={out / 'ppo'}"
    with running(tmp_path / "log", **service, policies=[new]) as url:
        capfd.readouterr()
        cycle.main(CycleConfig(**keys, url=url))
        name = capfd.readouterr().out.split("Experiment ")[1].split()[0]
        (report,) = deliberate(url, groups[:1], experiment=name)
    assert report.deliberation.experiment == name and 1 <= len(report.candidates) <= 2
    assert {c.ratings for c in report.candidates} == {len(groups[0].citizens)}
    # 5. Ratings of a running experiment are nobody's to train with yet.
    assert report.deliberation.id not in {row["deliberation_id"] for row in export_rows(engine)}


def fitting_share(names: list[str]) -> float:
    """The smallest share, in steps of 5 %, that holds out one of the deliberations; their ids are random."""
    return next(k / 20 for k in range(1, 20) if any(cycle_data.is_held_out(name, k / 20) for name in names))


def what_was_rated(groups, reports) -> set[tuple]:
    """(deliberation, member, statement, agreement, quality) of all ratings that citizens give."""
    return {
        (report.deliberation.id, m, c.statement, *rating(citizen, group, c.statement, f"{k} {m}"))
        for k, (group, report) in enumerate(zip(groups, reports))
        for m, citizen in enumerate(group.citizens)
        for c in report.candidates
    }


def what_was_exported(out: Path) -> set[tuple]:
    columns = ("deliberation_id", "member", "statement", "agreement", "quality")
    rows = [row for name in (cycle_data.RATINGS, cycle_data.EVAL_RATINGS) for row in read_table(out / name, columns)]
    assert len({tuple(row[c] for c in columns) for row in rows}) == len(rows)
    return {tuple(row[c] for c in columns) for row in rows}


def until(process, met):
    """Wait for something that the process does."""
    deadline = time.monotonic() + 600
    while not met():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_reaches_the_training_and_the_same_command_goes_on(tmp_path, sqlite_url):
    engine, out = open_store(sqlite_url), tmp_path / "run"
    names = [held(engine, stage_inputs.OPINIONS, (True, True, True)) for _ in range(8)]
    stage_inputs.save_policy(tmp_path / "policy")
    judge = stage_inputs.save_preference_model(tmp_path / "judge")
    configs = write_configs(tmp_path, max_steps=30, save_steps=100, eval_steps=100)
    preference = Path(configs["preference_config"])
    preference.write_text(preference.read_text() + f"\nmodel_name_or_path: {judge}\n")
    keys = dict(database=sqlite_url, output_dir=out, policy=tmp_path / "policy", min_ratings=4,
                eval_share=fitting_share(names), **configs)  # fmt: skip
    words = [sys.executable, "-m", "cli", "cycle", *(word for key in keys for word in (f"--{key}", str(keys[key])))]
    log = out / "ppo" / LOG_FILE

    def steps():
        return [line["step"] for line in read_log(log)] if log.exists() else []

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    first = subprocess.Popen(words, **pipes)
    until(first, lambda: 2 in steps())
    first.send_signal(signal.SIGTERM)  # to it alone, as a supervisor does
    said, _ = first.communicate(timeout=300)
    assert first.returncode == PREEMPTED and "goes on from here" in said, said
    (checkpoint,) = (out / "ppo").glob("checkpoint-*")  # save_steps is never reached: the signal's
    assert recorded(engine, kind="preference") and not recorded(engine, kind="ppo")
    with alone(out):  # the training is over too
        before, done = log.read_text(), max(steps())
    assert f"checkpoint-{done}" == checkpoint.name and done < 30
    again = subprocess.run(words, timeout=600, check=False, **pipes)
    assert again.returncode == 0, again.stdout
    assert [made.kind for made in made_by(engine, out)] == ["export", "preference", "ppo"]
    assert log.read_text().startswith(before) and set(steps()) - {0} == set(range(1, 31))


@pytest.mark.parametrize("heed", ["", "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "])
def test_a_training_that_dies_of_the_signal_gives_a_shells_exit_code(tmp_path, heed):
    """It may not listen yet, or be at its end: the next step is not begun, and nothing of it is left behind."""
    code = (
        "import sys, pathlib; from serving.steps import Step, alone, run_here\n"
        "with alone(pathlib.Path(sys.argv[1])) as lock: run_here(Step('sft', ('--help',), 'lin_1'), lock)"
    )
    (tmp_path / "cli.py").write_text(f"{heed}import time; print('up', flush=True); time.sleep(600)")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "up\n"
    parent.terminate()
    assert parent.wait(timeout=120) == 128 + signal.SIGTERM
    with alone(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_the_trainings_as_ray_jobs(job_client, tmp_path, sqlite_url):  # noqa: F811
    engine, out = open_store(sqlite_url), tmp_path / "run"
    names = [held(engine, stage_inputs.OPINIONS, (True, True, True)) for _ in range(8)]
    stage_inputs.save_policy(tmp_path / "policy")
    judge = stage_inputs.save_preference_model(tmp_path / "judge")
    configs = write_configs(tmp_path)
    preference = Path(configs["preference_config"])
    preference.write_text(preference.read_text() + f"\nmodel_name_or_path: {judge}\n")
    config = CycleConfig(
        database=sqlite_url, output_dir=str(out), policy=str(tmp_path / "policy"), min_ratings=4,
        eval_share=fitting_share(names), ray_address=job_client.get_address(), ray_working_dir=str(ROOT),
        ray_python=sys.executable, **configs,
    )  # fmt: skip
    cycle.main(config)
    made = made_by(engine, out)
    assert [one.kind for one in made] == ["export", "preference", "ppo"]
    jobs = {job.submission_id: str(job.status) for job in job_client.list_jobs() if job.submission_id}
    assert {f"{one.kind}-{one.id}": "SUCCEEDED" for one in made[1:]}.items() <= jobs.items()
    # A row that was not written before a crash: the job is found, and not run again.
    with engine.begin() as connection:
        connection.execute(delete(lineage).where(lineage.c.id == made[2].id))
    cycle.main(config)
    assert made_by(engine, out) == made and len(job_client.list_jobs()) >= 2
    assert {job.submission_id for job in job_client.list_jobs()} >= set(jobs)
