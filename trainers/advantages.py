"""From scores and values to advantages: token rewards, GAE, groups, whitening. Pure functions, no gradient flows.

All tensors are (batch, response) and right-padded: row b holds its response's tokens in columns 0 to length - 1, and
`response_mask` is True where the policy sampled the token: all of them, or all but an environment's observations in
between. Results are zero outside the mask, whatever the arguments hold there.

The steps of the decision process are the sampled tokens. An observation belongs to the transition that follows the
token before it: the next state is the one before the next sampled token. No discount, reward or value is an
observation's own. (So in verl, `core_algos.compute_gae_advantage_return`, "skip values and TD-error on observation
tokens".)
"""

from typing import Literal

import torch
import torch.distributed as dist

from trainers.across_ranks import sum_over_ranks
from trainers.losses import kl_k1


def token_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    response_mask: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """The reward of each sampled token: a KL penalty on every one, and the response's score on the last.

        r_t = -kl_coef * (log pi(a_t | s_t) - log pi_ref(a_t | s_t)) + [t is last] * score

    as in RLHF (Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Ouyang et al. 2022, arXiv:2203.02155, eq. 2). The penalty
    is the estimator k1: its sum over a sampled response is an unbiased estimate of the sequence's KL, and as a reward
    it has the KL's gradient. k2 and k3 would have another: k3's is grad KL(pi, pi_ref) - grad KL(pi_ref, pi), which
    vanishes to first order near the reference.

    Args:
        scores: (batch,) float, of whole responses.
        logprobs: (batch, response) float, of the policy that sampled, natural log.
        ref_logprobs: (batch, response) float, of the frozen reference; None means no penalty.
        response_mask: (batch, response) bool; True = a generated token.
        kl_coef: price of one nat.

    Returns:
        (batch, response) float32 or wider, zero outside the mask. A row without a token gets no reward.

    Raises:
        ValueError: if there is a penalty but no reference.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]]),
    ...               torch.tensor([[True, True, False]]), kl_coef=0.5)
    tensor([[-0.2500,  1.5000,  0.0000]])
    """
    if kl_coef and ref_logprobs is None:
        raise ValueError(
            f"kl_coef is {kl_coef} but there are no reference log-probs; set kl_coef=0 or load a reference"
        )
    is_last = response_mask & (response_mask.cumsum(dim=1) == response_mask.sum(dim=1, keepdim=True))
    rewards = torch.where(is_last, scores[:, None].to(logprobs.dtype), 0.0)
    if ref_logprobs is not None:
        rewards = rewards - kl_coef * kl_k1(torch.where(response_mask, ref_logprobs - logprobs, 0.0))
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates, and the returns the value head learns.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)                                             (eq. 11)
        A_t     = sum over l of (gamma * lam)^l * delta_{t+l} = delta_t + gamma * lam * A_{t+1}  (eq. 16)
        return_t = A_t + V(s_t)                                                                 (TD(lambda))

    Schulman et al. 2016, arXiv:1506.02438. State s_t is the prompt and the response before its t-th sampled token,
    observations included; t + 1 is the next sampled token, over the observation where one stands between. The last
    token ends the episode, also where a length limit cut the response: V after it is 0, nothing is bootstrapped.

    Args:
        rewards: (batch, response) float.
        values: (batch, response) float, V(s_t): of the state BEFORE token t.
        response_mask: (batch, response) bool; True = a sampled token.
        gamma: discount a token, 0 to 1.
        lam: 1 is the discounted sum of rewards less the value (no bias), 0 is delta alone (least variance).

    Returns:
        advantages and returns, both (batch, response), zero outside the mask.

    >>> advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]),
    ...                           torch.tensor([[True, True]]), gamma=1.0, lam=0.0)
    >>> advantages, returns
    (tensor([[-0.2500,  0.7500]]), tensor([[0.2500, 1.0000]]))
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        sampled = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(sampled, delta + gamma * lam * next_advantage, 0.0)
        # Observations hand on what follows them; padding hands on the 0 of the state after the last token.
        next_advantage = torch.where(sampled, advantages[:, t], next_advantage)
        next_value = torch.where(sampled, values[:, t], next_value)
    return advantages, advantages + values


def group_advantages(
    scores: torch.Tensor, groups: torch.Tensor, how: Literal["grpo", "dr_grpo", "rloo"], eps: float = 1e-6
) -> torch.Tensor:
    """How much better a response is than the others to its prompt.

        grpo     (r - mean of the group) / (its standard deviation + eps)    arXiv:2402.03300, sec. 4.1.2
        dr_grpo  r - mean of the group                                       arXiv:2503.20783, sec. 3.2
        rloo     r - mean of the group's others                              arXiv:2402.14740

    The deviation is the sample's, over size - 1, as in most published code. A response alone in its group gets 0.

    Args:
        scores: (batch,) float, of whole responses, this rank's.
        groups: (batch,) int64, equal for the responses to one prompt; a group is on one rank.

    Returns:
        (batch,) float, in the scores' dtype.

    >>> scores, groups = torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 1])
    >>> group_advantages(scores, groups, "rloo")
    tensor([ 1.0000, -0.5000, -0.5000,  0.0000])
    """
    _, index = groups.unique(return_inverse=True)
    wide = scores.double()
    zeros = wide.new_zeros(int(index.max()) + 1)
    counts = zeros.index_add(0, index, torch.ones_like(wide))[index]
    centred = wide - zeros.index_add(0, index, wide)[index] / counts
    if how == "rloo":
        centred = centred * counts / (counts - 1).clamp(min=1)
    elif how == "grpo":
        squares = zeros.index_add(0, index, centred.square())[index]
        centred = centred / ((squares / (counts - 1).clamp(min=1)).sqrt() + eps)
    return centred.to(scores.dtype)


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Values scaled to variance 1 (and shifted to mean 0) over the valid tokens of ALL ranks: a collective.

        (x - mean) / sqrt(variance + 1e-8), variance = mean of (x - mean)^2

    One step of every rank's batch would otherwise get a scale of its own, and two ranks would not equal one.

    Args:
        values: any shape, float.
        mask: same shape, bool; True = counts.
        shift_mean: False keeps the mean where it was.
        group: the ranks to whiten over; None means all.

    Returns:
        The same shape, zero outside the mask. Equal values become 0 (the mean, without shift_mean).

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    # One collective for all three sums; float64, because a variance from sums of squares cancels digits.
    valid = values[mask].double()
    count, total, squares = sum_over_ranks(
        torch.stack([mask.sum().double(), valid.sum(), valid.square().sum()]), group
    ).unbind()
    assert count > 0, "whiten needs a valid token on some rank"
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0.0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype)
