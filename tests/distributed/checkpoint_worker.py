"""Runs in two ranks: a policy in FSDP2's shards and a plain one save for each other, and a disk is full on rank 1."""

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainers.checkpoint import About, CheckpointError, load, read_about, save, whole_checkpoints


def learner(seed: int, sharded: bool) -> Any:
    """Trained for two updates. 5 rows do not split evenly over two ranks."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in policy:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    for _ in range(2):
        policy(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(policy=policy, optimizer=optimizer, accelerator=SimpleNamespace(scaler=None))


def whole_state(made: Any) -> list[torch.Tensor]:
    found = []
    for parameter in made.policy.parameters():
        moments = made.optimizer.state[parameter]
        found += [parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"], moments["step"]]
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]


def about(step: int) -> About:
    return About(step, 8 * step, dist.get_world_size(), "ppo", {}, {})


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for step, (saved_sharded, loaded_sharded) in enumerate([(True, True), (True, False), (False, True)], 1):
        ours, theirs = learner(1, saved_sharded), learner(2, loaded_sharded)
        where = save(folder, about(step), ours, keep=2, private=True)
        load(where, read_about(where), theirs, seed=0)
        assert all(torch.equal(*pair) for pair in zip(whole_state(ours), whole_state(theirs), strict=True)), step
        assert len(read_about(where).files) == 2, "each rank writes its part"

    ours, theirs = learner(1, False), learner(2, False)
    torch.manual_seed(100 + rank)
    where = save(folder, about(4), ours, keep=2, private=True)
    drawn = torch.rand(3)
    load(where, read_about(where), theirs, seed=0)
    assert torch.equal(torch.rand(3), drawn), "each rank has its own generators back"
    full_disk_on_rank_1(folder)
    dist.barrier()
    dist.destroy_process_group()


def full_disk_on_rank_1(folder: Path) -> None:
    """Both ranks raise, in the same words; then there is room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = whole_checkpoints(folder)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        save(folder, about(5), learner(1, False), keep=2, private=True)
        raise AssertionError("saved on a full disk")
    except CheckpointError as error:
        assert "rank 1: OSError: [Errno 27] File too large" in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_checkpoints(folder) == before and len(before) == 2
    dist.barrier()
    save(folder, about(5), learner(1, False), keep=2, private=True)
    dist.barrier()
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000004", "step-000005"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
