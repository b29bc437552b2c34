"""First come, first served; who gives up loses the place, and the turn is never lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from serving.turns import Turns


def test_who_gives_up_is_passed_over():
    turns, order = Turns(), []

    def wait(name, timeout_s):
        if turns.take(timeout_s):
            order.append(name)
            turns.give_back()

    assert turns.take(0)
    threads = [threading.Thread(target=wait, args=one) for one in (("a", 60), ("b", 0.05), ("c", 60))]
    for thread, in_line in zip(threads, (2, 0, 3)):  # in this order: a waits, b waits and gives up, c waits
        thread.start()
        while len(turns._line) < in_line:
            time.sleep(0.001)
        if not in_line:
            thread.join()
    assert order == [] and len(turns._line) == 3
    turns.give_back()
    for thread in threads:
        thread.join()
    assert order == ["a", "c"] and turns.take(0)


def test_one_at_a_time_and_none_is_lost_though_many_give_up():
    turns, inside, most, had = Turns(), [0], [0], [0]

    def work(_):
        for _ in range(200):
            if turns.take(1e-4):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(1e-5)
                inside[0] -= 1
                had[0] += 1
                turns.give_back()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(16)))
    assert most[0] == 1 and had[0] > 0 and turns.take(0)
