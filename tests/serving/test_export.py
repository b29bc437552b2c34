"""Exports of ratings: whose go out, in which order, and that the preference model's fit takes them as they are."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
from rows import ADDED, RELEASED, fill
from sqlalchemy import delete, insert, update

import cli
from deliberation.datasets import read_responses
from deliberation.types import Rating
from reward.preference_config import PreferenceConfig
from reward.train import fit
from serving.export import PAGE, export_rows
from serving.store import open_store
from serving.tables import candidates, deliberations, experiments, exposures, members, opinions, ratings

import tiny

COLUMNS = [
    "number", "deliberation_id", "member", "question", "opinion", "statement", "arm", "propensity", "policy_weights",
    "agreement", "quality", "created",
]  # fmt: skip


@pytest.fixture
def store(store_url):
    engine = open_store(store_url)
    fill(engine, RELEASED | ADDED)
    return engine


def change(engine, *statements):
    with engine.begin() as connection:
        return [connection.execute(statement) for statement in statements]


def numbers(engine, **options):
    return [row["number"] for row in export_rows(engine, **options)]


def a_rating(member, candidate, version=1, **values):
    row = {"member": member, "candidate": candidate, "version": version, "current": True, "agreement": 4, "quality": 4}
    return insert(ratings).values(row | {"created": 9.0} | values)


def test_current_ratings_of_those_who_consented(store):
    first, second = export_rows(store)
    assert first == {
        "number": 2, "deliberation_id": "del_1", "member": 0, "question": "Should tea be free?",
        "opinion": "Tea for all, at once.", "statement": "Statement 0.", "agreement": 7, "quality": 6, "arm": "old",
        "propensity": 0.25, "policy_weights": "sha256:0", "created": 5.0,
    }  # fmt: skip
    assert list(first) == list(second) == COLUMNS
    assert (second["number"], second["member"], second["arm"], second["propensity"]) == (7, 2, None, 1.0)


def test_a_running_experiment_is_left_out(store):
    change(store, update(experiments).values(stopped=None))
    assert numbers(store) == []
    change(store, update(deliberations).values(experiment=None))
    assert numbers(store) == [2, 7]


def test_who_takes_consent_back_is_left_out(store):
    change(store, update(members).where(members.c.id == "mbr_2").values(consent=False))
    assert numbers(store) == [2]


def test_a_member_without_an_opinion_is_left_out(store):
    change(store, delete(opinions).where(opinions.c.member == "mbr_2"))
    assert numbers(store) == [2]


def test_a_statement_of_both_arms_is_one_row_of_neither(store):
    row = ADDED["exposures"][0] | {"arm": "new", "propensity": 0.75}
    change(store, insert(exposures).values(row))
    told = [(row["number"], row["arm"], row["propensity"]) for row in export_rows(store)]
    assert told == [(2, None, 1.0), (7, None, 1.0)]


@pytest.mark.parametrize("page", [1, 2, 3, PAGE])
def test_pages_and_cursors_leave_nothing_out(store, page):
    for k in range(2, 9):
        row = ADDED["candidates"][0] | {"id": f"can_{k}", "number": k}
        change(store, insert(candidates).values(row), a_rating("mbr_2", f"can_{k}"))
    whole = numbers(store)
    assert numbers(store, page=page) == whole and len(whole) == 9 and whole == sorted(whole)
    for after in range(whole[-1] + 2):
        assert numbers(store, after=after, page=page) == [number for number in whole if number > after]


def test_a_changed_mind_comes_out_again_behind_the_cursor(store):
    cursor = numbers(store)[-1]
    mine = ratings.c.member == "mbr_2"
    change(store, update(ratings).where(mine).values(current=False), a_rating("mbr_2", "can_1", 2, agreement=1))
    assert [(row["number"], row["agreement"]) for row in export_rows(store, after=cursor)] == [(8, 1)]


def test_a_number_is_not_given_again_when_its_rating_is_erased(store):
    cursor = numbers(store)[-1]
    change(store, delete(ratings).where(ratings.c.number == cursor), a_rating("mbr_2", "can_1"))
    assert numbers(store, after=cursor) == [cursor + 1]


def test_what_is_committed_out_of_turn_is_waited_for(postgres_url):
    """PostgreSQL gives out numbers at once, and rows are there when their writers say so: 8 after 9."""
    engine = open_store(postgres_url)
    fill(engine, RELEASED | ADDED)
    slow = engine.connect()
    slow.execute(a_rating("mbr_2", "can_0"))
    change(engine, a_rating("mbr_0", "can_1"))
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(numbers(engine)))
    reader.start()
    time.sleep(0.3)
    assert reader.is_alive() and not found
    slow.commit()
    reader.join(timeout=60)
    assert found == [2, 7, 8, 9]
    slow.execute(a_rating("mbr_0", "can_0", 3))  # and a writer who gives up holds nobody up for good
    slow.rollback()
    assert numbers(engine, after=7) == [8, 9]
    slow.close()


def test_no_writer_waits_for_a_slow_reader(store):
    rows = export_rows(store, page=1)
    next(rows)
    change(store, a_rating("mbr_2", "can_0"))
    assert [row["number"] for row in rows] == [7]  # of those that were there when it began


def test_the_preference_fit_takes_the_file_as_it_is(store, tmp_path, capsys, tiny_tokenizer):
    file = tmp_path / "out" / "ratings.jsonl"
    url = store.url.render_as_string(hide_password=False)
    for k in range(2, 5):
        row = ADDED["candidates"][0] | {"id": f"can_{k}", "number": k, "statement": f"Tea\u2028for {k} 🌱."}
        change(store, insert(candidates).values(row))
        change(store, *(a_rating(f"mbr_{m}", f"can_{k}", agreement=1 + m + k) for m in (0, 2)))
    assert cli.main(["export", "--database", url, "--output", str(file)]) == 0
    assert capsys.readouterr().out.strip().endswith("8 ratings; next time, for those after them: --after 13")
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    assert rows == list(export_rows(store)) and file.read_bytes().count("🌱".encode()) == 6
    read = read_responses(file)
    assert [type(response) for response in read] == [Rating] * 8
    assert {(r.deliberation_id, r.member) for r in read} == {("del_1", 0), ("del_1", 2)}
    config = PreferenceConfig(output_dir=str(tmp_path / "model"), max_steps=1, save_strategy="no", use_cpu=True)
    held_out = [replace(response, deliberation_id="another") for response in read]
    model = fit(config, read, held_out, tiny.make_judge(tiny_tokenizer), tiny_tokenizer, progress=False)
    assert model is not None


def test_the_command_goes_on_from_a_cursor_and_replaces_the_file(store, tmp_path, capsys):
    file = tmp_path / "ratings.jsonl"
    url = store.url.render_as_string(hide_password=False)
    for after, count, cursor in ((0, 2, 7), (2, 1, 7), (7, 0, 7)):
        assert cli.main(["export", "--database", url, "--output", str(file), "--after", str(after)]) == 0
        told = capsys.readouterr().out.strip()
        assert told == f"{file}: {count} ratings; next time, for those after them: --after {cursor}"
        assert len(file.read_text().splitlines()) == count


def test_an_export_that_fails_leaves_the_file_before(store, tmp_path):
    file = tmp_path / "out" / "ratings.jsonl"
    file.parent.mkdir()
    file.write_text("before\n")
    change(store, update(candidates).where(candidates.c.id == "can_1").values(versions="not JSON"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["export", "--database", store.url.render_as_string(hide_password=False), "--output", str(file)])
    assert file.read_text() == "before\n" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "field"),
    [([], "output"), (["--output", "x.csv"], "output"), (["--output", "x.jsonl", "--after", "-1"], "after"),
     (["--output", "x.jsonl", "--database", "x"], "database"), (["--output", "file/x.jsonl"], "output")],
)  # fmt: skip
def test_bad_keys_are_refused(words, field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(["export", *words]) == 2
    assert capsys.readouterr().err.startswith(f"consensus export: error: {field} = ")
