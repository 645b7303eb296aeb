"""What every algorithm's loss has: policy gradient, entropy bonus, KL penalty, correction for the engine."""

from dataclasses import dataclass

import torch

from trainers.batching import TrainBatch, unpack
from trainers.hyperparameters import Hyperparameters
from trainers.losses import Stats, entropy_bonus, kl_loss, loss_weights, policy_loss
from trainers.mismatch import logprob_gap, mismatch_weights
from trainers.policy import PolicyOutput


@dataclass(frozen=True)
class Minibatch:
    """What a minibatch holds on all ranks and in all micro-batches together; and the limit of a response.

    Attributes:
        num_tokens: of all responses, those that the policy sampled.
        num_sequences: responses.
        max_tokens: of a response (sampling.max_tokens).
    """

    num_tokens: int
    num_sequences: int
    max_tokens: int


def policy_objective(
    part: TrainBatch, output: PolicyOutput, hyper: Hyperparameters, whole: Minibatch
) -> tuple[torch.Tensor, Stats]:
    """The loss of a micro-batch without a critic's: its part of the mean over the minibatch.

    The ratio starts from the engine's log-probs, from the trainer's before the step's first update, or, where nobody
    computed these because this update is the first, from the present ones: it is then 1, and its gradient the policy
    gradient.

    Args:
        part: with advantages; (batch, response).
        output: of the policy in training, packed (tokens,), with gradient and entropies.

    Returns:
        A scalar with gradient, this rank; and the statistics to be added up.
    """
    mask = part.response_mask
    assert part.advantages is not None and output.logprobs is not None and output.entropy is not None
    logprobs = unpack(output.logprobs, mask)
    before = part.logprobs if part.logprobs is not None else logprobs.detach()
    weights = loss_weights(
        mask, hyper.loss_mean, whole.num_tokens, whole.num_sequences, whole.max_tokens, logprobs.dtype
    )
    stats = logprob_gap(before, part.engine_logprobs, mask, whole.num_tokens)
    penalty_weights = weights
    if hyper.mismatch != "no":
        correction, parts = mismatch_weights(
            before, part.engine_logprobs, mask, hyper.mismatch, hyper.mismatch_level, hyper.mismatch_bounds,
            whole.num_tokens,
        )  # fmt: skip
        weights, stats = weights * correction, stats | parts
    old = part.engine_logprobs if hyper.old_logprobs == "engine" else before
    loss, parts = policy_loss(
        logprobs, old, part.advantages, mask, weights, whole.num_tokens,
        hyper.clip_range, hyper.clip_range_high, hyper.dual_clip,
    )  # fmt: skip
    stats |= parts
    if hyper.kl_coef:
        assert part.ref_logprobs is not None
        penalty, parts = kl_loss(logprobs, part.ref_logprobs, mask, penalty_weights, whole.num_tokens, hyper.estimator)
        stats |= parts
        if hyper.kl_in == "loss":
            loss = loss + hyper.kl_coef * penalty
    entropy = output.entropy if hyper.entropy_coef else output.entropy.detach()  # no gradient for what is only logged
    bonus, parts = entropy_bonus(unpack(entropy, mask), mask, whole.num_tokens)
    return loss - hyper.entropy_coef * bonus, stats | parts
