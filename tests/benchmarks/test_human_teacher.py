"""Teachers: what they say of statements a person was not shown."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.human_teacher import Answers, Factorisation, Reader, factorise, fit_reader, p_agree


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


def test_the_reader_learns_nearness_from_votes_and_from_choices():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(200, 8, generator=generator)
    pairs = torch.randint(200, (1500, 2), generator=generator)
    near = (texts[pairs[:, 0]] * texts[pairs[:, 1]]).sum(dim=1)
    others = torch.randint(200, (1500,), generator=generator)
    far = (texts[pairs[:, 0]] * texts[others]).sum(dim=1)
    ordered = torch.where(
        (near > far)[:, None], torch.stack([pairs[:, 1], others], 1), torch.stack([others, pairs[:, 1]], 1)
    )
    nothing = torch.zeros(0, 3, dtype=torch.long)
    votes = Answers(texts, pairs, (near > 0).float(), nothing)
    choices = Answers(texts, pairs[:1], torch.ones(1), torch.cat([pairs[:, :1], ordered], dim=1))
    for answers, epochs in ((votes, 30), (choices, 200)):
        networks = fit_reader(answers, Reader(epochs=epochs, dropout=0.0, learning_rate=3e-3, fits=2), seed=0)
        opinion, rest = texts[7], texts[100:]
        found, truth = p_agree(networks, opinion, rest), (rest @ opinion).numpy()
        assert ((found >= 0) & (found <= 1)).all()
        assert np.corrcoef(found, truth)[0, 1] > 0.6
