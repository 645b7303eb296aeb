"""Rewards, GAE and whitening against numbers worked out by hand and against the formulas as plain loops."""

import math

import pytest
import torch

from trainers.advantages import gae, group_advantages, token_rewards, whiten

EXACT = dict(rtol=1e-12, atol=1e-12)


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def lengths_to_mask(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_rewards_are_a_penalty_on_every_token_and_the_score_on_the_last():
    rewards = token_rewards(
        torch.tensor([1.0, 2.0]),
        logprobs=tensor([-1.0, -2.0, -3.0], [-1.0, 7.0, 7.0]),
        ref_logprobs=tensor([-1.5, -1.0, -3.0], [-2.0, 9.0, 9.0]),
        response_mask=lengths_to_mask(3, 1),
        kl_coef=0.1,
    )
    # Row 0: -0.1 * (-1 + 1.5) = -0.05; -0.1 * (-2 + 1) = 0.1; -0.1 * 0 + 1 = 1.   Row 1: -0.1 * (-1 + 2) + 2 = 1.9.
    torch.testing.assert_close(rewards, tensor([-0.05, 0.1, 1.0], [1.9, 0.0, 0.0]), **EXACT)


def test_rewards_without_reference_are_the_scores_alone():
    rewards = token_rewards(torch.tensor([3.0]), tensor([-1.0, -1.0]), None, lengths_to_mask(2), kl_coef=0.0)
    torch.testing.assert_close(rewards, tensor([0.0, 3.0]), **EXACT)


def test_a_penalty_without_reference_is_refused():
    with pytest.raises(ValueError, match="kl_coef is 0.1 but there are no reference log-probs"):
        token_rewards(torch.tensor([3.0]), tensor([-1.0]), None, lengths_to_mask(1), kl_coef=0.1)


def test_the_penalty_in_the_rewards_has_the_gradient_of_the_kl():
    """Policy gradient of the penalty, in expectation over a softmax of four, against autograd of the KL itself."""
    logits, ref = torch.tensor([0.3, -1.0, 0.7, 0.1]).double().requires_grad_(), torch.tensor([0.1, 0.2, -0.4, 0.6])
    logprobs, ref_logprobs = logits.log_softmax(0), ref.double().log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref_logprobs)).sum(), logits, retain_graph=True)
    rewards = [
        token_rewards(torch.zeros(1), logprob.detach()[None, None], of_ref[None, None], lengths_to_mask(1), 1.0).item()
        for logprob, of_ref in zip(logprobs, ref_logprobs, strict=True)
    ]
    surrogate = (logprobs.exp().detach() * torch.tensor(rewards).double() * logprobs).sum()
    torch.testing.assert_close(-torch.autograd.grad(surrogate, logits)[0], expected, atol=1e-7, rtol=1e-6)


def test_group_advantages_by_hand():
    scores, groups = tensor([1.0, 4.0, 0.0, 5.0, 2.0])[0], torch.tensor([7, 2, 7, 3, 7])
    # Group 7: 1, 0, 2, mean 1, deviation 1 (over 2); groups 2 and 3 have one response each.
    torch.testing.assert_close(group_advantages(scores, groups, "dr_grpo"), tensor([0.0, 0, -1, 0, 1])[0], **EXACT)
    normed = group_advantages(scores, groups, "grpo", eps=0.25)
    torch.testing.assert_close(normed, tensor([0.0, 0, -0.8, 0, 0.8])[0], **EXACT)
    # Less the others' mean: 1 - 1, 0 - 1.5, 2 - 0.5.
    torch.testing.assert_close(group_advantages(scores, groups, "rloo"), tensor([0.0, 0, -1.5, 0, 1.5])[0], **EXACT)


def test_a_group_of_equal_scores_teaches_nothing():
    scores, groups = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64)
    for how in ("grpo", "dr_grpo", "rloo"):
        assert group_advantages(scores, groups, how).abs().max() < 1e-6


def test_gae_by_hand():
    advantages, returns = gae(
        rewards=tensor([1.0, 0.0, 2.0], [4.0, 0.0, 0.0]),
        values=tensor([0.5, 1.0, 1.5], [1.0, 0.0, 0.0]),
        response_mask=lengths_to_mask(3, 1),
        gamma=0.5,
        lam=0.5,
    )
    # Row 0: delta_2 = 2 - 1.5 = 0.5; delta_1 = 0 + 0.5 * 1.5 - 1 = -0.25; delta_0 = 1 + 0.5 * 1 - 0.5 = 1.
    #        A_2 = 0.5; A_1 = -0.25 + 0.25 * 0.5 = -0.125; A_0 = 1 + 0.25 * (-0.125) = 0.96875.
    # Row 1: delta_0 = 4 - 1 = 3, and nothing behind it.
    torch.testing.assert_close(advantages, tensor([0.96875, -0.125, 0.5], [3.0, 0.0, 0.0]), **EXACT)
    # Returns are A + V: 1.46875, 0.875, 2; and 4.
    torch.testing.assert_close(returns, tensor([1.46875, 0.875, 2.0], [4.0, 0.0, 0.0]), **EXACT)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.9, 0.0)])
def test_gae_is_the_weighted_sum_of_deltas(gamma: float, lam: float):
    """Eq. 16 as a double loop, one row at a time, over 5 rows of unequal lengths."""
    torch.manual_seed(0)
    lengths = [7, 1, 4, 6, 2]
    rewards, values = torch.randn(2, 5, 7, dtype=torch.float64)
    advantages, returns = gae(rewards, values, lengths_to_mask(*lengths), gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], rel=1e-12, abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_what_stands_in_the_padding_does_not_matter():
    mask = lengths_to_mask(3, 1)
    rewards, values = tensor([1.0, 0.0, 2.0], [4.0, 0.0, 0.0]), tensor([0.5, 1.0, 1.5], [1.0, 0.0, 0.0])
    clean = gae(rewards, values, mask, 0.9, 0.9)
    nan = torch.where(mask, 0.0, math.nan)
    for expected, actual in zip(clean, gae(rewards + nan, values + nan, mask, 0.9, 0.9), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(whiten(values + nan, mask), whiten(values, mask), rtol=0, atol=0)
    penalised = token_rewards(torch.tensor([1.0, 1.0]), values + nan, rewards + nan, mask, 0.1)
    assert not penalised.isnan().any() and not penalised[~mask].any()


def test_observations_are_no_steps():
    """What stands around them is what would stand there without them, whatever they hold."""
    mask = torch.tensor([[True, False, False, True, True, False], [True, True, False, False, True, False]])
    rewards, values, logprobs, reference = torch.randn(4, 2, 6, dtype=torch.float64).masked_fill(~mask, 50.0)
    scores = torch.tensor([1.0, 2.0])

    def compact(x: torch.Tensor) -> torch.Tensor:
        return x[mask].view(2, 3)

    whole = torch.ones(2, 3, dtype=torch.bool)
    found = gae(rewards, values, mask, 0.9, 0.7)
    for dense, expected in zip(found, gae(compact(rewards), compact(values), whole, 0.9, 0.7), strict=True):
        torch.testing.assert_close(compact(dense), expected, **EXACT)
        assert not dense[~mask].any()
    dense = token_rewards(scores, logprobs, reference, mask, 0.1)
    torch.testing.assert_close(
        compact(dense), token_rewards(scores, compact(logprobs), compact(reference), whole, 0.1), **EXACT
    )
    assert not dense[~mask].any()


def test_whiten_by_hand():
    # Valid: 1, 2, 6. Mean 3; variance (4 + 1 + 9) / 3 = 14 / 3 (divided by n, not n - 1).
    values, mask = tensor([1.0, 2.0], [6.0, 99.0]), lengths_to_mask(2, 1)
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    torch.testing.assert_close(whiten(values, mask), tensor([-2 * scale, -scale], [3 * scale, 0.0]), **EXACT)
    torch.testing.assert_close(
        whiten(values, mask, shift_mean=False), tensor([3 - 2 * scale, 3 - scale], [3 + 3 * scale, 0.0]), **EXACT
    )


def test_whiten_gives_mean_0_and_variance_1_far_from_zero():
    """In float32 a sum of squares around 1000 would leave nothing of a variance of 1e-4."""
    torch.manual_seed(0)
    values, mask = 1000 + 0.01 * torch.randn(64, 32), torch.rand(64, 32) < 0.7
    white = whiten(values, mask)[mask].double()
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.var(correction=0).item() == pytest.approx(1.0, abs=1e-3)


def test_equal_values_whiten_to_zero():
    assert whiten(torch.full((2, 3), 0.3), lengths_to_mask(3, 3)).abs().max() < 1e-6
