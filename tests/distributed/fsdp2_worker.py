"""Runs in two ranks: the same steps with the policy whole (DDP) and in shards (FSDP2), and checkpoints between them.

torchrun --nproc-per-node=2 tests/distributed/fsdp2_worker.py <folder for the results>
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

import trainers.grpo
import trainers.ppo
from rollout import SamplingConfig, init_world
from tests.distributed.data_parallel_gradient_worker import SCORES, TEMPERATURE, rollouts, tiny_llama
from trainers.across_ranks import whole
from trainers.batching import TrainBatch, make_batch
from trainers.checkpoint import About, load, read_about, save
from trainers.config import GRPOConfig, LoraConfig, ModelConfig, OptimizerConfig, PPOConfig
from trainers.export import exported_state
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters
from trainers.learner import Learner, make_learner, optimize
from trainers.loop import with_old_figures

# Rank 0 has two rows, and so nothing in the third minibatch; rank 1 has six, most of them longer.
SHARES = [slice(0, 2), slice(2, 8)]
COMMON: dict[str, Any] = {"micro_batch_tokens": 6, "minibatches": 3, "kl_coef": 0.1, "entropy_coef": 0.01}
# A gradient near 0 would move a weight by the whole rate, this way or that, as its last digit says.
RATES = {"ppo": 1e-2, "grpo": 1e-4, "lora": 1e-3}
CASES = tuple(RATES)
OPTIMIZER: dict[str, Any] = {"value_learning_rate": 5e-3, "eps": 1e-3, "max_grad_norm": 0.5, "weight_decay": 0.1}


def experiment(case: str, folder: Path, sharding: str) -> PPOConfig | GRPOConfig:
    """They differ in all that sharding meets: a critic, mixed precision, when gradients are reduced, adapters."""
    model: dict[str, Any] = {"path": str(folder / "model"), "sharding": sharding}
    model["gradient_checkpointing"] = sharding == "fsdp2"
    shared: dict[str, Any] = {"sampling": SamplingConfig(temperature=TEMPERATURE, max_tokens=12, n=2)}
    shared["optimizer"] = OptimizerConfig(learning_rate=RATES[case], **OPTIMIZER)
    if case == "ppo":
        model |= {"autocast": "no"}
        hyper = PPOHyperparameters(**COMMON, critic=model["path"], value_coef=0.5)
        return PPOConfig(model=ModelConfig(**model), ppo=hyper, **shared)
    model |= {"autocast": "bf16", "reduce_gradients": "update"}
    if case == "lora":  # float32 over a frozen bfloat16, and its own reference
        model |= {"dtype": "bfloat16"}
        shared["lora"] = LoraConfig(rank=4, alpha=8.0)
    return GRPOConfig(model=ModelConfig(**model), grpo=GRPOHyperparameters(**COMMON), **shared)


def fresh(case: str, folder: Path, sharding: str) -> Learner:
    config = experiment(case, folder, sharding)
    algorithm = trainers.ppo if case == "ppo" else trainers.grpo
    AcceleratorState._reset_state()  # of another precision
    torch.manual_seed(0)  # of adapters
    return make_learner(config, algorithm.load(config), init_world().device)


def batch(step: int) -> TrainBatch:
    """This rank's, of another step with other scores."""
    rows = SHARES[dist.get_rank()] if dist.get_world_size() > 1 else slice(None)
    scores = [score + step * (index % 3) for index, score in enumerate(SCORES)]
    made = make_batch(rollouts(rows), scores[rows], "cpu")
    return replace(made, engine_logprobs=torch.where(made.response_mask, -3.0, 0.0))


def train(case: str, folder: Path, sharding: str, learner: Learner, steps: range) -> list[dict[str, float]]:
    config = experiment(case, folder, sharding)
    algorithm = trainers.ppo if case == "ppo" else trainers.grpo
    rows = []
    for step in steps:
        prepared = algorithm.targets(with_old_figures(batch(step), learner, config), config)
        rows.append(optimize(prepared, learner, algorithm.loss, config, step=step))
    return [{name: value for name, value in row.items() if not name.endswith("per_s")} for row in rows]


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and moments, whole, by name."""
    optimizer: Any = getattr(learner.optimizer, "optimizer", learner.optimizer)
    found = {}
    for name, parameter in learner.policy.named_parameters():
        if not parameter.requires_grad:
            continue
        found[name] = whole(parameter.detach()).clone()
        for kind, moment in optimizer.state[parameter].items():
            found[f"{name} {kind}"] = whole(moment).clone()
    return found


def about(step: int) -> About:
    return About(step, 8 * step, dist.get_world_size(), "ppo", {}, {})


def handed_on(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """Three steps, each by another learner: whole, in shards, whole again; what goes between them is a checkpoint."""
    where = None
    for step, sharding in enumerate(["ddp", "fsdp2", "ddp"]):
        learner = fresh(case, folder, sharding)
        if where is not None:
            load(where, read_about(where), learner, seed=0)
        train(case, folder, sharding, learner, range(step, step + 1))
        where = save(folder / f"run-{case}", about(step + 1), learner, keep=3, private=True)
    return state(learner)


def memory_is_shared_out(learner: Learner) -> None:
    """Each rank holds its half of weights and moments, up to rows that do not split evenly; and nothing whole."""
    sharded = list(learner.policy.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in sharded)
    held, total = sum(each.to_local().numel() for each in sharded), sum(each.numel() for each in sharded)
    assert 0.4 * total < held < 0.6 * total, (held, total)
    assert all(isinstance(parameter, DTensor) for parameter in learner.reference.parameters())


def same_everywhere(found: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor), name


def main(folder: Path) -> None:
    init_world()
    if dist.get_rank() == 0:
        tiny_llama(seed=0).float().save_pretrained(folder / "model")
        (folder / "run-ppo").mkdir()
    dist.barrier()
    found: dict[str, Any] = {}
    for case in CASES:
        for sharding in ("ddp", "fsdp2"):
            learner = fresh(case, folder, sharding)
            metrics = train(case, folder, sharding, learner, range(3))
            if sharding == "fsdp2":
                memory_is_shared_out(learner)
            exported = exported_state(learner.policy.language_model, torch.bfloat16)
            assert bool(exported) == (dist.get_rank() == 0), "of the whole, rank 0 has a copy, nobody else"
            found[f"{case} {sharding}"] = {"metrics": metrics, "state": state(learner), "exported": exported}
            same_everywhere(found[f"{case} {sharding}"]["state"])
    found["ppo handed on"] = {"state": handed_on("ppo", folder)}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
