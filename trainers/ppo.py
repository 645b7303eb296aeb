"""Proximal policy optimisation of a language model on its own rollouts (Schulman et al. 2017, arXiv:1707.06347)."""

from pathlib import Path

import torch

from trainers.advantages import gae, token_rewards, whiten
from trainers.batching import TrainBatch, unpack
from trainers.config import PPOConfig
from trainers.loop import Algorithm, train
from trainers.losses import Stats, value_loss
from trainers.objective import Minibatch, policy_objective
from trainers.policy import Policy, PolicyOutput, load_policy


def train_ppo(config: PPOConfig) -> Path:
    """Run the experiment; see `trainers.loop.train`."""
    return train(config, Algorithm(load, targets, loss))


def load(config: PPOConfig) -> Policy:
    """The policy and its critic: a value head on the policy's trunk, or on a model of its own (ppo.critic)."""
    model = config.model
    return load_policy(model.path, model.dtype, model.gradient_checkpointing, True, config.ppo.critic, config.lora)


def targets(batch: TrainBatch, config: PPOConfig) -> TrainBatch:
    """Advantages by GAE over token rewards, and the critic's returns; a collective if they are whitened."""
    ppo, mask = config.ppo, batch.response_mask
    if not len(batch):  # the others still whiten with this rank
        nothing = torch.zeros_like(batch.engine_logprobs)
        return batch.with_targets(whiten(nothing, mask) if ppo.whiten_advantages else nothing, nothing)
    assert batch.values is not None
    rewards = token_rewards(batch.scores, batch.sampled_logprobs, batch.ref_logprobs, mask, ppo.reward_kl_coef)
    advantages, returns = gae(rewards, batch.values, mask, ppo.gamma, ppo.lam)
    return batch.with_targets(whiten(advantages, mask) if ppo.whiten_advantages else advantages, returns)


def loss(part: TrainBatch, output: PolicyOutput, config: PPOConfig, whole: Minibatch) -> tuple[torch.Tensor, Stats]:
    """The policy's loss and the critic's, a scalar, and their statistics; this micro-batch's part of `whole`."""
    assert output.values is not None and part.values is not None and part.returns is not None
    of_policy, stats = policy_objective(part, output, config.ppo, whole)
    mask = part.response_mask
    of_critic, critic_stats = value_loss(
        unpack(output.values, mask), part.values, part.returns, mask, config.ppo.value_clip_range, whole.num_tokens
    )
    return of_policy + config.ppo.value_coef * of_critic, stats | critic_stats
