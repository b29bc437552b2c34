"""The service on a real Ray cluster when replicas die, models are swapped and clients go away; same answers always."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import psutil
import pytest
from ray import serve

from benchmarks._service_load import Traffic, model_processes, raw, replicas, summary
from benchmarks.service_kills import kills, swaps
from reward.preference import Calibration, PreferenceModel
from serving.config import ServeConfig
from serving.deployments import APPLICATION, build, running_service

from tiny import make_judge, make_policy, make_tokenizer

pytestmark = pytest.mark.slow

REQUEST = {
    "question": "Should tea be free?",
    "opinions": ["Yes, for all.", "No.", "Only green tea."],
    "n": 5,
    "seed": 3,
}


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


def configuration(folders, replicas):
    return ServeConfig(
        model_name_or_path=str(folders / "policy"),
        preference_model=str(folders / "judge"),
        database=f"sqlite:///{folders}/service.db",
        max_new_tokens=12,
        port=0,
        api_replicas=replicas,
        min_replicas=replicas,
        max_replicas=replicas,
        max_queued_requests=40,
    )


def answers(url):
    """The answers to ``REQUEST``, as bytes: alone, alone again, and twice among 16 others."""
    others = [
        {"question": f"Should there be {i} parks?", "opinions": [f"Yes, {k}." for k in range(1 + i % 5)], "n": 1 + i}
        for i in range(16)
    ]
    crowd = [*others[:8], REQUEST, *others[8:], REQUEST]
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:

        def ask(body):
            response = http.post("/v1/consensus", json=body)
            assert response.status_code == 200, response.text
            return response.content

        alone = [ask(REQUEST), ask(REQUEST)]
        with ThreadPoolExecutor(len(crowd)) as threads:
            together = list(threads.map(ask, crowd))
    assert len(set(together)) == 17  # the others ask for something else
    return {*alone, together[8], together[17]}


@pytest.fixture(scope="module")
def answers_of_one_replica(folders, ray_cluster):
    with running_service(configuration(folders, 1)) as url:
        return answers(url)


@pytest.fixture(scope="module")
def service(folders, answers_of_one_replica):
    """A service of two replicas each, after one of one replica was stopped."""
    config = configuration(folders, 2)
    with running_service(config) as url:
        yield url, config


def test_an_answer_is_the_same_after_a_restart_on_two_replicas_and_in_a_crowd(service, answers_of_one_replica):
    url, _ = service
    assert len(answers(url) | answers_of_one_replica) == 1


def test_a_killed_policy_or_preference_model_costs_no_request_at_all(service):
    url, _ = service
    result = kills(url, 10.0, every_s=3.0, kinds=("Policy-default", "Reward-default"))
    assert sum(result["killed"].values()) >= 2
    for traffic in (result["raw"], result["client"]):
        assert traffic["requests"] > 5 and traffic["failed"] == 0, result


def test_a_killed_interface_costs_our_client_no_request(service):
    url, _ = service
    result = kills(url, 10.0, every_s=3.0, kinds=("Api",))
    assert result["killed"]["Api"] >= 2  # 3, unless none runs again yet when the third is due
    assert result["client"]["requests"] > 5 and result["client"]["failed"] == 0, result


def test_a_lost_model_process_takes_its_replica_along_and_costs_no_request(service):
    url, _ = service
    before = {pid for _, pid in replicas()}
    with Traffic(raw(url, n=1), 3.0, 4) as traffic:
        time.sleep(1.0)
        model_processes()[0].kill()
        deadline = time.monotonic() + 300
        while len(before - {pid for _, pid in replicas()}) != 1 or len(replicas()) < len(before):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert summary(traffic.outcomes)["failed"] == 0 < len(traffic.outcomes)


def test_a_model_is_swapped_without_a_lost_request(service, folders):
    url, config = service
    result = swaps(url, config, str(folders / "other"), requests=40)
    assert result["requests"] >= 40 and result["failed"] == 0, json.dumps(result)
    assert (result["policies"], result["policies_after"]) == (2, 1)


def test_a_connection_from_before_a_swap_still_answers_after_it(service, folders):
    url, config = service
    kept = httpx.Limits(keepalive_expiry=None)
    with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=kept) as idle:
        assert idle.get("/healthz").status_code == 200
        before = {pid for name, pid in replicas() if name == "Api"}
        other = replace(config, max_queued_requests=config.max_queued_requests + 1)  # any change starts them anew
        serve.run(build(other), name=APPLICATION, route_prefix="/")
        while any(map(psutil.pid_exists, before)):
            time.sleep(0.2)
        assert idle.get("/healthz").status_code == 200  # 500 where HAProxy knows no way on


def test_work_of_clients_that_have_gone_is_dropped(ray_cluster, tmp_path):
    from fastapi import FastAPI
    from ray import serve

    from serving.worker import Worker

    begun, end = tmp_path / "begun", tmp_path / "end"

    @serve.deployment(max_ongoing_requests=8, ray_actor_options={"num_cpus": 0.1})
    class Slow:
        def __init__(self):
            self.worker, self.ran, self.gone = Worker(600.0), [], []

        async def work(self, name):
            import asyncio

            try:
                return await self.worker.run(self._work, name)
            except asyncio.CancelledError:
                self.gone.append(name)
                raise

        async def left(self):
            return self.gone

        def _work(self, name):
            import time

            self.ran.append(name)
            if name == "first":  # at work until it is told to end
                begun.touch()
                while not end.exists():
                    time.sleep(0.02)
            return self.ran

    @serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=8)
    @serve.ingress()
    class Front:
        def __init__(self, slow):
            self.slow = slow

        def __serve_build_asgi_app__(self):
            from serving.remote import call

            app = FastAPI()

            @app.get("/left")
            async def left() -> list[str]:
                return await call(self.slow.left)

            @app.get("/{name}")
            async def work(name: str) -> list[str]:
                return await call(self.slow.work, name)

            return app

    serve.run(Front.bind(Slow.bind()), name="slow", route_prefix="/slow")
    from ray.serve.context import _get_global_client

    address = _get_global_client().http_config
    url = f"http://{address.host}:{address.port}/slow"

    def ask(name, patience_s=300.0):
        try:
            return httpx.get(f"{url}/{name}", timeout=patience_s, trust_env=False).json()
        except httpx.ReadTimeout:
            return None

    try:
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(ask, "first")
            try:
                deadline, gone = time.monotonic() + 300, []
                while not begun.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                while len(gone) < 2:  # on a busy machine one may leave before its request has come as far
                    assert time.monotonic() < deadline
                    assert ask(f"gone{time.monotonic_ns()}", 0.5) is None
                    gone = ask("left")
                assert not first.done()
            finally:
                end.touch()
            names = ask("last")
            assert names[0] == "first" and names[-1] == "last" and not set(gone) & set(names)
    finally:
        serve.delete("slow")
