"""What an arm costs to run, whatever people think of it: seconds, failures, missing ratings; from a database's rows."""

from __future__ import annotations

import math

import pytest
from sqlalchemy import update
from trial_stream import BETWEEN, OWNER, PAIRED, begin, close, hold, rate, write

from serving import trials
from serving.experiment_report import ExperimentReport
from serving.experiment_text import render
from serving.sessions import Member, Sessions
from serving.store import open_store
from serving.tables import exposures, ratings

NAN = math.nan


@pytest.fixture
def engine(store_url):
    return open_store(store_url)


@pytest.fixture
def paired(engine):
    return trials.create(engine, OWNER, "paired", PAIRED)


def arms(engine, experiment):
    return {arm.name: arm for arm in trials.report(engine, experiment, OWNER).arms}


def fail(engine, experiment, arm, *kinds):
    """A deliberation in which the arm failed to write, once a kind; returns its id."""
    with engine.begin() as connection:
        name, _ = begin(connection, experiment)
        trials.enroll(connection, experiment, name)
        for kind in kinds:
            trials.note_failure(connection, experiment, name, arm, kind)
    return name


def test_before_anything_is_written_nothing_is_known(engine, paired):
    fail(engine, paired, "ppo")  # enrolled, and still writing
    for arm in arms(engine, paired).values():
        assert (arm.seconds_p50, arm.seconds_p95, arm.failures, arm.missing, arm.exposed) == (None, None, {}, None, 0)
    assert "0 failures" in render(trials.report(engine, paired, OWNER))


def test_each_arm_of_a_between_experiment_has_its_own(engine):
    experiment = trials.create(engine, OWNER, "between", BETWEEN)
    seconds = {"ppo": [1.0, 2.0, 3.0, 4.0, 10.0], "rerank": [0.5] * 5}
    marks = {"ppo": [[4, 4, NAN], [NAN, NAN, 5], [6, 6, 6], [1, 2, 3], [7, 7, 7]], "rerank": [[4, 4, 4]] * 5}
    while any(seconds.values()):
        with engine.begin() as connection:
            name, people = begin(connection, experiment, 3)
            (arm,) = trials.enroll(connection, experiment, name)
            if seconds[arm.name]:
                (candidate,) = write(connection, name, [arm.name], seconds=seconds[arm.name].pop(0)).values()
                trials.first_shown(connection, name)
                rate(connection, candidate, people, marks[arm.name].pop(0))
                close(connection, name)
    fail(engine, experiment, "rerank", "urn:timeout")
    found = arms(engine, experiment)
    assert (found["ppo"].seconds_p50, found["ppo"].seconds_p95) == pytest.approx((3.0, 8.8))  # between 4 and 10
    assert (found["rerank"].seconds_p50, found["rerank"].seconds_p95) == (0.5, 0.5)
    assert found["ppo"].missing == pytest.approx(3 / 15) and found["rerank"].missing == 0.0
    assert (found["ppo"].failures, found["rerank"].failures) == ({}, {"urn:timeout": 1})
    assert [arm.exposed for arm in found.values()] == [5, 5]


def test_failures_are_counted_by_type_and_go_with_their_deliberation(engine, paired):
    fail(engine, paired, "ppo", "urn:timeout", "urn:no-statement", "urn:timeout")
    gone = fail(engine, paired, "ppo", "urn:timeout", "urn:busy")
    fail(engine, paired, "rerank", "urn:busy")
    other = trials.create(engine, OWNER, "other", PAIRED)
    fail(engine, other, "ppo", "urn:timeout")
    assert arms(engine, paired)["ppo"].failures == {"urn:timeout": 3, "urn:no-statement": 1, "urn:busy": 1}
    Sessions(engine).erase(gone, OWNER)
    found = arms(engine, paired)
    assert found["ppo"].failures == {"urn:timeout": 2, "urn:no-statement": 1}
    assert found["rerank"].failures == {"urn:busy": 1}
    assert arms(engine, other)["ppo"].failures == {"urn:timeout": 1}


def test_a_pending_deliberation_has_seconds_and_no_missing_ratings(engine, paired):
    hold(engine, paired, [[4, NAN], [NAN, NAN]], seconds=2.0, closing=False)
    for arm, seconds in zip(arms(engine, paired).values(), (2.0, 3.0)):
        assert (arm.seconds_p50, arm.seconds_p95, arm.missing, arm.exposed) == (seconds, seconds, None, 1)
    hold(engine, paired, [[4, 4, 4, NAN], [4, NAN, NAN, NAN]], seconds=4.0)
    ppo, rerank = arms(engine, paired).values()
    assert (ppo.seconds_p50, ppo.seconds_p95) == pytest.approx((3.0, 3.9))
    assert (rerank.seconds_p50, rerank.seconds_p95) == pytest.approx((4.0, 4.9))
    assert (ppo.missing, rerank.missing) == (0.25, 0.75)


def test_a_changed_mind_is_not_missing_and_a_member_who_left_is_not_counted(engine, paired):
    name, _ = hold(engine, paired, [[4, 4, NAN, NAN], [4, 4, 4, 4]])
    with engine.begin() as connection:
        changed = dict(connection.execute(ratings.select()).first()._mapping)
        connection.execute(update(ratings).where(ratings.c.number == changed.pop("number")).values(current=False))
        connection.execute(ratings.insert().values(changed | {"version": 2}))
        third = connection.exec_driver_sql("SELECT id FROM members WHERE number = 2").scalar()
    assert [arm.missing for arm in arms(engine, paired).values()] == [0.5, 0.0]
    Sessions(engine).erase_member(Member(third, name, 2))
    assert arms(engine, paired)["ppo"].missing == pytest.approx(1 / 3)


def test_what_nobody_saw_is_not_exposed_and_its_seconds_count(engine, paired):
    hold(engine, paired, [[4, 4], [4, 4]], seconds=1.0)
    unseen, _ = hold(engine, paired, [[NAN, NAN], [NAN, NAN]], seconds=3.0)
    with engine.begin() as connection:
        connection.execute(update(exposures).where(exposures.c.deliberation == unseen).values(shown=None))
    ppo = arms(engine, paired)["ppo"]
    assert (ppo.exposed, ppo.seconds_p50, ppo.missing) == (1, 2.0, 0.5)


def test_they_are_kept_at_the_end_and_told_to_people(engine, paired):
    hold(engine, paired, [[4, 4, 4, NAN], [4, 4, 4, 4]], seconds=1.25)
    fail(engine, paired, "ppo", "urn:a", "urn:b")
    verdict = trials.stop(engine, paired, OWNER)
    assert ExperimentReport.from_json(verdict.to_json()) == verdict == trials.report(engine, paired, OWNER)
    text = render(verdict)
    assert "1.25 s median, 1.25 s p95, 2 failures, 25.0 % of ratings missing" in text
    assert "2.25 s median, 2.25 s p95, 0 failures, 0.0 % of ratings missing" in text
