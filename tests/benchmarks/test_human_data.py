"""Training data of the human benchmark: who is in it, and that no profile holds what its member judges."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.human_data import prepare
from benchmarks.human_dialogues import dialogue_rows
from benchmarks.human_people import Settings, held_out
from benchmarks.human_polis import drawn, polis_votes
from benchmarks.human_stance import stance_rows
from deliberation.datasets import read_responses
from deliberation.types import Choice, InputError, SoftVote, Vote


def test_only_training_people_are_in_it_and_calibration_has_people_of_its_own(folder, tmp_path):
    counts = prepare(folder, tmp_path / "out", Settings(draws=1, repeats=1))
    tables = {name: read_responses(tmp_path / "out" / f"{name}.parquet") for name in counts}
    assert {name: len(rows) for name, rows in tables.items()} == counts
    assert {type(r) for r in tables["votes"]} == {type(r) for r in tables["calibration"]} == {Vote}
    assert {type(r) for r in tables["choices"]} == {Choice}
    assert {type(r) for r in tables["soft_votes"]} == {SoftVote}
    # dialogue opinions name their person, who must be in train, and on one side of the calibration split
    said = {
        name: {r.opinion.removesuffix(" thinks") for r in rows if "remesh" in r.topic} for name, rows in tables.items()
    }
    assert said["votes"] and said["calibration"] and not said["votes"] & said["calibration"]
    for name in ("soft_votes", "votes", "choices", "calibration"):
        assert all(int(who.rpartition("p")[2]) % 3 for who in said[name])
        assert all(held_out(who) is (name == "calibration") for who in said[name])
    assert {r.deliberation_id for r in tables["votes"]}.isdisjoint(r.deliberation_id for r in tables["calibration"])
    assert not any(
        "says 0" in r.statement or "says 0" in r.opinion.split("\n") for r in tables["soft_votes"] if "polis" in r.topic
    )


def test_a_member_judges_nothing_of_the_profile_and_groups_judge_the_same(folder):
    rows = polis_votes(folder, Settings(draws=2))
    judged = {}
    for r in rows:
        assert r["statement"] not in r["opinion"].split("\n")
        judged.setdefault(r["deliberation_id"], {}).setdefault(r["statement"], set()).add(r["member"])
    shared = [len(members) for statements in judged.values() for members in statements.values()]
    assert sum(shared) / len(shared) > 2
    assert rows == polis_votes(folder, Settings(draws=2))
    assert rows != polis_votes(folder, Settings(draws=2, seed=1))


def test_a_profile_leaves_half_of_what_was_agreed_with():
    votes = {f"s{k}": 1 if k < 6 else -1 for k in range(12)} | {"own": 1}
    for seed in range(30):
        profile = drawn(votes, ["own"], random.Random(seed))
        assert profile[0] == "own" and 1 <= len(profile) - 1 <= 3
        assert all(votes[s] > 0 for s in profile[1:]) and len(set(profile)) == len(profile)


def test_who_agrees_or_disagrees_with_both_has_voted_on_both(folder):
    before, chosen = dialogue_rows(folder, Settings(repeats=1))
    asked = pq.read_table(folder / "remesh_preferences.parquet").to_pylist()
    text = {r["statement_id"]: r["text"] for r in pq.read_table(folder / "remesh_statements.parquet").to_pylist()}
    for r in asked:
        r["choice"] = "disagree_both"
    pq.write_table(pa.Table.from_pylist(asked), folder / "remesh_preferences.parquet")
    after, none = dialogue_rows(folder, Settings(repeats=1))
    assert chosen and not none
    known = {(r["opinion"], r["statement"]): r["vote"] for r in before}
    found = {(r["opinion"], r["statement"]): r["vote"] for r in after}
    assert len(found) == len(after) and known.items() <= found.items()  # a vote of their own stands
    opinion = {
        r["profile_id"]: r["opinion_text"] for r in pq.read_table(folder / "remesh_profiles.parquet").to_pylist()
    }
    both = {(opinion[r["profile_id"]], text[r[s]]) for r in asked for s in ("statement_a", "statement_b")}
    new = set(found) - set(known)
    assert new <= both and all(found[pair] == -1 for pair in new)
    trained = {who for who, _ in known}
    assert {pair for pair in both if pair[0] in trained} <= set(found)


def test_nothing_that_people_outside_training_said_reaches_what_is_trained_on(folder):
    """Their votes and choices turned round, and every table is the same but the calibration."""

    def tables():
        return polis_votes(folder, Settings(draws=1)), dialogue_rows(folder, Settings(repeats=1))

    before = tables()
    for name in ("polis_votes", "polis_targets", "remesh_targets", "remesh_votes", "remesh_preferences"):
        rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
        for r in rows:
            if r["split"] != "train" or held_out(r.get("participant_id") or r["profile_id"].rstrip("#")):
                r.update({"vote": -r["vote"], "label": 1 - r["label"]} if "vote" in r else {})
                r.update({"choice": {"a": "b", "b": "a"}.get(r["choice"], "a")} if "choice" in r else {})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    assert tables() == before
    rows = pq.read_table(folder / "polis_votes.parquet").to_pylist()
    for r in rows:
        r["vote"] = -r["vote"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "polis_votes.parquet")
    assert tables()[0] != before[0]


def test_among_stances_no_statement_is_popular(folder):
    rows = stance_rows(folder, random.Random(0))
    assert not any("held out" in r["statement"] for r in rows)
    for statement in {r["statement"] for r in rows}:
        votes = [r["vote"] for r in rows if r["statement"] == statement]
        assert 0.35 < sum(v > 0 for v in votes) / len(votes) < 0.65
        assert all(
            (r["vote"] > 0) == (statement in r["opinion"].split("\n")) for r in rows if r["statement"] == statement
        )


def test_a_folder_of_another_schema_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no remesh_questions.jsonl"):
        prepare(tmp_path, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()
