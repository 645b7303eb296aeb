"""Three ranks on what pass for two machines; records a step and writes its timeline: `torchrun ... OUTPUT_FOLDER`."""

import json
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from rollout import init_world, record_span, seconds_ahead, span
from trainers.timeline import timed_by_thread

AHEAD_S = 1000.0


def main(folder: Path) -> None:
    world = init_world()
    ahead = seconds_ahead()
    elsewhere = world.rank > 0
    clock = (lambda: time.perf_counter() + AHEAD_S) if elsewhere else time.perf_counter
    ahead_elsewhere = seconds_ahead("other" if elsewhere else "this", clock)
    for step in range(4):
        with timed_by_thread(step, [1, 3], folder, world):
            work(world.rank)
    (folder / f"rank{world.rank}.json").write_text(json.dumps([ahead, ahead_elsewhere]))
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int) -> None:
    """A step of this rank: phases of the main thread, with the execute thread and a worker at work in one of them."""

    def execute() -> None:
        with span("copy weights"):
            time.sleep(0.002)

    with span("sync"):
        thread = threading.Thread(target=execute, name=f"execute-rank{rank}")
        thread.start()
        thread.join()
    with span("reward"):
        began = time.perf_counter()
        record_span("reward worker 0", "reward", began, time.perf_counter())
    with span("optimize"):
        for number in range(3):
            with span("forward", responses=number):
                pass
            with span("backward"):
                dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
