"""``consensus keys create|list|rotate|revoke``: the API keys of a service, in its database."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from deliberation.types import InputError
from serving.config import ServeConfig
from serving.keys import CONSENSUS, DEFAULT_RATE, Key, create_key, list_keys, revoke_key, rotate_key
from serving.store import check_there, open_store

ACTIONS = ("create", "list", "rotate", "revoke")


@dataclass
class KeysConfig:
    """Keys of ``consensus keys ACTION``."""

    action: str = ""
    """``create``, ``list``, ``rotate`` (a new secret for the same key) or ``revoke``."""

    name: str = ""
    """create: what to know the key by."""

    scopes: list[str] = field(default_factory=lambda: [CONSENSUS])
    """create: what the key is for: ``consensus:write``, ``ratings:write``, ``admin:read``."""

    rate_per_minute: int = DEFAULT_RATE
    """create: requests a minute, of each API replica."""

    id: str = ""
    """rotate, revoke: the key's id, as ``list`` shows it."""

    database: str = ServeConfig.database
    """URL of the service's database."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InputError("action", self.action, f"must be one of {', '.join(ACTIONS)}: consensus keys list")


def main(config: KeysConfig) -> None:
    """Do it, and print what there is to know."""
    if config.action != "create":
        check_there(config.database)
    engine = open_store(config.database)
    if config.action == "create":
        key, secret = create_key(engine, config.name, tuple(config.scopes), config.rate_per_minute)
        print(_shown_once(key.id, secret))
    elif config.action == "rotate":
        print(_shown_once(config.id, rotate_key(engine, config.id)))
        print("The secret before it is refused; processes that know it forget it within seconds.")
    elif config.action == "revoke":
        revoke_key(engine, config.id)
        print(f"{config.id} is revoked; processes that know it forget it within seconds.")
    else:
        print(
            "\n".join(map(_line, list_keys(engine)))
            or f"no keys in {config.database} yet; consensus keys create --name NAME"
        )


def _shown_once(key_id: str, secret: str) -> str:
    return f"{key_id}\n{secret}\n\nKeep the second line: it is not shown again. Send it as Authorization: Bearer."


def _line(key: Key) -> str:
    made = time.strftime("%Y-%m-%d", time.gmtime(key.created))
    state = "live" if key.revoked is None else f"revoked {time.strftime('%Y-%m-%d', time.gmtime(key.revoked))}"
    return f"{key.id}  {made}  {state}  {' '.join(key.scopes)}  {key.rate_per_minute}/min  {key.name}"
