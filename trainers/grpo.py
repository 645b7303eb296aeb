"""Policy gradients without a critic: GRPO, Dr. GRPO, RLOO, REINFORCE++ (sources: `trainers.advantages`)."""

from pathlib import Path

import torch

from trainers.advantages import gae, group_advantages, token_rewards, whiten
from trainers.batching import TrainBatch
from trainers.config import GRPOConfig
from trainers.loop import Algorithm, train
from trainers.losses import Stats
from trainers.objective import Minibatch, policy_objective
from trainers.policy import Policy, PolicyOutput, load_policy


def train_grpo(config: GRPOConfig) -> Path:
    """Run the experiment; see `trainers.loop.train`."""
    return train(config, Algorithm(load, targets, loss))


def load(config: GRPOConfig) -> Policy:
    """The policy alone."""
    model = config.model
    return load_policy(model.path, model.dtype, model.gradient_checkpointing, lora=config.lora)


def targets(batch: TrainBatch, config: GRPOConfig) -> TrainBatch:
    """A response's advantage on each of its tokens; REINFORCE++'s are of what follows the token, and a collective."""
    grpo, mask = config.grpo, batch.response_mask
    if not len(batch):  # the others still whiten with this rank
        nothing = torch.zeros_like(batch.engine_logprobs)
        return batch.with_targets(whiten(nothing, mask) if grpo.advantage == "reinforce_pp" else nothing)
    rewards = token_rewards(batch.scores, batch.sampled_logprobs, batch.ref_logprobs, mask, grpo.reward_kl_coef)
    if grpo.advantage == "reinforce_pp":
        to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
        return batch.with_targets(whiten(to_go, mask))
    of_responses = group_advantages(rewards.sum(dim=1), batch.groups, grpo.advantage)
    return batch.with_targets(torch.where(mask, of_responses[:, None], 0.0))


def loss(part: TrainBatch, output: PolicyOutput, config: GRPOConfig, whole: Minibatch) -> tuple[torch.Tensor, Stats]:
    """The policy's loss, a scalar, and its statistics; this micro-batch's part of `whole`."""
    return policy_objective(part, output, config.grpo, whole)
