"""The lesson of likeness: whose words it is made of, and that no statement is popular in it."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.human_people import Settings
from benchmarks.human_similar import NO, YES, Place, likeness, places, similar_rows

WORDS = ["tax", "war", "sea", "bus", "law", "art"]


def encode(texts):
    """Unit vectors of the words in a text, and some noise that is the text's own."""
    rows = torch.tensor([[float(word in text) for word in WORDS] for text in texts])
    noise = [torch.randn(len(WORDS), generator=torch.Generator().manual_seed(len(text))) for text in texts]
    return torch.nn.functional.normalize(rows + 0.01 * torch.stack(noise), dim=1)


@pytest.fixture
def place(monkeypatch):
    """Everybody speaks of one matter; a statement on each, with a prefix that makes its text another one."""
    opinions = [f"the {word}\nmy {word} {'!' * k}" for word in WORDS for k in range(4)]
    made = Place("place", "?", opinions, [f"the {word}" for word in WORDS] + [f"any {word}" for word in WORDS])
    monkeypatch.setattr("benchmarks.human_similar.places", lambda folder, rng: [made])
    monkeypatch.setattr("benchmarks.human_similar.NEAREST", 2)  # as many as there are on one matter
    return made


def test_likeness_has_no_popular_statement_and_no_agreeable_opinion(place):
    alike = likeness(place.opinions, place.statements, encode)
    assert alike.shape == (len(place.opinions), len(place.statements))
    assert alike.mean(dim=0).abs().max() < 1e-5 and alike.mean(dim=1).abs().max() < 1e-5
    assert float(alike.std()) == pytest.approx(1)


def test_members_say_yes_to_what_is_like_their_own_words_alone(place):
    rows = similar_rows(None, Settings(group=8), encode)
    assert {r["vote"] for r in rows} == {1, -1}
    for r in rows:
        assert (r["vote"] > 0) is (r["statement"].split()[-1] in r["opinion"]), r
    judged = {(r["deliberation_id"], r["statement"]) for r in rows}
    yes = {(r["deliberation_id"], r["statement"]) for r in rows if r["vote"] > 0}
    assert yes == judged  # whatever is judged was picked for a member of the group


def test_what_is_neither_like_nor_unlike_is_not_judged(place, monkeypatch):
    between = torch.full((len(place.opinions), len(place.statements)), (YES + NO) / 2)
    monkeypatch.setattr("benchmarks.human_similar.likeness", lambda *_: between)
    assert similar_rows(None, Settings(), encode) == []


def test_places_hold_training_people_and_what_they_were_asked_about(folder):
    found = {place.name: place for place in places(folder, random.Random(0))}
    assert set(found) == {"polis-0", "polis-1", "remesh-0", "remesh-1"}
    dialogue = found["remesh-0"]
    people = {int(opinion.removesuffix(" thinks").rpartition("p")[2]) for opinion in dialogue.opinions}
    assert people and all(person % 3 for person in people)
    assert "polis-0 says 0" not in found["polis-0"].statements  # rejected by the moderators
