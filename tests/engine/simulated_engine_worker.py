"""Runs in every rank: RolloutEngine on the simulated accelerator, both schedules; what each did goes to OUT/rankN.json.

torchrun --nproc_per_node=2 simulated_engine_worker.py MODEL OUT
"""

import json
import sys
from pathlib import Path

import numpy as np

from rollout import RolloutConfig, RolloutEngine, SamplingConfig
from rollout.throughput import EXECUTE

STEP_MS = 20.0
MAX_TOKENS = 24


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results = {}
    for asynchronous in (True, False):
        config = RolloutConfig(max_model_len=128, simulate_step_ms=STEP_MS, async_scheduling=asynchronous)
        with RolloutEngine(model, config) as engine:
            rank = engine.world.rank
            prompts = [[10 + rank, 11 + index] for index in range(32)]
            sampling = SamplingConfig(max_tokens=MAX_TOKENS, ignore_eos=True)
            engine.generate(prompts, sampling, seed=0)  # the first phase of a process is slow
            engine.generate(prompts, sampling, seed=1)
            busy = engine.timeline.spans(EXECUTE)
            results["asynchronous" if asynchronous else "synchronous"] = {
                "digest": engine.digest(),
                "metrics": engine.metrics,
                "device_steps": len(busy) - int(np.isnan(busy).any(axis=1).sum()),
                "device_ms": float(np.nanmedian(busy[:, 1] - busy[:, 0]) * 1e3),
            }
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
