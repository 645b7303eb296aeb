"""Runs in each rank, of which some make a replica, one each by default; results to OUT/rankN.json.

torchrun --nproc_per_node=2 replicas_worker.py MODEL OUT [TENSOR_PARALLEL_SIZE]
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig


def of_a_sharded_policy(engine: RolloutEngine, model: str) -> dict[str, bool]:
    """FSDP2 over all ranks, of two groups that hold the same where there are four: do all replicas hold its weights?"""
    ranks = dist.get_world_size()
    found = {}
    for shape in ((ranks,), (2, ranks // 2)):
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in policy.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(0.5 + version)
            planned = engine.sync_weights(policy, version).planned
            engine.check_weights(policy)
        found[str(shape)] = planned
    return found


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    size = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    config = RolloutConfig(tensor_parallel_size=size, max_model_len=128, kv_cache_gib=0.25, enforce_eager=True)
    with RolloutEngine(model, config) as engine:
        rank = engine.world.rank // size
        prompts = [[10 + rank, 20, 30]] * (2 + 3 * rank)
        batch = engine.generate(prompts, SamplingConfig(max_tokens=4 + 8 * rank, n=2, ignore_eos=True))
        result = {"rows": len(batch), "tokens": int(batch.response_lengths.sum()), "metrics": engine.metrics}
        result["sync"] = of_a_sharded_policy(engine, model)
    (out / f"rank{engine.world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
