"""Runs in each of two ranks, a replica of its own each (tensor-parallel size 1); results to OUT/rankN.json.

torchrun --nproc_per_node=2 replicas_worker.py MODEL OUT
"""

import json
import sys
from pathlib import Path

from rollout import RolloutConfig, RolloutEngine, SamplingConfig


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    config = RolloutConfig(tensor_parallel_size=1, max_model_len=128, kv_cache_gib=0.25, enforce_eager=True)
    with RolloutEngine(model, config) as engine:
        rank = engine.world.rank
        prompts = [[10 + rank, 20, 30]] * (2 + 3 * rank)
        batch = engine.generate(prompts, SamplingConfig(max_tokens=4 + 8 * rank, n=2, ignore_eos=True))
        result = {"rows": len(batch), "tokens": int(batch.response_lengths.sum()), "metrics": engine.metrics}
    (out / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
