"""Experiments over HTTP and from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from fastapi.testclient import TestClient
from PIL import Image
from stub import StubServices
from test_client import Running
from trial_stream import drawn, hold, stream

import cli
from serving.api import make_app
from serving.config import ServeConfig
from serving.experiment_report import ExperimentReport
from serving.keys import ADMIN, CONSENSUS, create_key
from serving.store import open_store
from serving.tables import exposures

PATH = "/v1/experiments"
ARMS = [{"name": "ppo", "n": 4}, {"name": "rerank", "n": 4, "welfare": "rawlsian"}]
BODY = {"name": "tea", "arms": ARMS, "minimum": 5}

pytestmark = pytest.mark.usefixtures("same_ids")


@pytest.fixture
def config(sqlite_url):
    return ServeConfig(database=sqlite_url, background_timeout_s=20)


@pytest.fixture
def engine(config):
    return open_store(config.database)


@pytest.fixture
def client(config):
    with TestClient(make_app(StubServices(), config), raise_server_exceptions=False) as client:
        yield client


def begun(client, **fields):
    made = client.post(PATH, json=BODY | fields)
    assert made.status_code == 201, made.text
    return made.json()


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_an_experiment_is_made_once_with_the_versions_of_its_models(client):
    made = begun(client)
    assert made["versions"] == {"preference_model:default": "sha256:judge", "policy:default": "sha256:policy"}
    assert (made["mode"], made["metric"], made["alpha"], made["minimum"], made["maximum"]) == (
        "paired", "agreement", 0.05, 5, 400,
    )  # fmt: skip
    assert made["arms"][1] == {
        "name": "rerank", "policy": "default", "preference_model": "default", "n": 4, "welfare": "rawlsian",
        "share": 1.0,
    }  # fmt: skip
    assert begun(client) == made and client.get(f"{PATH}/{made['id']}").json() == made
    assert client.get(PATH).json() == {"experiments": [made]}
    changed = client.post(PATH, json=BODY | {"alpha": 0.01})  # nothing changes it, not even its owner
    assert changed.status_code == 422 and changed.json()["errors"][0]["field"] == "name"
    assert client.get(f"{PATH}/{made['id']}").json() == made


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("arms[1].policy", {"arms": [ARMS[0], {"name": "b", "policy": "none"}]}),
        ("arms[0].n", {"arms": [{"name": "a", "n": 0}, ARMS[1]]}),
        ("arms[0].welfare", {"arms": [{"name": "a", "welfare": "kind"}, ARMS[1]]}),
        ("arms[1].colour", {"arms": [ARMS[0], {"name": "b", "colour": "red"}]}),
        ("arms", {"arms": ARMS[:1]}),
        ("name", {"name": " "}),
        ("alpha", {"alpha": 1.5}),
        ("maximum", {"maximum": 3}),
        ("mode", {"mode": "x"}),
        ("salt", {"salt": "mine"}),
    ],
)
def test_bad_experiments_are_refused_by_field(client, field, change):
    refused = client.post(PATH, json=BODY | change)
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == field, refused.json()
    assert client.get(PATH).json() == {"experiments": []}


def test_the_example_of_the_page_is_taken_as_it_stands(config):
    services = StubServices()
    services.policies = ("default", "ppo")
    client = TestClient(make_app(services, config))
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    made = client.post(PATH, json=yaml.safe_load(example))
    assert made.status_code == 201 and made.json()["minimum"] == 20, made.text
    for field in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for name in re.findall(r"\w+", field.replace("contrasts[].", "")):
            assert name in client.get(f"{PATH}/{made.json()['id']}/report").text, name


def test_a_report_has_what_the_library_finds(client, engine):
    made = begun(client)["id"]
    stream(engine, made, 30, 1.5, np.random.default_rng(1))
    answer = client.get(f"{PATH}/{made}/report")
    found = ExperimentReport.from_json(answer.content)
    assert found.decision == "ppo better" and json.loads(found.to_json()) == answer.json()
    assert client.get(f"{PATH}/{made}").json()["closed"] == 30
    assert "better" not in client.get(f"{PATH}/{made}").text


def test_a_stopped_experiment_stays_as_it_was(client, engine):
    made = begun(client)["id"]
    stream(engine, made, 6, 1.5, np.random.default_rng(2))
    stopped = client.post(f"{PATH}/{made}/stop").json()
    assert stopped["stopped"] is not None and client.post(f"{PATH}/{made}/stop").json() == stopped
    assert client.get(f"{PATH}/{made}/report").json()["closed"] == 6
    deliberation = {"question": "Should tea be free?", "experiment": made}
    refused = client.post("/v1/deliberations", json=deliberation)
    assert refused.status_code == 422 and refused.json()["type"].endswith(":wrong-state")


def test_pictures_are_drawn_of_every_pair(client, engine, tmp_path):
    three = [*ARMS, {"name": "third", "n": 4}]
    made = begun(client, mode="between", arms=three)["id"]
    path = f"{PATH}/{made}/plot"
    assert client.get(f"{path}.png").json()["type"].endswith(":wrong-state")  # nothing yet
    rng = np.random.default_rng(3)
    hold(engine, made, *([*drawn(1.0, rng), drawn(0.0, rng)[0]] for _ in range(80)))  # eight of ppo at least
    png = client.get(f"{path}.png", params={"pair": 1})
    assert png.status_code == 200 and png.headers["content-type"] == "image/png"
    (tmp_path / "plot.png").write_bytes(png.content)
    assert Image.open(tmp_path / "plot.png").size[0] > 600
    svg = client.get(f"{path}.svg")
    assert svg.headers["content-type"] == "image/svg+xml" and b"<svg" in svg.content
    assert client.get(f"{path}.svg").content == svg.content != client.get(f"{path}.svg?pair=2").content
    assert client.get(f"{path}.svg?pair=3").status_code == 404
    assert client.get(f"{path}.gif").status_code == client.get(f"{path}.svg?pair=-1").status_code == 422
    with engine.begin() as connection:  # one arm is never seen: a biased assignment
        connection.execute(exposures.update().where(exposures.c.arm != "ppo").values(shown=None))
    hidden = client.get(f"{path}.png")
    assert hidden.status_code == 422 and "hidden" in hidden.json()["detail"]
    assert client.get(f"{PATH}/{made}/report").json()["contrasts"] == []


def test_keys_open_what_their_scopes_say(config, engine):
    config.require_keys = True
    anna, ben = (create_key(engine, name, (CONSENSUS,))[1] for name in ("anna", "ben"))
    reader = create_key(engine, "reader", (ADMIN,))[1]
    with TestClient(make_app(StubServices(), config)) as client:
        made = client.post(PATH, json=BODY, headers=bearer(anna)).json()["id"]
        assert client.get(PATH, headers=bearer(ben)).json() == {"experiments": []}
        for method, path in (("GET", made), ("POST", f"{made}/stop")):
            url = f"{PATH}/{path}"
            status = [client.request(method, url, headers=bearer(key)).status_code for key in (ben, reader, anna)]
            assert status == [404, 403, 200], path
        for path in ("report", "plot.png"):
            status = [client.get(f"{PATH}/{made}/{path}", headers=bearer(key)).status_code for key in (ben, anna)]
            assert status == [403, 403], path  # who runs an experiment does not peek by accident
        assert client.get(f"{PATH}/{made}/report", headers=bearer(reader)).status_code == 200
        assert client.get(f"{PATH}/exp_none/report", headers=bearer(reader)).status_code == 404
        assert client.post(PATH, json=BODY).status_code == 401


def led_to_rating(client, experiment):
    """A deliberation of two people that is part of the experiment: its path and their tokens."""
    room = client.post("/v1/deliberations", json={"question": "Should tea be free?", "experiment": experiment}).json()
    path, tokens = f"/v1/deliberations/{room['id']}", []
    for k, text in enumerate(("Yes, for all of us here.", "No.")):
        joined = client.post(f"{path}/members", json={"invite": room["invite"], "alias": f"m{k}"}).json()
        tokens.append(joined["token"])
        client.put(f"{path}/opinion", json={"text": text}, headers=bearer(tokens[-1]))
    assert client.post(f"{path}/generate").status_code == 202
    while client.get(path).json()["state"] == "generating":
        pass
    return path, tokens


def test_nobody_criticises_in_an_experiment(client):
    """It has one round, and a winner an arm."""
    _, tokens = led_to_rating(client, begun(client, arms=[ARMS[0], {"name": "more", "n": 8}])["id"])
    refused = client.post("/v1/critiques", json={"text": "Too long."}, headers=bearer(tokens[0]))
    assert refused.status_code == 422 and refused.json()["type"].endswith(":wrong-state"), refused.text


def test_names_of_arms_are_drawn_as_they_are(client, engine):
    """Matplotlib would read them as formulas."""
    made = begun(client, arms=[{"name": "$\\frac$"}, {"name": "a $b$ c"}])["id"]
    hold(engine, made, *[[[7, 7], [1, 1]]] * 30)  # enough to decide: the name stands at the decision too
    drawn_up = client.get(f"{PATH}/{made}/plot.png")
    assert drawn_up.status_code == 200 and drawn_up.headers["content-type"] == "image/png", drawn_up.text


def test_a_deliberation_of_people_is_part_of_an_experiment(client, engine):
    """From the first opinion to the report, through the service alone."""
    made = begun(client)["id"]
    path, tokens = led_to_rating(client, made)
    shown = [client.get(f"{path}/me", headers=bearer(token)).json()["candidates"] for token in tokens]
    for token, seen in zip(tokens, shown):
        for one in seen:
            rating = {"candidate": one["id"], "agreement": 6, "quality": 5}
            answer = client.post("/v1/ratings", json=rating, headers=bearer(token))
            assert answer.status_code in (200, 201), answer.text
    assert client.post(f"{path}/close").status_code == 200
    found = ExperimentReport.from_json(client.get(f"{PATH}/{made}/report").content)
    assert (found.closed, found.contrasts[0].path.mean) == (1, (0.0,))
    assert [arm.exposed for arm in found.arms] == [1, 1] and found.arms[0].seconds_p50 > 0
    assert found.contrasts[0].same_text == (len(shown[0]) == 1) and found.warnings == ()


# --- consensus experiment -------------------------------------------------------------------------------------------


@pytest.fixture
def served(config):
    with Running(make_app(StubServices(), config)) as running:
        yield running


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(BODY))
    return str(path)


def test_the_command_makes_shows_reports_and_stops(served, engine, spec, tmp_path, capsys):
    def run(*words):
        assert cli.main(["experiment", *words, "--url", served.url]) == 0
        return capsys.readouterr().out

    assert "no experiments yet" in run("status")
    made = run("create", "--spec", spec).splitlines()[0]
    assert made.startswith("exp_") and made in run("status") and "paired: ppo / rerank" in run("status", "--id", made)
    stream(engine, made, 30, 1.5, np.random.default_rng(4))
    plot = tmp_path / "sequence.png"
    assert "Decision: ppo better" in run("report", "--id", made, "--plot", str(plot))
    assert Image.open(plot).size[0] > 600
    assert ExperimentReport.from_json(run("report", "--id", made, "--json", "true")).closed == 30
    assert json.loads(run("status", "--id", made, "--json", "true"))["closed"] == 30
    assert "is stopped" in run("stop", "--id", made)
    assert "stopped" in run("status") and ", stopped" in run("report", "--id", made)


def test_the_command_draws_every_pair(served, engine, tmp_path, capsys):
    path = tmp_path / "three.json"
    path.write_text(json.dumps(BODY | {"mode": "between", "arms": [*ARMS, {"name": "third"}]}))
    assert cli.main(["experiment", "create", "--spec", str(path), "--json", "true", "--url", served.url]) == 0
    made = json.loads(capsys.readouterr().out)["id"]
    hold(engine, made, *[[[4, 4], [4, 4], [4, 4]]] * 20)
    words = ["experiment", "report", "--id", made, "--plot", str(tmp_path / "plot.svg"), "--url", served.url]
    assert cli.main(words) == 0
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["plot-1.svg", "plot-2.svg", "plot-3.svg"]


def test_the_command_says_what_is_wrong(served, spec, tmp_path, capsys):
    def refused(*words):
        assert cli.main(["experiment", *words, "--url", served.url]) == 2
        return capsys.readouterr().err

    worse, broken, empty = (tmp_path / name for name in ("worse.yaml", "broken.yaml", "list.yaml"))
    worse.write_text(json.dumps(BODY | {"alpha": 2.0}))
    broken.write_text("a: [")
    empty.write_text("[1]")
    assert "error: alpha = 2.0" in refused("create", "--spec", str(worse))
    for path in (broken, empty, tmp_path / "absent.yaml"):
        assert "error: spec = " in refused("create", "--spec", str(path))
    assert "error: action = 'burn'" in refused("burn")
    assert "error: id = ''" in refused("report")
    assert "error: id = 'exp_none'" in refused("stop", "--id", "exp_none")
    assert "error: plot = 'x.pdf'" in refused("report", "--id", "exp_none", "--plot", "x.pdf")
    cli.main(["experiment", "create", "--spec", spec, "--url", served.url])
    made = capsys.readouterr().out.splitlines()[0]
    assert "nothing to draw" in refused("report", "--id", made, "--plot", str(tmp_path / "x.png"))


def test_the_command_sends_the_key_of_the_environment(config, engine, monkeypatch, capsys):
    config.require_keys = True
    secret = create_key(engine, "anna", (CONSENSUS,))[1]
    with Running(make_app(StubServices(), config)) as running:
        monkeypatch.delenv("CONSENSUS_API_KEY", raising=False)
        assert cli.main(["experiment", "status", "--url", running.url]) == 2
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("CONSENSUS_API_KEY", secret)
        assert cli.main(["experiment", "status", "--url", running.url]) == 0
