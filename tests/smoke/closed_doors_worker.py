"""Runs as one plain process: an engine's sockets, and a model whose own code must not run; written to OUT.

python closed_doors_worker.py MODEL MODEL_WITH_CODE OUT
"""

import json
import os
import sys
from pathlib import Path

import psutil
import torch.distributed as dist

from rollout import RolloutConfig, RolloutEngine, init_world
from rollout.world import GLOO_INTERFACE

CONFIG = RolloutConfig(max_model_len=128, kv_cache_gib=0.25, enforce_eager=True)


def refusal(model: str) -> str:
    try:
        RolloutEngine(model, CONFIG)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def main() -> None:
    model, with_code, out = sys.argv[1:]
    os.environ[GLOO_INTERFACE] = "not-there"
    found: dict = {}
    try:
        init_world()
    except RuntimeError as error:
        found["interface_of_the_user"] = "not-there" if "not-there" in str(error) else str(error)
    del os.environ[GLOO_INTERFACE]
    found["refused"] = refusal(with_code)
    engine = RolloutEngine(model, CONFIG)
    connections = psutil.Process().net_connections("inet")
    found["listening"] = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    found["gloo_groups"] = len(dist.distributed_c10d._world.pg_map)
    found["interface_in_environment"] = os.environ.get(GLOO_INTERFACE)
    engine.close()
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
