"""A lock whose waiters get it in the order they came; ``threading.Lock`` may give it to the one that just had it."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """One turn at a time, first come, first served. Whoever took it, any thread may give it back."""

    def __init__(self) -> None:
        self._change = threading.Lock()
        self._line: deque[threading.Lock] = deque()  # the first one has the turn; each is held until its turn has come

    def take(self, timeout_s: float) -> bool:
        """Wait for the turn; False after ``timeout_s`` seconds without it, and the place in the line is lost."""
        place = threading.Lock()
        place.acquire()
        with self._change:
            self._line.append(place)
            if self._line[0] is place:
                return True
        if place.acquire(timeout=timeout_s):
            return True
        with self._change:
            if self._line[0] is place:  # it came after all, in the moment between
                return True
            self._line.remove(place)
            return False

    def give_back(self) -> None:
        """Hand the turn to the next in the line."""
        with self._change:
            self._line.popleft()
            if self._line:
                self._line[0].release()
