"""What came of a deliberation: every candidate with what members predicted and gave, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from statistics import fmean, median
from typing import Any

from sqlalchemy import Engine, Row, func, select

from serving.schemas import Problem
from serving.session_schemas import CandidateReport, DeliberationOut, DeliberationReport
from serving.sessions import written
from serving.store import reading
from serving.tables import candidates, experiments, exposures, members, opinions, ratings

AGREES = 5
"""From this rating on a member agrees; a neutral 4 breaks unanimity (Bakker et al. 2022)."""


def outline(engine: Engine, rows: list[Row]) -> list[DeliberationOut]:
    """Deliberations with how many have joined and written, in the order of the rows."""
    names = [row.id for row in rows]
    joined = select(members.c.deliberation, func.count()).group_by(members.c.deliberation)
    wrote = (
        select(members.c.deliberation, func.count(opinions.c.member.distinct()))
        .join(opinions, opinions.c.member == members.c.id)
        .group_by(members.c.deliberation)
    )
    with reading(engine) as connection:
        count, written_by = (
            {row[0]: row[1] for row in connection.execute(found.where(members.c.deliberation.in_(names)))}
            for found in (joined, wrote)
        )
    return [
        DeliberationOut(
            id=row.id,
            question=row.question,
            state=row.state,
            round=row.round,
            experiment=row.experiment,
            members=count.get(row.id, 0),
            opinions=written_by.get(row.id, 0),
            problem=None if row.problem is None else Problem.model_validate_json(row.problem),
            created=row.created,
        )
        for row in rows
    ]


def report(engine: Engine, row: Row) -> DeliberationReport:
    """The report of one deliberation."""
    with reading(engine) as connection:
        found = list(connection.execute(select(candidates).where(candidates.c.deliberation == row.id)))
        given = _given(connection, row.id)
        who = [member for member, _ in written(connection, row.id)]
        arms = _arms(connection, row)
    entries = [_entry(candidate, given[candidate.id], who, arms[candidate.id]) for candidate in found]
    entries.sort(key=lambda entry: (-entry.round, -(entry.agreement or 0.0), -entry.predicted_welfare, entry.id))
    return DeliberationReport(deliberation=outline(engine, [row])[0], candidates=entries)


def table(engine: Engine, row: Row) -> str:
    """CSV: a line a member and candidate with what was predicted and given; members by number, without aliases."""
    with reading(engine) as connection:
        found = list(connection.execute(select(candidates).where(candidates.c.deliberation == row.id)))
        given = _given(connection, row.id)
        of = members.c.deliberation == row.id
        people = list(connection.execute(select(members.c.id, members.c.number).where(of).order_by(members.c.number)))
        arms = _arms(connection, row)
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerow(["round", "candidate", "arms", "statement", "member", "predicted", "agreement", "quality"])
    for candidate in sorted(found, key=lambda c: (c.round, c.id)):  # numbers would tell the arms: ids are random
        predicted = json.loads(candidate.predicted)
        arm = " ".join(arms[candidate.id])
        for person in people:
            agreement, quality = given[candidate.id].get(person.id, ("", ""))
            cells = [person.number, predicted.get(person.id, ""), agreement, quality]
            lines.writerow([candidate.round, candidate.id, arm, _cell(candidate.statement), *cells])
    return out.getvalue()


def _cell(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _given(connection: Any, deliberation_id: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Candidate id -> member id -> (agreement, quality)."""
    columns = (ratings.c.candidate, ratings.c.member, ratings.c.agreement, ratings.c.quality)
    of = (candidates.c.deliberation == deliberation_id) & ratings.c.current
    found: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in connection.execute(select(*columns).join(candidates, candidates.c.id == ratings.c.candidate).where(of)):
        found[row.candidate][row.member] = (row.agreement, row.quality)
    return found


def _arms(connection: Any, row: Row) -> dict[str, list[str]]:
    """Candidate id -> arms that wrote it; nothing while the experiment runs: whoever rates or looks stays blind."""
    found: dict[str, list[str]] = defaultdict(list)
    ended = experiments.c.stopped.is_not(None) & (exposures.c.deliberation == row.id)
    both = select(exposures).join(experiments, experiments.c.id == exposures.c.experiment).where(ended)
    for exposure in connection.execute(both.order_by(exposures.c.arm)):
        found[exposure.candidate].append(exposure.arm)
    return found


def _entry(row: Row, given: dict[str, tuple[int, int]], who: list[str], arms: list[str]) -> CandidateReport:
    agreement = [a for a, _ in given.values()]
    predicted = json.loads(row.predicted)
    errors = [abs(predicted[member] - a) for member, (a, _) in given.items() if member in predicted]
    return CandidateReport(
        id=row.id,
        round=row.round,
        statement=row.statement,
        winner=row.winner,
        arms=arms,
        predicted_welfare=row.welfare,
        ratings=len(given),
        agreement=fmean(agreement) if agreement else None,
        median_agreement=median(agreement) if agreement else None,
        lowest_agreement=min(agreement, default=None),
        quality=fmean(q for _, q in given.values()) if given else None,
        agree=sum(a > 4 for a in agreement),
        neutral=sum(a == 4 for a in agreement),
        disagree=sum(a < 4 for a in agreement),
        unanimous=all(given[m][0] >= AGREES for m in who) if who and all(m in given for m in who) else None,
        prediction_error=fmean(errors) if errors else None,
    )
