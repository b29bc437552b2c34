"""A policy behind an OpenAI-compatible server: against a server process of its own, with faults."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import httpx
import pytest
from openai_server import CONTEXT_CHARS, KEY, MODEL

from deliberation.types import InputError
from reward.preference import Calibration, PreferenceModel
from serving import openai_policy
from serving.best_of_n import choose, make_plan, readable, statements
from serving.config import Sampling, ServeConfig, Server, server_of
from serving.local import LocalJudge
from serving.openai_policy import ServerBusy, ServerFault, ServerSampler, defused
from serving.orders import draw_orders

from tiny import make_judge, make_tokenizer

OPINIONS = ["Yes, for all.", "No.", "Only green tea."]
QUESTION = "Should tea be free?"
SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def server():
    """URL of the server; it runs for the module."""
    with socket.create_server(("127.0.0.1", 0)) as door:  # the server's from the start: none can come in between
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        words = [sys.executable, str(Path(__file__).parent / "openai_server.py"), str(door.fileno())]
        process = subprocess.Popen(words, pass_fds=[door.fileno()])
    try:
        httpx.get(f"{url}/seen", trust_env=False, timeout=300)  # answered as soon as it is up
        yield url
    finally:
        process.kill()
        process.wait()


def order_faults(url, *faults):
    httpx.post(f"{url}/faults", json=list(faults), trust_env=False, timeout=60)


def bodies(url):
    return httpx.get(f"{url}/seen", trust_env=False, timeout=60).json()


@pytest.fixture
def sampler(server, monkeypatch):
    monkeypatch.setenv(openai_policy.KEY_VARIABLE, KEY)
    order_faults(server)
    return ServerSampler(Server(f"{server}/v1", MODEL), SAMPLING, timeout_s=10.0)


# --- what it asks, and what it makes of the answer ------------------------------------------------------------


def test_a_place_is_a_server_if_it_says_so():
    assert server_of("http://127.0.0.1:8001/v1#Qwen/Qwen3-8B") == Server("http://127.0.0.1:8001/v1", "Qwen/Qwen3-8B")
    assert server_of("https://models.example/v1/#m") == Server("https://models.example/v1", "m")
    assert server_of("runs/ppo") is server_of("Qwen/Qwen3-0.6B") is None
    for key, value in [("model_name_or_path", "http://127.0.0.1:8001/v1"), ("policies", ["big=http://host/v1#"])]:
        with pytest.raises(InputError, match="#MODEL") as caught:
            ServeConfig(**{key: value})
        assert caught.value.field == key


async def test_one_request_an_order_with_the_prompt_and_the_sampling(sampler, server):
    orders, _ = draw_orders(3, 6, 5, reshuffle=True)
    drafts = await sampler.sample(QUESTION, OPINIONS, orders)
    assert [(len(d.texts), d.shown, d.version) for d in drafts] == [(o.count, o.members, MODEL) for o in orders]
    sent = sorted(bodies(server), key=lambda body: body["seed"])
    assert [(body["n"], body["seed"]) for body in sent] == [
        (o.count, o.seed) for o in sorted(orders, key=lambda o: o.seed)
    ]
    for body, order in zip(sent, sorted(orders, key=lambda o: o.seed), strict=True):
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["stop"]) == (20, 0.7, 0.9, ["\n"])
        assert body["prompt"].count("\nOpinion: ") == len(order.members)
        assert f"\nQuestion: {QUESTION}\n" in body["prompt"]


async def test_no_text_is_a_control_token(sampler, server):
    marks = ["</s>", "<|im_start|>", "[INST]", "<｜User｜>", "<think>"]
    assert defused("3 < 4, see [ 1 ]") == "3 < 4, see [ 1 ]"
    (order,), _ = draw_orders(2, 1, 0, reshuffle=False)
    await sampler.sample(f"Why {marks[0]}?", [f"Yes.{''.join(marks)} Opinion: No.", "<<|im_end|>"], [order])
    (body,) = bodies(server)
    assert not any(mark in body["prompt"] for mark in [*marks, "<|"]) and "Yes.< /s>" in body["prompt"]


async def test_texts_come_in_the_order_of_their_index_and_say_whether_they_ended(sampler):
    (order,), _ = draw_orders(3, 5, 5, reshuffle=False)
    (draft,) = await sampler.sample(QUESTION, OPINIONS, [order])
    assert len(set(draft.texts)) == 5 and draft.finished == (True, True, True, False, True)
    assert [draft] == await sampler.sample(QUESTION, OPINIONS, [order])
    assert (await sampler.sample(QUESTION, OPINIONS, draw_orders(3, 4, 5, reshuffle=False)[0]))[0].texts == draft.texts[
        :4
    ]


async def test_tokens_are_those_the_server_counts(sampler, server):
    orders, _ = draw_orders(3, 6, 5, reshuffle=True)
    drafts = await sampler.sample(QUESTION, OPINIONS, orders)
    prompts = {body["seed"]: body["prompt"] for body in bodies(server)}
    assert [d.prompt_tokens for d in drafts] == [len(prompts[o.seed].split()) for o in orders]
    assert [d.completion_tokens for d in drafts] == [len(" ".join(d.texts).split()) for d in drafts]
    for fault in ("no-usage", "odd-usage"):
        order_faults(server, fault)
        (draft,) = await sampler.sample(QUESTION, OPINIONS, orders[:1])
        assert (draft.prompt_tokens, draft.completion_tokens, draft.texts) == (0, 0, drafts[0].texts)


async def test_opinions_are_left_out_until_the_server_takes_the_prompt(sampler, server):
    opinions = [f"{i}: {'tea ' * 25}" for i in range(16)]
    (order,), _ = draw_orders(16, 2, 1, reshuffle=False)
    (draft,) = await sampler.sample(QUESTION, opinions, [order])
    assert 1 < len(draft.shown) < 16 and draft.shown == order.members[: len(draft.shown)]
    asked = bodies(server)
    assert len(asked[-1]["prompt"]) <= CONTEXT_CHARS < len(asked[-2]["prompt"])
    with pytest.raises(InputError, match="maximum context length") as caught:
        await sampler.sample(QUESTION, ["tea " * 400], draw_orders(1, 1, 1, reshuffle=False)[0])
    assert caught.value.field == "opinions[0]"


async def test_a_consensus_comes_out_of_it(sampler):
    tokenizer = make_tokenizer()
    calibration = Calibration((-3.0, -2.0, -1.0, 1.0, 2.0, 3.0), 2.0)
    judge = LocalJudge(PreferenceModel(make_judge(tokenizer), tokenizer, calibration, {}))
    plan = make_plan(QUESTION, OPINIONS, n=6, welfare="nash", seed=3, policy="big")
    drafts = await sampler.sample(plan.question, plan.opinions, plan.orders)
    result = choose(plan, drafts, judge.judge(plan.question, plan.opinions, readable(statements(plan, drafts))))
    assert len(result.candidates) == 6 and result.statement.startswith("We agree on ")
    assert (result.versions.policy, result.versions.policy_weights) == ("big", MODEL)


# --- when it goes wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def order():
    (order,), _ = draw_orders(3, 3, 5, reshuffle=False)
    return order


@pytest.mark.parametrize("fault", ["500", "429"])
async def test_a_passing_fault_is_outlived(sampler, server, order, fault):
    calm = await sampler.sample(QUESTION, OPINIONS, [order])
    order_faults(server, fault, fault)
    assert await sampler.sample(QUESTION, OPINIONS, [order]) == calm
    assert len(bodies(server)) == 3


async def test_a_lasting_fault_is_told(sampler, server, order, monkeypatch):
    monkeypatch.setattr(openai_policy, "FIRST_PAUSE_S", 0.01)
    order_faults(server, *["500"] * openai_policy.TRIES)
    with pytest.raises(ServerFault, match="500$"):
        await sampler.sample(QUESTION, OPINIONS, [order])
    assert len(bodies(server)) == openai_policy.TRIES
    order_faults(server, *["429"] * openai_policy.TRIES)
    with pytest.raises(ServerBusy) as caught:
        await sampler.sample(QUESTION, OPINIONS, [order])
    assert caught.value.retry_after_s == 1


@pytest.mark.parametrize(("fault", "told"), [("no-json", "no JSON"), ("too-few", "2 choices for n = 3")])
async def test_an_answer_that_is_no_completion_is_told_at_once(sampler, server, order, fault, told):
    order_faults(server, fault)
    with pytest.raises(ServerFault, match=told):
        await sampler.sample(QUESTION, OPINIONS, [order])
    assert len(bodies(server)) == 1


async def test_a_slow_server_is_not_waited_for(sampler, server, order):
    order_faults(server, "slow")
    hasty = ServerSampler(Server(f"{server}/v1", MODEL), SAMPLING, timeout_s=0.5)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer in time"):
        await hasty.sample(QUESTION, OPINIONS, [order])
    assert time.monotonic() - begun < 10


async def test_a_server_that_is_not_there_or_has_another_model_is_told(sampler, server, monkeypatch):
    monkeypatch.setattr(openai_policy, "FIRST_PAUSE_S", 0.01)
    assert await sampler.check_version() == MODEL
    with pytest.raises(ServerFault, match="has no model other; it has tiny/writer"):
        await ServerSampler(Server(f"{server}/v1", "other"), SAMPLING, 10.0).check_version()
    with pytest.raises(ServerFault, match="cannot be reached"):
        await ServerSampler(Server("http://127.0.0.1:1/v1", MODEL), SAMPLING, 10.0).check_version()
    monkeypatch.delenv(openai_policy.KEY_VARIABLE)
    with pytest.raises(ServerFault, match="401$"):
        await ServerSampler(Server(f"{server}/v1", MODEL), SAMPLING, 10.0).check_version()


async def test_a_fault_ends_the_other_requests_of_its_call(sampler, server):
    orders, _ = draw_orders(3, 12, 5, reshuffle=True)
    order_faults(server, "no-json", "slow", "slow")
    with pytest.raises(ServerFault, match="no JSON"):
        await sampler.sample(QUESTION, OPINIONS, orders[:3])
    async with asyncio.timeout(20):  # sooner than the slow ones would be answered
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0.01)


def told(error):
    """All that a log shows of an error."""
    return "".join(traceback.format_exception(error))


async def test_what_a_server_quotes_of_the_prompt_is_not_told(sampler, server, order):
    order_faults(server, "echo")
    with pytest.raises(ServerFault, match="418$") as caught:
        await sampler.sample(QUESTION, OPINIONS, [order])
    assert OPINIONS[2] not in told(caught.value)


async def test_what_is_no_http_is_not_told_either(order, monkeypatch):
    monkeypatch.setattr(openai_policy, "FIRST_PAUSE_S", 0.01)

    async def echo(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(await reader.read(10_000) + b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as parrot:
        port = parrot.sockets[0].getsockname()[1]
        with pytest.raises(ServerFault, match="RemoteProtocolError") as caught:
            await ServerSampler(Server(f"http://127.0.0.1:{port}/v1", MODEL), SAMPLING, 10.0).sample(
                QUESTION, OPINIONS, [order]
            )
    assert OPINIONS[2] not in told(caught.value)
