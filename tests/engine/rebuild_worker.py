"""One process: an engine that cannot be built, then several, one after the other; results to OUT/rank0.json.

rebuild_worker.py MODEL OUT
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig

CONFIG = RolloutConfig(max_model_len=512, kv_cache_gib=0.25, enforce_eager=True, block_size=32, sleep="kv_cache")
SAMPLING = SamplingConfig(max_tokens=16, ignore_eos=True)
PROMPTS = [[10 + number % 400] * 300 for number in range(256)]
ENGINES = 6


def held() -> dict[str, int]:
    """By this process."""
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "bytes": process.memory_info().rss,
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def execute_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("execute")]


def fails_to_build(model: str, config: RolloutConfig) -> dict[str, object]:
    try:
        RolloutEngine(model, config)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "threads": execute_threads(), "groups": held()["groups"]}
    return {"error": None}


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results: dict = {
        "small_cache": fails_to_build(model, replace(CONFIG, kv_cache_gib=1e-5)),
        "no_model": fails_to_build(str(out), CONFIG),
        "held": [],
    }
    policy = AutoModelForCausalLM.from_pretrained(model)
    closed = []
    for version in range(ENGINES):
        engine = RolloutEngine(model, CONFIG)
        engine.sync_weights(policy, version)
        results["rows"] = len(engine.generate(PROMPTS, SAMPLING))
        engine.sleep()
        engine.generate(PROMPTS, SAMPLING)
        results["open"] = held()
        engine.close()
        closed.append(engine)  # as a notebook's variables do
        results["held"].append(held())
    results["default_group"] = dist.is_initialized()
    (out / "rank0.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
