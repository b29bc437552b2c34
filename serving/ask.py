"""``consensus ask``: put a group's opinions to a running service and print what it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deliberation.types import InputError
from serving.client import Client, ServiceError
from serving.schemas import ConsensusRequest, ConsensusResponse

KEY_VARIABLE = "CONSENSUS_API_KEY"
BAR = 30
"""Characters of the longest bar."""


@dataclass
class AskConfig:
    """Keys of ``consensus ask FILE``. The API key, where one is needed, is read from the variable CONSENSUS_API_KEY."""

    request: str = ""
    """YAML or JSON file with ``question``, ``opinions`` and, where wanted, ``n``, ``welfare``, ``policy``, ``seed``."""

    url: str = "http://127.0.0.1:8000"
    """Where the service listens."""

    json: bool = False
    """Print the whole response as JSON."""

    def __post_init__(self) -> None:
        if not self.request:
            raise InputError("request", self.request, "name a file: consensus ask question.yaml")
        if not Path(self.request).is_file():
            raise InputError("request", self.request, "is not a file; write question and opinions into one")


def read_request(path: str) -> ConsensusRequest:
    """The request in a YAML or JSON file.

    Raises:
        InputError: naming the field.
    """
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("request", path, f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError("request", path, "must hold question and opinions, e.g. question: Should tea be free?")
    try:
        return ConsensusRequest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        cause: Any = first.get("ctx", {}).get("error")
        mend = cause.mend if isinstance(cause, InputError) else first["msg"]
        raise InputError(".".join(map(str, first["loc"])) or "request", first.get("input"), mend) from error


def main(config: AskConfig) -> None:
    """Ask, and print."""
    request = read_request(config.request)
    fields = request.model_dump(exclude_none=True, exclude={"question", "opinions", "stream"})
    try:
        with Client(config.url, os.environ.get(KEY_VARIABLE)) as client:
            answer = client.consensus(request.question, request.opinions, **fields)
    except ServiceError as error:
        raise InputError(
            "url", config.url, f"{error}; is the service up, and the key in {KEY_VARIABLE} right?"
        ) from error
    print(answer.model_dump_json(indent=2) if config.json else shown(request, answer))


def shown(request: ConsensusRequest, answer: ConsensusResponse) -> str:
    """The answer for people: statement, every member's predicted agreement, warnings."""
    lines = [f"Question: {request.question}", "", answer.statement, ""]
    lines.append(f"Predicted agreement, 1 to 7 ({answer.welfare_used.name or answer.welfare_used.alpha} welfare "
                 f"{answer.welfare:.2f}; best of {len(answer.candidates)}):")  # fmt: skip
    for member in answer.members:
        bar = "#" * round(BAR * (member.agreement - 1) / 6)
        mark = "  likely dissents" if member.dissents else ""
        opinion = " ".join(request.opinions[member.member].split())
        lines.append(f"  {member.agreement:.1f} [{member.low}, {member.high}] {bar:<{BAR}} {opinion[:60]}{mark}")
    lines += ["", *(f"Note: {warning}" for warning in answer.warnings)]
    return "\n".join(lines).rstrip()
