"""Model processes: forked, made, asked, lost; the probes of what they hold."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from reward.preference import Calibration, PreferenceModel
from serving import nursery
from serving.config import Sampling
from serving.exchange import Order
from serving.hosted import HostedJudge, HostedPolicy
from serving.nursery import ModelProcess

from tiny import make_judge, make_policy, make_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a preference model, and both with weights that are no numbers."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    for prefix in ("", "broken-"):
        policy, judge = make_policy(tokenizer), make_judge(tokenizer)
        if prefix:
            for model in (policy, judge):
                torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        policy.save_pretrained(root / f"{prefix}policy")
        tokenizer.save_pretrained(root / f"{prefix}policy")
        PreferenceModel(judge, tokenizer, calibration, {}).save(root / f"{prefix}judge")
    return root


def test_probes_find_weights_that_are_no_numbers(models):
    HostedPolicy(str(models / "policy"), Sampling(), "cpu").probe()
    HostedJudge(str(models / "judge"), "cpu").probe()
    with pytest.raises(RuntimeError, match="no number"):
        HostedPolicy(str(models / "broken-policy"), Sampling(), "cpu").probe()
    with pytest.raises(RuntimeError, match="no number"):
        HostedJudge(str(models / "broken-judge"), "cpu").probe()


def test_where_forking_is_not_safe_a_model_process_starts_from_nothing(models, monkeypatch):
    monkeypatch.setattr(nursery.sys, "platform", "darwin")
    process = nursery.ModelProcess("HostedPolicy", str(models / "policy"), Sampling(max_new_tokens=4), "cpu")
    here = HostedPolicy(str(models / "policy"), Sampling(max_new_tokens=4), "cpu")
    request = ("Should tea be free?", ["Yes."], [Order((0,), 2, 3)])
    assert process.call("sample", *request) == here.sample(*request)
    process.close()


def test_a_place_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(nursery.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"nursery-{os.getuid()}-{os.getppid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="not ours alone"):
        nursery.ModelProcess("HostedPolicy")


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"nursery-{os.getuid()}-{os.getppid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="not ours alone"):
        ModelProcess("HostedPolicy", "policy", Sampling(), "cpu")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(RuntimeError, match="not ours alone"):
        ModelProcess("HostedPolicy", "policy", Sampling(), "cpu")


SLOW_MODEL = """
import sys, time, types
from multiprocessing.connection import Connection
from serving import nursery

class Slow:
    def work(self):
        time.sleep(60)

sys.modules["slow"], nursery.HOSTED = types.SimpleNamespace(Slow=Slow), "slow"
nursery._hold_model(Connection(int(sys.argv[1])))
"""


def test_a_model_process_ends_with_its_replica_in_the_middle_of_a_call_too():
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", SLOW_MODEL, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    try:
        with Connection(ours.detach()) as replica:
            replica.send((environment, "Slow", ()))
            assert replica.recv() == (True, None)
            replica.send(("work", ()))
            with pytest.raises(subprocess.TimeoutExpired):  # it works, and what it is sent does not end it
                process.wait(timeout=1)
        assert process.wait(timeout=50) == 0  # sooner than the call would end
    finally:
        process.kill()
        process.wait()


REPLICA = """
import json, sys
from deliberation.types import InputError
from serving.exchange import Order
from serving.config import Sampling
from serving.nursery import ModelLost, ModelProcess

folder, command = sys.argv[1], None
print(json.dumps("torch" in sys.modules), flush=True)
held = {}
for line in sys.stdin:
    kind, *rest = json.loads(line)
    try:
        if kind == "make":
            name, what, path, *args = rest
            args = [Sampling(**arg) if isinstance(arg, dict) else arg for arg in args]
            held[name] = ModelProcess(what, f"{folder}/{path}", *args)
            answer = "made"
        elif kind == "sample":
            answer = held[rest[0]].call("sample", "Why?", rest[1], [Order((0,), 3, 7)])
            answer = answer[0].texts if isinstance(answer, list) else answer
        else:
            answer = held[kind].call(*rest)
    except (InputError, ModelLost, RuntimeError) as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer, default=vars), flush=True)
"""


class Replica:
    """A process that uses model processes as a replica does."""

    def __init__(self, folder, temporary):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", REPLICA, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.said() is False  # it has no torch of its own

    def said(self):
        return json.loads(self.process.stdout.readline())

    def __call__(self, *words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.said()


@pytest.fixture
def temporary(tmp_path):
    """A folder with a short name: sockets live below it."""
    short = Path("/tmp") / f"n{os.getpid()}"
    short.symlink_to(tmp_path)
    yield short
    short.unlink()


@pytest.fixture
def replica(models, temporary):
    """A replica, and what it may leave behind."""
    process = Replica(models, temporary)
    yield process
    process.process.kill()
    for one in nurseries(temporary):
        one.kill()


def nurseries(temporary):
    """The nursery and its model processes, the nursery first."""
    found = [p for p in psutil.process_iter(["cmdline"]) if any(str(temporary) in w for w in p.info["cmdline"] or [])]
    return sorted((p for p in found if "serving.nursery" in p.info["cmdline"]), key=lambda p: p.create_time())


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SHORT = {"max_new_tokens": 12}


@pytest.mark.slow
def test_a_model_process_answers_as_the_model_here_and_ends_with_its_replica(replica, models, temporary):
    assert replica("make", "policy", "HostedPolicy", "policy", SHORT, "cpu") == "made"
    assert replica("make", "judge", "HostedJudge", "judge", "cpu") == "made"
    here = HostedPolicy(str(models / "policy"), Sampling(**SHORT), "cpu")
    assert replica("policy", "version") == here.version() and replica("policy", "probe") is None
    assert replica("sample", "policy", ["Yes."]) == list(here.sample("Why?", ["Yes."], [Order((0,), 3, 7)])[0].texts)
    assert replica("judge", "version") == HostedJudge(str(models / "judge"), "cpu").version()
    assert len(nurseries(temporary)) == 3
    replica.process.send_signal(signal.SIGKILL)
    wait_until(lambda: len(nurseries(temporary)) == 1)  # the nursery waits for the next replica


@pytest.mark.slow
def test_refusals_and_faults_reach_the_replica(replica):
    kind, told = replica("make", "policy", "HostedPolicy", "absent", SHORT, "cpu")
    assert kind == "InputError" and "no such folder" in told
    assert replica("make", "policy", "HostedPolicy", "policy", SHORT, "cpu") == "made"
    kind, told = replica("policy", "no_such_method")
    assert kind == "RuntimeError" and "AttributeError" in told and "no_such_method" in told
    assert replica("sample", "policy", ["a" * 3000])["field"] == "opinions[0]"
    assert replica("policy", "probe") is None


@pytest.mark.slow
def test_a_lost_model_process_is_told_and_a_lost_nursery_replaced(replica, temporary):
    assert replica("make", "policy", "HostedPolicy", "policy", SHORT, "cpu") == "made"
    nursery, model = nurseries(temporary)
    nursery.kill()
    nursery.wait(120)  # until it answers no more
    assert replica("policy", "probe") is None  # its process lives on
    model.kill()
    model.wait(120)
    assert replica("policy", "probe")[0] == "ModelLost"
    assert replica("make", "policy", "HostedPolicy", "policy", SHORT, "cpu") == "made"
    assert replica("policy", "probe") is None
