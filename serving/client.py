"""A client of the service that does what every client should: time limits, patience, idempotency keys.

client = Client("http://127.0.0.1:8000", key="cm_...")
answer = client.consensus("Should tea be free?", ["Yes.", "Only green tea."])
print(answer.statement)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx
from pydantic import ValidationError

from serving.schemas import (
    ConsensusResponse,
    Problem,
    RequestState,
)
from serving.scoring_schemas import AggregateResponse, Models, ScoreResponse

RETRIED = (408, 409, 429)
"""Statuses below 500 that may go away by themselves."""
LONGEST_PAUSE_S = 10.0
LONGEST_RETRY_AFTER_S = 60.0
"""Longest ``Retry-After`` that is waited for: the service never says more, and a proxy's hour is nobody's to wait."""


class ServiceError(Exception):
    """The service refused, or failed again and again.

    Attributes:
        status: HTTP status; None if nothing answered.
        problem: what the service said; None if it was not the service that answered.
        request_id: for whoever reads the service's log; None if nothing answered.
    """

    def __init__(self, message: str, status: int | None, problem: Problem | None, request_id: str | None):
        super().__init__(message)
        self.status, self.problem, self.request_id = status, problem, request_id


class _InProgress(ServiceError):
    """An earlier try of this request is still being answered, as the request ``id``."""

    def __init__(self, message: str, status: int, problem: Problem, request_id: str | None, id: str):
        super().__init__(message, status, problem, request_id)
        self.id = id


class Client:
    """Calls one service; a context manager, since it keeps connections open.

    Args:
        url: e.g. ``http://127.0.0.1:8000``.
        key: an API key, where the service needs one.
        timeout_s: of one try, seconds.
        tries: of one call, 1 or more; connection errors, 408, 409, 429 and 5xx are tried again.
        pause_s: before the second try, seconds; doubled before each further one up to ``LONGEST_PAUSE_S``, and never
            shorter than the service's ``Retry-After``, of which ``LONGEST_RETRY_AFTER_S`` count.
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout_s: float = 130.0, tries: int = 8, pause_s: float = 0.2
    ):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No proxies from the environment for a service on this machine or network
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False)
        self._tries, self._pause_s = tries, pause_s

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def consensus(self, question: str, opinions: Sequence[str], **fields: Any) -> ConsensusResponse:
        """The statement the group would endorse; waits, also where the service answers in the background or, after a
        lost connection, is still at the first try.

        Args:
            fields: further ones of ``ConsensusRequest``: ``n``, ``welfare``, ``policy``, ``seed``, ``influence``.

        Raises:
            ServiceError
        """
        body = {"question": question, "opinions": list(opinions), **fields}
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        for k in range(self._tries):
            try:
                response = self.send("POST", "/v1/consensus", json=body, headers=headers)
            except _InProgress as error:
                answer = self._earlier(error.id)
                if answer is not None:
                    return answer
                time.sleep(self._pause(k, None))
            else:
                if response.status_code == 202:
                    return self.wait(response.json()["id"])
                return ConsensusResponse.model_validate_json(response.content)
        raise ServiceError(f"the request came to nothing {self._tries} times", None, None, None)

    def _earlier(self, request_id: str) -> ConsensusResponse | None:
        """The answer of an earlier try, waited for; None if that failed: its idempotency key is free again then."""
        try:
            return self.wait(request_id)
        except ServiceError as error:
            if error.status != 404 or error.problem is None:
                raise
            return None

    def start(self, question: str, opinions: Sequence[str], **fields: Any) -> RequestState:
        """Have the request answered in the background; see ``wait``, ``state``, ``erase``."""
        body = {"question": question, "opinions": list(opinions), **fields}
        headers = {"Idempotency-Key": uuid.uuid4().hex, "Prefer": "respond-async"}
        return RequestState.model_validate_json(self.send("POST", "/v1/consensus", json=body, headers=headers).content)

    def state(self, request_id: str) -> RequestState:
        """How a request in the background stands."""
        return RequestState.model_validate_json(self.send("GET", f"/v1/consensus/{request_id}").content)

    def wait(self, request_id: str, poll_s: float = 0.5) -> ConsensusResponse:
        """The answer of a request in the background, once it is there.

        Raises:
            ServiceError: if it failed or was erased.
        """
        while (state := self.state(request_id)).status == "running":
            time.sleep(poll_s)
        if state.result is None:
            problem = state.problem
            raise ServiceError(problem.detail if problem else "no answer", None, problem, None)
        return state.result

    def erase(self, request_id: str) -> None:
        """End a request in the background, and erase what was recorded of it."""
        self.send("DELETE", f"/v1/consensus/{request_id}", gone=404)

    def events(self, request_id: str, after: int | None = None) -> Iterator[tuple[str, str]]:
        """(type, JSON data) of every event behind number ``after``, as they come; goes on where a connection broke."""
        tries = 0
        while True:
            try:
                for number, kind, data in self._stream(request_id, after):
                    yield kind, data
                    after, tries = number, 0
                    if kind in ("done", "error"):
                        return
                failure = ServiceError("the stream ended early", None, None, None)
            except httpx.TransportError as error:
                failure = _nothing(error)
            except ServiceError as error:
                if not _passing(error):
                    raise
                failure = error
            tries += 1
            if tries == self._tries:
                raise failure
            time.sleep(self._pause(tries - 1, None))

    def _stream(self, request_id: str, after: int | None) -> Iterator[tuple[int | None, str, str]]:
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._http.stream("GET", f"/v1/consensus/{request_id}/events", headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            yield from _events(response.iter_lines())

    def score(self, question: str, opinions: Sequence[str], statements: Sequence[str]) -> ScoreResponse:
        """What every member is predicted to think of every statement."""
        body = {"question": question, "opinions": list(opinions), "statements": list(statements)}
        return ScoreResponse.model_validate_json(self.send("POST", "/v1/score", json=body).content)

    def aggregate(self, utilities: Sequence[Sequence[float]], **fields: Any) -> AggregateResponse:
        """Welfare and ranking of utilities [members][statements]; ``welfare`` and ``weights`` as in the request."""
        body = {"utilities": [list(row) for row in utilities], **fields}
        return AggregateResponse.model_validate_json(self.send("POST", "/v1/aggregate", json=body).content)

    def models(self) -> Models:
        """Which policies there are, and which weights answer."""
        return Models.model_validate_json(self.send("GET", "/v1/models").content)

    def send(self, method: str, path: str, *, gone: int | None = None, **request: Any) -> httpx.Response:
        """The response of the first try that succeeds.

        Args:
            gone: status that, from the second try on, says that an earlier one did it and its answer was lost: a
                deletion's. That response is then returned.

        Raises:
            ServiceError: on what trying again cannot mend, or after the last try.
        """
        for k in range(self._tries):
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                failure, wait = _nothing(error), None
            else:
                if response.is_success:
                    return response
                failure, wait = _error(response), response.headers.get("retry-after")
                if k and failure.problem is not None and failure.status == gone:
                    return response
                if not _passing(failure):
                    raise failure
            if k + 1 < self._tries:
                time.sleep(self._pause(k, wait))
        raise failure

    def _pause(self, k: int, wait: str | None) -> float:
        asked = float(wait) if wait is not None and wait.isdigit() else 0.0
        return max(min(LONGEST_RETRY_AFTER_S, asked), min(LONGEST_PAUSE_S, self._pause_s * 2**k))


def _nothing(error: httpx.TransportError) -> ServiceError:
    return ServiceError(f"{type(error).__name__}: {error}", None, None, None)


def _error(response: httpx.Response) -> ServiceError:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # a proxy's words, not the service's
        problem = None
    detail = response.reason_phrase if problem is None else problem.detail
    message, request_id = f"{response.status_code}: {detail}", response.headers.get("x-request-id")
    if problem is not None and problem.type.endswith(":in-progress") and "location" in response.headers:
        place = response.headers["location"].rsplit("/", 1)[-1]
        return _InProgress(message, response.status_code, problem, request_id, place)
    return ServiceError(message, response.status_code, problem, request_id)


def _passing(error: ServiceError) -> bool:
    """Whether the same request may succeed later. A 404 that is no problem of the service's is a proxy's, starting."""
    if error.status is None:
        return True
    if isinstance(error, _InProgress):  # may take longer than all tries: its state is asked for instead
        return False
    return error.status in RETRIED or error.status >= 500 or (error.status == 404 and error.problem is None)


def _events(lines: Iterator[str]) -> Iterator[tuple[int | None, str, str]]:
    """(number, type, data) of server-sent events; comments, and events without data, are none."""
    number: int | None = None
    kind, data = "", []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            number = int(value)
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif not line:
            if data:
                yield number, kind or "message", "\n".join(data)
            kind, data = "", []
