"""rl/ppo.py against hand-worked numbers, an independent loop, and finite differences."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import ppo

NAN = float("nan")


def random_mask(rows: int, width: int, seed: int) -> torch.Tensor:
    """Random masks with gaps; every row has at least one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[:, 0] |= ~mask.any(dim=1)
    return mask


def loop_gae(rewards, values, gamma, lam):
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}, over a list of tokens."""
    n = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), lift=st.floats(-50, 50))
def test_leave_one_out_is_the_score_less_the_mean_of_the_others(seed, n, lift):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3 * n, generator=generator, dtype=torch.float64)
    scored = torch.rand(3 * n, generator=generator) < 0.7
    got = ppo.leave_one_out(scores.masked_fill(~scored, NAN), scored, n)
    for row in range(3 * n):
        first = row // n * n
        others = [float(scores[k]) for k in range(first, first + n) if k != row and scored[k]]
        known = bool(scored[row]) and others
        assert got[row].item() == pytest.approx(float(scores[row]) - sum(others) / len(others) if known else 0.0)
    assert torch.allclose(ppo.leave_one_out(scores + lift, scored, n), got)  # an easier prompt changes nothing


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0.0, 1.0), lam=st.floats(0.0, 1.0), width=st.integers(1, 9))
def test_gae_equals_the_loop_and_reads_no_masked_position(seed, gamma, lam, width):
    mask = random_mask(3, width, seed)
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(3, width, generator=generator, dtype=torch.float64) for _ in range(2))
    got, returns = ppo.gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma, lam)
    for row in range(3):
        kept = mask[row]
        expected = torch.tensor(
            loop_gae(rewards[row][kept].tolist(), values[row][kept].tolist(), gamma, lam), dtype=torch.float64
        )
        torch.testing.assert_close(got[row][kept], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns[row][kept], expected + values[row][kept], rtol=1e-12, atol=1e-12)
    assert (got[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_worked_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    rewards = torch.tensor([[0.0, 0.0, 1.0, 99.0]])
    values = torch.tensor([[0.5, 0.4, 0.2, 99.0]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.5)
    # deltas: 0.4-0.5 = -0.1; 0.2-0.4 = -0.2; 1-0.2 = 0.8 (terminal: nothing beyond the last token)
    torch.testing.assert_close(advantages, torch.tensor([[-0.1 + 0.5 * (-0.2 + 0.5 * 0.8), 0.2, 0.8, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.5, 0.6, 1.0, 0.0]]), atol=1e-6, rtol=0)


def test_gae_without_discount_and_lambda_is_the_one_step_error():
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    advantages, _ = ppo.gae(rewards, values, mask, 0.0, 0.0)
    torch.testing.assert_close(advantages, rewards - values)


def test_an_interior_gap_is_as_if_it_were_not_there():
    full = torch.ones(1, 2, dtype=torch.bool)
    dense = ppo.gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.3, 0.7]]), full, 0.9, 0.8)
    gap = ppo.gae(
        torch.tensor([[1.0, NAN, 2.0]]), torch.tensor([[0.3, NAN, 0.7]]), torch.tensor([[True, False, True]]), 0.9, 0.8
    )
    torch.testing.assert_close(gap[0][0, [0, 2]], dense[0][0])


def test_the_score_sits_on_the_last_action_token():
    mask = ppo.length_mask(torch.tensor([3, 1, 4]))
    zero = torch.zeros(3, 4)
    rewards = ppo.token_rewards(torch.tensor([5.0, -2.0, 7.0]), zero, zero, mask, 0.05)
    assert rewards.tolist() == [[0, 0, 5, 0], [-2, 0, 0, 0], [0, 0, 0, 7]]


def test_the_kl_penalty_is_per_token_and_masked_tokens_pay_nothing():
    mask = ppo.length_mask(torch.tensor([2]), 3)
    logprobs, ref = torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[-1.5, -1.0, NAN]])
    rewards = ppo.token_rewards(torch.tensor([1.0]), logprobs, ref, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.1, 0.0]]))


def test_a_completion_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no action token"):
        ppo.last_token_index(torch.tensor([[True, False], [False, False]]))


def test_truncation_pays_the_penalty_after_the_clip():
    given = torch.tensor([30.0, -30.0, 3.0]), torch.tensor([True, False, False]), torch.tensor([4, 8, 2])
    assert ppo.shape_scores(*given, missing_eos_penalty=1.0, clip=10.0).tolist() == [10.0, -11.0, 2.0]
    priced = ppo.shape_scores(*given, missing_eos_penalty=1.0, clip=10.0, length_penalty=0.25)
    assert priced.tolist() == [9.0, -13.0, 1.5]


def test_kl_estimators_by_hand_and_in_expectation():
    torch.manual_seed(0)
    policy, ref = torch.randn(6, dtype=torch.float64).log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    k1, k2, k3 = ppo.kl_estimators(policy, ref)
    d = policy - ref
    torch.testing.assert_close((k1, k2, k3), (d, d**2 / 2, (-d).exp() - 1 + d))
    exact = (policy.exp() * d).sum()
    torch.testing.assert_close((policy.exp() * k1).sum(), exact)
    torch.testing.assert_close((policy.exp() * k3).sum(), exact)
    assert (k3 >= 0).all()


def test_the_gradient_of_k2_is_that_of_the_kl_and_that_of_k3_is_not():
    torch.manual_seed(1)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    _, k2, k3 = ppo.kl_estimators(policy, ref)
    (of_k2,) = torch.autograd.grad((policy.detach().exp() * k2).sum(), logits, retain_graph=True)
    (of_k3,) = torch.autograd.grad((policy.detach().exp() * k3).sum(), logits)
    torch.testing.assert_close(of_k2, exact)
    assert (of_k3 - exact).abs().max() > 1e-2


def test_pushing_the_policy_away_lowers_the_expected_reward():
    ref = torch.tensor([0.5, 0.5]).log()
    near, far = torch.tensor([0.6, 0.4]).log(), torch.tensor([0.95, 0.05]).log()

    def expected(policy):
        mask = torch.ones(2, 1, dtype=torch.bool)
        return (policy.exp() * ppo.token_rewards(torch.zeros(2), policy[:, None], ref[:, None], mask, 1.0)[:, 0]).sum()

    assert 0 > expected(near) > expected(far)


def test_whitening_gives_mean_0_variance_1_over_unmasked_entries_only():
    torch.manual_seed(0)
    mask = random_mask(4, 6, 3)
    x = (torch.randn(4, 6, dtype=torch.float64) * 5 + 3).masked_fill(~mask, NAN)
    white = ppo.whiten(x, mask)
    assert abs(white[mask].mean()) < 1e-9 and abs(white[mask].var(unbiased=False) - 1) < 1e-6
    assert (white[~mask] == 0).all()
    kept = ppo.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask].mean(), x[mask].mean())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_whitening_is_defined_for_few_tokens(count):
    mask = torch.arange(3)[None] < count
    white = ppo.whiten(torch.tensor([[4.0, 8.0, NAN]]), mask)
    expected = {0: [0, 0, 0], 1: [0, 0, 0], 2: [-1, 1, 0]}[count]
    torch.testing.assert_close(white, torch.tensor([expected], dtype=torch.float32))


def test_equal_advantages_whiten_to_zero():
    assert ppo.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).abs().max() == 0


def _whiten_on_rank(rank: int, path: str, x: torch.Tensor, mask: torch.Tensor, out) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

    def reduce(t):
        dist.all_reduce(t)
        return t

    shard = slice(0, 3) if rank == 0 else slice(3, 4)  # unequal shards; rank 1 has no token at all
    out.put((rank, ppo.whiten(x[shard], mask[shard], reduce=reduce).numpy()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_whitening_on_two_processes_equals_one(tmp_path):
    mask = random_mask(4, 5, 0)
    mask[3] = False
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    args = [(rank, str(tmp_path / "store"), x, mask, out) for rank in range(2)]
    processes = [context.Process(target=_whiten_on_rank, args=a) for a in args]
    for process in processes:
        process.start()
    parts = dict(out.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    both = torch.cat([torch.from_numpy(parts[0]), torch.from_numpy(parts[1])])
    torch.testing.assert_close(both, ppo.whiten(x, mask), rtol=1e-12, atol=1e-12)


def test_the_price_of_kl_follows_the_target():
    """By a fifth over the horizon at most, in proportion near the target; Ziegler et al. 2019, section 2.2."""
    assert ppo.adapted_beta(0.1, 6.0, 6.0, 100, 1000) == 0.1
    assert ppo.adapted_beta(0.1, 60.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert ppo.adapted_beta(0.1, -1.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)
    assert ppo.adapted_beta(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)


@pytest.mark.parametrize(
    "advantage, log_ratio, loss, gradient",
    [
        (1.0, 0.0, -1.0, -1.0),  # at ratio 1 the gradient is the policy gradient
        (1.0, 0.5, -1.2, 0.0),  # good token already likelier by more than the clip: nothing more to gain
        (1.0, -0.5, -0.6065307, -0.6065307),  # good token made less likely: full gradient back
        (-1.0, -0.5, 0.8, 0.0),  # bad token already less likely by more than the clip
        (-1.0, 0.5, 1.6487213, 1.6487213),  # bad token made likelier: full gradient back
    ],
)
def test_the_policy_loss_clips_on_the_right_sides(advantage, log_ratio, loss, gradient):
    new = torch.tensor([[log_ratio]], requires_grad=True)
    got, _ = ppo.policy_loss(
        new,
        torch.zeros(1, 1),
        torch.full((1, 1), advantage),
        torch.ones(1, 1, dtype=torch.bool),
        clip=0.2,
        num_tokens=1,
    )
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    "value, loss, gradient, clipfrac",
    [
        (0.1, 0.5 * 0.9**2, -0.9, 0.0),  # inside the clip: plain squared error
        (0.5, 0.5 * 0.8**2, 0.0, 1.0),  # moved up by more than .2: the clipped value's (larger) error, no gradient
        (-0.5, 0.5 * 1.5**2, -1.5, 0.0),  # moved the wrong way: the plain error is larger
    ],
)
def test_the_value_loss_clips_on_the_right_sides(value, loss, gradient, clipfrac):
    new = torch.tensor([[value]], requires_grad=True)
    got, metrics = ppo.value_loss(
        new, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), clip=0.2, num_tokens=1
    )
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert metrics["clipfrac"] == clipfrac


def _batch(seed: int, rows: int = 4, width: int = 5):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(rows, width, seed)
    numbers = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(6)]
    return mask, numbers


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_the_losses_equal_finite_differences(seed):
    mask, (new, old, advantages, value, old_value, returns) = _batch(seed)
    new.requires_grad_(), value.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo.policy_loss(x, old, advantages, mask, clip=0.2, num_tokens=7.0)[0], new
    )
    assert torch.autograd.gradcheck(
        lambda x: ppo.value_loss(x, old_value, returns, mask, clip=0.2, num_tokens=7.0)[0], value
    )


def test_masked_positions_change_neither_losses_nor_gradients_nor_metrics():
    mask, (new, old, advantages, value, old_value, returns) = _batch(11)

    def run(fill):
        dirty = [x.masked_fill(~mask, fill).requires_grad_() for x in (new, old, advantages, value, old_value, returns)]
        p, m1 = ppo.policy_loss(*dirty[:3], mask, clip=0.2, num_tokens=mask.sum())
        v, m2 = ppo.value_loss(*dirty[3:], mask, clip=0.2, num_tokens=mask.sum())
        grads = torch.autograd.grad(p + v, [dirty[0], dirty[3]])
        return [p, v, *m1.values(), *m2.values(), *(g.masked_fill(~mask, 0) for g in grads)]

    for clean, dirty in zip(run(0.0), run(NAN), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_losses_and_metrics_add_up_over_unequal_micro_batches(split):
    mask, (new, old, advantages, value, old_value, returns) = _batch(5)

    def run(rows):
        p, m = ppo.policy_loss(new[rows], old[rows], advantages[rows], mask[rows], clip=0.2, num_tokens=mask.sum())
        v, n = ppo.value_loss(value[rows], old_value[rows], returns[rows], mask[rows], clip=0.2, num_tokens=mask.sum())
        return torch.stack([p, v, *m.values(), *n.values()])

    whole = run(slice(None))
    torch.testing.assert_close(run(slice(0, split)) + run(slice(split, None)), whole, rtol=1e-12, atol=1e-12)


def test_explained_variance():
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(torch.full_like(returns, 9.0), returns, mask) == 0
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert ppo.explained_variance(returns, torch.ones_like(returns), mask) == 0  # undefined: said as 0, not NaN
    assert ppo.explained_variance(returns, returns, ~mask) == 0


def test_the_mathematics_imports_with_torch_alone():
    code = (
        "import sys, rl.ppo; bad = [m for m in ('ray', 'deepspeed', 'flash_attn', 'transformers', 'trl') "
        "if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=str(__import__("pathlib").Path(__file__).parents[2]))
