"""The losses of the policy and of the critic, and the KL estimators.

Shapes are free, commonly (batch, response); all tensors of a call share one. A loss is a SUM over the masked tokens of
this micro-batch on this rank, divided by `num_tokens`: the number of valid tokens of the whole minibatch, over all
ranks and all micro-batches. Accumulated over micro-batches and summed over ranks
it is the mean over tokens of the one big batch. The statistics are parts of the same kind: add them up likewise.
"""

from typing import Literal

import torch

Stats = dict[str, torch.Tensor]
"""Detached scalars, each this micro-batch's part of a mean over `num_tokens`."""


def token_mean_part(x: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """These tokens' part of a mean over `num_tokens` tokens, a scalar.

    Args:
        x: any shape, floating; what stands outside the mask does not matter.
        mask: the same shape, bool; True = a token that counts.
        num_tokens: that count, of all ranks and micro-batches.

    >>> token_mean_part(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]), num_tokens=4)
    tensor(0.7500)
    """
    return torch.where(mask, x, 0.0).sum() / num_tokens


def loss_weights(
    mask: torch.Tensor,
    mean: Literal["token", "sequence", "constant"],
    num_tokens: int,
    num_sequences: int,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What each token's loss counts, so that the sum over the minibatch is the mean that was asked for.

        token     1 / all tokens of the minibatch              (DAPO, arXiv:2503.14476, sec. 3.3)
        sequence  1 / (sequences * tokens of this response)    (GRPO, arXiv:2402.03300, eq. 3)
        constant  1 / (sequences * max_tokens)                 (Dr. GRPO, arXiv:2503.20783, sec. 3.2)

    Args:
        mask: (batch, response) bool; True = a token that counts.
        mean: which of the three.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches.
        num_sequences: its responses, all ranks and micro-batches.
        max_tokens: of a response, the limit.
        dtype: of the result.

    Returns:
        (batch, response) float, zero outside the mask.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> loss_weights(mask, "sequence", num_tokens=3, num_sequences=2, max_tokens=4)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    if mean == "token":
        counts: torch.Tensor | float = num_tokens
    elif mean == "sequence":
        counts = num_sequences * mask.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        counts = num_sequences * max_tokens
    return mask.to(dtype) / counts


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    num_tokens: int,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, Stats]:
    """The clipped surrogate objective, negated: a loss to minimise.

        ratio = pi(a | s) / pi_old(a | s)
        gain  = min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range_high) * A)
        gain  = max(gain, dual_clip * A) where A < 0
        loss  = -sum of weight * gain

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; two clip ranges as in DAPO (arXiv:2503.14476, sec. 3.1); the dual
    clip of Ye et al. 2020 (arXiv:1912.09729).

    Args:
        logprobs: float, of the policy in training, with gradient.
        old_logprobs: float, of the policy before this step's first update.
        advantages: float.
        mask: bool; True = a token that counts.
        weights: float, of each token: `loss_weights`, times a correction if need be; no gradient.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches; for the statistics.
        clip_range: epsilon, above 0.
        clip_range_high: above 1, if that is another number.
        dual_clip: bound of the ratio where the advantage is negative, above 1; None has none.

    Returns:
        The loss's part of these tokens, scalar, this rank; and parts of
            policy_loss: the same, detached;
            clip_fraction: tokens whose ratio lies outside the clip range (whichever way the advantage points);
            kl: KL(old || new) by the estimator k3, in nats a token.

    >>> one = torch.tensor([1.0])
    >>> loss, stats = policy_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), 3 * one, one.bool(), one, 1,
    ...                           clip_range=0.25)
    >>> loss, stats["clip_fraction"]  # the ratio 2 counts as 1.25
    (tensor(-3.7500), tensor(1.))
    """
    # Masked before exp, not after: a padded token's inf would turn into a NaN gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high))
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    loss = torch.where(mask, -weights * gain, 0.0).sum()
    with torch.no_grad():
        stats = {
            "policy_loss": loss.detach(),
            "clip_fraction": token_mean_part((ratio != clipped).to(ratio.dtype), mask, num_tokens),
            "kl": token_mean_part(kl_k3(log_ratio), mask, num_tokens),
        }
    return loss, stats


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    num_tokens: int,
    estimator: Literal["k1", "k2", "k3"],
) -> tuple[torch.Tensor, Stats]:
    """KL(policy || reference) as a term of the loss (GRPO, arXiv:2402.03300, eq. 4 with k3).

    Its gradient is that of the estimator at the sampled token. k2's is, on average, the gradient of the KL; k3's is
    that of the reverse one, the same to first order where the two policies are close (Schulman 2020); k1's is 0, which
    serves to watch a penalty that is in the rewards.

    Args:
        logprobs: float, of the policy in training, with gradient.
        ref_logprobs: float, of the frozen reference.
        mask, weights, num_tokens: as in `policy_loss`.

    Returns:
        The term's part of these tokens, scalar, this rank, to be multiplied by its coefficient; and parts of
            kl_ref: the estimate's mean over tokens.

    >>> one = torch.tensor([1.0])
    >>> kl_loss(-one, -2 * one, one.bool(), one, 1, "k2")[0]
    tensor(0.5000)
    """
    estimate = KL_ESTIMATORS[estimator](torch.where(mask, ref_logprobs - logprobs, 0.0))
    loss = torch.where(mask, weights * estimate, 0.0).sum()
    return loss, {"kl_ref": token_mean_part(estimate.detach(), mask, num_tokens)}


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float | None,
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """Half the squared error of the values, the worse of clipped and unclipped.

        clipped = old + clip(values - old, -clip_range, clip_range)
        loss    = mean of 1/2 * max((values - returns)^2, (clipped - returns)^2)

    Not in the PPO paper: from OpenAI baselines' ppo2 (`baselines/ppo2/model.py`), detail 9 of Huang et al. 2022, "The
    37 Implementation Details of Proximal Policy Optimization". Andrychowicz et al. 2020, arXiv:2006.05990, found that
    it does not help in continuous control; None switches it off.

    Args:
        values: float, of the policy in training, with gradient.
        old_values: float, before this step's first update.
        returns: float, the targets.
        mask: bool; True = a token that counts.
        clip_range: how far a value may move in a step, in the unit of the returns; None does not clip.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches.

    Returns:
        The loss's part of these tokens, scalar, this rank; and value_loss, the same detached.

    >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([True]), 0.5, 1)[0]
    tensor(3.1250)
    """
    error = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    loss = token_mean_part(0.5 * error, mask, num_tokens)
    return loss, {"value_loss": loss.detach()}


def entropy_bonus(entropy: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, Stats]:
    """The mean entropy: SUBTRACT it, times its coefficient, from the loss (arXiv:1707.06347, eq. 9).

    Args:
        entropy: float, nats, of the distribution each token was drawn from; with gradient if the bonus is used.
        mask: bool; True = a token that counts.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches.

    Returns:
        The bonus's part of these tokens, scalar, this rank; and entropy, the same detached.

    >>> entropy_bonus(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), num_tokens=2)[0]
    tensor(2.)
    """
    bonus = token_mean_part(entropy, mask, num_tokens)
    return bonus, {"entropy": bonus.detach()}


# Estimators of KL(q || p) from a token drawn from q, by J. Schulman, "Approximating KL Divergence" (2020),
# http://joschu.net/blog/kl-approx.html. Each takes log p - log q of the token, any shape.


def kl_k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """-log(p/q): unbiased, but of high variance, and often negative; any shape.

    >>> kl_k1(torch.tensor(-0.5))
    tensor(0.5000)
    """
    return -log_ratio


def kl_k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """log(p/q)^2 / 2: never negative, of low variance, slightly biased; any shape.

    >>> kl_k2(torch.tensor(-0.5))
    tensor(0.1250)
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """p/q - 1 - log(p/q): unbiased, never negative, of low variance; any shape.

    >>> kl_k3(torch.tensor(-0.5))  # exp(-0.5) - 1 + 0.5
    tensor(0.1065)
    """
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
