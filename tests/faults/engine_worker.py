"""Runs in every rank: a real engine on two ranks, and one of them goes wrong in the middle of a phase.

torchrun --nproc_per_node=2 engine_worker.py MODEL OUT HOW
"""

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, watched

CONFIG = RolloutConfig(max_model_len=128, kv_cache_gib=0.25, enforce_eager=True, stall_timeout_s=15.0)
SAMPLING = SamplingConfig(max_tokens=64, ignore_eos=True, top_k=20)  # top-k: the tokens are drawn on each rank
PROMPTS = [[10, 20, 30], [11, 21, 31, 41]]


class PlantedError(Exception):
    pass


def goes_wrong(engine: RolloutEngine, out: Path, how: str) -> None:
    """In step 5 of the next phase."""
    if how == "seed":
        engine.config = replace(engine.config, seed=1)
        return
    worker = engine._core.executor.driver_worker.worker
    execute, count = worker.execute_model, iter(range(10**6))

    def execute_model(scheduler_output):
        if next(count) == 5:
            (out / "start").write_text(repr(time.time()))
            if how == "raise":
                raise PlantedError(f"in {threading.current_thread().name}")
            if how == "hang":
                threading.Event().wait()
        return execute(scheduler_output)

    worker.execute_model = execute_model


def main() -> None:
    model, out, how = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    (out / "start").write_text(repr(time.time()))
    config = replace(CONFIG, seed=int(os.environ["RANK"])) if how == "config" else CONFIG
    with watched(out, CONFIG.stall_timeout_s), RolloutEngine(model, config) as engine:
        for _ in range(2):  # whatever vLLM compiles on the way, which takes its time where no cache has it
            engine.generate(PROMPTS, SAMPLING)
        (out / "start").write_text(repr(time.time()))
        if engine.world.rank == 1:
            goes_wrong(engine, out, how)
        engine.generate(PROMPTS, SAMPLING)
        print("generated")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
