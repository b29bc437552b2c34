"""A small server that speaks the OpenAI completions protocol, with faults to order.

Its completions are a pure function of prompt, seed and index, as the protocol's ``seed`` promises. Like vLLM it lists
its models, says how many tokens (here: words) it read and wrote, and refuses with 400 a prompt that does not fit its
context. ``POST /faults`` says what goes wrong with the next requests, one word each.

``python openai_server.py SOCKET``: the number of an inherited one, which listens already.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

MODEL, KEY = "tiny/writer", "open-sesame"
CONTEXT_CHARS = 1200
SLOW_S = 30.0

app = FastAPI()
faults: list[str] = []
seen: list[dict[str, Any]] = []


@app.post("/faults")
async def order(request: Request) -> None:
    """Replace the list of faults to come, and forget the requests seen."""
    faults[:], seen[:] = await request.json(), []


@app.get("/seen")
async def bodies() -> list[dict[str, Any]]:
    """Bodies of the completion requests since the last order."""
    return seen


@app.middleware("http")
async def guard(request: Request, call_next):
    if request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {KEY}":
        return JSONResponse({"error": {"message": "no valid API key"}}, 401)
    return await call_next(request)


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}


@app.post("/v1/completions")
async def completions(request: Request):
    body = await request.json()
    seen.append(body)
    fault = faults.pop(0) if faults else None
    if fault == "slow":
        await asyncio.sleep(SLOW_S)
    if fault == "500":
        return JSONResponse({"error": {"message": "out of luck"}}, 500)
    if fault == "echo":  # as servers do that quote what they refuse
        return JSONResponse({"error": {"message": f"cannot read {body['prompt']}"}}, 418)
    if fault == "429":
        return JSONResponse({"error": {"message": "too many"}}, 429, {"Retry-After": "1"})
    if fault == "no-json":
        return PlainTextResponse("<html>welcome</html>")
    if body["model"] != MODEL:
        return JSONResponse({"error": {"message": "no such model"}}, 404)
    if len(body["prompt"]) > CONTEXT_CHARS:
        message = f"This model's maximum context length is {CONTEXT_CHARS} characters."
        return JSONResponse({"error": {"message": message}}, 400)
    count = body["n"] - 1 if fault == "too-few" else body["n"]
    choices = [choice(body, index) for index in range(count)]
    answer = {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": choices[::-1]}
    if fault in ("no-usage", "odd-usage"):
        return answer | ({"usage": {"prompt_tokens": "many"}} if fault == "odd-usage" else {})
    read, wrote = len(body["prompt"].split()), sum(len(choice["text"].split()) for choice in choices)
    return answer | {"usage": {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}}


def choice(body: dict[str, Any], index: int) -> dict[str, Any]:
    mark = hashlib.sha256(f"{body['prompt']} {body['seed']} {index}".encode()).hexdigest()
    reason = "length" if index % 4 == 3 else "stop"
    return {"index": index, "text": f" We agree on {mark[:8]}.", "finish_reason": reason, "logprobs": None}


if __name__ == "__main__":
    door = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[door])
