"""The Ray Serve application: what it is made of, and that it serves exactly what the library gives."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import pickle
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from otlp import receiving
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from serving import remote
from serving.best_of_n import best_of_n
from serving.config import ServeConfig
from serving.deployments import build, curl_line, model_folder, read_settings, running_service
from serving.local import LocalJudge, LocalSampler
from serving.own_ray import HAPROXY_FILES, PORTS, RAY_ENVIRONMENT, REPLICA_PORTS
from serving.problems import Overloaded
from serving.remote import TRIES, RemoteServices, call
from serving.schemas import ConsensusRequest
from serving.worker import Busy, Refusal

from tiny import make_judge, make_policy, make_tokenizer

REPOSITORY = Path(__file__).parents[2]
OPINIONS = ["Yes, for all.", "No.", "Only green tea."]
REQUEST = {"question": "Should tea be free?", "opinions": OPINIONS, "n": 8, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two policies and two preference models on disk."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for seed, name in enumerate(("policy", "other")):
        make_policy(tokenizer, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    for seed, name in enumerate(("judge", "other-judge")):
        PreferenceModel(make_judge(tokenizer, seed=seed), tokenizer, calibration, {}).save(root / name)
    return root


def configuration(folders, **change):
    keys = {
        "model_name_or_path": str(folders / "policy"),
        "preference_model": str(folders / "judge"),
        "policies": [f"other={folders / 'other'}"],
        "max_new_tokens": 12,
        "port": 0,
        "database": f"sqlite:///{folders}/service.db",
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
        ("preference_models", [f"other={tmp_path / 'absent'}"]),
        ("preference_models", [f"other={folders / 'policy'}"]),
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
    with pytest.raises(InputError, match="no_such_key"):
        build({"no_such_key": 1})


def test_build_takes_a_file_of_keys_and_others_over_it(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = yaml.safe_load((REPOSITORY / "configs" / "embedded" / "serve.yaml").read_text())
    found = read_settings({"config": "configs/embedded/serve.yaml", "max_new_tokens": 7})
    assert found == ServeConfig(**{**shipped, "max_new_tokens": 7}) != ServeConfig(**shipped)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(asdict(configuration(folders))))
    assert read_settings({"config": str(own)}) == configuration(folders)
    with pytest.raises(InputError, match="no such file") as caught:
        read_settings({"config": "own/absent.yaml"})
    assert caught.value.field == "config"


def test_all_replicas_fit_two_cores_and_one_gpu_while_they_are_replaced(folders):
    for device, gpus in (("cpu", 0), ("cuda", 1)):
        found = deployments(build(configuration(folders, device=device, policies=[])))
        assert set(found) == {"Api", "Reward-default", "Policy-default"}
        cpus = gpu_share = 0.0
        for name, deployment in found.items():
            config = deployment._deployment_config
            count = deployment.num_replicas if name == "Api" else config.autoscaling_config.max_replicas
            assert config.max_surge_percent == 100
            cpus += 2 * count * deployment.ray_actor_options["num_cpus"]
            gpu_share += 2 * count * deployment.ray_actor_options.get("num_gpus", 0)
        assert cpus <= 2 and gpu_share == pytest.approx(gpus)


def test_every_queue_has_an_end_and_every_model_its_range(folders):
    config = configuration(folders, min_replicas=2, max_replicas=3, max_queued_requests=5, request_timeout_s=40)
    found = deployments(build(config))
    assert set(found) == {"Api", "Reward-default", "Policy-default", "Policy-other"}
    assert found["Api"].num_replicas == config.api_replicas and 0 < found["Api"].max_queued_requests < 1000
    assert found["Api"].backpressure_config.status_code == 429
    for name in ("Reward-default", "Policy-default", "Policy-other"):
        scaling = found[name]._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (2, 3)
        assert found[name].max_queued_requests == 5
        assert found[name]._deployment_config.graceful_shutdown_timeout_s == 40  # a request in work is let finish
        assert found[name].init_args[0] == 40  # a call that takes longer is stuck


def test_a_policys_server_takes_no_gpu(folders):
    change = {"model_name_or_path": "http://127.0.0.1:1/v1#m", "policies": [], "device": "cuda"}
    server = deployments(build(configuration(folders, **change)))["Policy-default"]
    assert "num_gpus" not in server.ray_actor_options and server.init_args[0].model == "m"


def test_the_database_is_the_same_file_from_any_working_directory(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, bound in [
        ("sqlite:///runs/service.db", f"sqlite:///{tmp_path}/runs/service.db"),
        (f"sqlite:///{tmp_path}/x.db", f"sqlite:///{tmp_path}/x.db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ]:
        config = deployments(build(configuration(folders, database=given)))["Api"].init_args[2]
        assert config.database == bound


def deployments(application):
    """Name -> deployment, through the bound arguments."""
    found, waiting = {}, [application]
    while waiting:
        bound = waiting.pop()._bound_deployment
        found[bound.name] = bound
        for argument in bound.init_args:
            values = argument.values() if isinstance(argument, dict) else [argument]
            waiting += [value for value in values if hasattr(value, "_bound_deployment")]
    return found


@pytest.mark.parametrize("size", ["embedded", "qwen3-0.6b"])
def test_ray_accepts_the_deploy_files_and_they_name_what_is_there(size):
    keys = yaml.safe_load((REPOSITORY / "configs" / size / "serve_deploy.yaml").read_text())
    schema = ServeDeploySchema.model_validate(keys)
    (application,) = schema.applications
    assert (application.import_path, application.route_prefix) == ("serving.deployments:build", "/")
    config = read_settings(application.args)
    assert (schema.http_options.host, schema.http_options.port) == (config.host, config.port)
    assert schema.http_options.request_timeout_s > config.request_timeout_s  # our 504 comes before Ray's 408


# --- calls between deployments --------------------------------------------------------------------------------


class Method:
    """Stands in for a deployment's method whose calls end in the given ways, one after the other."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    async def remote(self, *args):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


DIED, UNAVAILABLE = ActorDiedError(), ActorUnavailableError("connection lost", None)


async def test_a_full_queue_and_a_refusal_keep_their_meaning_across_deployments():
    with pytest.raises(Overloaded):
        await call(Method(BackPressureError(num_queued_requests=16, max_queued_requests=16)))
    with pytest.raises(InputError) as caught:
        await call(Method(pickle.loads(pickle.dumps(Refusal("opinions[1]", "long", "shorten it")))))
    assert (caught.value.field, caught.value.value, caught.value.mend) == ("opinions[1]", "long", "shorten it")
    with pytest.raises(Overloaded) as caught:
        await call(Method(Busy(7)))
    assert caught.value.headers == {"Retry-After": "7"}
    assert await call(Method(3)) == 3


async def test_a_lost_replicas_call_goes_to_another(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    method = Method(DIED, UNAVAILABLE, 3, 4)
    assert await call(method) == 3 and method.outcomes == [4]
    method = Method(*[DIED] * TRIES, 3)
    with pytest.raises(RayActorError):
        await call(method)
    assert method.outcomes == [3]


@pytest.mark.parametrize("error", [ZeroDivisionError(), TimeoutError(), BackPressureError(1, 1)])
async def test_other_errors_are_not_tried_again(error):
    method = Method(error, 3)
    with pytest.raises((type(error), Overloaded)):
        await call(method)
    assert method.outcomes == [3]


class Handle:
    """Stands in for a deployment's handle, whose versions are asked for with the given outcomes."""

    def __init__(self, *outcomes):
        self.version = Method(*outcomes)

    def options(self, **options):
        return self


async def test_versions_are_asked_of_the_models_once_in_a_while(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: clock.now))
    policy, judge = Handle("p", "p2", ZeroDivisionError(), "p3"), Handle(*"jjjj")
    services = RemoteServices({"default": policy}, {"default": judge})
    found = await asyncio.gather(*(services.versions() for _ in range(10)))
    assert found == [{"preference_model:default": "j", "policy:default": "p"}] * 10
    clock.now += remote.VERSIONS_AGE_S + 0.1
    assert (await services.versions())["policy:default"] == "p2"
    clock.now += remote.VERSIONS_AGE_S + 0.1
    with pytest.raises(ZeroDivisionError):  # a model that has died is not hidden for longer
        await services.versions()
    assert (await services.versions())["policy:default"] == "p3"  # nor one that is back
    assert policy.version.outcomes == judge.version.outcomes == []


def test_the_curl_line_sends_a_key_where_one_is_needed():
    assert "Bearer $CONSENSUS_API_KEY" in curl_line("http://127.0.0.1:8000", keys=True)


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

    config = configuration(folders, preference_models=[f"more={folders / 'other-judge'}"])
    judges = {name: LocalJudge.load(folder) for name, folder in config.preference_folders().items()}
    with running_service(config) as url:
        for policy, name in (("default", "default"), ("other", "more")):
            sampler, judge = LocalSampler.load(config.policy_folders()[policy], config.sampling), judges[name]
            body = {**REQUEST, "policy": policy, "preference_model": name}
            status, headers, served = ask(url, body=body, headers=[("X-Request-Id", "my-id")])
            assert status == 200
            assert headers.get_all("x-request-id") == ["my-id"]
            names = {"policy": policy, "preference_model": name}
            here = best_of_n(sampler, judge, REQUEST["question"], OPINIONS, n=8, seed=3, **names)
            assert served == json.loads(json.dumps(asdict(here)))
        # Errors found in the ingress, in a deployment, and by the router.
        status, headers, problem = ask(url, body={**REQUEST, "n": 0})
        assert (status, headers["content-type"]) == (422, "application/problem+json")
        status, headers, problem = ask(url, body={**REQUEST, "opinions": ["a" * 1900]})
        assert (status, headers["content-type"]) == (422, "application/problem+json")
        assert problem["errors"][0]["field"] == "opinions[0]"
        assert ask(url, "/nowhere")[0] == 404
        models = ask(url, "/v1/models")[2]
        assert set(models["policies"]) == {"default", "other"}
        assert models["preference_models"] == {name: judge.version for name, judge in judges.items()}
        serve.run(Neighbour.bind(), name="neighbour", route_prefix="/neighbour")
    assert ray.is_initialized() and set(serve.status().applications) == {"neighbour"}  # they were not ours to stop
    serve.shutdown()


@pytest.mark.slow
def test_the_deploy_file_deploys(ray_cluster, port, tmp_path):
    keys = yaml.safe_load((REPOSITORY / "configs" / "embedded" / "serve_deploy.yaml").read_text())
    keys["applications"][0]["args"].update(database=f"sqlite:///{tmp_path}/service.db", max_new_tokens=12)
    keys["http_options"]["port"] = port
    schema = ServeDeploySchema.model_validate(keys)
    serve.start(http_options=HTTPOptions(**schema.http_options.model_dump()))
    client = _get_global_client()
    try:
        client.deploy_apps(schema, _blocking=True)  # what `serve deploy` has the cluster do
        url = f"http://{client.http_config.host}:{client.http_config.port}"  # not ours where Serve ran already
        status, _, answer = ask(url, body={**REQUEST, "n": 2})
        assert status == 200 and len(answer["candidates"]) == 2
    finally:
        serve.delete("consensus")


@pytest.fixture
def receiver():
    with receiving() as found:
        yield found


@pytest.mark.slow
def test_serve_runs_until_its_group_is_told_to_end_and_leaves_nothing(folders, tmp_path, receiver, ray_cluster):
    serve.start()  # another service on this machine
    temporary = tmp_path / "t"
    temporary.mkdir()
    short = Path("/tmp") / f"s{os.getpid()}"  # Ray's socket names must be short
    short.symlink_to(temporary)
    config = configuration(folders)
    code = f"from serving.deployments import ServeConfig, main; main(ServeConfig(**{asdict(config)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(short), "HOME": str(tmp_path)}
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url
    del environment["RAY_AUTH_MODE"]  # the service must settle it by itself
    for name in (*RAY_ENVIRONMENT, *HAPROXY_FILES, *PORTS, *REPLICA_PORTS):  # of the session's Ray
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Serving on "))
        url = line.split()[2]
        assert ask(url, body={**REQUEST, "n": 2})[0] == 200
        theirs, ours = listening(process.pid), listening(os.getpid(), but=process.pid)
        assert int(os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]) in ours and not ours & theirs
        counts = tokens_counted(url)
        assert counts["prompt"] > counts["completion"] > 0
        kill_proxy(process.pid)
        wait_until_back(url)  # within seconds, by what Ray was started with; on a busy machine it takes what it takes
        assert RAY_ENVIRONMENT.items() <= raylet_of(process.pid).environ().items()
        os.killpg(
            process.pid, signal.SIGTERM
        )  # as `timeout` does: Ray must not hear of it before the service has stopped
        assert process.wait(timeout=600) == 0
        assert "Stopped." in process.stdout.read()
    finally:
        process.kill()
        short.unlink()
    with pytest.raises(urllib.error.URLError):
        ask(url, "/healthz")
    assert list(temporary.glob("consensus-*")) == list(temporary.glob("ha-*")) == []
    deadline = time.monotonic() + 120
    while list(temporary.glob("nursery-*")):  # it looks once a second whether Ray is there
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / ".ray").exists()  # no token left in the home folder
    assert {span.name for span in receiver.spans()} == {"POST /v1/consensus", "sample", "judge", "choose"}


def tokens_counted(url):
    """What ``/metrics`` says of tokens, as soon as Ray has gathered it."""
    opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 300
    while True:
        with opener.open(f"{url}/metrics", timeout=60) as response:
            text = response.read().decode()
        found = re.findall(r"^ray_consensus_(\w+)_tokens_total{.*} ([\d.]+)$", text, re.MULTILINE)
        if len(found) == 2:
            return {kind: float(value) for kind, value in found}
        assert time.monotonic() < deadline
        time.sleep(1)


def listening(pid, but=None):
    """Ports at which the process and its descendants listen, but for one with its own."""
    if pid == but:
        return set()
    try:
        process = psutil.Process(pid)
        ports = {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
        children = process.children()
    except psutil.NoSuchProcess:  # Ray ends workers that have nothing to do
        return set()
    return ports.union(*(listening(child.pid, but) for child in children))


def named(pid, name):
    """The process's descendants of that name."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found += [one] * (one.name() == name)
    return found


def raylet_of(pid):
    """What starts the processes of the service's Ray, with its own environment."""
    (raylet,) = named(pid, "raylet")
    return raylet


def kill_proxy(pid):
    """SIGKILL the HTTP proxy among the process's descendants."""
    proxy = max(named(pid, "haproxy"), key=lambda p: p.pid)
    proxy.kill()
    proxy.wait()


def wait_until_back(url):
    deadline = time.monotonic() + 300
    while True:
        with suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            if ask(url, "/healthz")[0] == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)
