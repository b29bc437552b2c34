"""Types, prompts, questions, readers and splits."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.datasets import (
    read_deliberations,
    read_ratings,
    read_responses,
    read_table,
    split_by_topic,
    write_jsonl,
)
from deliberation.prompts import (
    CLOSING,
    clean_statement,
    few_shot_statement_prompt,
    one_line,
    preference_prefix,
    preference_suffix,
    statement_prompt,
)
from deliberation.questions import SPLITS, invented_question, load_questions, read_questions
from deliberation.types import (
    MAX_MEMBERS,
    MAX_OPINION_CHARS,
    Choice,
    Deliberation,
    InputError,
    Rank,
    Rating,
    Vote,
    is_hub_name,
)


def test_the_statement_prompt_is_the_papers():
    prompt = statement_prompt("Should buses be free?", ["Yes.", "No."])
    lines = prompt.split("\n")
    assert lines[0].startswith("A citizen's jury was tasked with coming up with consensus opinions")
    assert lines[1:] == ["Question: Should buses be free?", "Opinion: Yes.", "Opinion: No.", CLOSING]


def test_the_few_shot_prompt_shows_its_examples_and_ends_open():
    prompt = few_shot_statement_prompt([("Q1?", ["a", "b"], "S1.")], "Q2?", ["c"])
    assert prompt.endswith(
        "Question: Q1?\nOpinion: a\nOpinion: b\nConsensus: S1.\nQuestion: Q2?\nOpinion: c\nConsensus:"
    )


def test_the_preference_prompt_puts_the_candidate_last():
    assert preference_prefix("Q?", "o") + preference_suffix("s") == "Question: Q?\nOpinion: o\nConsensus: s"


@given(st.text(min_size=1))
def test_no_opinion_can_fake_a_line_of_the_prompt(opinion):
    prompt = statement_prompt("Q?", [opinion])
    assert len(prompt.split("\n")) == 4 and "\r" not in prompt


@given(st.text())
def test_one_line_is_idempotent_and_has_no_line_breaks(text):
    folded = one_line(text)
    assert one_line(folded) == folded and len(folded.splitlines()) <= 1


@pytest.mark.parametrize(
    "completion, statement",
    [
        (" We agree.\nQuestion: x", "We agree."),
        ('"We agree."', "We agree."),
        ("", ""),
        ("\n\n", ""),
        (f"{CLOSING} We agree.", "We agree."),
        ("Consensus: We  agree. ", "We agree."),
        ("“We agree.”", "We agree."),
        ("'We don't agree.'", "We don't agree."),
        ("‘We don’t agree.’", "We don’t agree."),
        ("\"We 'lean' so.\"", "We 'lean' so."),
        ('"Peace" is what we mean by "order"', '"Peace" is what we mean by "order"'),
        ("'We agree' is too strong, say 'we lean'", "'We agree' is too strong, say 'we lean'"),
        ("“Peace” is “order”", "“Peace” is “order”"),
    ],
)
def test_completions_are_cleaned(completion, statement):
    assert clean_statement(completion) == statement


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: Deliberation("d", "Q?", ()), "opinions"),
        (lambda: Deliberation("d", " ", ("o",)), "question"),
        (lambda: Deliberation("d", "Q?", ("o", "")), "opinions[1]"),
        (lambda: Deliberation("d", "Q?", ("o" * (MAX_OPINION_CHARS + 1),)), "opinions[0]"),
        (lambda: Deliberation("d", "Q?", ("o",) * (MAX_MEMBERS + 1)), "opinions"),
        (lambda: Deliberation("d", "Q?", (3,)), "opinions[0]"),
        (lambda: Rating("d", 0, "Q?", "o", "s", 8, 1), "agreement"),
        (lambda: Rating("d", 0, "Q?", "o", "s", 1, 0), "quality"),
        (lambda: Rating("d", 0, "Q?", "o", "s", True, 1), "agreement"),
        (lambda: Rating("d", 0, "Q?", "o", "s", [5], 1), "agreement"),
        (lambda: Vote("d", 0, "Q?", "o", "s", 2), "vote"),
        (lambda: Vote("d", 0, "Q?", "o", "s", True), "vote"),
        (lambda: Rank("d", 0, "Q?", "o", "s", -1), "rank"),
        (lambda: Rank("d", 0, "Q?", "o", " ", 0), "statement"),
        (lambda: Choice("d", 0, "Q?", "o", "s", ""), "rejected"),
    ],
)
def test_bad_values_are_named(make, field):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.field == field and caught.value.mend


def test_our_questions_are_many_over_many_topics_split_by_topic():
    splits = {name: load_questions(name) for name in SPLITS}
    everything = [q for questions in splits.values() for q in questions]
    assert len(everything) >= 600 and len({q.topic for q in everything}) >= 40
    assert len({q.text for q in everything}) == len({q.id for q in everything}) == len(everything)
    topics = [{q.topic for q in questions} for questions in splits.values()]
    assert not topics[0] & topics[1] and not topics[0] & topics[2] and not topics[1] & topics[2]
    for q in everything:
        assert q.affirming.endswith(".") and q.negating.endswith(".") and q.affirming != q.negating
        assert len(q.affirming.split()) <= 13


def test_no_training_claim_is_nearly_a_held_out_one():
    def words(question):
        return set(question.affirming.lower().rstrip(".").split()) - set("should not be the a of to in".split())

    held_out = [q for split in SPLITS if split != "train" for q in load_questions(split)]
    for seen in load_questions("train"):
        for other in held_out:
            a, b = words(seen), words(other)
            assert len(a & b) < 0.6 * len(a | b), f"{seen.affirming} / {other.affirming}"


def test_an_unknown_split_is_named():
    with pytest.raises(InputError, match="split"):
        load_questions("dev")


def test_invented_questions_seldom_repeat():
    from random import Random

    rng = Random(0)
    texts = Counter(invented_question(rng).text for _ in range(300))
    assert len(texts) > 290


def test_foreign_question_files_are_read(tmp_path):
    row = {
        "question": "Q?",
        "affirming_statement": "Tea is nice.",
        "negating_statement": "Tea is NOT nice.",
        "topic": 3,
        "split": "val_topic",
    }
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (question,) = read_questions(path, splits=("val_topic",))
    assert question.negating == "Tea is not nice." and question.topic == "3"
    assert read_questions(path, splits=("train",)) == []
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "topic"}))
    with pytest.raises(InputError, match="'topic'"):
        read_questions(path)
    with pytest.raises(InputError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    path.write_text(json.dumps(row) + "\n{torn")
    with pytest.raises(InputError, match="q.jsonl, line 2.*not JSON"):
        read_questions(path)


ROW = {
    "deliberation_id": "d",
    "member": 0,
    "question": "Q?",
    "opinion": "o",
    "statement": "s",
    "agreement": 5,
    "quality": 4,
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ratings_round_trip(tmp_path, suffix):
    path = tmp_path / f"r{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [ROW, ROW])
    else:
        pq.write_table(pa.Table.from_pylist([ROW, ROW]), path)
    assert read_ratings(path) == [Rating(**ROW)] * 2


@pytest.mark.parametrize("column", sorted(ROW))
def test_a_missing_column_is_named(tmp_path, column):
    path = write_jsonl(tmp_path / "r.jsonl", [ROW, {k: v for k, v in ROW.items() if k != column}])
    with pytest.raises(InputError, match=f"row 2.*'{column}'"):
        read_ratings(path)


def test_bad_tables_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.jsonl").write_text("{not json}")
    (tmp_path / "c.jsonl").write_text("[1]")
    (tmp_path / "d.jsonl").write_text("\n")
    (tmp_path / "f.jsonl").write_bytes('{"x": "Z\u00fcrich"}'.encode("latin-1"))
    (tmp_path / "g.parquet").write_bytes(b"PAR1 and no more")
    messages = {
        "a.csv": "neither",
        "b.jsonl": "line 1.*not JSON",
        "c.jsonl": "not a JSON object",
        "d.jsonl": "no rows",
        "e.jsonl": "no such file",
        "f.jsonl": "f.jsonl.*UTF-8",
        "g.parquet": "g.parquet.*Parquet",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / name, ["x"])


def test_unicode_line_separators_inside_strings_round_trip(tmp_path):
    rows = [{"x": "one\u2028two\u2029three\u0085four"}, {"x": "five"}]
    assert read_table(write_jsonl(tmp_path / "u.jsonl", rows), ["x"]) == rows
    question = {"affirming_statement": "Tea is nice.", "negating_statement": "Tea is not nice.", "topic": "t"}
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Is tea\u2028nice?", **question}])
    assert [q.text for q in read_questions(path)] == ["Is tea\u2028nice?"]


@pytest.mark.parametrize("opinions", [5, "one text", {"a": "b"}])
def test_opinions_that_are_no_list_are_named(tmp_path, opinions):
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"question": "Q?", "opinions": ["a"]}, {"question": "Q?", "opinions": opinions}]
    )
    with pytest.raises(InputError, match="row 2.*opinions.*list"):
        read_deliberations(path)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "google-bert/bert-base-uncased", "0x/a_b.c"])
def test_hub_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name)
    (tmp_path / name.split("/")[0]).mkdir()
    assert is_hub_name(name) == ("/" not in name)  # beside a folder of that name it is a path


@pytest.mark.parametrize(
    "name", ["", "runs/sft", "runs/a/sft", "a/b/c", "/a/b", "./a", "../a", "~/a", "a/", "a b/c", "embedded/x",
             "data/rows.jsonl", "rows.parquet", "a/model.safetensors"],
)  # fmt: skip
def test_paths_are_no_hub_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(name)


@pytest.mark.parametrize("name", ["runs/rows", "rows", "data/rows.json"])
def test_a_missing_data_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(InputError, match="no such file"):
        read_table(name, ["x"])


@pytest.mark.parametrize(
    "told, response",
    [
        ({"statement": "s", "agreement": 6, "quality": 2}, Rating("d", 1, "Q?", "o", "s", 6, 2, "t")),
        ({"statement": "s", "vote": -1}, Vote("d", 1, "Q?", "o", "s", -1, "t")),
        ({"statement": "s", "rank": 0}, Rank("d", 1, "Q?", "o", "s", 0, "t")),
        ({"chosen": "a", "rejected": "b"}, Choice("d", 1, "Q?", "o", "a", "b", "t")),
    ],
)
def test_responses_of_every_kind_are_read_by_their_columns(tmp_path, told, response):
    row = {"deliberation_id": "d", "member": 1, "question": "Q?", "opinion": "o", "topic": "t", **told}
    assert read_responses(write_jsonl(tmp_path / "r.jsonl", [row])) == [response]
    torn = {key: value for key, value in row.items() if key != list(told)[-1]}
    with pytest.raises(InputError, match="row 2"):
        read_responses(write_jsonl(tmp_path / "torn.jsonl", [row, torn]))
    with pytest.raises(InputError, match="give the columns of one"):
        read_responses(write_jsonl(tmp_path / "none.jsonl", [torn]))


@pytest.mark.parametrize(
    "change, field", [({"agreement": 9}, "agreement"), ({"opinion": " "}, "opinion"), ({"member": [0]}, "member")]
)
def test_a_bad_response_is_named_with_its_file_and_row(tmp_path, change, field):
    row = dict(deliberation_id="d", member=0, question="Q?", opinion="o", statement="s", agreement=5, quality=4)
    path = write_jsonl(tmp_path / "r.jsonl", [row, row, row | change])
    for read in (read_responses, read_ratings):
        with pytest.raises(InputError) as error:
            read(path)
        assert (error.value.field, error.value.value) == (f"r.jsonl, row 3: {field}", change[field])


def test_a_bad_deliberation_is_named_with_its_file_and_row(tmp_path):
    rows = [{"question": "Q?", "opinions": ["a"]}, {"question": "R?", "opinions": ["b", ""]}]
    with pytest.raises(InputError) as error:
        read_deliberations(write_jsonl(tmp_path / "d.jsonl", rows))
    assert error.value.field == "d.jsonl, row 2: opinions[1]"


def test_a_deliberation_whose_id_is_null_has_its_number(tmp_path):
    rows = [{"question": "Q?", "opinions": ["a"], "id": None}, {"question": "R?", "opinions": ["b"], "id": None}]
    assert [d.id for d in read_deliberations(write_jsonl(tmp_path / "d.jsonl", rows))] == ["0", "1"]


def test_deliberations_are_read(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "Q?", "opinions": ["a", "b"], "topic": "t"}])
    assert read_deliberations(path) == [Deliberation("0", "Q?", ("a", "b"), "t")]


@given(st.integers(3, 30), st.integers(0, 99))
def test_splits_by_topic_cut_no_topic_and_lose_nothing(topics, seed):
    items = [Deliberation(f"{t}-{k}", "Q?", ("o",), f"t{t}") for t in range(topics) for k in range(3)]
    parts = split_by_topic(items, [8, 1, 1], seed)
    assert sorted(d.id for part in parts for d in part) == sorted(d.id for d in items)
    sets = [{d.topic for d in part} for part in parts]
    assert all(sets) and sum(map(len, sets)) == topics
    assert parts == split_by_topic(items, [8, 1, 1], seed)


def test_bad_splits_are_named():
    items = [Deliberation("d", "Q?", ("o",), "t")]
    with pytest.raises(InputError, match="topics"):
        split_by_topic(items, [1, 1], 0)
    with pytest.raises(InputError, match="shares"):
        split_by_topic(items, [1, 0], 0)


def test_a_long_value_is_shown_with_both_its_ends():
    folder = "runs/" + "somewhere/" * 20
    error = str(InputError("data", f"{folder}d.jsonl, row 2", "is no list"))
    assert "'runs/somewhere" in error and "d.jsonl, row 2': is no list" in error and len(error) < 110
