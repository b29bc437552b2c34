"""Several preference models by name: requests, deliberations and arms of experiments choose the one that scores."""

from __future__ import annotations

import numpy as np
import pytest
from fastapi.testclient import TestClient
from stub import REQUEST, StubServices
from test_sessions import PATH, Room

from deliberation.types import InputError
from serving.api import make_app
from serving.config import ServeConfig
from serving.exchange import Draft, Judgement

BRIEF, LONG = "Tea.", "Tea for all of us."


class TwoTastes(StubServices):
    """Statements are brief and long in turn; the judge ``brief`` likes the one, ``default`` the other."""

    preference_models = ("default", "brief")

    def sampler(self, policy):
        return self

    async def sample(self, question, opinions, orders):
        return [
            Draft(tuple((BRIEF, LONG)[k % 2] for k in range(o.count)), (True,) * o.count, o.members, "sha256:policy")
            for o in orders
        ]

    def judge(self, preference_model):
        return _Taste(preference_model)

    async def versions(self):
        return {f"preference_model:{name}": f"sha256:{name}" for name in self.preference_models} | {
            "policy:default": "sha256:policy"
        }


class _Taste:
    def __init__(self, name):
        self.name = name

    async def judge(self, question, opinions, statements):
        likes = np.array([[(s == BRIEF) == (self.name == "brief") for s in statements] for _ in opinions])
        probabilities = np.zeros((*likes.shape, 7))
        probabilities[..., 1], probabilities[..., 5] = ~likes, likes
        return Judgement(likes.astype(np.float32), 2.0 + 4 * likes, probabilities, f"sha256:{self.name}")


@pytest.fixture
def client(sqlite_url):
    config = ServeConfig(database=sqlite_url, background_timeout_s=20, num_candidates=6, reshuffle=False)
    with TestClient(make_app(TwoTastes(), config), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(("name", "statement"), [(None, LONG), ("default", LONG), ("brief", BRIEF)])
def test_a_request_names_the_one_that_scores(client, name, statement):
    named = {} if name is None else {"preference_model": name}
    answer = client.post("/v1/consensus", json=REQUEST | named).json()
    assert answer["statement"] == statement
    assert answer["versions"]["preference_model_weights"] == f"sha256:{name or 'default'}"
    body = {"question": REQUEST["question"], "opinions": REQUEST["opinions"], "statements": [BRIEF, LONG]}
    scored = client.post("/v1/score", json=body | named).json()
    assert scored["utilities"][0] == ([6, 2] if name == "brief" else [2, 6])


def test_models_lists_them_with_their_prints(client):
    found = client.get("/v1/models").json()
    assert found["preference_models"] == {"default": "sha256:default", "brief": "sha256:brief"}
    assert found["default_preference_model"] == "default"


def test_a_name_that_is_not_served_is_refused(client):
    statements = {"question": "Tea?", "opinions": ["Yes."], "statements": ["Tea."]}
    arms = [{"name": "a"}, {"name": "b", "preference_model": "none"}]
    for path, body, field in (
        ("/v1/consensus", REQUEST | {"preference_model": "none"}, "preference_model"),
        ("/v1/score", statements | {"preference_model": "none"}, "preference_model"),
        (PATH, {"question": "Tea?", "preference_model": "none"}, "preference_model"),
        ("/v1/experiments", {"name": "tea", "arms": arms}, "arms[1].preference_model"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 422, path
        assert answer.json()["errors"][0]["field"] == field and "default, brief" in answer.text


def test_a_deliberation_names_one(client):
    room = Room(client, preference_model="brief", shown=1)
    room.generate()
    assert [c["statement"] for c in room.me(0)["candidates"]] == [BRIEF]


def test_every_arm_of_an_experiment_has_its_own(client):
    arms = [{"name": "long"}, {"name": "brief", "preference_model": "brief"}]
    made = client.post("/v1/experiments", json={"name": "tastes", "arms": arms}).json()
    assert [arm["preference_model"] for arm in made["arms"]] == ["default", "brief"]
    room = Room(client, experiment=made["id"])
    room.generate()
    assert {c["statement"] for c in room.me(0)["candidates"]} == {LONG, BRIEF}
    report = client.get(f"/v1/experiments/{made['id']}/report").json()
    assert [(arm["name"], arm["preference_model"]) for arm in report["arms"]] == [
        ("long", "default"),
        ("brief", "brief"),
    ]


@pytest.mark.parametrize("entries", [["brief"], ["brief="], ["a b=x"], ["default=x"], ["a=x", "a=y"]])
def test_entries_that_are_none_are_refused(entries):
    with pytest.raises(InputError) as error:
        ServeConfig(preference_models=entries)
    assert error.value.field == "preference_models"
