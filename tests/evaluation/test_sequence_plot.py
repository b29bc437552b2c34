"""The plot of a confidence sequence: what is drawn, what is said, and that its bytes do not change."""

from __future__ import annotations

import numpy as np
import pytest

from deliberation.types import InputError
from evaluation.sequence_plot import save_sequence, sequence_figure, summary
from evaluation.sequences import difference_sequence, win_rate_sequence

ARMS = ("PPO", "reranking")


def words(figure):
    return " ".join(text.get_text() for text in (*figure.axes[0].texts, figure.axes[0]._left_title))


def test_a_decision_is_marked_where_it_fell():
    found = win_rate_sequence(np.zeros(20))
    figure = sequence_figure(found, "win rate", arms=ARMS)
    at = found.decision().deliberations
    assert f"decided after {at}: reranking is better" in words(figure)
    assert any(list(line.get_xdata()) == [at, at] for line in figure.axes[0].lines)


def test_no_decision_no_mark():
    said = words(sequence_figure(difference_sequence(np.zeros(50)), arms=ARMS))
    assert "decided" not in said and "PPO\nbetter" in said and "reranking\nbetter" in said


def test_broken_assumptions_are_said_and_nothing_is_decided():
    figure = sequence_figure(difference_sequence(np.repeat([3.0, -3.0], 300)))
    assert "do not share one" in words(figure) and "decided" not in words(figure)


def test_summary():
    found = difference_sequence(np.array([1.0, 2.0]))
    assert summary(found) == "1.50 [-6.00, 6.00] after 2 deliberations, 95 % at every look"


def test_the_whole_mean_and_the_line_are_in_view():
    found = difference_sequence(np.random.default_rng(0).normal(1, 0.5, 100))
    low, high = sequence_figure(found).axes[0].get_ylim()
    assert low < min(0, found.mean[10:].min()) and high > found.mean[10:].max()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_data_gives_the_same_bytes(tmp_path, suffix):
    found = difference_sequence(np.random.default_rng(1).normal(0, 0.5, 30))
    for name in ("one", "two"):
        save_sequence(sequence_figure(found), tmp_path / f"{name}{suffix}")
    one = (tmp_path / f"one{suffix}").read_bytes()
    assert len(one) > 5000 and one == (tmp_path / f"two{suffix}").read_bytes()


def test_bad_input_is_named(tmp_path):
    one = difference_sequence(np.array([1.0]))
    for call, field in (
        (lambda: sequence_figure(difference_sequence(np.zeros((2, 3)))), "sequence"),
        (lambda: sequence_figure(difference_sequence(np.array([]))), "sequence"),
        (lambda: save_sequence(sequence_figure(one), tmp_path / "a.gif"), "path"),
    ):
        with pytest.raises(InputError) as found:
            call()
        assert found.value.field == field
