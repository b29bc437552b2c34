"""API keys: shown once, kept as a digest, with scopes and a rate; and who a request comes from.

Rates are counted by each process that answers, so two API replicas let a key do twice as much at most.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine, insert, select, update

from deliberation.types import InputError
from serving.problems import ApiError
from serving.store import reading
from serving.tables import api_keys

CONSENSUS, ADMIN = "consensus:write", "admin:read"
SCOPES = (CONSENSUS, "ratings:write", ADMIN)
"""What a key may be for."""
DEFAULT_RATE = 600
"""Requests a minute of a new key."""
POLICY = "minute"
"""Name of the rate in responses."""
PREFIX = "cm_"
KNOWN_FOR_S = 5.0
"""How long a process remembers a secret: a revoked or rotated one is refused after so many seconds at the latest."""
FULL_AFTER_S = 60.0
"""A bucket that nobody took from for so long is full, whatever its rate, and need not be kept."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the key's id, what it may do, and how many requests a minute."""

    id: str
    scopes: frozenset[str]
    rate_per_minute: int


ANYBODY = Caller("anybody", frozenset(SCOPES), 0)
"""The caller of a service without keys; a rate of 0 is none."""


@dataclass(frozen=True)
class Key:
    """What is known of a key, without its secret; times in seconds since 1970."""

    id: str
    name: str
    scopes: tuple[str, ...]
    rate_per_minute: int
    created: float
    revoked: float | None


def create_key(
    engine: Engine, name: str, scopes: tuple[str, ...] = (CONSENSUS,), rate_per_minute: int = DEFAULT_RATE
) -> tuple[Key, str]:
    """Make a key; returns it and its secret, which nobody can read again.

    Raises:
        InputError: on an empty name, an unknown scope or a rate below 1.
    """
    if not name.strip() or len(name) > 200:
        raise InputError("name", name, "give a name of 1 to 200 characters, to know the key by")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InputError("scopes", unknown or scopes, f"must be some of {', '.join(SCOPES)}")
    if rate_per_minute < 1:
        raise InputError("rate_per_minute", rate_per_minute, "must be at least 1")
    secret = _new_secret()
    key = Key(f"key_{secrets.token_hex(8)}", name, scopes, rate_per_minute, time.time(), None)
    row = {
        "id": key.id,
        "name": name,
        "digest": digest(secret),
        "scopes": " ".join(scopes),
        "rate_per_minute": rate_per_minute,
        "created": key.created,
    }
    with engine.begin() as connection:
        connection.execute(insert(api_keys).values(row))
    return key, secret


def list_keys(engine: Engine) -> list[Key]:
    """All keys, the oldest first, revoked ones too."""
    with reading(engine) as connection:
        rows = connection.execute(select(api_keys).order_by(api_keys.c.created)).all()
    return [Key(r.id, r.name, tuple(r.scopes.split()), r.rate_per_minute, r.created, r.revoked) for r in rows]


def revoke_key(engine: Engine, key_id: str) -> None:
    """End a key for good.

    Raises:
        InputError: field ``id``, if there is no such key, or it was revoked before.
    """
    _change_live(engine, key_id, "revoked", revoked=time.time())


def rotate_key(engine: Engine, key_id: str) -> str:
    """Give a key another secret, and return it; nobody can read it again. All else stays, and all that is the key's.

    Raises:
        InputError: field ``id``, if there is no such key, or it was revoked before.
    """
    secret = _new_secret()
    _change_live(engine, key_id, "rotated", digest=digest(secret))
    return secret


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _change_live(engine: Engine, key_id: str, what: str, **values: object) -> None:
    live = (api_keys.c.id == key_id) & api_keys.c.revoked.is_(None)
    with engine.begin() as connection:
        if connection.execute(update(api_keys).where(live).values(values)).rowcount == 0:
            raise InputError("id", key_id, f"is no key that could be {what}; `consensus keys list` shows them")


def digest(secret: str) -> str:
    """SHA-256, hexadecimal: secrets are 256 random bits, so nothing slower is needed."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class Doorkeeper:
    """Tells who sends a request, and whether they have sent too many; in any number of threads.

    Args:
        engine: where the keys are; None lets everybody in.
    """

    def __init__(self, engine: Engine | None, clock: Callable[[], float] = time.monotonic):
        self._engine, self._clock = engine, clock
        self.has_keys = engine is not None
        self._known: dict[str, tuple[float, Caller | None]] = {}
        self._buckets: dict[str, tuple[float, float]] = {}  # caller -> tokens in it, and since when
        self._swept = clock()
        self._counting = threading.Lock()

    def admit(self, secret: str | None, scope: str) -> Caller:
        """The caller, if the secret is a key's that has the scope and has not used up its rate.

        Raises:
            ApiError: ``unauthorized``, ``forbidden`` or ``rate-limited``.
        """
        if self._engine is None:
            return ANYBODY
        caller = self._find(secret) if secret else None
        if caller is None:
            detail = "send Authorization: Bearer and a key; `consensus keys create` makes one"
            raise ApiError("unauthorized", detail, {"WWW-Authenticate": "Bearer"})
        if scope not in caller.scopes:
            raise ApiError("forbidden", f"the key has {' '.join(sorted(caller.scopes))}; this needs {scope}")
        self.count(caller)
        return caller

    def _find(self, secret: str) -> Caller | None:
        now, name = self._clock(), digest(secret)
        until, caller = self._known.get(name, (-1.0, None))
        if until < now:
            assert self._engine is not None
            live = (api_keys.c.digest == name) & api_keys.c.revoked.is_(None)
            with reading(self._engine) as connection:
                row = connection.execute(select(api_keys).where(live)).one_or_none()
            caller = None if row is None else Caller(row.id, frozenset(row.scopes.split()), row.rate_per_minute)
            if caller is not None:  # guesses are not remembered: they would fill the memory
                self._known[name] = (now + KNOWN_FOR_S, caller)
        return caller

    def count(self, caller: Caller) -> None:
        """A token bucket that holds a minute's requests.

        Raises:
            ApiError: ``rate-limited``.
        """
        with self._counting:
            self._drop_full()
            tokens = self._tokens(caller)
            if tokens >= 1:
                self._buckets[caller.id] = (tokens - 1, self._clock())
                return
        headers = self.limits(caller) | {"Retry-After": str(_window(tokens, caller.rate_per_minute))}
        raise ApiError("rate-limited", f"{caller.rate_per_minute} requests a minute are allowed", headers)

    def _drop_full(self) -> None:
        """Once a minute: members come and go, and their buckets would fill the memory."""
        old = self._clock() - FULL_AFTER_S
        if self._swept <= old:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket[1] > old}
            self._swept = self._clock()

    def limits(self, caller: Caller) -> dict[str, str]:
        """What a response tells of the caller's rate, in the fields of draft-ietf-httpapi-ratelimit-headers-11."""
        quota = caller.rate_per_minute
        if not quota:
            return {}
        tokens = self._tokens(caller)
        return {
            "RateLimit-Policy": f'"{POLICY}";q={quota};w=60',
            "RateLimit": f'"{POLICY}";r={int(tokens)};t={_window(tokens, quota)}',
        }

    def _tokens(self, caller: Caller) -> float:
        """What the caller's bucket holds now."""
        full = float(caller.rate_per_minute)
        tokens, since = self._buckets.get(caller.id, (full, self._clock()))
        return min(full, tokens + (self._clock() - since) * full / 60)


def _window(tokens: float, quota: int) -> int:
    """Whole seconds until a bucket is full again, or until it holds one request if there is none in it; at least 1."""
    goal = 1 if tokens < 1 else quota
    return max(1, math.ceil((goal - tokens) * 60 / quota))
