"""The gradient of one update of each algorithm, from this rank's share of 8 rows, by the trainers' own code, saved.

torchrun --nproc-per-node=2 tests/distributed/data_parallel_gradient_worker.py <folder for the results>
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import trainers.grpo
import trainers.ppo
from rollout import RolloutBatch, SamplingConfig, init_world
from trainers.across_ranks import whole
from trainers.batching import TrainBatch, make_batch
from trainers.config import GRPOConfig, LoraConfig, ModelConfig, OptimizerConfig, PPOConfig
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters
from trainers.learner import Learner, update
from trainers.lora import add_adapters
from trainers.no_grad_pass import no_grad_pass
from trainers.packing import microbatches
from trainers.policy import Policy
from trainers.sharding import shard

# Two ranks take four rows each: the first all short ones (7 response tokens), the second all long ones (32).
PROMPTS = [2, 2, 3, 3, 5, 5, 5, 5]
RESPONSES = [1, 2, 1, 3, 9, 7, 11, 5]
SCORES = [1.0, 0.0, 0.5, -1.0, 2.0, 0.0, 1.0, 3.0]
GROUPS = [0, 0, 1, 1, 2, 2, 2, 2]  # responses to one prompt; no group is on two ranks
# Where an environment spoke, in the cases with turns: by row, the first column of an observation and the one after it.
OBSERVED = {3: [(1, 2)], 4: [(2, 5)], 5: [(3, 4)], 6: [(1, 3), (6, 9)]}
ODD = 50.0  # stands where nothing may look: in padding and observations
TEMPERATURE, MAX_TOKENS = 0.8, 12
CRITIC_SEED = 5
REDUCE_ONCE = ("ppo_critic", "dapo")  # of the cases in shards; the others reduce with each micro-batch

# 6 tokens a micro-batch: rank 0 needs two (5 and 3 tokens), rank 1 four of a row each. Two minibatches are
# announced, of which one is made here, so that the ratio starts from the old log-probs.
COMMON: dict[str, Any] = {"micro_batch_tokens": 6, "minibatches": 2, "entropy_coef": 0.01, "kl_coef": 0.1}
PPO = {"gamma": 0.98, "lam": 0.9, "value_clip_range": 0.3, "value_coef": 0.5, **COMMON}
HYPERPARAMETERS = {
    "ppo": PPOHyperparameters(**PPO),
    "ppo_lora": PPOHyperparameters(**PPO),
    "ppo_critic": PPOHyperparameters(**PPO, critic="given", kl_in="loss", kl_estimator="k2"),
    "grpo": GRPOHyperparameters(**COMMON, loss_mean="sequence"),
    "dapo": GRPOHyperparameters(
        **COMMON, clip_range_high=0.3, dual_clip=1.1, mismatch="truncate", mismatch_bounds=(0.5, 1.2), kl_estimator="k2"
    ),
    "dr_grpo": GRPOHyperparameters(
        **COMMON, advantage="dr_grpo", loss_mean="constant", mismatch="mask", mismatch_bounds=(0.9, 1.1)
    ),
    "rloo": GRPOHyperparameters(**COMMON, advantage="rloo", old_logprobs="engine", kl_in="reward"),
    "reinforce_pp": GRPOHyperparameters(
        **COMMON,
        advantage="reinforce_pp",
        kl_in="reward",
        kl_estimator="k1",
        mismatch="mask",
        mismatch_level="sequence",
        mismatch_bounds=(0.8, 1.2),
    ),
    "ppo_turns": PPOHyperparameters(**PPO),
    "grpo_turns": GRPOHyperparameters(
        **COMMON,
        loss_mean="sequence",
        kl_estimator="k2",
        mismatch="truncate",
        mismatch_level="sequence",
        mismatch_bounds=(0.5, 1.1),
    ),
}


def experiment(case: str) -> PPOConfig | GRPOConfig:
    shared: dict[str, Any] = {
        "sampling": SamplingConfig(temperature=TEMPERATURE, max_tokens=MAX_TOKENS, n=2),
        "optimizer": OptimizerConfig(max_grad_norm=1e9),
        "model": ModelConfig(reduce_gradients="update" if case in REDUCE_ONCE else "micro_batch"),
    }
    hyper = HYPERPARAMETERS[case]
    if isinstance(hyper, PPOHyperparameters):
        return PPOConfig(ppo=hyper, **shared)
    assert isinstance(hyper, GRPOHyperparameters)
    return GRPOConfig(grpo=hyper, **shared)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A random model in float64, its logits far from flat; its embedding is its head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double()


def old_policy(case: str) -> Policy:
    with_critic = case == "ppo_critic"
    critic = tiny_llama(CRITIC_SEED).model if with_critic else None
    language_model = tiny_llama(seed=0)
    if case == "ppo_lora":
        add_adapters(language_model, LoraConfig(rank=3, alpha=2.0), base="")
        fill_adapters(language_model)
    policy = Policy(language_model, with_values=case.startswith("ppo"), critic=critic)
    if policy.value_head is not None:
        torch.nn.init.normal_(policy.value_head.weight)
    return policy


def fill_adapters(language_model: LlamaForCausalLM) -> None:
    """Adapters that are not zero, so that the reference without them is another model."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def reference_of(case: str, policy: Policy) -> Policy:
    """The policy itself, its adapters switched off; of a policy without any, another model."""
    return policy if case == "ppo_lora" else Policy(tiny_llama(seed=1)).requires_grad_(False)


def move(policy: Policy) -> None:
    """What earlier updates of the step would have done, so that ratios leave 1 and some are clipped."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (each for each in policy.parameters() if each.requires_grad):
            noise = 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise)


def sampled(case: str) -> list[list[bool]]:
    """Of each row's response tokens, which ones the policy sampled."""
    mask = [[True] * length for length in RESPONSES]
    for row, spans in OBSERVED.items() if case.endswith("_turns") else ():
        for start, end in spans:
            mask[row][start:end] = [False] * (end - start)
    return mask


def rollouts(rows: slice, case: str = "") -> RolloutBatch:
    random = np.random.default_rng(0)
    distinct = {group: random.integers(1, 37, length, np.int32) for group, length in zip(GROUPS, PROMPTS, strict=True)}
    prompts = [distinct[group] for group in GROUPS][rows]
    responses = [random.integers(1, 37, length, np.int32) for length in RESPONSES][rows]
    lengths = np.array([len(ids) for ids in responses], np.int32)
    return RolloutBatch(
        prompt_ids=np.concatenate(prompts),
        prompt_lengths=np.array([len(ids) for ids in prompts], np.int32),
        response_ids=np.concatenate(responses),
        response_lengths=lengths,
        logprobs=np.zeros(lengths.sum(), np.float32),
        finished=np.ones(len(lengths), bool),
        prompt_index=np.array(GROUPS[rows], np.int32),
        version=0,
        generated=np.concatenate(sampled(case)[rows]) if case.endswith("_turns") else None,
    )


def disagreement() -> torch.Tensor:
    """(8, 12) float64: what the engine's log-probs differ by from the trainer's."""
    return 0.15 * torch.randn(8, MAX_TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def passed_batch(case: str, policy: Policy, reference: Policy, rows: slice, device: torch.device) -> TrainBatch:
    hyper = HYPERPARAMETERS[case]
    batch = make_batch(rollouts(rows, case), SCORES[rows], device)
    all_of_it = no_grad_pass(batch, policy, reference, TEMPERATURE, hyper.micro_batch_tokens)
    noise = disagreement()[rows, : batch.response_mask.shape[1]]
    found = {"engine_logprobs": all_of_it.logprobs + noise, "logprobs": all_of_it.logprobs}
    found |= {"ref_logprobs": all_of_it.ref_logprobs, "values": all_of_it.values}
    odd = {name: torch.where(batch.response_mask, x, ODD) for name, x in found.items() if x is not None}
    wanted = replace(all_of_it, **odd)
    return wanted if hyper.needs_old_logprobs else replace(wanted, logprobs=None)


def weights(policy: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {name: whole(parameter.detach()).clone() for name, parameter in trained.items()}


def one_update(case: str, accelerator: Accelerator, sharded: bool) -> dict:
    """The gradient, which is what plain descent at rate 1 takes off; statistics, advantages, micro-batches."""
    share = len(SCORES) // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    config, policy = experiment(case), old_policy(case)
    reference = reference_of(case, policy)
    if sharded:
        shard(policy, accelerator.device)
        if reference is not policy:
            shard(reference, accelerator.device)
    batch = passed_batch(case, policy, reference, rows, accelerator.device)
    algorithm = trainers.ppo if case.startswith("ppo") else trainers.grpo
    batch = algorithm.targets(batch, config)
    move(policy)
    before = weights(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    ddp, optimizer = (policy, optimizer) if sharded else accelerator.prepare(policy, optimizer)
    learner = Learner(accelerator, policy, ddp, optimizer, reference=None)
    (minibatch,) = batch.minibatches(num_minibatches=1, epochs=1, seed=0)
    stats = update(minibatch, learner, algorithm.loss, config)
    return {
        "gradients": {name: before[name] - after for name, after in weights(policy).items()},
        "stats": stats,
        "advantages": batch.advantages[batch.response_mask],
        "num_micro_batches": len(microbatches(minibatch, config.algorithm.micro_batch_tokens, policy.packs)),
    }


def main(folder: Path) -> None:
    init_world()
    accelerator = Accelerator(cpu=True)
    for kind in ("whole", "sharded"):
        updates = {case: one_update(case, accelerator, kind == "sharded") for case in HYPERPARAMETERS}
        torch.save(updates, folder / f"{kind}{accelerator.process_index}.pt")
    # DDP's wrapper has to go before the process group does. If it holds the group's last reference, the group joins its
    # threads with the interpreter's lock held, and a gloo thread that wants that lock to end never gets it.
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
