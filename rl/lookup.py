"""Guesses at the next tokens, looked up in what was read: samples repeat their prompt, and each other.

Guesses are read together with the last token drawn, in one pass, and kept as far as they are what is then drawn (prompt
lookup, Saxena 2023; checked as in speculative decoding, Leviathan et al. 2023). The draws are fixed beforehand, see
``rl.sampling``: a right guess saves a pass, a wrong one changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 6
"""Tokens guessed at once."""


class Lookup:
    """What followed every two tokens when they were last met."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], int] = {}

    def read(self, ids: Sequence[int]) -> None:
        """Note a text."""
        for first, second, third in zip(ids, ids[1:], ids[2:], strict=False):
            self._after[first, second] = third

    def note(self, two: tuple[int, int], token: int) -> tuple[int, int]:
        """Note that ``token`` followed ``two``. Returns the two last tokens now."""
        self._after[two] = token
        return two[1], token

    def guess(self, two: tuple[int, int], most: int) -> list[int]:
        """At most ``most`` tokens that may follow ``two``, each after what followed the two before it."""
        found: list[int] = []
        while len(found) < most and (token := self._after.get(two)) is not None:
            found.append(token)
            two = two[1], token
        return found


def even_out(rows: Sequence[Sequence[list[int]]]) -> None:
    """Shorten guesses, [row][sample][token], in place: rows are padded to the widest, and none may exceed the mean.

    A sample takes its guess and one more place.
    """
    widths = [len(row) + sum(map(len, row)) for row in rows]
    limit = max(math.ceil(sum(widths) / len(rows)), *map(len, rows), 0)
    for row, width in zip(rows, widths, strict=True):
        for _ in range(width - limit):
            max(row, key=len).pop()
