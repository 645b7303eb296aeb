"""Runs in each rank, of which some make a replica, one each by default; results to OUT/rankN.json.

torchrun --nproc_per_node=2 replicas_worker.py MODEL OUT [TENSOR_PARALLEL_SIZE]
"""

import json
import sys
from dataclasses import replace
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


def balanced(model: str, config: RolloutConfig) -> dict[str, object]:
    """The same prompts on each rank, by replicas on their own and by replicas that share them out.

    Rank 0's are the first of the job in both, and so are their streams: whoever answers them says the same.
    """
    prompts = [[10 + number, 20, 30] for number in range(3)]
    sampling = SamplingConfig(max_tokens=12, n=2, ignore_eos=True)
    said = {}
    for balance in (False, True):
        with RolloutEngine(model, replace(config, dtype="float32", balance=balance)) as engine:
            batch = engine.generate(prompts, sampling, seed=5)
            said[balance] = [rollout.response_ids.tolist() for rollout in batch]
            few = [[1, 2]] if engine.world.rank == 0 else []  # one replica has nothing to do, and waits
            none = engine.generate(few, replace(sampling, max_tokens=120))
            seconds = engine.metrics["rollout/seconds"]
    return {"alone": said[False], "balanced": said[True], "few": len(none), "few_seconds": seconds}


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
    if size == 1:
        result["balance"] = balanced(model, config)
    (out / f"rank{engine.world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
