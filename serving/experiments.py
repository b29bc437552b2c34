"""An experiment as it is fixed before it begins: arms, measure, stop rule; and who gets which arm, in which order.

Pure: no database and no models. *Paired*: every deliberation rates the best statement of both arms, blind. *Between*:
each deliberation gets one arm, drawn by weight; the k-th one closed of an arm is compared with the k-th of another.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from deliberation.types import InputError
from serving.checks import check_count, check_readable, check_welfare
from serving.config import DEFAULT_PREFERENCE_MODEL

Mode = Literal["paired", "between"]
Metric = Literal["agreement", "win_rate"]

BUCKETS = 10_000
"""Shares of arms are multiples of one over this."""
MAX_ARMS, MAX_LOOKS = 5, 10_000
MAX_NAME_CHARS = 100
MAX_WEIGHT = 1e6
MAX_ALPHA = 0.2
MINIMUM, MAXIMUM = 10, 400


@dataclass(frozen=True)
class Arm:
    """One way of making a statement.

    Attributes:
        name: what reports call it.
        policy: name of the policy that writes the candidates.
        n: candidates to sample and choose from.
        welfare: what chooses, as in a consensus request.
        weight: share of the deliberations, relative to the other arms; in a paired experiment 1.
        preference_model: name of the one that scores them.
    """

    name: str
    policy: str
    n: int
    welfare: str | float
    weight: float = 1.0
    preference_model: str = DEFAULT_PREFERENCE_MODEL


@dataclass(frozen=True)
class Spec:
    """What an experiment will do, fixed when it is created.

    Attributes:
        arms: exactly two if paired; differences are the first one's minus the second one's.
        mode: ``paired`` or ``between``.
        metric: what decides: ``agreement`` (difference of the groups' means, from -6 to 6) or ``win_rate``.
        alpha: chance, at most, of declaring a difference where there is none.
        minimum, maximum: looks before it may decide, and after which it ends. A look is a closed deliberation if
            paired, one of each arm if between.
        versions: prints of the models at creation.

    Raises:
        InputError: naming the field.
    """

    arms: tuple[Arm, ...]
    mode: Mode = "paired"
    metric: Metric = "agreement"
    alpha: float = 0.05
    minimum: int = MINIMUM
    maximum: int = MAXIMUM
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(self.arms))
        for name, choices in (("mode", get_args(Mode)), ("metric", get_args(Metric))):
            if getattr(self, name) not in choices:
                raise InputError(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        _check_arms(self.arms, self.mode)
        if not _number(self.alpha) or not 0 < self.alpha <= MAX_ALPHA:
            raise InputError("alpha", self.alpha, f"must be above 0 and at most {MAX_ALPHA}")
        if not _whole(self.minimum) or not 1 <= self.minimum <= MAX_LOOKS:
            raise InputError("minimum", self.minimum, f"must be an integer from 1 to {MAX_LOOKS}")
        if not _whole(self.maximum) or not self.minimum <= self.maximum <= MAX_LOOKS:
            mend = f"must be an integer from minimum ({self.minimum}) to {MAX_LOOKS}"
            raise InputError("maximum", self.maximum, mend)

    @property
    def names(self) -> tuple[str, ...]:
        """The arms' names."""
        return tuple(arm.name for arm in self.arms)

    def arm(self, name: str) -> Arm:
        """The arm of that name (KeyError)."""
        return {arm.name: arm for arm in self.arms}[name]

    def to_json(self) -> str:
        """For the database; ``from_json`` reads it."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """What ``to_json`` wrote.

        Raises:
            InputError: on a field that is unknown, missing or out of range.
        """
        found = json.loads(text)
        arms = tuple(Arm(**_known(Arm, arm, f"arms[{k}]")) for k, arm in enumerate(_known(cls, found, "spec")["arms"]))
        return cls(**found | {"arms": arms})


def _check_arms(arms: tuple[Arm, ...], mode: str) -> None:
    fewest, most = (2, 2) if mode == "paired" else (2, MAX_ARMS)
    if not fewest <= len(arms) <= most:
        wanted = "exactly two arms: between compares more" if mode == "paired" else f"{fewest} to {most} arms"
        raise InputError("arms", f"{len(arms)} arms", f"give {wanted}")
    for k, arm in enumerate(arms):
        place = f"arms[{k}]"
        _check(f"{place}.name", _check_name, arm.name)
        _check(f"{place}.policy", lambda text: check_readable("policy", text), arm.policy)
        _check(f"{place}.preference_model", lambda text: check_readable("name", text), arm.preference_model)
        _check(f"{place}.n", check_count, arm.n)
        _check(f"{place}.welfare", _check_welfare, arm.welfare)
        if not _number(arm.weight) or not 0 < arm.weight <= MAX_WEIGHT:
            raise InputError(f"{place}.weight", arm.weight, f"must be a number above 0, at most {MAX_WEIGHT:g}")
        if mode == "paired" and arm.weight != 1:
            raise InputError(f"{place}.weight", arm.weight, "must be 1: if paired, everyone is shown both arms")
        if arm.name in [other.name for other in arms[:k]]:
            raise InputError(f"{place}.name", arm.name, "is the name of two arms; give each its own")
    for k, (low, high) in enumerate(itertools.pairwise(_bounds(arms))):
        if low == high:
            raise InputError(f"arms[{k}].weight", arms[k].weight, f"is less than 1/{BUCKETS} of all; raise it")


def _check(place: str, check: Any, value: object) -> None:
    try:
        check(value)
    except InputError as error:
        raise InputError(place, error.value, error.mend) from error


def _check_name(name: object) -> None:
    text = check_readable("name", name)
    if len(text) > MAX_NAME_CHARS or not text.isprintable() or text != text.strip():
        raise InputError("name", name, f"must be one line of 1 to {MAX_NAME_CHARS} characters, no spaces around it")


def _check_welfare(value: object) -> None:
    if value == math.inf and not isinstance(value, str):
        raise InputError("welfare", "Infinity", 'is no JSON; write "inf"')
    check_welfare(value)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _known(kind: Any, found: Any, place: str) -> dict[str, Any]:
    """``found``, if it is an object with fields of the dataclass ``kind`` and all that have no default."""
    if not isinstance(found, dict):
        raise InputError(place, found, "must be an object")
    names = [f.name for f in fields(kind)]
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"{place}.{unknown[0]}", found[unknown[0]], f"is unknown; fields are {', '.join(names)}")
    needed = [name for name in (("arms",) if kind is Spec else names[:4]) if name not in found]
    if needed:
        raise InputError(f"{place}.{needed[0]}", None, "is missing; add it")
    return found


def _bounds(arms: Sequence[Arm]) -> list[int]:
    """Arm k has the buckets from bounds[k] up to, but not including, bounds[k + 1]."""
    total = math.fsum(arm.weight for arm in arms)
    sums = itertools.accumulate(arm.weight for arm in arms)
    return [0, *(min(BUCKETS, round(BUCKETS * s / total)) for s in sums)]


def propensities(spec: Spec) -> dict[str, float]:
    """Arm -> chance that a deliberation is shown it: 1 for both if paired, summing to 1 if between."""
    if spec.mode == "paired":
        return dict.fromkeys(spec.names, 1.0)
    pairs = itertools.pairwise(_bounds(spec.arms))
    return {name: (high - low) / BUCKETS for name, (low, high) in zip(spec.names, pairs)}


def assign(spec: Spec, salt: str, experiment_id: str, deliberation_id: str) -> tuple[str | None, float]:
    """The arm of a deliberation and the chance of it; None and 1 if paired, where every arm is shown.

    HMAC-SHA256 under the experiment's secret salt: the same each time, and nobody can tell it beforehand.
    """
    if spec.mode == "paired":
        return None, 1.0
    bucket = int.from_bytes(_hmac(salt + experiment_id, deliberation_id)) % BUCKETS
    bounds = _bounds(spec.arms)
    name = next(arm.name for arm, high in zip(spec.arms, bounds[1:]) if bucket < high)
    return name, propensities(spec)[name]


def member_order(salt: str, member_id: str, candidate_ids: Sequence[str]) -> list[str]:
    """The candidates in an order of the member's own: random over members, the same each time.

    Args:
        salt: secret of the deliberation.
        candidate_ids: in any order.
    """
    return sorted(candidate_ids, key=lambda name: _hmac(salt, f"{member_id} {name}"))


def _hmac(key: str, text: str) -> bytes:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()
