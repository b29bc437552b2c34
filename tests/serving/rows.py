"""Rows for every table of the service: one deliberation of an experiment, and as much of 0.1.0's tables."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, MetaData, insert, select

RELEASED: dict[str, list[dict[str, Any]]] = {
    "api_keys": [
        {"id": "key_1", "name": "anna", "digest": "d1", "scopes": "consensus:write", "rate_per_minute": 60,
         "created": 1.5, "revoked": None},
        {"id": "key_2", "name": "Žofie 🌱", "digest": "d2", "scopes": "admin:read", "rate_per_minute": 6,
         "created": 2.0, "revoked": 3.25},
    ],
    "consensus_requests": [
        {"id": "con_1", "owner": "key_1", "idempotency_key": "a", "fingerprint": "f", "body": '{"n": 4}',
         "state": "done", "answer": '"yes"', "runner": "r", "lease": 1.1, "created": 0.1 + 0.2},
        {"id": "con_2", "owner": "key_1", "idempotency_key": None, "fingerprint": "f", "body": "two\nlines\u2028",
         "state": "running", "answer": None, "runner": "r", "lease": 1e300, "created": 4.0},
    ],
    "consensus_events": [
        {"request": "con_1", "number": k, "type": "queued", "data": "{}"} for k in range(3)
    ],
}  # fmt: skip
"""Of the tables of 0.1.0."""

ADDED: dict[str, list[dict[str, Any]]] = {
    "experiments": [
        {"id": "exp_1", "owner": "key_1", "name": "two models", "spec": "{}", "salt": "s", "created": 1.0,
         "stopped": 9.0, "verdict": "{}"},
    ],
    "deliberations": [
        {"id": "del_1", "owner": "key_1", "question": "Should tea be free?", "settings": "{}", "state": "closed",
         "round": 1, "invite": "i1", "salt": "s", "generation": "gen_1", "problem": None, "experiment": "exp_1",
         "created": 1.0, "closed": 8.0},
    ],
    "members": [
        {"id": f"mbr_{k}", "deliberation": "del_1", "number": k, "alias": f"member {k}", "token": f"t{k}",
         "consent": k != 1, "created": 1.0} for k in range(3)
    ],
    "opinions": [
        {"member": "mbr_0", "version": 1, "text": "Tea for all.", "created": 1.0},
        {"member": "mbr_0", "version": 2, "text": "Tea for all, at once.", "created": 2.0},
        {"member": "mbr_1", "version": 1, "text": "No free tea.", "created": 1.0},
        {"member": "mbr_2", "version": 1, "text": "Green tea alone.", "created": 1.0},
    ],
    "candidates": [
        {"id": f"can_{k}", "deliberation": "del_1", "round": 1, "number": k, "statement": f"Statement {k}.",
         "policy": "default", "versions": f'{{"policy_weights": "sha256:{k}"}}', "welfare": 0.1 * k,
         "predicted": "{}", "winner": k == 0, "created": 3.0} for k in range(2)
    ],
    "ratings": [
        {"number": 1, "member": "mbr_0", "candidate": "can_0", "version": 1, "current": False, "agreement": 2,
         "quality": 3, "idempotency_key": "k", "created": 4.0},
        {"number": 2, "member": "mbr_0", "candidate": "can_0", "version": 2, "current": True, "agreement": 7,
         "quality": 6, "idempotency_key": None, "created": 5.0},
        {"number": 3, "member": "mbr_1", "candidate": "can_0", "version": 1, "current": True, "agreement": 1,
         "quality": 1, "idempotency_key": None, "created": 5.0},
        {"number": 7, "member": "mbr_2", "candidate": "can_1", "version": 1, "current": True, "agreement": 4,
         "quality": 5, "idempotency_key": None, "created": 6.0},
    ],
    "comparisons": [
        {"number": 1, "member": "mbr_0", "better": "can_0", "worse": "can_1", "tie": False, "current": True,
         "created": 6.0},
    ],
    "critiques": [{"member": "mbr_1", "candidate": "can_0", "text": "It costs too much.", "created": 6.0}],
    "assignments": [
        {"experiment": "exp_1", "deliberation": "del_1", "arm": None, "propensity": 1.0, "created": 2.0},
    ],
    "exposures": [
        {"deliberation": "del_1", "arm": "old", "candidate": "can_0", "experiment": "exp_1", "propensity": 0.25,
         "seconds": 1.5, "shown": 3.5},
    ],
    "arm_failures": [
        {"number": 1, "experiment": "exp_1", "deliberation": "del_1", "arm": "new", "type": "t", "created": 2.0},
    ],
    "lineage": [
        {"id": "lin_1", "kind": "export", "made_from": "[]", "print": "sha256:1", "place": "x.jsonl", "created": 7.0},
    ],
}  # fmt: skip
"""Of the tables that came after."""


def fill(engine: Engine, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Insert the rows into the tables as the database has them."""
    with engine.begin() as connection:
        found = MetaData()
        found.reflect(connection)
        for table in found.sorted_tables:
            if table.name in rows:
                connection.execute(insert(table), rows[table.name])
        if engine.dialect.name == "postgresql":  # rows with a number of their own do not move the counters
            for table in {"ratings", "comparisons", "arm_failures"} & set(rows):
                last = f"SELECT max(number) FROM {table}"
                connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('{table}', 'number'), ({last}))")


def held(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables but Alembic's, in the order of their first columns."""
    with engine.connect() as connection:
        found = MetaData()
        found.reflect(connection)
        return {
            table.name: sorted(
                (dict(row) for row in connection.execute(select(table)).mappings()),
                key=lambda row: [str(value) for value in row.values()],
            )
            for table in found.sorted_tables
            if table.name != "alembic_version"
        }
