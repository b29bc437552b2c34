"""The Ray Serve application: what it is made of, and that it serves exactly what the library gives."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
from ray import serve
from ray.serve.exceptions import BackPressureError

from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from serving.api import Overloaded
from serving.best_of_n import best_of_n
from serving.config import ServeConfig
from serving.deployments import Refusal, _call, build, curl_line, model_folder, running_service
from serving.local import LocalJudge, LocalSampler
from serving.schemas import ConsensusRequest

from tiny import make_judge, make_policy, make_tokenizer

REPOSITORY = Path(__file__).parents[2]
OPINIONS = ["Yes, for all.", "No.", "Only green tea."]
REQUEST = {"question": "Should tea be free?", "opinions": OPINIONS, "n": 8, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two policies and a preference model on disk."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for seed, name in enumerate(("policy", "other")):
        make_policy(tokenizer, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    PreferenceModel(make_judge(tokenizer), tokenizer, calibration, {}).save(root / "judge")
    return root


def configuration(folders, **change):
    keys = {
        "model_name_or_path": str(folders / "policy"),
        "preference_model": str(folders / "judge"),
        "policies": [f"other={folders / 'other'}"],
        "max_new_tokens": 12,
        "port": 0,
    }
    return ServeConfig(**{**keys, **change})


def ask(url, path="/v1/consensus", body=None, headers=()):
    """(status, headers, JSON body) of one request, straight to loopback."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return response.status, response.headers, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


# --- without a cluster ----------------------------------------------------------------------------------------


def test_folders_without_models_are_refused_before_anything_starts(folders, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for key, value in [
        ("model_name_or_path", str(empty)),
        ("model_name_or_path", str(tmp_path / "absent")),
        ("model_name_or_path", "runs/absent/ppo"),
        ("preference_model", "runs/absent"),
        ("preference_model", str(folders / "policy")),  # weights, but no calibration
        ("policies", [f"other={empty}"]),
    ]:
        with pytest.raises(InputError) as caught, running_service(configuration(folders, **{key: value})):
            pytest.fail("it started")
        assert caught.value.field == key


def test_hub_names_pass_as_they_are():
    assert model_folder("model_name_or_path", "Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_folder("model_name_or_path", "gpt2") == "gpt2"


def test_a_taken_port_is_refused_before_anything_starts(folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port = {port}"), running_service(configuration(folders, port=port)):
            pytest.fail("it started")


def test_build_takes_keys_too_and_knows_them(folders):
    assert build(asdict(configuration(folders))) is not None
    with pytest.raises(TypeError, match="no_such_key"):
        build({"no_such_key": 1})


def test_all_replicas_fit_two_cores_and_one_gpu(folders):
    for device, gpus in (("cpu", 0), ("cuda", 3 * 0.33)):
        options = actor_options(build(configuration(folders, device=device)))
        assert set(options) == {"Api", "Reward", "Policy-default", "Policy-other"}
        assert sum(o["num_cpus"] for o in options.values()) <= 2
        assert sum(o.get("num_gpus", 0) for o in options.values()) == pytest.approx(gpus)


def actor_options(application):
    """Deployment name -> Ray actor options, through the bound arguments."""
    found, waiting = {}, [application]
    while waiting:
        bound = waiting.pop()._bound_deployment
        found[bound.name] = bound.ray_actor_options
        for argument in bound.init_args:
            values = argument.values() if isinstance(argument, dict) else [argument]
            waiting += [value for value in values if hasattr(value, "_bound_deployment")]
    return found


class Method:
    """Stands in for a deployment's method whose call ends in a given way."""

    def __init__(self, outcome):
        self.outcome = outcome

    async def remote(self, *args):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def test_a_full_queue_and_a_refusal_keep_their_meaning_across_deployments():
    with pytest.raises(Overloaded):
        await _call(Method(BackPressureError(num_queued_requests=16, max_queued_requests=16)))
    with pytest.raises(InputError) as caught:
        await _call(Method(pickle.loads(pickle.dumps(Refusal("opinions[1]", "long", "shorten it")))))
    assert (caught.value.field, caught.value.value, caught.value.mend) == ("opinions[1]", "long", "shorten it")
    assert await _call(Method(3)) == 3


def test_the_curl_line_is_a_good_request():
    words = shlex.split(curl_line("http://127.0.0.1:8000"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/consensus"]
    ConsensusRequest.model_validate_json(words[-1])


# --- on a cluster ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_served_answer_is_the_librarys_candidate_for_candidate_and_score_for_score(folders, ray_cluster):
    import ray

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Neighbour:
        """Another application on the same cluster."""

        def __call__(self):
            return "hello"

    config = configuration(folders)
    judge = LocalJudge.load(config.preference_model)
    with running_service(config) as url:
        for policy in ("default", "other"):
            sampler = LocalSampler.load(config.policy_folders()[policy], config.sampling)
            body = {**REQUEST, "policy": policy}
            status, headers, served = ask(url, body=body, headers=[("X-Request-Id", "my-id")])
            assert status == 200
            assert headers.get_all("x-request-id") == ["my-id"]
            here = best_of_n(sampler, judge, REQUEST["question"], OPINIONS, n=8, seed=3, policy=policy)
            assert served == json.loads(json.dumps(asdict(here)))
        # Errors found in the ingress, in a deployment, and by the router.
        status, headers, problem = ask(url, body={**REQUEST, "n": 0})
        assert (status, headers["content-type"]) == (422, "application/problem+json")
        status, headers, problem = ask(url, body={**REQUEST, "opinions": ["a" * 1900]})
        assert (status, headers["content-type"]) == (422, "application/problem+json")
        assert problem["errors"][0]["field"] == "opinions[0]"
        assert ask(url, "/nowhere")[0] == 404
        health = ask(url, "/healthz")[2]
        assert health["policies"] == ["default", "other"] and len(health["versions"]) == 3
        serve.run(Neighbour.bind(), name="neighbour", route_prefix="/neighbour")
    assert ray.is_initialized() and set(serve.status().applications) == {"neighbour"}  # they were not ours to stop
    serve.shutdown()


@pytest.mark.slow
def test_serve_runs_until_interrupted_and_leaves_nothing(folders, tmp_path):
    temporary = tmp_path / "t"
    temporary.mkdir()
    short = Path("/tmp") / f"s{os.getpid()}"  # Ray's socket names must be short
    short.symlink_to(temporary)
    config = configuration(folders)
    code = f"from serving.deployments import ServeConfig, main; main(ServeConfig(**{asdict(config)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(short), "HOME": str(tmp_path)}
    del environment["RAY_AUTH_MODE"]  # the service must settle it by itself
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Serving on "))
        url = line.split()[2]
        assert ask(url, body={**REQUEST, "n": 2})[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert "Stopped." in process.stdout.read()
    finally:
        process.kill()
        short.unlink()
    with pytest.raises(urllib.error.URLError):
        ask(url, "/healthz")
    assert list(temporary.glob("consensus-*")) == []
    assert not (tmp_path / ".ray").exists()  # no token left in the home folder
