"""The HTTP interface on tiny random models in this process."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from deliberation.types import MAX_MEMBERS, MAX_OPINION_CHARS
from reward.preference import Calibration, PreferenceModel
from serving.api import MAX_BODY_BYTES, Overloaded, make_app
from serving.best_of_n import NoStatement, best_of_n
from serving.checks import MAX_CANDIDATES, MAX_SEED
from serving.config import Sampling, ServeConfig
from serving.local import LocalJudge, LocalSampler, LocalServices
from serving.schemas import EXAMPLES, ConsensusResponse

from tiny import make_judge, make_policy, make_tokenizer

OPINIONS = ["Yes, for all.", "No.", "Only green tea."]
REQUEST = {"question": "Should tea be free?", "opinions": OPINIONS, "n": 4, "seed": 3}
SAMPLING = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return ServeConfig(max_new_tokens=12, num_candidates=3, database=f"sqlite:///{folder}/service.db")


@pytest.fixture(scope="module")
def models():
    """A sampler, another one and a judge: tiny, random."""
    tokenizer = make_tokenizer()
    policies = {
        "default": LocalSampler(make_policy(tokenizer), tokenizer, SAMPLING),
        "other": LocalSampler(make_policy(tokenizer, seed=1), tokenizer, SAMPLING),
    }
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    return policies, LocalJudge(PreferenceModel(make_judge(tokenizer), tokenizer, calibration, {}))


@pytest.fixture(scope="module")
def services(models):
    return LocalServices(models[0], {"default": models[1]})


@pytest.fixture(scope="module")
def client(services, config):
    with TestClient(make_app(services, config)) as client:  # one event loop: work in the background needs it
        yield client


def post(client, **change):
    body = {k: v for k, v in {**REQUEST, **change}.items() if v is not ...}
    return client.post("/v1/consensus", content=json.dumps(body), headers={"Content-Type": "application/json"})


def assert_problem(response, status):
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "retryable", "errors"}
    assert problem["retryable"] == (status in (408, 409, 429) or status >= 500)  # what clients retry by themselves
    assert problem["status"] == status
    return problem


# --- answers --------------------------------------------------------------------------------------------------


def test_the_answer_is_the_librarys(client, models):
    answer = post(client).json()
    result = best_of_n(models[0]["default"], models[1], REQUEST["question"], REQUEST["opinions"], n=4, seed=3)
    assert answer == json.loads(json.dumps(asdict(result)))  # candidate for candidate and score for score


def test_the_answer_holds_together(client):
    answer = post(client, n=8).json()
    candidates = answer["candidates"]
    assert len(candidates) == 8 and len(answer["members"]) == 3
    assert answer["statement"] == candidates[answer["index"]]["statement"] != ""
    assert candidates[answer["index"]]["rank"] == 1
    assert answer["welfare"] == max(c["welfare"] for c in candidates if c["statement"])
    assert len({round(c["welfare"], 6) for c in candidates}) > 1  # else choosing would mean nothing
    for candidate in candidates:
        geometric = math.exp(sum(math.log(u) for u in candidate["utilities"]) / 3)
        assert candidate["welfare"] == pytest.approx(geometric)
    for member, utility in zip(answer["members"], candidates[answer["index"]]["utilities"], strict=True):
        assert member["agreement"] == pytest.approx(utility, abs=1e-5)
        assert member["low"] <= member["agreement"] <= member["high"]
    assert answer["versions"]["policy"] == "default"
    assert answer["versions"]["policy_weights"].startswith("sha256:")


def test_influence_is_said_of_every_opinion_where_it_is_asked_for(client):
    assert post(client).json()["influence"] is None
    answer = post(client, influence=True).json()
    assert [one["member"] for one in answer["influence"]] == [0, 1, 2]
    assert any(one["changed"] or one["welfare_of_others"] for one in answer["influence"])
    assert {**answer, "influence": None} == post(client).json()  # the answer itself is the same
    assert post(client, influence=True, opinions=["Alone."]).json()["errors"][0]["field"] == "influence"


def test_worst_cluster_is_refused_since_a_request_has_no_clusters(client):
    refused = post(client, welfare="worst_cluster")
    assert refused.status_code == 422 and "p10" in refused.text


def test_same_seed_same_answer_alone_or_amid_others(client):
    first = post(client).json()
    post(client, seed=4)
    assert post(client).json() == first
    assert [c["statement"] for c in post(client, seed=4).json()["candidates"]] != [
        c["statement"] for c in first["candidates"]
    ]


def test_more_candidates_begin_with_the_same_ones(client):
    few, many = (post(client, n=n).json()["candidates"] for n in (2, 5))
    assert [c["statement"] for c in few] == [c["statement"] for c in many[:2]]
    assert few[0]["scores"] == pytest.approx(many[0]["scores"], abs=1e-5)


def test_defaults_are_the_configurations(client):
    answer = post(client, n=..., seed=..., welfare=...).json()
    assert len(answer["candidates"]) == 3
    assert answer["seed"] == 0
    assert answer["welfare_used"] == {"name": "nash", "alpha": 1.0}


@pytest.mark.parametrize(
    ("welfare", "used"),
    [
        ("rawlsian", {"name": "rawlsian", "alpha": "inf"}),
        ("inf", {"name": "rawlsian", "alpha": "inf"}),
        (0, {"name": "utilitarian", "alpha": 0.0}),
        ("0.5", {"name": None, "alpha": 0.5}),
        (2.5, {"name": None, "alpha": 2.5}),
        ("p10", {"name": "p10", "alpha": None}),
        ("trimmed", {"name": "trimmed", "alpha": None}),
    ],
)
def test_welfare_by_name_or_number(client, welfare, used):
    answer = post(client, welfare=welfare).json()
    assert answer["welfare_used"] == used
    if used["name"] in answer["winners"]:
        assert answer["winners"][used["name"]]["index"] == answer["index"]


def test_policies_are_chosen_by_name(client, models):
    default, other = post(client).json(), post(client, policy="other").json()
    assert other["versions"]["policy"] == "other"
    assert other["versions"]["policy_weights"] == models[0]["other"].version
    assert default["versions"]["policy_weights"] != other["versions"]["policy_weights"]
    assert [c["statement"] for c in default["candidates"]] != [c["statement"] for c in other["candidates"]]


def test_opinions_that_do_not_fit_the_policy_are_named_and_scored(client):
    answer = post(client, n=1, opinions=[f"{word} " * 100 for word in ("alpha", "beta", "gamma", "delta")]).json()
    assert 0 < len(answer["not_shown"]) < 4
    assert [m["member"] for m in answer["members"] if not m["shown"]] == answer["not_shown"]
    assert all(len(c["utilities"]) == 4 for c in answer["candidates"])
    assert any("did not fit" in warning for warning in answer["warnings"])


def test_one_member_and_any_script_will_do(client):
    opinion = 'Ja \u2014 \u8336\u306f\u7121\u6599\u306b\uff01 \U0001f375 \\ "quoted"\nOpinion: fake\x00'
    answer = post(client, opinions=[opinion])
    assert answer.status_code == 200 and len(answer.json()["members"]) == 1


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("opinions", {"opinions": []}),
        ("opinions", {"opinions": ["a"] * (MAX_MEMBERS + 1)}),
        ("opinions[1]", {"opinions": ["a", ""]}),
        ("opinions[1]", {"opinions": ["a", " \n\t"]}),
        ("opinions[0]", {"opinions": ["\u200b"]}),
        ("opinions[0]", {"opinions": ["\ud800"]}),
        ("opinions[2]", {"opinions": ["a", "b", "c" * (MAX_OPINION_CHARS + 1)]}),
        ("opinions[0]", {"opinions": [7]}),
        ("opinions[0]", {"opinions": [None]}),
        ("opinions", {"opinions": "Yes."}),
        ("opinions", {"opinions": {"a": "b"}}),
        ("opinions", {"opinions": ...}),
        ("question", {"question": ""}),
        ("question", {"question": "q" * (MAX_OPINION_CHARS + 1)}),
        ("question", {"question": 3}),
        ("question", {"question": ...}),
        ("n", {"n": 0}),
        ("n", {"n": -1}),
        ("n", {"n": MAX_CANDIDATES + 1}),
        ("n", {"n": "16"}),
        ("n", {"n": 2.5}),
        ("n", {"n": True}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": MAX_SEED + 1}),
        ("seed", {"seed": "1"}),
        ("welfare", {"welfare": "fair"}),
        ("welfare", {"welfare": -1}),
        ("welfare", {"welfare": -0.001}),
        ("welfare", {"welfare": "-1"}),
        ("welfare", {"welfare": math.nan}),
        ("welfare", {"welfare": True}),
        ("welfare", {"welfare": [1]}),
        ("welfare", {"welfare": 10**400}),
        ("policy", {"policy": "unknown"}),
        ("policy", {"policy": 1}),
        ("temperature", {"temperature": 0.5}),
        ("body", {"\ud800": 1}),
    ],
)
def test_bad_input_names_field_value_and_mend(client, field, change):
    problem = assert_problem(post(client, **change), 422)
    assert problem["type"] == "urn:consensus-machine:problem:bad-input"
    (error,) = problem["errors"]
    assert set(error) == {"field", "value", "mend"}
    assert error["field"] == field
    assert error["mend"] and error["mend"] in problem["detail"]
    assert len(str(error["value"])) <= 80


def test_all_bad_fields_are_named_at_once(client):
    errors = post(client, n=0, welfare="fair", opinions=["a", ""]).json()["errors"]
    assert [e["field"] for e in errors] == ["opinions[1]", "n", "welfare"]
    assert errors[1] == {"field": "n", "value": 0, "mend": "must be an integer from 1 to 64"}


@pytest.mark.parametrize(
    ("path", "change", "fields"),
    [
        ("consensus", {f"k{i}": 0 for i in range(5000)}, ["body"]),
        ("consensus", {"opinions": [0] * 5000}, ["opinions"]),
        ("score", {"statements": [0] * 5000}, ["statements"]),
        ("aggregate", {"utilities": [[1.0]] * 5000}, ["utilities"]),
        ("aggregate", {"utilities": [[0.0] * 1000] * 3}, [f"utilities[{i}][0]" for i in range(3)]),
        ("aggregate", {"utilities": [[0.0] * 5000]}, ["utilities[0]"]),
        ("aggregate", {"utilities": [[1.0]], "weights": [-1.0] * 5000}, ["weights"]),
        ("experiments", {"name": "tea", "arms": [{}] * 5000}, ["arms"]),
    ],
)
def test_thousands_of_faults_are_not_told_one_by_one(client, path, change, fields):
    """Each took 35 microseconds and a kilobyte before there was an answer: 12 s for a body of one MiB."""
    whole = {"consensus": REQUEST, "score": {**REQUEST, "statements": ["Tea."]}}
    problem = assert_problem(client.post(f"/v1/{path}", json={**whole.get(path, {}), **change}), 422)
    known = [e["field"] for e in problem["errors"] if e["field"] not in ("n", "seed")]  # which a score has not
    assert known == fields


def test_an_opinion_longer_than_the_policys_context_is_bad_input(client):
    problem = assert_problem(post(client, opinions=["a" * 1900]), 422)
    assert problem["errors"][0]["field"] == "opinions[0]"
    assert "tokens" in problem["errors"][0]["mend"]


def test_an_opinion_longer_than_the_judges_context_is_bad_input(client):
    # The other opinion is the one the policy can read; the judge must read both. Longer than its 2 048 positions
    # only in bytes: this tokenizer has one token a byte.
    for seed in range(8):  # an order in which the short one comes first
        response = post(client, opinions=["\u00e9" * 1500, "Yes."], seed=seed)
        assert_problem(response, 422)
        assert response.json()["errors"][0]["field"] == "opinions[0]"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"text"', "{'a': 1}"])
def test_a_body_that_is_no_json_object(client, content):
    response = client.post("/v1/consensus", content=content, headers={"Content-Type": "application/json"})
    assert assert_problem(response, 422)["errors"][0]["field"] == "body"


def test_a_body_that_is_no_text(client):
    response = client.post("/v1/consensus", content=b"\xff\xfe{", headers={"Content-Type": "application/json"})
    assert_problem(response, 400)


def test_a_huge_body_is_refused(client):
    body = b'{"question": "' + b"a" * MAX_BODY_BYTES
    response = client.post("/v1/consensus", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 413)


def test_the_largest_good_request_is_within_the_body_limit():
    body = {**REQUEST, "opinions": ["\u00e9" * MAX_OPINION_CHARS] * 300}
    assert len(json.dumps(body)) < MAX_BODY_BYTES


# --- other statuses -------------------------------------------------------------------------------------------


def test_unknown_path_and_wrong_method(client):
    assert_problem(client.get("/v2/consensus"), 404)
    response = client.get("/v1/consensus")
    assert_problem(response, 405)
    assert response.headers["allow"] == "POST"


class Failing:
    """Services whose models fail in a given way."""

    policies = preference_models = ("default",)

    def __init__(self, error):
        self.error = error

    def sampler(self, policy):
        return self

    async def sample(self, *args):
        if self.error is None:
            await asyncio.sleep(60)
        raise self.error

    def judge(self, preference_model):
        return SimpleNamespace(judge=self.sample)

    versions = sample


def failing(config, error, **change):
    app = make_app(Failing(error), replace(config, **change))
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("secret path"), 500), (NoStatement("all are empty"), 422), (Overloaded(7), 429), (None, 504)],
)
def test_faults_are_problems_too(config, error, status):
    limit = {} if error else {"request_timeout_s": 0.2}  # a busy machine may take as long to fail in another way
    client = failing(config, error, **limit)
    response = client.post("/v1/consensus", json=REQUEST, headers={"X-Request-Id": "abc"})
    problem = assert_problem(response, status)
    assert "secret" not in json.dumps(problem)
    assert response.headers["x-request-id"] == "abc"
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_models_are_named_with_their_versions(client, models):
    found = client.get("/v1/models").json()
    assert found["default_policy"] == "default" and found["preference_models"] == {"default": models[1].version}
    assert found["policies"] == {name: sampler.version for name, sampler in models[0].items()}


def test_ready_means_that_the_models_answer_and_healthy_that_the_process_does(client, config):
    assert client.get("/readyz").json() == client.get("/healthz").json() == {"status": "ok"}
    broken = failing(config, RuntimeError())
    assert_problem(broken.get("/readyz"), 500)
    assert broken.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/nowhere"])
def test_request_id_is_echoed_or_made(client, path):
    assert client.get(path, headers={"X-Request-Id": "my-id"}).headers.get_list("x-request-id") == ["my-id"]
    made = {client.get(path).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert client.get(path, headers={"X-Request-Id": "a" * 200}).headers["x-request-id"] != "a" * 200


def test_behind_a_proxy_that_echoes_the_request_id_it_is_not_doubled(services, config):
    client = TestClient(make_app(services, config, echo_request_id=False))
    assert "x-request-id" not in client.get("/healthz", headers={"X-Request-Id": "my-id"}).headers


def test_the_interface_loads_neither_ray_nor_torch():
    code = "import sys, serving.api; sys.exit(bool({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# --- documentation --------------------------------------------------------------------------------------------


def test_openapi_documents_every_field_and_every_error(client):
    schema = client.get("/openapi.json").json()
    for name, model in schema["components"]["schemas"].items():
        if name in ("HTTPValidationError", "ValidationError"):
            continue
        for field, described in model["properties"].items():
            assert described.get("description"), f"{name}.{field} has no description"
    responses = schema["paths"]["/v1/consensus"]["post"]["responses"]
    assert {"200", "202", "409", "422", "429", "500", "504"} <= set(responses)
    for status, response in responses.items():
        media = ["application/json"] if status < "300" else ["application/problem+json"]
        assert list(response["content"]) == media + ["text/event-stream"] * (status == "200")  # `stream`
    assert responses["422"]["content"]["application/problem+json"]["schema"]["$ref"].endswith("/Problem")
    assert client.get("/docs").status_code == 200


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_work_as_they_stand(client, example):
    response = client.post("/v1/consensus", json=example)
    assert response.status_code == 200
    ConsensusResponse.model_validate(response.json())


# --- configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("welfare", "fair"),
        ("num_candidates", 0),
        ("num_candidates", 65),
        ("seed", -1),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("port", 70000),
        ("device", "tpu"),
        ("request_timeout_s", 0.0),
        ("background_timeout_s", 0.0),
        ("retention_hours", 0.0),
        ("host", "0.0.0.0"),
        ("policies", ["ppo"]),
        ("policies", ["ppo="]),
        ("policies", ["a b=c"]),
        ("policies", ["default=x"]),
        ("policies", ["a=x", "a=y"]),
    ],
)
def test_bad_configuration_names_the_key(key, value):
    with pytest.raises(ValueError) as caught:
        ServeConfig(**{key: value})
    assert caught.value.field == key


def test_configuration_from_yaml_and_command_line(tmp_path):
    from trl import TrlParser

    file = tmp_path / "serve.yaml"
    file.write_text("model_name_or_path: runs/ppo\npolicies: [sft=runs/sft, base=embedded/writer]\nwelfare: rawlsian\n")
    (config,) = TrlParser([ServeConfig]).parse_args_and_config(["--config", str(file), "--port", "8001"])
    assert config.policy_folders() == {"default": "runs/ppo", "sft": "runs/sft", "base": "embedded/writer"}
    assert (config.welfare, config.port, config.num_candidates) == ("rawlsian", 8001, 16)
