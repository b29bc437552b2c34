"""``consensus store backup|restore|check|migrate``: the service's database, as a file and as it is."""

from __future__ import annotations

from dataclasses import dataclass

from deliberation.types import InputError
from serving.backup import backup, check, restore
from serving.config import ServeConfig
from serving.migrate import NEWEST, answering, migrate
from serving.store import connect

ACTIONS = ("backup", "restore", "check", "migrate")


@dataclass
class StoreConfig:
    """Keys of ``consensus store ACTION``."""

    action: str = ""
    """``backup``, ``restore`` (into an empty database), ``check`` or ``migrate`` (to this version's tables)."""

    file: str = ""
    """backup, restore: the backup, e.g. ``service.jsonl.gz``."""

    database: str = ServeConfig.database
    """URL of the service's database."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InputError("action", self.action, f"must be one of {', '.join(ACTIONS)}: consensus store check")
        if not self.file and self.action in ("backup", "restore"):
            raise InputError("file", self.file, "name the backup: --file service.jsonl.gz")


def main(config: StoreConfig) -> None:
    """Do it, and print what there is to know."""
    engine = connect(config.database)
    with answering(engine):
        if config.action == "backup":
            print(f"{config.file}: {_counts(backup(engine, config.file))}")
        elif config.action == "restore":
            print(f"restored: {_counts(restore(engine, config.file))}")
        elif config.action == "check":
            revision, rows = check(engine)
            print(f"sound, tables of revision {revision}: {_counts(rows)}")
        else:
            migrate(engine)
            print(f"tables of revision {NEWEST}")


def _counts(rows: dict[str, int]) -> str:
    told = ", ".join(f"{count} {table}" for table, count in rows.items() if count)
    return f"{sum(rows.values())} rows" + (f" ({told})" if told else "")
