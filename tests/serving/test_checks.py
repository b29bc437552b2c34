"""Checks of texts: quick on the largest request, and of one mind with what the models are given."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberation.prompts import one_line
from deliberation.types import MAX_MEMBERS, MAX_OPINION_CHARS, InputError
from serving.best_of_n import make_plan
from serving.checks import check_readable

# What one_line takes out, folds, or keeps in one place and not in another, beside what anybody can read
ODD = "\u0600\u200c\u200d\u00ad\u034f\u115f\u1160\u17b4\u180b\u3164\ufe00\ufe0e\ufe0f\uffa0\U000e0100\U000e0041"
SHOWN = "a.\u0301\u0430\u06cc\u0b95\u1100\u1161\u2126\u2764\u8336\ud800\U0001f375"
BLANK = " \t\n\x00\x85\u00a0\u2000\u2028\u3000\u2b74\ue000"


def is_readable(text: str) -> bool:
    try:
        check_readable("text", text)
    except InputError:
        return False
    return True


@given(
    st.text(alphabet=ODD + BLANK, max_size=12), st.text(alphabet=ODD + BLANK + SHOWN, max_size=6) | st.text(max_size=6)
)
def test_a_text_is_readable_where_a_model_is_given_some_of_it(blank, text):
    for found in (blank, text, blank + text):
        assert is_readable(found) == bool(one_line(found))


@pytest.mark.parametrize(
    "opinion",
    ["Free meals, a shared table. ", "\u6c34\u306f\u7121\u6599\u3067\u3059\u3002", "\U0001f375\ufe0f"],
)
def test_the_largest_group_is_checked_without_going_through_its_texts(opinion):
    text = (opinion * MAX_OPINION_CHARS)[: MAX_OPINION_CHARS - 1] + "a"
    checked = least_seconds(
        lambda: make_plan("Should tea be free?", [text] * MAX_MEMBERS, n=64, welfare="nash", seed=0)
    )
    assert checked < least_seconds(lambda: [one_line(text) for _ in range(MAX_MEMBERS)]) / 2


def least_seconds(work):
    """Of this thread on a core, the least of some tries: whoever shares the core slows down one of them or another."""
    found = []
    for _ in range(5):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)
