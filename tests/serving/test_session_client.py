"""The typed client of deliberations, every call of it, against a real server."""

from __future__ import annotations

import pytest
from stub import StubServices
from test_client import Faults, Running

from serving.api import make_app
from serving.best_of_n import NoStatement
from serving.client import Client, ServiceError
from serving.config import ServeConfig
from serving.session_client import Organiser, Participant


@pytest.fixture
def services():
    return StubServices()


@pytest.fixture
def served(services, tmp_path):
    config = ServeConfig(database=f"sqlite:///{tmp_path}/service.db", num_candidates=6, background_timeout_s=20)
    faults = Faults(make_app(services, config))
    with Running(faults) as running:
        running.faults = faults
        yield running


@pytest.fixture
def url(served):
    return served.url


@pytest.fixture
def organiser(url):
    with Client(url, tries=2) as client:
        yield Organiser(client)


def test_a_deliberation_with_a_second_round(url, organiser):
    made = organiser.create("Should tea be free?", shown=3)
    with (
        Participant.join(url, made.id, made.invite, "Anna", consent=True) as anna,
        Participant.join(url, made.id, made.invite, "Ben") as ben,
    ):
        assert (anna.write("Yes."), anna.write("Yes, for all."), ben.write("No.")) == (1, 2, 1)
        assert organiser.look(made.id).opinions == 2
        assert organiser.generate(made.id).state == "rating"
        first, second, _ = (c.id for c in anna.look().candidates)
        assert anna.rate(first, 6, 5).version == 1 and anna.rate(first, 7, 5).version == 2
        anna.compare(first, second)
        ben.criticise("It forgets coffee.")
        assert organiser.revise(made.id).round == 2
        ben.rate(ben.look().candidates[0].id, 2, 3)
        assert [row["agreement"] for row in organiser.export()] == [7]  # Ben did not consent
        assert ben.consent(True).consent and [row["agreement"] for row in organiser.export()] == [7, 2]
        assert not anna.consent(False).consent and [row["agreement"] for row in organiser.export()] == [2]
        ben.leave()
        with pytest.raises(ServiceError) as gone:
            ben.look()
        assert gone.value.status == 401
        assert organiser.close(made.id).members == 1
        assert {c.round for c in organiser.report(made.id).candidates} == {1, 2}
    organiser.erase(made.id)
    with pytest.raises(ServiceError) as gone:
        organiser.look(made.id)
    assert gone.value.status == 404


def test_all_deliberations_whatever_the_pages(organiser, monkeypatch):
    made = [organiser.create(f"Number {k}?").id for k in range(5)]
    seen = []
    send = organiser._client.send
    monkeypatch.setattr(organiser._client, "send", lambda *args, params: send(*args, params={"limit": 2} | params))
    for one in organiser.all():
        seen.append(one.id)
    assert seen == made[::-1]


def test_a_stale_opinion_is_not_overwritten(url, organiser):
    made = organiser.create("Should tea be free?")
    with Participant.join(url, made.id, made.invite, "Anna") as here, Participant(url, made.id, here.token) as there:
        here.write("Yes.")
        with pytest.raises(ServiceError) as stale:
            there.write("No.")
        assert stale.value.status == 412
        assert there.look().opinion == "Yes." and there.write("No.") == 2


def test_a_generation_that_fails_is_told(services, url, organiser):
    made = organiser.create("Should tea be free?")
    with Participant.join(url, made.id, made.invite, "Anna") as anna:
        anna.write("Yes.")
        services.failures = [NoStatement("the policy wrote nothing")]
        with pytest.raises(ServiceError) as failed:
            organiser.generate(made.id)
        assert failed.value.problem.type.endswith("no-statement")
        assert organiser.generate(made.id).state == "rating"


def test_leaving_and_erasing_succeed_where_the_first_answer_was_lost(served, url, organiser):
    made = organiser.create("Should tea be free?")
    with Participant.join(url, made.id, made.invite, "Anna", pause_s=0.01) as anna:
        served.faults.next = ["lose"]
        anna.leave()
        with pytest.raises(ServiceError) as gone:
            anna.leave()
        assert gone.value.status == 401
    served.faults.next = ["lose"]
    organiser.erase(made.id)
    with pytest.raises(ServiceError) as gone:
        organiser.erase(made.id)
    assert gone.value.status == 404
