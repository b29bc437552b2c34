"""Deliberations over the API: the organiser's part and a member's, with the client's time limits and patience.

with Client(url, key) as client:
    organiser = Organiser(client)
    created = organiser.create("Should tea be free?")
    with Participant.join(url, created.id, created.invite, "Anna", consent=True) as anna:
        anna.write("Yes, for all.")
        organiser.generate(created.id)
        for candidate in anna.look().candidates:
            anna.rate(candidate.id, agreement=6, quality=5)
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from serving.client import Client, ServiceError
from serving.session_schemas import (
    Created,
    DeliberationOut,
    DeliberationReport,
    Deliberations,
    Joined,
    Me,
    OpinionOut,
    RatingOut,
)
from serving.sessions import INVITE_PREFIX, MEMBER_PREFIX, new_token

PATH = "/v1/deliberations"


class Organiser:
    """Begins deliberations and leads them through their states."""

    def __init__(self, client: Client):
        self._client = client

    def create(self, question: str, **fields: Any) -> Created:
        """Begin one; further fields are those of ``NewDeliberation``."""
        body = {"question": question, "invite": new_token(INVITE_PREFIX), **fields}
        return Created.model_validate_json(self._client.send("POST", PATH, json=body).content)

    def look(self, deliberation_id: str) -> DeliberationOut:
        """How it stands."""
        return DeliberationOut.model_validate_json(self._client.send("GET", f"{PATH}/{deliberation_id}").content)

    def all(self) -> Iterator[DeliberationOut]:
        """All that the key's holder has begun, the newest first."""
        after: dict[str, str] = {}
        while True:
            page = Deliberations.model_validate_json(self._client.send("GET", PATH, params=after).content)
            yield from page.deliberations
            if page.next is None:
                return
            after = {"after": page.next}

    def generate(self, deliberation_id: str, poll_s: float = 0.1) -> DeliberationOut:
        """Freeze the opinions and wait until there are candidates.

        Raises:
            ServiceError: if none could be written.
        """
        return self._wait(deliberation_id, "generate", poll_s)

    def revise(self, deliberation_id: str, poll_s: float = 0.1) -> DeliberationOut:
        """Have the winner revised by the critiques, and wait for the second round's candidates.

        Raises:
            ServiceError: if none could be written.
        """
        return self._wait(deliberation_id, "revise", poll_s)

    def _wait(self, deliberation_id: str, verb: str, poll_s: float) -> DeliberationOut:
        self._client.send("POST", f"{PATH}/{deliberation_id}/{verb}")
        while (found := self.look(deliberation_id)).state == "generating":
            time.sleep(poll_s)
        if found.problem is not None:
            raise ServiceError(found.problem.detail, None, found.problem, None)
        return found

    def close(self, deliberation_id: str) -> DeliberationOut:
        """End the rating."""
        response = self._client.send("POST", f"{PATH}/{deliberation_id}/close")
        return DeliberationOut.model_validate_json(response.content)

    def report(self, deliberation_id: str) -> DeliberationReport:
        """What the group thinks of every candidate."""
        response = self._client.send("GET", f"{PATH}/{deliberation_id}/report")
        return DeliberationReport.model_validate_json(response.content)

    def erase(self, deliberation_id: str) -> None:
        """Remove it with everything in it."""
        self._client.send("DELETE", f"{PATH}/{deliberation_id}", gone=404)

    def export(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Ratings for training, from behind number ``after``."""
        for line in self._client.send("GET", "/v1/ratings/export", params={"after": after}).iter_lines():
            yield json.loads(line)


class Participant:
    """A member of one deliberation; a context manager.

    Args:
        url: of the service.
        deliberation_id: of the deliberation.
        token: the member's.
        client: further arguments of ``Client``.
    """

    def __init__(self, url: str, deliberation_id: str, token: str, **client: Any):
        self.token, self.deliberation = token, deliberation_id
        self._client, self._version = Client(url, key=token, **client), 0
        self._path = f"{PATH}/{deliberation_id}"

    @classmethod
    def join(
        cls, url: str, deliberation_id: str, invite: str, alias: str, *, consent: bool = False, **client: Any
    ) -> Participant:
        """Come in with the invite token."""
        participant = cls(url, deliberation_id, new_token(MEMBER_PREFIX), **client)
        body = {"invite": invite, "alias": alias, "consent": consent, "token": participant.token}
        Joined.model_validate_json(
            participant._client.send("POST", f"{PATH}/{deliberation_id}/members", json=body).content
        )
        return participant

    def __enter__(self) -> Participant:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def look(self) -> Me:
        """The deliberation as this member sees it."""
        me = Me.model_validate_json(self._client.send("GET", f"{self._path}/me").content)
        self._version = me.version
        return me

    def consent(self, yes: bool) -> Me:
        """Let training have what this member said and will say, or not."""
        response = self._client.send("PATCH", f"{self._path}/me", json={"consent": yes})
        return Me.model_validate_json(response.content)

    def write(self, text: str) -> int:
        """Write an opinion over the version last seen; returns the new version."""
        headers = {"If-Match": f'"{self._version}"'}
        response = self._client.send("PUT", f"{self._path}/opinion", json={"text": text}, headers=headers)
        self._version = OpinionOut.model_validate_json(response.content).version
        return self._version

    def rate(self, candidate: str, agreement: int, quality: int) -> RatingOut:
        """Rate a candidate; it is on disk when this returns."""
        body = {"candidate": candidate, "agreement": agreement, "quality": quality}
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return RatingOut.model_validate_json(
            self._client.send("POST", "/v1/ratings", json=body, headers=headers).content
        )

    def compare(self, better: str, worse: str, *, tie: bool = False) -> None:
        """Say which of two candidates is better."""
        self._client.send("POST", "/v1/comparisons", json={"better": better, "worse": worse, "tie": tie})

    def criticise(self, text: str) -> None:
        """Say what is wrong with the winner."""
        self._client.send("POST", "/v1/critiques", json={"text": text})

    def leave(self) -> None:
        """Erase this member's opinion, ratings and critiques."""
        self._client.send("DELETE", f"{self._path}/me", gone=401)  # whoever has left has no token any more
