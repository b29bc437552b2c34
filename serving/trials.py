"""Experiments in a database: which there are, who is in which arm, what was shown, what came out.

What is fixed at creation stays fixed: nothing here changes a spec.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, Update, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from deliberation.types import InputError
from serving.checks import check_readable
from serving.experiment_report import ExperimentReport
from serving.experiment_text import render
from serving.experiments import Arm, Spec, assign
from serving.problems import ApiError
from serving.store import may_be_id, new_id, reading
from serving.tables import assignments, deliberations, experiments, exposures, failures
from serving.trial_analysis import analyse
from serving.trial_data import Trial, load

__all__ = [
    "Experiment", "arms_of", "check_open", "create", "enroll", "expose", "first_shown", "get", "list_all",
    "note_failure", "render", "report", "stop",
]  # fmt: skip

MAX_NAME_CHARS = 200


@dataclass(frozen=True)
class Experiment:
    """What anybody may know of an experiment: nothing of its results.

    Attributes:
        id, name, spec: as created.
        created: seconds since 1970.
        stopped: the same; None while it runs.
        enrolled, closed: deliberations in it, and those of them that are closed.
    """

    id: str
    name: str
    spec: Spec
    created: float
    stopped: float | None
    enrolled: int
    closed: int


def create(engine: Engine, owner: str, name: str, spec: Spec) -> str:
    """Begin an experiment, or find the owner's of the same name and spec: creating is safe to repeat.

    Returns:
        Its id.

    Raises:
        InputError: field ``name``, if it is empty, too long, or the name of another experiment of the owner's.
    """
    check_readable("name", name)
    if len(name) > MAX_NAME_CHARS:
        raise InputError("name", name, f"must have at most {MAX_NAME_CHARS} characters")
    row = {
        "id": new_id("exp"), "owner": owner, "name": name, "spec": spec.to_json(), "salt": secrets.token_hex(32),
        "created": time.time(),
    }  # fmt: skip
    try:
        with engine.begin() as connection:
            connection.execute(insert(experiments).values(row))
        return str(row["id"])
    except IntegrityError:  # the owner has one of this name
        same = (experiments.c.owner == owner) & (experiments.c.name == name)
        with reading(engine) as connection:
            found = connection.execute(select(experiments).where(same)).one()
    if found.spec != spec.to_json() or found.stopped is not None:
        raise InputError("name", name, "is another experiment's name; what is fixed stays fixed, so give a new name")
    return str(found.id)


def get(engine: Engine, experiment_id: str, owner: str | None) -> Experiment:
    """One experiment; ``owner`` None: anybody's.

    Raises:
        ApiError: ``not-found``, also where it is another owner's.
    """
    with reading(engine) as connection:
        return _experiments(connection, [_row(connection, experiment_id, owner)])[0]


def list_all(engine: Engine, owner: str) -> list[Experiment]:
    """The owner's experiments, the newest first."""
    mine = select(experiments).where(experiments.c.owner == owner).order_by(experiments.c.created.desc())
    with reading(engine) as connection:
        return _experiments(connection, connection.execute(mine).all())


def check_open(connection: Connection, experiment_id: str, owner: str) -> None:
    """Let a deliberation be made for an experiment.

    Raises:
        ApiError: ``not-found``; ``wrong-state`` once it is stopped.
    """
    _check_running(_row(connection, experiment_id, owner))


def enroll(connection: Connection, experiment_id: str, deliberation_id: str) -> list[Arm]:
    """Give a deliberation its arms, once and for all: two if paired, one if between.

    Raises:
        ApiError: ``wrong-state``, if the experiment is stopped and the deliberation was not in it before.
    """
    found = _arms(connection, deliberation_id)
    if found:
        return found
    row = _row(connection, experiment_id, None, lock=True)
    _check_running(row)
    arm, propensity = assign(Spec.from_json(row.spec), row.salt, experiment_id, deliberation_id)
    values = {
        "experiment": experiment_id, "deliberation": deliberation_id, "arm": arm, "propensity": propensity,
        "created": time.time(),
    }  # fmt: skip
    connection.execute(insert(assignments).values(values))
    return _arms(connection, deliberation_id)


def arms_of(connection: Connection, deliberation_id: str) -> list[Arm]:
    """The arms that an enrolled deliberation was given.

    Raises:
        ApiError: ``not-found``, if it is in no experiment.
    """
    found = _arms(connection, deliberation_id)
    if not found:
        raise ApiError("not-found", "the deliberation has not been given an arm")
    return found


def expose(connection: Connection, deliberation_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep what each arm wrote.

    Args:
        rows: one mapping an arm of the deliberation's: ``arm`` (name), ``candidate`` (id; arms that wrote the same text
            share one) and ``seconds`` that it took.

    Raises:
        ValueError: unless these are the arms that the deliberation was given.
    """
    given = connection.execute(select(assignments).where(assignments.c.deliberation == deliberation_id)).one()
    names = [arm.name for arm in _arms(connection, deliberation_id)]
    if sorted(row["arm"] for row in rows) != sorted(names):
        raise ValueError(f"{[row['arm'] for row in rows]} were written for {deliberation_id}, which has {names}")
    common = {"deliberation": deliberation_id, "experiment": given.experiment, "propensity": given.propensity}
    wanted = ("arm", "candidate", "seconds")
    connection.execute(insert(exposures), [common | {name: row[name] for name in wanted} for row in rows])


def first_shown(connection: Connection, deliberation_id: str) -> None:
    """Note that a member sees the candidates; only the first time counts."""
    unseen = (exposures.c.deliberation == deliberation_id) & exposures.c.shown.is_(None)
    connection.execute(update(exposures).where(unseen).values(shown=time.time()))


def note_failure(connection: Connection, experiment_id: str, deliberation_id: str, arm: str, kind: str) -> None:
    """Count an arm's failure to write a statement; ``kind`` is the problem's type."""
    values = {"experiment": experiment_id, "deliberation": deliberation_id, "arm": arm, "type": kind[:200]}
    connection.execute(insert(failures).values(values | {"created": time.time()}))


def report(engine: Engine, experiment_id: str, owner: str | None) -> ExperimentReport:
    """What has been found so far, or what had been when it was stopped; ``owner`` None: anybody's.

    Raises:
        ApiError: ``not-found``.
    """
    with reading(engine) as connection:
        row = _row(connection, experiment_id, owner)
        if row.verdict is not None:
            return ExperimentReport.from_json(row.verdict)
        trial = _as_of(load(connection, row), row.stopped)
    return analyse(trial, row.stopped)


def stop(engine: Engine, experiment_id: str, owner: str) -> ExperimentReport:
    """End an experiment for good, and keep its report; done again, it changes nothing.

    Where an earlier call ended it and did not come to keeping the report, this one does.

    Raises:
        ApiError: ``not-found``.
    """
    with engine.begin() as connection:
        row = _row(connection, experiment_id, owner, lock=True)
        if row.stopped is None:
            connection.execute(_change(experiment_id).values(stopped=time.time()))
    found = report(engine, experiment_id, owner)  # takes seconds, in which the service may write
    with engine.begin() as connection:
        unkept = _change(experiment_id).where(experiments.c.verdict.is_(None))
        connection.execute(unkept.values(verdict=found.to_json()))
    return report(engine, experiment_id, owner)  # where another call was faster, what that one kept


def _change(experiment_id: str) -> Update:
    return update(experiments).where(experiments.c.id == experiment_id)


def _as_of(trial: Trial, stopped: float | None) -> Trial:
    """The trial with deliberations that were closed after its end pending: they do not count."""
    if stopped is None:
        return trial
    late = [one.closed is not None and one.closed > stopped for one in trial.held]
    held = tuple(replace(one, closed=None) if after else one for one, after in zip(trial.held, late, strict=True))
    return replace(trial, held=held)


def _row(connection: Connection, experiment_id: str, owner: str | None, lock: bool = False) -> Row:
    where = experiments.c.id == experiment_id
    if owner is not None:
        where &= experiments.c.owner == owner
    query = select(experiments).where(where)
    found = query.with_for_update() if lock else query
    row = connection.execute(found).first() if may_be_id(experiment_id) else None
    if row is None:
        raise ApiError("not-found", "no experiment of that id")
    return row


def _check_running(row: Row) -> None:
    if row.stopped is not None:
        raise ApiError("wrong-state", f"the experiment {row.id} is stopped; it takes no more deliberations")


def _arms(connection: Connection, deliberation_id: str) -> list[Arm]:
    """The arms of an enrolled deliberation; none if it is not enrolled."""
    joined = assignments.join(experiments, experiments.c.id == assignments.c.experiment)
    query = select(experiments.c.spec, assignments.c.arm).select_from(joined)
    row = connection.execute(query.where(assignments.c.deliberation == deliberation_id)).first()
    if row is None:
        return []
    spec = Spec.from_json(row.spec)
    return list(spec.arms) if row.arm is None else [spec.arm(row.arm)]


def _experiments(connection: Connection, rows: Sequence[Row]) -> list[Experiment]:
    held = _held([row.id for row in rows])
    every, done = _counts(connection, held), _counts(connection, held.where(deliberations.c.state == "closed"))
    return [
        Experiment(
            row.id, row.name, Spec.from_json(row.spec), row.created, row.stopped, every.get(row.id, 0),
            done.get(row.id, 0),
        )
        for row in rows
    ]  # fmt: skip


def _held(names: Sequence[str]) -> Select:
    joined = assignments.join(deliberations, deliberations.c.id == assignments.c.deliberation)
    count = select(assignments.c.experiment, func.count().label("number")).select_from(joined)
    return count.where(assignments.c.experiment.in_(names)).group_by(assignments.c.experiment)


def _counts(connection: Connection, query: Select) -> dict[str, int]:
    return {row.experiment: row.number for row in connection.execute(query)}
