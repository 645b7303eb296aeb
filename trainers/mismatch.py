"""The engine samples from one policy, the trainer differentiates another: the same weights, computed differently.

Other kernels, other precision, another order of sums. The ratio of their probabilities is an importance weight, and
without it the gradient is that of nobody's objective. Truncated importance sampling: F. Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl); masking: Ling
Team 2025, "Every Step Evolves" (arXiv:2510.18855, IcePop).
"""

from typing import Literal

import torch

from trainers.losses import Stats, token_mean_part


def mismatch_weights(
    trainer_logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    mask: torch.Tensor,
    how: Literal["truncate", "mask"],
    level: Literal["token", "sequence"],
    bounds: tuple[float, float],
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """What each token's loss is multiplied by, so that tokens drawn by the engine stand for the trainer's policy.

        w = pi_trainer(a | s) / pi_engine(a | s)      of a token, or its product over the response
        truncate: min(w, upper)          mask: w where lower <= w <= upper, else 0

    Args:
        trainer_logprobs: (batch, response) float, of the policy before the step's first update; no gradient flows.
        engine_logprobs: (batch, response) float, of the same weights, as sampled.
        mask: (batch, response) bool; True = a token that counts.
        bounds: lower and upper.
        num_tokens: valid tokens of the minibatch, all ranks and micro-batches; for the statistics.

    Returns:
        (batch, response) float, 1 outside the mask; and parts of
            mismatch_weight: its mean over tokens;
            mismatch_cut: the share of tokens whose weight lay beyond a bound that counts.

    >>> weights, stats = mismatch_weights(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.4]]).log(),
    ...                                   torch.tensor([[True, True]]), "mask", "token", (0.5, 2.0), 2)
    >>> weights, stats["mismatch_cut"]
    (tensor([[0.0000, 1.2500]]), tensor(0.5000))
    """
    log_weights = torch.where(mask, trainer_logprobs.detach() - engine_logprobs, 0.0)
    if level == "sequence":
        log_weights = torch.where(mask, log_weights.sum(dim=1, keepdim=True), 0.0)
    weights, (low, high) = log_weights.exp(), bounds
    cut = weights > high
    if how == "mask":
        cut = cut | (weights < low)
    weights = torch.where(cut, 0.0 if how == "mask" else high, weights)
    return weights, {
        "mismatch_weight": token_mean_part(weights, mask, num_tokens),
        "mismatch_cut": token_mean_part(cut.to(weights.dtype), mask, num_tokens),
    }


def logprob_gap(
    trainer_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, mask: torch.Tensor, num_tokens: int
) -> Stats:
    """|trainer's log-prob - engine's| of the same tokens: part of the mean, and this micro-batch's maximum; scalars.

    Args:
        trainer_logprobs, engine_logprobs: any shape, float, natural log.
        mask: the same shape, bool; True = a generated token.
        num_tokens: of all ranks and micro-batches.

    >>> gap = logprob_gap(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([True, True]), 2)
    >>> gap["logprob_gap_mean"], gap["logprob_gap_max"]
    (tensor(0.2500), tensor(0.5000))
    """
    gap = torch.where(mask, (trainer_logprobs.detach() - engine_logprobs).abs(), 0.0)
    return {"logprob_gap_mean": token_mean_part(gap, mask, num_tokens), "logprob_gap_max": gap.max()}
