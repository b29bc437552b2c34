"""The teacher: what they say of statements a person was not shown."""

from __future__ import annotations

import numpy as np

from benchmarks.human_teacher import Factorisation, factorise


def test_a_factorisation_tells_hidden_votes_of_two_camps_from_the_seen_ones():
    rng = np.random.default_rng(0)
    people, statements = 60, 24
    camp, side = rng.choice((-1, 1), people), rng.choice((-1, 1), statements)
    likely = 1 / (1 + np.exp(-2.5 * camp[:, None] * side))
    votes = rng.random((people, statements)) < likely
    shown = rng.random(votes.shape) < 0.6
    who, what = np.nonzero(shown)
    found = factorise(who.tolist(), what.tolist(), votes[shown].tolist(), Factorisation(), seed=0)
    assert found.shape == votes.shape and ((found > 0) & (found < 1)).all()
    assert ((found > 0.5) == (likely > 0.5))[~shown].mean() > 0.95
    again = factorise(who.tolist(), what.tolist(), votes[shown].tolist(), Factorisation(), seed=0)
    np.testing.assert_array_equal(found, again)


def test_a_person_without_much_said_is_given_the_share_of_the_others():
    who = [i for i in range(20) for _ in range(2)] + [20]
    what = [0, 1] * 20 + [1]
    agreed = [True, False] * 20 + [False]
    found = factorise(who, what, agreed, Factorisation(), seed=0)
    assert found[20, 0] > 0.6 > 0.4 > found[20, 1]
