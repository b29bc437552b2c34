"""A policy behind an OpenAI-compatible server (vLLM, SGLang, ...), sampled by its completions endpoint."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import httpx

from deliberation.prompts import statement_prompt
from deliberation.types import InputError
from serving.config import Sampling, Server
from serving.exchange import Draft, Order

KEY_VARIABLE = "CONSENSUS_POLICY_KEY"
"""Environment variable with the server's API key, where it wants one."""

TRIES = 4
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
REFUSED = (400, 413, 422)
"""Statuses of a server that cannot take the request as it is: in our requests, only the prompt's length varies."""


class ServerFault(RuntimeError):
    """The policy's server cannot be reached, or answers what it should not.

    Faults are logged, so none quotes the server's words: they may quote the prompt, and with it what members said.
    """


class ServerBusy(RuntimeError):
    """The policy's server has too much to do; it may take the request after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"the policy's server is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ServerSampler:
    """An ``AsyncSampler`` on a server's ``POST /completions``: one request an order, with its ``n`` and ``seed``.

    The same seed gives the same drafts if the server keeps that promise. How many opinions fit is the server's to say:
    when it refuses a prompt, a quarter fewer are shown until it takes it, so at least three quarters of what would fit.
    A server that cuts long prompts in silence must not be used: the answer would call opinions shown that were not.

    Args:
        server: URL and model.
        sampling: length, temperature, top_p.
        timeout_s: of one HTTP request, above 0.
    """

    def __init__(self, server: Server, sampling: Sampling, timeout_s: float):
        self._server, self._sampling = server, sampling
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.AsyncClient(
            base_url=f"{server.url}/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
        )

    async def check_version(self) -> str:
        """The model's name, once the server lists it.

        Raises:
            ServerFault: if it does not, or cannot be reached. ServerBusy, TimeoutError: as ``sample``.
        """
        listed = _json(await self._request("GET", "models"))
        try:
            names = [model["id"] for model in listed["data"]]
        except (TypeError, KeyError) as error:
            raise ServerFault(f"{self._server.url}/models answers no list of models") from error
        if self._server.model not in names:
            raise ServerFault(f"{self._server.url} has no model {self._server.model}; it has {', '.join(names)}")
        return self._server.model

    async def sample(self, question: str, opinions: Sequence[str], orders: Sequence[Order]) -> list[Draft]:
        """One draft an order.

        Raises:
            InputError: if the server refuses even the question with one opinion.
            ServerBusy: if it still answers 429 after ``TRIES`` tries.
            TimeoutError: if it takes longer than ``timeout_s``.
            ServerFault: if it cannot be reached, still answers 5xx after ``TRIES`` tries, or anything but a completion.

        What one request raises ends the others too.
        """
        tasks = [asyncio.ensure_future(self._draft(question, opinions, order)) for order in orders]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _draft(self, question: str, opinions: Sequence[str], order: Order) -> Draft:
        shown = order.members
        while True:
            response = await self._request("POST", "completions", self._body(question, opinions, shown, order))
            if response.status_code not in REFUSED:
                answer = _json(response)
                texts, finished = self._completions(answer, order.count)
                return Draft(texts, finished, shown, self._server.model, *_usage(answer))
            if len(shown) == 1:
                mend = f"the policy's server refuses it with the question ({response.text[:200]}): shorten either"
                raise InputError(f"opinions[{shown[0]}]", opinions[shown[0]], mend)
            shown = shown[: len(shown) * 3 // 4]

    def _body(self, question: str, opinions: Sequence[str], shown: Sequence[int], order: Order) -> dict[str, Any]:
        return {
            "model": self._server.model,
            "prompt": statement_prompt(defused(question), [defused(opinions[member]) for member in shown]),
            "n": order.count,
            "seed": order.seed,
            "max_tokens": self._sampling.max_new_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "stop": ["\n"],
        }

    def _completions(self, answer: Any, count: int) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """Texts of the ``count`` completions, by index, and whether each ended by itself."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts = tuple(choice["text"] for choice in choices)
            finished = tuple(choice["finish_reason"] == "stop" for choice in choices)
            good = len(choices) == count and all(isinstance(text, str) for text in texts)
        except (TypeError, KeyError) as error:
            raise ServerFault(f"{self._server.url}/completions answers no completion") from error
        if not good:
            raise ServerFault(f"{self._server.url}/completions answers {len(choices)} choices for n = {count}")
        return texts, finished

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """A response with status 200 or one of ``REFUSED``; what may pass is tried again."""
        for tried in range(1, TRIES + 1):
            last = tried == TRIES
            pause = FIRST_PAUSE_S * 2 ** (tried - 1)
            try:
                response = await self._http.request(method, path, json=body)
            except httpx.TimeoutException as error:
                raise TimeoutError(f"{self._server.url}/{path} did not answer in time") from error
            except httpx.TransportError as error:
                if last:  # its type alone: its text may quote what the server sent
                    raise ServerFault(f"{self._server.url}/{path} cannot be reached ({type(error).__name__})") from None
            else:
                if response.status_code in (200, *REFUSED):
                    return response
                if response.status_code != 429 and response.status_code < 500:
                    raise ServerFault(_status(response))
                pause = max(pause, _retry_after(response))
                if last and response.status_code == 429:
                    raise ServerBusy(math.ceil(pause))
                if last:
                    raise ServerFault(_status(response))
            await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
        raise AssertionError("not reached")


def defused(text: str) -> str:
    """The text with a space after every ``<`` and ``[``: the server's tokenizer finds no control token in it.

    Control tokens (``</s>``, ``<|im_end|>``, ``[INST]``) begin with one of the two in all common tokenizers.
    """
    return re.sub(r"[<\[](?=\S)", r"\g<0> ", text)


def _json(response: httpx.Response) -> Any:
    """The body of a response with status 200."""
    try:
        if response.status_code == 200:
            return response.json()
    except ValueError as error:
        raise ServerFault(f"{response.request.url} answers no JSON") from error
    raise ServerFault(_status(response))


def _usage(answer: Any) -> tuple[int, int]:
    """Tokens read and written, by the completion's ``usage``; 0 where it has none."""
    usage = answer.get("usage")
    said = usage if isinstance(usage, dict) else {}
    read, wrote = (said.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
    return max(0, read) if isinstance(read, int) else 0, max(0, wrote) if isinstance(wrote, int) else 0


def _status(response: httpx.Response) -> str:
    return f"{response.request.url} answers {response.status_code}"


def _retry_after(response: httpx.Response) -> float:
    """Seconds of the ``Retry-After`` header; 0 if there is none, or a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0
