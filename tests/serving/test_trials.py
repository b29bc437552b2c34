"""Experiments in a database: assignment, exposure, what is reported, what is hidden; on streams of made-up ratings."""

from __future__ import annotations

import csv
import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
from sqlalchemy import select, update
from trial_stream import BETWEEN, OWNER, PAIRED, A, B, C, begin, close, drawn, hold, rate, stream, write

from deliberation.types import InputError
from evaluation.experiment_measures import Rated, numbers
from evaluation.sequences import difference_sequence
from serving import session_report, trials
from serving.experiment_report import ExperimentReport
from serving.experiment_text import render
from serving.experiments import Spec, member_order
from serving.problems import ApiError
from serving.sessions import Sessions
from serving.store import new_id, open_store
from serving.tables import assignments, candidates, deliberations, experiments, exposures, ratings
from serving.trial_analysis import analyse, overall, sequence_of

pytestmark = pytest.mark.usefixtures("same_ids")


@pytest.fixture
def engine(sqlite_url):
    return open_store(sqlite_url)


@pytest.fixture
def paired(engine):
    return trials.create(engine, OWNER, "paired", PAIRED)


@pytest.fixture
def between(engine):
    return trials.create(engine, OWNER, "between", BETWEEN)


def refusal(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.kind


def rows(engine, table):
    with engine.connect() as connection:
        return connection.execute(select(table)).all()


def report(engine, experiment):
    return trials.report(engine, experiment, OWNER)


# --- what there is --------------------------------------------------------------------------------------------------


def test_an_experiment_is_fixed_and_made_once(store_url):
    engine = open_store(store_url)
    made = trials.create(engine, OWNER, "tea", PAIRED)
    assert made.startswith("exp_") and trials.create(engine, OWNER, "tea", PAIRED) == made
    for spec in (replace(PAIRED, alpha=0.01), replace(PAIRED, versions={"policy:default": "other"})):
        with pytest.raises(InputError) as caught:
            trials.create(engine, OWNER, "tea", spec)
        assert caught.value.field == "name"
    assert trials.create(engine, "key_ben", "tea", replace(PAIRED, alpha=0.01)) != made  # names are each owner's own
    found = trials.get(engine, made, OWNER)
    assert (found.spec, found.stopped, found.enrolled, found.closed) == (PAIRED, None, 0, 0)
    assert [one.id for one in trials.list_all(engine, OWNER)] == [made]
    assert len({row.salt for row in rows(engine, experiments)}) == 2
    report = trials.report(engine, made, OWNER)
    assert (report.decision, report.closed, report.finished) == ("undecided", 0, False)
    hold(engine, made, drawn(1.0, np.random.default_rng(0)))
    assert trials.stop(engine, made, OWNER).closed == 1
    with pytest.raises(InputError):  # a stopped one does not go on
        trials.create(engine, OWNER, "tea", PAIRED)


def test_an_experiment_created_by_many_at_once_is_one(store_url):
    engine, gate = open_store(store_url), Barrier(4)

    def create(number):
        made = []
        for turn in range(10):
            gate.wait(timeout=60)
            spec = PAIRED if turn or number else replace(PAIRED, alpha=0.01)
            try:
                made.append(trials.create(engine, OWNER, f"tea {turn}", spec))
            except InputError as error:
                made.append(error.field)
        return made

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(create, range(4)))
    kept = {row.name: row.id for row in rows(engine, experiments)}
    assert len(kept) == len(rows(engine, experiments)) == 10
    assert [made[1:] for made in told] == [[kept[f"tea {turn}"] for turn in range(1, 10)]] * 4
    first = [made[0] for made in told]  # of two specs, one was first; whoever gave the other one is told
    assert sorted(first, key=len) in (["name"] + [kept["tea 0"]] * 3, ["name"] * 3 + [kept["tea 0"]])


@pytest.mark.parametrize("name", ["", " ", "x" * 201])
def test_an_experiment_needs_a_name(engine, name):
    with pytest.raises(InputError) as caught:
        trials.create(engine, OWNER, name, PAIRED)
    assert caught.value.field == "name"


def test_another_owners_experiment_is_not_there(engine, paired):
    for call in (trials.get, trials.report, trials.stop):
        assert refusal(call, engine, paired, "key_ben") == refusal(call, engine, "exp_none", OWNER) == "not-found"
    with engine.begin() as connection:
        assert refusal(trials.check_open, connection, paired, "key_ben") == "not-found"
        trials.check_open(connection, paired, OWNER)
    assert trials.list_all(engine, "key_ben") == []
    assert trials.report(engine, paired, None).experiment == paired  # who may read everything


def test_deliberations_are_enrolled_once(engine, paired, between):
    with engine.begin() as connection:
        for experiment, count in ((paired, 2), (between, 1)):
            deliberation, _ = begin(connection, experiment)
            assert refusal(trials.arms_of, connection, deliberation) == "not-found"
            given = trials.enroll(connection, experiment, deliberation)
            assert len(given) == count
            assert given == trials.enroll(connection, experiment, deliberation)
            assert given == trials.arms_of(connection, deliberation)
    propensity = {row.experiment: (row.arm, row.propensity) for row in rows(engine, assignments)}
    assert propensity[paired] == (None, 1.0) and propensity[between] == (given[0].name, 0.5)


def test_a_stopped_experiment_takes_no_more(engine, paired):
    with engine.begin() as connection:
        known, _ = begin(connection, paired)
        given = trials.enroll(connection, paired, known)
    trials.stop(engine, paired, OWNER)
    with engine.begin() as connection:
        late, _ = begin(connection, paired)
        assert refusal(trials.enroll, connection, paired, late) == "wrong-state"
        assert refusal(trials.check_open, connection, paired, OWNER) == "wrong-state"
        assert trials.enroll(connection, paired, known) == given  # its group goes on; it does not count


def test_exposures_are_kept_and_shown_once(engine, between):
    deliberation, (arm,) = hold(engine, between, drawn(0.0, np.random.default_rng(0)), seconds=2.5)
    (kept,) = rows(engine, exposures)
    assert (kept.arm, kept.experiment, kept.propensity, kept.seconds) == (arm, between, 0.5, 2.5)
    with engine.begin() as connection:
        trials.first_shown(connection, deliberation)
    assert rows(engine, exposures)[0].shown == kept.shown
    with engine.begin() as connection:
        other, _ = begin(connection, between)
        (mine,) = trials.enroll(connection, between, other)
        wrong = next(one for one in BETWEEN.names if one != mine.name)
        with pytest.raises(ValueError, match="were written for"):
            trials.expose(connection, other, [{"arm": wrong, "candidate": kept.candidate, "seconds": 1.0}])


# --- what is reported -----------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_statistics(engine, paired):
    rng, told = np.random.default_rng(1), []
    for _ in range(12):
        marks = drawn(0.5, rng)
        told.append(marks)
        hold(engine, paired, marks)
    (contrast,) = report(engine, paired).contrasts
    expected = numbers([Rated(a, b, a, b) for a, b in told])
    sequence = difference_sequence(expected.mean_difference)
    assert contrast.path.mean == pytest.approx(sequence.mean) and contrast.path.low == pytest.approx(sequence.low)
    assert contrast.primary.e_value == pytest.approx(math.exp(sequence.log_e[-1]))
    means = {measure.name: measure.mean for measure in contrast.secondary}
    assert means == pytest.approx({
        "win_rate": expected.win.mean(), "worst_off": expected.worst_off_difference.mean(),
        "unanimity": expected.unanimity_difference.mean(), "quality": expected.mean_difference.mean(),
    })  # fmt: skip
    assert contrast.fixed.method == "t" and contrast.fixed.mean == pytest.approx(contrast.primary.mean)
    assert np.array_equal(sequence_of(contrast).low, np.array(contrast.path.low))
    assert not contrast.finished and contrast.decision == "undecided"


def test_deliberations_count_in_the_order_of_closing_and_only_closed_ones(engine, paired):
    low, high, late = ([np.full(3, 4), np.full(3, 4 + d)] for d in (-1, 2, 3))
    hold(engine, paired, high, at=20.0)
    hold(engine, paired, late, closing=False)
    hold(engine, paired, low, at=10.0)
    found = report(engine, paired)
    assert found.contrasts[0].path.mean == pytest.approx((1.0, -0.5))
    assert (found.closed, found.pending) == (2, 1)
    pending = next(row for row in rows(engine, deliberations) if row.state == "rating")
    before = found.contrasts[0].path
    Sessions(engine).close(pending.id, OWNER)
    after = report(engine, paired).contrasts[0].path
    assert after.mean[:2] == before.mean and len(after.mean) == 3  # what was known stays as it was


def test_no_difference_is_not_declared(engine, paired):
    stream(engine, paired, 80, 0.0, np.random.default_rng(5))
    found = report(engine, paired)
    (contrast,) = found.contrasts
    assert (found.decision, found.finished, found.hidden) == ("undecided", False, None)
    assert contrast.primary.low < 0 < contrast.primary.high and contrast.primary.deliberations == 80
    assert not found.order.alert and not found.missing.alert and found.warnings == ()


@pytest.mark.parametrize(("shift", "better"), [(1.5, "ppo"), (-1.5, "rerank")])
@pytest.mark.parametrize("metric", ["agreement", "win_rate"])
def test_a_true_difference_is_found(engine, shift, better, metric):
    name = trials.create(engine, OWNER, "true", replace(PAIRED, metric=metric))
    stream(engine, name, 60, shift, np.random.default_rng(6))
    found = report(engine, name)
    (contrast,) = found.contrasts
    assert found.decision == contrast.decision == f"{better} better" and found.finished
    assert 5 <= contrast.decided_after < 60 and contrast.primary.e_value > 20
    assert contrast.primary.name == metric and contrast.primary.null == (0.5 if metric == "win_rate" else 0.0)
    assert {m.name for m in contrast.secondary} == {"agreement", "win_rate", "worst_off", "unanimity", "quality"} - {
        metric
    }


def test_nothing_is_decided_before_the_minimum_or_counted_after_the_maximum(engine):
    early = trials.create(engine, OWNER, "early", replace(PAIRED, minimum=50))
    short = trials.create(engine, OWNER, "short", replace(PAIRED, minimum=1, maximum=2))
    hold(engine, early, *[[np.full(4, 7), np.full(4, 1)]] * 49)
    hold(engine, short, *[[np.full(4, 4), np.full(4, 4)]] * 3)
    (contrast,) = report(engine, early).contrasts
    assert contrast.decision == "undecided" and not contrast.finished and contrast.primary.low > 0
    hold(engine, early, [np.full(4, 7), np.full(4, 1)])
    assert report(engine, early).contrasts[0].decided_after == 50
    (contrast,) = report(engine, short).contrasts
    assert contrast.finished and contrast.decision == "undecided"
    assert (contrast.primary.deliberations, contrast.beyond) == (2, 1)


def test_missing_ratings_drop_the_member_and_then_the_deliberation(engine, paired):
    nan = math.nan
    hold(engine, paired, [[6, 6, 7], [4, 4, nan]])  # two members rated both
    hold(engine, paired, [[6, 7, nan], [4, nan, 1]])  # only one did
    hold(engine, paired, [[nan] * 3, [nan] * 3])  # nobody came
    found = report(engine, paired)
    (contrast,) = found.contrasts
    assert contrast.path.mean == (2.0,) and found.closed == 3
    assert contrast.primary.undefined == 2 and {m.undefined for m in contrast.secondary} == {2}
    assert [arm.missing for arm in found.arms] == pytest.approx([4 / 9, 5 / 9])
    assert (found.missing.positive, found.missing.negative, found.missing.ties) == (0, 1, 2)


def test_only_the_newest_rating_counts(engine, paired):
    _, _ = hold(engine, paired, [[2, 2], [4, 4]])
    with engine.begin() as connection:
        for row in connection.execute(select(ratings).where(ratings.c.agreement == 2)).all():
            connection.execute(update(ratings).where(ratings.c.number == row.number).values(current=False))
            rate_again = dict(row._mapping) | {"version": 2, "agreement": 6, "current": True}
            rate_again.pop("number")
            connection.execute(ratings.insert().values(rate_again))
    assert report(engine, paired).contrasts[0].path.mean == (2.0,)


def test_equal_texts_are_a_difference_of_zero(engine, paired):
    for _ in range(3):
        hold(engine, paired, [[5, 3, 7], [1, 1, 1]], same=True)
    (contrast,) = report(engine, paired).contrasts
    assert contrast.path.mean == (0.0, 0.0, 0.0) and contrast.same_text == 3
    assert next(m for m in contrast.secondary if m.name == "win_rate").mean == 0.5
    assert report(engine, paired).ratio.counts == {"ppo": 0, "rerank": 0}  # nothing is first
    assert len(rows(engine, exposures)) == 6 and len(rows(engine, candidates)) == 3


def test_between_compares_the_kth_of_each_arm(engine, between):
    given = {"ppo": [], "rerank": []}
    for k in range(24):
        level = 1 + k % 6
        _, (arm,) = hold(engine, between, [np.full(3, level + 1), np.full(3, level)])
        given[arm].append(level + (arm == "ppo"))
    pairs = list(zip(given["ppo"], given["rerank"]))
    found = report(engine, between)
    (contrast,) = found.contrasts
    means = np.cumsum([a - b for a, b in pairs]) / np.arange(1, len(pairs) + 1)
    assert contrast.path.mean == pytest.approx(tuple(means))
    assert contrast.waiting == abs(len(given["ppo"]) - len(given["rerank"])) and found.closed == 24
    assert found.ratio.counts == {name: len(several) for name, several in given.items()}
    assert found.order is None and found.missing is None


def test_between_finds_a_true_difference_and_leaves_out_what_nobody_rated(engine, between):
    stream(engine, between, 90, 2.0, np.random.default_rng(7))
    hold(engine, between, [[4, math.nan]] * 2)
    found = report(engine, between)
    assert found.decision == "ppo better" and found.contrasts[0].primary.undefined == 1


def test_three_arms_are_compared_pair_by_pair_at_a_shared_level(engine):
    name = trials.create(engine, OWNER, "three", Spec((A, B, C), "between", minimum=5))
    rng = np.random.default_rng(8)
    marks = [drawn(2.5, rng) for _ in range(120)]
    hold(engine, name, *([other, best, other] for best, other in marks))
    found = report(engine, name)
    assert [(c.a, c.b) for c in found.contrasts] == [("ppo", "rerank"), ("ppo", "third"), ("rerank", "third")]
    assert {round(c.alpha, 9) for c in found.contrasts} == {round(0.05 / 3, 9)}
    assert [c.decision for c in found.contrasts] == ["rerank better", "undecided", "rerank better"]
    assert found.decision == "rerank better" and found.finished
    assert overall(("ppo", "rerank", "third"), found.contrasts[:2]) == "undecided"  # it must beat every other one


# --- what is hidden or warned of ------------------------------------------------------------------------------------


def test_a_biased_assignment_hides_results(engine, between):
    rng = np.random.default_rng(9)
    stream(engine, between, 60, 2.0, rng)
    assert report(engine, between).decision == "ppo better"
    with engine.begin() as connection:  # half of one arm is never seen
        theirs = connection.execute(select(exposures.c.deliberation).where(exposures.c.arm == "rerank")).scalars().all()
        unseen = exposures.c.deliberation.in_(theirs[: len(theirs) - 4])
        connection.execute(update(exposures).where(unseen).values(shown=None))
    found = report(engine, between)
    assert found.ratio.alert and found.ratio.p_value < 0.001 and "sample-ratio" in found.hidden
    assert found.contrasts == () and (found.decision, found.finished) == ("undecided", False)
    assert "Results are hidden" in render(found) and "better" not in render(found)
    assert [arm.exposed for arm in found.arms] == list(found.ratio.counts.values())  # what helps to find out is there


def test_a_biased_order_hides_paired_results(engine, paired):
    for k in range(8):
        with engine.begin() as connection:
            salt, ids = f"salt {k}", {name: new_id("can") for name in PAIRED.names}
            people = []
            while len(people) < 5:  # members who all happen to see the first arm first
                member = new_id("mbr")
                if member_order(salt, member, list(ids.values()))[0] == ids["ppo"]:
                    people.append(member)
            deliberation, _ = begin(connection, paired, member_ids=people, salt=salt)
            trials.enroll(connection, paired, deliberation)
            write(connection, deliberation, PAIRED.names, ids=ids)
            trials.first_shown(connection, deliberation)
            for candidate, marks in zip(ids.values(), drawn(1.0, np.random.default_rng(k))):
                rate(connection, candidate, people, marks)
            close(connection, deliberation)
    found = report(engine, paired)
    assert found.ratio.counts == {"ppo": 40, "rerank": 0} and found.hidden and found.contrasts == ()


def test_a_place_that_always_wins_is_warned_of(engine, paired):
    for _ in range(20):
        with engine.begin() as connection:
            deliberation, people = begin(connection, paired, 5)
            trials.enroll(connection, paired, deliberation)
            ids = write(connection, deliberation, PAIRED.names)
            salt = connection.execute(select(deliberations.c.salt).where(deliberations.c.id == deliberation)).scalar()
            for member in people:
                first, second = member_order(salt, member, sorted(ids.values()))
                rate(connection, first, [member], [6.0])
                rate(connection, second, [member], [3.0])
            close(connection, deliberation)
    found = report(engine, paired)
    assert (found.order.positive, found.order.negative) == (20, 0)
    assert [w for w in found.warnings if "place" in w] and found.decision == "undecided"


def test_a_model_changed_on_the_way_is_warned_of(engine, paired):
    for versions in ("1", "1", "2"):
        hold(engine, paired, [[4, 4], [4, 4]], versions=versions)
    assert any("2 versions of the models wrote for ppo" in warning for warning in report(engine, paired).warnings)


def test_deliberations_that_share_no_mean_decide_nothing(engine, paired):
    hold(engine, paired, *[[[7, 7], [1, 1]]] * 80, *[[[1, 1], [7, 7]]] * 80)
    found = report(engine, paired)
    (contrast,) = found.contrasts
    assert contrast.broken and contrast.decision == found.decision == "undecided"
    assert contrast.path.low[-1] is None and contrast.primary.low is None
    assert "no mean fits" in render(found)
    assert ExperimentReport.from_json(found.to_json()) == found


def test_guardrails_count_seconds_and_failures_by_arm(engine, paired):
    with engine.begin() as connection:
        broken, _ = begin(connection, paired)
        trials.enroll(connection, paired, broken)
        for kind in ("urn:a", "urn:a", "urn:b"):
            trials.note_failure(connection, paired, broken, "rerank", kind)
    for seconds in range(1, 22):
        hold(engine, paired, [[4, 4], [4, 4]], seconds=float(seconds))
    ppo, rerank = report(engine, paired).arms
    assert (ppo.seconds_p50, ppo.seconds_p95) == pytest.approx((11.0, 20.0))
    assert (rerank.seconds_p50, rerank.seconds_p95) == pytest.approx((12.0, 21.0))
    assert (ppo.failures, rerank.failures) == ({}, {"urn:a": 2, "urn:b": 1})
    assert ppo.exposed == 21 and "3 failures" in render(report(engine, paired))


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_stopped_experiment_keeps_its_report(engine, paired):
    stream(engine, paired, 30, 1.5, np.random.default_rng(10))
    before = report(engine, paired)
    verdict = trials.stop(engine, paired, OWNER)
    assert replace(verdict, stopped=None) == before and verdict.stopped is not None
    assert trials.stop(engine, paired, OWNER) == verdict  # repeated, it changes nothing
    with engine.begin() as connection:
        connection.execute(deliberations.delete())
    assert report(engine, paired) == verdict
    found = trials.get(engine, paired, OWNER)
    assert found.stopped == verdict.stopped and found.enrolled == 0


def test_the_service_writes_on_while_an_experiment_is_stopped(engine, paired, monkeypatch):
    """The report takes seconds to compute; from the first moment the experiment takes no more deliberations."""
    hold(engine, paired, [[7, 7], [1, 1]])

    def analyse_and_write(*arguments, **named):
        with engine.begin() as connection:
            begin(connection, None)
            assert refusal(trials.check_open, connection, paired, OWNER) == "wrong-state"
        return analyse(*arguments, **named)

    monkeypatch.setattr(trials, "analyse", analyse_and_write)
    assert trials.stop(engine, paired, OWNER).closed == 1


def test_a_stop_that_broke_off_is_made_up_for(engine, paired, monkeypatch):
    hold(engine, paired, [[7, 7], [1, 1]])
    pending, _ = hold(engine, paired, [[6, 6], [2, 2]], closing=False)

    def fail(*arguments, **named):
        raise RuntimeError("killed")

    with monkeypatch.context() as broken:
        broken.setattr(trials, "analyse", fail)
        with pytest.raises(RuntimeError):
            trials.stop(engine, paired, OWNER)
    stopped = trials.get(engine, paired, OWNER).stopped
    with engine.begin() as connection:
        close(connection, pending, at=stopped + 1)  # too late
    found = report(engine, paired)
    assert (found.stopped, found.closed, found.pending) == (stopped, 1, 1)
    assert trials.stop(engine, paired, OWNER) == found
    with engine.begin() as connection:
        connection.execute(deliberations.delete())
    assert report(engine, paired) == found  # kept by now


def test_of_stops_at_once_one_report_is_kept(engine, paired, monkeypatch):
    hold(engine, paired, [[7, 7], [1, 1]])
    kept = []

    def analyse_second(*arguments, **named):
        if not kept:  # another one comes in between
            kept.append(None)
            kept[0] = trials.stop(engine, paired, OWNER)
            return replace(analyse(*arguments, **named), warnings=("of the first one",))
        return analyse(*arguments, **named)

    monkeypatch.setattr(trials, "analyse", analyse_second)
    assert trials.stop(engine, paired, OWNER) == kept[0] == report(engine, paired)


def test_the_order_of_a_report_does_not_tell_the_arms(engine, paired):
    ids = {"ppo": "can_b", "rerank": "can_a"}  # as a spec has them, and as chance named them
    name, _ = hold(engine, paired, [[4, math.nan], [math.nan, 4]], ids=ids, closing=False)
    row = Sessions(engine).get(name)
    lines = list(csv.DictReader(io.StringIO(session_report.table(engine, row))))
    assert list(dict.fromkeys(line["candidate"] for line in lines)) == ["can_a", "can_b"]
    assert [one.id for one in session_report.report(engine, row).candidates] == ["can_a", "can_b"]


def test_an_erased_deliberation_or_member_leaves_no_trace(engine, paired):
    gone, _ = hold(engine, paired, [[7, 7, 7], [1, 1, 1]])
    hold(engine, paired, [[4, 4, 7], [3, 3, 1]])
    Sessions(engine).erase(gone, OWNER)
    found = report(engine, paired)
    assert found.closed == 1 and found.contrasts[0].path.mean == pytest.approx((8 / 3,))
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM members WHERE number = 2")
    assert report(engine, paired).contrasts[0].path.mean == (1.0,)


def test_the_report_is_read_by_people(engine, paired):
    stream(engine, paired, 30, 1.5, np.random.default_rng(11))
    text = render(report(engine, paired))
    for part in ("paired (exp_", "30 deliberations closed, 0 pending",
                 "Decision: ppo better (the stop rule has been met)",
                 "mean agreement difference, rating points: ", "win rate, ties one half", "worst-off", "unanimity",
                 "one look at the end would say", "Assignment, members who saw the arm first", "Order:",
                 "Missing ratings:", "Arm rerank: policy default"):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) < 160


def test_reports_come_out_the_same_from_postgresql(postgres_url):
    engine = open_store(postgres_url)
    name = trials.create(engine, OWNER, "pg", PAIRED)
    stream(engine, name, 15, 2.0, np.random.default_rng(12))
    found = report(engine, name)
    assert found.closed == 15 and found.contrasts[0].primary.mean > 0
    assert trials.stop(engine, name, OWNER) == report(engine, name)
