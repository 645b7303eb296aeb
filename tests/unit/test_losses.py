"""The losses against numbers worked out by hand, their gradients, and the estimators' expectations by enumeration."""

import math

import pytest
import torch

from trainers.across_ranks import undo_ddp_mean
from trainers.losses import entropy_bonus, kl_k1, kl_k2, kl_k3, kl_loss, loss_weights, policy_loss, value_loss

EXACT = dict(rtol=1e-12, atol=1e-12)
ALL = torch.ones(5, dtype=torch.bool)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_by_hand():
    ratio, advantages = tensor(1.5, 0.5, 1.5, 0.5, 1.1), tensor(2.0, 2.0, -2.0, -2.0, 1.0)
    logprobs = ratio.log().requires_grad_()
    loss, stats = policy_loss(logprobs, torch.zeros(5).double(), advantages, ALL, ALL.double() / 5, 5, clip_range=0.2)
    # min(1.5 * 2, 1.2 * 2) = 2.4;      min(0.5 * 2, 0.8 * 2) = 1;
    # min(1.5 * -2, 1.2 * -2) = -3;     min(0.5 * -2, 0.8 * -2) = -1.6;     min(1.1, 1.1) = 1.1.
    # -(2.4 + 1 - 3 - 1.6 + 1.1) / 5 = 0.02.
    torch.testing.assert_close(loss, tensor(0.02)[0], **EXACT)
    torch.testing.assert_close(stats["policy_loss"], loss.detach(), **EXACT)
    assert stats["clip_fraction"].item() == 0.8  # all but 1.1 lie outside 0.8 to 1.2
    # k3 = ratio - 1 - log ratio:
    # twice 0.5 - log 1.5 = 0.09453, twice -0.5 - log 0.5 = 0.19315, 0.1 - log 1.1 = 0.00469.
    assert stats["kl"].item() == pytest.approx((2 * 0.0945348919 + 2 * 0.1931471806 + 0.0046898202) / 5, rel=1e-9)
    loss.backward()
    # d(ratio * A) / d log-prob = ratio * A where the minimum is the unclipped side, else 0; times -1/5.
    torch.testing.assert_close(logprobs.grad, tensor(0.0, -0.2, 0.6, 0.0, -0.22), **EXACT)


def test_two_clip_ranges_and_the_dual_clip_by_hand():
    ratio, advantages = tensor(1.5, 1.25, 0.5, 4.0, 2.0), tensor(2.0, 2.0, 2.0, -1.0, -1.0)
    logprobs = ratio.log().requires_grad_()
    loss, stats = policy_loss(
        logprobs, torch.zeros(5).double(), advantages, ALL, ALL.double(), 5, clip_range=0.2, clip_range_high=0.3,
        dual_clip=3.0,
    )  # fmt: skip
    # 1.3 * 2; 1.25 * 2, inside; 0.5 * 2 < 0.8 * 2; max(-4, 3 * -1) = -3; -2.
    torch.testing.assert_close(loss, -tensor(2.6 + 2.5 + 1.0 - 3.0 - 2.0)[0], **EXACT)
    assert stats["clip_fraction"].item() == 0.8  # all but 1.25 lie outside 0.8 to 1.3
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor(0.0, -2.5, -1.0, 0.0, 2.0), **EXACT)


MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ("token", [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]),
        ("sequence", [[1 / 6, 1 / 6, 1 / 6], [0.5, 0.0, 0.0]]),
        ("constant", [[0.1, 0.1, 0.1], [0.1, 0.0, 0.0]]),
    ],
)
def test_what_each_token_counts(mean: str, expected: list[list[float]]):
    weights = loss_weights(MASK, mean, num_tokens=4, num_sequences=2, max_tokens=5, dtype=torch.float64)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_kl_in_the_loss_by_hand():
    logprobs = tensor(-1.0, -2.0).requires_grad_()
    loss, stats = kl_loss(logprobs, tensor(-2.0, -2.0), ALL[:2], tensor(0.5, 0.5), 2, "k2")
    assert (loss.item(), stats["kl_ref"].item()) == (0.25, 0.25)  # (1 / 2 + 0) / 2
    loss.backward()
    # d k2 / d log-prob = log-prob - reference's: the expectation of that times the score is the KL's gradient.
    torch.testing.assert_close(logprobs.grad, tensor(0.5, 0.0), **EXACT)
    loss, _ = kl_loss(logprobs, tensor(-2.0, -2.0), ALL[:2], tensor(0.5, 0.5), 2, "k3")
    assert loss.item() == pytest.approx((math.exp(-1.0) - 1 + 1) / 2, rel=1e-12)


def test_value_loss_by_hand():
    values = tensor(2.0, 0.1, -1.0, 0.5).requires_grad_()
    returns, old = tensor(3.0, 1.0, 0.0, 0.5), torch.zeros(4).double()
    loss, stats = value_loss(values, old, returns, ALL[:4], clip_range=0.5, num_tokens=4)
    # Unclipped errors^2: 1, 0.81, 1, 0. Clipped values 0.5, 0.1, -0.5, 0.5: 6.25, 0.81, 0.25, 0.
    # The worse: 6.25, 0.81, 1, 0. Half their sum over 4: 8.06 / 8 = 1.0075.
    torch.testing.assert_close(loss, tensor(1.0075)[0], **EXACT)
    torch.testing.assert_close(stats["value_loss"], loss.detach(), **EXACT)
    loss.backward()
    # (value - return) / 4 where the unclipped error counts, 0 where the clipped one does. Token 1 is both: its clipped
    # value is the value itself.
    torch.testing.assert_close(values.grad, tensor(0.0, -0.225, -0.25, 0.0), **EXACT)


def test_value_loss_without_clipping():
    loss, _ = value_loss(tensor(2.0, 0.1), tensor(0.0, 0.0), tensor(3.0, 1.0), ALL[:2], clip_range=None, num_tokens=2)
    torch.testing.assert_close(loss, tensor(0.4525)[0], **EXACT)  # (1 + 0.81) / 2 / 2


def test_entropy_bonus_by_hand():
    bonus, stats = entropy_bonus(tensor(1.0, 2.0, 9.0), torch.tensor([True, True, False]), num_tokens=6)
    assert bonus.item() == 0.5 and stats["entropy"].item() == 0.5  # (1 + 2) / 6


def parts(rows: slice | list[int], num_tokens: int) -> torch.Tensor:
    """Losses and statistics of some rows of one random batch of 5, stacked."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages, values, old_values, returns = torch.randn(6, 5, 7, generator=generator).double()
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 1, 4])[:, None]
    weights = loss_weights(mask[rows], "token", num_tokens, num_sequences=5, max_tokens=7, dtype=torch.float64)
    policy, stats = policy_loss(logprobs[rows], old[rows], advantages[rows], mask[rows], weights, num_tokens, 0.2)
    value, _ = value_loss(values[rows], old_values[rows], returns[rows], mask[rows], 0.2, num_tokens)
    bonus, _ = entropy_bonus(returns[rows], mask[rows], num_tokens)
    return torch.stack([policy, value, bonus, stats["kl"], stats["clip_fraction"]])


def test_parts_of_micro_batches_add_up_to_the_whole_batch():
    whole = parts(slice(None), num_tokens=19)  # 7 + 2 + 5 + 1 + 4
    torch.testing.assert_close(parts([0], 19) + parts([1, 2, 3], 19) + parts([4], 19), whole, **EXACT)
    assert (whole != 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_in_the_padding_reaches_neither_loss_nor_gradient(garbage: float):
    mask = torch.tensor([True, False])
    logprobs, values = tensor(-1.0, garbage).requires_grad_(), tensor(1.0, garbage).requires_grad_()
    policy, stats = policy_loss(logprobs, tensor(-1.5, -1.0), tensor(1.0, garbage), mask, tensor(1.0, 0.0), 1, 0.2)
    value, _ = value_loss(values, tensor(0.0, 0.0), tensor(3.0, 1.0), mask, None, num_tokens=1)
    # The ratio exp(0.5) = 1.6 is clipped to 1.2; (1 - 3)^2 / 2 = 2.
    assert (policy.item(), value.item()) == pytest.approx((-1.2, 2.0), rel=1e-12)
    assert stats["kl"].item() == pytest.approx(math.exp(0.5) - 1.5, rel=1e-12)
    policy.backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_kl_estimators_by_hand_and_in_expectation():
    q, p = tensor(0.5, 0.25, 0.25), tensor(0.25, 0.25, 0.5)
    log_ratio = (p / q).log()  # -log 2, 0, log 2
    log2 = math.log(2)
    torch.testing.assert_close(kl_k1(log_ratio), tensor(log2, 0.0, -log2), **EXACT)
    torch.testing.assert_close(kl_k2(log_ratio), tensor(log2**2 / 2, 0.0, log2**2 / 2), **EXACT)
    torch.testing.assert_close(kl_k3(log_ratio), tensor(0.5 - 1 + log2, 0.0, 2 - 1 - log2), **EXACT)
    # Drawn from q, k1 and k3 are unbiased: KL(q || p) = 0.5 log 2 + 0.25 log(1/2) = 0.25 log 2. k2 is not.
    assert (q * kl_k1(log_ratio)).sum().item() == pytest.approx(0.25 * log2, rel=1e-12)
    assert (q * kl_k3(log_ratio)).sum().item() == pytest.approx(0.25 * log2, rel=1e-12)
    assert (q * kl_k2(log_ratio)).sum().item() == pytest.approx(0.75 * log2**2 / 2, rel=1e-12)


def test_alone_in_the_world_scales_nothing_away():
    assert undo_ddp_mean(torch.tensor(2.5)).item() == 2.5
