"""Checks of a request's fields: the same for the library, the HTTP interface and the settings file."""

from __future__ import annotations

from deliberation.prompts import one_line
from deliberation.types import InputError, check_text
from reward.welfare import ALPHAS, parse_welfare
from serving.result import WelfareUsed

MAX_CANDIDATES = 64
"""Candidates one synchronous request may ask for."""

MAX_WAITING_MEMBERS = 64
"""Members of a group whose request may be waited for; larger groups are answered in the background."""

MAX_SEED = 2**53 - 1
"""Largest seed: the largest integer every JSON client can carry exactly."""


def check_readable(field: str, value: object) -> str:
    """``check_text``, and at least one character that survives ``one_line`` (control characters do not)."""
    text = check_text(field, value)
    if not _is_readable(text):
        raise InputError(field, value, "has no readable characters; write at least one word")
    return text


def _is_readable(text: str) -> bool:
    """Whether ``one_line(text)`` holds anything, without going through all of it."""
    if one_line(text[:8]):
        return True
    # What can be read is so wherever it stands, and however often
    return one_line("".join(dict.fromkeys(text))) != ""


def check_count(n: object) -> int:
    """Return ``n`` if it is an integer from 1 to ``MAX_CANDIDATES``; InputError otherwise."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CANDIDATES:
        raise InputError("n", n, f"must be an integer from 1 to {MAX_CANDIDATES}")
    return n


def check_seed(seed: object) -> int:
    """Return ``seed`` if it is an integer from 0 to ``MAX_SEED``; InputError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError("seed", seed, f"must be an integer from 0 to {MAX_SEED}")
    return seed


def check_welfare(value: object) -> str | float:
    """Return ``value`` if it names a welfare function or is an alpha >= 0; InputError otherwise.

    ``worst_cluster`` is refused: a request does not say which members form a cluster.
    """
    if not isinstance(value, (str, int, float)):
        raise InputError("welfare", value, "must be the name of a welfare function or a number >= 0")
    if isinstance(value, int) and value > 1e300:  # too long for a float; parse_welfare takes what a float can hold
        raise InputError("welfare", f"{str(value)[:20]}...", 'is too large; write "inf" for the worst-off member')
    parse_welfare(value, clusters=False)
    return value


def welfare_used(value: str | float) -> WelfareUsed:
    """Name and alpha of a welfare function, e.g. ``"nash"`` and ``1`` both give ``("nash", 1.0)``."""
    chosen = parse_welfare(check_welfare(value))
    if isinstance(chosen, str):
        return WelfareUsed(chosen, None)
    return WelfareUsed(next((name for name, known in ALPHAS.items() if known == chosen), None), chosen)
