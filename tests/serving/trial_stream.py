"""Made-up deliberations of an experiment, written straight into the tables: nobody joins, writes or rates for real."""

from __future__ import annotations

import json
import time
from itertools import count

import numpy as np
from sqlalchemy import insert, update

from serving import trials
from serving.experiments import Arm, Spec
from serving.store import new_id
from serving.tables import candidates, deliberations, members, ratings

OWNER = "key_anna"
A, B, C = (Arm(name, "default", 4, "nash") for name in ("ppo", "rerank", "third"))
PAIRED = Spec((A, B), minimum=5, maximum=200)
BETWEEN = Spec((A, B), mode="between", minimum=5, maximum=200)
_times = count(1)


def drawn(shift, rng, size=5):
    """Ratings [members] of two statements: the first one ``shift`` better; a group's effect is common to both."""
    level = rng.normal(4.2, 0.8)
    one, other = level + shift + rng.normal(0, 1.4, size), level + rng.normal(0, 1.4, size)
    return [np.clip(np.rint(x), 1, 7) for x in (one, other)]


def begin(connection, experiment, size=5, member_ids=None, salt=None):
    """A deliberation with members that is rating nothing yet; returns its id and the members'."""
    deliberation = new_id("del")
    row = {
        "id": deliberation, "owner": OWNER, "question": "Should tea be free?", "settings": "{}", "state": "rating",
        "round": 1, "invite": new_id("inv"), "salt": salt or new_id("salt"), "experiment": experiment,
        "created": time.time(),
    }  # fmt: skip
    connection.execute(insert(deliberations).values(row))
    names = member_ids or [new_id("mbr") for _ in range(size)]
    rows = [
        {"id": name, "deliberation": deliberation, "number": k, "alias": "a", "token": name, "consent": True,
         "created": 0.0} for k, name in enumerate(names)
    ]  # fmt: skip
    connection.execute(insert(members), rows)
    return deliberation, names


def write(connection, deliberation, names, seconds=1.0, same=False, versions="1", ids=None):
    """One candidate an arm, or one for all of them; returns arm -> candidate id."""
    ids = ids or {name: new_id("can") for name in names}
    if same:
        ids = dict.fromkeys(names, ids[names[0]])
    for k, candidate in enumerate(dict.fromkeys(ids.values())):
        row = {
            "id": candidate, "deliberation": deliberation, "round": 1, "number": k, "statement": f"Tea {k}.",
            "policy": "default", "versions": json.dumps(versions), "welfare": 4.0, "predicted": "{}", "winner": True,
            "created": 0.0,
        }  # fmt: skip
        connection.execute(insert(candidates).values(row))
    rows = [{"arm": name, "candidate": ids[name], "seconds": seconds + k} for k, name in enumerate(names)]
    trials.expose(connection, deliberation, rows)
    return ids


def rate(connection, candidate, people, agreement, quality=None):
    """Ratings of one candidate; NaN are left out."""
    quality = agreement if quality is None else quality
    rows = [
        {"member": member, "candidate": candidate, "version": 1, "current": True, "agreement": int(a),
         "quality": int(q), "created": 0.0}
        for member, a, q in zip(people, agreement, quality, strict=True) if not np.isnan(a)
    ]  # fmt: skip
    if rows:
        connection.execute(insert(ratings), rows)


def close(connection, deliberation, at=None):
    """The end; later calls are later, unless ``at`` says otherwise."""
    where = deliberations.c.id == deliberation
    values = {"state": "closed", "closed": float(next(_times)) if at is None else at}
    connection.execute(update(deliberations).where(where).values(values))


def hold(engine, experiment, *deliberations_of_marks, at=None, closing=True, **options):
    """Whole deliberations, one after the other in one transaction.

    Args:
        deliberations_of_marks: for each, ratings [members] of every arm of the experiment; those of arms that are not
            in this deliberation are ignored.
        at, closing: when it is closed, and whether.
        options: of ``write``.

    Returns:
        Id of the last one, and the names of its arms.
    """
    spec = trials.get(engine, experiment, None).spec
    with engine.begin() as connection:
        for marks in deliberations_of_marks:
            deliberation, people = begin(connection, experiment, len(marks[0]))
            names = [arm.name for arm in trials.enroll(connection, experiment, deliberation)]
            ids = write(connection, deliberation, names, **options)
            trials.first_shown(connection, deliberation)
            for name in names[: 1 if options.get("same") else None]:
                rate(connection, ids[name], people, np.asarray(marks[spec.names.index(name)], dtype=float))
            if closing:
                close(connection, deliberation, at)
    return deliberation, names


def stream(engine, experiment, number, shift, rng):
    """Closed deliberations of an experiment of two arms, the first one ``shift`` better."""
    hold(engine, experiment, *(drawn(shift, rng) for _ in range(number)))
