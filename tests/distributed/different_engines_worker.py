"""Runs in every rank: engines whose ranks were given something else; what was raised, and after how long, to OUT.

torchrun --nproc_per_node=2 different_engines_worker.py OUT
"""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from rollout import RolloutConfig, RolloutEngine, init_world


def main() -> None:
    world = init_world()
    rank = world.rank
    given = {
        "tensor_parallel_size": ("model", RolloutConfig(tensor_parallel_size=1 + rank)),
        "balance": ("model", RolloutConfig(tensor_parallel_size=1, balance=rank == 1)),
        "seed": ("model", RolloutConfig(tensor_parallel_size=1, seed=rank)),
        "model": (f"model-{rank}", RolloutConfig(tensor_parallel_size=1)),
    }
    found = {}
    for name, (model, config) in given.items():
        start = time.perf_counter()
        try:
            RolloutEngine(model, config)
        except ValueError as error:
            found[name] = {"message": str(error), "seconds": time.perf_counter() - start}
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
