"""PPO's losses and the KL estimators.

Shapes are free, commonly (batch, response); all tensors of a call share one. A loss is a SUM over the masked tokens of
this micro-batch on this rank, divided by `num_tokens`: the number of valid tokens of the whole minibatch, over all
ranks and all micro-batches (`across_ranks.count_over_ranks`). Accumulated over micro-batches and summed over ranks
it is the mean over tokens of the one big batch. The statistics are parts of the same kind: add them up likewise.
"""

import torch

Stats = dict[str, torch.Tensor]
"""Detached scalars, each this micro-batch's part of a mean over `num_tokens`."""


def token_mean_part(x: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """These tokens' part of a mean over `num_tokens` tokens; what stands outside the mask does not matter.

    >>> token_mean_part(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]), num_tokens=4)
    tensor(0.7500)
    """
    return torch.where(mask, x, 0.0).sum() / num_tokens


def ppo_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """The clipped surrogate objective, negated: a loss to minimise.

        ratio = pi(a | s) / pi_old(a | s)
        loss  = -mean of min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A)

    Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    Args:
        logprobs: float, of the policy in training, with gradient.
        old_logprobs: float, of the policy before this step's first update.
        advantages: float.
        mask: bool; True = a token that counts.
        clip_range: epsilon, above 0.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches.

    Returns:
        The loss's part of these tokens, scalar, this rank; and parts of
            policy_loss: the same, detached;
            clip_fraction: tokens whose ratio lies outside the clip range (whichever way the advantage points);
            kl: KL(old || new) by the estimator k3, in nats a token.

    >>> loss, stats = ppo_policy_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([3.0]),
    ...                               torch.tensor([True]), clip_range=0.25, num_tokens=1)
    >>> loss, stats["clip_fraction"]  # the ratio 2 counts as 1.25
    (tensor(-3.7500), tensor(1.))
    """
    # Masked before exp, not after: a padded token's inf would turn into a NaN gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = token_mean_part(-torch.minimum(ratio * advantages, clipped * advantages), mask, num_tokens)
    with torch.no_grad():
        stats = {
            "policy_loss": loss.detach(),
            "clip_fraction": token_mean_part((ratio != clipped).to(ratio.dtype), mask, num_tokens),
            "kl": token_mean_part(kl_k3(log_ratio), mask, num_tokens),
        }
    return loss, stats


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
    """-log(p/q): unbiased, but of high variance, and often negative.

    >>> kl_k1(torch.tensor(-0.5))
    tensor(0.5000)
    """
    return -log_ratio


def kl_k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """log(p/q)^2 / 2: never negative, of low variance, slightly biased.

    >>> kl_k2(torch.tensor(-0.5))
    tensor(0.1250)
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """p/q - 1 - log(p/q): unbiased, never negative, of low variance.

    >>> kl_k3(torch.tensor(-0.5))  # exp(-0.5) - 1 + 0.5
    tensor(0.1065)
    """
    return torch.expm1(log_ratio) - log_ratio
