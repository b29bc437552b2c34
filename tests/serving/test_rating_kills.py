"""Ratings outlive a killed API: the benchmark's own judgement can fail, and a short run of it finds nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, insert, update

from benchmarks.rating_kills import judge, run
from serving.ballots import Ballots
from serving.sessions import Sessions, new_token
from serving.store import check_nodes, open_store
from serving.tables import ratings


@pytest.fixture
def kept(store_url):
    """An engine, a member and a candidate, three ratings of it, and what the member was told of them."""
    engine = open_store(store_url)
    sessions = Sessions(engine)
    settings = {"policy": "default", "n": 1, "welfare": "nash", "seed": 0, "shown": 1}
    invite = new_token("inv_")
    name = sessions.create("anybody", "Tea?", settings, invite)
    member = sessions.join(name, invite, "Anna", True, new_token("mem_"))
    sessions.write_opinion(member, "Yes.", None)
    sessions.freeze(name, "anybody", revise=False)
    row = {"id": "can_1", "statement": "Tea.", "policy": "default", "versions": "{}", "welfare": 4.0}
    sessions.keep(name, sessions.get(name).generation, [row | {"predicted": "{}", "winner": True, "number": 0}], [])
    told = [Ballots(engine).rate(member, "can_1", agreement, 4) for agreement in (2, 5, 7)]
    return engine, member, {member.id: [(r.candidate, r.agreement, r.quality, r.version) for r in told]}


def test_what_was_kept_is_found(kept):
    engine, _, said = kept
    assert judge(engine, said) == {"rows": 3, "lost": 0, "torn": 0, "doubled": 0, "integrity": True}


@pytest.mark.parametrize(
    "change, fault",
    [
        (delete(ratings).where(ratings.c.version == 3), "lost"),
        (update(ratings).where(ratings.c.version == 2).values(quality=1), "torn"),
        (update(ratings).where(ratings.c.version == 3).values(current=False), "doubled"),
        (update(ratings).where(ratings.c.version == 3).values(version=5), "doubled"),
    ],
)
def test_what_goes_wrong_is_found(kept, change, fault):
    engine, _, said = kept
    with engine.begin() as connection:
        connection.execute(change)
    assert judge(engine, said)[fault] >= 1


def test_one_request_kept_twice_is_found(kept):
    engine, member, said = kept
    with engine.begin() as connection:
        connection.execute(update(ratings).values(current=False))
        twice = {"member": member.id, "candidate": "can_1", "version": 4, "current": True, "agreement": 7, "quality": 4}
        connection.execute(insert(ratings).values(twice | {"created": 0.0}))
    assert judge(engine, said)["doubled"] == 1


def test_simultaneous_ratings_of_one_member_are_versions_in_turn(kept):
    engine, member, said = kept
    ballots, values = Ballots(engine), [(k % 7 + 1, k % 5 + 1) for k in range(40)]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda pair: ballots.rate(member, "can_1", *pair), values))
    said[member.id] += [(r.candidate, r.agreement, r.quality, r.version) for r in told]
    found = judge(engine, said)
    assert [found[name] for name in ("lost", "torn", "doubled")] == [0, 0, 0]


@pytest.mark.slow
def test_acknowledged_ratings_outlive_kills(store_url):
    found = run(store_url, kills=12, seed=1)
    assert found["acknowledged"] > 50
    faults = [found[name] for name in ("errors", "lost", "torn", "doubled")]
    assert faults == [0, 0, 0, 0] and found["integrity"]


def test_a_file_is_no_database_of_a_cluster():
    check_nodes("sqlite:///runs/service.db", 1)
    check_nodes("postgresql+psycopg://anna@db/consensus", 3)
    with pytest.raises(ValueError, match="PostgreSQL"):
        check_nodes("sqlite:///runs/service.db", 2)
